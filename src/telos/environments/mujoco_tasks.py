"""Gymnasium's MuJoCo tasks, version 5, stepped in batch: one model, one `MjData` for each copy, everything around the physics as arrays.

The physics of a copy is `mj_step` on its own data, as in Gymnasium, so that a copy moves bit for bit as the original does: the solver's warm start and
the quantities that lag by one step (positions of bodies, contact forces) live in the data, and `mujoco.rollout` hands back neither. Nor is it
faster for eight copies on one core: both take the time of the physics. With `nthread` above 1 the copies are dealt out to threads, which run side
by side because `mj_step` releases Python's lock; the result does not depend on it.

Observations, rewards, terminations and the numbers of `info` are those of Gymnasium 1.3 for the same seed and actions: equal to the last bit for all
but InvertedDoublePendulum's reward, where Gymnasium's scalar powers may round otherwise (less than 1e-12). `info` leaves out Humanoid's arrays of
tendons. Options are those of Gymnasium's constructors (without the camera's), `max_episode_steps` of `gymnasium.make`, and `nthread`.

The six tasks of locomotion are one class and a table of their facts; what a task does otherwise is a field of the table.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from telos.core.errors import UsageError
from telos.environments.arrays import ArrayEnvironments
from telos.environments.base import Environments, Observation

try:
    mujoco: Any = importlib.import_module("mujoco")  # its compiled names carry no types
except ImportError as error:
    raise UsageError("MuJoCo's tasks need the package mujoco: pip install 'gymnasium[mujoco]'") from error

_Step = tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]
# Dealing a step out to a further thread costs about 70 µs; a degree of freedom costs about 0.5 µs for each evaluation of the dynamics (both measured on
# one core of a server). A thread is worth its cost from about 150 µs of work.
_WORK_PER_THREAD = 300


class Simulation(ArrayEnvironments):
    """N copies of one MuJoCo model. `options` must hold `xml_file` (of Gymnasium's assets, or a path that starts with ~, . or /) and `frame_skip`.

    `nthread` None: as many threads as this process has cores and as there is work for, which for eight copies is one thread for HalfCheetah and the
    pendulums, and more for Swimmer, Hopper, Walker2d, Ant and Humanoid.
    """

    contact_forces = False  # whether the task looks at cfrc_ext, which takes a further call

    def __init__(
        self,
        name: str,
        count: int,
        options: Mapping[str, Any],
        observed: Callable[[Any], int],
        limit: int,
        max_episode_steps: int | None = None,
        nthread: int | None = None,
    ) -> None:
        if nthread is not None and nthread < 1:
            raise UsageError(f"{name}: nthread must be at least 1; got {nthread}")
        self.options = MappingProxyType(dict(options))
        self.model = _loaded(name, str(options["xml_file"]))
        self.frame_skip = int(options["frame_skip"])
        self.dt = self.model.opt.timestep * self.frame_skip
        low, high = self.model.actuator_ctrlrange.astype(np.float32).T
        space = Box(-np.inf, np.inf, shape=(observed(self.model),), dtype=np.float64)
        super().__init__(name, count, space, Box(low, high, dtype=np.float32), max_episode_steps, limit)
        self._data = [mujoco.MjData(self.model) for _ in range(count)]
        self._initial = np.array(self._data[0].qpos)
        self._views: dict[str, list[np.ndarray]] = {}
        self._controls = [data.ctrl for data in self._data]
        self._kind = mujoco.mjtState.mjSTATE_INTEGRATION
        evaluations = self.frame_skip * (4 if self.model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4 else 1)
        worth = count * self.model.nv * evaluations // _WORK_PER_THREAD
        self.nthread = min(count, nthread or max(1, min(_cores(), worth)))
        edges = np.linspace(0, count, self.nthread + 1).round().astype(int).tolist()
        self._parts = [range(*pair) for pair in pairwise(edges)]
        self._pool = ThreadPoolExecutor(self.nthread - 1, "mujoco") if self.nthread > 1 else None

    def read(self, field: str) -> np.ndarray:
        """A field of all copies' data, [N, …], as a new array."""
        views = self._views.get(field)
        if views is None:
            views = self._views[field] = [np.asarray(getattr(data, field)) for data in self._data]
        return np.concatenate(views).reshape(self.count, *views[0].shape)

    def _noise(self, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Positions and velocities at the start of an episode."""
        raise NotImplementedError

    def _start(self, copy: int, draws: np.random.Generator) -> None:
        data = self._data[copy]
        mujoco.mj_resetData(self.model, data)
        data.qpos[:], data.qvel[:] = self._noise(draws)
        mujoco.mj_forward(self.model, data)

    def _simulate(self, actions: np.ndarray) -> None:
        if self._pool is None:
            return self._simulate_part(actions, self._parts[0])
        others = [self._pool.submit(self._simulate_part, actions, part) for part in self._parts[1:]]
        self._simulate_part(actions, self._parts[0])
        for other in others:
            other.result()
        return None

    def _simulate_part(self, actions: np.ndarray, copies: Iterable[int]) -> None:
        model, frames, step = self.model, self.frame_skip, mujoco.mj_step
        for i in copies:
            data = self._data[i]
            self._controls[i][:] = actions[i]
            step(model, data, frames)
            if self.contact_forces:
                mujoco.mj_rnePostConstraint(model, data)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {}

    def state(self) -> dict[str, np.ndarray]:
        physics = np.zeros((self.count, mujoco.mj_stateSize(self.model, self._kind)))
        for data, row in zip(self._data, physics):
            mujoco.mj_getState(self.model, data, row, self._kind)
        return super().state() | {"physics": physics}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        physics = np.ascontiguousarray(state["physics"], dtype=np.float64)
        expected = (self.count, mujoco.mj_stateSize(self.model, self._kind))
        if physics.shape != expected:
            raise ValueError(f"{self.name}: the state's physics has the shape {physics.shape}; these copies need {expected}")
        for data, row in zip(self._data, physics):
            mujoco.mj_setState(self.model, data, row, self._kind)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _loaded(name: str, xml_file: str) -> Any:
    path = Path(xml_file).expanduser()
    if not xml_file.startswith((".", "/", "~")):
        path = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / xml_file
    if not path.is_file():
        raise UsageError(f"{name}: there is no file {path} (xml_file)")
    try:
        return mujoco.MjModel.from_xml_path(str(path))
    except ValueError as error:
        raise UsageError(f"{name}: MuJoCo cannot load {path}: {error}") from None


def _uniform(draws: np.random.Generator, scale: float, size: int) -> np.ndarray:
    return draws.uniform(-scale, scale, size=size)


def _normal(draws: np.random.Generator, scale: float, size: int) -> np.ndarray:
    return scale * draws.standard_normal(size)


def _lengths(vectors: np.ndarray) -> np.ndarray:
    """Euclidean length of each row: by the product that `np.linalg.norm` takes for a single vector, so that both round alike."""
    return np.sqrt((vectors[:, None, :] @ vectors[:, :, None])[:, 0, 0])


# -- locomotion ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Gait:
    """The facts in which the tasks of locomotion differ."""

    options: Mapping[str, Any]  # Gymnasium's, with its defaults
    axes: Literal[1, 2] = 1  # coordinates of the ground: so many positions are left out of observations
    velocity_noise: Callable[[np.random.Generator, float, int], np.ndarray] = _uniform
    velocity_limit: float | None = None  # to which observed velocities are clipped
    place: Callable[[Locomotion], np.ndarray] = lambda task: task.read("qpos")  # what moves forward: [N, >= axes]
    healthy: Callable[[Locomotion, np.ndarray, np.ndarray], np.ndarray] | None = (
        None  # from qpos and qvel; None: no such reward, no termination
    )
    height: bool = False  # whether info tells the height above the start
    double_controls: bool = (
        False  # whether the cost is that of the controls in the data, in double precision, and not of the action as given
    )
    forces: Callable[[Locomotion], np.ndarray] = lambda task: task.read("cfrc_ext")  # contact forces as the task takes them, [N, bodies, 6]
    contact_cost: Callable[[Locomotion], np.ndarray] | None = None
    extra: tuple[str, ...] = ()  # fields F of the data that an observation contains unless the option include_F_in_observation is False


class Locomotion(Simulation):
    """A body that is to run forward: reward = weighted forward velocity + healthy reward - control cost - contact cost."""

    def __init__(
        self, name: str, gait: Gait, count: int, *, max_episode_steps: int | None = None, nthread: int | None = None, **options: Any
    ) -> None:
        self.gait = gait
        merged = _merged(
            name, {"exclude_current_positions_from_observation": True, "forward_reward_weight": 1.0} | dict(gait.options), options
        )
        self.contact_forces = gait.contact_cost is not None or "cfrc_ext" in gait.extra
        self._skipped = gait.axes if merged["exclude_current_positions_from_observation"] else 0
        self._extra = [field for field in gait.extra if merged[f"include_{field}_in_observation"]]
        super().__init__(name, count, merged, self._width, 1000, max_episode_steps, nthread)
        self._place = self._placed()

    def _width(self, model: Any) -> int:
        sizes = {
            "cinert": 10 * (model.nbody - 1),
            "cvel": 6 * (model.nbody - 1),
            "cfrc_ext": 6 * (model.nbody - 1),
            "qfrc_actuator": model.nv - 6,
        }
        return model.nq + model.nv - self._skipped + sum(sizes[field] for field in self._extra)

    def _extra_part(self, field: str) -> np.ndarray:
        """[N, …] without what is of the world (the first body) and of the free joint (the first six degrees of freedom)."""
        if field == "qfrc_actuator":
            return self.read(field)[:, 6:]
        return (self.gait.forces(self) if field == "cfrc_ext" else self.read(field))[:, 1:].reshape(self.count, -1)

    def _placed(self) -> np.ndarray:
        return self.gait.place(self)[:, : self.gait.axes]

    def _noise(self, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        scale = self.options["reset_noise_scale"]
        return self._initial + _uniform(draws, scale, self.model.nq), self.gait.velocity_noise(draws, scale, self.model.nv)

    def begin(self, copies: Sequence[int], seeds: Sequence[int]) -> Observation:
        observation = super().begin(copies, seeds)
        rows = np.asarray(copies, dtype=np.int64)
        self._place[rows] = self._placed()[rows]
        return observation

    def _arrays(self) -> dict[str, np.ndarray]:
        # Where a body is lags behind the positions by one step of the simulation, so that it cannot be read off a restored state.
        return {"place": self._place}

    def _observe(self) -> np.ndarray:
        velocity = self.read("qvel")
        if self.gait.velocity_limit is not None:
            velocity = np.clip(velocity, -self.gait.velocity_limit, self.gait.velocity_limit)
        parts = [self.read("qpos")[:, self._skipped :], velocity]
        return np.concatenate(parts + [self._extra_part(field) for field in self._extra], axis=1)

    def _advance(self, actions: np.ndarray) -> _Step:
        options, gait, before = self.options, self.gait, self._place
        self._simulate(actions)
        self._place = self._placed()
        moved = (self._place - before) / self.dt
        qpos, qvel = self.read("qpos"), self.read("qvel")
        forward = options["forward_reward_weight"] * moved[:, 0]
        control = options["ctrl_cost_weight"] * np.square(actions.astype(np.float64) if gait.double_controls else actions).sum(-1)
        info = {"x_position": qpos[:, 0].copy(), "x_velocity": moved[:, 0], "reward_forward": forward, "reward_ctrl": -control}
        if gait.axes == 2:
            ground = qpos[:, :2]
            info |= {"y_position": ground[:, 1].copy(), "y_velocity": moved[:, 1], "distance_from_origin": _lengths(ground)}
        if gait.height:
            info["z_distance_from_origin"] = qpos[:, 1] - self._initial[1]
        reward, costs = forward, control
        terminated = np.zeros(self.count, dtype=bool)
        if gait.healthy is not None:
            healthy = gait.healthy(self, qpos, qvel)
            info["reward_survive"] = healthy * options["healthy_reward"]
            reward = reward + info["reward_survive"]
            if options["terminate_when_unhealthy"]:
                terminated = ~healthy
        if gait.contact_cost is not None:
            contact = gait.contact_cost(self)
            info["reward_contact"] = -contact
            costs = costs + contact
        return np.asarray(reward - costs, dtype=np.float64), terminated, info


def _merged(name: str, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    for key in options:
        if key not in defaults:
            raise TypeError(f"{name} has no option {key!r}; it has {', '.join(sorted(defaults))}")
    return {**defaults, **options}


def _within(values: np.ndarray, limits: Sequence[float]) -> np.ndarray:
    return (limits[0] < values) & (values < limits[1])


def _upright(task: Locomotion, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    """Height and pitch of the torso within their ranges, and all else too where the task has `healthy_state_range`."""
    healthy = _within(qpos[:, 1], task.options["healthy_z_range"]) & _within(qpos[:, 2], task.options["healthy_angle_range"])
    if "healthy_state_range" in task.options:
        healthy &= _within(np.concatenate([qpos[:, 2:], qvel], axis=1), task.options["healthy_state_range"]).all(-1)
    return healthy


def _ant_healthy(task: Locomotion, qpos: np.ndarray, qvel: np.ndarray) -> np.ndarray:
    low, high = task.options["healthy_z_range"]
    return np.isfinite(qpos).all(-1) & np.isfinite(qvel).all(-1) & (low <= qpos[:, 2]) & (qpos[:, 2] <= high)


def _ant_place(task: Locomotion) -> np.ndarray:
    body = task.options["main_body"]
    return task.read("xpos")[:, task.model.body(body).id]


def _ant_forces(task: Locomotion) -> np.ndarray:
    return np.clip(task.read("cfrc_ext"), *task.options["contact_force_range"])


def _ant_cost(task: Locomotion) -> np.ndarray:
    return task.options["contact_cost_weight"] * np.square(_ant_forces(task)).reshape(task.count, -1).sum(-1)


def _humanoid_place(task: Locomotion) -> np.ndarray:
    mass = task.model.body_mass
    return np.einsum("b,nbj->nj", mass, task.read("xipos")) / mass.sum()


def _humanoid_cost(task: Locomotion) -> np.ndarray:
    cost = task.options["contact_cost_weight"] * np.square(task.read("cfrc_ext")).reshape(task.count, -1).sum(-1)
    return np.clip(cost, *task.options["contact_cost_range"])


HALF_CHEETAH = Gait(
    options={"xml_file": "half_cheetah.xml", "frame_skip": 5, "ctrl_cost_weight": 0.1, "reset_noise_scale": 0.1}, velocity_noise=_normal
)
SWIMMER = Gait(options={"xml_file": "swimmer.xml", "frame_skip": 4, "ctrl_cost_weight": 1e-4, "reset_noise_scale": 0.1}, axes=2)
_WALKING = {"frame_skip": 4, "ctrl_cost_weight": 1e-3, "healthy_reward": 1.0, "terminate_when_unhealthy": True, "reset_noise_scale": 5e-3}
HOPPER = Gait(
    options=_WALKING
    | {
        "xml_file": "hopper.xml",
        "healthy_state_range": (-100.0, 100.0),
        "healthy_z_range": (0.7, float("inf")),
        "healthy_angle_range": (-0.2, 0.2),
    },
    velocity_limit=10.0,
    healthy=_upright,
    height=True,
)
WALKER2D = Gait(
    options=_WALKING | {"xml_file": "walker2d_v5.xml", "healthy_z_range": (0.8, 2.0), "healthy_angle_range": (-1.0, 1.0)},
    velocity_limit=10.0,
    healthy=_upright,
    height=True,
)
ANT = Gait(
    options={
        "xml_file": "ant.xml",
        "frame_skip": 5,
        "ctrl_cost_weight": 0.5,
        "contact_cost_weight": 5e-4,
        "healthy_reward": 1.0,
        "main_body": 1,
        "terminate_when_unhealthy": True,
        "healthy_z_range": (0.2, 1.0),
        "contact_force_range": (-1.0, 1.0),
        "reset_noise_scale": 0.1,
        "include_cfrc_ext_in_observation": True,
    },
    axes=2,
    velocity_noise=_normal,
    place=_ant_place,
    healthy=_ant_healthy,
    forces=_ant_forces,
    contact_cost=_ant_cost,
    extra=("cfrc_ext",),
)
HUMANOID = Gait(
    options={
        "xml_file": "humanoid.xml",
        "frame_skip": 5,
        "forward_reward_weight": 1.25,
        "ctrl_cost_weight": 0.1,
        "contact_cost_weight": 5e-7,
        "contact_cost_range": (-np.inf, 10.0),
        "healthy_reward": 5.0,
        "terminate_when_unhealthy": True,
        "healthy_z_range": (1.0, 2.0),
        "reset_noise_scale": 1e-2,
        "include_cinert_in_observation": True,
        "include_cvel_in_observation": True,
        "include_qfrc_actuator_in_observation": True,
        "include_cfrc_ext_in_observation": True,
    },
    axes=2,
    place=_humanoid_place,
    healthy=lambda task, qpos, qvel: _within(qpos[:, 2], task.options["healthy_z_range"]),
    double_controls=True,
    contact_cost=_humanoid_cost,
    extra=("cinert", "cvel", "qfrc_actuator", "cfrc_ext"),
)


# -- the others ---------------------------------------------------------------------------------------------------------------------------------


class InvertedPendulum(Simulation):
    """Keep a pole upright on a sliding cart: 1 a step until it leans by more than 0.2 rad."""

    def __init__(
        self,
        count: int,
        *,
        xml_file: str = "inverted_pendulum.xml",
        frame_skip: int = 2,
        reset_noise_scale: float = 0.01,
        max_episode_steps: int | None = None,
        nthread: int | None = None,
    ) -> None:
        options = {"xml_file": xml_file, "frame_skip": frame_skip, "reset_noise_scale": reset_noise_scale}
        super().__init__("InvertedPendulum-v5", count, options, lambda model: 4, 1000, max_episode_steps, nthread)

    def _noise(self, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        scale = self.options["reset_noise_scale"]
        return self._initial + _uniform(draws, scale, self.model.nq), _uniform(draws, scale, self.model.nv)

    def _observe(self) -> np.ndarray:
        return np.concatenate([self.read("qpos"), self.read("qvel")], axis=1)

    def _advance(self, actions: np.ndarray) -> _Step:
        self._simulate(actions)
        seen = self._observe()
        terminated = ~np.isfinite(seen).all(-1) | (np.abs(seen[:, 1]) > 0.2)
        reward = 1.0 - terminated
        return reward, terminated, {"reward_survive": reward}


class InvertedDoublePendulum(Simulation):
    """Keep two poles upright, one on top of the other: 10 a step less penalties for where the tip is and how fast the joints turn."""

    def __init__(
        self,
        count: int,
        *,
        xml_file: str = "inverted_double_pendulum.xml",
        frame_skip: int = 5,
        healthy_reward: float = 10.0,
        reset_noise_scale: float = 0.1,
        max_episode_steps: int | None = None,
        nthread: int | None = None,
    ) -> None:
        options = {"xml_file": xml_file, "frame_skip": frame_skip, "healthy_reward": healthy_reward, "reset_noise_scale": reset_noise_scale}
        super().__init__("InvertedDoublePendulum-v5", count, options, lambda model: 9, 1000, max_episode_steps, nthread)

    def _noise(self, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        scale = self.options["reset_noise_scale"]
        return self._initial + _uniform(draws, scale, self.model.nq), _normal(draws, scale, self.model.nv)

    def _observe(self) -> np.ndarray:
        qpos, constraint = self.read("qpos"), self.read("qfrc_constraint")[:, :1]
        velocity = np.clip(self.read("qvel"), -10, 10)
        return np.concatenate([qpos[:, :1], np.sin(qpos[:, 1:]), np.cos(qpos[:, 1:]), velocity, np.clip(constraint, -10, 10)], axis=1)

    def _advance(self, actions: np.ndarray) -> _Step:
        self._simulate(actions)
        tip, qvel = self.read("site_xpos")[:, 0], self.read("qvel")
        terminated = tip[:, 2] <= 1
        distance = 0.01 * tip[:, 0] ** 2 + (tip[:, 2] - 2) ** 2
        speed = 1e-3 * qvel[:, 1] ** 2 + 5e-3 * qvel[:, 2] ** 2
        alive = self.options["healthy_reward"] * ~terminated
        return alive - distance - speed, terminated, {"reward_survive": alive, "distance_penalty": -distance, "velocity_penalty": -speed}


class Reacher(Simulation):
    """Bring the fingertip of a two-joint arm to a target; minus the distance and the squared torques, 50 steps."""

    def __init__(
        self,
        count: int,
        *,
        xml_file: str = "reacher.xml",
        frame_skip: int = 2,
        reward_dist_weight: float = 1.0,
        reward_control_weight: float = 1.0,
        max_episode_steps: int | None = None,
        nthread: int | None = None,
    ) -> None:
        options = {
            "xml_file": xml_file,
            "frame_skip": frame_skip,
            "reward_dist_weight": reward_dist_weight,
            "reward_control_weight": reward_control_weight,
        }
        super().__init__("Reacher-v5", count, options, lambda model: 10, 50, max_episode_steps, nthread)
        self._bodies = [self.model.body(name).id for name in ("fingertip", "target")]

    def _noise(self, draws: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        qpos = draws.uniform(-0.1, 0.1, size=self.model.nq) + self._initial
        while np.linalg.norm(goal := draws.uniform(-0.2, 0.2, size=2)) >= 0.2:
            pass
        qvel = draws.uniform(-0.005, 0.005, size=self.model.nv)
        qpos[-2:], qvel[-2:] = goal, 0.0
        return qpos, qvel

    def _to_target(self) -> np.ndarray:
        fingertip, target = self.read("xpos")[:, self._bodies].transpose(1, 0, 2)
        return fingertip - target

    def _observe(self) -> np.ndarray:
        qpos = self.read("qpos")
        return np.concatenate(
            [np.cos(qpos[:, :2]), np.sin(qpos[:, :2]), qpos[:, 2:], self.read("qvel")[:, :2], self._to_target()[:, :2]], axis=1
        )

    def _advance(self, actions: np.ndarray) -> _Step:
        self._simulate(actions)
        distance = -_lengths(self._to_target()) * self.options["reward_dist_weight"]
        control = -np.square(actions).sum(-1) * self.options["reward_control_weight"]
        return distance + control, np.zeros(self.count, dtype=bool), {"reward_dist": distance, "reward_ctrl": control}


_GAITS = {
    "HalfCheetah-v5": HALF_CHEETAH,
    "Hopper-v5": HOPPER,
    "Walker2d-v5": WALKER2D,
    "Ant-v5": ANT,
    "Swimmer-v5": SWIMMER,
    "Humanoid-v5": HUMANOID,
}

# What each id makes: called with the number of copies and the options.
ENVIRONMENTS: Mapping[str, Callable[..., Environments]] = {
    **{name: functools.partial(Locomotion, name, gait) for name, gait in _GAITS.items()},
    "InvertedPendulum-v5": InvertedPendulum,
    "InvertedDoublePendulum-v5": InvertedDoublePendulum,
    "Reacher-v5": Reacher,
}
