"""Nash-MD and Nash-EMA: policy gradient on the wins over an opponent made of the policy's past, which settles where self-play may go in circles.

    ĝ = ∇ log π(y|x) (P(y ≻ y′|x) − ½ − τ log π(y|x)/π_ref(y|x)),   y ~ π, y′ ~ π′         (policy gradient of the regularised preference)
    Nash-MD:   log π′ = (1 − β) log π + β log π_ref + constant, token by token                    (opponent "mixture", β = `mixture`)
    Nash-EMA:  π′ has the exponential moving average of the weights, θ̄ ← (1 − a) θ̄ + a θ           (opponent "average", a = `average_share`)

The opponent is taken as fixed. A token's gradient counts the log-ratios of itself and of later tokens only, as in the paper's appendix: earlier ones do
not depend on it. In the tabular case a mirror step of size η on this gradient with β = ητ is the paper's Nash-MD, π_{t+1} ∝ π′ exp(η P(y ≻ π′)),
whose last iterate goes to the equilibrium of the game regularised with τ. With a fixed β the policy gradient's rest point is π ∝ π_ref exp(P(y ≻ π′)/τ),
which is near that equilibrium for a small β; the average opponent's is the equilibrium itself. β = 0 is self-play, β = 1 the best response to π_ref.

Departures: P is asked for here and now (a reward, a judge or a human) and need not be a learned model. With more than one sample a prompt, each answer
meets all answers of the opponent. An iteration is one optimiser step by default; more make it off-policy, which nothing corrects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from telos.algorithms.language._arrange import Arranged, draw_answers
from telos.algorithms.language._loop_iterative import IterativeConfig, refuse_changed
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import LabelledLogps
from telos.functional.reduction import Losses
from telos.objectives.judges import Judged


@dataclass(frozen=True, kw_only=True)
class Config(IterativeConfig):
    """Options of Nash-MD and Nash-EMA."""

    samples_per_prompt: int = 1  # answers to each prompt, of the policy and of the opponent each (paper: 1)
    minibatch_size: int = 64  # examples in one optimiser step; all of an iteration's, so that the gradient is on-policy
    tau: float = 0.008  # τ: strength of the KL regularisation, >= 0, in win rate a nat (paper: 0.008)
    opponent: Literal["mixture", "average"] = "mixture"  # whom the policy plays: Nash-MD's mixture or Nash-EMA's average of weights
    mixture: float = 0.125  # β: share of the reference in the mixture, 0 … 1 (paper: 0.125 was best)
    average_share: float = 0.001  # share of the newest weights in the average at each iteration, 0 … 1 (paper: 0.001 and 0.0005)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "tau")
        require(self, ">= 0 and <= 1", "mixture", "average_share")
        idle = "average_share" if self.opponent == "mixture" else "mixture"
        refuse_changed(self, idle, f"on --opponent {self.opponent}")


def writers(config: Config) -> dict[str, int]:
    return {"policy": config.samples_per_prompt, config.opponent: config.samples_per_prompt}


def arrange(config: Config, judged: Judged) -> Arranged:
    n = config.samples_per_prompt
    wins = judged.wins[:, :n, n:]
    compared = np.isfinite(wins)
    mean = np.where(compared, wins, 0.0).sum(-1) / np.maximum(compared.sum(-1), 1)
    return draw_answers(np.where(compared.any(-1), mean, np.nan), config.examples_per_prompt, judged.generator)


def loss(config: Config, batch: LabelledLogps) -> Losses:
    assert batch.reference is not None
    assert batch.score is not None
    mask = batch.answer.mask
    ratio = (batch.answer.tokens - batch.reference.tokens).detach().masked_fill(~mask, 0.0)
    to_come = ratio.flip(1).cumsum(1).flip(1)  # of each token and those after it
    advantage = batch.score[:, None] - 0.5 - config.tau * to_come
    values = -(batch.answer.tokens * advantage).masked_fill(~mask, 0.0).sum(1)
    return Losses(values, metrics={"win_rate/learned": batch.score, "logps/answer": batch.answer.sum})


METHOD = Method(
    key="nash-md",
    title="Nash Learning from Human Feedback",
    family="language",
    loop="iterative",
    changes="plays against a mixture with the reference, or an average of past weights, in place of a reward",
    paper="Munos et al. 2023, Nash Learning from Human Feedback, arXiv:2312.00886",
    config=Config,
    loss=loss,
    arrange=arrange,
    writers=writers,
    needs=frozenset({"reference"}),
    system=141,
    aliases=("nlhf", "nash-ema", "nash-md-pg", "nash-ema-pg"),
)
