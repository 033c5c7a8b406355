"""Maximize to Explore, model-free and deep: TD3 whose critics are rewarded for the value of their own policy.

    critics  Σ_i (Q_i(s, a) − y)² − η′ (Q_i(s, π(s)) − Q_i(s, a)),   y as in TD3                               (Liu et al. 2023, MEX-MF)
    policy   −Q_1(s, π(s)),   as in TD3

One objective fits the critics to what was seen and makes them as hopeful as the data allow: where the policy's action was tried, the squared error holds the
value down; where it was not, nothing does, and the policy goes to look. η′ is the inverse of the η that weighs the fit in the theory (there
max_f V_f(s_1) − η L(f), see `mex-tabular`). The theory takes the value of first states; here, as in practice, of the batch's states. The value of the action
that was taken is subtracted, which is our choice: without it (`--contrast false`) all values drift up, by η′ / 2 (1 − γ) where the policy does what it did
before. No gradient of the bonus reaches the policy in the critics' update. The model-based deep form and that for Markov games are not part of this file.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from telos.algorithms.actor_critic import Agent, Update
from telos.algorithms.online import td3
from telos.core.config import require
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(td3.Config):
    """Options of MEX."""

    value_bonus: float = 1e-3  # η′: weight of the value in the critics' loss, >= 0; 0 is TD3 (it scales as the values do)
    contrast: bool = True  # the bonus is for the value above that of the action taken, or for the whole value

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "value_bonus")


def critic_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    fit = td3.critic_loss(config, agent, batch, generator)
    with torch.no_grad():
        action = td3.act(agent.policy, batch.observation)
    hope = agent["critic"](batch.observation, action)
    if config.contrast:
        hope = hope - agent["critic"](batch.observation, batch.action)
    return dataclasses.replace(fit, values=fit.values - config.value_bonus * hope.sum(0), metrics={**fit.metrics, "critic/hope": hope[0]})


def updates(config: Config) -> tuple[Update, ...]:
    critic, actor = td3.updates(config)
    return dataclasses.replace(critic, loss=critic_loss), actor


METHOD = Method(
    key="mex",
    title="Maximize to Explore",
    family="online",
    loop="off-policy",
    changes="rewards TD3's critics for the value of their own policy, so that fitting and exploring are one objective",
    paper="Liu et al. 2023, Maximize to Explore: One Objective Function Fusing Estimation, Planning, and Exploration, arXiv:2305.18258",
    config=Config,
    build=td3.build,
    updates=updates,
    explore=td3.explore,
    system=63,
    aliases=("maximize-to-explore", "mex-mf"),
)
