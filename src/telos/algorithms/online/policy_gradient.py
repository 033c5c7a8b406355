"""Stochastic policy gradient: a step along the estimate of each batch of episodes, with a step size that shrinks.

    θ_{t+1} = θ_t + γ_t ĝ(θ_t),   γ_t = γ_0 (2 / (t + 2))^p

ĝ is the loop's estimate of the gradient (GPOMDP). Where the suboptimality is bounded by a multiple of the gradient's norm, as it is for policies whose Fisher
matrices do not degenerate, p = 2/3 gives the best rate that this method is known to have: a suboptimality of order t^−1/3, that is ε^−3 episodes to an ε
(Fatkhullin et al. 2022, arXiv:2210.01748). With `normalize` steps have the length γ_t.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telos.algorithms.online._loop_policy_gradient import PolicyGradientConfig, StepsView
from telos.core.config import require
from telos.core.method import Method
from telos.functional.recursions import Track, decayed, step_along
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(PolicyGradientConfig):
    """Options of the plain policy gradient."""

    step_size: float = 0.01  # γ_0: the first step's factor on the gradient, or its length, > 0
    step_power: float = 2 / 3  # p: how fast steps shrink, >= 0; 0 = not at all (paper of the rate: 2/3)
    normalize: bool = False  # steps have the length γ_t, whatever the gradient's

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "step_power")


def loss(config: PolicyGradientConfig, view: StepsView) -> Losses:
    """−Ψ log π of each step: minus its gradient is the estimate."""
    return Losses(-view.weight * view.logprob, metrics={"entropy": -view.logprob})


def advance(config: Config, track: Track, found: tuple[Tensor, ...], index: int) -> Track:
    (gradient,) = found
    size = decayed(config.step_size, config.step_power, index)
    return track.moved(step_along(gradient, size, config.normalize), gradient)


METHOD = Method(
    key="policy-gradient",
    title="Stochastic policy gradient",
    family="online",
    loop="policy-gradient",
    changes="follows each batch's estimate of the gradient by steps that shrink, with no memory of earlier ones",
    paper="Baxter and Bartlett 2001, Infinite-Horizon Policy-Gradient Estimation, arXiv:1106.0665",
    config=Config,
    loss=loss,
    advance=advance,
    aliases=("vanilla-pg", "gpomdp", "vanilla-policy-gradient"),
)
