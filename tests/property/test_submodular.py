"""Set functions are monotone and submodular, sets grown item by item have the value of the whole, and greedy choice keeps its bound."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telos.environments.submodular import landscape
from telos.functional.submodular import Facility, LogDet, SetFunction, best, greedy

ITEMS = 7


def random_function(kind: str, seed: int) -> SetFunction:
    draws = np.random.default_rng(seed)
    if kind == "coverage":
        return Facility((draws.random((ITEMS, 12)) < 0.3) * draws.random(12))
    if kind == "facility":
        return Facility(draws.exponential(size=(ITEMS, 5)))
    features = draws.normal(size=(ITEMS, 3 if kind == "design" else 20)) / 2
    return LogDet(features @ features.T, float(draws.uniform(0.05, 2)), scale=0.5 if kind == "information" else 1.0)


KINDS = st.sampled_from(["coverage", "facility", "design", "information"])
SETS = st.sets(st.integers(0, ITEMS - 1))


@settings(max_examples=150, deadline=None)
@given(KINDS, st.integers(0, 2**31), SETS, SETS, st.integers(0, ITEMS - 1))
def test_an_item_never_lowers_the_value_and_adds_the_less_the_more_is_there(kind: str, seed: int, few: set, more: set, item: int) -> None:
    function = random_function(kind, seed)
    small, large = sorted(few & more), sorted(few | more)
    to_small = function.value([*small, item]) - function.value(small)
    to_large = function.value([*large, item]) - function.value(large)
    assert to_large >= -1e-9
    assert to_small >= to_large - 1e-9 or item in small
    assert function.value([]) == 0


@settings(max_examples=100, deadline=None)
@given(KINDS, st.integers(0, 2**31), st.lists(st.tuples(*[st.integers(0, ITEMS - 1)] * 2), max_size=9))
def test_sets_grown_side_by_side_have_the_values_of_the_whole(kind: str, seed: int, steps: list) -> None:
    """Two copies, of which the second skips every other step; items repeat."""
    function = random_function(kind, seed)
    memory: Any = function.empty(2)
    chosen: list[list[int]] = [[], []]
    totals = np.zeros(2)
    for t, items in enumerate(steps):
        rows = np.array([0, 1] if t % 2 else [0])
        expected = function.gains(memory, rows)[np.arange(len(rows)), np.array(items)[rows]]
        gain = function.add(memory, rows, np.array(items)[rows])
        np.testing.assert_allclose(gain, expected, atol=1e-12)
        totals[rows] += gain
        for row in rows:
            chosen[row].append(items[row])
    np.testing.assert_allclose(totals, [function.value(items) for items in chosen], atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(KINDS, st.integers(0, 2**31), st.integers(1, 4))
def test_greedy_choice_keeps_its_share_of_the_best_set(kind: str, seed: int, count: int) -> None:
    function = random_function(kind, seed)
    items, value = greedy(function, count)
    _, most = best(function, count)
    assert value == pytest.approx(function.value(items))
    assert (1 - 1 / math.e) * most - 1e-9 <= value <= most + 1e-9


def test_greedy_can_miss_the_best_set() -> None:
    """Four places of worth 1, 1.1, 1.1 and 1: the item that covers the middle two is taken first and makes half of each other useless."""
    function = Facility(np.array([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]]) * np.array([1, 1.1, 1.1, 1]))
    assert greedy(function, 2) == ([0, 1], pytest.approx(3.2))
    assert best(function, 2) == ((1, 2), pytest.approx(4.2))


def test_mutual_information_is_half_the_log_ratio_of_variances() -> None:
    """Of one place: ½ log(1 + k/σ²); of two that are one: ½ log(1 + 2k/σ²)."""
    function = LogDet(np.full((2, 2), 3.0), 0.5, scale=0.5)
    assert function.value([0]) == pytest.approx(0.5 * math.log(1 + 3 / 0.5))
    assert function.value([0, 1]) == pytest.approx(0.5 * math.log(1 + 6 / 0.5))


def test_wrong_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Facility(np.array([[1.0, -0.1]]))
    with pytest.raises(ValueError, match="square"):
        LogDet(np.ones((2, 3)), 1.0)


@pytest.mark.parametrize("objective", ["coverage", "information", "design", "diversity"])
def test_landscapes_are_those_of_their_seed(objective: Any) -> None:
    one, again, other = (landscape(objective, 4, seed) for seed in (1, 1, 2))
    cells = [0, 5, 6, 15]
    assert one.value(cells) == again.value(cells)
    assert (one.value(cells) == other.value(cells)) == (objective == "information")  # whose kernel has nothing random
    assert one.value(range(16)) > one.value(cells) > 0
