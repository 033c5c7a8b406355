"""Mirror descent policy optimisation, off-policy: SAC whose policy is held near a slow copy of itself.

    policy   log π(a|s) − log π_k(a|s) − t Q(s, a),   a ~ π by reparametrisation                          (Tomar et al. 2020, eq. 10)
    critics  SAC's, with the entropy in the targets (soft) or without (hard)

π_k is the slow copy of the policy. With a uniform π_k (`--uniform_reference true`) its term is a constant and the loss is SAC's with temperature 1/t: soft
actor–critic is this method without memory of its last policy (section 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import torch

from telos.algorithms.actor_critic import Agent, Update
from telos.algorithms.online import sac
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
    """Options of soft MDPO."""

    critics: int = 2  # networks whose smallest value counts
    step_size: float = 5.0  # t: step of mirror descent, > 0; 1/t is the temperature
    soft: bool = True  # the policy's entropy is part of the critics' targets
    uniform_reference: bool = False  # π_k is uniform, which makes the method SAC
    actor_learning_rate: float = 3e-4  # peak, of the policy

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "critics")
        require(self, "> 0", "step_size")
        require(self, ">= 0", "actor_learning_rate")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    policy = Policy(observation_space, action_space, Shape("squashed", config.hidden, config.activation, orthogonal=False))
    return Agent(policy, {"critic": action_values(policy, config, config.critics)}, targets=("policy", "critic"))


def critic_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    with torch.no_grad():
        action, logprob = sac.drawn(agent, batch.next_observation, generator)
        following = agent.target("critic")(batch.next_observation, action).amin(0)
        if config.soft:
            following = following - logprob / config.step_size
        target = batch.reward + batch.discount * following
    values = agent["critic"](batch.observation, batch.action)
    error = (values - target).detach().abs().amax(0)
    return Losses(squared(values, target, batch.weight), metrics={"critic/value": values[0], "priority": error})


def actor_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    found = agent.policy.distribution(batch.observation)
    assert isinstance(found, TanhGaussian)
    action, logprob = found.rsample(generator)
    value = agent["critic"](batch.observation, action).amin(0)
    loss = logprob / config.step_size - value
    if config.uniform_reference:
        return Losses(loss, metrics={"entropy": -logprob})
    slow = agent.target("policy").distribution(batch.observation)
    near = slow.log_prob(action)
    return Losses(loss - near / config.step_size, metrics={"entropy": -logprob, "policy/kl": found.kl(slow)})


def updates(config: Config) -> tuple[Update, ...]:
    return (Update("critic", ("critic",), critic_loss), Update("actor", ("policy",), actor_loss, learning_rate=config.actor_learning_rate))


METHOD = Method(
    key="soft-mdpo",
    title="Off-policy Mirror Descent Policy Optimization",
    family="online",
    loop="off-policy",
    changes="holds SAC's policy near a slow copy of itself instead of near the uniform one",
    paper="Tomar et al. 2020, Mirror Descent Policy Optimization, arXiv:2005.09814",
    config=Config,
    build=build,
    updates=updates,
    explore=sac.explore,
    aliases=("off-policy-mdpo",),
)
