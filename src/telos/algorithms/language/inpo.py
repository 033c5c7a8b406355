"""Iterative Nash Policy Optimization: mirror descent on the regularised preference game by a squared loss on labelled pairs, without win rates.

    h_t(π, y_w, y_l) = log π(y_w)/π(y_l) − (τ/η) log π_ref(y_w)/π_ref(y_l) − ((η − τ)/η) log π_t(y_w)/π_t(y_l)
    L = (h_t(π, y_w, y_l) − 1/(2η))²,   y_w, y_l labelled samples of π_t        (eq. 8)

Its minimum over pairs of π_t is π_{t+1} ∝ π_ref^{τ/η} π_t^{1−τ/η} exp(P(y ≻ π_t)/η) (eq. 5): the pairs' labels stand in for the win rates, because both
answers come from π_t. The last iterate goes to the Nash equilibrium of P(π ≻ π′) − τ KL(π‖π_ref) + τ KL(π′‖π_ref), with η = τ (t + 2)/2 at a rate of
1/t. τ = 0 takes the reference away.

Departure: in its experiments the paper keeps the best and the worst of 8 answers, which breaks the identity above. Here pairs are drawn from the
answers at random, and the label is drawn with the probability that the oracle states.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language._arrange import against_anchor
from telos.algorithms.language._loop_iterative import PairedConfig
from telos.algorithms.language.online_dpo import arrange
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, diagnostics
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(PairedConfig):
    """Options of INPO."""

    eta: float = 0.005  # η: inverse step of mirror descent, in win rate a nat, > 0; smaller moves further (paper: 0.005)
    tau: float = 0.0017  # τ: strength of the KL regularisation, 0 … η (paper: a third of η)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "eta")
        require(self, ">= 0", "tau")
        if self.tau > self.eta:
            raise UsageError(f"--tau {self.tau} must be at most --eta {self.eta}: mirror descent would step past the reference")


def loss(config: Config, pair: PairLogps) -> Losses:
    anchored, share = against_anchor(pair), config.tau / config.eta
    # log π − (τ/η) log π_ref − (1 − τ/η) log π_t of each answer.
    chosen = share * pair.chosen_ratio + (1 - share) * anchored.chosen_ratio
    rejected = share * pair.rejected_ratio + (1 - share) * anchored.rejected_ratio
    values = (chosen - rejected - 1 / (2 * config.eta)) ** 2
    return Losses(values, metrics=diagnostics(pair, config.eta * chosen, config.eta * rejected))


METHOD = Method(
    key="inpo",
    title="Iterative Nash Policy Optimization",
    family="language",
    loop="iterative",
    changes="takes a mirror descent step towards the regularised Nash equilibrium from binary labels, without win rates",
    paper="Zhang et al. 2024, Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret Learning, arXiv:2407.00617",
    config=Config,
    loss=loss,
    arrange=arrange,
    needs=frozenset({"reference", "anchor"}),
    system=73,
    aliases=("iterative-nash-policy-optimization",),
)
