"""The classic control tasks as arrays are Gymnasium's, step by step."""

from __future__ import annotations

import math

import numpy as np
import pytest

from environment_checks import assert_continues, assert_same_episodes, originals, random_actions
from telos.core.errors import UsageError
from telos.environments.base import Driver, Environments
from telos.environments.classic import ENVIRONMENTS, CartPole

# Steps that end an episode in every copy, where there is one that random play ends.
STEPS = {"CartPole-v1": 300, "Acrobot-v1": 520, "MountainCar-v0": 450, "MountainCarContinuous-v0": 1100, "Pendulum-v1": 450}
# The square of a single-precision torque rounds differently in a scalar and an array.
TOLERANCE = {"Pendulum-v1": 1e-9}


@pytest.mark.parametrize("env", STEPS)
def test_every_step_of_whole_episodes_is_gymnasiums(env: str):
    count = 4
    ended = assert_same_episodes(ENVIRONMENTS[env](count), originals(env, count), STEPS[env], reward_tolerance=TOLERANCE.get(env, 0.0))
    assert sum(ended) >= count


@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1", "Pendulum-v1"])
def test_the_state_behind_the_observation_is_gymnasiums_to_the_last_bit(env: str):
    """In double precision, where observations hide small differences that grow in a chaotic task."""
    ours, theirs, draws = ENVIRONMENTS[env](4, max_episode_steps=-1), originals(env, 4, max_episode_steps=-1), np.random.default_rng(2)
    ours.begin(range(4), range(4))
    theirs.begin(range(4), range(4))
    for _ in range(15 if env == "CartPole-v1" else 300):
        actions = random_actions(ours, draws)
        ours.step(actions)
        theirs.step(actions)
    state = ours._seen.reshape(4, 4).T if isinstance(ours, CartPole) else ours._arrays()["state"]
    np.testing.assert_array_equal(state.T, [copy.unwrapped.state for copy in theirs.copies])


def test_cartpole_is_gymnasiums_over_many_seeds():
    terminated, _ = assert_same_episodes(ENVIRONMENTS["CartPole-v1"](32), originals("CartPole-v1", 32), 150, seed=11)
    assert terminated > 150


@pytest.mark.parametrize(
    ("env", "options", "steps"),
    [
        ("CartPole-v1", {"sutton_barto_reward": True}, 60),
        ("CartPole-v1", {"max_episode_steps": 15}, 60),
        ("Acrobot-v1", {"max_episode_steps": 30}, 70),
        ("MountainCar-v0", {"goal_velocity": 0.02, "max_episode_steps": 40}, 90),
        ("MountainCarContinuous-v0", {"goal_velocity": 0.02, "max_episode_steps": 60}, 130),
        ("Pendulum-v1", {"g": 9.81}, 60),
    ],
)
def test_options_mean_what_they_mean_in_gymnasium(env: str, options: dict, steps: int):
    assert_same_episodes(ENVIRONMENTS[env](3, **options), originals(env, 3, **options), steps, reward_tolerance=TOLERANCE.get(env, 0.0))


@pytest.mark.parametrize("goal_velocity", [0.0, 0.08])
def test_a_car_that_swings_up_reaches_the_goal_when_it_is_fast_enough(goal_velocity: float):
    """Pushing the way the car moves gets out of the valley; ours and the original end in the same step, or neither ends where
    the goal asks for more than the top speed of 0.07."""
    for env, act in (
        ("MountainCar-v0", lambda o: np.where(o[:, 1] < 0, 0, 2)),
        ("MountainCarContinuous-v0", lambda o: np.where(o[:, 1:] < 0, -1.0, 1.0).astype(np.float32)),
    ):
        ours, theirs = (
            Driver(ENVIRONMENTS[env](4, goal_velocity=goal_velocity), 0),
            Driver(originals(env, 4, goal_velocity=goal_velocity), 0),
        )
        ends = 0
        for _ in range(210):
            actions = act(ours.observation)
            (a, ended), (b, _) = ours.step(actions), theirs.step(actions)
            np.testing.assert_array_equal(a.observation, b.observation)
            np.testing.assert_array_equal(a.reward, b.reward)
            np.testing.assert_array_equal(a.terminated, b.terminated)
            ends += sum(episode.terminated for episode in ended)
        assert (ends > 0) == (goal_velocity == 0.0)


@pytest.mark.parametrize("env", STEPS)
def test_a_saved_state_continues_exactly(env: str):
    assert_continues(lambda: ENVIRONMENTS[env](3))


@pytest.mark.parametrize("env", STEPS)
def test_a_copy_does_not_depend_on_its_neighbours(env: str):
    together, alone = ENVIRONMENTS[env](5), ENVIRONMENTS[env](1)
    draws = np.random.default_rng(0)
    together.begin(range(5), range(5))
    alone.begin([0], [2])
    for step in range(30):
        actions = random_actions(together, draws)
        a, b = together.step(actions), alone.step(actions[2:3])
        np.testing.assert_array_equal(a.observation[2], b.observation[0])
        assert a.reward[2] == b.reward[0]
        if step == 10:
            together.begin([0, 4], [7, 8])


def test_cartpole_falls_at_twelve_degrees():
    poles = ENVIRONMENTS["CartPole-v1"](1)
    poles.begin([0], [0])
    outcome = poles.step(np.array([0]))
    while not outcome.terminated[0]:
        assert abs(outcome.observation[0, 2]) <= math.radians(12)
        outcome = poles.step(np.array([0]))
    assert abs(outcome.observation[0, 2]) > math.radians(12)


def test_without_a_limit_no_episode_is_truncated():
    pendulum = ENVIRONMENTS["Pendulum-v1"](2, max_episode_steps=-1)
    pendulum.begin([0, 1], [0, 1])
    assert not any(pendulum.step(np.zeros((2, 1), dtype=np.float32)).truncated.any() for _ in range(300))


def test_outcomes_are_not_overwritten_by_the_next_step():
    for make in ENVIRONMENTS.values():
        environments: Environments = make(2)
        environments.begin([0, 1], [0, 1])
        draws = np.random.default_rng(0)
        first = environments.step(random_actions(environments, draws))
        kept = [np.copy(x) for x in (first.observation, first.reward, first.terminated, first.truncated)]
        environments.step(random_actions(environments, draws))
        for now, then in zip((first.observation, first.reward, first.terminated, first.truncated), kept, strict=True):
            np.testing.assert_array_equal(now, then)


def test_wrong_requests_are_refused():
    cartpole = ENVIRONMENTS["CartPole-v1"]
    with pytest.raises(UsageError, match="at least 1"):
        cartpole(0)
    with pytest.raises(UsageError, match="max_episode_steps"):
        cartpole(1, max_episode_steps=0)
    with pytest.raises(TypeError, match="gravity"):
        cartpole(1, gravity=3.0)
    poles = cartpole(2)
    with pytest.raises(ValueError, match="expected actions"):
        poles.step(np.zeros((2, 1), dtype=int))
    with pytest.raises(ValueError, match="shape"):
        cartpole(3).load(poles.state())
