"""Advantages of answers that are compared within groups: baselines from the other answers to the same prompt.

`scores`, `group` and `valid` are [N]. Answers that are not valid take part in no mean and get 0. An answer that stands alone in its group has nothing to be
compared with and gets 0 as well, not its whole score.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


def group_sums(values: Tensor, group: Tensor) -> Tensor:
    """For each answer the sum of `values` [N] over its group."""
    _, place = torch.unique(group, return_inverse=True)
    sums = values.new_zeros(int(place.max()) + 1 if len(place) else 0)
    return sums.index_add(0, place, values)[place]


def group_counts(group: Tensor, valid: Tensor) -> Tensor:
    """For each answer how many valid ones its group has, float64."""
    return group_sums(valid.double(), group)


def group_mean(values: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """For each answer the mean over the valid ones of its group; 0 where there is none. Float64."""
    return group_sums(values.double().masked_fill(~valid, 0.0), group) / group_counts(group, valid).clamp(min=1)


def group_deviation(values: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """For each answer the sample standard deviation (divisor n − 1) over the valid ones of its group; 0 for fewer than two. Float64."""
    centred = (values.double() - group_mean(values, group, valid)).masked_fill(~valid, 0.0)
    count = group_counts(group, valid)
    return (group_sums(centred**2, group) / (count - 1).clamp(min=1)).sqrt()


def leave_one_out(scores: Tensor, group: Tensor, valid: Tensor) -> Tensor:
    """Score less the mean of the others (Kool et al. 2019; RLOO: Ahmadian et al. 2024, eq. 8): n/(n − 1) times the difference from the group's mean."""
    count = group_counts(group, valid)
    advantages = (scores.double() - group_mean(scores, group, valid)) * count / (count - 1).clamp(min=1)
    return _settled(advantages, scores, valid & (count > 1))


def group_relative(scores: Tensor, group: Tensor, valid: Tensor, scale: Scale = "group", epsilon: float = 1e-4) -> Tensor:
    """Score less the group's mean, over the group's deviation (Shao et al. 2024, GRPO), over the deviation of the whole batch, or as it is (Dr. GRPO).

    `epsilon` is added to the deviation. A group whose scores are all equal gets zeros.
    """
    count = group_counts(group, valid)
    advantages = scores.double() - group_mean(scores, group, valid)
    if scale == "group":
        advantages = advantages / (group_deviation(scores, group, valid) + epsilon)
    elif scale == "batch":
        everyone = torch.zeros_like(group)
        advantages = advantages / (group_deviation(scores, everyone, valid) + epsilon)
    return _settled(advantages, scores, valid & (count > 1))


def _settled(advantages: Tensor, scores: Tensor, wanted: Tensor) -> Tensor:
    return torch.where(wanted, advantages, torch.zeros_like(advantages)).to(scores.dtype)


def on_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """A value per answer [N] on each of its tokens: [N, T], 0 where masked."""
    return values[:, None].expand_as(mask).masked_fill(~mask, 0.0)


def to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    """At each token the sum of the rewards [N, T] on it and on those after it, 0 where masked."""
    kept = rewards.masked_fill(~mask, 0.0)
    return kept.flip(1).cumsum(1).flip(1).masked_fill(~mask, 0.0)
