"""Stream Q(λ): Watkins's Q(λ) with the stabilisers of the streaming loop.

    δ = r + γ max_a′ Q(s′, a′) − Q(s, a),    z ← γλ z + ∇Q(s, a),    θ by ObGD (`models.streaming`)        (Elsayed et al. 2024)

Exploration is ε-greedy with ε falling linearly. Traces end where an action is not greedy. Watkins (1989) ends them before such an action, because what
follows it says nothing of the greedy values of earlier steps, and so is it here; the authors' code ends them after the step that the action is part of.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium
import numpy as np

from telos.algorithms.online._loop_streaming import Agent, Chosen, Sight, Step, StreamingConfig
from telos.core.config import require
from telos.core.method import Method
from telos.models.policies import Policy


@dataclass(frozen=True, kw_only=True)
class Config(StreamingConfig):
    """Options of stream Q(λ)."""

    epsilon_start: float = 1.0  # share of random actions at the start, in [0, 1] (paper: 1)
    epsilon_end: float = 0.01  # and after `epsilon_steps`, in [0, 1] (paper: 0.01)
    epsilon_steps: int = 25_000  # environment steps over which it falls, >= 1 (paper: 5 % of the run)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and <= 1", "epsilon_start", "epsilon_end")
        require(self, ">= 1", "epsilon_steps")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    policy = Policy(observation_space, action_space, config.shape("values"))
    return Agent(policy, policy, {"values": config.streamed(policy.body, config.kappa, "values")}, policy.normaliser)


def explore(config: Config, agent: Agent, sight: Sight, steps: int, chance: np.random.Generator) -> Chosen:
    values = agent.networks["values"](sight.x)
    greedy = action = int(values.argmax())
    share = min(1.0, steps / config.epsilon_steps)
    if chance.random() < config.epsilon_start + share * (config.epsilon_end - config.epsilon_start):
        action = int(chance.integers(len(values)))
    return Chosen(np.array([action]), cut=action != greedy)


def update(config: Config, agent: Agent, step: Step) -> dict[str, float]:
    network, action = agent.networks["values"], int(step.action[0])
    values = network.out  # `explore` has just looked at the same observation
    following = 0.0 if step.terminated else float(network(step.next_x, keep=False).max())
    error = step.reward + config.gamma * following - float(values[action])
    direction = np.zeros_like(values)
    direction[action] = 1
    kept = network.learn(network.back(direction), error)
    return {"loss": error**2, "value": float(values[action]), "step_size": config.learning_rate * kept}


METHOD = Method(
    key="stream-q",
    title="Stream Q(λ)",
    family="online",
    loop="streaming",
    changes="learns action values from each step once, with traces and steps that cannot overshoot, without replay or slow copy",
    paper="Elsayed, Vasan and Mahmood 2024, Streaming Deep Reinforcement Learning Finally Works, arXiv:2410.14606",
    config=Config,
    build=build,
    explore=explore,
    update=update,
    system=76,
    aliases=("stream-x", "streaming-deep-rl", "streaming-q", "watkins-q-lambda"),
)
