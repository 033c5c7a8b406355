"""What is in offline data of control, before anything is trained on it: episodes, returns, ends, actions, repetitions, coverage, and the two measures of
Schweighofer et al. 2022 (A Dataset Perspective on Offline Reinforcement Learning, arXiv:2111.04714).

    TQ   = (mean return of the data − R_random) / (R_best − R_random)            trajectory quality (their section 4), R_best of the best policy learned online
    SACo = u(data) / u(reference)                                               state–action coverage, u the number of unique state–action pairs

The reference of SACo is the whole replay of the online run that learned R_best. Above 1 both are possible: the data may be better, or wider, than their
references. The paper counts unique pairs with HyperLogLog; here a 64-bit hash of each pair is counted exactly. Continuous numbers repeat hardly ever, so that u
would be the number of steps: each is cut into `bins` intervals of equal width between the 1st and the 99th percentile of the reference, values outside
belonging to the first and the last. With many dimensions nearly every pair is still unique, and SACo tends to the ratio of the sizes; the figure is
comparable for one number of bins and one reference alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from telos.core.errors import UsageError
from telos.core.seeds import numpy_generator
from telos.data.steps import Steps
from telos.environments.base import Observation

_SHOWN = 8  # dimensions, or choices, of actions that are shown one by one
_NEIGHBOUR = 5
_AT_ONCE = 1 << 22  # numbers that are hashed together


@dataclass(frozen=True)
class Spread:
    """How numbers are distributed."""

    mean: float
    deviation: float
    lowest: float
    quarter: float
    median: float
    three_quarters: float
    highest: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        wide = np.asarray(values, dtype=np.float64)
        low, quarter, median, three, high = (float(x) for x in np.percentile(wide, [0, 25, 50, 75, 100]))
        return cls(float(wide.mean()), float(wide.std()), low, quarter, median, three, high)

    def __str__(self) -> str:
        middle = f"{self.quarter:.4g} / {self.median:.4g} / {self.three_quarters:.4g}"
        return f"{self.mean:.4g} ± {self.deviation:.4g} (quartiles {middle}, from {self.lowest:.4g} to {self.highest:.4g})"


@dataclass(frozen=True)
class Coverage:
    """How much of the space the data visit. `pairs` and `states` are unique cells of the grid; `neighbour` the mean distance to the 5th nearest of `sampled`
    states, each dimension over its deviation and the whole over the root of their number: small where states crowd, about 1 where they lie anyhow; None for
    pictures and where fewer than six states can be sampled."""

    bins: int
    states: int
    pairs: int
    sampled: int
    neighbour: float | None


@dataclass(frozen=True)
class StepInspection:
    """What `inspect_steps` found."""

    source: str
    env: str | None
    format: str
    observation_space: str
    action_space: str
    episodes: int
    steps: int
    returns: Spread
    lengths: Spread
    rewards: Spread
    zero_rewards: float  # share of steps
    terminated: int  # episodes; the others were cut
    actions: tuple[tuple[str, str], ...]  # (which, its range or shares)
    actions_outside: int  # steps whose action is not in the space
    observations_outside: int
    constant: int  # entries of the observation that never change
    identical_steps: int  # that repeat an earlier one in every number
    identical_episodes: int
    coverage: Coverage
    counts: dict[str, int]
    tq: float | None  # None without a reference
    saco: float | None

    def rows(self) -> list[list[str]]:
        """Plain rows of (what, value) for the command line."""
        n, of = self.steps, self.coverage
        found = [
            ["source", self.source],
            ["format", self.format + (f", recorded in {self.env}" if self.env else "")],
            ["observations", self.observation_space],
            ["actions", self.action_space],
            ["episodes", f"{self.episodes}, {n} steps"],
            ["return of an episode", str(self.returns)],
            ["steps of an episode", str(self.lengths)],
            ["reward of a step", f"{self.rewards}; 0 in {_percent(self.zero_rewards)}"],
            [
                "ends",
                f"{self.terminated} terminated ({_percent(self.terminated / self.episodes)}), {self.episodes - self.terminated} cut",
            ],
        ]
        found += [[f"action {which}", told] for which, told in self.actions]
        found += [["actions outside their space", f"{self.actions_outside} steps"]]
        found += [["observations outside their space", f"{self.observations_outside} steps"]]
        found += [["entries of observations that never change", str(self.constant)]] if self.constant else []
        found += [
            ["identical steps", f"{self.identical_steps} ({_percent(self.identical_steps / n)})"],
            ["identical episodes", str(self.identical_episodes)],
            ["cells visited", f"{of.states} of states, {of.pairs} of states and actions ({of.bins} intervals a dimension)"],
        ]
        if of.neighbour is not None:
            found.append(["distance to the 5th nearest state", f"{of.neighbour:.3g} deviations, among {of.sampled} states"])
        found += [["TQ (0 random, 1 best online)", f"{self.tq:.3f}"]] if self.tq is not None else []
        found += [["SACo (of the reference's pairs)", f"{self.saco:.3f}"]] if self.saco is not None else []
        found += [[f"noted: {reason}", str(count)] for reason, count in self.counts.items()]
        return found


def inspect_steps(
    steps: Steps,
    *,
    returns: tuple[float, float] | None = None,
    reference: Steps | None = None,
    bins: int = 10,
    sample: int = 2000,
    seed: int = 0,
) -> StepInspection:
    """Describes `steps`.

    `returns`: mean returns of the random and the best online policy, for TQ; where None, those that the data set carries (`ref_min_score`, `ref_max_score`),
    if it does. `reference`: the data that SACo refers to. `bins`: intervals a dimension, for cells and SACo. `sample`: states whose neighbours are sought,
    drawn with `seed`. Raises `UsageError` where the reference has other spaces.
    """
    if bins < 1 or sample < 0:
        raise UsageError(f"bins must be at least 1 and sample at least 0; got {bins} and {sample}")
    told = steps.provenance
    if (
        returns is None
        and isinstance(low := told.get("ref_min_score"), int | float)
        and isinstance(high := told.get("ref_max_score"), int | float)
    ):
        returns = (low, high) if high > low else None
    grid = Grid.of(steps, bins)
    seen = grid.cells(steps)
    rows = _hashed([*_leaves(steps.observation), *_leaves(steps.next_observation), steps.action, steps.reward, steps.terminated])
    return StepInspection(
        source=steps.source,
        env=steps.env,
        format=str(told.get("format", "steps")),
        observation_space=_space_text(steps.observation_space),
        action_space=_space_text(steps.action_space),
        episodes=len(steps.stops),
        steps=len(steps),
        returns=Spread.of(steps.returns),
        lengths=Spread.of(steps.lengths),
        rewards=Spread.of(steps.reward),
        zero_rewards=float((steps.reward == 0).mean()),
        terminated=int(steps.terminated[steps.stops - 1].sum()),
        actions=tuple(_actions(steps)),
        actions_outside=int(_outside(steps.action, steps.action_space).sum()),
        observations_outside=int(_outside(steps.observation, steps.observation_space).sum()),
        constant=sum(int((value.min(0) == value.max(0)).sum()) for value in _leaves(steps.observation)),
        identical_steps=len(steps) - len(np.unique(rows)),
        identical_episodes=len(steps.stops) - len(np.unique(_episode_hashes(steps, rows))),
        coverage=Coverage(bins, len(np.unique(seen[0])), len(np.unique(seen[1])), *_neighbours(steps, sample, seed)),
        counts=dict(steps.counts),
        tq=None if returns is None else trajectory_quality(steps, *returns),
        saco=None if reference is None else state_action_coverage(steps, reference, bins),
    )


# -- the paper's measures -----------------------------------------------------------------------------------------------------------------------------


def trajectory_quality(steps: Steps, random: float, best: float) -> float:
    """TQ. Raises `UsageError` where the best return is not above the random policy's."""
    if not best > random:
        raise UsageError(f"the best policy's return {best} must be above the random policy's {random}")
    return float((steps.returns.mean() - random) / (best - random))


def state_action_coverage(steps: Steps, reference: Steps, bins: int = 10) -> float:
    """SACo, on the grid of the reference. Raises `UsageError` where the spaces differ."""
    for name in ("observation_space", "action_space"):
        mine, other = getattr(steps, name), getattr(reference, name)
        if not _alike(mine, other):
            raise UsageError(f"{reference.source} is no reference for {steps.source}: its {name} is {other}, not {mine}")
    grid = Grid.of(reference, bins)
    return len(np.unique(grid.cells(steps)[1])) / len(np.unique(grid.cells(reference)[1]))


def _alike(one: gymnasium.Space, other: gymnasium.Space) -> bool:
    """Whether cells of the two can be compared: bounds may differ, which where they are inferred they do."""
    if isinstance(one, Dict) and isinstance(other, Dict):
        return one.spaces.keys() == other.spaces.keys() and all(_alike(one[key], other[key]) for key in one.spaces)
    return type(one) is type(other) and one.shape == other.shape


@dataclass(frozen=True)
class Grid:
    """Intervals of equal width for every continuous entry of observations and actions; integers are their own cells."""

    bins: int
    observation: tuple[tuple[np.ndarray, np.ndarray] | None, ...]  # (lowest, width of all) of each array
    action: tuple[tuple[np.ndarray, np.ndarray] | None, ...]

    @classmethod
    def of(cls, steps: Steps, bins: int) -> Grid:
        return cls(bins, tuple(map(_range, _leaves(steps.observation))), (_range(steps.action),))

    def cells(self, steps: Steps) -> tuple[np.ndarray, np.ndarray]:
        """([n] hashes of the states' cells, [n] of the states' and actions')."""
        states = [self._cell(value, edges) for value, edges in zip(_leaves(steps.observation), self.observation, strict=True)]
        return _hashed(states), _hashed([*states, self._cell(steps.action, self.action[0])])

    def _cell(self, values: np.ndarray, edges: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
        if edges is None:
            return values
        low, wide = edges
        place = np.floor((values.reshape(len(values), -1) - low) / wide * self.bins)
        return np.clip(place, 0, self.bins - 1).astype(np.int16)


def _range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    if values.dtype.kind != "f":
        return None
    low, high = np.percentile(values.reshape(len(values), -1).astype(np.float64), [1, 99], axis=0)
    return low, np.where(high > low, high - low, 1.0)


# -- parts ------------------------------------------------------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _space_text(space: gymnasium.Space) -> str:
    """A space in a line, however many entries it has."""
    if isinstance(space, Dict):
        return "; ".join(f"{key}: {_space_text(part)}" for key, part in space.spaces.items())
    if not isinstance(space, Box):
        return str(space)
    size = " × ".join(map(str, space.shape)) or "one"
    return f"{size} {space.dtype}, from {space.low.min():.4g} to {space.high.max():.4g}"


def _leaves(value: Observation) -> list[np.ndarray]:
    return [value[key] for key in sorted(value)] if isinstance(value, dict) else [value]


def _actions(steps: Steps) -> Iterable[tuple[str, str]]:
    """What is done: the share of each choice, or the range of each dimension against its bounds."""
    space, action = steps.action_space, steps.action
    if isinstance(space, Discrete | MultiDiscrete):
        flat = action.reshape(len(action), -1)
        names = [""] if flat.shape[1] == 1 else [f"{i}: " for i in range(flat.shape[1])]
        for name, column in list(zip(names, flat.T))[:_SHOWN]:
            choices, counts = np.unique(column, return_counts=True)
            for choice, count in list(zip(choices, counts))[:_SHOWN]:
                yield f"{name}{choice}", _percent(count / len(action))
            if len(choices) > _SHOWN:
                yield f"{name}…", f"{len(choices) - _SHOWN} further choices"
        if len(names) > _SHOWN:
            yield "…", f"{len(names) - _SHOWN} further dimensions"
        return
    assert isinstance(space, Box)
    flat, low, high = action.reshape(len(action), -1), space.low.reshape(-1), space.high.reshape(-1)
    for i in range(min(_SHOWN, flat.shape[1])):
        column = flat[:, i]
        at = float(((column <= low[i]) | (column >= high[i])).mean())
        yield str(i), f"{Spread.of(column)}; bounds {low[i]:.4g} and {high[i]:.4g}, at one of them in {_percent(at)}"
    if flat.shape[1] > _SHOWN:
        rest = flat[:, _SHOWN:]
        yield "…", f"{rest.shape[1]} further dimensions, from {rest.min():.4g} to {rest.max():.4g}"


def _outside(value: Observation, space: gymnasium.Space) -> np.ndarray:
    """[n] where a row is not in the space. Rounding of float32 is let pass."""
    if isinstance(value, dict):
        assert isinstance(space, Dict)
        return np.any(np.stack([_outside(part, space[key]) for key, part in value.items()]), axis=0)
    if not isinstance(space, Box):
        return np.zeros(len(value), bool)
    slack = 1e-6 * np.maximum(1, np.abs(np.where(np.isfinite(space.high), space.high, 0).astype(np.float64)))
    beyond = (value < space.low - slack) | (value > space.high + slack)
    return np.logical_or.reduce(beyond.reshape(len(value), -1), axis=1)


def _neighbours(steps: Steps, sample: int, seed: int) -> tuple[int, float | None]:
    """(how many states, mean distance to the 5th nearest) of a sample."""
    from scipy.spatial import KDTree

    from telos.models.observations import Reader

    reader = Reader(steps.observation_space)
    count = min(sample, len(steps))
    if reader.picture or count <= _NEIGHBOUR:
        return 0, None
    rows = np.sort(numpy_generator(seed, "states").choice(len(steps), count, replace=False))
    taken: Any = (
        {key: part[rows] for key, part in steps.observation.items()} if isinstance(steps.observation, dict) else steps.observation[rows]
    )
    states = reader(taken).astype(np.float64)
    deviation = states.std(0)
    states = states[:, deviation > 0] / deviation[deviation > 0]
    if not states.shape[1]:
        return count, 0.0
    distances, _ = KDTree(states).query(states, k=_NEIGHBOUR + 1)
    return count, float(np.asarray(distances)[:, -1].mean() / np.sqrt(states.shape[1]))


def _hashed(columns: Sequence[np.ndarray]) -> np.ndarray:
    """[n] uint64: equal for rows that are equal in every number, and for others with probability 2⁻⁶⁴."""
    found = np.zeros(len(columns[0]), np.uint64)
    for number, column in enumerate(columns):
        flat = column.reshape(len(column), -1)
        keys = numpy_generator(0, "hash", number).integers(0, 1 << 63, flat.shape[1], dtype=np.uint64)
        several = max(1, _AT_ONCE // max(1, flat.shape[1]))
        for start in range(0, len(flat), several):
            part = flat[start : start + several]
            # Adding 0 makes one number of −0 and 0.
            bits = (part.astype(np.float64) + 0.0).view(np.uint64) if part.dtype.kind == "f" else part.astype(np.int64).view(np.uint64)
            found[start : start + several] += _mixed(bits ^ keys).sum(1, dtype=np.uint64)
    return found


def _mixed(bits: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every bit of the result depends on every bit."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _episode_hashes(steps: Steps, rows: np.ndarray) -> np.ndarray:
    """[E] from the rows' hashes [n] and their order."""
    position = (np.arange(len(rows)) - np.repeat(steps.starts, steps.lengths)).astype(np.uint64)
    ordered = _mixed(rows ^ _mixed(position + np.uint64(1)))
    return np.add.reduceat(ordered, steps.starts)
