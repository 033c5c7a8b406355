"""Finite Markov decision processes, of which everything is known: exact values, occupancy measures, optimal policies; and their environments.

Values are solved, not learned: by backward recursion where there is a horizon, by a linear system where there is a discount, and the optimum by policy
iteration (Howard 1960), whose end is checked by Bellman's equation. Policies are arrays of probabilities: [S, A], or [H, S, A] where they depend on the
step. Everything is float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from gymnasium.spaces import Discrete

from telos.core.errors import Failure, UsageError
from telos.core.seeds import numpy_generator
from telos.environments.arrays import ArrayEnvironments
from telos.environments.base import Environments, Observation


class Values(NamedTuple):
    """Values of a policy. With a horizon H `state` is [H + 1, S] (the last row is 0) and `action` [H, S, A]; without [S] and [S, A]."""

    state: np.ndarray
    action: np.ndarray


class Optimum(NamedTuple):
    """Optimal values as in `Values`, and an optimal deterministic policy as probabilities, [H, S, A] or [S, A] (the first of equally good actions)."""

    state: np.ndarray
    action: np.ndarray
    policy: np.ndarray


@dataclass(frozen=True, eq=False)
class Tabular:
    """S states, A actions. An episode ends in a terminal state, where nothing follows, and after `horizon` steps where there is a horizon.

    Returns are Σ_t discount^t r_t. Without a horizon the discount must be below 1; the value of a terminal state is 0, whatever its rows say.
    Raises `ValueError` for wrong shapes and `UsageError` for wrong values.
    """

    transitions: np.ndarray  # [S, A, S]: probability of the next state
    rewards: np.ndarray  # [S, A], or [S, A, S] where the reward depends on the next state
    start: np.ndarray  # [S]: probability of the first state; 0 for terminal states
    terminal: np.ndarray | None = None  # [S] bool; None: no state is
    horizon: int | None = None  # steps of an episode, >= 1; None: no limit
    discount: float = 1.0  # in [0, 1]
    places: np.ndarray | None = None  # [S, 2] row and column of each state in a drawing, for grids

    def __post_init__(self) -> None:
        for name in ("transitions", "rewards", "start"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        shape = self.transitions.shape
        if len(shape) != 3 or shape[0] != shape[2] or self.rewards.shape not in (shape, shape[:2]) or self.start.shape != shape[:1]:
            raise ValueError(
                f"expected transitions [S, A, S], rewards [S, A] or [S, A, S] and start [S]; got {shape}, {self.rewards.shape}, {self.start.shape}"
            )
        terminal = np.zeros(shape[0], dtype=bool) if self.terminal is None else np.asarray(self.terminal, dtype=bool)
        if terminal.shape != self.start.shape:
            raise ValueError(f"expected terminal [S]; got {terminal.shape}")
        object.__setattr__(self, "terminal", terminal)
        for name in ("transitions", "start"):
            values = getattr(self, name)
            if (values < 0).any() or not np.allclose(values.sum(-1), 1, rtol=0, atol=1e-9):
                raise UsageError(f"{name} must hold probabilities that sum to 1")
        if not np.isfinite(self.rewards).all():
            raise UsageError("rewards must be finite")
        if self.start[terminal].any():
            raise UsageError("an episode cannot start in a terminal state")
        if not 0 <= self.discount <= 1 or (self.horizon is None and self.discount == 1):
            raise UsageError(
                f"the discount must lie in [0, 1], below 1 where there is no horizon; got {self.discount} and horizon {self.horizon}"
            )
        if self.horizon is not None and self.horizon < 1:
            raise UsageError(f"the horizon must be at least 1; got {self.horizon}")

    @property
    def states(self) -> int:
        return self.transitions.shape[0]

    @property
    def actions(self) -> int:
        return self.transitions.shape[1]

    @property
    def uniform(self) -> np.ndarray:
        """The policy [S, A] that takes every action alike."""
        return np.full((self.states, self.actions), 1 / self.actions)

    @cached_property
    def ending(self) -> np.ndarray:
        """Bool [S]: the terminal states."""
        assert self.terminal is not None
        return self.terminal

    @cached_property
    def expected_rewards(self) -> np.ndarray:
        """[S, A]: the mean reward of an action, 0 in terminal states."""
        mean = self.rewards if self.rewards.ndim == 2 else (self.transitions * self.rewards).sum(-1)
        return np.where(self.ending[:, None], 0.0, mean)

    @cached_property
    def onward(self) -> np.ndarray:
        """The transitions [S, A, S] with those out of terminal states set to 0."""
        return np.where(self.ending[:, None, None], 0.0, self.transitions)

    def q_values(self, following: np.ndarray) -> np.ndarray:
        """One step back from values `following` [S]: r + discount P v, [S, A]."""
        return self.expected_rewards + self.discount * (self.onward @ following)

    def evaluate(self, policy: np.ndarray) -> Values:
        """The values of a policy [S, A] or, with a horizon, [H, S, A]; exact up to rounding."""
        policy = self._checked(policy)
        if self.horizon is None:
            state = np.linalg.solve(np.eye(self.states) - self.discount * self._moves(policy), (policy * self.expected_rewards).sum(-1))
            return Values(state, self.q_values(state))
        state, action = np.zeros((self.horizon + 1, self.states)), np.zeros((self.horizon, self.states, self.actions))
        for t in reversed(range(self.horizon)):
            action[t] = self.q_values(state[t + 1])
            state[t] = (policy[t] * action[t]).sum(-1)
        return Values(state, action)

    def performance(self, policy: np.ndarray) -> float:
        """The expected return of a policy from the start."""
        state = self.evaluate(policy).state
        return float(self.start @ (state if self.horizon is None else state[0]))

    def occupancy(self, policy: np.ndarray) -> np.ndarray:
        """How often, discounted, a policy is expected to take each action in each state: Σ_t discount^t Pr(s_t = s, a_t = a).

        [S, A], or [H, S, A] by step where there is a horizon. Its product with `expected_rewards`, summed, is `performance`; where no state is terminal,
        (1 - discount) times it is a distribution. Terminal states have 0: nothing is done there.
        """
        policy = self._checked(policy)
        if self.horizon is None:
            visits = np.linalg.solve(np.eye(self.states) - self.discount * self._moves(policy).T, self.start)
            return np.where(self.ending[:, None], 0.0, visits[:, None] * policy)
        found, visits = np.zeros((self.horizon, self.states, self.actions)), self.start
        for t in range(self.horizon):
            found[t] = np.where(self.ending[:, None], 0.0, visits[:, None] * policy[t])
            visits = self.discount * np.einsum("sa,sap->p", found[t], self.onward)
        return found

    def optimal(self, tolerance: float = 1e-10, sweeps: int = 1000) -> Optimum:
        """Optimal values and a policy that has them.

        With a horizon by backward recursion. Without, by policy iteration: an action is changed only for one that is better by more than a rounding
        error, and the result is within `tolerance` of the optimum in every state, relative to the largest return that there could be (or 1). By
        Bellman's equation max |T v - v| / (1 - discount) bounds that distance; raises `Failure` when it is not reached, which a discount very near 1
        can cause.
        """
        if self.horizon is not None:
            state, action = np.zeros((self.horizon + 1, self.states)), np.zeros((self.horizon, self.states, self.actions))
            for t in reversed(range(self.horizon)):
                action[t] = self.q_values(state[t + 1])
                state[t] = action[t].max(-1)
            return Optimum(state, action, greedy(action))
        scale = max(1.0, float(np.abs(self.expected_rewards).max()) / (1 - self.discount))
        chosen, rows = self.expected_rewards.argmax(-1), np.arange(self.states)
        for _ in range(sweeps):
            state, action = self.evaluate(np.eye(self.actions)[chosen])
            better = action.max(-1) > action[rows, chosen] + 1e-14 * scale
            if not better.any():
                break
            chosen = np.where(better, action.argmax(-1), chosen)
        gap = float(np.abs(action.max(-1) - state).max()) / (1 - self.discount) / scale
        if gap > tolerance:
            raise Failure(
                f"policy iteration ended {gap:.1e} of the largest return from the optimum, more than the tolerance {tolerance:.1e}"
            )
        # The first of actions that are equally good, as with a horizon, whichever was found on the way.
        ties = action >= action.max(-1, keepdims=True) - 1e-12 * scale
        return Optimum(state, action, greedy(ties))

    def _moves(self, policy: np.ndarray) -> np.ndarray:
        """[S, S] probabilities of the next state under a policy [S, A]."""
        return np.einsum("sa,sap->sp", policy, self.onward)

    def _checked(self, policy: np.ndarray) -> np.ndarray:
        policy, shape = np.asarray(policy, dtype=np.float64), (self.states, self.actions)
        if self.horizon is not None and policy.shape == shape:
            policy = np.broadcast_to(policy, (self.horizon, *shape))
        if policy.shape != (shape if self.horizon is None else (self.horizon, *shape)):
            raise ValueError(f"expected a policy {shape}, with a horizon also {('H', *shape)}; got {policy.shape}")
        if (policy < 0).any() or not np.allclose(policy.sum(-1), 1, rtol=0, atol=1e-6):
            raise UsageError("a policy must hold probabilities that sum to 1 in each state")
        return policy


def greedy(action_values: np.ndarray) -> np.ndarray:
    """The deterministic policy […, S, A] that takes the best action, the first of equal ones."""
    return np.eye(action_values.shape[-1])[action_values.argmax(-1)]


# -- random processes ---------------------------------------------------------------------------------------------------------------------------


def random_mdp(
    states: int = 10, actions: int = 3, seed: int = 0, *, concentration: float = 1.0, horizon: int | None = None, discount: float = 0.95
) -> Tabular:
    """Transitions from a symmetric Dirichlet distribution (`concentration` > 0; small is nearly deterministic), rewards uniform on [0, 1], any start."""
    _positive(states=states, actions=actions, concentration=concentration)
    draws = numpy_generator(seed, "random-mdp")
    transitions = draws.dirichlet(np.full(states, concentration), size=(states, actions))
    return Tabular(transitions, draws.random((states, actions)), _spread(states), None, horizon, discount)


def garnet(
    states: int = 20, actions: int = 4, branches: int = 3, seed: int = 0, *, horizon: int | None = None, discount: float = 0.95
) -> Tabular:
    """Garnet (Archibald, McKinnon and Thomas 1995): each action leads to `branches` states drawn without replacement, whose probabilities are the pieces
    of [0, 1] cut at uniform points; mean rewards are standard normal (as in Bhatnagar et al. 2009), here for each state and action."""
    _positive(states=states, actions=actions, branches=branches)
    if branches > states:
        raise UsageError(f"{branches} branches need at least as many states; there are {states}")
    draws = numpy_generator(seed, "garnet")
    cuts = np.sort(draws.random((states, actions, branches - 1)), -1)
    pieces = np.diff(cuts, axis=-1, prepend=0.0, append=1.0)
    reached = draws.random((states, actions, states)).argsort(-1)[..., :branches]
    transitions = np.zeros((states, actions, states))
    np.put_along_axis(transitions, reached, pieces, -1)
    return Tabular(transitions, draws.normal(size=(states, actions)), _spread(states), None, horizon, discount)


# -- named processes ----------------------------------------------------------------------------------------------------------------------------


def chain(
    length: int = 5, slip: float = 0.2, small: float = 2.0, large: float = 10.0, *, horizon: int | None = None, discount: float = 0.99
) -> Tabular:
    """The chain of Dearden, Friedman and Russell (1998). Action 0 goes on, for nothing until the last state, where it stays and earns `large`; action 1
    goes back to the start and earns `small`. With probability `slip` the other action happens."""
    if length < 2:
        raise UsageError(f"a chain has at least 2 states; got {length}")
    _probability(slip=slip)
    transitions, rewards = np.zeros((length, 2, length)), np.zeros((length, 2, length))
    for state in range(length):
        onward = min(state + 1, length - 1)
        for action, chance in ((0, 1 - slip), (1, slip)):
            transitions[state, action, onward] += chance
            transitions[state, action, 0] += 1 - chance
    rewards[:, :, 0], rewards[-1, :, -1] = small, large
    return Tabular(transitions, rewards, np.eye(length)[0], None, horizon, discount)


def river_swim(length: int = 6, *, horizon: int | None = 20, discount: float = 1.0) -> Tabular:
    """River swim (Strehl and Littman 2008, with the numbers of Osband, Van Roy and Russo 2013). Action 0 drifts to the left, surely; action 1 swims to
    the right against the current. 0.005 for resting at the left bank, 1 for swimming at the right one."""
    if length < 3:
        raise UsageError(f"the river has at least 3 states; got {length}")
    transitions, rewards = np.zeros((length, 2, length)), np.zeros((length, 2))
    for state in range(length):
        transitions[state, 0, max(state - 1, 0)] = 1
        transitions[state, 1, max(state - 1, 0)] += 0.0 if state == 0 else 0.4 if state == length - 1 else 0.05
        transitions[state, 1, state] += 0.4 if state == 0 else 0.6
        if state < length - 1:
            transitions[state, 1, state + 1] += 0.6 if state == 0 else 0.35
    rewards[0, 0], rewards[-1, 1] = 0.005, 1.0
    return Tabular(transitions, rewards, np.eye(length)[0], None, horizon, discount)


def lock(
    length: int = 10, actions: int = 4, seed: int = 0, lure: float = 0.1, *, horizon: int | None = None, discount: float = 1.0
) -> Tabular:
    """A combination lock (after Misra et al. 2020): at each of `length` positions two good states and a bad one, 3 h, 3 h + 1 and 3 h + 2 at position h.

    In a good state one action, drawn from the seed, leads to either good state of the next position alike; every other action leads to the bad one and
    earns `lure`, and from there is no way back. The right action at the last position earns 1 and opens the lock. Random play opens it with
    probability actions^-length. The episode ends after the last position; `horizon` is `length` unless given.
    """
    _positive(length=length, actions=actions)
    right = numpy_generator(seed, "lock").integers(actions, size=(length, 2))
    states = 3 * length + 1
    transitions, rewards = np.zeros((states, actions, states)), np.zeros((states, actions))
    transitions[-1, :, -1] = 1
    for position in range(length):
        last = position == length - 1
        following = np.array([states - 1] * 3) if last else 3 * (position + 1) + np.arange(3)
        transitions[3 * position + 2, :, following[2]] = 1
        for good in range(2):
            state, key = 3 * position + good, right[position, good]
            transitions[state, :, following[2]] = 1
            rewards[state] = lure
            transitions[state, key] = 0
            for reached in following[:2]:
                transitions[state, key, reached] += 0.5
            rewards[state, key] = 1.0 if last else 0.0
    start = np.zeros(states)
    start[:2] = 0.5
    return Tabular(transitions, rewards, start, np.arange(states) == states - 1, horizon or length, discount)


def grid(
    drawing: Sequence[str],
    *,
    slip: float = 0.0,
    step_reward: float = 0.0,
    goal_reward: float = 1.0,
    cliff_reward: float = -100.0,
    horizon: int | None = None,
    discount: float = 0.99,
) -> Tabular:
    """A grid from rows of text: `#` wall, `.` floor, `S` start (any floor where there is none), `G` goal, `C` cliff.

    Actions 0 to 3 go up, right, down and left; into a wall or off the drawing stays. With probability `slip` one of the other three directions is taken
    instead, each alike. Reaching a goal earns `goal_reward` and ends the episode; stepping onto a cliff earns `cliff_reward` and leads back to the start.
    Both come on top of `step_reward`. `places` holds row and column of the states, which are the cells other than walls and cliffs, row by row.
    """
    _probability(slip=slip)
    cells = {(r, c): mark for r, row in enumerate(drawing) for c, mark in enumerate(row)}
    if unknown := set(cells.values()) - set("#.SGC"):
        raise UsageError(f"a grid is drawn with # . S G C; got {''.join(sorted(unknown))!r}")
    places = [place for place, mark in cells.items() if mark in ".SG"]
    index = {place: i for i, place in enumerate(places)}
    starts = [index[p] for p in places if cells[p] == "S"] or [index[p] for p in places if cells[p] == "."]
    if not starts:
        raise UsageError("a grid needs a start (S) or floor (.)")
    count = len(places)
    start = np.zeros(count)
    start[starts] = 1 / len(starts)
    moved, earned = np.zeros((count, 4, count)), np.zeros((count, 4))
    for place, state in index.items():
        for direction, (down, right) in enumerate(((-1, 0), (0, 1), (1, 0), (0, -1))):
            there = (place[0] + down, place[1] + right)
            mark = cells.get(there, "#")
            earned[state, direction] = step_reward + {"G": goal_reward, "C": cliff_reward}.get(mark, 0.0)
            moved[state, direction] = start if mark == "C" else np.eye(count)[state if mark == "#" else index[there]]
    mix = np.full((4, 4), slip / 3) + np.eye(4) * (1 - slip - slip / 3)
    terminal = np.array([cells[place] == "G" for place in places])
    transitions, rewards = np.einsum("ad,sdp->sap", mix, moved), earned @ mix.T
    return Tabular(transitions, rewards, start, terminal, horizon, discount, np.array(places))


_FOUR_ROOMS = (
    "#############",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#.....#.....#",
    "##.####.....#",
    "#.....###.###",
    "#.....#.....#",
    "#.....#.....#",
    "#...........#",
    "#.....#.....#",
    "#############",
)


def four_rooms(
    slip: float = 1 / 3,
    goal: tuple[int, int] = (7, 9),
    start: tuple[int, int] | None = None,
    *,
    horizon: int | None = None,
    discount: float = 0.99,
) -> Tabular:
    """The four rooms of Sutton, Precup and Singh (1999): 104 cells; a move goes astray with probability 1/3; reward 1 at the goal.

    `goal` and `start` are row and column in the drawing of 13 × 13; without `start` an episode starts anywhere but at the goal. (7, 9)
    is the doorway between the rooms on the right.
    """
    rows = [list(row) for row in _FOUR_ROOMS]
    for place, mark in ((goal, "G"), (start, "S")):
        if place is None:
            continue
        row, column = (int(x) for x in place)
        if not (0 <= row < 13 and 0 <= column < 13) or rows[row][column] != ".":
            raise UsageError(f"four rooms: {(row, column)} is no free cell")
        rows[row][column] = mark
    return grid(["".join(row) for row in rows], slip=slip, horizon=horizon, discount=discount)


def cliff(width: int = 12, height: int = 4, slip: float = 0.0, *, horizon: int | None = None, discount: float = 0.99) -> Tabular:
    """The cliff of Sutton and Barto (example 6.6): -1 a step; between start and goal in the bottom row a cliff, which costs 100 and leads to the start."""
    if width < 3 or height < 2:
        raise UsageError(f"a cliff is at least 3 wide and 2 high; got {width} and {height}")
    drawing = ["." * width] * (height - 1) + ["S" + "C" * (width - 2) + "G"]
    return grid(drawing, slip=slip, step_reward=-1.0, goal_reward=0.0, cliff_reward=-99.0, horizon=horizon, discount=discount)


def _spread(states: int) -> np.ndarray:
    return np.full(states, 1 / states)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise UsageError(f"{name} must be positive; got {value}")


def _probability(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UsageError(f"{name} must lie in [0, 1]; got {value}")


# -- environments -------------------------------------------------------------------------------------------------------------------------------


class TabularEnvironments(ArrayEnvironments):
    """N copies of a finite process, stepped as arrays: observations and actions are the numbers of states and actions.

    Reaching a terminal state and the end of a horizon are terminations, because nothing follows either; a limit of steps beyond that truncates. A copy's
    chance depends on its seed and step alone (counter-based: SplitMix64), so that equal actions give an equal episode whatever other copies do.
    """

    def __init__(self, name: str, process: Tabular, count: int, *, max_episode_steps: int | None = None) -> None:
        super().__init__(name, count, Discrete(process.states), Discrete(process.actions), max_episode_steps)
        self.process = process
        # Divided by its end, so that a sum that rounding left below 1 cannot lead into a state of probability 0.
        total = process.transitions.cumsum(-1)
        self._cumulative = total / total[..., -1:]
        self._first = process.start.cumsum() / process.start.sum()
        self._state, self._key = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.uint64)
        self._horizon = np.iinfo(np.int64).max if process.horizon is None else process.horizon

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"state": self._state, "key": self._key}

    def _start(self, copy: int, draws: np.random.Generator) -> None:
        self._key[copy] = draws.integers(2**64, dtype=np.uint64)
        self._state[copy] = np.searchsorted(self._first, draws.random(), side="right")

    def _observe(self) -> Observation:
        return self._state.copy()

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        before = self._state
        chance = counter_uniform(self._key, self._elapsed)
        self._state = (chance[:, None] >= self._cumulative[before, actions]).sum(-1)
        rewards = self.process.rewards
        reward = rewards[before, actions] if rewards.ndim == 2 else rewards[before, actions, self._state]
        return reward, self.process.ending[self._state] | (self._elapsed + 1 >= self._horizon), {}


def counter_uniform(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """The `counter`-th draw of each stream `key`, uniform on [0, 1): SplitMix64 (Steele, Lea and Flood 2014), its upper 53 bits."""
    bits = key + (counter.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


def _make(
    name: str, process: Callable[..., Tabular], limit: int, count: int, *, max_episode_steps: int | None = None, **options: Any
) -> Environments:
    return TabularEnvironments(name, process(**options), count, max_episode_steps=limit if max_episode_steps is None else max_episode_steps)


_NAMED: Mapping[str, tuple[Callable[..., Tabular], int]] = {
    "telos/Chain-v0": (chain, 1000),
    "telos/RiverSwim-v0": (river_swim, 1000),
    "telos/FourRooms-v0": (four_rooms, 500),
    "telos/Cliff-v0": (cliff, 500),
    "telos/Lock-v0": (lock, 1000),
    "telos/Random-v0": (random_mdp, 200),
    "telos/Garnet-v0": (garnet, 200),
}

# What each id makes: called with the number of copies, the options of the function that makes the process, and `max_episode_steps`.
ENVIRONMENTS: Mapping[str, Callable[..., Environments]] = {
    name: functools.partial(_make, name, process, limit) for name, (process, limit) in _NAMED.items()
}
