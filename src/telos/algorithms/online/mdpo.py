"""Mirror descent policy optimisation, on-policy: several gradient steps on a mirror descent step, held near the old policy by a KL divergence.

    L = E[ −(π / π_k) A + (1 / t_k) KL(π ‖ π_k) ],   t_k = t_0 (1 − k / K)                                  (Tomar et al. 2020, eq. 8 and section 5.2)

Nothing is clipped and the bound is no constraint: the divergence from the policy of the iteration's start is part of the loss, and its gradient is zero in the
first of the iteration's steps, which is why there must be several. `soft-mdpo` is the off-policy form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from telos.algorithms.online._loop_on_policy import OnPolicyConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.reduction import Losses
from telos.functional.segments import Estimate, Segment, StepView, gae, standardised


@dataclass(frozen=True, kw_only=True)
class Config(OnPolicyConfig):
    """Options of MDPO."""

    minibatch_size: int = 0  # steps in one optimiser step; 0 = all of an iteration's (paper: all)
    epochs: int = 10  # passes over an iteration's steps, > 1 (paper: 10)
    step_size: float = 1.0  # t_0: step of mirror descent at the start, > 0
    step_schedule: bool = True  # it falls linearly to zero (paper), or stays
    normalize_advantage: bool = True  # advantages are standardised over an iteration
    value_coef: float = 0.5  # weight of the critic's squared error, >= 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 1", "epochs")
        require(self, "> 0", "step_size")
        require(self, ">= 0", "value_coef")


def estimate(config: Config, segment: Segment, state: Mapping[str, float]) -> Estimate:
    advantages, returns = gae(segment, config.gamma, config.gae_lambda)
    return Estimate(standardised(advantages) if config.normalize_advantage else advantages, returns, state)


def loss(config: Config, view: StepView) -> Losses:
    step = config.step_size * (1 - view.progress if config.step_schedule else 1.0)
    kl = view.distribution.kl(view.old)
    error = (view.returns - view.value) ** 2
    critic = Losses(config.value_coef * error, metrics={"loss/critic": error})
    ratio = (view.logprob - view.old_logprob).exp()
    metrics = {"entropy": view.distribution.entropy(), "policy/kl": kl}
    return Losses(kl / step - ratio * view.advantage, metrics=metrics, extra=(critic,))


METHOD = Method(
    key="mdpo",
    title="Mirror Descent Policy Optimization",
    family="online",
    loop="on-policy",
    changes="penalises the KL divergence from the iteration's first policy, with a step size that falls, and clips nothing",
    paper="Tomar et al. 2020, Mirror Descent Policy Optimization, arXiv:2005.09814",
    config=Config,
    loss=loss,
    estimate=estimate,
    system=42,
    aliases=("mirror-descent-policy-optimization",),
)
