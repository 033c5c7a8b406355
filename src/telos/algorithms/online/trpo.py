"""Trust region policy optimisation: the largest step along the natural gradient that stays within a KL divergence of the old policy.

    max E[ (π / π_old) A ]   subject to   E[ KL(π_old ‖ π) ] ≤ δ                                          (Schulman et al. 2015, eq. 14)
    step = √(2δ / xᵀ F x) · x,   F x = g                                                              (appendix C)

F is the Hessian of the mean KL divergence, known by its products, x found by conjugate gradients. The step is shortened until the surrogate rises and the
bound holds; where nothing holds the policy stays. The critic is trained by minibatches of squared errors on GAE's returns, where the paper uses Monte-Carlo
returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from telos.algorithms.online._loop_on_policy import ActorCritic, OnPolicyConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.natural import conjugate_gradient, fisher_product, flat, line_search
from telos.functional.reduction import Losses
from telos.functional.segments import Estimate, Segment, StepView, gae, standardised
from telos.functional.segments import flat as rows


@dataclass(frozen=True, kw_only=True)
class Config(OnPolicyConfig):
    """Options of TRPO."""

    learning_rate: float = 1e-3  # peak, of the critic
    max_kl: float = 0.01  # δ: nats that an iteration may move, > 0 (paper: 0.01)
    damping: float = 0.1  # added to the Fisher matrix's diagonal, >= 0
    cg_iterations: int = 15  # products with the Fisher matrix for a direction (paper: 10)
    backtracks: int = 10  # lengths of a step that are tried, each 0.8 of the one before
    normalize_advantage: bool = True  # advantages are standardised over an iteration

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "max_kl")
        require(self, ">= 0", "damping")
        require(self, ">= 1", "cg_iterations", "backtracks")


def estimate(config: Config, segment: Segment, state: Mapping[str, float]) -> Estimate:
    advantages, returns = gae(segment, config.gamma, config.gae_lambda)
    return Estimate(standardised(advantages) if config.normalize_advantage else advantages, returns, state)


def update(config: Config, agent: ActorCritic, segment: Segment, estimate: Estimate) -> dict[str, float]:
    """One step of the policy."""
    observation, action, advantage = rows(segment.observation), rows(segment.action), rows(estimate.advantages)
    parameters = [p for p in agent.policy.parameters() if p.requires_grad]
    with torch.no_grad():
        old = agent.policy.distribution(observation).fixed()
        old_logprob = old.log_prob(action)

    def surrogate(found: Any) -> torch.Tensor:
        return ((found.log_prob(action) - old_logprob).exp() * advantage).mean()

    now = agent.policy.distribution(observation)
    gradient = flat(torch.autograd.grad(surrogate(now), parameters, retain_graph=True)).detach()
    if float(gradient.norm()) < 1e-12:
        return {"policy/step": 0.0, "policy/gain": 0.0, "policy/kl": 0.0}
    product = fisher_product(old.kl(now).mean(), parameters, config.damping)
    direction = conjugate_gradient(product, gradient, config.cg_iterations)
    length = torch.sqrt(2 * config.max_kl / (direction @ product(direction)).clamp(min=1e-12))

    @torch.no_grad()
    def gain_and_kl() -> tuple[float, float]:
        found = agent.policy.distribution(observation)
        return float(surrogate(found)), float(old.kl(found).mean())

    taken = line_search(parameters, direction * length, gain_and_kl, config.max_kl, tries=config.backtracks)
    return {"policy/step": taken.share, "policy/gain": taken.gain, "policy/kl": taken.kl}


def loss(config: Config, view: StepView) -> Losses:
    """The critic's."""
    error = (view.returns - view.value) ** 2
    return Losses(error, metrics={"loss/critic": error, "entropy": view.distribution.entropy()})


METHOD = Method(
    key="trpo",
    title="Trust Region Policy Optimization",
    family="online",
    loop="on-policy",
    changes="takes the largest step along the natural gradient within a bound on the KL divergence",
    paper="Schulman et al. 2015, Trust Region Policy Optimization, arXiv:1502.05477",
    config=Config,
    loss=loss,
    estimate=estimate,
    update=update,
    aliases=("trust-region-policy-optimization",),
)
