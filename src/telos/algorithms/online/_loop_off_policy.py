"""Off-policy control: act, remember, and learn from what is remembered.

One of the program's steps is `iteration_steps` environment steps. The policy acts in all copies, as the method's `explore` says and in the first `random_steps`
at random, and what happened is stored. After `start_steps`, every `train_every` environment steps, `improvements` are made from drawn batches
(`algorithms.actor_critic`). A step that was cut is stored as cut: the value of where it led still counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from telos.algorithms.actor_critic import ActorCriticConfig, Agent, Improver
from telos.algorithms.control import ControlConfig, ControlProgram, describe_episodes, open_environments
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import numpy_generator, torch_generator
from telos.data.hindsight import Hindsight
from telos.data.replay import Priorities, Replay
from telos.dataflow import make_backend
from telos.environments.base import Driver, Episode


@dataclass(frozen=True, kw_only=True)
class OffPolicyConfig(ControlConfig, ActorCriticConfig):
    """Options of off-policy control."""

    total_steps: int = 1_000_000  # environment steps of the run, over all copies
    iteration_steps: int = 1000  # environment steps that are logged, and may be checkpointed, together
    start_steps: int = 10_000  # environment steps before the first improvement
    random_steps: int = 10_000  # environment steps whose actions are uniformly random
    train_every: int = 1  # environment steps, over all copies, for each round of improvements
    improvements: int = 1  # in a round
    replay_size: int = 1_000_000  # steps that are remembered
    replay_on_disk: bool = True  # in files of the run's folder, mapped into memory; false keeps them in memory and in every checkpoint
    n_step: int = 1  # rewards that are summed before the value of what follows
    hindsight: float = (
        0.0  # share of a batch's steps that get a goal which the episode reached later (Andrychowicz et al.: 0.8); needs goals
    )
    prioritized: float = 0.0  # α: batches are drawn in proportion to the error to this power, 0 = uniformly (Schaul et al.: 0.6)
    prioritized_correction: float = 0.4  # β at the start of the correction for it, rising to 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "iteration_steps", "train_every", "improvements", "replay_size", "n_step")
        require(self, ">= 0", "start_steps", "random_steps")
        require(self, ">= 0 and <= 1", "hindsight", "prioritized", "prioritized_correction")
        if self.hindsight and self.n_step > 1:
            raise UsageError("--hindsight gives single steps another goal; it goes with --n_step 1")
        if self.iteration_steps % self.num_envs:
            raise UsageError(f"--iteration_steps {self.iteration_steps} must be a multiple of --num_envs {self.num_envs}")
        if not self.prioritized and self.prioritized_correction != OffPolicyConfig.__dataclass_fields__["prioritized_correction"].default:
            raise UsageError("--prioritized_correction has no effect while --prioritized is 0")

    @property
    def steps_an_iteration(self) -> int:
        return self.iteration_steps

    @property
    def all_improvements(self) -> int:
        """How many improvements a run makes."""
        return max(0, self.program_steps * self.iteration_steps - self.start_steps) // self.train_every * self.improvements


class Program(ControlProgram):
    """Act, remember, learn."""

    def __init__(self, method: Method, config: OffPolicyConfig, run: Run) -> None:
        super().__init__(method, config, run)
        self.config = config
        environments = open_environments(config, config.num_envs)
        assert method.build is not None
        self.agent: Agent = method.build(config, environments.observation_space, environments.action_space).to(self.device)
        self.policy = self.agent.policy
        self.driver = Driver(environments, config.seed)
        self.improver = Improver(method, config, self.agent, max(1, config.all_improvements), make_backend(config.backend))
        slack = config.iteration_steps * (config.checkpoint_every or config.program_steps)
        size = min(config.replay_size, config.program_steps * config.iteration_steps)
        sample = self.policy.from_environment(np.stack([environments.action_space.sample()]))
        self.replay = Replay(
            size,
            config.num_envs,
            (self.policy.reader.shape, self.policy.reader.dtype),
            (sample.shape[1:], sample.dtype),
            slack=min(slack, config.program_steps * config.iteration_steps) if config.replay_on_disk else 0,
            folder=run.path / "replay" if config.replay_on_disk else None,
        )
        self.priorities = Priorities(self.replay.capacity * config.num_envs) if config.prioritized else None
        self.highest = 1.0
        self.hindsight = Hindsight(self.replay, environments, self.policy.reader.slices, config.hindsight) if config.hindsight else None

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        c = self.config
        return {
            "environment": c.env,
            "copies": c.num_envs,
            "environment steps": c.program_steps * c.iteration_steps,
            "environment steps an iteration": c.iteration_steps,
            "improvements, at most": c.all_improvements,
            "steps a batch": c.batch_size,
            "steps remembered": self.replay.capacity * c.num_envs,
            "trained parameters": sum(p.numel() for learner in self.improver.learners for p in learner.workers[0].parameters_to_reduce()),
        }

    # -- one iteration --------------------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        chance = numpy_generator(c.seed, "replay", index)
        actions = torch_generator(c.seed, "actions", index)
        noise = torch_generator(c.seed, "updates", index, device=self.device.type)
        episodes: list[Episode] = []
        metrics: dict[str, float] = {}
        for t in range(c.iteration_steps // c.num_envs):
            episodes += self._act(chance, actions)
            due = max(0, self.driver.steps - c.start_steps) // c.train_every * c.improvements
            while self.improver.done < due:
                told = t == c.iteration_steps // c.num_envs - 1 or not metrics
                metrics |= self._improve(chance, noise, told)
        found = {"environment_steps": float(self.driver.steps), "improvements": float(self.improver.done), **describe_episodes(episodes)}
        found |= self.evaluate_if_due(index)
        return found | metrics

    def _act(self, chance: np.random.Generator, generator: torch.Generator) -> list[Episode]:
        """One step of every copy, stored."""
        c, policy, driver = self.config, self.policy, self.driver
        read = policy.reader(driver.observation)
        if policy.normaliser is not None:
            policy.normaliser.update(read)
        if driver.steps < c.random_steps:
            action = policy.random(c.num_envs, chance)
        else:
            assert self.method.explore is not None
            action = self.method.explore(c, policy, read, driver.steps, generator)
        outcome, episodes = driver.step(policy.to_environment(action))
        following = policy.reader(outcome.observation)
        ended = outcome.terminated | outcome.truncated
        if self.priorities is not None:
            self.priorities.set(self._slots(self.replay.written * c.num_envs + np.arange(c.num_envs)), np.full(c.num_envs, self.highest))
        self.replay.add(
            observation=read, next_observation=following, action=action, reward=outcome.reward, terminated=outcome.terminated, ended=ended
        )
        if self.hindsight is not None:
            self.hindsight.note(ended)
        return episodes

    def _improve(self, chance: np.random.Generator, noise: torch.Generator, told: bool) -> dict[str, float]:
        c = self.config
        weight = None
        if self.priorities is None:
            places = self.replay.draw(c.batch_size, chance)
        else:
            slots, probability = self.priorities.draw(c.batch_size, chance)
            rows, copies = np.divmod(slots, c.num_envs)
            newest = self.replay.written - 1
            places = (newest - (newest - rows) % self.replay.capacity) * c.num_envs + copies
            share = self.driver.steps / (c.program_steps * c.iteration_steps)
            weight = (len(self.replay) * probability) ** -(c.prioritized_correction + (1 - c.prioritized_correction) * share)
            weight = weight / weight.max()
        batch = self.replay.take(places, gamma=c.gamma, steps=c.n_step, weight=weight)
        batch = (batch if self.hindsight is None else self.hindsight.relabel(places, batch, c.gamma, chance)).to(self.device)
        self.last_batch = (
            {name: value for name, value in batch.to_dict().items() if isinstance(value, torch.Tensor)} if told else self.last_batch
        )
        metrics, errors = self.improver.improve(batch, noise, told)
        if self.priorities is not None:
            if errors is None:
                raise UsageError(f"--prioritized: {self.method.key} gives no errors to draw by")
            values = (errors.abs().cpu().numpy().astype(np.float64) + 1e-6) ** c.prioritized
            self.priorities.set(self._slots(places), values)
            self.highest = max(self.highest, float(values.max()))
        return metrics

    def _slots(self, places: np.ndarray) -> np.ndarray:
        """Where the priorities of places lie: those of the newest `capacity` rows have slots of their own."""
        n = self.config.num_envs
        return (places // n % self.replay.capacity) * n + places % n

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        state = {"improver": self.improver.state(), "driver": self.driver.state(), "replay": self.replay.state()}
        if self.priorities is not None:
            state |= {"priorities": self.priorities.tree, "highest": self.highest}
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        self.improver.load(state["improver"])
        self.driver.load(state["driver"])
        self.replay.load(state["replay"])
        if self.hindsight is not None:
            self.hindsight.rebuild()
        if self.priorities is not None:
            self.priorities.tree = np.array(state["priorities"])
            self.highest = float(state["highest"])

    def finish(self, run: Run) -> None:
        super().finish(run)
        self.driver.environments.close()
