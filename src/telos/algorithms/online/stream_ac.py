"""Stream AC(λ): an actor and a critic that learn from each step at once, each with a trace of its own.

    δ = r + γ V(s′) − V(s)
    critic  z ← γλ z + ∇V(s)
    actor   z ← γλ z + ∇log π(a|s) + τ sign(δ) ∇H(π(·|s)),    both by ObGD (`models.streaming`), κ 2 and 3         (Elsayed et al. 2024)

The step multiplies the actor's trace by δ, so that the entropy's gradient counts |δ| τ, always towards more of it. Continuous actions are drawn from a
Gaussian whose mean and deviation (by softplus) the network gives; the density is that of the action before the environment's bounds clip it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import gymnasium
import numpy as np
from gymnasium.spaces import Box, MultiDiscrete
from torch import nn

from telos.algorithms.online._loop_streaming import Agent, Chosen, Sight, Step, StreamingConfig
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.models.networks import perceptron
from telos.models.policies import Policy


@dataclass(frozen=True, kw_only=True)
class Config(StreamingConfig):
    """Options of stream AC(λ)."""

    kappa_policy: float = 3.0  # κ of the policy's steps, >= 0 (paper: 3); 0 = no bound
    entropy_coef: float = 0.01  # τ, >= 0 (paper: 0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "kappa_policy", "entropy_coef")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    if isinstance(action_space, MultiDiscrete):
        raise UsageError(f"stream-ac acts in Box and Discrete spaces; the environment's actions are {action_space}")
    shape = config.shape("softplus" if isinstance(action_space, Box) else "stochastic")
    policy = Policy(observation_space, action_space, shape)
    critic = perceptron((policy.reader.size, *config.hidden, 1), "leaky_relu", layer_norm=shape.layer_norm)
    networks = {
        "policy": config.streamed(policy.body, config.kappa_policy, "policy"),
        "critic": config.streamed(critic, config.kappa, "critic"),
    }
    return Agent(policy, nn.ModuleDict({"policy": policy, "critic": critic}), networks, policy.normaliser)


def explore(config: Config, agent: Agent, sight: Sight, steps: int, chance: np.random.Generator) -> Chosen:
    out = agent.networks["policy"](sight.x)
    if isinstance(agent.policy.action_space, Box):
        mean, before = halves(out)
        return Chosen((mean + softplus(before) * chance.standard_normal(len(mean), dtype=np.float32))[None])
    return Chosen(np.array([int((out + chance.gumbel(size=len(out))).argmax())]))


def halves(out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(means, what softplus makes deviations of)"""
    return out[: len(out) // 2], out[len(out) // 2 :]


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, x.dtype.type(0))


def gaussian(out: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(∇log π(a), ∇H, H) by the outputs: means, then what softplus makes deviations of."""
    mean, before = halves(out)
    deviation = softplus(before)
    normal, slope = (action - mean) / deviation, 1 / (1 + np.exp(-before)) / deviation  # slope: of log σ
    entropy = float(np.log(deviation).sum()) + 0.5 * len(mean) * (1 + math.log(2 * math.pi))
    return np.concatenate([normal / deviation, (normal**2 - 1) * slope]), np.concatenate([np.zeros_like(mean), slope]), entropy


def categorical(out: np.ndarray, action: int) -> tuple[np.ndarray, np.ndarray, float]:
    """(∇log π(a), ∇H, H) by the logits."""
    logs = out - out.max()
    logs = logs - np.log(np.exp(logs).sum())
    chance = np.exp(logs)
    entropy = -float(chance @ logs)
    toward = -chance
    toward[action] += 1
    return toward, -chance * (logs + out.dtype.type(entropy)), entropy


def update(config: Config, agent: Agent, step: Step) -> dict[str, float]:
    actor, critic = agent.networks["policy"], agent.networks["critic"]
    following = 0.0 if step.terminated else float(critic(step.next_x, keep=False)[0])
    value = critic(step.x)
    error = step.reward + config.gamma * following - float(value[0])
    kept = critic.learn(critic.back(np.ones_like(value)), error)
    out = actor.out  # `explore` has just looked at the same observation
    continuous = isinstance(agent.policy.action_space, Box)
    toward, wider, entropy = gaussian(out, step.action[0]) if continuous else categorical(out, int(step.action[0]))
    kept_policy = actor.learn(actor.back(toward + out.dtype.type(config.entropy_coef * np.sign(error)) * wider), error)
    return {
        "loss": error**2,
        "value": float(value[0]),
        "entropy": entropy,
        "step_size": config.learning_rate * kept,
        "policy/step_size": config.learning_rate * kept_policy,
    }


METHOD = Method(
    key="stream-ac",
    title="Stream AC(λ)",
    family="online",
    loop="streaming",
    changes="an actor-critic that learns from each step once, with traces and steps that cannot overshoot, without batches",
    paper="Elsayed, Vasan and Mahmood 2024, Streaming Deep Reinforcement Learning Finally Works, arXiv:2410.14606",
    config=Config,
    build=build,
    explore=explore,
    update=update,
    aliases=("streaming-actor-critic",),
)
