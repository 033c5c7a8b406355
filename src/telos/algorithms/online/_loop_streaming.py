"""Streaming control: each step is learned from once, at once, and forgotten. There is one environment, no replay, no batch and no slow copy.

One of the program's steps is `iteration_steps` environment steps. Of each of them the method says what is done, by `explore(config, agent, sight, steps,
chance)`, and then learns by `update(config, agent, step)`, which returns the numbers to log; `build(config, spaces …)` makes the `Agent`. What stabilises
learning (Elsayed, Vasan and Mahmood 2024, arXiv:2410.14606) is here and in `models.streaming`: bounded steps, sparse initial weights, normalised layers,
observations and rewards. Each has a switch; with all of them off what is left are the classic streaming methods:

    --kappa 0 --sparsity 0 --layer_norm false --normalize_observations false --normalize_rewards false --learning_rate 1e-3

Eligibility traces end with the episode, whether it was terminated or cut, but a cut episode's last state keeps its value. The paper ends both alike and
shows the time to the learner instead; here observations stay as the environment gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from telos.algorithms.control import ControlProgram, EnvironmentConfig, describe_episodes, open_environments
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.loop import NotFinite
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import numpy_generator
from telos.environments.base import Driver, Episode, Observation
from telos.models.networks import Normaliser
from telos.models.policies import Kind, Policy, Shape
from telos.models.streaming import Moments, RewardScale, Streamed, ValueFunction, sparse_


@dataclass(frozen=True, kw_only=True)
class StreamingConfig(EnvironmentConfig):
    """Options of streaming control."""

    total_steps: int = 500_000  # environment steps of the run
    iteration_steps: int = 1000  # environment steps that are logged, and may be checkpointed, together
    gamma: float = 0.99  # discount a step
    trace_lambda: float = 0.8  # λ of the eligibility traces, in [0, 1] (paper: 0.8)
    learning_rate: float = 1.0  # α: the largest step, > 0 (paper: 1; without the bound it must be far smaller)
    kappa: float = 2.0  # κ: a step stays this far below the largest that cannot overshoot, >= 0 (paper: 2); 0 = no bound
    hidden: tuple[int, ...] = (128, 128)  # widths of the hidden layers, which have LeakyReLU between them
    sparsity: float = 0.9  # share of each unit's weights that start at zero, in [0, 1] (paper: 0.9)
    layer_norm: bool = True  # normalise hidden layers, without weights for it (paper: true)
    normalize_observations: bool = True  # running mean and deviation, kept inside the policy (paper: true)
    normalize_rewards: bool = True  # over the running deviation of the discounted return (paper: true)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "total_steps", "iteration_steps")
        require(self, ">= 0 and <= 1", "gamma", "trace_lambda", "sparsity")
        require(self, "> 0", "learning_rate")
        require(self, ">= 0", "kappa")
        if self.device == "cuda":
            raise UsageError("--device cuda: streaming methods learn from single steps, on the CPU")

    @property
    def program_steps(self) -> int:
        return math.ceil(self.total_steps / self.iteration_steps)

    def shape(self, kind: Kind) -> Shape:
        """The network of a policy of this kind."""
        norm = "plain" if self.layer_norm else False
        return Shape(kind, self.hidden, "leaky_relu", orthogonal=False, layer_norm=norm, normalise=self.normalize_observations)

    def streamed(self, network: nn.Module, kappa: float, name: str) -> Streamed:
        """A network as it starts, which learns from single steps."""
        assert isinstance(network, nn.Sequential)
        sparse_(network, self.sparsity, numpy_generator(self.seed, "initial weights", name))
        return Streamed(network, self.learning_rate, kappa, self.gamma * self.trace_lambda)


@dataclass
class Agent:
    """What acts and learns: the policy, every network that learns by its name, and the statistics of observations that they share."""

    policy: Policy
    model: nn.Module  # all networks
    networks: dict[str, Streamed]
    normaliser: Normaliser | None
    saved: dict[str, ValueFunction] = field(default_factory=dict)  # what the run leaves behind beside the policy


class Sight(NamedTuple):
    """What is seen: `raw` [1, size] as the `Reader` gives it, `x` [size] as learning networks read it."""

    raw: np.ndarray
    x: np.ndarray


class Chosen(NamedTuple):
    """An action [1, …] in the policy's own units, and whether traces end before it."""

    action: np.ndarray
    cut: bool = False


class Step(NamedTuple):
    """What is learned from: observations [size] before and after, the action [1, …], the reward in the units that are learned."""

    x: np.ndarray
    action: np.ndarray
    reward: float
    next_x: np.ndarray
    terminated: bool


class Program(ControlProgram):
    """Act, learn, forget."""

    def __init__(self, method: Method, config: StreamingConfig, run: Run) -> None:
        super().__init__(method, config, run)
        self.config, self.device = config, torch.device("cpu")
        environments = open_environments(config, 1)
        assert method.build is not None
        self.built: Agent = method.build(config, environments.observation_space, environments.action_space)
        self.policy, self.model = self.built.policy, self.built.model
        if self.policy.reader.picture:
            raise UsageError("streaming methods read numbers; the environment's observations are pictures")
        self.moments = Moments(self.policy.reader.size) if self.built.normaliser is not None else None
        self.scale = RewardScale(config.gamma) if config.normalize_rewards else None
        self.driver = Driver(environments, config.seed)
        self.sight = self._see(self.driver.observation)

    @property
    def learned(self) -> list[nn.Parameter]:
        """The parameters that move."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        c = self.config
        return {
            "environment": c.env,
            "environment steps": c.program_steps * c.iteration_steps,
            "environment steps an iteration": c.iteration_steps,
            "learned from at once": 1,
            "trained parameters": sum(len(network.weights) for network in self.built.networks.values()),
        }

    def _see(self, observation: Observation) -> Sight:
        raw = self.policy.reader(observation)
        return Sight(raw, raw[0] if self.moments is None else self.moments(raw[0]))

    # -- one iteration --------------------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        chance = numpy_generator(c.seed, "actions", index)
        episodes: list[Episode] = []
        sums: dict[str, float] = {}
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name, before it is learned
            for _ in range(c.iteration_steps):
                found, ended = self._one(chance)
                episodes += ended
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + value
        self._tell()
        means = {name: value / c.iteration_steps for name, value in sums.items()}
        return {"environment_steps": float(self.driver.steps), **describe_episodes(episodes), **means, **self.evaluate_if_due(index)}

    def _one(self, chance: np.random.Generator) -> tuple[dict[str, float], list[Episode]]:
        """One environment step, and what is learned from it."""
        agent, driver = self.built, self.driver
        assert self.method.explore is not None
        assert self.method.update is not None
        seen: dict[str, Any] = {"observation": self.sight.raw}
        try:
            chosen: Chosen = self.method.explore(self.config, agent, self.sight, driver.steps, chance)
            if chosen.cut:
                self._forget()
            outcome, episodes = driver.step(agent.policy.to_environment(chosen.action))
            over, reward = bool(episodes), float(outcome.reward[0])
            following = self._see(outcome.observation)
            seen |= {"action": chosen.action, "reward": outcome.reward, "next_observation": following.raw}
            if self.scale is not None:
                reward = self.scale(reward, over)
            found = self.method.update(
                self.config, agent, Step(self.sight.x, chosen.action, reward, following.x, bool(outcome.terminated[0]))
            )
        except FloatingPointError as error:
            raise NotFinite(f"environment step {driver.steps}: {error}", seen) from None
        if over:
            self._forget()
        self.sight = self._see(driver.observation) if over else following
        return found, episodes

    def _forget(self) -> None:
        for network in self.built.networks.values():
            network.forget()

    def _tell(self) -> None:
        """Brings what is saved and evaluated to the newest statistics."""
        if self.moments is not None and self.built.normaliser is not None:
            self.moments.tell(self.built.normaliser)
        if self.scale is not None:
            for values in self.built.saved.values():
                values.scale.fill_(self.scale.deviation)

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "networks": {name: network.state() for name, network in self.built.networks.items()},
            "moments": None if self.moments is None else self.moments.state(),
            "scale": None if self.scale is None else self.scale.state(),
            "driver": self.driver.state(),
            "seen": self.sight.x,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        for name, network in self.built.networks.items():
            network.load(state["networks"][name])
        if self.moments is not None:
            self.moments.load(state["moments"])
        if self.scale is not None:
            self.scale.load(state["scale"])
        self.driver.load(state["driver"])
        self.sight = Sight(self.policy.reader(self.driver.observation), np.asarray(state["seen"]))
        self._tell()

    def finish(self, run: Run) -> None:
        for name, values in self.built.saved.items():
            values.save(run.path / name)
        super().finish(run)
        self.driver.environments.close()
