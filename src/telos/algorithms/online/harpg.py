"""(N)-HARPG: a running mean of gradients that is carried from point to point by Hessian–vector products.

    θ̂_t = q_t θ_t + (1 − q_t) θ_{t−1},   q_t uniform on [0, 1]
    v_t = B(τ̂_t; θ̂_t) (θ_t − θ_{t−1})
    d_t = (1 − η_t)(d_{t−1} + v_t) + η_t ĝ(τ_t; θ_t)
    θ_{t+1} = θ_t + γ_t d_t   (HARPG)   or   θ_t + γ_t d_t / ‖d_t‖   (N-HARPG)                        (Fatkhullin et al. 2023, algorithm 2)

Because q_t is uniform, v_t is an unbiased estimate of ∇J(θ_t) − ∇J(θ_{t−1}): the mean does not lag, and its variance falls as 1/t (Tran and Cutkosky 2022 for
minimisation, Salehkaleybar et al. 2022 for policies). Each step plays two sets of episodes, one for ĝ and one for B. The theorems have η_t = 2 / (t + 2), with
γ_t ∝ 1 / (t + 2) for the normalised form and γ_t = γ_0 η_t^1/2 for the plain one, and give a suboptimality of order t^−1/2 up to the policy class's bias,
that is ε^−2 episodes to an ε.

Here t starts from 0, where η_0 = 1 and d_0 = ĝ(θ_0), and step sizes are γ_0 (2 / (t + 2))^p with `step_power` p; γ_0 is an option, as in N-PG-IGT. The mean
over several episodes and a baseline are ours; the paper has one episode and none.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telos.algorithms.online import policy_gradient
from telos.algorithms.online._loop_policy_gradient import PolicyGradientConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.recursions import Query, Track, decayed, step_along


@dataclass(frozen=True, kw_only=True)
class Config(PolicyGradientConfig):
    """Options of (N)-HARPG."""

    normalize: bool = True  # N-HARPG: steps have the length γ_t, whatever the estimate's; without, HARPG
    step_power: float = 1.0  # p: how fast steps shrink, γ_t ∝ t^−p, >= 0 (paper: 1 for N-HARPG, 1/2 for HARPG)
    momentum_power: float = 1.0  # how fast the running mean lengthens, η_t ∝ t^−p, >= 0 (paper: 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "step_power", "momentum_power")

    @property
    def queries(self) -> int:
        return 2


def propose(config: Config, track: Track, chance: Tensor, index: int) -> tuple[Query, ...]:
    last_step = track.parameters - track.previous
    return Query(track.parameters), Query(track.previous + chance * last_step, along=last_step)


def advance(config: Config, track: Track, found: tuple[Tensor, ...], index: int) -> Track:
    gradient, transported = found
    share = decayed(1.0, config.momentum_power, index)
    direction = (1 - share) * (track.direction + transported) + share * gradient
    return track.moved(step_along(direction, decayed(config.step_size, config.step_power, index), config.normalize), direction)


METHOD = Method(
    key="harpg",
    title="(Normalized) Hessian-aided recursive policy gradient",
    family="online",
    loop="policy-gradient",
    changes="carries its running mean of gradients from point to point by Hessian–vector products",
    paper="Fatkhullin et al. 2023, Stochastic Policy Gradient Methods: Improved Sample Complexity for Fisher-non-degenerate Policies, arXiv:2302.01734",
    config=Config,
    loss=policy_gradient.loss,
    propose=propose,
    advance=advance,
    aliases=("n-harpg", "hessian-aided-recursive-policy-gradient"),
)
