"""Soft actor–critic: act as randomly as the task allows; the entropy of the policy is part of what is maximised.

    critic       (Q_i(s, a) − r − γ [min_j Q̄_j(s′, a′) − α log π(a′|s′)])²,   a′ ~ π                           (Haarnoja et al. 2018b, eq. 5)
    policy       α log π(a|s) − min_j Q_j(s, a),   a ~ π by reparametrisation                                         (eq. 7)
    temperature  −log α (log π(a|s) + H̄),   H̄ = −dim(A) unless it is given                                           (eq. 18)

with Q̄ the slow copies. The temperature is learned by its logarithm, as the authors' code does. The deviation is bounded smoothly, log σ in (−5, 2), where
the paper clips it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch

from telos.algorithms.actor_critic import Agent, Scalar, Update
from telos.algorithms.online._loop_off_policy import OffPolicyConfig
from telos.core.config import require
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.functional.distributions import TanhGaussian
from telos.functional.reduction import Losses
from telos.functional.values import squared
from telos.models.critics import action_values
from telos.models.policies import Policy, Shape


@dataclass(frozen=True, kw_only=True)
class Config(OffPolicyConfig):
    """Options of SAC."""

    critics: int = 2  # networks whose smallest value counts (paper: 2)
    temperature: float = 0.0  # α; 0 = learned
    temperature_init: float = 1.0  # α at the start, where it is learned, > 0
    target_entropy: float | None = None  # nats that a learned α aims at; default: minus the number of action dimensions
    actor_learning_rate: float = 3e-4  # peak, of the policy and the temperature

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "critics")
        require(self, ">= 0", "temperature", "actor_learning_rate")
        require(self, "> 0", "temperature_init")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    policy = Policy(observation_space, action_space, Shape("squashed", config.hidden, config.activation, orthogonal=False))
    critic = action_values(policy, config, config.critics)
    networks: dict[str, Any] = {"critic": critic}
    if not config.temperature:
        networks["temperature"] = Scalar(float(np.log(config.temperature_init)))
    return Agent(policy, networks, targets=("critic",))


def temperature(config: Config, agent: Agent) -> torch.Tensor | float:
    """α, without gradient."""
    return config.temperature or agent["temperature"]().detach().exp()


def drawn(agent: Agent, observation: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(actions [B, D], log-probabilities [B]) of the policy, with gradient to it."""
    found = agent.policy.distribution(observation)
    assert isinstance(found, TanhGaussian)
    return found.rsample(generator)


def critic_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    with torch.no_grad():
        action, logprob = drawn(agent, batch.next_observation, generator)
        following = agent.target("critic")(batch.next_observation, action).amin(0) - temperature(config, agent) * logprob
        target = batch.reward + batch.discount * following
    values = agent["critic"](batch.observation, batch.action)
    error = (values - target).detach().abs().amax(0)
    return Losses(squared(values, target, batch.weight), metrics={"critic/value": values[0], "priority": error})


def actor_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    action, logprob = drawn(agent, batch.observation, generator)
    value = agent["critic"](batch.observation, action).amin(0)
    loss = temperature(config, agent) * logprob - value
    metrics = {"entropy": -logprob}
    if config.temperature:
        return Losses(loss, metrics=metrics)
    aim = -float(action.shape[1]) if config.target_entropy is None else config.target_entropy
    log_alpha = agent["temperature"]()
    metrics["temperature"] = log_alpha.detach().exp().expand_as(logprob)
    return Losses(loss, metrics=metrics, extra=(Losses(-log_alpha * (logprob + aim).detach()),))


def updates(config: Config) -> tuple[Update, ...]:
    of = ("policy",) if config.temperature else ("policy", "temperature")
    return (
        Update("critic", ("critic",), critic_loss),
        Update("actor", of, actor_loss, learning_rate=config.actor_learning_rate),
    )


def explore(config: Config, policy: Policy, read: np.ndarray, steps: int, generator: torch.Generator) -> np.ndarray:
    return policy.choose(read, deterministic=False, generator=generator)


METHOD = Method(
    key="sac",
    title="Soft Actor-Critic",
    family="online",
    loop="off-policy",
    changes="maximises reward and the policy's entropy together, with a temperature that is learned",
    paper="Haarnoja et al. 2018, Soft Actor-Critic Algorithms and Applications, arXiv:1812.05905",
    config=Config,
    build=build,
    updates=updates,
    explore=explore,
    aliases=("soft-actor-critic",),
)
