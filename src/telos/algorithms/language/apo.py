"""Accelerated Preference Optimization: iterative preference optimisation is a proximal point method, and Nesterov's momentum speeds it up.

    π̂_{t+1} = argmin L(π; π_t) on pairs of π_t                                   (the proximal step: DPO or SPPO with π_t as its reference)
    π_{t+1} ∝ π̂_{t+1} (π̂_{t+1} / π̂_t)^α                                          (the extrapolation step)

With DPO the proximal step is π̂_{t+1} ∝ π_t exp(r/β). Without momentum log π gains r/β an iteration, with it r/(β (1 − α)) before long, so the gap to the
best reward shrinks with the 1/(1 − α)-th power of the rate.

Departure: the extrapolation is taken in the weights, θ_{t+1} = θ̂_{t+1} + α (θ̂_{t+1} − θ̂_t), θ̂_0 being the start's. That is the step above wherever
log-probabilities are linear in the weights up to a constant (tabular and log-linear policies), and a first-order form of it elsewhere; the
optimiser's moments are kept. The run ends with the extrapolated weights of its last iteration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from telos.algorithms.language import online_dpo, sppo
from telos.algorithms.language._arrange import Arranged, against_anchor
from telos.algorithms.language._loop_iterative import PairedConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, diagnostics, smoothed_logistic
from telos.functional.reduction import Losses
from telos.objectives.judges import Judged


@dataclass(frozen=True, kw_only=True)
class Config(PairedConfig):
    """Options of APO."""

    inner: Literal["dpo", "sppo"] = "dpo"  # the proximal step: from drawn labels, or from win rates
    beta: float = 0.1  # hold of an iteration on its start, > 0, in reward a nat; with sppo 1/eta, in win rate a nat
    alpha: float = 0.3  # α: momentum, 0 … 1; 0 is the iterative method itself

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, ">= 0 and < 1", "alpha")


def arrange(config: Config, judged: Judged) -> Arranged:
    return (online_dpo if config.inner == "dpo" else sppo).arrange(config, judged)


def loss(config: Config, pair: PairLogps) -> Losses:
    pair = against_anchor(pair)
    chosen, rejected = config.beta * pair.chosen_ratio, config.beta * pair.rejected_ratio
    values = smoothed_logistic(chosen - rejected, 0.0) if config.inner == "dpo" else sppo.squares(pair, 1 / config.beta)
    return Losses(values, metrics=diagnostics(pair, chosen, rejected))


def advance(config: Config, weights: Mapping[str, Tensor], previous: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """θ̂_{t+1} + α (θ̂_{t+1} − θ̂_t)."""
    return {name: value + config.alpha * (value - previous[name]) for name, value in weights.items()}


METHOD = Method(
    key="apo",
    title="Accelerated Preference Optimization",
    family="language",
    loop="iterative",
    changes="extrapolates each iteration of iterative DPO or SPPO along the change of the policy",
    paper="He et al. 2024, Accelerated Preference Optimization for Large Language Model Alignment, arXiv:2410.06293",
    config=Config,
    loss=loss,
    arrange=arrange,
    advance=advance,
    needs=frozenset({"anchor"}),
    system=45,
    aliases=("accelerated-preference-optimization", "iterative-dpo"),
)
