"""Episodes that begin where a teacher has been: learners profit from an earlier policy without being changed (SnapshotRL, Zhao et al. 2024, arXiv:2403.00673).

`collect` lets a saved policy play and keeps the whole state of the environment at every step. `SnapshotEnvironments` wraps the student's environments: for the
first part of learning, a share of the episodes begin in one of these states. Two parts of the paper's baseline S3RL are here:

- Status classification: the states are grouped by k-means over observations (in units of their deviation); a start draws a group first, each alike, and then
  a state in it, so that what the teacher meets rarely is met by the student as often as the rest.
- Student trajectory truncation: an episode that began in a snapshot is cut after `length` steps, so that more of them are begun. It is cut, not over: the value
  of what would follow counts.

What we had to choose: the last tenth of a teacher's episode that terminated is left out, since there is little to be learned where the end is settled (the
state after its last step always is); the teacher draws its actions, as it did when it learned; episodes that begin as usual are not cut short. A snapshot
holds the time limit's count of steps, too, as a complete state does.

States of copies are saved and restored by `Environments.state` and `load`. Environments of Gymnasium's API that cannot save theirs are brought back by their
seed and actions, as `Driver` does it: right for those that are deterministic given both, and as slow as repeating them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from telos.core.errors import Failure, UsageError
from telos.core.seeds import derive, numpy_generator, torch_generator
from telos.environments.base import Environments, Observation, Outcome, copied, put, take
from telos.environments.gym import GymEnvironments
from telos.models.observations import Reader

_LONGEST = 1000  # steps of a teacher's episode in an environment without a limit


class Teacher(Protocol):
    """What plays: a `models.policies.Policy`."""

    @property
    def reader(self) -> Reader: ...

    def choose(self, read: np.ndarray, deterministic: bool = ..., generator: torch.Generator | None = ...) -> np.ndarray: ...

    def to_environment(self, action: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Snapshots:
    """M states of a teacher's episodes. Either `states` holds the arrays of each state [M, …] as a single copy has them, or an environment without states
    is brought back by `seeds` [episodes] and the `actions` [T, …] of each of its episodes."""

    observation: Observation  # [M, …]
    episode: np.ndarray  # [M] number of the teacher's episode
    step: np.ndarray  # [M] steps done in it
    group: np.ndarray  # [M] of the status classification, 0 … groups - 1, none empty
    states: Mapping[str, np.ndarray] | None = None
    seeds: tuple[int, ...] = ()
    actions: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.group)

    @property
    def checksum(self) -> int:
        """Of what makes them these and no others."""
        parts = list(self.observation.values()) if isinstance(self.observation, dict) else [self.observation]
        found = 0
        for array in (*parts, self.group):
            found = zlib.crc32(np.ascontiguousarray(array).tobytes(), found)
        return found

    def draw(self, draws: np.random.Generator) -> int:
        """The number of a state: a group, each alike, and a state in it."""
        rows = np.flatnonzero(self.group == draws.integers(self.group.max() + 1))
        return int(rows[draws.integers(len(rows))])


def collect(environments: Environments, teacher: Teacher, episodes: int, groups: int, seed: int) -> Snapshots:
    """The states of `episodes` of a teacher's episodes in environments of one copy, in `groups` groups at most.

    Raises `UsageError` for more than one copy, for environments whose states cannot be restored, and where no state is left.
    """
    if environments.count != 1:
        raise UsageError(f"snapshots are collected in one copy of an environment; there are {environments.count}")
    replayed = _replayed(environments)
    observations: list[Observation] = []
    states: list[Mapping[str, np.ndarray]] = []
    places: list[tuple[int, int]] = []
    seeds, all_actions = [derive(seed, "snapshots", e) for e in range(episodes)], []
    for e in range(episodes):
        generator = torch_generator(seed, "snapshots", e)
        observation = copied(environments.begin([0], [seeds[e]]))
        met: list[tuple[Observation, Any]] = []
        actions: list[np.ndarray] = []
        terminated = truncated = False
        while not (terminated or truncated) and len(actions) < _LONGEST:
            met.append((observation, None if replayed else environments.state()))
            action = teacher.to_environment(teacher.choose(teacher.reader(observation), deterministic=False, generator=generator))
            outcome = environments.step(action)
            actions.append(np.array(action[0]))
            observation, terminated, truncated = copied(outcome.observation), bool(outcome.terminated[0]), bool(outcome.truncated[0])
        kept = met[: len(met) - -(-len(met) // 10)] if terminated else met
        for step, (seen, state) in enumerate(kept):
            observations.append(seen)
            states.append(state)
            places.append((e, step))
        all_actions.append(np.stack(actions))
    if not observations:
        raise UsageError(f"{environments.name}: the teacher's {episodes} episodes end after a step, so that there is no state to begin in")
    joined = _joined(observations)
    read = teacher.reader(joined).reshape(len(observations), -1).astype(np.float64)
    episode, step = np.array(places).T
    return Snapshots(
        joined,
        episode,
        step,
        classify(read, groups, derive(seed, "groups")),
        None if replayed else {name: np.stack([state[name] for state in states]) for name in states[0]},
        tuple(seeds) if replayed else (),
        tuple(all_actions) if replayed else (),
    )


def classify(points: np.ndarray, groups: int, seed: int, sweeps: int = 20) -> np.ndarray:
    """Groups [M] of points [M, F] by k-means in units of each entry's deviation, from centres drawn as by k-means++ (Arthur and Vassilvitskii 2007). Groups
    that stay empty are left out of the count."""
    draws = numpy_generator(seed, "k-means")
    points = (points - points.mean(0)) / np.where(points.std(0) > 1e-9, points.std(0), 1.0)
    centres = points[[draws.integers(len(points))]]
    nearest = ((points - centres[0]) ** 2).sum(-1)
    while len(centres) < min(groups, len(points)) and nearest.max() > 0:
        centres = np.concatenate([centres, points[[draws.choice(len(points), p=nearest / nearest.sum())]]])
        nearest = np.minimum(nearest, ((points - centres[-1]) ** 2).sum(-1))
    group = np.zeros(len(points), dtype=np.int64)
    for _ in range(sweeps):
        distances = (points**2).sum(-1)[:, None] - 2 * points @ centres.T + (centres**2).sum(-1)
        found = distances.argmin(-1)
        centres = np.stack([points[found == g].mean(0) if (found == g).any() else centres[g] for g in range(len(centres))])
        if (found == group).all():
            break
        group = found
    return np.unique(group, return_inverse=True)[1]


class SnapshotEnvironments(Environments):
    """Environments some of whose episodes begin in snapshots.

    While fewer than `until` steps were done (of single copies, over all), an episode begins in a snapshot with probability `share` and is cut after `length`
    steps (0: never). Whether and in which follows from the episode's seed. Raises `UsageError` for environments whose states do not fit the snapshots'.
    """

    def __init__(self, environments: Environments, snapshots: Snapshots, *, share: float, until: int, length: int) -> None:
        self.environments, self.snapshots = environments, snapshots
        self.share, self.until, self.length = share, until, length
        self.name, self.count = environments.name, environments.count
        self.observation_space, self.action_space = environments.observation_space, environments.action_space
        self.replayed = _replayed(environments)
        if self.replayed != (snapshots.states is None):
            raise UsageError(f"{self.name}: the snapshots are of an environment of another kind")
        self.steps = 0  # of single copies, over all
        self.origin = np.full(self.count, -1)  # the snapshot in which the episode under way began, -1: as usual
        self.since = np.zeros(self.count, dtype=np.int64)  # steps of the episode under way
        self._seeds, self._actions = [0] * self.count, [[] for _ in range(self.count)]  # where copies are brought back by them
        self._observation: Observation | None = None

    def begin(self, copies: Sequence[int], seeds: Sequence[int]) -> Observation:
        observation = copied(self.environments.begin(copies, seeds))
        origins = [self._origin(seed) for seed in seeds]
        for i, (copy, seed, origin) in enumerate(zip(copies, seeds, origins, strict=True)):
            self.origin[copy], self.since[copy] = origin, 0
            self._seeds[copy], self._actions[copy] = int(seed), []
            if origin >= 0:
                if self.replayed:
                    self._repeat(copy, origin)
                put(observation, i, take(self.snapshots.observation, origin))
        if not self.replayed and max(origins) >= 0:
            self._restore([(copy, origin) for copy, origin in zip(copies, origins) if origin >= 0])
        if self.replayed:
            if self._observation is None:
                self._observation = copied(observation)
            put(self._observation, list(copies), observation)
        return observation

    def step(self, actions: np.ndarray) -> Outcome:
        outcome = self.environments.step(actions)
        self.steps += self.count
        self.since += 1
        if self.replayed:
            for kept, action in zip(self._actions, actions):
                kept.append(np.array(action))
            self._observation = copied(outcome.observation)
        if not self.length:
            return outcome
        cut = (self.origin >= 0) & (self.since >= self.length) & ~outcome.terminated
        return Outcome(outcome.observation, outcome.reward, outcome.terminated, outcome.truncated | cut, outcome.info)

    def judge_goals(self, achieved: np.ndarray, desired: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        return self.environments.judge_goals(achieved, desired)

    def _origin(self, seed: int) -> int:
        draws = numpy_generator(seed, "snapshot")
        return self.snapshots.draw(draws) if self.steps < self.until and draws.random() < self.share else -1

    def _restore(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Overwrites the states of some copies; those of the others are loaded as they are."""
        assert self.snapshots.states is not None
        state = self.environments.state()
        for name, whole in state.items():
            for copy, origin in chosen:
                one = self.snapshots.states[name][origin]
                axis = _axis(self.name, name, self.count, whole.shape, one.shape)
                np.moveaxis(whole, axis, 0)[copy] = np.moveaxis(one, axis, 0)[0]
        self.environments.load(state)

    def _repeat(self, copy: int, origin: int) -> None:
        """Brings a copy to a snapshot by the teacher's seed and actions."""
        snapshots, environment = self.snapshots, self.environments
        assert isinstance(environment, GymEnvironments)
        episode = int(snapshots.episode[origin])
        self._alone(copy, snapshots.seeds[episode], snapshots.actions[episode][: snapshots.step[origin]])

    def _alone(self, copy: int, seed: int, actions: Sequence[np.ndarray] | np.ndarray) -> Any:
        """Begins an episode in a single copy and takes actions; returns the last observation."""
        assert isinstance(self.environments, GymEnvironments)
        one = self.environments.copies[copy]
        discrete = not (self.action_space.shape or ())
        observation = one.reset(seed=int(seed))[0]
        for action in actions:
            observation = one.step(int(action) if discrete else action)[0]
        return observation

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        state = {"steps": self.steps, "origin": self.origin.copy(), "since": self.since.copy(), "snapshots": self.snapshots.checksum}
        if not self.replayed:
            return state | {"environments": self.environments.state()}
        actions = [np.stack(kept) if kept else None for kept in self._actions]
        return state | {"seeds": list(self._seeds), "actions": actions, "observation": self._observation}

    def load(self, state: Mapping[str, Any]) -> None:
        """Raises `UsageError` when the snapshots are others than the run's, `Failure` when copies do not come back to where they were."""
        if state["snapshots"] != self.snapshots.checksum:
            raise UsageError("the teacher has changed since the run was started: its snapshots are others now")
        self.steps, self.origin, self.since = int(state["steps"]), np.array(state["origin"]), np.array(state["since"])
        if not self.replayed:
            self.environments.load(state["environments"])
            return
        self._seeds = [int(seed) for seed in state["seeds"]]
        self._actions = [[] if kept is None else list(kept) for kept in state["actions"]]
        self._observation = copied(state["observation"])
        for copy in range(self.count):
            own, origin = self._actions[copy], int(self.origin[copy])
            if origin >= 0:
                episode = int(self.snapshots.episode[origin])
                before = list(self.snapshots.actions[episode][: self.snapshots.step[origin]])
                found = self._alone(copy, self.snapshots.seeds[episode], before + own)
            else:
                found = self._alone(copy, self._seeds[copy], own)
            there = take(self._observation, copy)
            pairs = [(found[key], value) for key, value in there.items()] if isinstance(there, dict) else [(found, there)]
            if not all(np.array_equal(np.asarray(one, other.dtype), other) for one, other in pairs):
                raise Failure(f"{self.name} cannot be continued: repeating the actions of copy {copy}'s episode leads elsewhere")

    def close(self) -> None:
        self.environments.close()


def _replayed(environments: Environments) -> bool:
    """Whether copies are brought back by repeating actions; they must be brought back by something."""
    state = environments.state()
    if state is None:
        if not isinstance(environments, GymEnvironments):
            raise UsageError(
                f"{environments.name}: its states can neither be saved nor repeated copy by copy, so that no episode can begin in a snapshot"
            )
        return True
    if not (isinstance(state, Mapping) and all(isinstance(value, np.ndarray) for value in state.values())):
        raise UsageError(f"{environments.name}: its state is not made of arrays, so that single copies of it cannot be restored")
    return False


def _axis(environments: str, name: str, count: int, whole: tuple[int, ...], one: tuple[int, ...]) -> int:
    """The axis of the copies, in which the state of N copies differs from that of one; where N is 1 any axis of length 1 will do."""
    if len(whole) == len(one):
        apart = [axis for axis, (many, single) in enumerate(zip(whole, one)) if many != single]
        if count == 1 and not apart and 1 in one:
            return one.index(1)
        if len(apart) == 1 and (whole[apart[0]], one[apart[0]]) == (count, 1):
            return apart[0]
    raise UsageError(
        f"{environments}: the snapshots' {name} has the shape {one}, which does not fit that of the environment's copies, {whole}"
    )


def _joined(observations: Sequence[Observation]) -> Observation:
    first = observations[0]
    if isinstance(first, dict):
        return {key: np.concatenate([one[key] for one in observations]) for key in first}  # type: ignore[index]
    return np.concatenate(observations)  # type: ignore[arg-type]
