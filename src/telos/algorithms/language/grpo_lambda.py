"""GRPO-λ: group by group either a penalty on the length of right answers or the plain 0/1 reward, by how well the group does.

A length penalty shortens answers but, where few of them are right, the reward for being short outweighs that for being right and accuracy collapses. GRPO-λ
gives the penalty only to the λ share of an iteration's groups with the highest ratio of right answers, where shortening is safe; the rest keeps the 0/1 reward
(Dai et al. 2025, section 3). Inside a penalised group a right answer gets

    r_i = 1 − α σ((len_i − mean) / std)      with mean and deviation of the lengths of the group's right answers,

and a wrong one 0, the length reward of Arora and Zanette 2025 that the paper compares with; λ = 1 penalises every group (that baseline), λ = 0 is GRPO on
0/1 rewards. An answer is right when its reward is at least `correct_above`. Groups without a right answer are never penalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from telos.algorithms.language._group_relative import GroupConfig, advantages, group_metrics
from telos.algorithms.language._policy_gradient import loss
from telos.core.config import require
from telos.core.method import Method
from telos.functional.advantages import group_deviation, group_mean
from telos.functional.policy import Estimates, Scored


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig):
    """Options of GRPO-λ."""

    penalised_share: float = (
        0.2  # λ: share of an iteration's groups, those most often right, whose right answers pay for length (paper: 0.2)
    )
    length_penalty: float = 0.2  # α: most that a right answer can lose to its length, 0 … 1
    correct_above: float = 0.5  # reward from which on an answer counts as right

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and <= 1", "penalised_share", "length_penalty")


def rewards(config: Config, scored: Scored) -> tuple[Tensor, Tensor]:
    """[N] rewards, and [N] bool: the answers of penalised groups."""
    right = (scored.scores >= config.correct_above) & scored.valid
    ratio = group_mean(right.double(), scored.group, scored.valid)
    groups = torch.unique(scored.group)
    of_group = torch.stack([ratio[scored.group == group][0] for group in groups])
    count = round(config.penalised_share * len(groups))
    chosen = groups[of_group.argsort(descending=True, stable=True)[:count]]
    penalised = torch.isin(scored.group, chosen) & (ratio > 0)
    length = scored.mask.sum(1).double()
    deviation = group_deviation(length, scored.group, right)
    normal = (length - group_mean(length, scored.group, right)) / deviation.clamp(min=1e-6)
    short = 1 - config.length_penalty * torch.sigmoid(normal.clamp(-30, 30))
    return torch.where(right, torch.where(penalised, short, 1.0), 0.0).to(scored.scores), penalised


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    given, penalised = rewards(config, scored)
    metrics = group_metrics(scored) | {"groups/penalised": float(penalised.double().mean())}
    return Estimates(advantages(config, scored, given), state=state, metrics=metrics)


METHOD = Method(
    key="grpo-lambda",
    title="GRPO-λ",
    family="language",
    loop="rollouts",
    changes="penalises length only in the groups that are most often right, and rewards 0/1 elsewhere",
    paper="Dai et al. 2025, Stable Reinforcement Learning for Efficient Reasoning, arXiv:2505.18086",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward"}),
    system=194,
    aliases=("efficient-reasoning",),
)
