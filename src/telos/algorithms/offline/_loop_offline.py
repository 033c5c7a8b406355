"""Offline control: improvements from a dataset of steps, and nothing else.

One of the program's steps is `iteration_updates` improvements (`algorithms.actor_critic`) from batches that are drawn uniformly with replacement. The policy
meets the environment in evaluations alone; nothing of them is learned from. Rewards may be shifted and scaled, observations are brought to mean 0 and
deviation 1 of the data when asked; both travel with the policy or are written down with the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Dict, Discrete, MultiDiscrete

from telos.algorithms.actor_critic import ActorCriticConfig, Agent, Improver, StoredStepsConfig
from telos.algorithms.control import ControlProgram, EnvironmentConfig, open_environments
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import numpy_generator, torch_generator
from telos.data.step_readers import read_steps
from telos.data.steps import Steps
from telos.data.transitions import Transitions
from telos.dataflow import make_backend
from telos.models.policies import Policy, Shape


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(EnvironmentConfig, StoredStepsConfig):
    """Options of learning from a dataset of steps."""

    data: str = ""  # Minari folder or id, D4RL HDF5, OGBench npz, or a run's folder
    updates: int = 100_000  # improvements of the run
    iteration_updates: int = 1000  # improvements that are logged, and may be checkpointed, together
    normalize_observations: bool = False  # to the data's mean and deviation; kept inside the policy

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "updates", "iteration_updates")

    @property
    def program_steps(self) -> int:
        return math.ceil(self.updates / self.iteration_updates)


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(DatasetConfig, ActorCriticConfig):
    """Options of learning values from a dataset of steps."""

    reward_scale: float = 1.0  # rewards are multiplied by it, after the shift; not 0
    reward_shift: float = 0.0  # added to every reward

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.reward_scale) or self.reward_scale == 0:
            raise UsageError(f"--reward_scale {self.reward_scale} must be a number other than 0")


@dataclass(frozen=True, kw_only=True)
class StochasticConfig(DatasetConfig):
    """Options of a policy that is a distribution."""

    log_std_init: float = 0.0  # log of the Gaussian's deviation at the start, for continuous actions


def stochastic_policy(config: StochasticConfig, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> Policy:
    """A categorical policy, or a Gaussian whose deviation does not depend on the state."""
    shape = Shape(
        "stochastic",
        config.hidden,
        config.activation,
        orthogonal=False,
        normalise=config.normalize_observations,
        log_std_init=config.log_std_init,
    )
    return Policy(observation_space, action_space, shape)


class Table:
    """A dataset as learners read it: arrays in the policy's own units, from which batches are drawn."""

    def __init__(self, steps: Steps, policy: Policy, config: DatasetConfig) -> None:
        self.observation = torch.from_numpy(np.ascontiguousarray(policy.reader(steps.observation)))
        self.next_observation = torch.from_numpy(np.ascontiguousarray(policy.reader(steps.next_observation)))
        action = policy.from_environment(steps.action)
        if policy.shape.kind in ("squashed", "deterministic"):
            action = np.clip(action, -1, 1)
        self.action = torch.from_numpy(np.ascontiguousarray(action))
        reward, gamma = steps.reward.astype(np.float64), 1.0
        if isinstance(config, OfflineConfig):
            reward, gamma = (reward + config.reward_shift) * config.reward_scale, config.gamma
        self.reward = torch.from_numpy(reward.astype(np.float32))
        self.discount = torch.from_numpy(np.where(steps.terminated, 0.0, gamma).astype(np.float32))

    def __len__(self) -> int:
        return len(self.reward)

    def batch(self, rows: np.ndarray) -> Transitions:
        index = torch.from_numpy(rows)
        return Transitions(
            observation=self.observation[index],
            action=self.action[index],
            reward=self.reward[index],
            next_observation=self.next_observation[index],
            discount=self.discount[index],
            weight=torch.ones(len(rows)),
            index=index,
            batch_size=[len(rows)],
        )


def shape_of(space: gymnasium.Space) -> Any:
    """What two spaces must share so that one policy fits both: the numbers' shape, or which choices there are."""
    if isinstance(space, Dict):
        return {key: shape_of(part) for key, part in space.spaces.items()}
    if isinstance(space, Discrete):
        return int(space.n), int(space.start)
    return (space.nvec.tolist(), space.start.tolist()) if isinstance(space, MultiDiscrete) else space.shape


class Program(ControlProgram):
    """Draw, improve."""

    def __init__(self, method: Method, config: DatasetConfig, run: Run) -> None:
        super().__init__(method, config, run)
        self.config = config
        if not config.data:
            raise UsageError("--data is missing: give a Minari folder or id, a D4RL HDF5 file, an OGBench npz file, or a run's folder")
        # The environment's spaces complete those that a file does not tell; with options it may have others than by default.
        steps = read_steps(config.data, env=None if config.env_options else config.env or None)
        self.env = config.env or steps.env or ""
        environments = open_environments(config, 1, env=self.env) if self.env else None
        spaces = (
            (steps.observation_space, steps.action_space)
            if environments is None
            else (environments.observation_space, environments.action_space)
        )
        if environments is not None:
            environments.close()
            for what, recorded, met in zip(("observations", "actions"), (steps.observation_space, steps.action_space), spaces):
                if shape_of(recorded) != shape_of(met):
                    raise UsageError(f"--env {self.env} has {what} of another shape ({met}) than --data {config.data} ({recorded})")
        assert method.build is not None
        self.agent: Agent = method.build(config, *spaces).to(self.device)
        self.policy = self.agent.policy
        self.table = Table(steps, self.policy, config)
        if self.policy.normaliser is not None:
            self.policy.normaliser.update(self.table.observation.numpy())
        self.improver = Improver(method, config, self.agent, config.program_steps * config.iteration_updates, make_backend(config.backend))

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        c = self.config
        return {
            "steps in the data": len(self.table),
            "environment": self.env or "none: the policy is not evaluated",
            "improvements": c.program_steps * c.iteration_updates,
            "improvements an iteration": c.iteration_updates,
            "steps a batch": c.batch_size,
            "passes over the data": round(c.program_steps * c.iteration_updates * c.batch_size / len(self.table), 1),
            "trained parameters": sum(p.numel() for learner in self.improver.learners for p in learner.workers[0].parameters_to_reduce()),
        }

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        chance = numpy_generator(c.seed, "batches", index)
        noise = torch_generator(c.seed, "updates", index, device=self.device.type)
        metrics: dict[str, float] = {}
        for i in range(c.iteration_updates):
            told = i == c.iteration_updates - 1 or not metrics
            batch = self.table.batch(chance.integers(0, len(self.table), c.batch_size)).to(self.device)
            if told:
                self.last_batch = {name: value for name, value in batch.to_dict().items() if isinstance(value, torch.Tensor)}
            metrics |= self.improver.improve(batch, noise, told)[0]
        metrics |= self.evaluate_if_due(index)
        return {"improvements": float(self.improver.done)} | metrics

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"improver": self.improver.state(), "rows": len(self.table)}

    def load(self, state: Mapping[str, Any]) -> None:
        if state["rows"] != len(self.table):
            raise UsageError(f"--data {self.config.data} has {len(self.table)} steps, and the run was started with {state['rows']}")
        self.improver.load(state["improver"])
