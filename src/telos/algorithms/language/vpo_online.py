"""Online VPO: each iteration's policy writes the pairs that are labelled, and the fit to all labels so far is optimistic.

    π_{t+1} = argmin −mean_{i ≤ t} log σ(β log π/π_ref(y_w,i) − β log π/π_ref(y_l,i)) + α β mean E_{y ∼ π_ref}[log π(y|x)/π_ref(y|x)]      (algorithm 1)

over the pairs of all iterations so far. Both answers of a pair are π_t's own, and its label is drawn from the oracle's probability. The calibration
distribution is the reference (see `vpo` for the derivation and the sign); its answers are written once an iteration and stay with their pairs. The
second term is −α β KL(π_ref‖π): of the rewards that fit the labels about as well, one that promises more than the others, whose policy is further
from the reference, is taken, so that the next labels decide whether it is true. α = 0 is iterative DPO on all data.

Departures: the minimum is approached from the last policy by some optimiser steps, not solved anew; α is that of a mean over pairs, not of a sum, so
optimism does not fade by itself as labels accumulate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from telos.algorithms.language import vpo
from telos.algorithms.language._arrange import Arranged, labelled_pairs
from telos.algorithms.language._loop_iterative import PairedConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps
from telos.functional.reduction import Losses
from telos.objectives.judges import Judged


@dataclass(frozen=True, kw_only=True)
class Config(PairedConfig):
    """Options of online VPO."""

    beta: float = 0.1  # strength of the KL regularisation, > 0
    value_coef: float = 0.1  # weight of the optimal value J*, >= 0 (the paper's α, there over the number of pairs); 0 = iterative DPO
    label_smoothing: float = 0.0  # probability that a label is wrong, 0 … 0.5
    reference_samples: int = 1  # answers of the reference to each prompt, over which rewards have mean 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, ">= 0", "value_coef")
        require(self, ">= 0 and < 0.5", "label_smoothing")
        require(self, ">= 1", "reference_samples")


def writers(config: Config) -> dict[str, int]:
    return {"policy": config.samples_per_prompt, "reference": config.reference_samples}


def arrange(config: Config, judged: Judged) -> Arranged:
    """Pairs of the policy's own answers with drawn labels; beside each, the reference's answers to its prompt."""
    own = config.samples_per_prompt
    answer = np.arange(own + config.reference_samples)
    by_policy = np.broadcast_to((answer < own) & (answer[:, None] < own), judged.wins.shape)
    pairs = labelled_pairs(judged, config.examples_per_prompt, by_policy)
    return replace(pairs, samples=np.tile(answer[own:], (len(pairs.prompt), 1)))


def loss(config: Config, pair: PairLogps) -> Losses:
    return vpo.objective(pair, beta=config.beta, label_smoothing=config.label_smoothing, value_coef=config.value_coef, mode="optimism")


METHOD = Method(
    key="vpo-online",
    title="Online VPO",
    family="language",
    loop="iterative",
    changes="labels pairs of the policy's own answers and makes the optimal value of the implicit reward large, which explores",
    paper="Cen et al. 2024, Value-Incentivized Preference Optimization: A Unified Approach to Online and Offline RLHF, arXiv:2405.19320",
    config=Config,
    loss=loss,
    arrange=arrange,
    writers=writers,
    needs=frozenset({"reference", "history"}),
    aliases=("online-vpo",),
)
