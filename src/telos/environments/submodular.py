"""Grids in which what counts is the set of cells that were visited, stepped as arrays.

An episode is a walk of `horizon` steps from the middle of a grid of size × size cells: actions 0 to 4 go up, right, down, left, and stay; at the border one
stays. With probability `slip` one of the five is taken instead, each alike. F is a monotone submodular function of the visited cells, divided by its value
for all cells. A step that leads to cell s after the walk τ earns

    marginal   F(τ + s) − F(τ), so that an episode's return is F(walk) − F(start)                     (Prajapat et al. 2023, section 2)
    modular    F({s}): each cell by itself, also when it was visited before

`objective` names F; the landscape is drawn from `seed`:

    coverage     the weight of the cells within a distance of 1.5 of a visited one; weights are uniform on [0, 1] around three hills
    information  mutual information between a Gaussian process (squared exponential, length 2, deviation 1) and its values at visited cells, of variance 0.1
    design       log det(I + Φᵀ Φ / 0.1) with 12 random Fourier features Φ of visited cells, of length 2
    diversity    30 species that live around random cells, each counted by the nearest visit to it, exp(−distance² / 4.5), and by its rarity

What is seen is the place and the step, which is all that a Markovian policy of the paper sees (SubPO-M). With `history` also the cells that were visited, which
is all that F can depend on: a policy of that has nothing to gain from the order of the walk (SubPO-NM sees the whole walk).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from gymnasium.spaces import Dict, Discrete, MultiBinary

from telos.core.errors import UsageError
from telos.core.seeds import numpy_generator
from telos.environments.arrays import ArrayEnvironments
from telos.environments.base import Environments, Observation
from telos.environments.tabular import counter_uniform
from telos.functional.submodular import Facility, LogDet, SetFunction

Objective = Literal["coverage", "information", "design", "diversity"]
MOVES = np.array([(-1, 0), (0, 1), (1, 0), (0, -1), (0, 0)])


def landscape(objective: Objective, size: int, seed: int, largest: int | None = None) -> SetFunction:
    """The set function of a grid's cells, row by row. Raises `UsageError` for another name."""
    if objective not in get_args(Objective):
        raise UsageError(f"objective is one of {', '.join(get_args(Objective))}; got {objective!r}")
    draws = numpy_generator(seed, "landscape", objective)
    places = np.stack(np.divmod(np.arange(size * size), size), 1).astype(np.float64)
    apart = ((places[:, None] - places) ** 2).sum(-1)  # squared distances of cells
    if objective == "coverage":
        hills = draws.uniform(0, size - 1, (3, 2))
        height = np.exp(-((places[:, None] - hills) ** 2).sum(-1) / (size / 3) ** 2).sum(1)
        return Facility((apart <= 1.5**2) * (height * draws.uniform(0, 1, size * size)))
    if objective == "diversity":
        homes = draws.uniform(0, size - 1, (30, 2))
        return Facility(np.exp(-((places[:, None] - homes) ** 2).sum(-1) / 4.5) * draws.exponential(size=30))
    if objective == "information":
        return LogDet(np.exp(-apart / 8), 0.1, scale=0.5, largest=largest)
    waves, shift = draws.normal(size=(2, 12)) / 2, draws.uniform(0, 2 * np.pi, 12)
    features = np.cos(places @ waves + shift) * np.sqrt(2 / 12)
    return LogDet(features @ features.T, 0.1, largest=largest)


class SubmodularGrid(ArrayEnvironments):
    """N walks. Raises `UsageError` for options outside their range."""

    def __init__(
        self,
        name: str,
        count: int,
        *,
        objective: Objective = "coverage",
        reward: Literal["marginal", "modular"] = "marginal",
        size: int = 10,
        horizon: int = 30,
        slip: float = 0.0,
        seed: int = 0,
        history: bool = False,
    ) -> None:
        if size < 2 or horizon < 1:
            raise UsageError(f"{name}: size must be at least 2 and horizon at least 1; got {size} and {horizon}")
        if not 0 <= slip <= 1:
            raise UsageError(f"{name}: slip must lie in [0, 1]; got {slip}")
        if reward not in ("marginal", "modular"):
            raise UsageError(f"{name}: reward is marginal or modular; got {reward!r}")
        self.function = landscape(objective, size, seed, largest=horizon + 1)
        self.size, self.horizon, self.slip, self.reward, self.history = size, horizon, slip, reward, history
        seen: dict[str, Any] = {"place": Discrete(size * size), "step": Discrete(horizon + 1)}
        if history:
            seen["visited"] = MultiBinary(size * size)
        space = Dict(seen)
        super().__init__(name, count, space, Discrete(len(MOVES)))
        self.start = size // 2 * size + size // 2
        self._all = self.function.value(range(size * size))
        self._alone = np.array([self.function.value([cell]) for cell in range(size * size)]) / self._all
        self._place, self._key = np.full(count, self.start), np.zeros(count, dtype=np.uint64)
        self._visited, self._worth = np.zeros((count, size * size), dtype=bool), np.zeros(count)
        self._memory = self.function.empty(count)
        self._nothing = self.function.empty(1)

    def _arrays(self) -> dict[str, np.ndarray]:
        own = {"place": self._place, "key": self._key, "visited": self._visited, "worth": self._worth}
        return own | {f"memory/{name}": array for name, array in self._memory.items()}

    def _start(self, copy: int, draws: np.random.Generator) -> None:
        self._key[copy], self._place[copy] = draws.integers(2**64, dtype=np.uint64), self.start
        for name, array in self._memory.items():
            array[copy] = self._nothing[name][0]
        self._visited[copy] = False
        self._visited[copy, self.start] = True
        self._worth[copy] = self.function.add(self._memory, np.array([copy]), np.array([self.start]))[0] / self._all

    def _observe(self) -> Observation:
        seen = {"place": self._place.copy(), "step": np.minimum(self._elapsed, self.horizon)}
        return seen | ({"visited": self._visited.astype(np.int8)} if self.history else {})

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        if self.slip:
            chance = counter_uniform(self._key, self._elapsed) / self.slip
            actions = np.where(chance < 1, (chance * len(MOVES)).astype(np.int64).clip(max=len(MOVES) - 1), actions)
        cells = np.stack(np.divmod(self._place, self.size), 1) + MOVES[actions]
        row, column = cells.clip(0, self.size - 1).T
        self._place[:] = row * self.size + column
        going = np.flatnonzero(self._elapsed < self.horizon)  # a copy whose episode is over has no room for more
        gain = np.zeros(self.count)
        gain[going] = self.function.add(self._memory, going, self._place[going]) / self._all
        self._visited[going, self._place[going]] = True
        self._worth += gain
        reward = gain if self.reward == "marginal" else self._alone[self._place]
        return reward, self._elapsed + 1 >= self.horizon, {"objective": self._worth.copy()}


def greedy_walk(function: SetFunction, size: int, start: int, horizon: int) -> tuple[list[int], float]:
    """(cells, F) of the walk of `horizon` steps that goes again and again to the cell whose way there, by one of the two with one corner, adds most for each of
    its steps; F is as the function gives it, not divided."""
    memory, row = function.empty(1), np.zeros(1, dtype=np.int64)
    walk, total = [start], float(function.add(memory, row, np.array([start]))[0])
    while (left := horizon + 1 - len(walk)) > 0:
        ways = [way for cell in range(size * size) for way in _ways(walk[-1], cell, size) if 0 < len(way) <= left]
        before = function.value(walk)
        way = max(ways, key=lambda way: (function.value(walk + way) - before) / len(way))
        for cell in way:
            total += float(function.add(memory, row, np.array([cell]))[0])
        walk += way
    return walk, total


def _ways(start: int, end: int, size: int) -> list[list[int]]:
    """The cells after `start` on the two ways to `end` with one corner."""
    (r, c), (to_r, to_c) = divmod(start, size), divmod(end, size)
    rows, columns = ([*range(a, b, 1 if b > a else -1), b] for a, b in ((r, to_r), (c, to_c)))
    first_down = [(x, c) for x in rows] + [(to_r, y) for y in columns[1:]]
    first_across = [(r, y) for y in columns] + [(x, to_c) for x in rows[1:]]
    return [[x * size + y for x, y in way[1:]] for way in (first_down, first_across)]


def _make(count: int, **options: Any) -> Environments:
    return SubmodularGrid("telos/SubmodularGrid-v0", count, **options)


ENVIRONMENTS: Mapping[str, Callable[..., Environments]] = {"telos/SubmodularGrid-v0": _make}
