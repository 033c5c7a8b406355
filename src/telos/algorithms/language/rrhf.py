"""RRHF: the likelihoods of several answers are put in the order of their quality, and the best answer is imitated.

    p_i = log π(y_i|x) / |y_i|^a                                                (paper: a = 1)
    L = λ Σ_{r_i < r_j} max(0, p_i − p_j) − log π(y_best|x)                     (L_rank + L_ft)

The ranking term asks for the order and for no margin: it is zero, and has no gradient, once every better answer has the larger p. Answers of
equal quality make no pair. Of several best answers the first is imitated.

Normalisation of the likelihood: summed over the answer's tokens in the paper; the authors' code averages over them (`nll_per_token`), under which the
two terms are of one size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from telos.algorithms.language._loop_ranked import RankedConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import RankedLogps
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(RankedConfig):
    """Options of RRHF."""

    rank_coef: float = 1.0  # λ: weight of the ranking term against the likelihood, >= 0 (paper: 1)
    length_penalty: float = 1.0  # a: exponent of the length that divides log-probabilities, >= 0; 0 = not normalised (paper: 1)
    nll_per_token: bool = False  # the best answer's likelihood is averaged over its tokens, not summed

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "rank_coef", "length_penalty")


def ordered(ranked: RankedLogps) -> Tensor:
    """[B, K, K] bool: answer i is there and better than answer j, which is there too."""
    better = ranked.quality[:, :, None] > ranked.quality[:, None, :]
    return better & ranked.present[:, :, None] & ranked.present[:, None, :]


def of_best(values: Tensor, ranked: RankedLogps) -> Tensor:
    """The value [B] of each list's first best answer, from values [B, K]."""
    return values.gather(1, ranked.quality.argmax(1, keepdim=True)).squeeze(1)  # of equal values argmax takes the first


def diagnostics(ranked: RankedLogps, rewards: Tensor) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
    """Metrics of lists under the names of pairs: the best answer's score is `rewards/chosen`, the mean of the others' is `rewards/rejected`;
    `rewards/accuracies` is the share of ordered pairs whose scores [B, K] agree. A list without an ordered pair has none."""
    order = ordered(ranked)
    chosen, count = of_best(rewards, ranked), ranked.present.sum(1)
    total = rewards.masked_fill(~ranked.present, 0.0).sum(1)
    rejected = (total - chosen) / (count - 1).clamp(min=1)
    agree = ((rewards[:, :, None] > rewards[:, None, :]) & order).flatten(1).sum(1)
    pairs = order.flatten(1).sum(1)
    several = count > 1
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": (rejected, several),
        "rewards/margins": (chosen - rejected, several),
        "rewards/accuracies": (agree / pairs.clamp(min=1), pairs > 0),
        "logps/chosen": of_best(ranked.sum, ranked),
    }


def loss(config: Config, ranked: RankedLogps) -> Losses:
    scores = ranked.sum / ranked.mask.sum(-1).clamp(min=1).to(ranked.tokens) ** config.length_penalty
    lack = (scores[:, None, :] - scores[:, :, None]).clamp(min=0)  # [b, i, j] by how much j is ahead of i
    rank = torch.where(ordered(ranked), lack, 0.0).sum((1, 2))
    nll = -of_best(ranked.mean if config.nll_per_token else ranked.sum, ranked)
    return Losses(config.rank_coef * rank + nll, metrics={**diagnostics(ranked, scores), "rank_loss": rank, "nll_loss": nll})


METHOD = Method(
    key="rrhf",
    title="RRHF",
    family="language",
    loop="ranked",
    changes="orders the length-normalised likelihoods of several answers by a ranking loss, beside the likelihood of the best",
    paper="Yuan et al. 2023, RRHF: Rank Responses to Align Language Models with Human Feedback without tears, arXiv:2304.05302",
    config=Config,
    loss=loss,
    aliases=("rank-responses-human-feedback",),
)
