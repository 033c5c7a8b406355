"""Environments that are stepped as arrays: what all of them share.

`ArrayEnvironments` keeps the time limit, draws the start of an episode as Gymnasium's `env.reset(seed=…)` does, and saves and restores the arrays that
are the state. A family implements four short methods: where a copy starts (`_start`), what is seen (`_observe`), what an action leads to (`_advance`),
and which arrays the state consists of (`_arrays`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np

from telos.core.errors import UsageError
from telos.environments.base import Environments, Observation, Outcome, take


def generator(seed: int) -> np.random.Generator:
    """The generator that `env.reset(seed=seed)` of Gymnasium draws from."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(int(seed))))


class ArrayEnvironments(Environments):
    """N copies whose state is a few arrays, with a limit of steps after which an episode is truncated.

    `max_episode_steps` is `limit` where it is None, and no limit where it is -1, as `gymnasium.make` takes it; None as `limit` is none either. Actions are
    arrays [N, …] of the action space's shape. What a copy does between the end of its episode and its next `begin` is undefined and harmless.
    Raises `UsageError` for a count or a limit that is not positive, `ValueError` for actions of another shape.
    """

    def __init__(
        self,
        name: str,
        count: int,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        max_episode_steps: int | None = None,
        limit: int | None = None,
    ) -> None:
        if count < 1:
            raise UsageError(f"{name}: {count} copies were asked for; at least 1 is needed")
        if max_episode_steps is not None and (max_episode_steps == 0 or max_episode_steps < -1):
            raise UsageError(f"{name}: max_episode_steps must be positive, or -1 for no limit; got {max_episode_steps}")
        self.name, self.count = name, count
        self.observation_space, self.action_space = observation_space, action_space
        asked = limit if max_episode_steps is None else max_episode_steps
        self.max_episode_steps = None if asked == -1 else asked
        # An int64 that no episode reaches stands for no limit, so that a step need not ask.
        self._limit = np.full(count, np.iinfo(np.int64).max if self.max_episode_steps is None else self.max_episode_steps)
        self._elapsed = np.zeros(count, dtype=np.int64)  # steps of the episodes under way
        self._actions_shape = (count, *(action_space.shape or ()))

    @abstractmethod
    def _start(self, copy: int, draws: np.random.Generator) -> None:
        """Puts one copy where an episode starts."""

    @abstractmethod
    def _observe(self) -> Observation:
        """What all copies see now, as new arrays [N, …]."""

    @abstractmethod
    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        """Steps all copies: reward [N] float64 and terminated [N] bool as new arrays, and info."""

    @abstractmethod
    def _arrays(self) -> dict[str, np.ndarray]:
        """The arrays that change from step to step and are all that the next step depends on."""

    def begin(self, copies: Sequence[int], seeds: Sequence[int]) -> Observation:
        for copy, seed in zip(copies, seeds, strict=True):
            self._start(copy, generator(seed))
        rows = np.asarray(copies, dtype=np.int64)
        self._elapsed[rows] = 0
        return take(self._observe(), rows)

    def step(self, actions: np.ndarray) -> Outcome:
        if actions.shape != self._actions_shape:
            raise ValueError(f"{self.name}: expected actions {self._actions_shape}; got {actions.shape}")
        reward, terminated, info = self._advance(actions)
        self._elapsed += 1
        # For booleans, a > b is "a and not b".
        truncated = np.greater(self._elapsed >= self._limit, terminated)
        return Outcome(self._observe(), reward, terminated, truncated, info)

    def state(self) -> dict[str, np.ndarray]:
        return {"elapsed": self._elapsed.copy()} | {name: array.copy() for name, array in self._arrays().items()}

    def load(self, state: Mapping[str, Any]) -> None:
        held = {"elapsed": self._elapsed} | self._arrays()
        for name, array in held.items():
            given = np.asarray(state[name])
            if given.shape != array.shape:
                raise ValueError(f"{self.name}: the state's {name} has the shape {given.shape}; these copies need {array.shape}")
            array[...] = given
