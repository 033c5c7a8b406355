"""Stream TD(λ): the values of a policy, learned while it acts, with the stabilisers of the streaming loop.

    δ = r + γ V(s′) − V(s),    z ← γλ z + ∇V(s),    θ by ObGD (`models.streaming`)        (Elsayed et al. 2024)

The policy is one that was saved, or random play, and never changes. Random play draws choices uniformly and continuous actions from a standard normal,
which the environment's bounds clip. The run leaves the values in `value/`, beside the policy that they are of:

    ValueFunction.load(run.path / "value").predict(observation)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torch import nn

from telos.algorithms.online._loop_streaming import Agent, Chosen, Sight, Step, StreamingConfig
from telos.algorithms.results import load_result
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.models.policies import Policy, Shape
from telos.models.streaming import ValueFunction


@dataclass(frozen=True, kw_only=True)
class Config(StreamingConfig):
    """Options of stream TD(λ)."""

    policy: str = ""  # folder of the policy, or of the run that learned it, whose values are learned; default: random play
    deterministic: bool = False  # the policy takes its most probable actions


def _given(folder: str, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Policy:
    policy = load_result(Path(folder))
    if not isinstance(policy, Policy):
        raise UsageError(f"--policy {folder} holds no policy")
    if policy.observation_space != observation_space or policy.action_space != action_space:
        raise UsageError(
            f"--policy {folder} acts on {policy.observation_space} by {policy.action_space}; "
            f"the environment has {observation_space} and {action_space}"
        )
    return policy


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Agent:
    if config.policy:
        policy = _given(config.policy, observation_space, action_space)
    else:
        policy = Policy(observation_space, action_space, Shape(hidden=())).requires_grad_(False)
        for parameter in policy.body.parameters():
            parameter.zero_()
    values = ValueFunction(observation_space, config.hidden, config.layer_norm, config.normalize_observations)
    model = nn.ModuleDict({"value": values, "policy": policy.requires_grad_(False)})
    networks = {"values": config.streamed(values.body, config.kappa, "values")}
    return Agent(policy, model, networks, values.normaliser, {"value": values})


def explore(config: Config, agent: Agent, sight: Sight, steps: int, chance: np.random.Generator) -> Chosen:
    generator = torch.Generator().manual_seed(int(chance.integers(2**63)))
    return Chosen(agent.policy.choose(sight.raw, config.deterministic, generator))


def update(config: Config, agent: Agent, step: Step) -> dict[str, float]:
    network = agent.networks["values"]
    following = 0.0 if step.terminated else float(network(step.next_x, keep=False)[0])
    value = network(step.x)
    error = step.reward + config.gamma * following - float(value[0])
    kept = network.learn(network.back(np.ones_like(value)), error)
    return {"loss": error**2, "value": float(value[0]), "step_size": config.learning_rate * kept}


METHOD = Method(
    key="stream-td",
    title="Stream TD(λ)",
    family="online",
    loop="streaming",
    changes="learns the values of a policy while it acts, from each step once, with traces and steps that cannot overshoot",
    paper="Elsayed, Vasan and Mahmood 2024, Streaming Deep Reinforcement Learning Finally Works, arXiv:2410.14606",
    config=Config,
    build=build,
    explore=explore,
    update=update,
    aliases=("td-lambda",),
)
