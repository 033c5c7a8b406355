"""AWAC: the policy repeats the data's actions in proportion to their exponentiated advantage, under critics of the policy itself.

    critics  (Q_i(s, a) − r − γ min_j Q̄_j(s′, a′))²,   a′ ~ π                                                    (Nair et al. 2020, eq. 4)
    policy   −exp((Q(s, a) − V(s)) / λ) log π(a|s),   V(s) = min_j Q_j(s, a″), a″ ~ π, Q the smaller one, too          (eq. 13)

The weights are normalised over the batch by a softmax, as in the authors' code, and scaled by its size, so that their mean is 1. Critics are asked of
actions as the Gaussian gives them, also beyond the bounds to which the environment would clip them.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import torch

from telos.algorithms.actor_critic import Agent, Update
from telos.algorithms.offline._loop_offline import OfflineConfig, StochasticConfig, stochastic_policy
from telos.core.config import require
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.functional.reduction import Losses
from telos.functional.values import squared
from telos.models.critics import action_values


@dataclass(frozen=True, kw_only=True)
class Config(StochasticConfig, OfflineConfig):
    """Options of AWAC."""

    temperature: float = 1.0  # λ: of the advantages, > 0 (paper: 1, 0.3 on some tasks)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "temperature")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    policy = stochastic_policy(config, observation_space, action_space)
    return Agent(policy, {"critic": action_values(policy, config)}, targets=("critic",))


def critic_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    with torch.no_grad():
        action = agent.policy.distribution(batch.next_observation).sample(generator)
        target = batch.reward + batch.discount * agent.target("critic")(batch.next_observation, action).amin(0)
    values = agent["critic"](batch.observation, batch.action)
    return Losses(squared(values, target, batch.weight), metrics={"critic/value": values[0]})


def actor_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    found = agent.policy.distribution(batch.observation)
    with torch.no_grad():
        own = agent["critic"](batch.observation, found.sample(generator)).amin(0)
        advantage = agent["critic"](batch.observation, batch.action).amin(0) - own
        weight = torch.softmax(advantage / config.temperature, 0) * len(advantage)
    return Losses(-weight * found.log_prob(batch.action), metrics={"actor/weight": weight, "advantage": advantage})


def updates(config: Config) -> tuple[Update, ...]:
    return (Update("critic", ("critic",), critic_loss), Update("actor", ("policy",), actor_loss))


METHOD = Method(
    key="awac",
    title="Advantage Weighted Actor-Critic",
    family="offline",
    loop="offline",
    changes="repeats the data's actions in proportion to their exponentiated advantage under its own critics",
    paper="Nair et al. 2020, AWAC: Accelerating Online Reinforcement Learning with Offline Datasets, arXiv:2006.09359",
    config=Config,
    build=build,
    updates=updates,
    aliases=("advantage-weighted-actor-critic",),
)
