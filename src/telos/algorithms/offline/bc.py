"""Behaviour cloning: the most likely policy under the data's actions.

    L = −log π(a|s)

for a categorical policy, or a Gaussian whose deviation is learned (Pomerleau 1991). It is the baseline of everything that learns from data: what does
better has found out which of the data's actions are worth repeating.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import torch

from telos.algorithms.actor_critic import Agent, Update
from telos.algorithms.offline._loop_offline import StochasticConfig, stochastic_policy
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(StochasticConfig):
    """Options of behaviour cloning."""

    log_std_init: float = -0.5  # log of the Gaussian's deviation at the start, for continuous actions


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    return Agent(stochastic_policy(config, observation_space, action_space), {})


def loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    found = agent.policy.distribution(batch.observation)
    return Losses(-found.log_prob(batch.action) * batch.weight, metrics={"entropy": found.entropy()})


def updates(config: Config) -> tuple[Update, ...]:
    return (Update("actor", ("policy",), loss),)


METHOD = Method(
    key="bc",
    title="Behaviour Cloning",
    family="offline",
    loop="offline",
    changes="makes the data's actions likely, whatever they led to",
    paper="Pomerleau 1991, Efficient Training of Artificial Neural Networks for Autonomous Navigation, doi:10.1162/neco.1991.3.1.88",
    config=Config,
    build=build,
    updates=updates,
    aliases=("behavior-cloning", "behaviour-cloning", "behavioral-cloning"),
)
