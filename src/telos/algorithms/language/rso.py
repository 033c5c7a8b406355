"""Statistical Rejection Sampling Optimization: preference pairs that come from the optimal policy itself, by rejection sampling from the reference.

    π_r(y|x) ∝ π_sft(y|x) exp(r(x, y)/β)                                        (eq. 4, the policy to sample pairs from)
    accept y ~ π_sft with probability exp((r(x, y) − r_max)/β)                  (Algorithm 1; r_max: of the candidates not yet accepted)
    sigmoid-norm:  L = − log σ(γ log π(y_w)/π_sft(y_w) − γ log π(y_l)/π_sft(y_l))          (eq. 8)
    hinge-norm:    L = max(0, 1 − γ log π(y_w)/π_sft(y_w) + γ log π(y_l)/π_sft(y_l))       (eq. 10)

The fit of eq. 8 is the maximum likelihood estimate of the optimal policy, and an estimate is best with data of what is estimated. β → ∞ accepts all,
β → 0 the best. γ = β is DPO's loss; the paper treats it as a temperature of its own. What is hardly ever accepted is in no pair, and keeps about
the odds that the reference gives it: of answers that are both likely and very bad, the reference's own pairs tell more.

Departures: candidates of the same text are told apart, so that the accepted ones follow π_r (the paper's program merges them); two such make no pair.
The pairs are drawn from the accepted answers at random (the paper: k/2 disjoint ones), and labels are drawn with the probability that the oracle states.
The paper derives r from a judge by the logit against a baseline answer; with --judge, r is here the win rate among the candidates. It samples at
temperature 0.7 with top_k 40, which changes the policy that is tilted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from telos.algorithms.language._arrange import Arranged, labelled_pairs
from telos.algorithms.language._loop_iterative import PairedConfig
from telos.algorithms.language.slic import hinge
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, diagnostics, smoothed_logistic
from telos.functional.reduction import Losses
from telos.objectives.judges import Judged


@dataclass(frozen=True, kw_only=True)
class Config(PairedConfig):
    """Options of RSO."""

    samples_per_prompt: int = 64  # candidates that the reference writes to each prompt (paper: 64)
    accepted: int = 2  # candidates that are accepted of them, 2 … samples_per_prompt (paper: 8, which make 4 pairs)
    beta: float = 0.5  # β: temperature of the acceptance, in units of reward, > 0 (paper: 0.5)
    gamma: float = 0.05  # γ: scale of the log-ratios in the loss, > 0 (paper: 0.05)
    loss_type: Literal["sigmoid-norm", "hinge-norm"] = "sigmoid-norm"  # eq. 8 or eq. 10

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta", "gamma")
        require(self, ">= 2", "accepted")
        if self.accepted > self.samples_per_prompt:
            raise UsageError(f"--accepted {self.accepted} is more than the --samples_per_prompt {self.samples_per_prompt} candidates")


def writers(config: Config) -> dict[str, int]:
    return {"reference": config.samples_per_prompt}


def accept(rewards: NDArray[np.float64], count: int, beta: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Algorithm 1: the places of `count` accepted candidates of the `rewards` [n], in the order in which they were; fewer where fewer rewards are
    finite. Passes over those not yet accepted go on, each with their own largest reward, until there are enough.

    With n so large that one pass accepts enough of them, the accepted are independent samples of the candidates' law tilted by exp(r/β).
    """
    left = np.flatnonzero(np.isfinite(rewards))
    found = left[:0]
    while len(found) < count and len(left):
        taken = generator.random(len(left)) < np.exp((rewards[left] - rewards[left].max()) / beta)
        found, left = np.concatenate([found, left[taken]]), left[~taken]
    return found[:count]


def arrange(config: Config, judged: Judged) -> Arranged:
    kept = np.zeros(judged.valid.shape, dtype=bool)
    for row, rewards in zip(kept, judged.reward, strict=True):
        row[accept(rewards, config.accepted, config.beta, judged.generator)] = True
    return labelled_pairs(judged, config.examples_per_prompt, kept[:, :, None] & kept[:, None, :])


def loss(config: Config, pair: PairLogps) -> Losses:
    chosen, rejected = config.gamma * pair.chosen_ratio, config.gamma * pair.rejected_ratio
    margin = chosen - rejected
    values = smoothed_logistic(margin, 0.0) if config.loss_type == "sigmoid-norm" else hinge(margin)
    return Losses(values, metrics=diagnostics(pair, chosen, rejected))


METHOD = Method(
    key="rso",
    title="Statistical Rejection Sampling Optimization",
    family="language",
    loop="iterative",
    changes="labels pairs of answers that rejection sampling has drawn from the optimal policy, written by the reference",
    paper="Liu et al. 2023, Statistical Rejection Sampling Improves Preference Optimization, arXiv:2309.06657",
    config=Config,
    loss=loss,
    arrange=arrange,
    writers=writers,
    needs=frozenset({"reference"}),
    system=61,
    aliases=("statistical-rejection-sampling-optimization",),
)
