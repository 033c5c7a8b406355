"""Best-of-n estimates against an enumeration of all subsets, and the bound on the divergence against the exact value."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from telos.algorithms.language.best_of_n import Config, expected_best, kl_bound, select, subset_weights


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8, unique=True), st.data())
def test_the_estimate_is_the_mean_over_all_subsets(rewards: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(rewards)))
    wanted = np.mean([max(subset) for subset in itertools.combinations(rewards, k)])
    assert expected_best(np.array(rewards), k) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=7), st.data())
def test_ties_change_nothing(rewards: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(rewards)))
    wanted = np.mean([max(subset) for subset in itertools.combinations(rewards, k)])
    assert expected_best(np.array(rewards, dtype=float), k) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(0, 1000), st.data())
def test_another_score_is_averaged_over_the_answers_that_the_reward_picks(n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    rng = np.random.default_rng(seed)
    rewards, gold = rng.normal(size=n), rng.normal(size=n)
    wanted = np.mean([gold[max(subset, key=lambda i: rewards[i])] for subset in itertools.combinations(range(n), k)])
    assert expected_best(rewards, k, gold) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_the_estimate_is_unbiased() -> None:
    """Over all equally likely draws of N = 4 from three values, the estimate of best-of-2 averages to the true expectation."""
    values, p = np.array([0.0, 1.0, 3.0]), np.array([0.5, 0.3, 0.2])
    truth = sum(p[i] * p[j] * max(values[i], values[j]) for i in range(3) for j in range(3))
    mean = sum(np.prod(p[list(draw)]) * expected_best(values[list(draw)], 2) for draw in itertools.product(range(3), repeat=4))
    assert mean == pytest.approx(truth, rel=1e-12)


def test_weights_are_a_distribution_and_its_ends_are_mean_and_maximum() -> None:
    for n in (1, 2, 9, 64):
        for k in {1, (n + 1) // 2, n}:
            weights = subset_weights(n, k)
            assert weights.sum() == pytest.approx(1.0, rel=1e-12)
            assert (weights[: k - 1] == 0).all()
    rewards = np.random.default_rng(0).normal(size=(3, 6))
    np.testing.assert_allclose(expected_best(rewards, 1), rewards.mean(1))
    np.testing.assert_allclose(expected_best(rewards, 6), rewards.max(1))
    best = [expected_best(rewards, k) for k in range(1, 7)]
    assert all((b >= a - 1e-12).all() for a, b in itertools.pairwise(best))


@pytest.mark.parametrize("k", [0, 7, -1])
def test_a_subset_that_cannot_be_drawn_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"k must lie in 1 … 6"):
        expected_best(np.zeros(6), k)


@pytest.mark.parametrize("k", [1, 2, 5, 64])
def test_the_bound_is_the_divergence_for_continuous_rewards(k: int) -> None:
    """With rewards u uniform on (0, 1) the best of k has density k u^(k−1): KL = ∫ k u^(k−1) log(k u^(k−1)) du."""
    exact, _ = integrate.quad(lambda u: k * u ** (k - 1) * math.log(k * u ** (k - 1)) if u > 0 else 0.0, 0, 1)
    assert kl_bound(k) == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_the_bound_is_above_the_divergence_for_discrete_policies(k: int) -> None:
    p = np.array([0.4, 0.3, 0.2, 0.1])  # by rising reward
    cdf = np.cumsum(p)
    best = cdf**k - np.append(0, cdf[:-1]) ** k
    assert best.sum() == pytest.approx(1.0)
    assert float((best * np.log(best / p)).sum()) < kl_bound(k)


def test_the_best_valid_answer_is_kept_and_the_first_of_equals() -> None:
    rewards = np.array([[1.0, 3.0, 2.0], [5.0, 5.0, -np.inf], [-np.inf, -np.inf, -9.0]])
    assert select(Config(), rewards).tolist() == [1, 0, 2]
