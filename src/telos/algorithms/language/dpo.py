"""Direct Preference Optimization: the language model is its own reward model.

    r̂(x, y) = β log π(y|x) / π_ref(y|x)                                         (the implicit reward, eq. 5 without its constant)
    L = − (1 − ε) log σ(r̂_w − r̂_l) − ε log σ(r̂_l − r̂_w)                         (eq. 7; ε: conservative DPO, Mitchell 2023)

ε = 0 is the paper's loss. The gradient of the optimum's condition is exact for any data distribution with full support (see the `bandit` tests).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telos.algorithms.language._loop_pairs import LogisticConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, diagnostics, smoothed_logistic
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(LogisticConfig):
    """Options of DPO."""

    beta: float = 0.1  # strength of the KL regularisation, > 0 (paper: 0.1; 0.5 for summaries)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")


def implicit_rewards(config: Config, pair: PairLogps) -> tuple[Tensor, Tensor]:
    """β log π/π_ref of the chosen and the rejected answers, both [B]."""
    return config.beta * pair.chosen_ratio, config.beta * pair.rejected_ratio


def loss(config: Config, pair: PairLogps) -> Losses:
    chosen, rejected = implicit_rewards(config, pair)
    return Losses(smoothed_logistic(chosen - rejected, config.label_smoothing), metrics=diagnostics(pair, chosen, rejected))


METHOD = Method(
    key="dpo",
    title="Direct Preference Optimization",
    family="language",
    loop="pairs",
    changes="fits the policy's own log-ratio to the preferences, without a reward model",
    paper="Rafailov et al. 2023, Direct Preference Optimization: Your Language Model is Secretly a Reward Model, arXiv:2305.18290",
    config=Config,
    loss=loss,
    needs=frozenset({"reference"}),
    system=136,
    aliases=("direct-preference-optimization", "cdpo"),
)
