"""Gymnasium's MuJoCo tasks in batch move, reward and end as the originals."""

from __future__ import annotations

import numpy as np
import pytest

from environment_checks import assert_continues, assert_same_episodes, originals

pytest.importorskip("mujoco", reason="MuJoCo's tasks need the package mujoco")

from telos.core.errors import UsageError
from telos.environments.base import Driver
from telos.environments.mujoco_tasks import ENVIRONMENTS

# Of rewards and info; observations are equal. A scalar power in the original (InvertedDoublePendulum) may round otherwise than a product of arrays, and
# so may, on some processors, the length of a vector.
TOLERANCE = 1e-12


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_every_step_is_gymnasiums(env: str):
    """Bit for bit, over episodes that end by falling or by a limit."""
    count, steps = 3, 90
    options = {"max_episode_steps": 40}
    ended = assert_same_episodes(ENVIRONMENTS[env](count, **options), originals(env, count, **options), steps, reward_tolerance=TOLERANCE)
    assert sum(ended) >= 2 * count


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_registered_time_limit_holds(env: str):
    assert ENVIRONMENTS[env](1).max_episode_steps == originals(env, 1).copies[0].spec.max_episode_steps


@pytest.mark.parametrize(
    ("env", "options"),
    [
        ("HalfCheetah-v5", {"frame_skip": 2, "forward_reward_weight": 3.0, "exclude_current_positions_from_observation": False}),
        (
            "Hopper-v5",
            {"terminate_when_unhealthy": False, "healthy_reward": 2.0, "healthy_state_range": (-1.0, 1.0), "reset_noise_scale": 0.1},
        ),
        ("Walker2d-v5", {"healthy_z_range": (1.0, 1.3), "healthy_angle_range": (-0.1, 0.1), "ctrl_cost_weight": 0.5}),
        ("Ant-v5", {"main_body": "front_left_leg", "contact_force_range": (-0.1, 0.5), "contact_cost_weight": 0.1}),
        (
            "Ant-v5",
            {
                "include_cfrc_ext_in_observation": False,
                "exclude_current_positions_from_observation": False,
                "terminate_when_unhealthy": False,
            },
        ),
        (
            "Humanoid-v5",
            {"include_cvel_in_observation": False, "include_qfrc_actuator_in_observation": False, "terminate_when_unhealthy": False},
        ),
        ("Humanoid-v5", {"contact_cost_weight": 1e-2, "contact_cost_range": (0.5, 1.0), "terminate_when_unhealthy": False}),
        ("Swimmer-v5", {"ctrl_cost_weight": 0.1, "exclude_current_positions_from_observation": False}),
        ("InvertedDoublePendulum-v5", {"healthy_reward": 3.0, "reset_noise_scale": 0.02}),
        ("Reacher-v5", {"reward_dist_weight": 2.0, "reward_control_weight": 0.3}),
    ],
)
def test_options_mean_what_they_mean_in_gymnasium(env: str, options: dict):
    assert_same_episodes(ENVIRONMENTS[env](2, **options), originals(env, 2, **options), 40, seed=5, reward_tolerance=TOLERANCE)


def test_another_model_file_is_taken():
    options = {"xml_file": "walker2d.xml"}
    assert_same_episodes(ENVIRONMENTS["Walker2d-v5"](2, **options), originals("Walker2d-v5", 2, **options), 20, reward_tolerance=TOLERANCE)


@pytest.mark.parametrize("env", ["HalfCheetah-v5", "Ant-v5", "Humanoid-v5", "Reacher-v5", "InvertedDoublePendulum-v5"])
def test_a_saved_state_continues_exactly(env: str):
    assert_continues(lambda: ENVIRONMENTS[env](3, max_episode_steps=25), steps=20)


@pytest.mark.parametrize("env", ["Hopper-v5", "Ant-v5"])
def test_threads_change_nothing(env: str):
    one, three = ENVIRONMENTS[env](7, nthread=1), ENVIRONMENTS[env](7, nthread=3)
    assert (one.nthread, three.nthread) == (1, 3)
    assert_same_episodes(three, one, 30)
    three.close()


def test_a_copy_does_not_depend_on_its_neighbours():
    together, alone = Driver(ENVIRONMENTS["Walker2d-v5"](4), 0), ENVIRONMENTS["Walker2d-v5"](1)
    following = alone.begin([0], [9])
    observation = together.environments.begin([2], [9])
    np.testing.assert_array_equal(observation, following)
    draws = np.random.default_rng(0)
    for _ in range(20):
        actions = draws.uniform(-1, 1, (4, 6)).astype(np.float32)
        a, b = together.environments.step(actions), alone.step(actions[2:3])
        np.testing.assert_array_equal(a.observation[2], b.observation[0])
        assert a.info["x_velocity"][2] == b.info["x_velocity"][0]


def test_wrong_requests_are_refused():
    with pytest.raises(TypeError, match="no option 'gravity'"):
        ENVIRONMENTS["Ant-v5"](1, gravity=3.0)
    with pytest.raises(TypeError, match="gravity"):
        ENVIRONMENTS["Reacher-v5"](1, gravity=3.0)
    with pytest.raises(UsageError, match="nthread"):
        ENVIRONMENTS["Hopper-v5"](1, nthread=0)
    with pytest.raises(UsageError, match="there is no file"):
        ENVIRONMENTS["Hopper-v5"](1, xml_file="hoper.xml")
    hopper = ENVIRONMENTS["Hopper-v5"](2)
    with pytest.raises(ValueError, match="shape"):
        hopper.load(ENVIRONMENTS["Walker2d-v5"](2).state())
