"""Offline data of control: the steps of recorded episodes, one after the other, whatever file they came from.

Two marks are kept apart. `terminated` says that the task was over: nothing follows, and the value of `next_observation` does not count. `ended` says that the
next row begins another episode: the episode terminated, or it was cut there (by a time limit, or because the recording stopped). Every termination is an
end, and the last row is one.

Episodes and steps are counted from 0 in messages, as in Minari's files (`episode_0`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from telos.core.errors import DataError, UsageError
from telos.environments.base import Observation, take

_ARRAYS = ("observation", "action", "reward", "next_observation", "terminated", "ended")


@dataclass(frozen=True, eq=False)
class Steps:
    """n steps. observation, next_observation [n, …] or dictionaries of such arrays, of one dtype and shape, in the environment's units; action [n, …] as the
    environment takes it; reward [n] float32; terminated, ended [n] bool.

    `source` is what messages call the data; `env` the id of the environment they were recorded in, where it is known. `counts` says how many steps, episodes
    or arrays were dropped or changed when they were read, by reason; `provenance` where they come from. `keys` are the names of the arrays in the user's
    file, for messages alone.

    Raises `DataError`, with key, episode and step, for arrays that do not fit together or their spaces, for numbers that are not finite, and for ends that
    contradict each other.
    """

    observation: Observation
    action: np.ndarray
    reward: np.ndarray
    next_observation: Observation
    terminated: np.ndarray
    ended: np.ndarray
    observation_space: gymnasium.Space
    action_space: gymnasium.Space
    source: str = "given steps"
    env: str | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    keys: InitVar[Mapping[str, str] | None] = None

    def __post_init__(self, keys: Mapping[str, str] | None) -> None:
        names = {name: name for name in _ARRAYS} | dict(keys or {})
        self._check_shapes(names)
        self._check_ends(names)
        self._check_numbers(names)
        self._check_spaces(names)

    @classmethod
    def of(
        cls,
        observation: Any,
        action: Any,
        reward: Any,
        next_observation: Any,
        terminated: Any,
        ended: Any,
        *,
        observation_space: gymnasium.Space | None = None,
        action_space: gymnasium.Space | None = None,
        source: str = "given steps",
        env: str | None = None,
        counts: Mapping[str, int] | None = None,
        provenance: Mapping[str, Any] | None = None,
        keys: Mapping[str, str] | None = None,
    ) -> Steps:
        """Steps from whatever becomes such arrays. Spaces that are not given are inferred from the values (`inferred_space`), and provenance says so."""
        observation, next_observation = _arrays(observation), _arrays(next_observation)
        action = np.asarray(action)
        told = dict(provenance or {})
        for name, value in (("observation", observation), ("next_observation", next_observation), ("action", action)):
            for key, array in value.items() if isinstance(value, Mapping) else [("", value)]:
                if array.dtype.kind not in "fiub":
                    place = f"{source}: {(keys or {}).get(name, name)}" + (f"/{key}" if key else "")
                    raise DataError(place, f"holds {array.dtype}, not numbers")
        if observation_space is None:
            observation_space, told["observation space"] = inferred_space(observation), "inferred"
        if action_space is None:
            action_space, told["action space"] = inferred_space(action, action=True), "inferred from the actions"
        if isinstance(action_space, Discrete | MultiDiscrete) and action.dtype.kind == "f" and (action == np.rint(action)).all():
            action = action.astype(np.int64)
        return cls(
            observation,
            action,
            np.asarray(reward, dtype=np.float32),
            next_observation,
            np.asarray(terminated, dtype=bool),
            np.asarray(ended, dtype=bool),
            observation_space,
            action_space,
            source,
            env,
            {name: int(count) for name, count in (counts or {}).items() if count},
            told,
            keys,
        )

    # -- shape ------------------------------------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Steps."""
        return len(self.reward)

    @cached_property
    def stops(self) -> np.ndarray:
        """[E] where each episode's rows end."""
        return np.flatnonzero(self.ended) + 1

    @cached_property
    def starts(self) -> np.ndarray:
        """[E] the first row of each episode."""
        return np.concatenate([[0], self.stops[:-1]])

    @property
    def lengths(self) -> np.ndarray:
        """[E] steps of each episode."""
        return self.stops - self.starts

    @property
    def episodes(self) -> list[slice]:
        """The rows of each episode."""
        return [slice(int(start), int(stop)) for start, stop in zip(self.starts, self.stops)]

    def place(self, row: int) -> tuple[int, int]:
        """(episode, step of it) of a row."""
        episode = int(np.searchsorted(self.stops, row, side="right"))
        return episode, int(row - self.starts[episode])

    # -- returns ----------------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def returns(self) -> np.ndarray:
        """[E] float64: the sum of each episode's rewards."""
        return np.add.reduceat(self.reward.astype(np.float64), self.starts)

    def returns_to_go(self, gamma: float) -> np.ndarray:
        """[n] float64: the discounted rewards from each step to the end of its episode, Σ_k γ^k r_{t+k}. Where an episode was cut, what would have followed
        is missing. Raises `UsageError` for a discount outside [0, 1]."""
        if not 0 <= gamma <= 1:
            raise UsageError(f"a discount lies in [0, 1]; got {gamma}")
        found = self.reward.astype(np.float64)
        lengths, last = self.lengths, self.stops - 1
        for back in range(1, int(lengths.max())):
            rows = last[lengths > back] - back
            found[rows] += gamma * found[rows + 1]
        return found

    # -- parts ------------------------------------------------------------------------------------------------------------------------------------

    def subset(self, episodes: Sequence[int] | np.ndarray) -> Steps:
        """The named episodes, in that order. Raises `UsageError` where there is no such episode, or none is named."""
        chosen = np.asarray(episodes, dtype=np.int64)
        if not len(chosen):
            raise UsageError(f"{self.source}: no episode is left")
        if bad := [int(one) for one in chosen if not 0 <= one < len(self.stops)]:
            raise UsageError(f"{self.source}: there is no episode {bad[0]}; it has {len(self.stops)}, counted from 0")
        rows = np.concatenate([np.arange(int(self.starts[one]), int(self.stops[one])) for one in chosen])
        return replace(
            self,
            observation=take(self.observation, rows),
            action=self.action[rows],
            reward=self.reward[rows],
            next_observation=take(self.next_observation, rows),
            terminated=self.terminated[rows],
            ended=self.ended[rows],
        )

    def share(self, percent: float, order: Literal["first", "best"] = "first") -> Steps:
        """Whole episodes that together hold `percent` % of the steps, or just more: the first ones, or those of the highest returns, as in behaviour cloning of
        the best x % (Chen et al. 2021, arXiv:2106.01345, section 5.1). They stay in the order of the data; of equal returns the earlier comes first.
        Raises `UsageError` outside (0, 100]."""
        if not 0 < percent <= 100:
            raise UsageError(f"a share of the data lies in (0, 100] %; got {percent}")
        if order not in ("first", "best"):
            raise UsageError(f"a share of the data is the first or the best; got {order!r}")
        ranked = np.argsort(-self.returns, kind="stable") if order == "best" else np.arange(len(self.stops))
        held = np.cumsum(self.lengths[ranked])
        # Rounding in the percentage must not ask for one more episode.
        wanted = math.ceil(len(self) * percent / 100 - 1e-9)
        chosen = np.sort(ranked[: int(np.searchsorted(held, wanted)) + 1])
        note = f"the {order} {percent:g} % of the steps, in whole episodes"
        part = self.subset(chosen)
        return replace(part, provenance={**self.provenance, "share": note})

    # -- validity ---------------------------------------------------------------------------------------------------------------------------------

    def _named(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """(field, suffix of its key, array) of every array."""
        for name in _ARRAYS:
            value = getattr(self, name)
            for key, array in value.items() if isinstance(value, Mapping) else [("", value)]:
                yield name, f"/{key}" if key else "", array

    def _check_shapes(self, names: Mapping[str, str]) -> None:
        n = len(self.reward)
        if not n:
            raise DataError(self.source, "holds no steps", "Give at least one")
        for name, suffix, array in self._named():
            key = names[name] + suffix
            if not array.shape or len(array) != n:
                rows = len(array) if array.shape else "no"
                raise DataError(
                    f"{self.source}: {key}", f"{rows} rows, and {names['reward']} has {n}", "Each step needs a row of each array"
                )
            if name in ("reward", "terminated", "ended"):
                wanted = np.float32 if name == "reward" else np.bool_
                if array.ndim != 1 or array.dtype != wanted:
                    raise DataError(
                        f"{self.source}: {key}", f"is {array.dtype} of shape {array.shape}; it must be one {np.dtype(wanted)} a step"
                    )
        if _shapes(self.observation) != _shapes(self.next_observation):
            raise DataError(
                f"{self.source}: {names['next_observation']}",
                f"is {_shapes(self.next_observation)} a step, and {names['observation']} is {_shapes(self.observation)}",
            )

    def _check_ends(self, names: Mapping[str, str]) -> None:
        if not self.ended[-1]:
            raise DataError(f"{self.source}: {names['ended']}", "the last step does not end its episode", "Mark it as an end")
        if len(bad := np.flatnonzero(self.terminated & ~self.ended)):
            episode, step = self.place(int(bad[0]))
            place = f"{self.source}: {names['terminated']}, episode {episode}, step {step}"
            raise DataError(place, "the episode terminates here and goes on", "Mark the step as an end, too")

    def _check_numbers(self, names: Mapping[str, str]) -> None:
        for name, suffix, array in self._named():
            if (bad := not_finite(array)) is not None:
                row, entry, value = bad
                episode, step = self.place(row)
                place = f"{self.source}: {names[name]}{suffix}, episode {episode}, step {step}{entry}"
                raise DataError(place, f"is {value}", "Numbers must be finite; repair the file or leave the episode out")

    def _check_spaces(self, names: Mapping[str, str]) -> None:
        for name, space in (("observation", self.observation_space), ("action", self.action_space)):
            value, place = getattr(self, name), f"{self.source}: {names[name]}"
            if isinstance(space, Dict) != isinstance(value, Mapping):
                kind = "a dictionary" if isinstance(value, Mapping) else "one array"
                raise DataError(place, f"is {kind}, and the space is {space}")
            if isinstance(space, Dict) and set(space.spaces) != set(value):
                raise DataError(place, f"has the entries {', '.join(sorted(value))}, and the space has {', '.join(space.spaces)}")
            parts = (
                [(f"/{key}", value[key], part) for key, part in space.spaces.items()] if isinstance(space, Dict) else [("", value, space)]
            )
            for suffix, array, part in parts:
                if array.shape[1:] != (part.shape or ()):
                    raise DataError(place + suffix, f"has the shape {array.shape[1:]} a step, and the space {part} says {part.shape}")
                self._check_choices(place + suffix, array, part)

    def _check_choices(self, place: str, array: np.ndarray, space: gymnasium.Space) -> None:
        """Choices are indices for networks: one outside the space would be another choice, or none."""
        if not isinstance(space, Discrete | MultiDiscrete):
            return
        if array.dtype.kind not in "iub":
            raise DataError(place, f"holds {array.dtype}, and the space {space} has choices, which are integers")
        low = int(space.start) if isinstance(space, Discrete) else space.start
        high = low + (int(space.n) if isinstance(space, Discrete) else space.nvec)
        outside = (array < low) | (array >= high)
        if outside.any():
            row = int(np.flatnonzero(outside.reshape(len(array), -1).any(1))[0])
            episode, step = self.place(row)
            raise DataError(f"{place}, episode {episode}, step {step}", f"is {array[row]}, which is not in the space {space}")


def joined(parts: Sequence[Steps], source: str, provenance: Mapping[str, Any] | None = None) -> Steps:
    """The steps of several data sets of one environment, one after the other. Raises `UsageError` where their spaces differ."""
    first = parts[0]
    for part in parts[1:]:
        if (part.observation_space, part.action_space) != (first.observation_space, first.action_space):
            raise UsageError(f"{part.source} cannot be joined to {first.source}: they have other spaces")
    counts: dict[str, int] = {}
    for part in parts:
        for name, count in part.counts.items():
            counts[name] = counts.get(name, 0) + count

    def rows(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], dict):
            return {key: np.concatenate([value[key] for value in values]) for key in values[0]}
        return np.concatenate(values)

    told = {"parts": [dict(part.provenance) for part in parts], **(provenance or {})}
    return replace(first, **{name: rows(name) for name in _ARRAYS}, source=source, counts=counts, provenance=told)


def not_finite(array: np.ndarray) -> tuple[int, str, Any] | None:
    """(row, its entry in words, value) of the first number that is NaN or infinite."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return None
    row = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(1))[0])
    entry = tuple(np.argwhere(~np.isfinite(array[row]))[0].tolist()) if array.ndim > 1 else ()
    return row, f", entry {list(entry)}" if entry else "", array[row][entry]


def inferred_space(values: Observation, action: bool = False) -> gymnasium.Space:
    """A space that holds `values` [n, …]: a choice from 0 (or the smallest, where that is less) to the largest for single integers, a box for the rest.

    Boxes of observations are unbounded, pictures apart. Actions need finite bounds: [-1, 1] where all of them lie inside, as environments usually have it, else
    from the smallest to the largest of each entry.
    """
    if isinstance(values, dict):
        return Dict({key: inferred_space(value) for key, value in values.items()})
    shape = values.shape[1:]
    if values.dtype.kind in "iub" and (not shape or action):
        low, high = values.min(0, initial=0), values.max(0, initial=0)
        if not shape:
            return Discrete(int(high) - int(low) + 1, start=int(low))
        return MultiDiscrete(high.astype(np.int64) + 1)
    if values.dtype == np.uint8:
        return Box(0, 255, shape, np.uint8)
    kind = values.dtype.type
    if not action:
        bound = np.inf if values.dtype.kind == "f" else np.iinfo(kind).max if values.dtype.kind == "i" else 1
        return Box(-bound if values.dtype.kind != "b" else 0, bound, shape, kind)
    finite = np.where(np.isfinite(values), values, 0)
    if not finite.size or np.abs(finite).max() <= 1:
        return Box(-1.0, 1.0, shape, kind)
    low, high = finite.min(0), finite.max(0)
    same = low == high
    return Box((low - same).astype(kind), (high + same).astype(kind), shape, kind)


def _arrays(value: Any) -> Observation:
    return {key: np.asarray(part) for key, part in value.items()} if isinstance(value, Mapping) else np.asarray(value)


def _shapes(value: Observation) -> Any:
    if isinstance(value, Mapping):
        return {key: f"{part.dtype} {part.shape[1:]}" for key, part in sorted(value.items())}
    return f"{value.dtype} {value.shape[1:]}"
