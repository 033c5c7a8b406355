"""SLiC-HF: the chosen answer must be likelier than the rejected one by a margin, and the policy must stay likely on good text.

    L = max(0, δ − log π(y_w|x) + log π(y_l|x)) − λ log π(y_0|x)                (eq. 1)

The log-probabilities are those of whole answers, so δ is in nats. The paper's y_0 is the supervised target of the prompt; a table of
pairs has none, and y_0 is the chosen answer here. The loss says nothing of how likely a preference is: once a pair keeps its margin, only
the likelihood acts on it. RSO's hinge-norm and the `hinge` of TRL's DPO put log π/π_ref in the place of log π; they are `hinge` on other
margins.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telos.algorithms.language._loop_pairs import PairsConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, answer_nll, diagnostics
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(PairsConfig):
    """Options of SLiC-HF."""

    delta: float = 1.0  # δ: margin between the answers' log-probabilities, nats, >= 0 (0.1 to 2 in SimPO's comparison)
    nll_coef: float = 0.1  # λ: weight of the likelihood of chosen answers, >= 0 (0.1 to 10 in SimPO's comparison)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "delta", "nll_coef")


def hinge(margins: Tensor, delta: float = 1.0) -> Tensor:
    """max(0, δ − margin), any shape: what a margin below δ lacks."""
    return (delta - margins).clamp(min=0)


def loss(config: Config, pair: PairLogps) -> Losses:
    chosen, rejected = pair.chosen.sum, pair.rejected.sum
    nll = answer_nll(pair.chosen, per_token=False)
    values = hinge(chosen - rejected, config.delta) + config.nll_coef * nll
    return Losses(values, metrics=diagnostics(pair, chosen, rejected) | {"nll_loss": nll})


METHOD = Method(
    key="slic",
    title="SLiC-HF",
    family="language",
    loop="pairs",
    changes="asks for a margin between the log-probabilities of whole answers by a hinge loss, beside their likelihood",
    paper="Zhao et al. 2023, SLiC-HF: Sequence Likelihood Calibration with Human Feedback, arXiv:2305.10425",
    config=Config,
    loss=loss,
    aliases=("sequence-likelihood-calibration",),
)
