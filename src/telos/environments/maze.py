"""Point mazes with goals, stepped as arrays: a ball that is pushed about in a maze towards a goal.

Layouts, the dictionary of observations, rewards and `info` follow Gymnasium-Robotics' PointMaze (and D4RL's maze2d before it); the physics is our own and
needs no MuJoCo. Cells are squares of 1 m, the middle of the maze is the origin, x points to the right and y up. A step lasts 0.05 s: an action in [-1, 1]²
accelerates by up to 8 m/s², friction takes 1/s of the velocity, each component of which stays within 2 m/s (so that a cell takes 10 steps at least).
The ball counts as a square of side 0.2 m; at a wall the velocity into it is lost, that along it is kept.

Differences from Gymnasium-Robotics: a step is about five of its own, so that episodes are shorter (150, 300 and 400 steps for U, medium and large);
start and goal are drawn from all free cells, never the same; a goal does not move during an episode (`reset_target` does not exist).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
from gymnasium.spaces import Box, Dict

from telos.core.errors import UsageError
from telos.core.seeds import numpy_generator
from telos.environments.arrays import ArrayEnvironments
from telos.environments.base import Environments, Observation

LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "u": ("#####", "#...#", "###.#", "#...#", "#####"),
    "medium": ("########", "#..##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#..#", "########"),
    "large": (
        "############",
        "#....#.....#",
        "#.##.#.#.#.#",
        "#......#...#",
        "#.####.###.#",
        "#..#.#.....#",
        "##.#.#.#.###",
        "#..#...#...#",
        "############",
    ),
}
SECONDS, ACCELERATION, FRICTION, FASTEST, HALF_SIDE = 0.05, 8.0, 1.0, 2.0, 0.1
REACHED = 0.45  # m: a goal is reached within this distance
_GAP = 1e-9  # m: what is left between the ball and a wall that it touches, so that rounding does not put it inside


class Layout:
    """The cells of a maze drawn in rows of `#` (wall) and `.` (free). Raises `UsageError` where the border is open or the free cells do not connect."""

    def __init__(self, drawing: Sequence[str]) -> None:
        if not drawing or len({len(row) for row in drawing}) != 1 or set("".join(drawing)) - set("#."):
            raise UsageError("a maze is drawn in rows of equal length of # (wall) and . (free)")
        self.solid = np.array([[mark == "#" for mark in row] for row in drawing[::-1]]).T  # [columns from the left, rows from below]
        if not (self.solid[[0, -1]].all() and self.solid[:, [0, -1]].all()):
            raise UsageError("the border of a maze must be wall")
        self.middle = np.array(self.solid.shape) / 2
        self.free = np.argwhere(~self.solid)  # [C, 2]
        self.number = np.full(self.solid.shape, -1)
        self.number[tuple(self.free.T)] = np.arange(len(self.free))
        self.centres = self.free + 0.5 - self.middle  # [C, 2] m
        if len(self.free) < 2:
            raise UsageError("a maze needs at least 2 free cells")
        self.steps, self.toward = self._paths()
        if (self.steps < 0).any():
            raise UsageError("the free cells of a maze must connect")

    def cells(self, positions: np.ndarray) -> np.ndarray:
        """The number [N] of the free cell in which each position [N, 2] lies."""
        return self.number[tuple(np.floor(positions + self.middle).astype(int).T)]

    def _paths(self) -> tuple[np.ndarray, np.ndarray]:
        """[C, C] lengths of shortest paths (-1: none), and the next cell on the way from the first to the second."""
        count = len(self.free)
        steps, toward = np.full((count, count), -1), np.tile(np.arange(count)[:, None], (1, count))
        for goal in range(count):
            steps[goal, goal], wave = 0, [goal]
            for cell in wave:
                for move in ((1, 0), (0, 1), (-1, 0), (0, -1)):
                    near = self.number[tuple(self.free[cell] + move)]
                    if near >= 0 and steps[near, goal] < 0:
                        steps[near, goal], toward[near, goal] = steps[cell, goal] + 1, cell
                        wave.append(int(near))
        return steps, toward


class PointMaze(ArrayEnvironments):
    """N balls in a maze.

    `reward_type`: "sparse" (1 within 0.45 m of the goal, else 0) or "dense" (exp of minus the distance in metres). `continuing_task`: an episode goes on
    after the goal is reached, as in Gymnasium-Robotics unless said otherwise; False: that is its end. `position_noise_range`: start and goal lie within
    so much of the middle of their cells, in each direction (m, below 0.4). `maze_map`: one's own drawing instead of the layout.
    """

    def __init__(
        self,
        name: str,
        layout: str,
        limit: int,
        count: int,
        *,
        reward_type: Literal["sparse", "dense"] = "sparse",
        continuing_task: bool = True,
        position_noise_range: float = 0.25,
        maze_map: Sequence[str] | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        if reward_type not in ("sparse", "dense"):
            raise UsageError(f"{name}: reward_type is sparse or dense; got {reward_type!r}")
        if not 0 <= position_noise_range < 0.5 - HALF_SIDE:
            raise UsageError(f"{name}: position_noise_range must lie in [0, {0.5 - HALF_SIDE}); got {position_noise_range}")
        boxes = {"observation": 4, "achieved_goal": 2, "desired_goal": 2}
        space = Dict({key: Box(-np.inf, np.inf, (size,), np.float64) for key, size in boxes.items()})
        super().__init__(name, count, space, Box(-1.0, 1.0, (2,), np.float32), max_episode_steps, limit)
        self.layout = Layout(maze_map or LAYOUTS[layout])
        self.reward_type, self.continuing_task, self._noise = reward_type, continuing_task, position_noise_range
        self._position, self._velocity, self._goal = np.zeros((count, 2)), np.zeros((count, 2)), np.zeros((count, 2))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"position": self._position, "velocity": self._velocity, "goal": self._goal}

    def _start(self, copy: int, draws: np.random.Generator) -> None:
        cells = draws.choice(len(self.layout.free), size=2, replace=False)
        self._position[copy], self._goal[copy] = self.layout.centres[cells] + draws.uniform(-self._noise, self._noise, (2, 2))
        self._velocity[copy] = 0.0

    def _observe(self) -> Observation:
        return {
            "observation": np.concatenate([self._position, self._velocity], axis=1),
            "achieved_goal": self._position.copy(),
            "desired_goal": self._goal.copy(),
        }

    def compute_reward(self, achieved_goal: np.ndarray, desired_goal: np.ndarray, info: object = None) -> np.ndarray:
        """The reward [...] for having been at `achieved_goal` [..., 2] while `desired_goal` [..., 2] was asked for; the same for every episode, so that
        a transition can be relabelled with another goal. `info` is not looked at."""
        distance = np.sqrt(np.square(np.asarray(achieved_goal) - np.asarray(desired_goal)).sum(-1))
        return np.exp(-distance) if self.reward_type == "dense" else (distance <= REACHED).astype(np.float64)

    def judge_goals(self, achieved: np.ndarray, desired: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        reached = np.square(achieved - desired).sum(-1) <= REACHED**2
        return self.compute_reward(achieved, desired), reached & (not self.continuing_task)

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        push = np.clip(actions.astype(np.float64), -1.0, 1.0)
        self._velocity += SECONDS * (ACCELERATION * push - FRICTION * self._velocity)
        np.clip(self._velocity, -FASTEST, FASTEST, out=self._velocity)
        for axis in (0, 1):
            self._move(axis)
        success = np.square(self._position - self._goal).sum(-1) <= REACHED**2
        reward = self.compute_reward(self._position, self._goal)
        return reward, success & (not self.continuing_task), {"success": success.astype(np.float64)}

    def _move(self, axis: int) -> None:
        """Moves along one axis, as far as there is no wall before the leading edge: in a step it crosses into the next cell at most."""
        place, velocity = self._position + self.layout.middle, self._velocity[:, axis]
        heading = np.sign(velocity)
        moved = place[:, axis] + velocity * SECONDS
        cell = np.floor(moved + heading * HALF_SIDE).astype(int)
        across = place[:, 1 - axis]
        sides = np.floor(np.stack([across - HALF_SIDE, across + HALF_SIDE])).astype(int)
        solid = self.layout.solid if axis == 0 else self.layout.solid.T
        hits = solid[cell, sides].any(0) & (heading != 0)
        wall = np.where(heading > 0, cell - HALF_SIDE - _GAP, cell + 1 + HALF_SIDE + _GAP)
        self._position[:, axis] = np.where(hits, wall, moved) - self.layout.middle[axis]
        self._velocity[:, axis] = np.where(hits, 0.0, velocity)


class Waypoints:
    """A scripted driver: it follows the shortest path from cell to cell, and brakes at the end.

    `play` False: to the goal of the observation. True: to places of its own, a new one as soon as one is reached, whatever the goal is: data in which
    every part of the maze is connected to every other, for learning from hindsight. `noise`: standard deviation of what is added to the actions.
    """

    def __init__(self, maze: PointMaze, *, play: bool = False, noise: float = 0.0, seed: int = 0) -> None:
        self.layout, self.play, self.noise = maze.layout, play, noise
        self._draws = numpy_generator(seed, "waypoints")
        self._targets = self._drawn(maze.count)

    def _drawn(self, count: int) -> np.ndarray:
        cells = self._draws.integers(len(self.layout.free), size=count)
        return self.layout.centres[cells] + self._draws.uniform(-0.25, 0.25, (count, 2))

    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Actions [N, 2] float32 for observations of N copies."""
        position, velocity = observation["observation"][:, :2], observation["observation"][:, 2:]
        if self.play:
            reached = np.square(self._targets - position).sum(-1) <= REACHED**2
            self._targets[reached] = self._drawn(int(reached.sum()))
        target = self._targets if self.play else observation["desired_goal"]
        here, there = self.layout.cells(position), self.layout.cells(target)
        waypoint = np.where((here == there)[:, None], target, self.layout.centres[self.layout.toward[here, there]])
        # A spring towards the waypoint with enough damping not to swing.
        action = 2.0 * (waypoint - position) - 0.6 * velocity
        if self.noise:
            action = action + self.noise * self._draws.normal(size=action.shape)
        return np.clip(action, -1.0, 1.0).astype(np.float32)


# What each id makes: called with the number of copies and the options.
ENVIRONMENTS: Mapping[str, Callable[..., Environments]] = {
    "telos/PointMazeU-v0": functools.partial(PointMaze, "telos/PointMazeU-v0", "u", 150),
    "telos/PointMazeMedium-v0": functools.partial(PointMaze, "telos/PointMazeMedium-v0", "medium", 300),
    "telos/PointMazeLarge-v0": functools.partial(PointMaze, "telos/PointMazeLarge-v0", "large", 400),
}
