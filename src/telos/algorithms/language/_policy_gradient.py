"""Policy gradients on sampled answers, factored: what is rewarded, how the ratio is taken and bounded, what regularises, how tokens are averaged.

    L = reduce_t [ max(−ρ_t A_t, −clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t) − c H_t + β KL_t ],   ρ = π / π_sampled

A method on it chooses its advantages A in `estimate` and the defaults of these options; most add nothing else.

- ratio `token`: ρ of each token (PPO). `sequence`: the geometric mean of the answer's ratios, the same for all its tokens, with each token's own gradient
  (GSPO: Zheng et al. 2025, eq. 7 and its token form).
- KL from the reference. `reward`: −β log π/π_ref is part of each sampled token's reward, whose policy gradient is that of the KL divergence. `k3`: β times the
  estimator k3 of each token is added to the loss and differentiated, as GRPO does; that gradient is the one of the forward divergence near the reference
  (`functional.divergences.kl_loss`). `k2`: likewise with half the squared log-ratio, whose gradient is the reverse divergence's, token by token.
- mean `token`: over all tokens of the minibatch, so that each token counts alike (DAPO). `answer`: over each answer's tokens, then over answers (GRPO); short
  answers weigh more per token. `constant`: the sum over each answer's tokens over the largest length that was allowed (Dr. GRPO), free of both biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from telos.algorithms.language._loop_rollouts import RolloutsConfig, StepRewardConfig
from telos.core.config import require
from telos.functional import policy
from telos.functional.advantages import to_go
from telos.functional.divergences import kl_k2, kl_k3
from telos.functional.policy import PolicyView, Scored, clipped_surrogate
from telos.functional.reduction import Losses, masked_mean


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(RolloutsConfig, StepRewardConfig):
    """Options of policy gradients."""

    kl_coef: float = 0.05  # β: weight of the divergence from the reference, >= 0; 0 keeps no reference model
    kl_as: Literal["reward", "k3", "k2"] = "reward"  # a reward of each token, or an estimator that is added to the loss
    ratio: Literal["token", "sequence"] = "token"  # of probabilities now and as sampled: of each token, or the answer's geometric mean
    clip_range: float = 0.2  # ε: how far the ratio may fall below 1 (and rise above it) and still carry a gradient
    clip_range_high: float = 0.0  # ε above 1, where it differs from the one below; 0 = the same
    entropy_coef: float = 0.0  # weight of the entropy bonus per token, >= 0
    loss_mean: Literal["token", "answer", "constant"] = "token"  # over all tokens alike, over each answer first, or over a fixed length

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "kl_coef", "clip_range", "clip_range_high", "entropy_coef")


def token_rewards(config: PolicyGradientConfig, scored: Scored) -> Tensor:
    """[N, T]: `functional.policy.token_rewards` with the KL penalty where it is a reward."""
    return policy.token_rewards(scored, kl_coef=config.kl_coef if config.kl_as == "reward" else 0.0)


def answer_rewards(config: PolicyGradientConfig, scored: Scored) -> Tensor:
    """[N]: the sum of `token_rewards`, for methods to which an answer is one action."""
    return token_rewards(config, scored).sum(1)


def rewards_to_go(config: PolicyGradientConfig, scored: Scored) -> Tensor:
    """[N, T]: what `token_rewards` pay from each token on."""
    return to_go(token_rewards(config, scored), scored.mask)


def log_ratios(config: PolicyGradientConfig, view: PolicyView) -> Tensor:
    """log ρ [N, T] as the option `ratio` says."""
    ratios = view.logprobs - view.old_logprobs
    if config.ratio == "token":
        return ratios
    mean = masked_mean(ratios.detach(), view.mask, 1)[:, None]
    return mean + ratios - ratios.detach()


def reduced(
    config: PolicyGradientConfig, values: Tensor, mask: Tensor, metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]] | None = None
) -> Losses:
    """Values [N, T] averaged as the option `loss_mean` says."""
    metrics = metrics or {}
    if config.loss_mean == "token":
        return Losses(values, mask, metrics)
    kept = torch.where(mask, values, torch.zeros_like(values))
    length = mask.sum(1).clamp(min=1) if config.loss_mean == "answer" else config.max_completion_length
    return Losses(kept.sum(1) / length, metrics=metrics)


def loss(config: PolicyGradientConfig, view: PolicyView) -> Losses:
    """The clipped surrogate with the entropy bonus and the divergence."""
    log_ratio = log_ratios(config, view)
    values, low, high = clipped_surrogate(log_ratio, view.advantages, config.clip_range, config.clip_range_high or config.clip_range)
    metrics = {"clip_ratio/low": (low.float(), view.mask), "clip_ratio/high": (high.float(), view.mask)}
    return regularised(config, view, values, metrics)


def regularised(
    config: PolicyGradientConfig, view: PolicyView, values: Tensor, metrics: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> Losses:
    """A surrogate's values [N, T] with the entropy bonus and the divergence, reduced; and what users watch of the policy."""
    if config.entropy_coef:
        values = values - config.entropy_coef * view.entropy
    if config.kl_as != "reward" and config.kl_coef and view.reference is not None:
        estimator = kl_k3 if config.kl_as == "k3" else kl_k2
        values = values + config.kl_coef * estimator(view.logprobs, view.reference)
    log_ratio = (view.logprobs - view.old_logprobs).detach()
    watched = {"entropy": (view.entropy, view.mask), "policy/approx_kl": (torch.expm1(log_ratio) - log_ratio, view.mask)}
    return reduced(config, values, view.mask, {**(metrics or {}), **watched})
