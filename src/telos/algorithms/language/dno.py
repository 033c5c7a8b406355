"""Direct Nash Optimization: regress the policy's own reward on its win rate, so that it becomes the soft best response to itself.

    r_t(x, y) = E_{y′~π_t} P(y ≻ y′|x)                                          (Algorithm 1, line 3)
    Δ_π(y₁, y₂) = η log π(y₁|x)/π_t(y₁|x) − η log π(y₂|x)/π_t(y₂|x)             (the internal reward of eq. 10, without its constant)
    L = − σ(r_t(y₁) − r_t(y₂)) log σ(Δ_π(y₁, y₂)) − σ(r_t(y₂) − r_t(y₁)) log σ(Δ_π(y₂, y₁))       (eq. 12; labels "soft")
    L = − log σ(Δ_π(y⁺, y⁻))                                                    (eq. 13, DNO-Prct; labels "hard")

The minimum of eq. 12 is Δ_π = Δr_t for every pair, that is π_{t+1} ∝ π_t exp(r_t/η): a step of multiplicative weights, whose average iterate goes to
the Nash equilibrium of any preference, and whose every step wins, P(π_{t+1} ≻ π_t) ≥ ½ + η KL(π_{t+1}‖π_t). r_t is estimated by an answer's mean win
over the prompt's other answers. Eq. 13 takes the label for certain, which is near the truth for pairs of a large margin alone, hence `min_margin`.

Departures: the pairs of a prompt are drawn from all that have the margin; the paper's teacher (its answers among those compared) and its share of
pairs of earlier iterations are left out; the margin is one of win rates, where the paper's is 1 or 2 of its judge's 6 points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from telos.algorithms.language._arrange import Arranged, against_anchor, ranked_pairs
from telos.algorithms.language._loop_iterative import PairedConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, diagnostics
from telos.functional.reduction import Losses
from telos.objectives.judges import Judged


@dataclass(frozen=True, kw_only=True)
class Config(PairedConfig):
    """Options of DNO."""

    samples_per_prompt: int = 5  # answers to each prompt, whose mutual wins are the win rates (paper: 5 and one of a teacher)
    eta: float = 0.1  # η: scale of the internal reward, in win rate a nat, > 0; smaller moves further (paper: 0.1 or 0.05)
    labels: Literal["soft", "hard"] = "soft"  # eq. 12 with the sigmoid of win rates, or the practical variant's eq. 13
    min_margin: float = 0.0  # difference of win rates that a pair must have, 0 … 1; for hard labels better large

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "eta")
        require(self, ">= 0 and < 1", "min_margin")


def arrange(config: Config, judged: Judged) -> Arranged:
    rates = judged.win_rate
    margin = np.abs(rates[:, :, None] - rates[:, None, :])
    allowed = margin >= config.min_margin
    return ranked_pairs(judged, config.examples_per_prompt, allowed & (margin > 0) if config.labels == "hard" else allowed)


def label(config: Config, pair: PairLogps) -> Tensor:
    """[B]: the probability with which the chosen answer counts as the better one."""
    assert pair.chosen_score is not None
    assert pair.rejected_score is not None
    gap = pair.chosen_score - pair.rejected_score
    return torch.sigmoid(gap) if config.labels == "soft" else torch.ones_like(gap)


def loss(config: Config, pair: PairLogps) -> Losses:
    pair, p = against_anchor(pair), label(config, pair)
    chosen, rejected = config.eta * pair.chosen_ratio, config.eta * pair.rejected_ratio
    values = -p * logsigmoid(chosen - rejected) - (1 - p) * logsigmoid(rejected - chosen)
    return Losses(values, metrics=diagnostics(pair, chosen, rejected))


METHOD = Method(
    key="dno",
    title="Direct Nash Optimization",
    family="language",
    loop="iterative",
    changes="regresses the policy's log-ratio to its last iterate on its answers' win rates against that iterate",
    paper="Rosset et al. 2024, Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences, arXiv:2404.03715",
    config=Config,
    loss=loss,
    arrange=arrange,
    needs=frozenset({"anchor"}),
    system=60,
    aliases=("direct-nash-optimization", "dno-prct"),
)
