"""Conservative Q-learning: values of actions that the data do not have are pushed down.

    critics  (Q_i(s, a) − r − γ min_j Q̄_j(s′, a′))² + α [ log Σ_a′ exp Q_i(s, a′) − Q_i(s, a) ]                        (Kumar et al. 2020, eq. 4)
    policy   SAC's, with a learned temperature

The sum over continuous actions is estimated by importance sampling from N uniform actions, N of the policy in s and N of the policy in s′, each weighted by
its density there (appendix F). The entropy is no part of the targets' values, as in the authors' code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gymnasium
import torch

from telos.algorithms.actor_critic import Agent, Scalar, Update
from telos.algorithms.offline._loop_offline import OfflineConfig
from telos.core.config import require
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.functional.distributions import TanhGaussian
from telos.functional.reduction import Losses
from telos.functional.values import squared
from telos.models.critics import action_values
from telos.models.policies import Policy, Shape


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """Options of CQL."""

    conservative: float = 5.0  # α: weight of the conservative term, >= 0 (paper: 5 and 10, 1 on adroit)
    samples: int = 10  # N: actions from each of three sources (paper: 10)
    actor_learning_rate: float = 1e-4  # peak, of the policy and the temperature (paper: 3e-5 to 1e-4)
    temperature_init: float = 1.0  # α of the entropy at the start, > 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "conservative", "actor_learning_rate")
        require(self, ">= 1", "samples")
        require(self, "> 0", "temperature_init")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    shape = Shape("squashed", config.hidden, config.activation, orthogonal=False, normalise=config.normalize_observations)
    policy = Policy(observation_space, action_space, shape)
    networks: dict[str, Any] = {"critic": action_values(policy, config), "temperature": Scalar(math.log(config.temperature_init))}
    return Agent(policy, networks, targets=("critic",))


def critic_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    n, (rows, size) = config.samples, batch.action.shape
    with torch.no_grad():
        here, there = (agent.policy.distribution(x.repeat_interleave(n, 0)) for x in (batch.observation, batch.next_observation))
        assert isinstance(here, TanhGaussian)
        assert isinstance(there, TanhGaussian)
        (own, own_log), (following, following_log) = here.rsample(generator), there.rsample(generator)
        next_values = agent.target("critic")(batch.next_observation, following.view(rows, n, size)[:, 0]).amin(0)
        target = batch.reward + batch.discount * next_values
        uniform = torch.rand(rows * n, size, generator=generator, device=batch.action.device) * 2 - 1
        actions = torch.cat([x.view(rows, n, size) for x in (uniform, own, following)], 1)
        density = torch.cat([x.view(rows, n) for x in (torch.full_like(own_log, -size * math.log(2.0)), own_log, following_log)], 1)
    values = agent["critic"](batch.observation, batch.action)
    error = squared(values, target, batch.weight)
    if not config.conservative:
        return Losses(error, metrics={"critic/value": values[0]})
    flat = batch.observation.repeat_interleave(3 * n, 0)
    drawn = agent["critic"](flat, actions.flatten(0, 1)).unflatten(1, (rows, 3 * n))
    soft = torch.logsumexp(drawn - density, -1) - math.log(3 * n)
    gap = soft - values
    return Losses(error + config.conservative * gap.sum(0), metrics={"critic/value": values[0], "critic/gap": gap.mean(0)})


def actor_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    found = agent.policy.distribution(batch.observation)
    assert isinstance(found, TanhGaussian)
    action, logprob = found.rsample(generator)
    log_alpha = agent["temperature"]()
    loss = log_alpha.detach().exp() * logprob - agent["critic"](batch.observation, action).amin(0)
    extra = (Losses(-log_alpha * (logprob - action.shape[1]).detach()),)
    return Losses(loss, metrics={"entropy": -logprob, "temperature": log_alpha.detach().exp().expand_as(logprob)}, extra=extra)


def updates(config: Config) -> tuple[Update, ...]:
    return (
        Update("critic", ("critic",), critic_loss),
        Update("actor", ("policy", "temperature"), actor_loss, learning_rate=config.actor_learning_rate),
    )


METHOD = Method(
    key="cql",
    title="Conservative Q-Learning",
    family="offline",
    loop="offline",
    changes="pushes down the values of actions that the data do not have",
    paper="Kumar et al. 2020, Conservative Q-Learning for Offline Reinforcement Learning, arXiv:2006.04779",
    config=Config,
    build=build,
    updates=updates,
    aliases=("conservative-q-learning",),
)
