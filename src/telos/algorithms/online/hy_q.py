"""Hybrid Q-learning: deep Q-learning whose every batch is joined by one from offline data.

    L = (1 − w) E_replay[ huber(Q − target) ] + w E_data[ huber(Q − target) ],   targets as in DQN                     (Song et al. 2022, algorithm 1)

The paper fits Q anew to both data in every iteration; here the fit is DQN's, step by step, as its experiments with pictures have it. Equal weights and
sizes are the symmetric sampling of RLPD (Ball et al. 2023, arXiv:2302.02948). Offline targets look one step ahead whatever `n_step` says.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import torch

from telos.algorithms.actor_critic import Agent, Update
from telos.algorithms.online import dqn
from telos.algorithms.online._offline_data import OfflineData
from telos.core.config import require
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(dqn.Config):
    """Options of Hy-Q."""

    data: str = ""  # Minari folder or id, D4RL HDF5, OGBench npz, or a run's folder
    offline_weight: float = 0.5  # w of the data's batch, which is as large as the replay's, in [0, 1] (RLPD: 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and <= 1", "offline_weight")


class Hybrid(Agent):
    """DQN's networks with the data beside them."""

    data: OfflineData


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    plain = dqn.build(config, observation_space, action_space)
    agent = Hybrid(plain.policy, {}, targets=("policy",))
    agent.data = OfflineData(config, plain.policy)
    return agent


def loss(config: Config, agent: Hybrid, batch: Transitions, generator: torch.Generator) -> Losses:
    met = dqn.loss(config, agent, batch, generator)
    told = dqn.loss(config, agent, agent.data.draw(len(batch), generator), generator)
    w = config.offline_weight
    offline = Losses(w * told.values, metrics={"loss/offline": told.values, "critic/offline_value": told.metrics["critic/value"]})
    return Losses((1 - w) * met.values, metrics=met.metrics, extra=(offline,))


def updates(config: Config) -> tuple[Update, ...]:
    return (Update("critic", ("policy",), loss, followed=("policy",), follow_every=config.target_every),)


METHOD = Method(
    key="hy-q",
    title="Hybrid Q-Learning",
    family="online",
    loop="off-policy",
    changes="learns action values from replayed steps and from offline data in equal parts",
    paper="Song et al. 2022, Hybrid RL: Using Both Offline and Online Data Can Make RL Efficient, arXiv:2210.06718",
    config=Config,
    build=build,
    updates=updates,
    explore=dqn.explore,
    aliases=("hybrid-q-learning",),
)
