"""All three autoreset modes of a vector environment give the same transitions, and they are those of the environments stepped one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from environment_checks import assert_equal, assert_same_episodes, originals
from telos.core.errors import UsageError
from telos.environments.gym import GymEnvironments
from telos.environments.vector import Transitions, VectorEnvironments, transitions


class Walk(gymnasium.Env):
    """A random walk with a dictionary of observations: it ends at 3 or -3 (termination), after 7 steps (truncation); `place` and, now and then, `luck`
    are told in `info`."""

    observation_space = Dict({"place": Box(-4.0, 4.0, (1,), np.float64), "time": Discrete(100)})
    action_space = Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        self.place, self.time = float(self.np_random.uniform(-1, 1)), 0
        return self._seen(), {"place": self.place, "luck": -1.0}

    def step(self, action: int) -> tuple[dict, float, bool, bool, dict]:
        self.place += (1 if action else -1) * self.np_random.uniform(0.5, 1.5)
        self.time += 1
        info = {"place": self.place} | ({"luck": self.place**2} if self.place > 0 else {})
        self.place = min(max(self.place, -4.0), 4.0)
        return self._seen(), self.place, abs(self.place) >= 3, self.time >= 7, info

    def _seen(self) -> dict:
        return {"place": np.array([self.place]), "time": self.time}


MAKERS: dict[str, Callable[[], gymnasium.Env]] = {
    "Walk": Walk,
    "CartPole-v1": lambda: gymnasium.make("CartPole-v1", max_episode_steps=20),
    "MountainCarContinuous-v0": lambda: gymnasium.make("MountainCarContinuous-v0", max_episode_steps=9),
}


def act(observation: Any) -> np.ndarray:
    """An action for each copy that depends on its observation alone."""
    seen = observation["place"] if isinstance(observation, dict) else observation
    number = np.floor(np.abs(seen.astype(np.float64)).sum(-1) * 1e4)
    return (number % 2).astype(int)


def streams(env: VectorEnv, steps: int, choose: Callable[[Any], np.ndarray] = act) -> list[list[tuple]]:
    """What happened to each copy, in order."""
    found: list[list[tuple]] = [[] for _ in range(env.num_envs)]
    for moved in transitions(env, choose, steps, seed=5):
        assert isinstance(moved, Transitions)
        for k, copy in enumerate(moved.copies):
            parts = [
                x[key] if key else x for x in (moved.observation, moved.following) for key in (sorted(x) if isinstance(x, dict) else [None])
            ]
            values = [*parts, moved.action, moved.reward, moved.terminated, moved.truncated]
            found[copy].append(tuple(np.asarray(value[k]).tolist() for value in values))
    return found


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("mode", AutoresetMode)
def test_every_mode_gives_the_episodes_of_copies_stepped_one_by_one(name: str, mode: AutoresetMode):
    """Observations, rewards, ends and info, with a seed for each episode."""
    vector = VectorEnvironments(SyncVectorEnv([MAKERS[name]] * 4, autoreset_mode=mode), name)
    terminated, truncated = assert_same_episodes(vector, GymEnvironments(name, MAKERS[name], 4), 120)
    assert truncated > 0
    assert terminated > 0 or name == "MountainCarContinuous-v0"


def test_an_asynchronous_vector_gives_the_same_episodes():
    vector = VectorEnvironments(AsyncVectorEnv([Walk] * 2, autoreset_mode=AutoresetMode.NEXT_STEP), "Walk")
    try:
        assert_same_episodes(vector, GymEnvironments("Walk", Walk, 2), 30)
    finally:
        vector.close()


@pytest.mark.parametrize("name", ["Walk", "CartPole-v1"])
def test_the_streams_of_transitions_are_the_same_in_every_mode(name: str):
    steps = 80
    found = {mode: streams(SyncVectorEnv([MAKERS[name]] * 3, autoreset_mode=mode), steps) for mode in AutoresetMode}
    same, following = found[AutoresetMode.SAME_STEP], found[AutoresetMode.NEXT_STEP]
    assert found[AutoresetMode.DISABLED] == same
    for a, b in zip(same, following, strict=True):
        # The ignored actions are missing: one for each episode that ended before the last step.
        ends = sum(x[-1] or x[-2] for x in b[:-1])
        assert ends > 3
        assert len(a) == steps
        assert steps - ends - 1 <= len(b) <= steps - ends
        assert a[: len(b)] == b


def test_a_vector_environment_that_resets_by_itself_is_read_as_a_stream():
    with pytest.raises(UsageError, match="transitions"):
        VectorEnvironments(CartPoleVectorEnv(num_envs=2))
    found = streams(CartPoleVectorEnv(num_envs=2, max_episode_steps=10), 60)
    for one in found:
        assert 50 <= len(one) < 60
        for before, after in itertools.pairwise(one):
            ended = before[-1] or before[-2]
            assert (before[1] == after[0]) != ended  # an episode goes on from where the action led, unless it has ended


def test_rows_asked_for_begin_and_no_others():
    vector = VectorEnvironments(SyncVectorEnv([Walk] * 3, autoreset_mode=AutoresetMode.SAME_STEP), "Walk")
    alone = GymEnvironments("Walk", Walk, 1)
    vector.begin(range(3), [0, 1, 2])
    first = alone.begin([0], [9])
    assert_equal(vector.begin([1], [9]), first, "first observations")
    for action in (0, 1, 1):
        found, expected = vector.step(np.full(3, action)), alone.step(np.array([action]))
        assert isinstance(found.observation, dict)
        assert_equal({key: value[1:2] for key, value in found.observation.items()}, expected.observation, "observations")


def test_a_vector_environment_without_a_mode_is_refused():
    vector = SyncVectorEnv([Walk])
    vector.metadata = {}
    with pytest.raises(UsageError, match="autoreset_mode"):
        VectorEnvironments(vector)


def test_the_name_is_the_registered_one():
    assert VectorEnvironments(gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")).name == "CartPole-v1"
    assert originals("CartPole-v1", 1).name == "CartPole-v1"
