"""Environments stepped together: N copies of one, and the driver that strings their steps into episodes.

`Environments` is what a family of environments implements: it begins an episode in some copies and steps all of them. It never resets by itself, so
that the observation after the last action of an episode is never lost and it does not matter which autoreset mode a library would use. `Driver`
begins the next episode where one has ended, keeps returns and lengths, and continues bit for bit after a restart.

Termination (the task is over: nothing follows) and truncation (it was cut: the value of the last observation still counts) are kept apart. When both
are said of a step, it is a termination.

Episodes are seeded one by one: episode k of copy i of a run with seed s starts from `derive(s, "episode", i, k)`, as `env.reset(seed=…)` of
Gymnasium takes it. An environment that is deterministic given seed and actions, as Gymnasium asks, can therefore be brought back to any moment by
beginning its episode anew and repeating the actions since: this is how a run with third-party environments resumes without their help.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import gymnasium
import numpy as np

from telos.core.errors import Failure
from telos.core.seeds import derive

Observation: TypeAlias = np.ndarray | dict[str, np.ndarray]  # [N, …], or by key for dictionaries


@dataclass(frozen=True)
class Outcome:
    """What a step of N copies led to. `observation` [N, …] is where each action led, also when the episode ended there; reward [N] float64; terminated,
    truncated [N] bool; `info` holds arrays [N] that some tasks report (success, cost)."""

    observation: Observation
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    info: Mapping[str, np.ndarray]


class Environments(ABC):
    """N copies of one environment. `name` is how messages call it; the spaces are those of a single copy."""

    name: str
    count: int
    observation_space: gymnasium.Space
    action_space: gymnasium.Space

    @abstractmethod
    def begin(self, copies: Sequence[int], seeds: Sequence[int]) -> Observation:
        """Starts a new episode in `copies` and returns their first observations [len(copies), …]."""

    @abstractmethod
    def step(self, actions: np.ndarray) -> Outcome:
        """Steps every copy. actions [N, …] in the action space."""

    def judge_goals(self, achieved: np.ndarray, desired: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(rewards [B], whether the episode would be over [B] bool) for having reached `achieved` [B, …] while `desired` [B, …] was asked for; None where the
        environment cannot say so of any goal."""
        return None

    def state(self) -> Any:
        """All that `load` needs to continue, or None: then the driver repeats the actions of the current episodes."""
        return None

    def load(self, state: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Frees what the copies hold."""


def take(observation: Observation, rows: Any) -> Observation:
    """Rows of observations."""
    return {key: value[rows] for key, value in observation.items()} if isinstance(observation, dict) else observation[rows]


def put(observation: Observation, rows: Any, values: Observation) -> None:
    """Overwrites rows of observations in place."""
    if isinstance(observation, dict):
        assert isinstance(values, dict)
        for key, value in observation.items():
            value[rows] = values[key]
    else:
        observation[rows] = values


def copied(observation: Observation) -> Observation:
    return {key: value.copy() for key, value in observation.items()} if isinstance(observation, dict) else observation.copy()


@dataclass(frozen=True)
class Episode:
    """A finished episode: the sum of its rewards and how many steps it had."""

    total: float
    length: int
    terminated: bool
    info: Mapping[str, float]


class Driver:
    """Steps environments and begins the next episode in every copy whose last one has ended."""

    def __init__(self, environments: Environments, seed: int, *label: str | int) -> None:
        self.environments = environments
        self._seed, self._label = seed, label
        n = environments.count
        self.number = np.zeros(n, dtype=np.int64)  # of the episode under way, by copy
        self.total, self.length = np.zeros(n), np.zeros(n, dtype=np.int64)
        self.steps = 0  # of single copies, over all
        self._actions: list[list[np.ndarray]] = [[] for _ in range(n)]  # of the episodes under way, where they must be repeated to resume
        self._replays = False
        self.observation: Observation = self._begin(range(n))
        self._replays = environments.state() is None

    def _begin(self, copies: Sequence[int]) -> Observation:
        seeds = [derive(self._seed, *self._label, "episode", int(i), int(self.number[i])) for i in copies]
        observation = self.environments.begin(list(copies), seeds)
        _check_finite(self.environments.name, observation, "at the start of an episode")
        return observation

    def step(self, actions: np.ndarray) -> tuple[Outcome, list[Episode]]:
        """Steps all copies with actions [N, …]; afterwards `observation` is that from which each copy goes on: of a new episode where one has ended.

        Raises `Failure` for rewards or observations that are not finite.
        """
        outcome = self.environments.step(actions)
        self._check(outcome)
        self.total += outcome.reward
        self.length += 1
        self.steps += self.environments.count
        if self._replays:
            for kept, action in zip(self._actions, actions):
                kept.append(np.array(action))
        rows = (outcome.terminated | outcome.truncated).nonzero()[0]
        if not len(rows):
            self.observation = outcome.observation
            return outcome, []
        outcome = replace(outcome, truncated=outcome.truncated & ~outcome.terminated)
        episodes = [
            Episode(
                float(self.total[i]),
                int(self.length[i]),
                bool(outcome.terminated[i]),
                {name: float(values[i]) for name, values in outcome.info.items()},
            )
            for i in rows
        ]
        self.number[rows] += 1
        self.total[rows], self.length[rows] = 0.0, 0
        for i in rows:
            self._actions[i] = []
        following = copied(outcome.observation)
        put(following, rows, self._begin(rows.tolist()))
        self.observation = following
        return outcome, episodes

    def _check(self, outcome: Outcome) -> None:
        if not math.isfinite(np.add.reduce(outcome.reward)) and not np.isfinite(outcome.reward).all():
            i = int(np.flatnonzero(~np.isfinite(outcome.reward))[0])
            place = f"copy {i}, step {int(self.length[i]) + 1} of its episode {int(self.number[i])}"
            raise Failure(f"{self.environments.name}: the reward is {outcome.reward[i]} ({place})")
        _check_finite(self.environments.name, outcome.observation, "after a step", self.length)

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "number": self.number.copy(),
            "total": self.total.copy(),
            "length": self.length.copy(),
            "steps": self.steps,
            "observation": copied(self.observation),
        }
        if self._replays:
            return state | {"actions": [np.stack(kept) if kept else None for kept in self._actions]}
        return state | {"environments": self.environments.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises `Failure` when an environment does not come back to where it was: it is not deterministic given its seed and actions."""
        self.number, self.steps = np.array(state["number"]), int(state["steps"])
        self.total, self.length = np.array(state["total"]), np.array(state["length"])
        if "actions" not in state:
            self.environments.load(state["environments"])
            self.observation = copied(state["observation"])
            return
        self._actions = [[] if kept is None else list(kept) for kept in state["actions"]]
        self.observation = self._repeat(state["observation"])

    def _repeat(self, expected: Observation) -> Observation:
        """Brings every copy to where its actions lead. Copies whose episodes are shorter begin later, so that all arrive together: an action before a
        copy has begun is the first of its own."""
        n = self.environments.count
        longest = max(len(kept) for kept in self._actions)
        observation = self._begin(range(n))
        totals = np.zeros(n)
        idle = next((kept[0] for kept in self._actions if kept), None)
        for t in range(longest):
            begins = [i for i in range(n) if longest - len(self._actions[i]) == t and t > 0]
            if begins:
                put(observation, begins, self._begin(begins))
                totals[begins] = 0.0
            actions = []
            for kept in self._actions:
                place = t - (longest - len(kept))
                actions.append(kept[place] if place >= 0 else idle)
            outcome = self.environments.step(np.stack(actions))  # type: ignore[arg-type]
            observation = copied(outcome.observation)
            totals += outcome.reward
            waits = [i for i in range(n) if t < longest - len(self._actions[i]) and (outcome.terminated[i] or outcome.truncated[i])]
            if waits:
                self._begin(waits)
        fresh = [i for i in range(n) if not self._actions[i]]
        if fresh and longest:
            put(observation, fresh, self._begin(fresh))
            totals[fresh] = 0.0
        pairs = zip(observation.values(), expected.values()) if isinstance(observation, dict) else [(observation, expected)]  # type: ignore[union-attr]
        apart = totals != self.total
        for one, other in pairs:
            apart |= (one != other).reshape(n, -1).any(1)  # type: ignore[union-attr]
        if apart.any():
            raise Failure(
                f"{self.environments.name} cannot be continued: repeating the actions of copy {int(np.flatnonzero(apart)[0])}'s episode leads elsewhere. "
                "The environment is not deterministic given its seed (env.reset(seed=…)) and actions; start the run anew"
            )
        return observation


Act: TypeAlias = Callable[
    [Observation, np.ndarray, np.ndarray], np.ndarray
]  # (observations, steps done [N], episodes [N]) -> actions [N, …]
See: TypeAlias = Callable[[np.ndarray, np.ndarray, Outcome], None]  # (steps done [N], episodes [N], what the actions led to)


def play(driver: Driver, count: int, act: Act, see: See | None = None) -> list[Episode]:
    """`count` whole episodes of a driver that begins them, in their order. Episode e is played by copy e mod N, so that short episodes are not counted more
    often than long ones; copies that have played their share go on until the others have, in episodes numbered from `count` on, which are not returned."""
    n = driver.environments.count
    share = count // n + (np.arange(n) < count % n)
    found: dict[int, Episode] = {}
    while (driver.number < share).any():
        number, done = driver.number.copy(), driver.length.copy()
        episode = number * n + np.arange(n)
        outcome, ended = driver.step(act(driver.observation, done, episode))
        if see is not None:
            see(done, episode, outcome)
        over = np.flatnonzero(driver.number != number)
        found |= dict(zip(episode[over].tolist(), ended, strict=True))
    return [found[e] for e in range(count)]


def _check_finite(name: str, observation: Observation, when: str, length: np.ndarray | None = None) -> None:
    for key, value in observation.items() if isinstance(observation, dict) else [("", observation)]:
        # A sum is finite unless an entry is not (or it overflows): entries are looked at only then.
        if value.dtype.kind == "f" and not math.isfinite(np.add.reduce(value, None)) and not np.isfinite(value).all():
            bad = np.argwhere(~np.isfinite(value))[0]
            place = f"{when} (copy {bad[0]}" + (f", step {int(length[bad[0]]) + 1} of its episode)" if length is not None else ")")
            raise Failure(f"{name}: entry {bad[1:].tolist()} of the observation{' ' + key if key else ''} is {value[tuple(bad)]} {place}")
