"""Greedy over random: learn the first step of an episode from random play, then the second one, and so on.

One of the program's steps learns one step i of an episode. New episodes are played: before step i by the greedy actions that are learned already, from it on
as the method's `sample(config, actions)` says (the actions [E, n] of E episodes in the n steps from i on, n may be 0), and after those at random. From the
`Rollouts` the method's `estimate(config, policy, rollouts, generator)` makes the action values of step i, as a perceptron that `StagedPolicy.set` takes
over, with numbers to log. No replay is kept and nothing is learned twice.

Every iteration's episodes are begun anew, by seeds of their own, so that a run continues from the values of its steps alone. An episode that is cut counts as
over: the returns are those of the task with its limit of steps, as the papers have it. When no episode lasts until step i there is nothing left to learn,
and later iterations play none. Copies that have played their share while others have not go on at random; such steps are counted, not learned from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from telos.algorithms.control import ControlProgram, EnvironmentConfig, describe_episodes, open_environments
from telos.core.config import require
from telos.core.loop import NotFinite
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import numpy_generator, torch_generator
from telos.environments.base import Driver, Episode, Observation, Outcome, play
from telos.models.staged import StagedPolicy


@dataclass(frozen=True, kw_only=True)
class GreedyRandomConfig(EnvironmentConfig):
    """Options of acting greedily over random play."""

    num_envs: int = 8  # copies that are stepped together
    horizon: int = 20  # T: steps of an episode that are learned, one an iteration; the values of the last one hold for all later steps
    lookahead: int = 1  # k: steps that are maximised over before what follows is random play, >= 1
    gamma: float = 1.0  # discount a step (papers: 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "num_envs", "horizon", "lookahead")
        require(self, ">= 0 and <= 1", "gamma")

    @property
    def program_steps(self) -> int:
        return self.horizon


@dataclass(frozen=True)
class Rollouts:
    """What E episodes met from the step i on that is being learned; column j stands for step i + j."""

    observation: np.ndarray  # [E, k, F] as the reader gave it
    action: np.ndarray  # [E, k] int64, in the policy's own units
    reward: np.ndarray  # [E, k]
    alive: np.ndarray  # [E, k] bool: the episode lasted until this step; where it did not, all else is 0
    rest: np.ndarray  # [E] discounted return from step i + k - 1 on
    gamma: float  # by which it is discounted

    @property
    def returns(self) -> np.ndarray:
        """[E] discounted return from step i on."""
        k = self.reward.shape[1]
        return self.reward[:, : k - 1] @ self.gamma ** np.arange(k - 1) + self.gamma ** (k - 1) * self.rest


class Program(ControlProgram):
    """Play, fit, go on to the next step."""

    policy: StagedPolicy

    def __init__(self, method: Method, config: GreedyRandomConfig, run: Run) -> None:
        super().__init__(method, config, run)
        self.config = config
        self.environments = open_environments(config, config.num_envs)
        assert method.build is not None
        assert method.sample is not None
        self.policy = self.model = method.build(config, self.environments.observation_space, self.environments.action_space).to(self.device)
        self.first_actions: np.ndarray = method.sample(config, self.policy.choices)
        self.environment_steps = 0
        self.over = False  # whether episodes have ended before the step that would be learned next

    @property
    def learned(self) -> list[nn.Parameter]:
        """The weights that iterations set."""
        return [p for p in self.policy.parameters() if p.requires_grad]

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        c = self.config
        return {
            "environment": c.env,
            "copies": c.num_envs,
            "steps of an episode that are learned, one an iteration": c.horizon,
            "episodes an iteration": len(self.first_actions),
            "episodes": len(self.first_actions) * c.horizon,
            "fitted parameters": sum(p.numel() for p in self.learned),
        }

    def step(self, index: int) -> dict[str, float]:
        if bad := [name for name, weight in self.policy.named_parameters() if not torch.isfinite(weight).all()]:
            raise NotFinite(f"iteration {index + 1}: the action values {bad[0]} are not finite", self.last_batch)
        metrics: dict[str, float] = {} if self.over else self._learn(index)
        return {"environment_steps": float(self.environment_steps), **metrics} | self.evaluate_if_due(index)

    def _learn(self, index: int) -> dict[str, float]:
        c = self.config
        driver = Driver(self.environments, c.seed, "iteration", index)
        rollouts, episodes = self._collect(driver, index)
        self.environment_steps += driver.steps
        found = {"loss": 0.0, **describe_episodes(episodes)}
        if not rollouts.alive[:, 0].any():
            self.over = True
            return found
        self.last_batch = {name: torch.from_numpy(getattr(rollouts, name)) for name in ("observation", "action", "reward", "alive", "rest")}
        assert self.method.estimate is not None
        network, metrics = self.method.estimate(
            c, self.policy, rollouts, torch_generator(c.seed, "regression", index, device=self.device.type)
        )
        self.policy.set(index, network)
        return found | metrics

    def _collect(self, driver: Driver, index: int) -> tuple[Rollouts, list[Episode]]:
        c, policy, first = self.config, self.policy, self.first_actions
        chance = numpy_generator(c.seed, "random", index)
        count, k = len(first), c.lookahead
        observation = np.zeros((count, k, *policy.reader.shape), dtype=policy.reader.dtype)
        action, reward = np.zeros((count, k), dtype=np.int64), np.zeros((count, k))
        alive, rest = np.zeros((count, k), dtype=bool), np.zeros(count)

        read, chosen = np.zeros(0), np.zeros(0)

        def act(seen: Observation, done: np.ndarray, episode: np.ndarray) -> np.ndarray:
            nonlocal read, chosen
            read = policy.reader(seen)
            chosen = policy.random(len(read), chance)
            learned = np.flatnonzero(done < index)
            if len(learned):
                chosen[learned] = policy.choose(read[learned], step=done[learned])
            given = np.flatnonzero((done >= index) & (done < index + first.shape[1]) & (episode < count))
            chosen[given] = first[episode[given], done[given] - index]
            return policy.to_environment(chosen)

        def see(done: np.ndarray, episode: np.ndarray, outcome: Outcome) -> None:
            near = np.flatnonzero((done >= index) & (done < index + k) & (episode < count))
            place = episode[near], done[near] - index
            observation[place], action[place], reward[place], alive[place] = read[near], chosen[near], outcome.reward[near], True
            far = np.flatnonzero((done >= index + k - 1) & (episode < count))
            rest[episode[far]] += c.gamma ** (done[far] - (index + k - 1)) * outcome.reward[far]

        episodes = play(driver, count, act, see)
        return Rollouts(observation, action, reward, alive, rest, c.gamma), episodes

    def evaluate(self, index: int) -> dict[str, float]:
        """Episodes by the best actions of every step, in environments and episodes of their own."""
        c, policy = self.config, self.policy
        if self.evaluation is None:
            self.evaluation = open_environments(c, min(8, c.eval_episodes))
        driver = Driver(self.evaluation, c.seed, "evaluation", index)

        def act(seen: Observation, done: np.ndarray, episode: np.ndarray) -> np.ndarray:
            return policy.to_environment(policy.choose(policy.reader(seen), step=done))

        episodes = play(driver, c.eval_episodes, act)
        return describe_episodes(episodes, "evaluation")

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {"policy": self.policy.state_dict(), "environment_steps": self.environment_steps, "over": self.over}

    def load(self, state: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.environment_steps, self.over = int(state["environment_steps"]), bool(state["over"])

    def finish(self, run: Run) -> None:
        super().finish(run)
        self.environments.close()


def constant(policy: StagedPolicy, values: np.ndarray) -> nn.Linear:
    """A layer that gives `values` [A] whatever the policy sees."""
    layer = nn.Linear(policy.inputs, len(values), device=next(policy.parameters()).device)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.from_numpy(values))
    return layer
