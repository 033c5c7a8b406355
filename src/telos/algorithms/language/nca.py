"""Noise Contrastive Alignment: tells good answers from the policy's own, so that their likelihood does not fall as it may under DPO.

    r = β log π(y|x) / π_ref(y|x)
    L = − log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l)                            (Chen et al. 2024: L_NCA for K = 2 answers, α → 0)

In the paper's general form answers i = 1 … K with rewards R_i give − Σ_i softmax(R/α)_i log σ(r_i) − 1/K Σ_i log σ(−r_i); with two answers of which one is
preferred for certain the softmax is (1, 0). Where DPO fits a difference of rewards, this fits each reward: the optimum is r = log of the density of chosen
answers over that of all answers in the data, an absolute quantity. With β = 1 and answers drawn from π_ref the policy becomes the law of chosen answers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import logsigmoid

from telos.algorithms.language._loop_pairs import PairsConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, diagnostics
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(PairsConfig):
    """Options of NCA."""

    beta: float = 0.01  # scale of the reward, > 0 (paper: 0.01; 0.05 for implicit process rewards)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")


def loss(config: Config, pair: PairLogps) -> Losses:
    chosen, rejected = config.beta * pair.chosen_ratio, config.beta * pair.rejected_ratio
    values = -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)
    return Losses(values, metrics=diagnostics(pair, chosen, rejected))


METHOD = Method(
    key="nca",
    title="Noise Contrastive Alignment",
    family="language",
    loop="pairs",
    changes="fits each answer's own log-ratio, not only the difference of two, and so keeps chosen answers likely",
    paper="Chen et al. 2024, Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369",
    config=Config,
    loss=loss,
    needs=frozenset({"reference"}),
    aliases=("noise-contrastive-alignment", "nca-pair"),
)
