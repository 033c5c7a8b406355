"""Gymnasium's classic control tasks, stepped as arrays.

Every task gives, step by step, what `gymnasium.make(id)` of Gymnasium 1.3 gives for the same seed and actions, time limit included. To that end the
arithmetic is done in Gymnasium's order and precision, because a difference of one rounding grows in a chaotic task such as Acrobot. What remains:

- Pendulum's reward contains the square of a single-precision torque, which a scalar and an array may round differently: rewards differ by less than
  1e-9. Its observations are equal.
- Gymnasium's mountain cars take the cosine of the C library; where that of NumPy's arrays is another (here they agree), they differ by rounding.
- Actions are taken in the precision of the action space, as a policy that follows the space sends them.

Options are those of Gymnasium's constructors, and `max_episode_steps` of `gymnasium.make`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from gymnasium.spaces import Box, Discrete

from telos.environments.arrays import ArrayEnvironments
from telos.environments.base import Environments, Observation

_NO_INFO: Mapping[str, np.ndarray] = {}


def _box(high: Sequence[float], low: Sequence[float] | None = None) -> Box:
    top = np.array(high, dtype=np.float32)
    return Box(-top if low is None else np.array(low, dtype=np.float32), top, dtype=np.float32)


class CartPole(ArrayEnvironments):
    """CartPole-v1 (Barto, Sutton and Anderson 1983): push a cart left or right so that the pole on it does not fall; at most 500 steps.

    `sutton_barto_reward`: 0 a step and -1 at the fall, instead of 1 a step.

    The rows of one array [6, N] are cart position, angle, their velocities and their accelerations, so that the rows two further on are a row's time
    derivative. With few copies the time of a step is the number of array operations, and one on neighbouring rows costs as much as one on a single row.
    """

    FORCE, GRAVITY, CART, POLE, HALF_LENGTH, SECONDS = 10.0, 9.8, 1.0, 0.1, 0.5, 0.02
    X_LIMIT, ANGLE_LIMIT = 2.4, 12 * 2 * math.pi / 360

    def __init__(self, count: int, *, sutton_barto_reward: bool = False, max_episode_steps: int | None = None) -> None:
        space = _box([2 * self.X_LIMIT, np.inf, 2 * self.ANGLE_LIMIT, np.inf])
        super().__init__("CartPole-v1", count, space, Discrete(2), max_episode_steps, 500)
        self.sutton_barto_reward = sutton_barto_reward
        rows = np.zeros((6, count))
        self._state, self._slopes, self._accelerations = rows[:4], rows[2:], rows[4:]
        self._places, self._angle, self._spin = rows[:2], rows[1], rows[3]
        self._seen = self._state.reshape(2, 2, count).transpose(2, 1, 0)  # as observed: place and velocity of the cart, then of the pole
        self._squares, self._change, self._spare = np.zeros((2, count)), np.zeros((4, count)), np.zeros((3, count))
        # NumPy converts a Python number at each operation, which costs more than the operation: constants are arrays.
        self._forces = np.array([-self.FORCE, self.FORCE])
        self._total, self._pole = np.full((2, count), self.POLE + self.CART), np.full(count, self.POLE * self.HALF_LENGTH)
        self._factors = np.stack([self._pole, np.full(count, self.POLE)])
        self._four_thirds, self._half_length = np.full(count, 4.0 / 3.0), np.full(count, self.HALF_LENGTH)
        self._gravity, self._seconds = np.full(count, self.GRAVITY), np.full((4, count), self.SECONDS)
        self._limits = np.stack([np.full(count, self.X_LIMIT), np.full(count, self.ANGLE_LIMIT)])
        self._ones = np.ones(count)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"state": self._state}

    def _start(self, copy: int, draws: np.random.Generator) -> None:
        self._seen[copy] = draws.uniform(-0.05, 0.05, size=4).reshape(2, 2)

    def _observe(self) -> Observation:
        return self._seen.astype(np.float32, order="C").reshape(self.count, 4)

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        cosine, sine, spare = self._spare
        squares, (temp, denominator) = self._squares, self._squares
        np.cos(self._angle, cosine)
        np.sin(self._angle, sine)
        np.square(self._spin, temp)
        np.square(cosine, denominator)
        np.multiply(squares, self._factors, squares)
        # temp = (force + m l θ̇² sin θ) / M, and beside it m cos² θ / M
        np.multiply(temp, sine, temp)
        np.add(temp, self._forces[actions], temp)
        np.divide(squares, self._total, squares)
        # θ̈ = (g sin θ - cos θ temp) / (l (4/3 - m cos² θ / M))
        np.subtract(self._four_thirds, denominator, denominator)
        np.multiply(denominator, self._half_length, denominator)
        np.multiply(sine, self._gravity, sine)
        np.multiply(cosine, temp, spare)
        np.subtract(sine, spare, sine)
        acceleration, angular = self._accelerations
        np.divide(sine, denominator, angular)
        # ẍ = temp - m l θ̈ cos θ / M
        np.multiply(angular, self._pole, spare)
        np.multiply(spare, cosine, spare)
        np.divide(spare, self._total[0], spare)
        np.subtract(temp, spare, acceleration)
        # Euler: everything moves by its old derivative.
        np.multiply(self._slopes, self._seconds, self._change)
        np.add(self._state, self._change, self._state)
        beyond = np.abs(self._places) > self._limits
        terminated = beyond[0] | beyond[1]
        return -terminated.astype(float) if self.sutton_barto_reward else self._ones.copy(), terminated, _NO_INFO


class Acrobot(ArrayEnvironments):
    """Acrobot-v1 (Sutton 1996; the book's equations): swing the free end of two links above a line by a torque -1, 0 or 1 at the joint; 500 steps.

    State [4, N]: the two angles and their velocities, one Runge-Kutta step of 0.2 s for each action. Both links weigh 1 kg, are 1 m long, with the centre
    of mass in the middle and 1 kg m² of inertia.
    """

    TORQUES, GRAVITY, SECONDS = np.array([-1.0, 0.0, 1.0]), 9.8, 0.2
    FASTEST = np.array([[4 * math.pi], [9 * math.pi]])

    def __init__(self, count: int, *, max_episode_steps: int | None = None) -> None:
        space = _box([1.0, 1.0, 1.0, 1.0, 4 * math.pi, 9 * math.pi])
        super().__init__("Acrobot-v1", count, space, Discrete(3), max_episode_steps, 500)
        self._state = np.zeros((4, count))

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"state": self._state}

    def _start(self, copy: int, draws: np.random.Generator) -> None:
        self._state[:, copy] = draws.uniform(-0.1, 0.1, size=4).astype(np.float32)

    def begin(self, copies: Sequence[int], seeds: Sequence[int]) -> Observation:
        super().begin(copies, seeds)
        # Gymnasium starts in single precision, its cosines too, and goes on in double precision.
        return self._seen(self._state[:, np.asarray(copies, dtype=np.int64)].astype(np.float32))

    def _observe(self) -> Observation:
        return self._seen(self._state)

    def _seen(self, state: np.ndarray) -> np.ndarray:
        seen = np.empty((state.shape[1], 6), dtype=np.float32)
        seen[:, 0:4:2], seen[:, 1:4:2], seen[:, 4:] = np.cos(state[:2]).T, np.sin(state[:2]).T, state[2:].T
        return seen

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        y, dt, torque = self._state, self.SECONDS, self.TORQUES[actions]
        k1 = self._slope(y, torque)
        k2 = self._slope(y + dt / 2.0 * k1, torque)
        k3 = self._slope(y + dt / 2.0 * k2, torque)
        k4 = self._slope(y + dt * k3, torque)
        y += dt / 6.0 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles, pi = y[:2], math.pi
        while (over := angles > pi).any():
            angles[over] -= 2 * pi
        while (under := angles < -pi).any():
            angles[under] += 2 * pi
        np.clip(y[2:], -self.FASTEST, self.FASTEST, out=y[2:])
        terminated = -np.cos(y[0]) - np.cos(y[1] + y[0]) > 1.0
        return terminated - 1.0, terminated, _NO_INFO

    def _slope(self, y: np.ndarray, torque: np.ndarray) -> np.ndarray:
        first, second, spin1, spin2 = y
        cosine, sine = np.cos(second), np.sin(second)
        # Gymnasium squares by pow(x, 2), which now and then rounds otherwise than x * x; of NumPy's powers only this one is pow everywhere.
        squared1, squared2 = np.float_power(y[2:], 2.0)
        d1 = 0.25 + (1.25 + cosine) + 1.0 + 1.0
        d2 = 0.25 + 0.5 * cosine + 1.0
        phi2 = 0.5 * self.GRAVITY * np.cos(first + second - math.pi / 2.0)
        phi1 = -0.5 * squared2 * sine - spin2 * spin1 * sine + 1.5 * self.GRAVITY * np.cos(first - math.pi / 2) + phi2
        slope = np.empty_like(y)
        slope[:2] = y[2:]
        slope[3] = (torque + d2 / d1 * phi1 - 0.5 * squared1 * sine - phi2) / (1.25 - np.float_power(d2, 2.0) / d1)
        slope[2] = -(d2 * slope[3] + phi1) / d1
        return slope


class MountainCar(ArrayEnvironments):
    """MountainCar-v0 (Moore 1990): drive a weak car out of a valley, by pushing left, not at all, or right; -1 a step, at most 200 steps.

    `goal_velocity`: the speed at which the goal must be reached.
    """

    LOWEST, HIGHEST, FASTEST, GOAL = -1.2, 0.6, 0.07, 0.5

    def __init__(self, count: int, *, goal_velocity: float = 0, max_episode_steps: int | None = None) -> None:
        space = _box([self.HIGHEST, self.FASTEST], [self.LOWEST, -self.FASTEST])
        super().__init__("MountainCar-v0", count, space, Discrete(3), max_episode_steps, 200)
        self.goal_velocity = goal_velocity
        self._state = np.zeros((2, count))  # position, velocity

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"state": self._state}

    def _start(self, copy: int, draws: np.random.Generator) -> None:
        self._state[:, copy] = draws.uniform(-0.6, -0.4), 0.0

    def _observe(self) -> Observation:
        return self._state.T.astype(np.float32, order="C")

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        position, velocity = self._state
        velocity += (actions - 1) * 0.001 + np.cos(3 * position) * -0.0025
        np.clip(velocity, -self.FASTEST, self.FASTEST, out=velocity)
        position += velocity
        np.clip(position, self.LOWEST, self.HIGHEST, out=position)
        velocity[(position == self.LOWEST) & (velocity < 0)] = 0.0
        return np.full(self.count, -1.0), (position >= self.GOAL) & (velocity >= self.goal_velocity), _NO_INFO


class MountainCarContinuous(ArrayEnvironments):
    """MountainCarContinuous-v0: the same valley with a force in [-1, 1]; 100 at the goal less a tenth of the squared force, at most 999 steps.

    `goal_velocity`: the speed at which the goal must be reached.
    """

    LOWEST, HIGHEST, FASTEST, GOAL, POWER = -1.2, 0.6, 0.07, 0.45, 0.0015

    def __init__(self, count: int, *, goal_velocity: float = 0, max_episode_steps: int | None = None) -> None:
        space = _box([self.HIGHEST, self.FASTEST], [self.LOWEST, -self.FASTEST])
        super().__init__("MountainCarContinuous-v0", count, space, _box([1.0]), max_episode_steps, 999)
        self.goal_velocity = goal_velocity
        self._state = np.zeros((2, count))  # position, velocity

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"state": self._state}

    def _start(self, copy: int, draws: np.random.Generator) -> None:
        self._state[:, copy] = draws.uniform(-0.6, -0.4), 0.0

    def _observe(self) -> Observation:
        return self._state.T.astype(np.float32, order="C")

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        action = actions[:, 0].astype(np.float32)
        # Gymnasium draws the start in double precision and keeps every later state in single precision.
        started = self._elapsed == 0
        state, terminated = self._moved(self._state.astype(np.float32), action)
        if started.any():
            state64, terminated64 = self._moved(self._state, action)
            state, terminated = np.where(started, state64, state), np.where(started, terminated64, terminated)
        self._state[...] = state.astype(np.float32)
        return np.where(terminated, 100.0, 0.0) - np.square(action.astype(np.float64)) * 0.1, terminated, _NO_INFO

    def _moved(self, state: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next state [2, N] and whether it is the goal, computed in the precision of `state`, apart from an action that was cut to -1 or 1."""
        position, velocity = state
        slope = 0.0025 * np.cos((3 * position).astype(np.float64))
        push = action * np.float32(self.POWER) - slope.astype(np.float32)
        full = (np.sign(action).astype(np.float64) * self.POWER - slope).astype(state.dtype)
        velocity = velocity + np.where(np.abs(action) > 1, full, push)
        velocity = np.clip(velocity, -self.FASTEST, self.FASTEST)
        position = np.clip(position + velocity, self.LOWEST, self.HIGHEST)
        velocity = np.where((position == position.dtype.type(self.LOWEST)) & (velocity < 0), 0, velocity)
        return np.stack([position, velocity]), (position >= self.GOAL) & (velocity >= self.goal_velocity)


class Pendulum(ArrayEnvironments):
    """Pendulum-v1: swing a pendulum up by a torque in [-2, 2] N m; the reward is -(angle² + 0.1 velocity² + 0.001 torque²), 200 steps, no termination.

    `g`: gravity in m/s².
    """

    FASTEST, STRONGEST, SECONDS = 8, 2.0, 0.05

    def __init__(self, count: int, *, g: float = 10.0, max_episode_steps: int | None = None) -> None:
        super().__init__("Pendulum-v1", count, _box([1.0, 1.0, self.FASTEST]), _box([self.STRONGEST]), max_episode_steps, 200)
        self.g = g
        self._state = np.zeros((2, count))  # angle from upright, velocity
        self._never = np.zeros(count, dtype=bool)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"state": self._state}

    def _start(self, copy: int, draws: np.random.Generator) -> None:
        high = np.array([math.pi, 1.0])
        self._state[:, copy] = draws.uniform(-high, high)

    def _observe(self) -> Observation:
        angle, velocity = self._state
        seen = np.empty((self.count, 3), dtype=np.float32)
        seen[:, 0], seen[:, 1], seen[:, 2] = np.cos(angle), np.sin(angle), velocity
        return seen

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        angle, velocity = self._state
        torque = np.clip(actions[:, 0].astype(np.float32), -self.STRONGEST, self.STRONGEST)
        wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
        cost = wrapped**2 + 0.1 * velocity**2 + 0.001 * torque**2
        # ω' = ω + (3 g / (2 l) sin θ + 3 / (m l²) u) dt with m = l = 1
        velocity += (3 * self.g / 2.0 * np.sin(angle) + 3.0 * torque) * self.SECONDS
        np.clip(velocity, -self.FASTEST, self.FASTEST, out=velocity)
        angle += velocity * self.SECONDS
        return -cost, self._never.copy(), _NO_INFO


# What each id makes: called with the number of copies and the options.
ENVIRONMENTS: Mapping[str, Callable[..., Environments]] = {
    "CartPole-v1": CartPole,
    "Acrobot-v1": Acrobot,
    "MountainCar-v0": MountainCar,
    "MountainCarContinuous-v0": MountainCarContinuous,
    "Pendulum-v1": Pendulum,
}
