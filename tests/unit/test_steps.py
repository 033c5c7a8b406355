"""Steps of recorded episodes: parts, returns, and what is refused."""

from __future__ import annotations

import dataclasses

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from telos.core.errors import DataError, UsageError
from telos.data.steps import Steps, inferred_space, joined


def made(lengths=(3, 2, 4), rewards=None, **other) -> Steps:
    """Episodes of the given lengths; observation t of all is t, the first and the last episode terminate."""
    n = sum(lengths)
    ends = np.cumsum(lengths) - 1
    ended, terminated = np.zeros(n, bool), np.zeros(n, bool)
    ended[ends] = True
    terminated[[ends[0], ends[-1]]] = True
    arrays = {
        "observation": np.arange(n, dtype=np.float64)[:, None],
        "action": np.arange(n) % 2,
        "reward": np.arange(1, n + 1) if rewards is None else rewards,
        "next_observation": np.arange(1.0, n + 1)[:, None],
        "terminated": terminated,
        "ended": ended,
    } | other
    return Steps.of(*arrays.values(), source="here")


def test_episodes_are_the_rows_between_ends():
    steps = made()
    assert steps.episodes == [slice(0, 3), slice(3, 5), slice(5, 9)]
    assert steps.lengths.tolist() == [3, 2, 4]
    assert [steps.place(row) for row in (0, 2, 3, 8)] == [(0, 0), (0, 2), (1, 0), (2, 3)]
    assert len(steps) == 9


def test_returns_are_the_sums_of_each_episode():
    assert made().returns.tolist() == [1 + 2 + 3, 4 + 5, 6 + 7 + 8 + 9]


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_to_go_discount_to_the_end_of_the_own_episode(gamma: float):
    draws = np.random.default_rng(0)
    steps = made((1, 5, 2, 1), rewards=draws.normal(size=9))
    expected = []
    for rows in steps.episodes:
        rewards = steps.reward[rows].astype(float)
        expected += [sum(gamma**k * r for k, r in enumerate(rewards[t:])) for t in range(len(rewards))]
    np.testing.assert_allclose(steps.returns_to_go(gamma), expected, rtol=1e-12)


def test_a_subset_keeps_whole_episodes_in_the_order_asked_for():
    part = made().subset([2, 0])
    assert part.reward.tolist() == [6, 7, 8, 9, 1, 2, 3]
    assert isinstance(part.next_observation, np.ndarray)
    assert part.next_observation[:, 0].tolist() == [6, 7, 8, 9, 1, 2, 3]
    assert part.lengths.tolist() == [4, 3]
    assert part.source == "here"
    with pytest.raises(UsageError, match="no episode 3"):
        made().subset([3])
    with pytest.raises(UsageError, match="no episode is left"):
        made().subset([])


def test_the_best_share_takes_episodes_of_the_highest_return_until_it_has_the_steps():
    steps = made((2, 2, 2, 2), rewards=[1, 1, 5, 5, 3, 3, 4, 4])
    assert steps.share(25, "best").returns.tolist() == [10]
    assert steps.share(26, "best").returns.tolist() == [10, 8]
    assert steps.share(75, "best").returns.tolist() == [10, 6, 8]
    assert steps.share(50, "first").returns.tolist() == [2, 10]
    assert steps.share(100).returns.tolist() == steps.returns.tolist()
    assert steps.share(1, "best").provenance["share"].startswith("the best 1 %")
    for wrong in (0, -1, 101, float("nan")):
        with pytest.raises(UsageError, match="share"):
            steps.share(wrong)
    with pytest.raises(UsageError, match="'worst'"):
        steps.share(10, "worst")  # type: ignore[arg-type]


def test_joining_keeps_all_episodes_and_adds_counts():
    one, two = made(), made((2,), terminated=[False, True])
    one = dataclasses.replace(one, counts={"dropped": 2})
    two = dataclasses.replace(two, counts={"dropped": 1, "read": 1})
    both = joined([one, two], "both")
    assert both.returns.tolist() == [6, 9, 30, 3]
    assert both.counts == {"dropped": 3, "read": 1}
    other = dataclasses.replace(two, action_space=Discrete(3))
    with pytest.raises(UsageError, match="other spaces"):
        joined([one, other], "both")


def test_dictionaries_of_observations_are_cut_like_arrays():
    seen = {"b": np.arange(9.0)[:, None], "a": np.arange(18, dtype=np.float32).reshape(9, 2)}
    steps = made(observation=seen, next_observation=seen)
    assert isinstance(steps.observation_space, Dict)
    assert steps.observation_space["a"].dtype == np.float32
    part = steps.subset([1])
    assert isinstance(part.observation, dict)
    assert part.observation["b"][:, 0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": [1, 2, float("nan"), 4, 5, 6, 7, 8, 9]}, "here: reward, episode 0, step 2: is nan"),
        ({"next_observation": np.array([[0.0]] * 7 + [[np.inf]] * 2)}, r"here: next_observation, episode 2, step 2, entry \[0\]: is inf"),
        ({"action": np.arange(8)}, "here: action: 8 rows, and reward has 9"),
        ({"next_observation": np.zeros((9, 2))}, "here: next_observation: is float64"),
        ({"next_observation": np.zeros((9, 1), np.float32)}, "here: next_observation: is float32"),
        ({"observation": {"a": np.zeros((9, 1))}}, "here: next_observation: is float64"),
        ({"terminated": [False, True] + [False] * 7}, "here: terminated, episode 0, step 1: the episode terminates here and goes on"),
        ({"ended": [True] + [False] * 8, "terminated": [False] * 9}, "here: ended: the last step does not end its episode"),
        ({"reward": np.ones((9, 1))}, "here: reward: is float32 of shape"),
        ({"action": np.array(["a"] * 9)}, "here: action: holds <U1, not numbers"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_place(change: dict, message: str):
    with pytest.raises(DataError, match=message):
        made(**change)


def test_no_steps_are_refused():
    with pytest.raises(DataError, match="holds no steps"):
        Steps.of(np.zeros((0, 1)), np.zeros(0), [], np.zeros((0, 1)), [], [], action_space=Discrete(2))


def test_values_must_fit_the_spaces_that_are_given():
    steps = made()
    with pytest.raises(DataError, match=r"action, episode 0, step 1: is 1, which is not in the space Discrete\(1\)"):
        dataclasses.replace(steps, action_space=Discrete(1))
    with pytest.raises(DataError, match=r"observation: has the shape \(1,\) a step"):
        dataclasses.replace(steps, observation_space=Box(-1, 1, (2,)))
    with pytest.raises(DataError, match="observation: is one array"):
        dataclasses.replace(steps, observation_space=Dict({"a": Box(-1, 1, (1,))}))
    with pytest.raises(DataError, match="choices, which are integers"):
        made(action=np.arange(9) / 2).__class__.of(
            steps.observation,
            np.arange(9) / 2,
            steps.reward,
            steps.next_observation,
            steps.terminated,
            steps.ended,
            action_space=Discrete(9),
        )


@pytest.mark.parametrize(
    ("values", "action", "expected"),
    [
        (np.array([0, 2, 1]), True, Discrete(3)),
        (np.array([-1, 1]), True, Discrete(3, start=-1)),
        (np.array([[0, 2], [1, 0]]), True, MultiDiscrete([2, 3])),
        (np.array([[0.5], [-0.2]]), True, Box(-1.0, 1.0, (1,), np.float64)),
        (np.array([[1.5, 0.0], [-0.5, 2.0]]), True, Box(np.array([-0.5, 0.0]), np.array([1.5, 2.0]), dtype=np.float64)),
        (np.zeros((2, 3), np.float32), False, Box(-np.inf, np.inf, (3,), np.float32)),
        (np.zeros((2, 20, 20, 3), np.uint8), False, Box(0, 255, (20, 20, 3), np.uint8)),
        (np.array([4, 1]), False, Discrete(5)),
        (np.array([True, False]), False, Discrete(2)),
    ],
)
def test_spaces_are_inferred_from_values(values: np.ndarray, action: bool, expected: gymnasium.Space):
    assert inferred_space(values, action) == expected
