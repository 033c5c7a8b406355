"""ORPO: supervised fine-tuning on the chosen answers with a penalty on the odds of the rejected ones, in one stage and without a reference.

    P(y|x) = exp(log π(y|x) / |y|),   odds(y|x) = P / (1 − P)                   (eq. 3 and 4)
    L = − log P(y_w|x) − λ log σ(log odds(y_w|x) − log odds(y_l|x))             (eq. 6 and 7)

Both terms use the mean log-probability a token. The likelihood is of the answer alone; the authors' code and TRL count the prompt's
tokens in it too. λ is called `beta` in TRL. Not the ORPO of occupancy measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from telos.algorithms.language._loop_pairs import LogisticConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, answer_nll, diagnostics, smoothed_logistic
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(LogisticConfig):
    """Options of ORPO."""

    odds_coef: float = 0.1  # λ: weight of the odds ratio beside the likelihood, >= 0 (paper: 0.1 for Mistral 7B); `beta` in TRL

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "odds_coef")


def log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 − p)) of log p <= 0, any shape. A p that rounds to 1 counts as 1 − ε of its type, where the odds are finite."""
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    likely = logps > -math.log(2)
    # log(1 − p) in the form that is exact on its side; the other side gets a harmless input, because `where` lets NaN gradients through.
    complement = torch.where(
        likely, torch.log(-torch.expm1(logps.masked_fill(~likely, -1.0))), torch.log1p(-torch.exp(logps.masked_fill(likely, -1.0)))
    )
    return logps - complement


def loss(config: Config, pair: PairLogps) -> Losses:
    ratio = log_odds(pair.chosen.mean) - log_odds(pair.rejected.mean)
    nll = answer_nll(pair.chosen, per_token=True)
    values = nll + config.odds_coef * smoothed_logistic(ratio, config.label_smoothing)
    metrics = diagnostics(pair, pair.chosen.mean, pair.rejected.mean)
    return Losses(values, metrics=metrics | {"nll_loss": nll, "log_odds_chosen": ratio})


METHOD = Method(
    key="orpo",
    title="ORPO",
    family="language",
    loop="pairs",
    changes="adds an odds-ratio penalty to supervised fine-tuning, so that neither a reference nor a first stage is needed",
    paper="Hong, Lee and Thorne 2024, ORPO: Monolithic Preference Optimization without Reference Model, arXiv:2403.07691",
    config=Config,
    loss=loss,
    aliases=("odds-ratio-preference-optimization",),
)
