"""Extreme Q-learning: the value is the soft maximum over the data's actions, found by Gumbel regression.

    value    exp(z) − z − 1,   z = (min_j Q̄_j(s, a) − V(s)) / β, bounded above                              (Garg et al. 2023, eq. 10 and appendix D)
    critics  (Q_i(s, a) − r − γ V(s′))²
    policy   −exp((min_j Q̄_j(s, a) − V(s)) / β) log π(a|s),   the weight bounded

whose minimum over V is β log E[exp(Q/β)] under the data's actions. The gradient of the exponential is divided by the batch's largest term, as the authors
do for stability: the loss is multiplied by exp(−max(z, 0)), which moves no minimum of a single state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from telos.algorithms.actor_critic import Agent, Update
from telos.algorithms.offline import iql
from telos.algorithms.offline._loop_offline import OfflineConfig, StochasticConfig
from telos.core.config import require
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.functional.reduction import Losses
from telos.functional.values import gumbel


@dataclass(frozen=True, kw_only=True)
class Config(StochasticConfig, OfflineConfig):
    """Options of XQL."""

    beta: float = 2.0  # β: temperature of the soft maximum and of the policy's weights, > 0 (paper: 0.6 to 5)
    max_exponent: float = 7.0  # bound on z, > 0 (paper: 5 to 7)
    max_weight: float = 100.0  # bound on a step's weight in the policy's loss, > 0 (paper: 100)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta", "max_exponent", "max_weight")


def value_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    value = agent["value"](batch.observation)
    gap = iql.best(agent, batch) - value
    return Losses(gumbel(gap / config.beta, config.max_exponent), metrics={"value": value, "advantage": gap})


def actor_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    return iql.weighted_cloning(agent, batch, config.beta, config.max_weight)


def updates(config: Config) -> tuple[Update, ...]:
    return (
        Update("value", ("value",), value_loss),
        Update("actor", ("policy",), actor_loss),
        Update("critic", ("critic",), iql.critic_loss, followed=("critic",)),
    )


METHOD = Method(
    key="xql",
    title="Extreme Q-Learning",
    family="offline",
    loop="offline",
    changes="finds the soft maximum over the data's actions by Gumbel regression",
    paper="Garg et al. 2023, Extreme Q-Learning: MaxEnt RL without Entropy, arXiv:2301.02328",
    config=Config,
    build=iql.build,
    updates=updates,
    aliases=("extreme-q-learning",),
)
