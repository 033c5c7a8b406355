"""SimPO: the reward is the length-normalised log-probability, and no reference is needed.

    r(x, y) = β / |y| · log π(y|x)                                              (eq. 4)
    L = − log σ(r_w − r_l − γ)                                                  (eq. 6)

The target margin γ is given as `gamma_beta_ratio` = γ / β, as in the authors' code, because it is the ratio that transfers between values of β.
`label_smoothing` is theirs too: (1 − ε) of the loss above plus ε of the loss with the sides exchanged, the margin included.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language._loop_pairs import LogisticConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, diagnostics, smoothed_logistic
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(LogisticConfig):
    """Options of SimPO."""

    beta: float = 2.0  # scale of the reward, > 0 (paper: 2.0 to 2.5)
    gamma_beta_ratio: float = 0.5  # target margin over beta, >= 0 (paper: 0.3 to 0.8)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, ">= 0", "gamma_beta_ratio")


def loss(config: Config, pair: PairLogps) -> Losses:
    chosen, rejected = config.beta * pair.chosen.mean, config.beta * pair.rejected.mean
    logits = chosen - rejected - config.gamma_beta_ratio * config.beta
    return Losses(smoothed_logistic(logits, config.label_smoothing), metrics=diagnostics(pair, chosen, rejected))


METHOD = Method(
    key="simpo",
    title="SimPO",
    family="language",
    loop="pairs",
    changes="length-normalised margin with a target, no reference model",
    paper="Meng, Xia and Chen 2024, SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv:2405.14734",
    config=Config,
    loss=loss,
    system=191,
    aliases=("simple-preference-optimization",),
)
