"""What on-policy methods over token sequences share: the views they are given, probability ratios, returns, running statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from telos.functional.reduction import masked_mean
from telos.functional.returns import at_last_action


@dataclass(frozen=True)
class Scored:
    """One iteration's answers before any update; N answers, T tokens. `scores` is the reward of the whole answer, meaningful where `valid`."""

    mask: Tensor  # [N, T] bool, true at tokens that the policy produced, in answers whose reward is valid
    logprobs: Tensor  # [N, T] as sampled
    reference: Tensor | None  # [N, T] log-probabilities under the reference
    values: Tensor | None  # [N, T] the critic's value of the state before each token
    scores: Tensor  # [N]
    ended: Tensor  # [N] bool: the end token was produced
    group: Tensor  # [N] answers to the same prompt share a number
    dense: Tensor | None = None  # [N, T] rewards of steps, each on its step's last token, 0 elsewhere
    steps: Tensor | None = None  # [N, T] bool: the last tokens of steps
    greedy: Tensor | None = None  # [N] score of the greedy answer to the same prompt
    teacher: Tensor | None = None  # [N, T] log-probabilities under the model whose likelihood is the reward of a token

    @property
    def valid(self) -> Tensor:
        """[N] bool: answers that are learned from."""
        return self.mask.any(1)

    def __getitem__(self, rows: Tensor) -> Scored:
        """The answers `rows` [M]."""
        found: dict[str, Any] = {}
        for part in dataclasses.fields(self):
            value = getattr(self, part.name)
            found[part.name] = None if value is None else value[rows]
        return Scored(**found)


@dataclass(frozen=True)
class Estimates:
    """What a method makes of scored answers. `returns` are the critic's targets; `state` continues to the next iteration, `metrics` are logged."""

    advantages: Tensor  # [N, T], 0 where masked
    returns: Tensor | None = None  # [N, T]
    state: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # further tensors [N, …] that the loss wants to see beside the advantages


@dataclass(frozen=True)
class PolicyView:
    """What a policy loss sees of a part of the batch."""

    logprobs: Tensor  # [N, T] now, with gradient
    entropy: Tensor  # [N, T] nats, with gradient
    old_logprobs: Tensor  # [N, T] as sampled
    reference: Tensor | None  # [N, T]
    advantages: Tensor  # [N, T]
    mask: Tensor  # [N, T] bool
    group: Tensor | None = None  # [N] answers to the same prompt share a number
    extra: Mapping[str, Tensor] = field(default_factory=dict)  # those of `Estimates`


@dataclass(frozen=True)
class CriticView:
    """What a critic's loss sees of a part of the batch."""

    values: Tensor  # [N, T] now, with gradient
    old_values: Tensor  # [N, T] when the answers were sampled
    returns: Tensor  # [N, T]
    mask: Tensor  # [N, T] bool


def token_rewards(scored: Scored, *, kl_coef: float = 0.0, scores: Tensor | None = None) -> Tensor:
    """[N, T]: the answer's score on its last token, the rewards of its steps, and −kl_coef (log π − log π_ref) where there is a reference; 0 where masked.

    `scores` [N] stand in for the given ones.
    """
    scores = scored.scores if scores is None else scores
    rewards = at_last_action(torch.where(scored.valid, scores, torch.zeros_like(scores)), scored.mask)
    if scored.dense is not None:
        rewards = rewards + scored.dense
    if kl_coef and scored.reference is not None:
        rewards = rewards - kl_coef * (scored.logprobs - scored.reference)
    return rewards.masked_fill(~scored.mask, 0.0)


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's loss per token, −min(ρA, clip(ρ, 1 − low, 1 + high) A) (Schulman et al. 2017, eq. 7), and where each bound took the gradient away.

    log_ratio, advantages [N, T]; low, high >= 0 are offsets from 1.
    """
    ratio = log_ratio.exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    return loss, (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)


def sequence_kl(logprobs: Tensor, reference: Tensor, mask: Tensor) -> Tensor:
    """Σ_t log π − log π_ref of each answer, [N]: an unbiased estimate of its KL when the answers were sampled from π."""
    return (logprobs - reference).masked_fill(~mask, 0.0).sum(1)


def running_moments(state: Mapping[str, float], values: Tensor, name: str) -> dict[str, float]:
    """Mean, squared deviation and count of all `values` seen so far (Chan et al.'s parallel update), kept under `name` in a method's state."""
    count, mean, m2 = (state.get(f"{name}/{key}", 0.0) for key in ("count", "mean", "m2"))
    n = float(values.numel())
    if n:
        batch_mean, batch_m2 = float(values.double().mean()), float(((values.double() - values.double().mean()) ** 2).sum())
        delta = batch_mean - mean
        m2 += batch_m2 + delta**2 * count * n / (count + n)
        mean += delta * n / (count + n)
        count += n
    return {f"{name}/count": count, f"{name}/mean": mean, f"{name}/m2": m2}


def standard_deviation(state: Mapping[str, float], name: str) -> float:
    """The standard deviation of what `running_moments` has seen; 1 before it has seen two different values."""
    count, m2 = state.get(f"{name}/count", 0.0), state.get(f"{name}/m2", 0.0)
    return (m2 / count) ** 0.5 if count > 1 and m2 > 0 else 1.0


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns) over true entries; 0 when the returns do not vary."""
    error, spread = returns - values, returns - masked_mean(returns, mask)
    variance = float(masked_mean(spread**2, mask))
    bias = masked_mean(error, mask)
    return 0.0 if variance < 1e-12 else 1.0 - float(masked_mean((error - bias) ** 2, mask)) / variance
