"""Meta Reinforcement Fine-Tuning: every block of an answer is also rewarded for the progress that it makes towards a right answer.

An answer is a sequence of blocks z_1 … z_k (episodes). With J(z_1 … z_j) the chance that the policy is right when it has to answer after block j,

    progress_j = J(z_1 … z_j) − J(z_1 … z_{j−1})
    L = − E [ r(x, z) log π(z | x)  +  α Σ_j progress_j log π(z_j | x, z_1 … z_{j−1}) ]                             (Qu et al. 2025, definition 6.1)

The sum of progress over an answer telescopes and would say nothing new; but the beginnings from which a block is judged come from the policy that sampled and
are not optimised, so a block is credited with its own progress alone. That lowers cumulative regret Σ_j (J* − J(z_1 … z_j)), the cost of tokens that
bring the model no nearer to an answer. J is measured by `--process_reward forced:ANSWERS[,TOKENS]`, answers of the policy that are forced after each block;
α is `--process_coef`; blocks are the steps that `--step_separators` cut.

The advantage of a block's tokens is r + α progress in its group, less the mean and over the deviation of all blocks of the group (`scale_rewards`).
Departures: the paper samples anew from a few beginnings of each answer and compares answers from there; here all blocks of the sampled answers are judged.
The last block holds the final answer, so its progress is the outcome less J before it. Another process reward can stand for J's differences (`value:FOLDER`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from telos.algorithms.language._group_relative import GroupConfig, group_metrics
from telos.algorithms.language._policy_gradient import answer_rewards, loss
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.advantages import group_relative
from telos.functional.policy import Estimates, Scored


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig):
    """Options of meta reinforcement fine-tuning."""

    process_reward: str | None = "forced:4"  # what measures progress: forced:ANSWERS[,TOKENS] (the paper's), or another reward of steps
    process_coef: float = 1.0  # α: weight of a block's progress beside the answer's own reward

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.process_reward:
            raise UsageError("--process_reward is missing: mrt learns from the progress of steps; give forced:ANSWERS[,TOKENS]")


def advantages(config: Config, scored: Scored) -> Tensor:
    """[N, T]: on each token that of its block. Tokens behind the last block's end, as the end token, belong to it."""
    assert scored.dense is not None
    assert scored.steps is not None
    ends = scored.steps & scored.mask
    outcome = answer_rewards(config, scored) - scored.dense.masked_fill(~scored.mask, 0.0).sum(1)
    row, _ = ends.nonzero(as_tuple=True)
    block = group_relative(outcome[row] + scored.dense[ends], scored.group[row], scored.valid[row], config.scale_rewards)
    count = ends.sum(1)
    first = count.cumsum(0) - count  # of each answer's blocks among all
    place = torch.minimum(ends.cumsum(1) - ends.long(), count[:, None] - 1) + first[:, None]
    known = scored.mask & (count > 0)[:, None]
    return torch.zeros_like(scored.logprobs).masked_scatter(known, block.to(scored.logprobs)[place[known]])


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    return Estimates(advantages(config, scored), state=state, metrics=group_metrics(scored))


METHOD = Method(
    key="mrt",
    title="Meta Reinforcement Fine-Tuning",
    family="language",
    loop="rollouts",
    changes="rewards each block of an answer for the progress it makes towards being right when made to answer",
    paper="Qu et al. 2025, Optimizing Test-Time Compute via Meta Reinforcement Fine-Tuning, arXiv:2503.07572",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward"}),
    system=34,
    aliases=("meta-reinforcement-fine-tuning", "progress-bonus"),
)
