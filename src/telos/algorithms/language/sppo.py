"""Self-Play Preference Optimization: each answer's log-ratio to the last iterate is regressed on its win rate against it.

    L = (log π(y|x)/π_t(y|x) − η (P(y ≻ π_t|x) − ½))²                           (the paper's optimisation problem; both answers of a pair)

The aim is the multiplicative-weights update π_{t+1} ∝ π_t exp(η P(y ≻ π_t)), whose log-partition function is replaced by its value at equal answers,
η/2. So the target is exact for probabilities that need not sum to one; a policy's must, and its minimum differs from the update by a term of third
order in η. P(y ≻ π_t) is estimated by the answer's mean win over the prompt's other answers.

Departures: the paper's estimate counts the answer against itself too, which draws it towards ½ by a K-th. Its experiments learn from the best and the
worst of 5 answers; here pairs are drawn from the answers at random, so that the loss is taken in expectation over π_t as it is stated.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telos.algorithms.language._arrange import Arranged, against_anchor, ranked_pairs
from telos.algorithms.language._loop_iterative import PairedConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, diagnostics
from telos.functional.reduction import Losses
from telos.objectives.judges import Judged


@dataclass(frozen=True, kw_only=True)
class Config(PairedConfig):
    """Options of SPPO."""

    samples_per_prompt: int = 5  # answers to each prompt, whose mutual wins are the win rates (paper: 5)
    eta: float = 1000.0  # η: nats of log-ratio for a difference of one in win rate, > 0; larger moves further (paper: 1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "eta")


def arrange(config: PairedConfig, judged: Judged) -> Arranged:
    return ranked_pairs(judged, config.examples_per_prompt)


def squares(pair: PairLogps, eta: float) -> Tensor:
    """[B]: the loss of both answers, added; `pair` has the last iterate as its reference and win rates as scores."""
    assert pair.chosen_score is not None
    assert pair.rejected_score is not None
    chosen = pair.chosen_ratio - eta * (pair.chosen_score - 0.5)
    rejected = pair.rejected_ratio - eta * (pair.rejected_score - 0.5)
    return chosen**2 + rejected**2


def loss(config: Config, pair: PairLogps) -> Losses:
    pair = against_anchor(pair)
    metrics = diagnostics(pair, pair.chosen_ratio / config.eta, pair.rejected_ratio / config.eta)
    return Losses(squares(pair, config.eta), metrics=metrics)


METHOD = Method(
    key="sppo",
    title="Self-Play Preference Optimization",
    family="language",
    loop="iterative",
    changes="regresses the log-ratio of each answer, not of the pair, on its win rate against the last iterate",
    paper="Wu et al. 2024, Self-Play Preference Optimization for Language Model Alignment, arXiv:2405.00675",
    config=Config,
    loss=loss,
    arrange=arrange,
    needs=frozenset({"anchor"}),
    aliases=("self-play-preference-optimization",),
)
