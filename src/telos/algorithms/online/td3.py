"""Twin delayed DDPG: the smaller of two critics, a policy that learns more slowly than they do, and noise in the target's action.

    critics  (Q_i(s, a) − r − γ min_j Q̄_j(s′, clip(π̄(s′) + clip(ε, −c, c), −1, 1)))²,   ε ~ N(0, σ̃²)             (Fujimoto et al. 2018, eq. 14)
    policy   −Q_1(s, π(s)),   every d-th improvement, when the slow copies of all networks follow, too

One critic (`--critics 1`), no delay and no target noise are DDPG, which has a file of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import numpy as np
import torch

from telos.algorithms.actor_critic import Agent, Update
from telos.algorithms.online._loop_off_policy import OffPolicyConfig
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.functional.reduction import Losses
from telos.functional.values import squared
from telos.models.critics import action_values
from telos.models.policies import Policy, Shape


@dataclass(frozen=True, kw_only=True)
class Config(OffPolicyConfig):
    """Options of TD3."""

    critics: int = 2  # networks whose smallest value counts (paper: 2)
    policy_delay: int = 2  # d: improvements of the critics for one of the policy (paper: 2)
    target_noise: float = 0.2  # σ̃: deviation of the noise in the target's action, where actions lie in (−1, 1) (paper: 0.2)
    target_noise_clip: float = 0.5  # c: bound on that noise (paper: 0.5)
    exploration_noise: float = 0.1  # deviation of the noise added to actions while learning (paper: 0.1)
    actor_learning_rate: float = 3e-4  # peak, of the policy (paper: 3e-4)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "critics", "policy_delay")
        require(self, ">= 0", "target_noise", "target_noise_clip", "exploration_noise", "actor_learning_rate")
        if not self.target_noise and self.target_noise_clip != Config.__dataclass_fields__["target_noise_clip"].default:
            raise UsageError("--target_noise_clip has no effect while --target_noise is 0")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    policy = Policy(observation_space, action_space, Shape("deterministic", config.hidden, config.activation, orthogonal=False))
    critic = action_values(policy, config, config.critics)
    return Agent(policy, {"critic": critic}, targets=("policy", "critic"))


def act(policy: Policy, observation: torch.Tensor) -> torch.Tensor:
    """π(s) in (−1, 1), [B, D]."""
    return torch.tanh(policy(observation))


def smoothed(config: Config, agent: Agent, observation: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The slow policy's action with bounded noise, [B, D]."""
    action = act(agent.target("policy"), observation)
    if not config.target_noise:
        return action
    noise = torch.randn(action.shape, generator=generator, device=action.device) * config.target_noise
    return (action + noise.clamp(-config.target_noise_clip, config.target_noise_clip)).clamp(-1, 1)


def critic_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    with torch.no_grad():
        action = smoothed(config, agent, batch.next_observation, generator)
        target = batch.reward + batch.discount * agent.target("critic")(batch.next_observation, action).amin(0)
    values = agent["critic"](batch.observation, batch.action)
    error = (values - target).detach().abs().amax(0)
    return Losses(squared(values, target, batch.weight), metrics={"critic/value": values[0], "priority": error})


def actor_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    return Losses(-agent["critic"](batch.observation, act(agent.policy, batch.observation))[0])


def updates(config: Config) -> tuple[Update, ...]:
    return (
        Update("critic", ("critic",), critic_loss),
        Update(
            "actor",
            ("policy",),
            actor_loss,
            every=config.policy_delay,
            learning_rate=config.actor_learning_rate,
            followed=("policy", "critic"),
        ),
    )


def explore(config: Config, policy: Policy, read: np.ndarray, steps: int, generator: torch.Generator) -> np.ndarray:
    action = policy.choose(read)
    noise = torch.randn(action.shape, generator=generator).numpy() * config.exploration_noise
    return np.clip(action + noise, -1, 1).astype(np.float32)


METHOD = Method(
    key="td3",
    title="Twin Delayed DDPG",
    family="online",
    loop="off-policy",
    changes="takes the smaller of two critics, delays the policy and smooths the target's action",
    paper="Fujimoto et al. 2018, Addressing Function Approximation Error in Actor-Critic Methods, arXiv:1802.09477",
    config=Config,
    build=build,
    updates=updates,
    explore=explore,
    aliases=("twin-delayed-ddpg",),
)
