"""Contrastive Preference Optimization: DPO's loss with a uniform reference, held in place by the likelihood of the chosen answers.

    L = − log σ(β log π(y_w|x) − β log π(y_l|x)) − λ log π(y_w|x)               (first term: eq. 3; λ = 1)

A uniform reference cancels from the margin, so that none is kept in memory; the likelihood replaces its hold on the policy.

Normalisation: the paper's equations sum the likelihood over the answer. The authors' code and TRL average it over all chosen tokens of a
batch instead, which is many times weaker; `nll_per_token`, which averages over each answer, is our nearest form of that. The margin is
summed in all.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language._loop_pairs import LogisticConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, answer_nll, diagnostics, smoothed_logistic
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(LogisticConfig):
    """Options of CPO."""

    beta: float = 0.1  # scale of the log-probabilities in the margin, > 0 (paper: 0.1)
    nll_coef: float = 1.0  # λ: weight of the likelihood of chosen answers, >= 0 (paper: 1)
    nll_per_token: bool = False  # the likelihood is averaged over each answer's tokens, not summed

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, ">= 0", "nll_coef")


def loss(config: Config, pair: PairLogps) -> Losses:
    chosen, rejected = config.beta * pair.chosen.sum, config.beta * pair.rejected.sum
    nll = answer_nll(pair.chosen, config.nll_per_token)
    values = smoothed_logistic(chosen - rejected, config.label_smoothing) + config.nll_coef * nll
    return Losses(values, metrics=diagnostics(pair, chosen, rejected) | {"nll_loss": nll})


METHOD = Method(
    key="cpo",
    title="Contrastive Preference Optimization",
    family="language",
    loop="pairs",
    changes="replaces DPO's reference by a uniform one and the likelihood of the chosen answers",
    paper="Xu et al. 2024, Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation, "
    "arXiv:2401.08417",
    config=Config,
    loss=loss,
    aliases=("contrastive-preference-optimization",),
)
