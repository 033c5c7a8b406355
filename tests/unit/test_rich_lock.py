"""The rich lock is a lock behind a rotation: what is seen holds state and step and no more, right actions open it, and its chances are those of its options."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from environment_checks import assert_continues
from telos.core.errors import UsageError
from telos.environments.base import Driver
from telos.environments.registry import make_environments
from telos.environments.rich_lock import BAD, RichLock


def made(count: int, **options: object) -> RichLock:
    found = make_environments("telos/RichLock-v0", count, options=options)
    assert isinstance(found, RichLock)
    return found


def unrotated(observation: np.ndarray) -> np.ndarray:
    """The inverse of a Hadamard matrix is its transpose over its size."""
    size = observation.shape[1]
    return observation @ scipy.linalg.hadamard(size) / size


def test_what_is_seen_is_the_state_and_the_step_rotated_with_noise_on_their_entries() -> None:
    horizon, count = 6, 4000
    lock = made(count, horizon=horizon, noise=0.1, seed=2)
    assert lock.observation_space.shape == (16,)
    observation = lock.begin(range(count), range(count))
    draws = np.random.default_rng(0)
    for step in range(horizon):
        entries = unrotated(observation.astype(np.float64))
        expected = np.zeros((count, 16))
        expected[np.arange(count), lock.state_now] = 1
        expected[:, 3 + step] = 1
        apart = entries - expected
        assert np.abs(apart[:, horizon + 3 :]).max() < 1e-6
        noise = apart[:, : horizon + 3]
        assert np.abs(noise.mean(0)).max() < 5 * 0.1 / np.sqrt(count)
        assert noise.std(0) == pytest.approx(0.1, rel=0.08)
        assert np.abs(np.corrcoef(noise.T) - np.eye(horizon + 3)).max() < 5 / np.sqrt(count)
        before = noise
        observation = lock.step(np.where(draws.random(count) < 0.9, lock.best(), draws.integers(10, size=count))).observation
        fresh = unrotated(observation.astype(np.float64))[:, 3 + step + 1] - 1
        assert abs(np.corrcoef(before[:, 0], fresh)[0, 1]) < 5 / np.sqrt(count)


def test_right_actions_open_it_and_wrong_ones_earn_the_lure_at_its_chance() -> None:
    lock = made(3000, horizon=4, switch=0.3, lure=0.2, lure_chance=0.25, seed=1)
    lock.begin(range(3000), range(3000))
    assert abs(lock.state_now.mean() - 0.5) < 4 * np.sqrt(0.25 / 3000)
    for step in range(4):
        before = lock.state_now.copy()
        outcome = lock.step(lock.best())
        assert (lock.state_now < BAD).all()
        assert abs((lock.state_now != before).mean() - 0.3) < 4 * np.sqrt(0.21 / 3000)
        assert outcome.reward.tolist() == [float(step == 3)] * 3000
        assert outcome.terminated.all() == (step == 3)
    lock.begin(range(3000), range(3000, 6000))
    wrong = lock.step((lock.best() + 1) % 10)
    assert (lock.state_now == BAD).all()
    assert set(wrong.reward) == {0.0, 0.2}
    assert abs((wrong.reward > 0).mean() - 0.25) < 4 * np.sqrt(0.1875 / 3000)
    for _ in range(3):
        later = lock.step(lock.best())
        assert not later.reward.any()
    assert later.terminated.all()


def test_random_play_opens_it_with_the_probability_of_guessing() -> None:
    lock = made(2000, horizon=3, actions=2, seed=4)
    driver, draws = Driver(lock, 0), np.random.default_rng(1)
    opened = [driver.step(draws.integers(2, size=2000))[0].info["success"] for _ in range(3)][-1]
    assert abs(opened.mean() - 1 / 8) < 4 * np.sqrt(7 / 64 / 2000)


def test_an_episode_follows_from_seed_and_actions_whatever_other_copies_do_and_a_saved_state_goes_on() -> None:
    one, many, draws = made(1, seed=3), made(5, seed=3), np.random.default_rng(0)
    assert np.array_equal(one.begin([0], [7])[0], many.begin(range(5), [9, 9, 7, 1, 2])[2])
    for _ in range(10):
        actions = draws.integers(10, size=5)
        alone, among = one.step(actions[2:3]), many.step(actions)
        assert np.array_equal(alone.observation[0], among.observation[2])
        assert alone.reward[0] == among.reward[2]
    assert_continues(lambda: made(3, horizon=5, seed=1))
    assert not np.array_equal(made(1, seed=1).right, made(1, seed=2).right)


def test_numbers_out_of_range_are_refused() -> None:
    for options in ({"horizon": 0}, {"actions": 1}, {"switch": 2.0}, {"noise": -1.0}):
        with pytest.raises(UsageError):
            made(1, **options)
