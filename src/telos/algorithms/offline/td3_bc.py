"""TD3+BC: TD3 on a dataset, with the data's actions held on to.

    policy   −λ Q_1(s, π(s)) + ‖π(s) − a‖²,   λ = α / mean |Q_1(s, π(s))|                                     (Fujimoto and Gu 2021, eq. 3 and 5)

The critics are TD3's. Observations are brought to mean 0 and deviation 1 of the data, as in the paper (eq. 6).
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import torch

from telos.algorithms.actor_critic import Agent, Update
from telos.algorithms.offline._loop_offline import OfflineConfig
from telos.core.config import require
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.functional.reduction import Losses
from telos.functional.values import squared
from telos.models.critics import action_values
from telos.models.policies import Policy, Shape


@dataclass(frozen=True, kw_only=True)
class Config(OfflineConfig):
    """Options of TD3+BC."""

    alpha: float = 2.5  # α: weight of the critic against the data's actions, >= 0 (paper: 2.5); 0 clones behaviour
    normalize_observations: bool = True  # to the data's mean and deviation; kept inside the policy
    policy_delay: int = 2  # improvements of the critics for one of the policy (paper: 2)
    target_noise: float = 0.2  # deviation of the noise in the target's action, where actions lie in (−1, 1) (paper: 0.2)
    target_noise_clip: float = 0.5  # bound on that noise (paper: 0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "policy_delay")
        require(self, ">= 0", "alpha", "target_noise", "target_noise_clip")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    shape = Shape("deterministic", config.hidden, config.activation, orthogonal=False, normalise=config.normalize_observations)
    policy = Policy(observation_space, action_space, shape)
    return Agent(policy, {"critic": action_values(policy, config)}, targets=("policy", "critic"))


def critic_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    with torch.no_grad():
        action = torch.tanh(agent.target("policy")(batch.next_observation))
        noise = torch.randn(action.shape, generator=generator, device=action.device) * config.target_noise
        action = (action + noise.clamp(-config.target_noise_clip, config.target_noise_clip)).clamp(-1, 1)
        target = batch.reward + batch.discount * agent.target("critic")(batch.next_observation, action).amin(0)
    values = agent["critic"](batch.observation, batch.action)
    return Losses(squared(values, target, batch.weight), metrics={"critic/value": values[0]})


def actor_loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    action = torch.tanh(agent.policy(batch.observation))
    apart = (action - batch.action).square().mean(1)
    if not config.alpha:
        return Losses(apart, metrics={"actor/apart": apart})
    value = agent["critic"](batch.observation, action)[0]
    scale = config.alpha / value.detach().abs().mean().clamp(min=1e-6)
    return Losses(apart - scale * value, metrics={"actor/apart": apart})


def updates(config: Config) -> tuple[Update, ...]:
    return (
        Update("critic", ("critic",), critic_loss),
        Update("actor", ("policy",), actor_loss, every=config.policy_delay, followed=("policy", "critic")),
    )


METHOD = Method(
    key="td3-bc",
    title="TD3+BC",
    family="offline",
    loop="offline",
    changes="adds the squared distance from the data's actions to TD3's policy loss",
    paper="Fujimoto and Gu 2021, A Minimalist Approach to Offline Reinforcement Learning, arXiv:2106.06860",
    config=Config,
    build=build,
    updates=updates,
)
