"""Point mazes: motion, walls, rewards, and the scripted driver."""

from __future__ import annotations

import numpy as np
import pytest

from environment_checks import assert_continues, random_actions
from telos.core.errors import UsageError
from telos.environments.maze import ENVIRONMENTS, HALF_SIDE, LAYOUTS, PointMaze, Waypoints


def made(env: str, count: int, **options) -> PointMaze:
    maze = ENVIRONMENTS[env](count, **options)
    assert isinstance(maze, PointMaze)
    return maze


def corridor(count: int = 1, **options) -> PointMaze:
    """Five free cells in a row; the ball stands in the middle of the first."""
    maze = made("telos/PointMazeU-v0", count, maze_map=["#######", "#.....#", "#######"], position_noise_range=0.0, **options)
    maze.begin(range(count), range(count))
    maze._position[:], maze._velocity[:], maze._goal[:] = (-2.0, 0.0), 0.0, (2.0, 0.0)
    return maze


def test_motion_in_the_open_by_hand():
    maze = corridor()
    outcome = maze.step(np.array([[0.5, 0.0]], dtype=np.float32))
    v1 = 0.05 * 8 * 0.5
    v2 = v1 + 0.05 * (8 * 0.5 - v1)
    assert isinstance(outcome.observation, dict)
    np.testing.assert_allclose(outcome.observation["observation"], [[-2 + 0.05 * v1, 0, v1, 0]], atol=1e-12)
    outcome = maze.step(np.array([[0.5, 0.0]], dtype=np.float32))
    np.testing.assert_allclose(outcome.observation["observation"], [[-2 + 0.05 * (v1 + v2), 0, v2, 0]], atol=1e-12)


def test_a_wall_takes_the_velocity_into_it_and_leaves_that_along_it():
    maze = corridor()
    for _ in range(20):
        outcome = maze.step(np.array([[0.3, 1.0]], dtype=np.float32))
    x, y, vx, vy = outcome.observation["observation"][0]
    assert y == pytest.approx(0.5 - HALF_SIDE, abs=1e-6)
    assert vy == 0
    # Along the wall it moves as if there were none.
    free = corridor()
    for _ in range(20):
        expected = free.step(np.array([[0.3, 0.0]], dtype=np.float32)).observation["observation"][0]
    assert (x, vx) == pytest.approx((expected[0], expected[2]))


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_no_ball_is_ever_in_a_wall(env: str):
    """Under pushes that last, which press into walls and corners."""
    count = 200
    maze, draws = made(env, count), np.random.default_rng(0)
    maze.begin(range(count), range(count))
    corners = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * HALF_SIDE
    pushes = random_actions(maze, draws)
    before = maze._position.copy()
    for step in range(200):
        if step % 10 == 0:
            pushes = np.where(draws.random((count, 1)) < 0.7, random_actions(maze, draws), pushes)
        maze.step(pushes)
        assert (np.abs(maze._position - before) <= 0.1 + 1e-9).all()
        before = maze._position.copy()
        for corner in corners:
            assert (maze.layout.cells(maze._position + corner) >= 0).all()


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_scripted_driver_reaches_every_goal_in_time(env: str):
    maze = made(env, 100, continuing_task=False)
    driver, reached = Waypoints(maze), np.zeros(100, dtype=bool)
    observation = maze.begin(range(100), range(100))
    assert isinstance(observation, dict)
    start = maze.layout.cells(observation["achieved_goal"])
    assert (start != maze.layout.cells(observation["desired_goal"])).all()
    for _ in range(maze.max_episode_steps or 0):
        outcome = maze.step(driver.act(observation))
        observation = outcome.observation
        assert isinstance(observation, dict)
        np.testing.assert_array_equal(outcome.terminated, outcome.info["success"] == 1)
        reached |= outcome.terminated
    assert reached.all()


def test_play_visits_every_cell_whatever_the_goal():
    maze = made("telos/PointMazeMedium-v0", 50)
    driver = Waypoints(maze, play=True, noise=0.3, seed=1)
    observation, seen = maze.begin(range(50), range(50)), np.zeros(len(maze.layout.free), dtype=bool)
    for _ in range(300):
        assert isinstance(observation, dict)
        observation = maze.step(driver.act(observation)).observation
        seen[maze.layout.cells(observation["achieved_goal"])] = True
    assert seen.all()


@pytest.mark.parametrize("reward_type", ["sparse", "dense"])
def test_rewards_are_those_of_relabelling(reward_type: str):
    maze = made("telos/PointMazeU-v0", 20, reward_type=reward_type)
    driver, observation = Waypoints(maze), maze.begin(range(20), range(20))
    rewards = []
    for _ in range(60):
        assert isinstance(observation, dict)
        outcome = maze.step(driver.act(observation))
        observation = outcome.observation
        distance = np.linalg.norm(observation["achieved_goal"] - observation["desired_goal"], axis=-1)
        np.testing.assert_allclose(outcome.reward, distance <= 0.45 if reward_type == "sparse" else np.exp(-distance))
        np.testing.assert_array_equal(outcome.reward, maze.compute_reward(observation["achieved_goal"], observation["desired_goal"], {}))
        rewards.append(outcome.reward)
    assert np.min(rewards) < np.max(rewards)
    goals = np.zeros((4, 5, 2))
    assert maze.compute_reward(goals, goals).tolist() == np.ones((4, 5)).tolist()


def test_a_continuing_task_goes_on_at_the_goal_until_its_limit():
    maze = corridor(max_episode_steps=60)
    driver, observation = Waypoints(maze), maze._observe()
    outcomes = []
    for _ in range(60):
        assert isinstance(observation, dict)
        outcomes.append(maze.step(driver.act(observation)))
        observation = outcomes[-1].observation
    assert sum(x.reward[0] for x in outcomes) > 5
    assert not any(x.terminated[0] for x in outcomes)
    assert [bool(x.truncated[0]) for x in outcomes] == [False] * 59 + [True]


def test_observations_lie_in_their_space():
    maze = made("telos/PointMazeLarge-v0", 3)
    observation = maze.begin(range(3), range(3))
    assert isinstance(observation, dict)
    assert maze.observation_space.contains({key: value[0] for key, value in observation.items()})


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_a_saved_state_continues_exactly(env: str):
    assert_continues(lambda: ENVIRONMENTS[env](3, max_episode_steps=25))


def test_the_longest_ways_are_as_drawn():
    assert {name: int(made(env, 1).layout.steps.max()) for env, name in zip(ENVIRONMENTS, LAYOUTS, strict=True)} == {
        "u": 6,
        "medium": 11,
        "large": 19,
    }


@pytest.mark.parametrize(
    "options",
    [
        {"reward_type": "shaped"},
        {"position_noise_range": 0.5},
        {"maze_map": ["###", "#..", "###"]},
        {"maze_map": ["#####", "#.#.#", "#####"]},
        {"maze_map": ["###", "#.#", "###"]},
        {"maze_map": ["####", "#x.#", "####"]},
    ],
)
def test_wrong_options_are_refused(options: dict):
    with pytest.raises(UsageError):
        made("telos/PointMazeU-v0", 1, **options)
