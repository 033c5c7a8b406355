"""Any Gymnasium environment as `Environments`: a registered id, or a class of the user's own.

Each copy is stepped in this process, one after the other: right for all but expensive environments. Registered environments for which the package has a
batched form (`environments.registry`) do not come here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

from telos.core.errors import Failure, UsageError
from telos.environments.base import Environments, Observation, Outcome

_HELP = "an environment follows the Gymnasium API (https://gymnasium.farama.org/api/env)"


class GymEnvironments(Environments):
    """N copies made by `make()`.

    Raises `UsageError` where the class is no Gymnasium environment or its spaces are of a kind that policies here cannot read, `Failure` where it breaks
    the API while it runs.
    """

    def __init__(self, name: str, make: Callable[[], gymnasium.Env], count: int) -> None:
        self.name, self.count = name, count
        self.copies = [self._made(make) for _ in range(count)]
        self.observation_space, self.action_space = self.copies[0].observation_space, self.copies[0].action_space
        _check_space(name, "observation", self.observation_space, (Box, Discrete, MultiBinary, MultiDiscrete, Dict))
        _check_space(name, "action", self.action_space, (Box, Discrete, MultiDiscrete))
        for i, copy in enumerate(self.copies):
            if copy.observation_space != self.observation_space or copy.action_space != self.action_space:
                raise UsageError(f"--env {name}: copy {i} has other spaces than copy 0; all copies must be of one shape")

    def _made(self, make: Callable[[], gymnasium.Env]) -> gymnasium.Env:
        try:
            made = make()
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"--env {self.name} cannot be made: {type(error).__name__}: {error}") from error
        for name in ("reset", "step", "observation_space", "action_space"):
            if not hasattr(made, name):
                raise UsageError(f"--env {self.name}: a {type(made).__name__} has no {name!r}; {_HELP}")
        return made

    def begin(self, copies: Sequence[int], seeds: Sequence[int]) -> Observation:
        return self._stacked([self._reset(i, seed) for i, seed in zip(copies, seeds, strict=True)])

    def _reset(self, i: int, seed: int) -> Any:
        try:
            found = self.copies[i].reset(seed=int(seed))
        except TypeError as error:
            raise Failure(f"{self.name}: reset(seed=…) raised {error}; {_HELP}, reset(self, *, seed=None, options=None)") from error
        except Exception as error:
            raise Failure(f"{self.name}: reset of copy {i} raised {type(error).__name__}: {error}") from error
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
            raise Failure(f"{self.name}: reset returned {_described(found)}, not (observation, info); {_HELP}")
        return found[0]

    def step(self, actions: np.ndarray) -> Outcome:
        discrete = isinstance(self.action_space, Discrete)
        found = []
        for i, copy in enumerate(self.copies):
            action = int(actions[i]) if discrete else actions[i]
            try:
                result = copy.step(action)
            except Exception as error:
                raise Failure(f"{self.name}: step of copy {i} raised {type(error).__name__}: {error} (action {actions[i]!r})") from error
            if not (isinstance(result, tuple) and len(result) == 5):
                raise Failure(
                    f"{self.name}: step returned {_described(result)}, not (observation, reward, terminated, truncated, info); {_HELP}"
                )
            found.append(result)
        observations, rewards, terminated, truncated, infos = zip(*found, strict=True)
        try:
            reward = np.array([float(value) for value in rewards])
        except (TypeError, ValueError) as error:
            raise Failure(f"{self.name}: step returned the reward {rewards[0]!r}, which is no number") from error
        terminated = np.array(terminated, dtype=bool)
        return Outcome(
            self._stacked(observations), reward, terminated, np.array(truncated, dtype=bool) & ~terminated, _info_arrays(infos, self.count)
        )

    def _stacked(self, observations: Sequence[Any]) -> Observation:
        space = self.observation_space
        if isinstance(space, Dict):
            return {
                key: self._array([_entry(self.name, one, key) for one in observations], part, key) for key, part in space.spaces.items()
            }
        return self._array(observations, space, "")

    def _array(self, values: Sequence[Any], space: gymnasium.Space, key: str) -> np.ndarray:
        try:
            array = np.asarray(values, dtype=space.dtype)
        except (TypeError, ValueError) as error:
            raise Failure(f"{self.name}: the observation {key or ''} is no array of {space}: {error}") from error
        if array.shape[1:] != (space.shape or ()):
            raise Failure(
                f"{self.name}: the observation{' ' + key if key else ''} has the shape {array.shape[1:]}; its space says {space.shape}"
            )
        return array

    def judge_goals(self, achieved: np.ndarray, desired: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """By `compute_reward` and, where there is one, `compute_terminated` of the environment, as Gymnasium-Robotics has them: batched, with an empty info."""
        one = self.copies[0].unwrapped
        if not hasattr(one, "compute_reward"):
            return None
        found: list[np.ndarray] = []
        for name, kind in (("compute_reward", np.float64), ("compute_terminated", np.bool_)):
            judge = getattr(one, name, None)
            given = np.zeros(len(achieved), kind) if judge is None else np.asarray(judge(achieved, desired, {}), kind)
            if given.shape != (len(achieved),) and given.shape != ():
                raise Failure(
                    f"{self.name}: {name} gave the shape {given.shape} for {len(achieved)} goals; it is asked for all of them at once"
                )
            found.append(np.broadcast_to(given, len(achieved)))
        return found[0], found[1]

    def close(self) -> None:
        for copy in self.copies:
            copy.close()


def _entry(name: str, observation: Any, key: str) -> Any:
    try:
        return observation[key]
    except (KeyError, TypeError, IndexError):
        raise Failure(f"{name}: the observation has no entry {key!r}, which its space has") from None


def _described(value: Any) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"


def _info_arrays(infos: Sequence[Any], count: int) -> dict[str, np.ndarray]:
    """The numbers that any copy reports in this step, NaN where one does not."""
    found: dict[str, np.ndarray] = {}
    for i, info in enumerate(infos):
        if not info:
            continue
        for name, value in info.items():
            if isinstance(value, (bool, int, float, np.bool_, np.integer, np.floating)):
                found.setdefault(name, np.full(count, np.nan))[i] = float(value)
    return found


def _check_space(name: str, which: str, space: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(space, kinds):
        known = ", ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"--env {name}: the {which} space {space} is none of {known}; wrap the environment (gymnasium.wrappers)")
    if isinstance(space, Dict):
        for key, part in space.spaces.items():
            _check_space(name, f"{which} {key!r}", part, (Box, Discrete, MultiBinary, MultiDiscrete))
    elif which == "action" and isinstance(space, Box) and not np.isfinite([space.low, space.high]).all():
        raise UsageError(
            f"--env {name}: the action space {space} has no finite bounds; wrap it in gymnasium.wrappers.RescaleAction or ClipAction"
        )
