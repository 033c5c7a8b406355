"""Estimates and intervals against values by hand, SciPy and closed forms."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats

from telos.core.errors import UsageError
from telos.evaluation import statistics as s

finite = st.floats(-1e6, 1e6, allow_nan=False)


def test_interquartile_mean_by_hand():
    assert s.interquartile_mean([7, 0, 1, 2, 3, 4, 5, 100]) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert s.interquartile_mean([1, 2, 30]) == pytest.approx(11)


@given(st.lists(finite, min_size=1, max_size=40))
def test_interquartile_mean_is_scipys_trimmed_mean(values):
    assert s.interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25), rel=1e-9, abs=1e-6)


def test_bootstrap_agrees_with_scipys_percentile_bootstrap():
    x = np.random.default_rng(3).exponential(size=60)
    ours = s.bootstrap_interval(x, np.mean, resamples=8000)
    theirs = stats.bootstrap((x,), np.mean, n_resamples=8000, method="percentile", rng=np.random.default_rng(4)).confidence_interval
    assert ours.estimate == pytest.approx(x.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.015)
    assert ours.high == pytest.approx(theirs.high, abs=0.015)
    assert ours.n == 60


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    trials = 400
    hits = sum(not s.bootstrap_interval(rng.normal(2.0, 1.0, 40), np.mean, level=0.9, resamples=300).excludes(2.0) for _ in range(trials))
    # The percentile bootstrap with n = 40 covers about 0.885; four standard errors of 400 trials are 0.064.
    assert 0.82 < hits / trials < 0.95


def test_stratified_bootstrap_never_mixes_tasks():
    rng = np.random.default_rng(0)
    scores = np.stack([rng.normal(0, 1, 10), rng.normal(1000, 1, 10)])
    stratified = s.bootstrap_interval(scores, np.mean)
    mixed = s.bootstrap_interval(scores.ravel(), np.mean)
    assert stratified.high - stratified.low < 2
    assert mixed.high - mixed.low > 200
    assert stratified.n == 10


def test_one_seed_has_no_interval_and_satisfies_no_predicate():
    interval = s.bootstrap_interval([3.0])
    assert interval.estimate == 3.0
    assert not interval.excludes(0.0)
    assert json.loads(json.dumps(interval.as_dict(), allow_nan=False))["low"] is None
    assert "no interval" in str(interval)
    assert s.paired_difference([[1.0]], [[9.0]]).high == math.inf


def test_interval_prints_estimate_bounds_level_and_n():
    assert str(s.Interval(0.61, 0.5, 0.7, 5)) == "0.610 [0.500, 0.700] (95 %, n = 5)"
    assert s.Interval(1234.5, 1200.0, 1300.0, 5, 0.9).short() == "1234 [1200, 1300]"
    assert s.Interval(0.00123, 0.001, 0.002, 5).short() == "0.00123 [0.00100, 0.00200]"


def test_same_seed_gives_the_same_interval_and_another_seed_another():
    x = np.random.default_rng(0).normal(size=20)
    assert s.bootstrap_interval(x, seed=1) == s.bootstrap_interval(x, seed=1)
    assert s.bootstrap_interval(x, seed=1) != s.bootstrap_interval(x, seed=2)


def test_higher_level_gives_a_wider_interval():
    x = np.random.default_rng(0).normal(size=30)
    narrow, wide = s.bootstrap_interval(x, level=0.8), s.bootstrap_interval(x, level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_pairs_are_drawn_together():
    base = np.random.default_rng(0).normal(0, 100, 30)
    interval = s.paired_difference(base + 1.0, base)
    assert interval.low == pytest.approx(1.0)
    assert interval.high == pytest.approx(1.0)
    matrix = base.reshape(3, 10)
    assert s.paired_difference(matrix + 1.0, matrix, s.interquartile_mean).high == pytest.approx(1.0)


def test_paired_difference_agrees_with_the_paired_t_interval_for_many_pairs():
    rng = np.random.default_rng(1)
    x, y = rng.normal(0.3, 1, 500), rng.normal(0, 1, 500)
    ours, theirs = s.paired_difference(x, y, resamples=4000), stats.ttest_rel(x, y).confidence_interval()
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=12), st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_probability_of_improvement_is_the_mann_whitney_statistic(x, y):
    expected = stats.mannwhitneyu(x, y).statistic / (len(x) * len(y))
    assert s.probability_of_improvement(x, y, resamples=5).estimate == pytest.approx(expected)


def test_probability_of_improvement_averages_tasks():
    x, y = [[1, 2, 3], [1, 2, 3]], [[0, 0], [9, 9]]
    interval = s.probability_of_improvement(x, y)
    assert interval.estimate == pytest.approx(0.5)
    assert interval.n == 2
    with pytest.raises(UsageError, match="tasks"):
        s.probability_of_improvement(x, [1, 2])


def test_performance_profile_by_hand():
    profile = s.performance_profile([[0.0, 1.0], [1.0, 2.0]], [-1.0, 0.0, 1.0, 2.0])
    np.testing.assert_allclose(profile.fraction, [1.0, 0.75, 0.25, 0.0])
    assert np.all(profile.low <= profile.fraction)
    assert np.all(profile.fraction <= profile.high)
    # Each of two seeds is drawn twice: 1/4 for none, 1/2 for one, 1/4 for both of the runs above 0 in the first task.
    np.testing.assert_allclose([profile.low[1], profile.high[1]], [0.5, 1.0])


def test_win_rate_counts_ties_as_asked():
    ours, theirs = [3, 1, 2, 2], [1, 3, 2, 1]
    assert s.win_rate(ours, theirs).estimate == pytest.approx(2.5 / 4)
    assert s.win_rate(ours, theirs, ties=0.0).estimate == pytest.approx(2 / 4)
    assert s.win_rate(ours, theirs, ties=1.0).estimate == pytest.approx(3 / 4)


def test_win_rate_interval_is_near_the_binomial_one():
    wins = np.arange(400) < 260
    ours = s.win_rate(wins, ~wins)
    theirs = stats.binomtest(260, 400).proportion_ci(method="wilson")
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


@pytest.mark.parametrize("n", [1, 3, 20])
def test_a_side_that_always_wins_gets_the_exact_binomial_interval(n):
    wins, losses = s.win_rate(np.ones(n), np.zeros(n)), s.win_rate(np.zeros(n), np.ones(n))
    exact = stats.binomtest(n, n).proportion_ci(method="exact")
    assert (wins.low, wins.high) == pytest.approx((exact.low, exact.high))
    assert (losses.low, losses.high) == pytest.approx((1 - exact.high, 1 - exact.low))


def test_all_ties_leave_the_win_rate_open_around_one_half():
    interval = s.win_rate(np.zeros(10), np.zeros(10))
    assert interval.estimate == 0.5
    assert 0.5 - interval.low == pytest.approx(interval.high - 0.5)
    assert interval.high > 0.6


def _length_case(n=300, seed=0):
    rng = np.random.default_rng(seed)
    length_ours, length_theirs = rng.normal(120, 20, n), rng.normal(100, 20, n)
    difference = length_ours - length_theirs
    score = 0.2 + 1.5 * np.tanh(difference / difference.std()) + rng.logistic(size=n)
    return score, np.zeros(n), length_ours, length_theirs


def test_length_controlled_win_rate_is_the_logistic_fit_at_zero_difference():
    ours, theirs, length_ours, length_theirs = _length_case()
    feature = np.tanh((length_ours - length_theirs) / np.std(length_ours - length_theirs))
    won = ours > theirs

    def loss(p):
        return -np.sum(special.log_expit(np.where(won, 1, -1) * (p[0] + p[1] * feature)))

    fit = optimize.minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    ours_now = s.length_controlled_win_rate(ours, theirs, length_ours, length_theirs, resamples=200)
    assert ours_now.estimate == pytest.approx(special.expit(fit.x[0]), abs=1e-4)
    assert ours_now.low < ours_now.estimate < ours_now.high


def test_length_control_removes_a_win_that_length_alone_explains():
    rng = np.random.default_rng(5)
    n = 800
    length_ours, length_theirs = rng.normal(115, 20, n), rng.normal(100, 20, n)
    difference = length_ours - length_theirs
    ours = 2.0 * np.tanh(difference / difference.std()) + rng.logistic(size=n)
    plain = s.win_rate(ours, np.zeros(n))
    controlled = s.length_controlled_win_rate(ours, np.zeros(n), length_ours, length_theirs, resamples=300)
    assert plain.low > 0.55
    assert not controlled.excludes(0.5)
    assert abs(controlled.estimate - 0.5) < 0.06


def test_length_controlled_win_rates_of_both_sides_sum_to_one():
    ours, theirs, length_ours, length_theirs = _length_case(100)
    there = s.length_controlled_win_rate(ours, theirs, length_ours, length_theirs, resamples=5).estimate
    back = s.length_controlled_win_rate(theirs, ours, length_theirs, length_ours, resamples=5).estimate
    assert there + back == pytest.approx(1.0, abs=1e-6)


def test_equal_lengths_leave_the_win_rate_as_it_is():
    ours, theirs, _, _ = _length_case(100)
    same = np.full(100, 40)
    controlled = s.length_controlled_win_rate(ours, theirs, same, same, resamples=5)
    assert controlled.estimate == pytest.approx(s.win_rate(ours, theirs).estimate, abs=1e-4)


def test_separated_wins_leave_the_length_controlled_interval_finite_and_wide():
    interval = s.length_controlled_win_rate([1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [5, 6, 7, 1, 2], [4] * 5)
    assert 0 < interval.low < 0.5 < interval.high < 1


def test_spearman_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 30), rng.integers(0, 5, 30)
    assert s.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert s.spearman([1, 2, 3], [1, 8, 27]) == pytest.approx(1.0)


def test_spearman_is_undefined_for_a_constant_or_two_points():
    assert math.isnan(s.spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(s.spearman([1, 2], [1, 2]))


def test_bootstrap_counts_do_not_depend_on_the_size_of_their_blocks():
    n = 1_000_001  # more than half a block: every row is its own
    blocks = list(s.bootstrap_counts(n, 3, seed=7))
    expected = np.random.default_rng(7).integers(0, n, size=(3, n))
    assert len(blocks) == 3
    for block, row in zip(blocks, expected, strict=True):
        np.testing.assert_array_equal(block[0], np.bincount(row, minlength=n))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: s.bootstrap_interval([1.0, math.nan]), r"values_per_seed: 1 of 2 values are NaN or infinite \(first at index 1\)"),
        (lambda: s.interquartile_mean([]), "x is empty"),
        (lambda: s.bootstrap_interval(np.zeros((2, 2, 2))), "3 axes"),
        (lambda: s.paired_difference([1, 2], [1, 2, 3]), "same units in the same order"),
        (lambda: s.win_rate([1, 2], [1, 2], ties=2.0), "ties is 2.0"),
        (lambda: s.length_controlled_win_rate([1, 2], [2, 1], [1], [1]), "2 scores and 1 lengths"),
        (lambda: s.bootstrap_interval([1, 2], level=95), "level is 95"),
        (lambda: s.bootstrap_interval([1, 2], resamples=0), "resamples is 0"),
    ],
)
def test_unusable_input_is_refused_by_name(call, message):
    with pytest.raises(UsageError, match=message):
        call()
