"""Estimates with intervals: the arithmetic behind every number that a report or a claim states.

Intervals are percentile bootstraps. The unit that is resampled is the unit that would be drawn anew if the study were repeated:
seeds for training runs (stratified: within each task), prompts for completions.

Sources: Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (interquartile mean, stratified
bootstrap, probability of improvement, performance profiles); Dubois et al. 2024, "Length-Controlled AlpacaEval" (equation 2, here
without the term for the difficulty of the instruction, which can only be fitted on many models at once).

With few units a percentile bootstrap is too narrow: a nominal 95 % interval for the mean of normal values covers about 75 % of the time
with n = 3, 84 % with n = 5 and 90 % with n = 10. That is why n stands beside every interval. One unit has no interval at all: its bounds
are infinite, so that no predicate on it can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from telos.core.errors import Failure, UsageError

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], float]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. `n` is the number of units behind it: seeds per task, or prompts.

    The bounds are infinite where the data allow no interval (n = 1).
    """

    estimate: float
    low: float
    high: float
    n: int
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.short()} ({100 * self.level:g} %, n = {self.n})"

    def short(self) -> str:
        """Estimate and bounds without level and n, for tables that state those once."""
        decimals = _decimals(self.estimate, self.low, self.high)
        if not (math.isfinite(self.low) and math.isfinite(self.high)):
            return f"{self.estimate:.{decimals}f} [no interval]"
        return f"{self.estimate:.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"

    def excludes(self, value: float) -> bool:
        """True when `value` lies outside the interval."""
        return value < self.low or value > self.high

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; an infinite or undefined number becomes None."""
        return {
            "estimate": finite_or_none(self.estimate),
            "low": finite_or_none(self.low),
            "high": finite_or_none(self.high),
            "n": self.n,
            "level": self.level,
        }


@dataclass(frozen=True)
class PerformanceProfile:
    """Fraction of runs that score above each threshold, [thresholds], with a pointwise band. `n` is seeds per task."""

    thresholds: Floats
    fraction: Floats
    low: Floats
    high: Floats
    n: int
    level: float = 0.95


def interquartile_mean(x: ArrayLike) -> float:
    """Mean of the middle half of all values of `x` (any shape).

    floor(n / 4) values are cut at each end, so up to three values give the plain mean. Raises UsageError on an empty or non-finite array.
    """
    values = np.sort(checked(x, "x").ravel())
    cut = values.size // 4
    return float(values[cut : values.size - cut].mean())


def bootstrap_interval(
    values_per_seed: ArrayLike,
    statistic: Statistic = interquartile_mean,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of `statistic` over seeds.

    `values_per_seed` is [seeds], or [tasks, seeds]; then seeds are drawn within each task (stratified) and `statistic` sees a matrix of
    the same shape. Raises UsageError on an empty, non-finite or higher-dimensional array.
    """
    values = checked(values_per_seed, "values_per_seed", dimensions=(1, 2))
    _check_settings(level, resamples)
    estimate = float(statistic(values))
    n = values.shape[-1]
    if n == 1:
        return _no_interval(estimate, level)
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(_resample(values, _indices(rng, values.shape))) for _ in range(resamples)])
    return _percentiles(estimate, draws, n, level)


def paired_difference(
    x: ArrayLike,
    y: ArrayLike,
    statistic: Statistic = np.mean,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """statistic(x) - statistic(y), where x[..., i] and y[..., i] belong to the same seed or prompt and are drawn together.

    Both are [seeds] or [tasks, seeds]. Raises UsageError when the shapes differ.
    """
    first, second = _checked_pair(x, y, "x", "y", dimensions=(1, 2))
    _check_settings(level, resamples)
    estimate = float(statistic(first)) - float(statistic(second))
    n = first.shape[-1]
    if n == 1:
        return _no_interval(estimate, level)
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for i in range(resamples):
        index = _indices(rng, first.shape)
        draws[i] = statistic(_resample(first, index)) - statistic(_resample(second, index))
    return _percentiles(estimate, draws, n, level)


def probability_of_improvement(x: ArrayLike, y: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """P(X > Y) + P(X = Y) / 2 for a run of x and an independent run of y on the same task, averaged over tasks.

    x is [seeds] or [tasks, seeds]; y has the same number of tasks and may have another number of seeds. n is the smaller number of seeds.
    """
    first = np.atleast_2d(checked(x, "x", dimensions=(1, 2)))
    second = np.atleast_2d(checked(y, "y", dimensions=(1, 2)))
    if first.shape[0] != second.shape[0]:
        raise UsageError(f"x has {first.shape[0]} tasks and y has {second.shape[0]}; give the same tasks in the same order")
    _check_settings(level, resamples)
    estimate = _improvement(first, second)
    n = min(first.shape[1], second.shape[1])
    if n == 1:
        return _no_interval(estimate, level)
    rng = np.random.default_rng(seed)
    draws = np.array(
        [
            _improvement(_resample(first, _indices(rng, first.shape)), _resample(second, _indices(rng, second.shape)))
            for _ in range(resamples)
        ]
    )
    return _percentiles(estimate, draws, n, level)


def performance_profile(
    scores: ArrayLike, thresholds: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> PerformanceProfile:
    """Fraction of runs with score > threshold, averaged over tasks, for every threshold.

    `scores` is [seeds] or [tasks, seeds], `thresholds` [thresholds]. With one seed the band is [0, 1].
    """
    values = np.atleast_2d(checked(scores, "scores", dimensions=(1, 2)))
    levels = checked(thresholds, "thresholds", dimensions=(1,))
    _check_settings(level, resamples)
    above = (values[..., None] > levels).astype(np.float64)
    fraction = above.mean(axis=(0, 1))
    n = values.shape[1]
    if n == 1:
        return PerformanceProfile(levels, fraction, np.zeros_like(fraction), np.ones_like(fraction), n, level)
    rng = np.random.default_rng(seed)
    draws = np.stack(
        [np.take_along_axis(above, _indices(rng, values.shape)[..., None], axis=1).mean(axis=(0, 1)) for _ in range(resamples)]
    )
    low, high = np.quantile(draws, _tails(level), axis=0)
    return PerformanceProfile(levels, fraction, low, high, n, level)


def win_rate(
    ours: ArrayLike,
    theirs: ArrayLike,
    ties: float = 0.5,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Share of prompts on which our score is the higher one; a tie counts `ties`. Interval by bootstrap over prompts.

    Both are [prompts] and row i of each answers the same prompt. When every prompt has the same outcome the bootstrap has zero width;
    then the interval is that of Clopper and Pearson: outcomes never seen in n prompts have a probability of up to 1 - (tail)^(1/n).
    """
    outcomes = _outcomes(ours, theirs, ties)
    _check_settings(level, resamples)
    n = outcomes.size
    estimate = float(outcomes.mean())
    if np.all(outcomes == outcomes[0]):
        return _unanimous(estimate, n, level)
    draws = np.concatenate([counts @ outcomes / n for counts in bootstrap_counts(n, resamples, seed)])
    return _percentiles(estimate, draws, n, level)


def length_controlled_win_rate(
    ours: ArrayLike,
    theirs: ArrayLike,
    length_ours: ArrayLike,
    length_theirs: ArrayLike,
    ties: float = 0.5,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The win rate that would be seen if both sides wrote answers of equal length.

    Fits win ~ sigmoid(theta + phi * tanh(d / std(d))) with d = length_ours - length_theirs, and returns sigmoid(theta): the prediction at
    d = 0. All four arrays are [prompts]; lengths in any one unit (tokens, characters). The whole fit is repeated in every resample.
    Where hardly any pair has similar lengths the prediction is an extrapolation, and the interval is as wide as it deserves.
    """
    outcomes = _outcomes(ours, theirs, ties)
    lengths, other = _checked_pair(length_ours, length_theirs, "length_ours", "length_theirs", dimensions=(1,))
    if lengths.size != outcomes.size:
        raise UsageError(f"there are {outcomes.size} scores and {lengths.size} lengths; give one length for each score")
    _check_settings(level, resamples)
    n = outcomes.size
    if np.all(outcomes == outcomes[0]):  # the same outcome at every length: nothing for the length to explain
        return _unanimous(float(outcomes[0]), n, level)
    difference = lengths - other
    estimate = float(_win_at_equal_length(outcomes, difference, np.ones((1, n)))[0])
    draws = np.concatenate([_win_at_equal_length(outcomes, difference, counts) for counts in bootstrap_counts(n, resamples, seed)])
    return _percentiles(estimate, draws, n, level)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation of two [n] arrays, ties at their average rank. NaN when n < 3 or one side is constant: it is undefined there."""
    first, second = _checked_pair(x, y, "x", "y", dimensions=(1,))
    if first.size < 3:
        return math.nan
    a, b = _ranks(first), _ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(np.clip((a @ b) / scale, -1.0, 1.0)) if scale > 0 else math.nan


def bootstrap_counts(n: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of n units was drawn, in blocks [b, n] that add up to `resamples` rows; the mean of x is `counts @ x / n`.

    Blocks bound the memory at about 16 MB; the draws do not depend on where they are cut.
    """
    rng = np.random.default_rng(seed)
    block = max(1, 2_000_000 // n)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        index = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(index.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def checked(x: ArrayLike, name: str, dimensions: tuple[int, ...] | None = None) -> Floats:
    """`x` as a float64 array; UsageError that names it when it is empty, has NaN or infinite values, or the wrong number of axes."""
    values = np.asarray(x, dtype=np.float64)
    if values.ndim == 0:
        values = values[None]
    if dimensions is not None and values.ndim not in dimensions:
        allowed = " or ".join(str(d) for d in dimensions)
        raise UsageError(f"{name} has {values.ndim} axes (shape {values.shape}); {allowed} expected")
    if values.size == 0:
        raise UsageError(f"{name} is empty (shape {values.shape}); at least one value is needed")
    bad = ~np.isfinite(values)
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        where = place[0] if len(place) == 1 else place
        raise UsageError(
            f"{name}: {int(bad.sum())} of {values.size} values are NaN or infinite (first at index {where}); "
            "leave failed samples out and report their number"
        )
    return values


def finite_or_none(value: float | None) -> float | None:
    """The number for JSON, which has no NaN and no infinity."""
    return float(value) if value is not None and math.isfinite(value) else None


def _decimals(*values: float) -> int:
    """Places after the point that leave about three meaningful digits of the largest value."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if largest == 0 or 0.1 <= largest < 10:
        return 3
    return int(np.clip(2 - math.floor(math.log10(largest)), 0, 8))


def _checked_pair(x: ArrayLike, y: ArrayLike, name_x: str, name_y: str, dimensions: tuple[int, ...]) -> tuple[Floats, Floats]:
    first, second = checked(x, name_x, dimensions), checked(y, name_y, dimensions)
    if first.shape != second.shape:
        raise UsageError(f"{name_x} has shape {first.shape} and {name_y} {second.shape}; they must hold the same units in the same order")
    return first, second


def _check_settings(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise UsageError(f"level is {level}; give a number between 0 and 1, for instance 0.95")
    if resamples < 1:
        raise UsageError(f"resamples is {resamples}; give at least 1, or leave the default")


def _tails(level: float) -> list[float]:
    return [(1 - level) / 2, (1 + level) / 2]


def _percentiles(estimate: float, draws: Floats, n: int, level: float) -> Interval:
    low, high = np.quantile(draws, _tails(level))
    return Interval(estimate, float(low), float(high), n, level)


def _no_interval(estimate: float, level: float) -> Interval:
    return Interval(estimate, -math.inf, math.inf, 1, level)


def _unanimous(value: float, n: int, level: float) -> Interval:
    """Every unit had the outcome `value`; the unseen rest of the probability may lie at 0 or at 1."""
    unseen = 1 - ((1 - level) / 2) ** (1 / n)
    return Interval(value, value * (1 - unseen), value * (1 - unseen) + unseen, n, level)


def _indices(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
    return rng.integers(0, shape[-1], size=shape)


def _resample(values: Floats, index: NDArray[np.int64]) -> Floats:
    return np.take_along_axis(values, index, axis=-1)


def _improvement(x: Floats, y: Floats) -> float:
    """Mann-Whitney statistic per task over its maximum, averaged over tasks; x [tasks, m], y [tasks, k]."""
    total = 0.0
    for ours, theirs in zip(x, np.sort(y, axis=1), strict=True):
        below = np.searchsorted(theirs, ours, side="left")
        not_above = np.searchsorted(theirs, ours, side="right")
        total += float((below + not_above).mean()) / (2 * theirs.size)
    return total / x.shape[0]


def _outcomes(ours: ArrayLike, theirs: ArrayLike, ties: float) -> Floats:
    first, second = _checked_pair(ours, theirs, "ours", "theirs", dimensions=(1,))
    if not 0 <= ties <= 1:
        raise UsageError(f"ties is {ties}; give a number from 0 (a tie is a loss) to 1 (a tie is a win)")
    return np.where(first == second, ties, (first > second).astype(np.float64))


def _ranks(x: Floats) -> Floats:
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _win_at_equal_length(outcomes: Floats, difference: Floats, weights: Floats) -> Floats:
    """sigmoid(theta) of one weighted logistic regression per row of `weights` [b, n]; returns [b].

    Newton's method on all rows at once, with halved steps wherever the loss would rise. The ridge is too small to move an ordinary fit;
    it keeps theta and phi finite where wins and losses are separated.
    """
    ridge = 1e-3
    total = weights.sum(axis=1)
    mean = weights @ difference / total
    spread = np.sqrt(np.maximum(weights @ difference**2 / total - mean**2, 0.0))
    # A resample whose lengths all differ equally says nothing on length; its feature is set to 0.
    feature = np.tanh(difference / np.where(spread > 0, spread, np.inf)[:, None])

    def loss(theta: Floats, phi: Floats) -> Floats:
        z = theta[:, None] + phi[:, None] * feature
        return np.sum(weights * (np.logaddexp(0.0, z) - outcomes * z), axis=1) + 0.5 * ridge * (theta**2 + phi**2)

    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    current = loss(theta, phi)
    for _ in range(100):
        p = _sigmoid(theta[:, None] + phi[:, None] * feature)
        error = weights * (p - outcomes)
        gradient_theta = error.sum(axis=1) + ridge * theta
        gradient_phi = np.sum(error * feature, axis=1) + ridge * phi
        if max(np.abs(gradient_theta).max(), np.abs(gradient_phi).max()) < 1e-7 * total.max():
            return _sigmoid(theta)
        curvature = weights * p * (1 - p)
        a = curvature.sum(axis=1) + ridge
        b = np.sum(curvature * feature, axis=1)
        c = np.sum(curvature * feature**2, axis=1) + ridge
        step_theta = (c * gradient_theta - b * gradient_phi) / (a * c - b**2)
        step_phi = (a * gradient_phi - b * gradient_theta) / (a * c - b**2)
        scale = np.ones(len(weights))
        trial = loss(theta - step_theta, phi - step_phi)
        while (worse := (trial > current + 1e-12 * (1 + current)) & (scale > 1e-9)).any():
            scale = np.where(worse, scale / 2, scale)
            trial = loss(theta - scale * step_theta, phi - scale * step_phi)
        theta, phi, current = theta - scale * step_theta, phi - scale * step_phi, trial
    raise Failure("the length-controlled win rate did not converge in 100 Newton steps; report the plain win rate with the mean lengths")


def _sigmoid(z: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(0.5 * z))
