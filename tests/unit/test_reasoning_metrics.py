"""Measures over repeated answers, held against brute force over subsets, against enumeration of chance, and against calculations by hand."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import hypergeom

from telos.core.errors import UsageError
from telos.evaluation import reasoning as r

QUICK = settings(max_examples=25, deadline=None, derandomize=True)


@st.composite
def voters(draw):
    """One problem: 2 to 7 samples with an answer (or none), right or wrong, a whole-numbered score and weight; and a k."""
    n = draw(st.integers(2, 7))
    answers = draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=n, max_size=n))
    right = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    scores = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    return answers, right, scores, draw(st.integers(1, n))


def subsets(n: int, k: int):
    return list(itertools.combinations(range(n), k))


def mean(values) -> Fraction:
    found = list(values)
    return sum(found, Fraction(0)) / len(found)


def vote(answers, right, weights, chosen) -> Fraction:
    """The accuracy of a weighted vote among `chosen`, ties shared, the winner represented by any of its voters."""
    total: Counter[str] = Counter()
    for i in chosen:
        if answers[i] is not None:
            total[answers[i]] += weights[i]
    if not total:
        return Fraction(0)
    winners = [a for a in total if total[a] == max(total.values())]
    return mean(mean(Fraction(right[i]) for i in chosen if answers[i] == a) for a in winners)


# pass@k, pass^k, best of n, votes --------------------------------------------------------------------------------------------------------


@QUICK
@given(voters())
def test_expectations_equal_the_means_over_all_subsets(problem):
    answers, right, scores, k = problem
    chosen = subsets(len(right), k)
    one = [1] * len(right)
    best = [mean(Fraction(right[i]) for i in c if scores[i] == max(scores[j] for j in c)) for c in chosen]
    assert r.pass_at_k([right], k)[0] == pytest.approx(float(mean(Fraction(any(right[i] for i in c)) for c in chosen)))
    assert r.pass_hat_k([right], k)[0] == pytest.approx(float(mean(Fraction(all(right[i] for i in c)) for c in chosen)))
    assert r.best_of_n([right], [scores], k)[0] == pytest.approx(float(mean(best)))
    assert r.majority_at_k([right], [answers], k)[0] == pytest.approx(float(mean(vote(answers, right, one, c) for c in chosen)))
    weighted = float(mean(vote(answers, right, scores, c) for c in chosen))
    assert r.weighted_majority_at_k([right], [answers], [scores], k)[0] == pytest.approx(weighted)


def test_pass_at_k_by_hand():
    right = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert r.pass_at_k(right, 2).tolist() == pytest.approx([1 / 2, 5 / 6, 0, 1])
    assert r.pass_hat_k(right, 2).tolist() == pytest.approx([0, 1 / 6, 0, 1])


def test_pass_at_k_of_ten_thousand_samples_equals_exact_integers():
    n, c = 10_000, 3
    right = np.zeros((1, n))
    right[0, :c] = 1
    for k in (1, 100, 5000, 9998):
        exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert r.pass_at_k(right, k)[0] == pytest.approx(float(exact), rel=1e-10)


@QUICK
@given(voters())
def test_best_of_n_under_the_truth_is_pass_at_n_and_every_measure_of_one_sample_is_accuracy(problem):
    answers, right, scores, k = problem
    assert r.best_of_n([right], [right], k)[0] == pytest.approx(r.pass_at_k([right], k)[0])
    accuracy = np.mean(right)
    assert r.pass_at_k([right], 1)[0] == pytest.approx(accuracy)
    assert r.best_of_n([right], [scores], 1)[0] == pytest.approx(accuracy)
    spoken = [0 if a is None else x for a, x in zip(answers, right, strict=True)]
    assert r.majority_at_k([right], [answers], 1)[0] == pytest.approx(np.mean(spoken))


def test_majority_of_hundreds_of_samples_agrees_with_drawn_subsets():
    rng = np.random.default_rng(0)
    answers = rng.choice(["7", "8", "9", "10"], p=[0.33, 0.3, 0.27, 0.1], size=400).tolist()
    right = [int(a == "7") for a in answers]
    exact = r.majority_at_k([right], [answers], 40)[0]
    codes = np.array([["7", "8", "9", "10"].index(a) for a in answers])
    drawn = np.argsort(rng.random((20_000, 400)), axis=1)[:, :40]
    counts = np.stack([(codes[drawn] == c).sum(1) for c in range(4)], 1)
    top = counts == counts.max(1, keepdims=True)
    assert exact == pytest.approx((top[:, 0] / top.sum(1)).mean(), abs=4 * 0.5 / math.sqrt(20_000))
    assert r.majority_at_k([right], [answers], 400)[0] == float(codes.tolist().count(0) == np.bincount(codes).max())


def test_weighted_votes_over_random_subsets_come_near_the_unweighted_exact_ones():
    rng = np.random.default_rng(1)
    answers = [rng.choice(["a", "b", "c"], size=30).tolist() for _ in range(20)]
    right = [[int(a == "a") for a in row] for row in answers]
    exact = r.majority_at_k(right, answers, 9)
    drawn = r.weighted_majority_at_k(right, answers, np.full((20, 30), 0.7), 9, resamples=2000, seed=3)
    assert np.abs(drawn - exact).max() < 5 * 0.5 / math.sqrt(2000)
    assert not np.array_equal(drawn, exact)


def test_a_heavy_vote_outweighs_many_light_ones():
    right, answers = [[0, 0, 0, 1]], [["a", "a", "a", "b"]]
    assert r.majority_at_k(right, answers, 4)[0] == 0
    assert r.weighted_majority_at_k(right, answers, [[0.1, 0.1, 0.1, 0.4]], 4)[0] == 1
    assert r.weighted_majority_at_k(right, answers, [[0.1, 0.1, 0.1, 0.3]], 4)[0] == pytest.approx(0.5)  # 0.1 + 0.1 + 0.1 ties with 0.3


# Entropies -------------------------------------------------------------------------------------------------------------------------------


def test_answer_entropy_by_hand():
    found = r.answer_entropy([["1", "1", "1", "1"], ["1", "2", "3", None], ["1", "1", "2", "2"]])
    assert found.tolist() == pytest.approx([0, math.log(4), math.log(2)])
    assert math.copysign(1, found[0]) == 1


def test_token_entropy_counts_tokens_alike_and_padding_not_at_all():
    entropy = [[1.0, 2.0, math.nan], [4.0, math.nan, math.nan]]
    mask = [[True, True, False], [True, False, False]]
    assert r.mean_token_entropy(entropy, mask) == pytest.approx(7 / 3)


# Support ---------------------------------------------------------------------------------------------------------------------------------

BASE = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
TRAINED = [[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]


def test_support_measures_by_hand():
    found = r.support(r.problem_support(BASE, TRAINED))
    assert (found.preserved, found.expanded, found.shrunk, found.outside) == (2, 1, 1, 1)
    assert found.retention.estimate == pytest.approx(2 / 3)
    assert found.discovery.estimate == pytest.approx(1 / 3)
    assert found.dynamics.estimate == pytest.approx(2 * (2 / 3) * (1 / 3))  # their sum is 1
    assert found.change.estimate == 0
    assert found.retention.n == 3


def test_a_threshold_asks_for_more_than_a_lucky_hit():
    found = r.support(r.problem_support(BASE, TRAINED, threshold=0.25))
    assert (found.preserved, found.expanded, found.shrunk, found.outside) == (1, 0, 1, 3)


def test_distinct_right_answers_are_counted_once_and_wrong_ones_never():
    counts = r.answer_support([[1, 1, 0, 1]], [["x", "x", "z", "y"]], [[1, 1, 1, 0]], [["y", "w", "w", "z"]])
    assert counts.tolist() == [[1, 1, 1, 0]]  # y kept, w new, x lost; z is wrong
    counts = r.answer_support([[1, 1, 0, 1]], [["x", "x", "z", "y"]], [[1, 1, 1, 0]], [["y", "w", "w", "z"]], threshold=0.25)
    assert counts.tolist() == [[0, 1, 1, 1]]


@QUICK
@given(st.lists(st.tuples(*[st.integers(0, 1)] * 8), min_size=1, max_size=12))
def test_every_problem_is_in_one_category_and_exchanging_the_models_exchanges_expansion_and_shrinkage(rows):
    values = np.array(rows)
    there = r.problem_support(values[:, :4], values[:, 4:])
    back = r.problem_support(values[:, 4:], values[:, :4])
    assert there.sum(1).tolist() == [1] * len(rows)
    assert np.array_equal(there[:, [0, 2, 1, 3]], back)
    assert r.support(there, resamples=50).change.estimate == pytest.approx(-r.support(back, resamples=50).change.estimate, nan_ok=True)


def test_same_samples_neither_expand_nor_shrink():
    found = r.support(r.problem_support(BASE, BASE))
    assert (found.expanded, found.shrunk) == (0, 0)
    assert found.retention.estimate == 1
    assert found.change.estimate == found.change.low == found.change.high == 0
    assert found.retention.low == pytest.approx(0.025 ** (1 / 3))  # Clopper and Pearson: nothing lost in three problems


def test_chance_is_the_mean_over_all_exchanges_of_samples():
    base, trained = [[1, 0, 0]], [[1, 0, 0, 0]]
    pool = np.array(base[0] + trained[0])
    cells = []
    for mine in subsets(7, 3):
        rest = [i for i in range(7) if i not in mine]
        cells.append(r.problem_support(pool[None, list(mine)], pool[None, rest], 0.3)[0])
    assert r.support_by_chance(base, trained, 0.3)[0] == pytest.approx(np.mean(cells, axis=0))
    # At threshold 0 only the problem's one right sample in 7 + 9 crosses: P(base drew it) = 7 / 16.
    assert r.support_by_chance([[1] + [0] * 6], [[0] * 9])[0] == pytest.approx([0, 9 / 16, 7 / 16, 0])
    n, total = 40, 5
    never = hypergeom.pmf(0, 2 * n, total, n)
    assert r.support_by_chance([[1] * 3 + [0] * 37], [[1] * 2 + [0] * 38])[0][1:3] == pytest.approx([never, never])


def test_what_cannot_be_measured_is_nan_without_bounds():
    found = r.support(r.problem_support([[0, 0], [0, 0]], [[0, 0], [0, 0]]))
    for measure in (found.retention, found.discovery, found.dynamics, found.change):
        assert math.isnan(measure.estimate)
        assert (measure.low, measure.high) == (-math.inf, math.inf)
    assert found.outside == 2


def test_dynamics_are_zero_when_nothing_is_new():
    assert r.support(r.problem_support([[1, 0], [1, 1]], [[1, 0], [0, 1]])).dynamics.estimate == 0


def test_an_answer_of_the_detectable_probability_is_missed_as_often_as_allowed():
    p = r.detectable_probability(64, 0.05)
    assert (1 - p) ** 64 == pytest.approx(0.05)
    assert r.detectable_probability(8192) == pytest.approx(-math.log(0.05) / 8192, rel=1e-3)  # the paper's 3.66e-4


# Intervals -------------------------------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_rate_has_the_width_of_its_standard_error():
    values = np.random.default_rng(0).random(400)
    found = r.rate_interval(values, resamples=4000)
    error = values.std() / math.sqrt(400)
    assert found.estimate == pytest.approx(values.mean())
    assert (found.high - found.low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.06)
    assert found.n == 400


def test_rates_that_never_vary_still_have_an_interval():
    never = r.rate_interval(np.zeros(50))
    assert (never.estimate, never.low) == (0, 0)
    assert never.high == pytest.approx(1 - 0.025 ** (1 / 50))
    assert r.rate_interval(np.ones(50)).low == pytest.approx(0.025 ** (1 / 50))
    assert r.rate_interval([1.0]).low == -math.inf


def test_a_ratio_weighs_problems_by_their_denominator():
    assert r.ratio_interval([1.0, 6.0], [1.0, 2.0]).estimate == pytest.approx(7 / 3)


# Budgets ---------------------------------------------------------------------------------------------------------------------------------


def test_truncated_answers_are_wrong_or_as_forced():
    right, tokens = [[1, 1], [0, 1]], [[2, 5], [1, 9]]
    assert r.accuracy_at_budgets(right, tokens, [1, 2, 5, 9]).tolist() == [[0, 0.5, 1, 1], [0, 0, 0, 0.5]]
    forced = np.zeros((2, 2, 4))
    forced[1, 1] = 1  # the long answer had the result from the beginning
    forced[1, 0] = 1  # changes nothing: this answer fits every budget, and is wrong
    assert r.accuracy_at_budgets(right, tokens, [1, 2, 5, 9], forced).tolist() == [[0, 0.5, 1, 1], [0.5, 0.5, 0.5, 0.5]]


@QUICK
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_regret_is_the_sum_of_what_is_missing_to_the_best(success):
    found = r.cumulative_regret(success)
    assert found.tolist() == pytest.approx([sum(1 - s for s in success[: k + 1]) for k in range(len(success))])
    assert (np.diff(found, prepend=0) >= 0).all()


def test_regret_in_tokens_is_the_area_between_the_curves():
    # Right with 0.2 for 10 tokens, then with 0.9 for 30, against a policy that is at 0.5 and 1.
    found = r.cumulative_regret([[0.2, 0.9]], best=[0.5, 1.0], widths=[10, 30])
    assert found.tolist() == [[pytest.approx(3.0), pytest.approx(6.0)]]


def test_regret_differences_do_not_depend_on_the_comparator():
    a, b = [0.1, 0.4, 0.5], [0.3, 0.3, 0.9]
    one = r.cumulative_regret(a) - r.cumulative_regret(b)
    other = r.cumulative_regret(a, best=[0.2, 0.6, 0.95]) - r.cumulative_regret(b, best=[0.2, 0.6, 0.95])
    assert one == pytest.approx(other)


# Entropy and reward ----------------------------------------------------------------------------------------------------------------------


def test_the_fit_finds_the_law_that_made_the_points():
    h = np.linspace(0.05, 1.2, 9)
    found = r.fit_entropy(h, -0.3 * np.exp(h) + 0.9)
    assert (found.a, found.b, found.ceiling, found.r_squared) == pytest.approx((0.3, 0.9, 0.6, 1.0))
    assert found.predict([0.0]) == pytest.approx([0.6])


def test_the_fit_is_the_least_squares_one():
    rng = np.random.default_rng(0)
    h = rng.random(30)
    reward = 0.5 - 0.2 * np.exp(h) + rng.normal(0, 0.05, 30)
    found = r.fit_entropy(h, reward)
    slope, intercept = np.polyfit(np.exp(h), reward, 1)
    assert (-found.a, found.b) == pytest.approx((slope, intercept))
    assert found.r_squared == pytest.approx(np.corrcoef(np.exp(h), reward)[0, 1] ** 2)


def _entropy(logits):
    return -(softmax(logits, -1) * log_softmax(logits, -1)).sum(-1)


def test_entropy_change_is_the_derivative_of_the_entropy_along_the_logits():
    rng = np.random.default_rng(2)
    logits, direction = rng.normal(0, 1.5, (4, 6)), rng.normal(0, 1, (4, 6))
    step = 1e-5
    measured = (_entropy(logits + step * direction) - _entropy(logits - step * direction)) / (2 * step)
    assert r.entropy_change(softmax(logits, -1), direction) == pytest.approx(measured, rel=1e-6)


@pytest.mark.parametrize("update", ["policy-gradient", "natural"])
def test_predicted_entropy_change_is_what_one_small_update_does(update):
    rng = np.random.default_rng(3)
    logits, reward = rng.normal(0, 1, (3, 5)), rng.normal(0, 1, (3, 5))
    p = softmax(logits, -1)
    advantage = reward - (p * reward).sum(-1, keepdims=True)
    if update == "policy-gradient":
        # The gradient of E_π r in the logits, by differences.
        moved = np.eye(5)[:, None, :] * 1e-6
        gain = ((softmax(logits + moved, -1) - softmax(logits - moved, -1)) * reward).sum(-1) / 2e-6
        gradient = gain.T
    else:
        gradient = advantage
    rate = 1e-5
    measured = _entropy(logits + rate * gradient) - _entropy(logits)
    assert r.predicted_entropy_change(p, advantage, rate, update) == pytest.approx(measured, rel=2e-3)


@pytest.mark.parametrize("update", ["policy-gradient", "natural"])
def test_sampled_entropy_change_approaches_the_exact_one(update):
    rng = np.random.default_rng(4)
    p = softmax(rng.normal(0, 1, 6))
    advantage = rng.normal(0, 1, 6)
    advantage -= p @ advantage
    drawn = rng.choice(6, p=p, size=200_000)
    exact = r.predicted_entropy_change(p, advantage, 0.1, update)
    assert r.sampled_entropy_change(np.log(p)[drawn], advantage[drawn], 0.1, update) == pytest.approx(float(exact), rel=0.05)


def test_raising_what_is_likely_and_good_lowers_entropy_and_the_mask_decides_what_counts():
    assert r.predicted_entropy_change([0.7, 0.2, 0.1], [1.0, -1.0, -2.0], 0.1) < 0
    assert r.predicted_entropy_change([0.7, 0.2, 0.1], [-1.0, 1.0, 2.0], 0.1) > 0
    logs, values = np.log([[0.9, 0.1, 0.5]]), [[1.0, -1.0, 50.0]]
    found = r.sampled_entropy_change(logs, values, 1.0, mask=[[True, True, False]])
    assert found == pytest.approx(-math.log(9) / 2)  # deviations of ±log(9)/2 and ±1


# Refusals --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: r.pass_at_k([[0.5, 1]], 1), "0 (wrong) and 1 (right)"),
        (lambda: r.pass_at_k([[0, 1]], 3), "there are 2 samples a problem"),
        (lambda: r.best_of_n([[0, 1]], [[0.1]], 1), "scores has shape (1, 1)"),
        (lambda: r.majority_at_k([[0, 1]], [["a"]], 1), "rows of 2"),
        (lambda: r.weighted_majority_at_k([[0, 1]], [["a", "b"]], [[-1, 1]], 1), "0 or more"),
        (lambda: r.problem_support([[0, 1]], [[0, 1], [1, 1]]), "they must be the same"),
        (lambda: r.problem_support([[0, 1]], [[0, 1]], threshold=1.0), "to below 1"),
        (lambda: r.support([[1, 0, 0]]), "3 columns"),
        (lambda: r.rate_interval([0.5, 1.5]), "shares"),
        (lambda: r.accuracy_at_budgets([[1]], [[3]], [2], forced=[[1]]), "(problems, samples, budgets)"),
        (lambda: r.cumulative_regret([0.5, 0.5], widths=[1]), "2 numbers of tokens"),
        (lambda: r.fit_entropy([0.1, 0.1, 0.1], [1, 2, 3]), "1 different entropies"),
        (lambda: r.entropy_change([0.5, 0.6], [0, 0]), "add up to 1"),
        (lambda: r.predicted_entropy_change([1.0], [0.0], 0.1, "newton"), "not 'newton'"),  # type: ignore[arg-type]
        (lambda: r.sampled_entropy_change([0.1], [1.0], 0.1), "at least two"),
        (lambda: r.mean_token_entropy([1.0], [False]), "no token"),
        (lambda: r.detectable_probability(0), "at least one sample"),
    ],
)
def test_impossible_requests_say_what_is_wrong(call, message):
    with pytest.raises(UsageError) as caught:
        call()
    assert message in str(caught.value)
