"""f-DPO: Direct Preference Optimization under another divergence than the reverse KL.

    u = π(y|x) / π_ref(y|x)
    L = − log σ(β f′(u_w) − β f′(u_l))                                          (theorem 1 and the loss after it)

    divergence        f′(u)  (table 1)
    reverse-kl        log u + 1            DPO
    forward-kl        −1/u
    jensen-shannon    log(2u / (1 + u))
    alpha             (1 − u^−α) / α       α → 0: reverse-kl; 1: forward-kl

The optimum under Bradley-Terry preferences is that of E_π[r] − β D_f(π‖π_ref). This needs f′(0) = −∞: where f′ has a lower bound
(chi-squared, α < 0) the best policy gives some answers no probability, no finite margin expresses it, and the loss ends elsewhere. Such
divergences are not offered. Rewards are logged as β (f′(u) − f′(1)), which is 0 at the reference and changes no margin.

Choice of ours: u^−α leaves float32 for answers that the policy has all but given up. Below u^−α = e³⁰, f′ goes on as its tangent, so that
loss and gradient stay finite; no optimum lies there unless rewards span more than 10¹³ β / α.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from telos.algorithms.language._loop_pairs import LogisticConfig
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.divergences import FDivergence, by_name
from telos.functional.pairwise import PairLogps, diagnostics, smoothed_logistic
from telos.functional.reduction import Losses

_LARGEST_EXPONENT = 30.0


@dataclass(frozen=True, kw_only=True)
class Config(LogisticConfig):
    """Options of f-DPO."""

    beta: float = 0.1  # strength of the regularisation, > 0 (paper: 0.1)
    divergence: Literal["reverse-kl", "forward-kl", "jensen-shannon", "alpha"] = "reverse-kl"  # what keeps the policy near the reference
    alpha: float = 0.5  # α of --divergence alpha, > 0 and <= 1 (paper: 0.3, 0.5, 0.7)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, "> 0 and <= 1", "alpha")
        if self.divergence != "alpha" and self.alpha != Config.__dataclass_fields__["alpha"].default:
            raise UsageError(f"--alpha has no effect while --divergence is {self.divergence}; give --divergence alpha")


def derivative(divergence: FDivergence, rate: float, log_ratio: Tensor) -> Tensor:
    """f′(u) − f′(1) at `log_ratio` = log u, any shape. `rate` is the α for which f′ falls as −u^−α towards u = 0, or 0 where it falls as
    log u."""
    at_one = divergence.f_prime(torch.zeros_like(log_ratio))
    if rate == 0:
        return divergence.f_prime(log_ratio) - at_one
    edge = -_LARGEST_EXPONENT / rate
    # Two clamps, each with a gradient on its side only. One clamp and a difference from it would add and subtract the tangent's slope
    # everywhere, and rounding would leave nothing of the true gradient.
    beyond = log_ratio.clamp(max=edge) - edge
    return divergence.f_prime(log_ratio.clamp(min=edge)) - at_one + math.exp(_LARGEST_EXPONENT) * beyond


def loss(config: Config, pair: PairLogps) -> Losses:
    divergence = by_name(config.divergence, config.alpha)
    rate = {"forward-kl": 1.0, "alpha": config.alpha}.get(config.divergence, 0.0)
    chosen, rejected = (config.beta * derivative(divergence, rate, ratio) for ratio in (pair.chosen_ratio, pair.rejected_ratio))
    return Losses(smoothed_logistic(chosen - rejected, config.label_smoothing), metrics=diagnostics(pair, chosen, rejected))


METHOD = Method(
    key="f-dpo",
    title="f-DPO",
    family="language",
    loop="pairs",
    changes="extends DPO from the reverse KL to the forward KL, Jensen-Shannon and alpha divergences",
    paper="Wang et al. 2023, Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints, "
    "arXiv:2309.16240",
    config=Config,
    loss=loss,
    needs=frozenset({"reference"}),
    system=174,
    aliases=("fdpo", "f-divergence-dpo"),
)
