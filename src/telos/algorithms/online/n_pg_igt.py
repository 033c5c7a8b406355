"""N-PG-IGT: normalised policy gradient whose running mean is corrected by sampling at an extrapolated point (implicit gradient transport).

    θ̃_t = θ_t + ((1 − η_t) / η_t) (θ_t − θ_{t−1})
    d_t = (1 − η_t) d_{t−1} + η_t ĝ(θ̃_t)
    θ_{t+1} = θ_t + γ_t d_t / ‖d_t‖                                                                   (Fatkhullin et al. 2023, algorithm 1)

A running mean of gradients lags behind a moving point. Were the gradient linear in θ, sampling at θ̃_t would make d_t a mean of gradients at θ_t itself
(Arnold et al. 2019; Cutkosky and Mehta 2020): no second derivative and no importance weight is needed. The theorem has η_t = (2 / (t + 2))^4/5 and
γ_t ∝ 1 / (t + 2) and gives a suboptimality of order t^−2/5 up to the policy class's bias, that is ε^−2.5 episodes to an ε.

Here t starts from 0, where η_0 = 1 and d_0 = ĝ(θ_0), and γ_t = γ_0 · 2 / (t + 2). In the theorem γ_0 is a multiple of M_g / μ_F, the bound on ‖∇log π‖ over the
least eigenvalue of the Fisher matrices; these are seldom known, so that γ_0 is an option. The mean over several episodes and a baseline are ours; the
paper has one episode and none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from telos.algorithms.online import policy_gradient
from telos.algorithms.online._loop_policy_gradient import PolicyGradientConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.recursions import Query, Track, decayed, step_along


@dataclass(frozen=True, kw_only=True)
class Config(PolicyGradientConfig):
    """Options of N-PG-IGT."""

    step_power: float = 1.0  # how fast steps shrink, γ_t ∝ t^−p, >= 0 (paper: 1)
    momentum_power: float = 0.8  # how fast the running mean lengthens, η_t ∝ t^−p, >= 0 (paper: 4/5)
    transport: bool = True  # episodes are played at the extrapolated point; without, at the current one (normalised gradient with momentum)
    normalize: bool = True  # steps have the length γ_t, whatever the estimate's (paper: yes)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "step_power", "momentum_power")


def propose(config: Config, track: Track, chance: Tensor, index: int) -> tuple[Query, ...]:
    share = decayed(1.0, config.momentum_power, index)
    ahead = (1 - share) / share if config.transport else 0.0
    return (Query(track.parameters + ahead * (track.parameters - track.previous)),)


def advance(config: Config, track: Track, found: tuple[Tensor, ...], index: int) -> Track:
    direction = torch.lerp(track.direction, found[0], decayed(1.0, config.momentum_power, index))
    size = decayed(config.step_size, config.step_power, index)
    return track.moved(step_along(direction, size, config.normalize), direction)


METHOD = Method(
    key="n-pg-igt",
    title="Normalized policy gradient with implicit gradient transport",
    family="online",
    loop="policy-gradient",
    changes="keeps a running mean of gradients up to date by sampling at an extrapolated point, and takes steps of a length of their own",
    paper="Fatkhullin et al. 2023, Stochastic Policy Gradient Methods: Improved Sample Complexity for Fisher-non-degenerate Policies, arXiv:2302.01734",
    config=Config,
    loss=policy_gradient.loss,
    propose=propose,
    advance=advance,
    system=127,
    aliases=("pg-igt", "igt"),
)
