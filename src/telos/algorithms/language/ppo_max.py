"""PPO for language models, plain and with every stabiliser of "PPO-max" as a switch.

Token-level PPO (Zheng et al. 2023, sections 3.2 and 5): the answer's score stands on its last token, a penalty −η (log π − log π_ref) on every token (eq. 16),
advantages by GAE (eq. 11), clipped surrogate (eq. 13), squared error of a separate critic (eq. 14), and optionally the likelihood of
pre-training text (eq. 15). What makes it PPO-max (section 5.4), each an option here:

    normalize_reward, clip_reward    scores divided by their running deviation after their running mean is taken off, then clipped (eq. 17)
    normalize_advantage, clip_advantage
    kl_coef                          the token-level penalty; kl_target adapts it (Ziegler et al. 2019, eq. 4) as the paper's comparison does
    clip_range_vf                    the critic's change is clipped as the policy's is
    critic_init, critic_warmup       critic from the reward model, trained alone for the first iterations
    pretrain_coef, pretrain_data     PPO-ptx
    max_grad_norm, epochs, minibatch_size, entropy_coef

`--preset vanilla` switches all of them off at once. Departures: statistics of the scores run over the whole history from the first iteration on, and
advantages are normalised over the iteration, not over each minibatch, so that minibatch sizes change no gradient's meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from telos.algorithms.language import _policy_gradient
from telos.algorithms.language._loop_rollouts import CriticConfig
from telos.algorithms.language._policy_gradient import PolicyGradientConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.policy import (
    CriticView,
    Estimates,
    PolicyView,
    Scored,
    explained_variance,
    running_moments,
    sequence_kl,
    standard_deviation,
    token_rewards,
)
from telos.functional.reduction import Losses, whiten
from telos.functional.returns import gae


@dataclass(frozen=True, kw_only=True)
class Config(CriticConfig, PolicyGradientConfig):
    """Options of PPO and PPO-max."""

    preset: Literal["max", "vanilla"] = "max"  # vanilla ignores the six stabilisers below marked (*), whatever their values
    kl_coef: float = 0.05  # η: weight of log π − log π_ref, >= 0 (paper: 0.05) (*)
    kl_target: float = 0.0  # nats a sequence at which an adaptive η aims; 0 = fixed (paper: fixed) (*)
    normalize_reward: bool = True  # running mean and deviation of the scores (*)
    clip_reward: float = 5.0  # bound on the normalised score, > 0; 0 = none (*)
    normalize_advantage: bool = True  # mean 0, deviation 1 over the iteration (*)
    clip_advantage: float = 0.0  # bound on the advantage; 0 = none (paper: off in the final setting)
    clip_range_vf: float = 0.2  # bound on the critic's change of a value; 0 = none (*)
    gamma: float = 1.0  # discount a token
    gae_lambda: float = 0.95  # λ of GAE

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "kl_target", "clip_reward", "clip_advantage", "clip_range_vf")
        require(self, ">= 0 and <= 1", "gamma", "gae_lambda")


def effective(config: Config) -> Config:
    """The config with the preset applied: what is computed with. The config that is written down stays as it was asked for."""
    import dataclasses

    if config.preset == "max":
        return config
    off = {
        "kl_coef": 0.0,
        "kl_target": 0.0,
        "normalize_reward": False,
        "clip_reward": 0.0,
        "normalize_advantage": False,
        "clip_range_vf": 0.0,
    }
    return dataclasses.replace(config, **off)


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    """Shaped rewards, advantages and returns of one iteration."""
    c = effective(config)
    valid = scored.valid
    assert scored.values is not None
    scores, state = scored.scores, dict(state)
    if c.normalize_reward:
        state |= running_moments(state, scores[valid], "score")
        scores = (scores - state["score/mean"]) / standard_deviation(state, "score")
        if c.clip_reward:
            scores = scores.clamp(-c.clip_reward, c.clip_reward)
    metrics: dict[str, float] = {}
    coefficient = state.get("kl_coef", c.kl_coef)
    if scored.reference is not None:
        metrics["kl_coef"] = coefficient
        if c.kl_target:
            kl = float(sequence_kl(scored.logprobs, scored.reference, scored.mask)[valid].mean()) if bool(valid.any()) else c.kl_target
            error = max(-0.2, min(0.2, kl / c.kl_target - 1.0))
            state["kl_coef"] = coefficient * (1 + 0.1 * error)
    rewards = token_rewards(scored, kl_coef=coefficient if c.kl_as == "reward" else 0.0, scores=scores)
    advantages, returns = gae(rewards, scored.values, scored.mask, gamma=c.gamma, gae_lambda=c.gae_lambda)
    metrics["critic/explained_variance"] = explained_variance(scored.values, returns, scored.mask)
    metrics["advantages/std"] = float(advantages[scored.mask].std(unbiased=False)) if scored.mask.any() else 0.0
    if c.normalize_advantage:
        advantages = whiten(advantages, scored.mask)
    if c.clip_advantage:
        advantages = advantages.clamp(-c.clip_advantage, c.clip_advantage)
    return Estimates(advantages, returns, state, metrics)


def loss(config: Config, view: PolicyView) -> Losses:
    """The clipped surrogate of `_policy_gradient`."""
    return _policy_gradient.loss(effective(config), view)


def critic_loss(config: Config, view: CriticView) -> Losses:
    """Half the squared error per token; with a clip range, the larger of the clipped and the unclipped one."""
    c = effective(config)
    values = (view.values - view.returns) ** 2
    if c.clip_range_vf:
        clipped = view.old_values + (view.values - view.old_values).clamp(-c.clip_range_vf, c.clip_range_vf)
        values = torch.maximum(values, (clipped - view.returns) ** 2)
    return Losses(0.5 * values, view.mask, {"critic/value": (view.values, view.mask)})


METHOD = Method(
    key="ppo-max",
    title="PPO-max",
    family="language",
    loop="rollouts",
    changes="token-level PPO with reward and advantage normalisation, KL penalty, value clipping and critic pre-training",
    paper="Zheng et al. 2023, Secrets of RLHF in Large Language Models Part I: PPO, arXiv:2307.04964",
    config=Config,
    loss=loss,
    estimate=estimate,
    critic_loss=critic_loss,
    needs=frozenset({"reference", "reward", "critic"}),
    system=120,
    aliases=("ppo", "ppo-lm", "rlhf-ppo"),
)
