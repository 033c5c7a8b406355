"""Verdicts on made-up trajectories whose truth is known, and fits against the curves that made them."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from telos.core.errors import UsageError
from telos.evaluation.over_optimisation import Checkpoint, fit_gold, judge

KLS = np.linspace(0, 40, 9)


def _trajectory(proxy, gold, prompts=200, noise=1.0, seed=0):
    """Scores around proxy(d) and gold(d) with a shared difficulty per prompt and independent noise."""
    rng = np.random.default_rng(seed)
    difficulty = rng.normal(size=prompts)
    return [
        Checkpoint(
            step=50 * i,
            kl=kl,
            proxy=proxy(np.sqrt(kl)) + difficulty + noise * rng.normal(size=prompts),
            gold=gold(np.sqrt(kl)) + difficulty + noise * rng.normal(size=prompts),
        )
        for i, kl in enumerate(KLS)
    ]


def rising(d):
    return 0.5 * d


def hump(d):
    return d * (0.8 - 0.13 * d)


def nothing(d):
    return 0.0 * d


def test_a_hump_of_gold_under_a_rising_proxy_is_over_optimised():
    result = judge(_trajectory(rising, hump))
    assert result.verdict == "over-optimised"
    assert result.status == "bad"
    assert result.gold_fall.low > 0
    assert result.proxy_gain.low > 0
    assert result.points[result.peak].kl in (5.0, 10.0, 15.0)  # the curve's own maximum is at KL 9.5
    assert result.gold_fall.estimate == pytest.approx(hump(np.sqrt(result.points[result.peak].kl)) - hump(np.sqrt(40)), abs=0.3)


def test_gold_that_rises_with_the_proxy_is_improving():
    result = judge(_trajectory(rising, lambda d: 0.3 * d))
    assert result.verdict == "improving"
    assert result.status == "good"
    assert result.spearman > 0.9


def test_noise_around_constant_gold_is_rarely_called_over_optimised():
    verdicts = Counter(judge(_trajectory(rising, nothing, prompts=60, seed=seed), resamples=300).verdict for seed in range(150))
    # About 2.5 % by construction; comparing with the best of eight checkpoints without correction gives about 20 %.
    assert verdicts["over-optimised"] <= 10
    assert verdicts["inconclusive"] > 120


def test_constant_gold_measured_well_is_flat():
    result = judge(_trajectory(rising, nothing, noise=0.1))
    assert result.verdict == "flat"
    assert result.gold_gain.high <= result.flat_margin


def test_a_gain_that_may_be_large_is_not_flat():
    rng = np.random.default_rng(0)
    first, change = (stats.zscore(rng.normal(size=200)) for _ in range(2))
    scores = [(first, first), (first + 1, first + 0.3 + 2.5 * change)]
    result = judge([Checkpoint(i, float(i), *pair) for i, pair in enumerate(scores)])
    assert -result.flat_margin < result.gold_gain.low < 0 < result.flat_margin < result.gold_gain.high
    assert result.verdict == "inconclusive"


def test_gold_that_falls_together_with_the_proxy_is_degraded():
    result = judge(_trajectory(lambda d: -rising(d), lambda d: -0.3 * d))
    assert result.verdict == "degraded"
    assert result.status == "bad"


def test_gold_that_falls_while_the_proxy_drops_from_its_height_is_degraded():
    def collapse(d):
        return np.where(d < 6, 0.8 * d, 1.0)

    result = judge(_trajectory(collapse, lambda d: np.where(d < 6, 0.5 * d, 0.0)))
    assert result.proxy_gain.low > 0
    assert result.proxy_since_peak.high < 0
    assert result.verdict == "degraded"


def test_a_dip_that_recovers_is_no_over_optimisation():
    result = judge(_trajectory(rising, lambda d: np.where((d > 2) & (d < 5), -1.0, 0.3 * d)))
    assert result.verdict == "improving"


def test_few_prompts_decide_nothing():
    result = judge(_trajectory(rising, hump, prompts=7))
    assert result.verdict == "inconclusive"
    assert "7 prompts" in result.reason


def test_one_prompt_has_no_intervals_and_survives_json():
    result = judge(_trajectory(rising, hump, prompts=1))
    assert result.verdict == "inconclusive"
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["gold_fall"]["low"] is None


def test_with_two_checkpoints_the_fall_has_the_paired_interval():
    rng = np.random.default_rng(2)
    first = rng.normal(size=400)
    last = first - 0.1 + rng.normal(size=400)
    result = judge([Checkpoint(0, 0.0, first, first), Checkpoint(1, 5.0, first + 1, last)], resamples=5000)
    expected = stats.ttest_rel(first, last).confidence_interval()
    assert result.gold_fall.estimate == pytest.approx((first - last).mean())
    assert result.gold_fall.low == pytest.approx(expected.low, abs=0.01)
    assert result.gold_fall.high == pytest.approx(expected.high, abs=0.01)


def test_the_interval_of_the_fall_widens_with_the_number_of_checkpoints_searched():
    trajectory = _trajectory(rising, hump)
    pair = judge([trajectory[2], trajectory[-1]])
    many = judge(trajectory)
    assert many.gold_fall.estimate == pytest.approx(pair.gold_fall.estimate)
    assert many.gold_fall.high - many.gold_fall.low > 1.1 * (pair.gold_fall.high - pair.gold_fall.low)


def test_samples_of_one_prompt_are_averaged_before_prompts_are_drawn():
    rng = np.random.default_rng(0)
    grouped = [Checkpoint(i, float(i), rng.normal(size=(20, 4)), rng.normal(size=(20, 4))) for i in range(3)]
    means = [Checkpoint(c.step, c.kl, np.mean(c.proxy, axis=1), np.mean(c.gold, axis=1)) for c in grouped]
    assert judge(grouped).as_dict() == judge(means).as_dict()
    assert judge(grouped).prompts == 20


def test_results_repeat_and_are_plain_json():
    trajectory = _trajectory(rising, hump, prompts=30)
    record = judge(trajectory, seed=3).as_dict()
    assert record == judge(trajectory, seed=3).as_dict()
    again = json.loads(json.dumps(record, allow_nan=False))
    assert again["verdict"] == "over-optimised"
    assert [fit["form"] for fit in again["fits"]] == ["best-of-n", "rl"]
    assert len(again["points"]) == 9


def test_negative_kl_estimates_are_taken_as_zero_and_counted():
    scores = np.random.default_rng(0).normal(size=(2, 10))
    result = judge([Checkpoint(0, [-0.02, 0.01], *scores), Checkpoint(1, 3.0, *scores)])
    assert result.kl_clipped == 1
    assert result.points[0].kl == 0.0


def test_the_best_of_n_form_is_recovered_exactly():
    d = np.sqrt(KLS)
    fits, note = fit_gold(KLS, 0.25 + d * (0.8 - 0.13 * d))
    best = fits[0]
    assert best.form == "best-of-n"
    assert (best.alpha, best.beta, best.offset) == pytest.approx((0.8, 0.13, 0.25))
    assert best.r_squared == pytest.approx(1.0)
    assert best.peak_kl == pytest.approx((0.8 / 0.26) ** 2)
    assert best.n == 8
    assert "measured" in note
    assert fits[1].r_squared < best.r_squared


def test_the_rl_form_is_recovered_exactly_and_peaks_where_its_maximum_is():
    d = np.sqrt(KLS[1:])
    fits, _ = fit_gold(KLS, np.concatenate([[0.0], d * (0.9 - 0.5 * np.log(d))]))
    rl = fits[1]
    assert (rl.alpha, rl.beta) == pytest.approx((0.9, 0.5))
    assert rl.peak_kl is not None
    grid = np.linspace(0, 20, 200_001)
    assert grid[np.argmax(rl.gold(grid))] == pytest.approx(rl.peak_kl, abs=1e-3)
    assert "R² = 1.000" in str(rl)


def test_without_a_reference_checkpoint_the_offset_is_fitted():
    kl = np.array([1.0, 4.0, 9.0, 16.0, 25.0])
    d = np.sqrt(kl)
    fits, note = fit_gold(kl, -2.0 + d * (0.8 - 0.13 * d))
    assert fits[0].offset_fitted
    assert (fits[0].alpha, fits[0].beta, fits[0].offset) == pytest.approx((0.8, 0.13, -2.0))
    assert "fitted too" in note


def test_a_curve_that_never_turns_has_no_peak():
    d = np.sqrt(KLS)
    fits, _ = fit_gold(KLS, d * (0.1 + 0.05 * d))
    assert fits[0].peak_kl is None


@pytest.mark.parametrize("kl", [[0.0, 1.0, 2.0], [0.0, 3.0, 3.0, 3.0], [1.0, 2.0, 3.0]])
def test_too_few_different_distances_give_no_fit_and_the_reason(kl):
    fits, note = fit_gold(kl, np.arange(len(kl)))
    assert fits == ()
    assert "no fit" in note


def _scores(n):
    return np.arange(float(n))


@pytest.mark.parametrize(
    ("trajectory", "message"),
    [
        ([Checkpoint(0, 0.0, _scores(9), _scores(9))], "at least 2 checkpoints"),
        ([Checkpoint(5, 0.0, _scores(9), _scores(9)), Checkpoint(5, 1.0, _scores(9), _scores(9))], "steps must increase"),
        ([Checkpoint(0, 0.0, _scores(9), _scores(9)), Checkpoint(1, 1.0, _scores(9), _scores(8))], "same prompts"),
        ([Checkpoint(0, 0.0, _scores(9), _scores(8)), Checkpoint(1, 1.0, _scores(9), _scores(8))], "same completions"),
        ([Checkpoint(0, 0.0, _scores(9), _scores(9)), Checkpoint(1, np.nan, _scores(9), _scores(9))], "kl at step 1"),
        ([Checkpoint(0, 0.0, _scores(9), np.full(9, np.nan)), Checkpoint(1, 1.0, _scores(9), _scores(9))], "gold at step 0: 9 of 9"),
    ],
)
def test_unusable_trajectories_are_refused_by_name(trajectory, message):
    with pytest.raises(UsageError, match=message):
        judge(trajectory)
