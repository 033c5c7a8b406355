"""DAPO (Decoupled Clip and Dynamic sAmpling Policy Optimization): GRPO with four changes for long chains of thought.

- Clip-higher: the ratio may rise further than it may fall, so that unlikely tokens can be explored (Yu et al. 2025, eq. 8).
- Dynamic sampling: prompts whose answers are all right or all wrong have no gradient; others are drawn for them (eq. 11), up to `sampling_rounds` batches.
- Every token of the minibatch counts alike (eq. 12).
- Soft overlong punishment: in the last `overlong_buffer` tokens before the limit the reward falls linearly to −1 (eq. 13).

There is no divergence from the reference (`kl_coef` 0, as in the paper). Departures: an iteration that finds fewer prompts than `batch_size` learns from those
it has, one that finds none is skipped and counted; the group's deviation is GRPO's here. Not to be confused with Direct Advantage Policy Optimization.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from telos.algorithms.language._group_relative import GroupConfig, advantages, group_metrics
from telos.algorithms.language._loop_rollouts import ResamplingConfig
from telos.algorithms.language._policy_gradient import answer_rewards, loss
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.advantages import group_deviation
from telos.functional.policy import Estimates, Scored


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig, ResamplingConfig):
    """Options of DAPO."""

    kl_coef: float = 0.0  # β: weight of the divergence from the reference, >= 0 (paper: 0); 0 keeps no reference model
    clip_range_high: float = 0.28  # ε above 1 (paper: 0.28); 0 = the same as below
    loss_mean: Literal["token", "answer", "constant"] = "token"  # over all tokens alike, over each answer first, or over a fixed length
    overlong_buffer: int = 0  # tokens before the limit in which answers are punished for their length (paper: 4096 of 20480); 0 = none
    overlong_penalty: float = 1.0  # the punishment of an answer that reaches the limit, >= 0 (paper: 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "overlong_buffer", "overlong_penalty")
        if self.overlong_buffer >= self.max_completion_length:
            raise UsageError(f"--overlong_buffer {self.overlong_buffer} must be smaller than --max_completion_length")


def overlong(config: Config, scored: Scored) -> Tensor:
    """[N], from 0 down to minus the penalty: eq. 13."""
    if not config.overlong_buffer:
        return torch.zeros_like(scored.scores)
    over = scored.mask.sum(1) - (config.max_completion_length - config.overlong_buffer)
    return -config.overlong_penalty * (over / config.overlong_buffer).clamp(0, 1)


def select(config: Config, scored: Scored, generator: np.random.Generator) -> Tensor:
    """Answers of the groups whose rewards differ."""
    return (group_deviation(scored.scores, scored.group, scored.valid) > 0).nonzero()[:, 0]


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    punished = answer_rewards(config, scored) + overlong(config, scored)
    return Estimates(advantages(config, scored, punished), state=state, metrics=group_metrics(scored))


METHOD = Method(
    key="dapo",
    title="DAPO",
    family="language",
    loop="rollouts",
    changes="GRPO with a higher upper clip, dynamic sampling, token-level averages and soft punishment of overlong answers",
    paper="Yu et al. 2025, DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv:2503.14476",
    config=Config,
    loss=loss,
    estimate=estimate,
    select=select,
    needs=frozenset({"reference", "reward"}),
    aliases=("decoupled-clip-dynamic-sampling", "clip-higher", "dynamic-sampling"),
)
