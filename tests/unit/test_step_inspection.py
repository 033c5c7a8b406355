"""What is said of offline data of control."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from telos.core.errors import UsageError
from telos.data.step_inspection import Grid, Spread, _hashed, inspect_steps, state_action_coverage, trajectory_quality
from telos.data.steps import Steps, joined


def made(states, actions, rewards, lengths, terminated=(), **other) -> Steps:
    """Episodes of the given lengths; `terminated` are the numbers of those that do not end by a cut."""
    ends = np.cumsum(lengths) - 1
    ended, over = np.zeros(sum(lengths), bool), np.zeros(sum(lengths), bool)
    ended[ends], over[ends[list(terminated)]] = True, True
    return Steps.of(states, np.asarray(actions), rewards, states, over, ended, **other)


def grid_world(states, actions, **other) -> Steps:
    return made(
        np.asarray(states), actions, np.zeros(len(states)), [len(states)], observation_space=Discrete(9), action_space=Discrete(4), **other
    )


def test_episodes_returns_lengths_and_ends_by_hand():
    states = np.arange(6.0)[:, None]
    found = inspect_steps(made(states, [0, 1, 1, 1, 0, 1], [1, 0, 3, 0, 0, 5], [2, 3, 1], terminated=[1], env="Own-v0", source="here"))
    assert (found.episodes, found.steps, found.terminated) == (3, 6, 1)
    assert (found.returns.mean, found.returns.lowest, found.returns.median, found.returns.highest) == (3, 1, 3, 5)
    assert found.returns.deviation == pytest.approx(np.std([1, 3, 5]))
    assert (found.lengths.mean, found.lengths.highest) == (2, 3)
    assert found.zero_rewards == 0.5
    assert dict(found.actions) == {"0": "33.3 %", "1": "66.7 %"}
    rows = {row[0]: row[1] for row in found.rows()}
    assert rows["ends"] == "1 terminated (33.3 %), 2 cut"
    assert rows["format"] == "steps, recorded in Own-v0"
    assert rows["action 1"] == "66.7 %"
    assert rows["observations"] == "1 float64, from -inf to inf"
    assert all(len(row) == 2 and all(isinstance(cell, str) for cell in row) for row in found.rows())


def test_ranges_of_actions_stand_against_their_bounds():
    actions = np.array([[-2.0, 0.5], [2.0, 0.25], [1.0, 0.0], [3.0, 0.1]])
    space = Box(np.array([-2.0, -1.0]), np.array([2.0, 1.0]), dtype=np.float64)
    found = inspect_steps(made(np.zeros((4, 1)), actions, np.zeros(4), [4], action_space=space))
    assert found.actions_outside == 1
    assert "from -2 to 3); bounds -2 and 2, at one of them in 75.0 %" in dict(found.actions)["0"]
    assert found.constant == 1
    many = made(np.zeros((4, 1)), np.tile(actions, 6), np.zeros(4), [4])
    assert len(inspect_steps(many).actions) == 9
    assert inspect_steps(many).actions[-1] == ("…", "4 further dimensions, from -2 to 3")


def test_observations_outside_their_space_are_counted():
    seen = {"a": np.array([[0.0], [2.0], [0.5]]), "b": np.array([0, 1, 2])}
    space = Dict({"a": Box(-1, 1, (1,), np.float64), "b": Discrete(3)})
    assert inspect_steps(made(seen, [0, 1, 0], np.zeros(3), [3], observation_space=space)).observations_outside == 1


def test_identical_steps_and_episodes_are_counted():
    draws = np.random.default_rng(0)
    states, actions, rewards = draws.normal(size=(3, 2)), draws.normal(size=(3, 1)), draws.normal(size=3)
    order = [0, 1, 2, 0, 1, 2, 2, 1, 0]
    found = inspect_steps(made(states[order], actions[order], rewards[order], [3, 3, 3]))
    assert found.identical_steps == 6
    assert found.identical_episodes == 1, "the same steps in another order are another episode"
    other = rewards[order].copy()
    other[4] += 1e-3
    found = inspect_steps(made(states[order], actions[order], other, [3, 3, 3]))
    assert (found.identical_steps, found.identical_episodes) == (5, 0)


def test_hashes_tell_rows_apart_that_differ_in_one_bit_or_in_order():
    values = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, np.nextafter(2.0, 3.0)], [1.0, 4.0], [1.0, 2.0], [0.0, 0.0], [-0.0, 0.0]])
    assert len(np.unique(_hashed([values]))) == 5
    assert _hashed([values])[0] == _hashed([values])[4]
    # All numbers of a wide range, as an independent count.
    draws = np.random.default_rng(1)
    whole = draws.integers(0, 40, (5000, 2))
    assert len(np.unique(_hashed([whole[:, :1], whole[:, 1:]]))) == len({tuple(row) for row in whole.tolist()})


def test_saco_is_the_ratio_of_unique_pairs():
    reference = grid_world([0, 1, 2, 3, 3, 3], [0, 0, 0, 0, 1, 1])
    assert state_action_coverage(grid_world([0, 0, 1, 1], [0, 0, 0, 0]), reference) == pytest.approx(2 / 5)
    assert state_action_coverage(reference, reference) == 1
    wider = grid_world([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 0, 1, 2, 3])
    assert state_action_coverage(wider, reference) == pytest.approx(8 / 5)
    with pytest.raises(UsageError, match="is no reference for"):
        state_action_coverage(made(np.zeros((2, 1)), [0, 1], [0, 0], [2]), reference)


def test_continuous_pairs_are_counted_in_intervals_of_the_reference():
    """Against a count of rounded tuples."""
    draws = np.random.default_rng(0)
    states, actions = draws.uniform(-1, 1, (3000, 2)), draws.uniform(-1, 1, (3000, 1))
    reference = made(states, actions, np.zeros(3000), [3000])
    part = reference.__class__.of(
        states[:50] * 2,
        actions[:50],
        np.zeros(50),
        states[:50],
        np.zeros(50, bool),
        np.arange(50) == 49,
        action_space=reference.action_space,
    )

    def cells(seen: np.ndarray, done: np.ndarray) -> set:
        both, base = np.concatenate([seen, done], 1), np.concatenate([states, actions], 1)
        edges = [np.linspace(*np.percentile(base[:, i], [1, 99]), 6)[1:-1] for i in range(3)]
        return {tuple(int(np.searchsorted(edges[i], row[i], side="right")) for i in range(3)) for row in both}

    expected = len(cells(states[:50] * 2, actions[:50])) / len(cells(states, actions))
    assert state_action_coverage(part, reference, bins=5) == pytest.approx(expected)
    assert Grid.of(reference, 5).cells(reference)[0].shape == (3000,)


def test_tq_lies_between_the_random_and_the_best_return():
    steps = made(np.zeros((4, 1)), [0, 1, 0, 1], [1, 2, 3, 4], [2, 2])
    assert trajectory_quality(steps, 1, 9) == pytest.approx((5 - 1) / 8)
    with pytest.raises(UsageError, match="must be above"):
        trajectory_quality(steps, 3, 3)
    assert inspect_steps(steps).tq is None
    assert inspect_steps(steps, returns=(0, 10)).tq == pytest.approx(0.5)
    carried = dataclasses.replace(steps, provenance={"ref_min_score": 0.0, "ref_max_score": 5.0})
    assert inspect_steps(carried).tq == pytest.approx(1.0)


def test_a_narrow_data_set_has_near_neighbours_and_few_cells():
    draws = np.random.default_rng(0)
    wide = draws.normal(size=(2000, 3))
    centres = draws.normal(size=(4, 3))
    narrow = centres[draws.integers(4, size=2000)] + 0.01 * draws.normal(size=(2000, 3))
    one, other = (inspect_steps(made(states, np.zeros(2000, int), np.zeros(2000), [2000])).coverage for states in (wide, narrow))
    assert one.neighbour is not None
    assert other.neighbour is not None
    assert other.neighbour < one.neighbour / 10
    assert other.pairs < one.pairs / 10


def test_pictures_have_no_distance_and_few_states_neither():
    pictures = np.random.default_rng(0).integers(0, 255, (12, 20, 20, 3), dtype=np.uint8)
    found = inspect_steps(made(pictures, np.zeros(12, int), np.zeros(12), [12]))
    assert found.coverage.neighbour is None
    assert found.coverage.states == 12
    assert inspect_steps(made(np.zeros((3, 1)), [0, 0, 1], [0, 0, 0], [3])).coverage.neighbour is None


def test_saco_and_counts_come_into_the_rows():
    reference = grid_world([0, 1, 2, 3], [0, 0, 0, 0])
    part = grid_world([0, 1], [0, 0], counts={"steps left out": 3})
    rows = {row[0]: row[1] for row in inspect_steps(part, reference=reference, returns=(-1, 1)).rows()}
    assert rows["SACo (of the reference's pairs)"] == "0.500"
    assert rows["TQ (0 random, 1 best online)"] == "0.500"
    assert rows["noted: steps left out"] == "3"
    assert inspect_steps(joined([part, part], "twice")).identical_episodes == 1
    assert str(Spread.of(np.array([1.0, 3.0]))) == "2 ± 1 (quartiles 1.5 / 2 / 2.5, from 1 to 3)"
