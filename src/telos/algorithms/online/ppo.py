"""Proximal policy optimisation: several passes over the same steps, with the probability ratio clipped.

    L = E[ max(−ρ A, −clip(ρ, 1 − ε, 1 + ε) A) ] + c_v (V − R)² − c_e H,   ρ = π / π_old          (Schulman et al. 2017, eq. 7 and 9)

with A by GAE. Advantages are standardised in each minibatch, weights start orthogonal with a small last layer, and the value's change may be
clipped as well: what implementations do beyond the paper (Huang et al. 2022, "The 37 implementation details") is an option here, with the defaults that
Stable-Baselines3 has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from telos.algorithms.online._loop_on_policy import PassesConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional import closed_form
from telos.functional.closed_form import Slopes, StepArrays
from telos.functional.policy import clipped_surrogate
from telos.functional.reduction import Losses
from telos.functional.segments import Estimate, Segment, StepView, gae, standardised


@dataclass(frozen=True, kw_only=True)
class Config(PassesConfig):
    """Options of PPO."""

    clip_range: float = 0.2  # ε: how far the ratio may leave 1 and still carry a gradient (paper: 0.2)
    clip_range_vf: float = 0.0  # bound on the critic's change of a value; 0 = none
    normalize_advantage: Literal["minibatch", "iteration", "none"] = "minibatch"  # over which steps advantages are standardised
    value_coef: float = 0.5  # c_v, >= 0 (paper: 1)
    entropy_coef: float = 0.0  # c_e, >= 0 (paper: 0.01 on Atari, 0 on MuJoCo)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "clip_range", "clip_range_vf", "value_coef", "entropy_coef")


def estimate(config: Config, segment: Segment, state: Mapping[str, float]) -> Estimate:
    advantages, returns = gae(segment, config.gamma, config.gae_lambda)
    if config.normalize_advantage == "iteration":
        advantages = standardised(advantages)
    return Estimate(advantages, returns, state)


def loss(config: Config, view: StepView) -> Losses:
    advantage = standardised(view.advantage) if config.normalize_advantage == "minibatch" else view.advantage
    log_ratio = view.logprob - view.old_logprob
    surrogate, low, high = clipped_surrogate(log_ratio, advantage, config.clip_range, config.clip_range)
    entropy = view.distribution.entropy()
    moved = log_ratio.detach()
    value = view.value
    if config.clip_range_vf:
        value = view.old_value + (value - view.old_value).clamp(-config.clip_range_vf, config.clip_range_vf)
    critic = Losses(config.value_coef * (view.returns - value) ** 2, metrics={"loss/critic": (view.returns - view.value.detach()) ** 2})
    metrics = {"clip_ratio": (low | high).float(), "entropy": entropy, "policy/approx_kl": torch.expm1(moved) - moved}
    return Losses(surrogate - config.entropy_coef * entropy, metrics=metrics, extra=(critic,))


def slopes(config: Config, view: StepArrays) -> Slopes:
    advantage = closed_form.standardised(view.advantage) if config.normalize_advantage == "minibatch" else view.advantage
    log_ratio = view.logprob - view.old_logprob
    surrogate, slope, ratio, clipped = closed_form.clipped_surrogate(log_ratio, advantage, config.clip_range, config.clip_range)
    error = view.value - view.returns
    squared = error * error
    learned, of_value = squared, error
    if config.clip_range_vf:
        moved = view.value - view.old_value
        bounded = view.old_value + moved.clip(-config.clip_range_vf, config.clip_range_vf) - view.returns
        learned, of_value = bounded * bounded, np.where(np.abs(moved) <= config.clip_range_vf, bounded, np.float32(0))
    loss = surrogate + config.value_coef * learned - config.entropy_coef * view.entropy
    metrics = {"loss/critic": squared, "clip_ratio": clipped, "entropy": view.entropy, "policy/approx_kl": ratio - 1 - log_ratio}
    return Slopes(loss, slope, -config.entropy_coef, 2 * config.value_coef * of_value, metrics)


METHOD = Method(
    key="ppo",
    title="Proximal Policy Optimization",
    family="online",
    loop="on-policy",
    changes="takes several passes over the same steps and clips the ratio of probabilities",
    paper="Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347",
    config=Config,
    loss=loss,
    slopes=slopes,
    estimate=estimate,
)
