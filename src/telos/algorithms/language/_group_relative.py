"""What methods share that compare the answers to one prompt by their group's mean and deviation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from telos.algorithms.language._policy_gradient import PolicyGradientConfig, answer_rewards
from telos.core.config import require
from telos.functional.advantages import group_counts, group_deviation, group_mean, group_relative, on_tokens, to_go
from telos.functional.policy import Estimates, Scored


@dataclass(frozen=True, kw_only=True)
class GroupConfig(PolicyGradientConfig):
    """Options of group-relative methods."""

    samples_per_prompt: int = 8  # G: answers to each prompt, >= 2 (paper: 64)
    epochs: int = 1  # passes over an iteration's answers (paper: 1)
    kl_coef: float = 0.04  # β: weight of the divergence from the reference, >= 0 (paper: 0.04); 0 keeps no reference model
    kl_as: Literal["reward", "k3", "k2"] = "k3"  # a reward of each token, or an estimator that is added to the loss
    loss_mean: Literal["token", "answer", "constant"] = "answer"  # over all tokens alike, over each answer first, or over a fixed length
    scale_rewards: Literal["group", "batch", "none"] = "group"  # advantages are divided by the group's deviation, the batch's, or not

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 2", "samples_per_prompt")


def advantages(config: GroupConfig, scored: Scored, scores: Tensor | None = None) -> Tensor:
    """[N, T]: each answer's score in its group; with rewards of steps, also the normalised rewards of the steps that are still to come.

    `scores` [N] stand in for the answers' own rewards. With process rewards this is the process supervision of Shao et al. 2024, section 4.1.3: rewards of all
    steps of a group are normalised together, and a token gets the sum of those of its own and later steps.
    """
    given = answer_rewards(config, scored) if scores is None else scores
    if scored.dense is None:
        return on_tokens(group_relative(given, scored.group, scored.valid, config.scale_rewards), scored.mask)
    outcome = given - scored.dense.masked_fill(~scored.mask, 0.0).sum(1) if scores is None else given
    return on_tokens(group_relative(outcome, scored.group, scored.valid, config.scale_rewards), scored.mask) + _of_steps(config, scored)


def _of_steps(config: GroupConfig, scored: Scored) -> Tensor:
    assert scored.dense is not None
    assert scored.steps is not None
    ends = scored.steps & scored.mask
    row, _ = ends.nonzero(as_tuple=True)
    normal = group_relative(scored.dense[ends], scored.group[row], torch.ones_like(row, dtype=torch.bool), config.scale_rewards)
    return to_go(torch.zeros_like(scored.dense).masked_scatter(ends, normal.to(scored.dense)), scored.mask)


def estimate(config: GroupConfig, scored: Scored, state: Mapping[str, float]) -> Estimates:
    return Estimates(advantages(config, scored), state=state, metrics=group_metrics(scored))


def group_metrics(scored: Scored) -> dict[str, float]:
    """How much the groups have to say: those whose valid answers all have one score say nothing."""
    deviation = group_deviation(scored.scores, scored.group, scored.valid)
    mean = group_mean(scored.scores, scored.group, scored.valid)
    share = 1 / group_counts(scored.group, scored.valid).clamp(min=1)  # so that each group counts once
    weight = share.masked_fill(~scored.valid, 0.0)
    total = weight.sum().clamp(min=1e-12)
    return {
        "groups/reward_std": float((deviation * weight).sum() / total),
        "groups/all_equal": float(((deviation == 0).double() * weight).sum() / total),
        "groups/mean_reward": float((mean * weight).sum() / total),
    }
