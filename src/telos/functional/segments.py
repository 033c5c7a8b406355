"""What on-policy methods of control share: segments of experience, and the views of them that losses see."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from telos.functional.distributions import Distribution
from telos.functional.returns import gae_of_segments


@dataclass(frozen=True)
class Segment:
    """T steps of N environments, time first, as one iteration has seen them under one policy."""

    observation: Tensor  # [T, N, …] as networks read them
    action: Tensor  # [T, N] or [T, N, D], before it was clipped to the environment's bounds
    logprob: Tensor  # [T, N] of the action as it was drawn
    reward: Tensor  # [T, N]
    value: Tensor  # [T, N] the critic's value of the state before the step
    next_value: Tensor  # [T, N] of the state after it: 0 where the step terminated the episode
    terminated: Tensor  # [T, N] bool
    truncated: Tensor  # [T, N] bool: cut, not over

    @property
    def ended(self) -> Tensor:
        """[T, N] bool: the next row begins another episode."""
        return self.terminated | self.truncated


@dataclass(frozen=True)
class Estimate:
    """What a method makes of a segment: `advantages` and the critic's targets `returns`, [T, N]. `state` continues, `metrics` are logged."""

    advantages: Tensor
    returns: Tensor
    state: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def gae(segment: Segment, gamma: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [T, N] of a segment by `returns.gae_of_segments`."""
    return gae_of_segments(segment.reward, segment.value, segment.next_value, segment.ended, gamma=gamma, gae_lambda=gae_lambda)


@dataclass(frozen=True)
class StepView:
    """What a loss sees of B steps."""

    distribution: Distribution  # now, with gradient
    logprob: Tensor  # [B] now, with gradient
    value: Tensor  # [B] now, with gradient
    action: Tensor  # [B] or [B, D]
    old: Distribution  # when the steps were taken, without gradient
    old_logprob: Tensor  # [B]
    old_value: Tensor  # [B]
    advantage: Tensor  # [B]
    returns: Tensor  # [B]
    progress: float = 0.0  # share of the run that was done when the steps were taken


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns); 0 when the returns do not vary."""
    spread = float(returns.var(correction=0))
    return 0.0 if spread < 1e-12 else 1.0 - float((returns - values).var(correction=0)) / spread


def standardised(values: Tensor, epsilon: float = 1e-8) -> Tensor:
    """(values − mean) / (deviation + ε) with the sample's deviation, as PPO's implementations divide; one value stays as it is."""
    return (values - values.mean()) / (values.std() + epsilon) if values.numel() > 1 else values


def flat(values: Tensor) -> Tensor:
    """[T, N, …] as [T N, …]."""
    return torch.flatten(values, 0, 1)
