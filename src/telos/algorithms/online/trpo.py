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

import torch

from telos.algorithms.online._loop_on_policy import ActorCritic, TrustRegionConfig
from telos.core.method import Method
from telos.functional.natural import trust_region_step
from telos.functional.reduction import Losses
from telos.functional.segments import Estimate, Segment, StepView, gae, standardised
from telos.functional.segments import flat as rows


@dataclass(frozen=True, kw_only=True)
class Config(TrustRegionConfig):
    """Options of TRPO."""

    learning_rate: float = 1e-3  # peak, of the critic
    normalize_advantage: bool = True  # advantages are standardised over an iteration


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

    def gain_and_kl() -> tuple[torch.Tensor, torch.Tensor]:
        now = agent.policy.distribution(observation)
        return ((now.log_prob(action) - old_logprob).exp() * advantage).mean(), old.kl(now).mean()

    return trust_region_step(parameters, gain_and_kl, **config.trust_region).metrics


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
