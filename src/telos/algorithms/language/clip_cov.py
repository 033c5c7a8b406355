"""Clip-Cov and KL-Cov: GRPO that keeps its entropy by holding back the few tokens that would end it.

To first order a step of policy gradient changes the entropy by −η Cov(log π(y_t), A_t) (Cui et al. 2025, theorem 2), and a small share of the tokens carries
nearly all of that covariance. With the per-token covariance over an iteration's tokens

    c_t = (log π(y_t) − mean log π) (A_t − mean A)                                                       (eq. 10)

- `clip`: a share `selected_share` of the tokens, drawn at random among those with c_t in [`cov_low`, `cov_high`], gives no gradient (Clip-Cov, eqs. 11 and 12);
- `kl`: the share of the tokens with the largest c_t pays `cov_kl_coef` times the divergence from the policy that sampled them (KL-Cov, eqs. 13 and 14), as
  |log π − log π_old| per token, the absolute log-ratio of the authors' code.

Departures: the covariance is taken over the whole iteration with the log-probabilities as sampled, before the first step, and not anew in each micro-batch, so
that batching changes nothing. The change of entropy that the covariance predicts is logged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from telos.algorithms.language import _group_relative
from telos.algorithms.language._group_relative import GroupConfig
from telos.algorithms.language._policy_gradient import log_ratios, regularised
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.policy import Estimates, PolicyView, Scored, clipped_surrogate
from telos.functional.reduction import Losses, masked_mean


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig):
    """Options of Clip-Cov and KL-Cov."""

    control: Literal["clip", "kl"] = "clip"  # tokens of high covariance give no gradient, or pay a divergence
    selected_share: float = 2e-4  # share of the tokens that is held back, 0 … 1 (paper: 2e-4 for clip; 2e-3 to 2e-4 for kl)
    cov_low: float = 1.0  # covariance from which on tokens may be clipped (paper: 1)
    cov_high: float = 5.0  # and up to which (paper: 5)
    cov_kl_coef: float = 1.0  # weight of the divergence that the selected tokens pay, >= 0 (paper: 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and <= 1", "selected_share")
        require(self, ">= 0", "cov_kl_coef")
        if not self.cov_low < self.cov_high:
            raise UsageError(f"--cov_low {self.cov_low} must be below --cov_high {self.cov_high}")


def covariances(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """[N, T]: each token's part of the covariance of log-probability and advantage over all true tokens, 0 elsewhere."""
    found = (logprobs - masked_mean(logprobs, mask)) * (advantages - masked_mean(advantages, mask))
    return found.masked_fill(~mask, 0.0)


def selected(config: Config, covariance: Tensor, mask: Tensor, step: int) -> Tensor:
    """[N, T] bool: the tokens that are held back, at least one where any may be."""
    count = max(1, round(config.selected_share * int(mask.sum()))) if config.selected_share else 0
    if config.control == "clip":
        allowed = mask & (covariance >= config.cov_low) & (covariance <= config.cov_high)
        generator = torch.Generator().manual_seed(step)
        rank = torch.rand(mask.shape, generator=generator).to(covariance)
    else:
        allowed, rank = mask, covariance
    places = torch.where(allowed, rank, -torch.inf).flatten().argsort(descending=True, stable=True)[:count]
    found = torch.zeros_like(mask).flatten()
    found[places] = True
    return found.view_as(mask) & allowed


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    plain = _group_relative.estimate(config, scored, state)
    covariance = covariances(scored.logprobs, plain.advantages, scored.mask)
    step = int(state.get("step", 0))
    held = selected(config, covariance, scored.mask, step)
    metrics = {
        "covariance": float(masked_mean(covariance, scored.mask)),
        "tokens/held_back": float(held.sum() / scored.mask.sum().clamp(min=1)),
    }
    return Estimates(plain.advantages, state={"step": step + 1.0}, metrics={**plain.metrics, **metrics}, extra={"held": held})


def loss(config: Config, view: PolicyView) -> Losses:
    held = view.extra["held"]
    log_ratio = log_ratios(config, view)
    values, low, high = clipped_surrogate(log_ratio, view.advantages, config.clip_range, config.clip_range_high or config.clip_range)
    if config.control == "clip":
        values = torch.where(held, values.detach(), values)
    else:
        values = values + config.cov_kl_coef * held * (view.logprobs - view.old_logprobs).abs()
    return regularised(config, view, values, {"clip_ratio/low": (low.float(), view.mask), "clip_ratio/high": (high.float(), view.mask)})


METHOD = Method(
    key="clip-cov",
    title="Clip-Cov and KL-Cov",
    family="language",
    loop="rollouts",
    changes="holds back the tokens whose log-probability and advantage covary most, which are those that end the entropy",
    paper="Cui et al. 2025, The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models, arXiv:2505.22617",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward"}),
    system=172,
    aliases=("kl-cov", "entropy-mechanism"),
)
