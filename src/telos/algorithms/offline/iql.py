"""Implicit Q-learning: values that never ask for an action outside the data.

    value    L_τ(min_j Q̄_j(s, a) − V(s)),   L_τ(u) = |τ − 1(u < 0)| u²                                  (Kostrikov et al. 2022, eq. 5)
    critics  (Q_i(s, a) − r − γ V(s′))²                                                              (eq. 6)
    policy   −exp(β (min_j Q̄_j(s, a) − V(s))) log π(a|s),   the weight bounded                                    (eq. 7)

The policy is a Gaussian whose deviation does not depend on the state, as in the authors' code. Its mean is squashed by tanh there; here it is not, and
actions are clipped to their bounds.
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
from telos.functional.values import expectile, squared
from telos.models.critics import StateValues, action_values, in_units


@dataclass(frozen=True, kw_only=True)
class Config(StochasticConfig, OfflineConfig):
    """Options of IQL."""

    expectile: float = 0.7  # τ in (0, 1): 0.5 is the mean of the data's values, 1 their largest (paper: 0.7, 0.9 on mazes)
    beta: float = 3.0  # inverse temperature of the policy's weights, > 0 (paper: 3, 10 on mazes)
    max_weight: float = 100.0  # bound on a step's weight, > 0 (paper: 100)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0 and < 1", "expectile")
        require(self, "> 0", "beta", "max_weight")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    policy = stochastic_policy(config, observation_space, action_space)
    value = StateValues(policy.reader, config.hidden, activation=config.activation, layer_norm=config.layer_norm)
    return Agent(policy, {"critic": action_values(policy, config), "value": in_units(policy, value)}, targets=("critic",))


def value_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    value = agent["value"](batch.observation)
    gap = best(agent, batch) - value
    return Losses(expectile(gap, config.expectile), metrics={"value": value, "advantage": gap})


def critic_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    with torch.no_grad():
        target = batch.reward + batch.discount * agent["value"](batch.next_observation)
    values = agent["critic"](batch.observation, batch.action)
    return Losses(squared(values, target, batch.weight), metrics={"critic/value": values[0]})


def weighted_cloning(agent: Agent, batch: Transitions, temperature: float, bound: float) -> Losses:
    """−min(exp(advantage / temperature), bound) log π(a|s): the data's actions in proportion to what they are worth."""
    with torch.no_grad():
        advantage = best(agent, batch) - agent["value"](batch.observation)
        weight = (advantage / temperature).exp().clamp(max=bound)
    logprob = agent.policy.distribution(batch.observation).log_prob(batch.action)
    return Losses(-weight * logprob, metrics={"actor/weight": weight})


def actor_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    return weighted_cloning(agent, batch, 1 / config.beta, config.max_weight)


def best(agent: Agent, batch: Transitions) -> torch.Tensor:
    """min_j Q̄_j(s, a) of the data's actions, [B], without gradient."""
    with torch.no_grad():
        return agent.once("best", batch, lambda: agent.target("critic")(batch.observation, batch.action).amin(0))


def updates(config: Config) -> tuple[Update, ...]:
    return (
        Update("value", ("value",), value_loss),
        Update("actor", ("policy",), actor_loss),
        Update("critic", ("critic",), critic_loss, followed=("critic",)),
    )


METHOD = Method(
    key="iql",
    title="Implicit Q-Learning",
    family="offline",
    loop="offline",
    changes="takes an upper expectile over the data's actions where Q-learning takes the largest value of all",
    paper="Kostrikov et al. 2022, Offline Reinforcement Learning with Implicit Q-Learning, arXiv:2110.06169",
    config=Config,
    build=build,
    updates=updates,
    aliases=("implicit-q-learning",),
)
