"""PF-PPO: PPO on the answers whose rewards can be trusted, the others are passed over.

A learned reward is more reliable where it is very high or very low than in between, so of the n answers to each prompt only some are learned from
(Shen et al. 2024, section 3.2), by rank of reward:

    best           the highest
    best-random    the highest, the rest drawn from all others
    best-worst     the highest and the lowest, half each

Which strategy fits a reward model is decided by the R² between its rewards and the true scores of the answers that a strategy keeps, grouped and averaged by
rank: `filter_r2` below. `kept_per_prompt` answers remain of each prompt; the critic, advantages and loss are those of `ppo-max`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from telos.algorithms.language import ppo_max
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.policy import Scored

Strategy = Literal["best", "best-random", "best-worst"]


@dataclass(frozen=True, kw_only=True)
class Config(ppo_max.Config):
    """Options of PF-PPO."""

    samples_per_prompt: int = 5  # n: answers that are drawn for each prompt (paper: 5)
    kept_per_prompt: int = 2  # answers of them that are learned from, 1 … n
    strategy: Strategy = "best-worst"  # which: the best, the best and others at random, or the best and the worst

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "kept_per_prompt")
        if self.kept_per_prompt > self.samples_per_prompt:
            raise UsageError(f"--kept_per_prompt {self.kept_per_prompt} is more than the {self.samples_per_prompt} of --samples_per_prompt")


def kept(rewards: np.ndarray, count: int, strategy: Strategy, generator: np.random.Generator) -> np.ndarray:
    """Indices of the `count` answers (or as many as there are) of one prompt that a strategy keeps, rewards [n], in rising order."""
    order = np.argsort(-rewards, kind="stable")
    count = min(count, len(order))
    if strategy == "best":
        chosen = order[:count]
    elif strategy == "best-random":
        chosen = np.concatenate([order[:1], generator.permutation(order[1:])[: count - 1]])
    else:
        worst = count // 2
        chosen = np.concatenate([order[: count - worst], order[len(order) - worst :]])
    return np.sort(chosen)


def select(config: Config, scored: Scored, generator: np.random.Generator) -> Tensor:
    group, valid, rewards = (value.cpu().numpy() for value in (scored.group, scored.valid, scored.scores))
    found = []
    for number in np.unique(group):
        rows = np.flatnonzero((group == number) & valid)
        found.append(rows[kept(rewards[rows], config.kept_per_prompt, config.strategy, generator)] if len(rows) else rows)
    return torch.from_numpy(np.sort(np.concatenate(found)))


def filter_r2(
    rewards: np.ndarray, truths: np.ndarray, count: int, strategy: Strategy, generator: np.random.Generator, groups: int = 10
) -> float:
    """R² of true scores explained by rewards, [P, n] both, on the answers that a strategy keeps: these are cut into `groups` of neighbouring rewards, and the
    groups' means are regressed (section 3.3). 1 is a perfect line; 0 for rewards that do not vary."""
    rows = np.stack([kept(row, count, strategy, generator) for row in rewards])
    x, y = np.take_along_axis(rewards, rows, 1).ravel(), np.take_along_axis(truths, rows, 1).ravel()
    order = np.argsort(x, kind="stable")
    means = [(x[part].mean(), y[part].mean()) for part in np.array_split(order, min(groups, len(order)))]
    a, b = np.array(means).T
    return float(np.corrcoef(a, b)[0, 1] ** 2) if a.std() > 0 and b.std() > 0 else 0.0


METHOD = Method(
    key="pf-ppo",
    title="Policy Filtration PPO",
    family="language",
    loop="rollouts",
    changes="PPO that learns from the answers with very high or very low rewards alone, where a reward model is most reliable",
    paper="Shen et al. 2024, Policy Filtration in RLHF to Fine-Tune LLM for Code Generation, arXiv:2409.06957",
    config=Config,
    loss=ppo_max.loss,
    estimate=ppo_max.estimate,
    critic_loss=ppo_max.critic_loss,
    select=select,
    needs=frozenset({"reference", "reward", "critic"}),
    system=16,
    aliases=("policy-filtration",),
)
