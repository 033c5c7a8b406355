"""Deep Q-learning with its usual improvements as options: double, dueling, n-step and prioritised.

    L = huber(Q(s, a) − r − γ Q̄(s′, a*)),   a* = argmax Q̄(s′, ·), or argmax Q(s′, ·) when double           (van Hasselt et al. 2016, eq. 4)

Dueling networks give Q = V + A − mean A (Wang et al. 2016, eq. 9); here both come from one last layer. Exploration is ε-greedy with ε falling
linearly. The slow copy is renewed whole every `target_every` improvements.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import numpy as np
import torch

from telos.algorithms.actor_critic import Agent, Update
from telos.algorithms.online._loop_off_policy import OffPolicyConfig
from telos.core.config import require
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.functional.reduction import Losses
from telos.functional.values import huber
from telos.models.policies import Policy, Shape


@dataclass(frozen=True, kw_only=True)
class Config(OffPolicyConfig):
    """Options of DQN."""

    total_steps: int = 100_000  # environment steps of the run, over all copies
    learning_rate: float = 1e-3  # its highest value in the run
    max_grad_norm: float = 10.0  # gradients are scaled down to this global norm; 0 = never
    batch_size: int = 64  # steps in one gradient step
    start_steps: int = 1000  # environment steps before the first improvement
    random_steps: int = 1000  # environment steps whose actions are uniformly random
    replay_size: int = 100_000  # steps that are remembered
    hidden: tuple[int, ...] = (128, 128)  # widths of the hidden layers
    double: bool = True  # the network chooses the next action and its slow copy values it
    dueling: bool = False  # a value of the state and advantages of the actions
    epsilon_start: float = 1.0  # share of random actions at the start
    epsilon_end: float = 0.05  # and after `epsilon_steps`
    epsilon_steps: int = 10_000  # environment steps over which it falls
    target_every: int = 250  # improvements between renewals of the slow copy
    tau: float = 1.0  # share of the network that the slow copy takes on then, (0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and <= 1", "epsilon_start", "epsilon_end")
        require(self, ">= 1", "epsilon_steps", "target_every")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    shape = Shape("values", config.hidden, config.activation, orthogonal=False, layer_norm=config.layer_norm, dueling=config.dueling)
    return Agent(Policy(observation_space, action_space, shape), {}, targets=("policy",))


def loss(config: Config, agent: Agent, batch: Transitions, generator: torch.Generator) -> Losses:
    with torch.no_grad():
        slow = agent.target("policy")(batch.next_observation)
        chosen = (agent.policy(batch.next_observation) if config.double else slow).argmax(1, keepdim=True)
        target = batch.reward + batch.discount * slow.gather(1, chosen)[:, 0]
    values = agent.policy(batch.observation).gather(1, batch.action.long()[:, None])[:, 0]
    return Losses(huber(values, target, batch.weight), metrics={"critic/value": values, "priority": (values - target).abs()})


def updates(config: Config) -> tuple[Update, ...]:
    return (Update("critic", ("policy",), loss, followed=("policy",), follow_every=config.target_every),)


def explore(config: Config, policy: Policy, read: np.ndarray, steps: int, generator: torch.Generator) -> np.ndarray:
    share = min(1.0, steps / config.epsilon_steps)
    epsilon = config.epsilon_start + share * (config.epsilon_end - config.epsilon_start)
    greedy = torch.from_numpy(policy.choose(read))
    chance = torch.rand(len(greedy), generator=generator)
    random = torch.randint(0, int(policy.action_space.n), greedy.shape, generator=generator)  # type: ignore[attr-defined]
    return torch.where(chance < epsilon, random, greedy).numpy()


METHOD = Method(
    key="dqn",
    title="Deep Q-Network",
    family="online",
    loop="off-policy",
    changes="learns action values from replayed steps against a slow copy of itself",
    paper="Mnih et al. 2015, Human-Level Control through Deep Reinforcement Learning, doi:10.1038/nature14236",
    config=Config,
    build=build,
    updates=updates,
    explore=explore,
    aliases=("deep-q-learning", "double-dqn", "dueling-dqn"),
)
