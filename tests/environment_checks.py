"""What tests of batched environments share: comparison with Gymnasium's originals step by step, and continuing from a saved state."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from telos.environments.base import Driver, Environments, Observation
from telos.environments.gym import GymEnvironments


def originals(env: str, count: int, **options: object) -> GymEnvironments:
    """Gymnasium's own copies, stepped one by one."""
    return GymEnvironments(env, functools.partial(gymnasium.make, env, disable_env_checker=True, **options), count)


def random_actions(environments: Environments, draws: np.random.Generator) -> np.ndarray:
    """[N, …], of a Box also some beyond its bounds."""
    space, count = environments.action_space, environments.count
    if isinstance(space, Box):
        return (1.3 * draws.uniform(space.low, space.high, (count, *space.shape))).astype(space.dtype)
    return draws.integers(space.n, size=count)


def assert_same_episodes(
    ours: Environments, theirs: Environments, steps: int, *, seed: int = 0, reward_tolerance: float = 0.0
) -> tuple[int, int]:
    """Both take the same random actions for `steps` steps, over as many episodes as that gives. Returns how many ended by termination, truncation."""
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    mine, other, draws = Driver(ours, seed), Driver(theirs, seed), np.random.default_rng(seed)
    assert_equal(mine.observation, other.observation, "first observations")
    terminated = truncated = 0
    for step in range(steps):
        actions = random_actions(ours, draws)
        (a, ended), (b, _) = mine.step(actions), other.step(actions)
        assert_equal(a.observation, b.observation, f"observations of step {step}")
        assert_equal(mine.observation, other.observation, f"observations after step {step}")
        np.testing.assert_allclose(a.reward, b.reward, rtol=0, atol=reward_tolerance, err_msg=f"rewards of step {step}")
        np.testing.assert_array_equal(a.terminated, b.terminated, f"terminations of step {step}")
        np.testing.assert_array_equal(a.truncated, b.truncated, f"truncations of step {step}")
        assert set(a.info) == set(b.info)
        for name, values in b.info.items():
            np.testing.assert_allclose(a.info[name], values, rtol=0, atol=reward_tolerance, err_msg=f"{name} of step {step}")
        assert a.reward.dtype == np.float64
        terminated += sum(episode.terminated for episode in ended)
        truncated += sum(not episode.terminated for episode in ended)
    return terminated, truncated


def assert_continues(make: Callable[[], Environments], steps: int = 20) -> None:
    """A second object that loads the state of the first, kept while the first goes on, does exactly what the first does."""
    first, draws = Driver(make(), 3), np.random.default_rng(0)
    for _ in range(steps):
        first.step(random_actions(first.environments, draws))
    kept = first.environments.state()
    assert kept is not None
    assert all(isinstance(value, np.ndarray) and value.dtype.kind in "biuf" for value in kept.values())
    saved = copy.deepcopy(first.state())
    actions = [random_actions(first.environments, draws) for _ in range(steps)]
    outcomes = [first.step(action)[0] for action in actions]
    second = Driver(make(), 3)
    second.load(saved)
    for expected, action in zip(outcomes, actions, strict=True):
        found, _ = second.step(action)
        assert_equal(found.observation, expected.observation, "observations")
        for name in ("reward", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        for name, values in expected.info.items():
            np.testing.assert_array_equal(found.info[name], values, name)
    np.testing.assert_array_equal(kept["elapsed"], saved["environments"]["elapsed"], "a kept state must not change as the copies go on")


def assert_equal(a: Observation, b: Observation, what: str) -> None:
    pairs = [(a[key], b[key]) for key in b] if isinstance(b, dict) else [(a, b)]
    for x, y in pairs:
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y, what)
