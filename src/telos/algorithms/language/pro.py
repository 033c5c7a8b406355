"""PRO: of a ranked list the best answer must win against all others, then the second best against those below it, and so on to the end.

    s_k = log π(y_k|x) / |y_k|
    L_PRO = − Σ_k log [ exp(s_k / T_k^k) / (exp(s_k / T_k^k) + Σ_{i below k} exp(s_i / T_k^i)) ]
    T_k^i = 1 / (r_k − r_i),   T_k^k = min_i T_k^i
    L = L_PRO − β (K − 1)² log π(y_1|x),   β = 0.05

r are the qualities of the data, K the answers of the list: a small gap of quality makes a hot, forgiving comparison. Qualities count in their own units
(the paper's are of a reward model, between 0 and 1; ranks have gaps of 1). Without `reward_gaps` every T is 1, the plain list-wise loss, and two
answers give −log σ(s_1 − s_2).

Departure: "below" means of a lower quality, so answers of equal quality are not compared; the paper's rankings have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from telos.algorithms.language._loop_ranked import RankedConfig
from telos.algorithms.language.rrhf import diagnostics, of_best, ordered
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import RankedLogps
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(RankedConfig):
    """Options of PRO."""

    reward_gaps: bool = True  # temperatures from the gaps of quality, as in the paper; without, every temperature is 1
    nll_coef: float = 0.05  # β: weight of the best answer's likelihood, over (K − 1)², >= 0 (paper: 0.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "nll_coef")


def rank_loss(ranked: RankedLogps, reward_gaps: bool) -> Tensor:
    """L_PRO of each list, [B]; 0 for a list in which no answer is better than another."""
    below, scores = ordered(ranked), ranked.mean  # [b, k, i]: i is below k
    quality = ranked.quality.masked_fill(~ranked.present, 0.0)
    inverse = (quality[:, :, None] - quality[:, None, :]).masked_fill(~below, 0.0) if reward_gaps else below.to(scores)  # 1 / T_k^i
    own = scores * inverse.amax(2)
    others = (scores[:, None, :] * inverse).masked_fill(~below, -torch.inf)
    return (torch.logsumexp(torch.cat([own[:, :, None], others], 2), 2) - own).sum(1)  # nothing below: log exp(own) − own = 0


def loss(config: Config, ranked: RankedLogps) -> Losses:
    rank, nll = rank_loss(ranked, config.reward_gaps), -of_best(ranked.sum, ranked)
    weight = config.nll_coef * (ranked.present.sum(1) - 1).to(nll) ** 2
    return Losses(rank + weight * nll, metrics={**diagnostics(ranked, ranked.mean), "rank_loss": rank, "nll_loss": nll})


METHOD = Method(
    key="pro",
    title="Preference Ranking Optimization",
    family="language",
    loop="ranked",
    changes="contrasts each answer of a ranked list with all below it, with temperatures from the gaps of quality",
    paper="Song et al. 2023, Preference Ranking Optimization for Human Alignment, arXiv:2306.17492",
    config=Config,
    loss=loss,
    aliases=("preference-ranking-optimization",),
)
