"""Replay gives back what was put in: around the ring, over several steps, in proportion to priorities, and after a restart."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from telos.core.errors import Failure, UsageError
from telos.data.replay import Priorities, Replay

SHAPES: dict[str, Any] = {"observation": ((1,), np.float32), "action": ((), np.int64)}


def replay_of(capacity: int, copies: int = 1, **options: Any) -> Replay:
    return Replay(capacity, copies, **SHAPES, **options)


def add(replay: Replay, row: int, *, terminated: Any = False, truncated: Any = False, reward: float | None = None) -> None:
    """Row t of copy i sees 10 t + i, does 100 t + i, earns t + i / 10 and is led to 10 (t + 1) + i + 0.5."""
    i = np.arange(replay.copies)
    terminated, truncated = np.broadcast_to(terminated, i.shape), np.broadcast_to(truncated, i.shape)
    replay.add(
        observation=(10.0 * row + i)[:, None].astype(np.float32),
        next_observation=(10.0 * (row + 1) + i + 0.5)[:, None].astype(np.float32),
        action=100 * row + i,
        reward=row + i / 10 if reward is None else np.full(len(i), reward),
        terminated=terminated,
        ended=terminated | truncated,
    )


# -- the ring ---------------------------------------------------------------------------------------------------------------------------------------


def test_what_was_added_is_taken() -> None:
    replay = replay_of(20, copies=2)
    for t in range(5):
        add(replay, t)
    batch = replay.take(np.array([0, 3, 9]), gamma=0.9)  # rows 0, 1, 4 of copies 0, 1, 1
    assert batch.observation[:, 0].tolist() == [0.0, 11.0, 41.0]
    assert batch.next_observation[:, 0].tolist() == [10.5, 21.5, 51.5]
    assert batch.action.tolist() == [0, 101, 401]
    np.testing.assert_allclose(batch.reward, [0.0, 1.1, 4.1], rtol=1e-6)
    np.testing.assert_allclose(batch.discount, [0.9] * 3, rtol=1e-6)
    assert batch.weight.tolist() == [1.0] * 3
    assert batch.index.tolist() == [0, 3, 9]
    assert batch.batch_size == (3,)
    weighted = replay.take(np.array([0, 3]), gamma=0.9, weight=np.array([0.25, 2.0]))
    assert weighted.weight.tolist() == [0.25, 2.0]


@pytest.mark.parametrize(("capacity", "copies", "slack"), [(6, 1, 0), (6, 2, 0), (7, 2, 3), (5, 3, 7)])
def test_exactly_the_newest_steps_are_drawn_and_each_alike(capacity: int, copies: int, slack: int) -> None:
    replay = replay_of(capacity, copies, slack=slack)
    rows = -(-capacity // copies)
    draws = np.random.default_rng(0)
    for t in range(25):
        add(replay, t)
        kept = min(t + 1, rows)
        assert len(replay) == kept * copies
        if t in (0, 3, 24):
            places = replay.draw(4000, draws)
            expected = np.arange((t + 1 - kept) * copies, (t + 1) * copies)
            found, counts = np.unique(places, return_counts=True)
            assert found.tolist() == expected.tolist()
            mean = 4000 / len(expected)
            assert (abs(counts - mean) < 5 * np.sqrt(mean)).all()
            batch = replay.take(places, gamma=1.0)
            row, copy = np.divmod(places, copies)
            assert np.array_equal(batch.observation[:, 0].numpy(), 10 * row + copy)
            assert np.array_equal(batch.action.numpy(), 100 * row + copy)


def test_a_batch_is_not_changed_by_later_steps() -> None:
    replay = replay_of(2)
    for t in range(2):
        add(replay, t)
    batch = replay.take(np.array([0, 1]), gamma=1.0)
    before = batch.observation.clone()
    for t in range(2, 4):
        add(replay, t)
    assert batch.observation.equal(before)


# -- several steps ----------------------------------------------------------------------------------------------------------------------------------


def by_loop(ends: dict[int, str], written: int, place: int, gamma: float, steps: int) -> tuple[float, float, float]:
    """(reward, next observation, discount) of one copy whose rewards are the row's number: walked step by step."""
    total, factor, t = 0.0, 1.0, place
    while True:
        total += factor * t
        factor *= gamma
        if t in ends or t == place + steps - 1 or t + 1 >= written:
            break
        t += 1
    return total, 10.0 * (t + 1) + 0.5, 0.0 if ends.get(t) == "terminated" else factor


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("slack", [0, 4])
def test_sums_over_several_steps_stop_at_ends_and_at_the_head_of_the_ring(steps: int, slack: int) -> None:
    ends = {3: "terminated", 4: "cut", 8: "cut", 9: "terminated", 15: "terminated", 19: "cut"}
    replay = replay_of(7, slack=slack)
    for t in range(23):
        add(replay, t, terminated=ends.get(t) == "terminated", truncated=ends.get(t) == "cut")
        oldest = max(0, t + 1 - 7)
        places = np.arange(oldest, t + 1)
        batch = replay.take(places, gamma=0.9, steps=steps)
        expected = [by_loop(ends, t + 1, int(place), 0.9, steps) for place in places]
        np.testing.assert_allclose(batch.reward.numpy(), [e[0] for e in expected], rtol=1e-5)
        np.testing.assert_allclose(batch.next_observation[:, 0].numpy(), [e[1] for e in expected])
        np.testing.assert_allclose(batch.discount.numpy(), [e[2] for e in expected], rtol=1e-5)
        assert batch.observation[:, 0].tolist() == [10.0 * place for place in places]


def test_sums_over_several_steps_stay_in_their_copy() -> None:
    replay = replay_of(12, copies=3)
    for t in range(4):
        add(replay, t, terminated=np.array([False, t == 1, False]), truncated=np.array([t == 2, False, False]))
    batch = replay.take(np.array([0, 1, 2]), gamma=0.5, steps=4)
    np.testing.assert_allclose(batch.reward, [0 + 1 / 2 + 2 / 4, 0.1 + 1.1 / 2, 0.2 + 1.2 / 2 + 2.2 / 4 + 3.2 / 8], rtol=1e-6)
    np.testing.assert_allclose(batch.discount, [1 / 8, 0.0, 1 / 16], rtol=1e-6)
    assert batch.next_observation[:, 0].tolist() == [30.5, 21.5, 42.5]


# -- files ------------------------------------------------------------------------------------------------------------------------------------------


def test_files_continue_after_they_are_opened_again(tmp_path: Path) -> None:
    first = replay_of(6, slack=2, folder=tmp_path / "replay")
    for t in range(9):
        add(first, t, terminated=t == 7)
    state = first.state()
    assert "arrays" not in state
    copied = tmp_path / "copied"
    shutil.copytree(tmp_path / "replay", copied)
    del first
    again = replay_of(6, slack=2, folder=copied)
    assert len(again) == 0
    again.load(state)
    whole = replay_of(6)
    for t in range(9):
        add(whole, t, terminated=t == 7)
    for t in range(9, 14):
        places = np.arange(len(again)) + t - len(again)
        one, two = (replay.take(places, gamma=0.9, steps=3) for replay in (again, whole))
        for name in ("observation", "next_observation", "action", "reward", "discount"):
            assert getattr(one, name).equal(getattr(two, name)), name
        add(again, t)
        add(whole, t)


def test_what_is_kept_in_memory_travels_in_the_state() -> None:
    first = replay_of(6)
    for t in range(8):
        add(first, t)
    again = replay_of(6)
    again.load({name: (dict(value) if isinstance(value, dict) else value) for name, value in first.state().items()})
    places = np.arange(2, 8)
    assert first.take(places, gamma=0.9).observation.equal(again.take(places, gamma=0.9).observation)


@pytest.mark.parametrize("after", [1, 5, 6])
@pytest.mark.parametrize("copies", [1, 2, 4])
def test_slack_keeps_what_a_resumed_run_looks_back_on(tmp_path: Path, after: int, copies: int) -> None:
    """At most `slack` single steps are added after a checkpoint; then the process dies. All that could be drawn at the checkpoint is still there."""
    slack = 6 * copies
    replay = replay_of(10, copies, slack=slack, folder=tmp_path)
    for t in range(31):
        add(replay, t, truncated=t % 5 == 4)
    state = replay.state()
    oldest = (31 - -(-10 // copies)) * copies
    places = np.arange(oldest, 31 * copies)
    before = replay.take(places, gamma=0.9, steps=3)
    for t in range(31, 31 + after):
        add(replay, t, reward=99.0)
    del replay
    resumed = replay_of(10, copies, slack=slack, folder=tmp_path)
    resumed.load(state)
    assert np.unique(resumed.draw(3000, np.random.default_rng(0))).tolist() == places.tolist()
    found = resumed.take(places, gamma=0.9, steps=3)
    for name in ("observation", "next_observation", "action", "reward", "discount"):
        assert getattr(found, name).equal(getattr(before, name)), name


def test_files_of_other_options_are_refused(tmp_path: Path) -> None:
    replay_of(6, folder=tmp_path)
    with pytest.raises(Failure, match="options have changed"):
        replay_of(8, folder=tmp_path)
    with pytest.raises(Failure, match="options have changed"):
        Replay(6, 1, ((2,), np.float32), ((), np.int64), folder=tmp_path)


def test_a_broken_file_is_refused_with_its_name(tmp_path: Path) -> None:
    replay_of(6, folder=tmp_path)
    path = tmp_path / "reward.npy"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises((UsageError, Failure), match=r"reward\.npy"):
        replay_of(6, folder=tmp_path)


# -- priorities -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100])
def test_sums_hold_after_many_changes(size: int) -> None:
    draws = np.random.default_rng(size)
    tree, plain = Priorities(size), np.zeros(size)
    for _ in range(200):
        places = draws.integers(0, size, draws.integers(1, 6))
        values = draws.random(len(places)) * 10.0 ** draws.integers(-6, 4)
        tree.set(places, values)
        for place, value in zip(places, values):  # the last of repeated places counts
            plain[place] = value
    assert tree.total == pytest.approx(plain.sum(), rel=1e-12)
    places, probability = tree.draw(1000, draws)
    np.testing.assert_allclose(probability, plain[places] / plain.sum(), rtol=1e-9)


def test_places_are_drawn_in_proportion() -> None:
    """A stratified draw has less than binomial spread: five deviations of it bound the counts."""
    values = np.array([1.0, 0.0, 4.0, 0.5, 0.0, 2.5, 8.0])
    tree = Priorities(7)
    tree.set(np.arange(7), values)
    draws = np.random.default_rng(0)
    counts = np.zeros(7)
    for _ in range(500):
        places, probability = tree.draw(64, draws)
        np.testing.assert_allclose(probability, values[places] / 16)
        counts += np.bincount(places, minlength=7)
    share = values / 16
    assert (abs(counts - 32000 * share) <= 5 * np.sqrt(32000 * share)).all()
    assert counts[1] == counts[4] == 0


def test_each_part_of_the_total_gives_one_place() -> None:
    """Sixteen equal priorities, sixteen draws: each once."""
    tree = Priorities(16)
    tree.set(np.arange(16), np.full(16, 0.3))
    for seed in range(20):
        assert sorted(tree.draw(16, np.random.default_rng(seed))[0].tolist()) == list(range(16))


def test_no_mass_is_never_drawn_however_sums_are_rounded() -> None:
    draws = np.random.default_rng(1)
    tree = Priorities(37)
    for _ in range(300):
        values = np.where(draws.random(37) < 0.7, 0.0, 10.0 ** draws.uniform(-12, 6, 37))
        values[draws.integers(37)] = 1e-9
        tree.set(np.arange(37), values)
        places, probability = tree.draw(64, draws)
        assert (values[places] > 0).all()
        assert (probability > 0).all()
        assert (places < 37).all()


def test_the_last_targets_are_drawn_from_places_that_exist() -> None:
    """A draw from the very end of the total, with a size that is no power of two."""

    class AtTheEnd(np.random.Generator):
        def random(self, size: int) -> np.ndarray:  # type: ignore[override]
            return np.full(size, np.nextafter(1.0, 0.0))

    tree = Priorities(5)
    tree.set(np.arange(5), np.array([0.1, 0.2, 0.3, 0.1, 0.1]))
    for count in (1, 3, 7, 64):
        places, _ = tree.draw(count, AtTheEnd(np.random.PCG64(0)))
        assert places.max() <= 4
