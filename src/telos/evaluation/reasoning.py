"""What repeated answers to the same problems say of a model: pass@k, votes, support, entropy, budgets of tokens, and the laws that tie entropy to reward.

Pure functions. `right` is always [problems, samples] of 0 and 1, `answers` as many values that can be compared (None: no answer was given), and what is
returned is [problems], one expectation a problem, unbiased for the model behind the samples unless said otherwise. Expectations over the subsets of the
samples are exact: hypergeometric, never one random subset. `rate_interval` makes a mean with an interval of them: problems are what is drawn anew.

Sources: Chen et al. 2021, "Evaluating Large Language Models Trained on Code" (pass@k, equation 1); Yao et al. 2024, "τ-bench" (pass^k); Wang et al. 2023,
"Self-Consistency" (votes); Wu et al. 2025, "The Invisible Leash" (support, entropies); Qu et al. 2025, "Optimizing Test-Time Compute via Meta Reinforcement
Fine-Tuning" (cumulative regret); Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models" (entropy laws).
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, xlog1py, xlogy

from telos.core.errors import UsageError
from telos.evaluation.statistics import Floats, Interval, bootstrap_counts, checked, win_rate

Answers = Sequence[Sequence[Hashable | None]]
CATEGORIES = ("preserved", "expanded", "shrunk", "outside")


# Right answers among k -------------------------------------------------------------------------------------------------------------------


def pass_at_k(right: ArrayLike, k: int) -> Floats:
    """The probability that at least one of k samples is right: 1 − C(n − c, k) / C(n, k) with c of n right, as a product of k ratios, so that
    nothing overflows and no large numbers are subtracted. Raises `UsageError` unless 1 <= k <= samples."""
    values = _outcomes(right, "right", k)
    return 1 - _all_from(values.shape[1] - values.sum(1), values.shape[1], k)


def pass_hat_k(right: ArrayLike, k: int) -> Floats:
    """pass^k, the probability that all of k samples are right: C(c, k) / C(n, k)."""
    values = _outcomes(right, "right", k)
    return _all_from(values.sum(1), values.shape[1], k)


def best_of_n(right: ArrayLike, scores: ArrayLike, n: int) -> Floats:
    """The probability that the highest-scored of n samples is right; samples with equal scores are equally likely to be taken.

    `scores` [problems, samples]. With the score `right` this is pass@n.
    """
    values, ranked = _outcomes(right, "right", n), checked(scores, "scores", (2,))
    _same_shape(values, ranked, "scores")
    samples = values.shape[1]
    within = _all_from(np.arange(samples + 1), samples, n)  # that all n lie among the m lowest
    out = np.empty(len(values))
    for i, (outcome, score) in enumerate(zip(values, ranked, strict=True)):
        _, level, size = np.unique(score, return_inverse=True, return_counts=True)
        up_to = np.cumsum(size)
        out[i] = (within[up_to] - within[up_to - size]) @ (np.bincount(level, weights=outcome) / size)
    return out


# Votes -----------------------------------------------------------------------------------------------------------------------------------


def majority_at_k(right: ArrayLike, answers: Answers, k: int) -> Floats:
    """maj@k: the probability that the answer most frequent among k samples is right. Exact over all C(n, k) subsets.

    Answers that tie are equally likely to be taken. None does not vote; where nobody votes the outcome is wrong. Where samples with one answer differ in
    `right` (its derivation is judged too) the answer is represented by any of them.

    The counts of a subset are those of independent binomials with success probability k / n given that they add up to k; all terms of that
    sum are positive and none is large, whatever n is.
    """
    values = _outcomes(right, "right", k)
    samples = values.shape[1]
    chances = _binomials(samples, k / samples)
    out = np.zeros(len(values))
    for i, classes in enumerate(_classes(values, answers)):
        sizes = [size for size, _ in classes]
        silent = samples - sum(sizes)
        for place, (size, good) in enumerate(classes):
            if good:
                others = sizes[:place] + sizes[place + 1 :]
                out[i] += _wins(size, others, silent, chances, k) * good / size
    return np.clip(out / chances[samples, k], 0.0, 1.0)  # rounding may pass 1


def _wins(size: int, others: list[int], silent: int, chances: Floats, k: int) -> float:
    """P(an answer with `size` of the samples wins) · P(the counts of the subset add up to k), ties shared evenly. `chances[n, i]`: P(i) of the binomials."""
    won = 0.0
    for votes in range(1, min(size, k) + 1):
        left = k - votes
        harmless = silent + sum(other for other in others if other < votes)  # these can neither win nor tie
        # ways[t, z]: t rivals tie, all others have fewer votes, and z of the `left` votes are given.
        ways = chances[harmless, : left + 1][None, :]
        for rival in (other for other in others if other >= votes):
            new = np.zeros((len(ways) + 1, left + 1))
            for t, row in enumerate(ways):
                new[t] += np.convolve(row, chances[rival, :votes])[: left + 1]
                if votes <= left:
                    new[t + 1, votes:] += chances[rival, votes] * row[: left + 1 - votes]
            ways = new
        won += chances[size, votes] * float((ways[:, left] / np.arange(1, len(ways) + 1)).sum())
    return won


def _binomials(samples: int, share: float) -> Floats:
    """[samples + 1, samples + 1]: P(i) of a binomial with n draws at [n, i]."""
    n, i = np.arange(samples + 1)[:, None], np.arange(samples + 1)
    inside = np.minimum(i, n)
    return np.where(i <= n, np.exp(_log_choose(n, inside) + xlogy(inside, share) + xlog1py(n - inside, -share)), 0.0)


def _log_choose(n: Any, i: Any) -> Floats:
    return gammaln(n + 1.0) - gammaln(i + 1.0) - gammaln(n - i + 1.0)


def weighted_majority_at_k(
    right: ArrayLike, answers: Answers, weights: ArrayLike, k: int, *, resamples: int = 1000, seed: int = 0
) -> Floats:
    """As `majority_at_k`, but a sample votes with its weight >= 0 ([problems, samples], such as a verifier's probability).

    The mean over all subsets of k where there are at most `resamples` of them, otherwise over that many random ones (unbiased, with a standard
    error of at most 0.5 / √resamples a problem). Totals within one part in 10^12 tie.
    """
    values, voices = _outcomes(right, "right", k), checked(weights, "weights", (2,))
    _same_shape(values, voices, "weights")
    if (voices < 0).any():
        raise UsageError("weights of votes must be 0 or more; take exp or a sigmoid of scores that can be negative")
    if resamples < 1:
        raise UsageError(f"resamples is {resamples}; give at least 1, or leave the default")
    _check_answers(values, answers)
    samples = values.shape[1]
    rng = np.random.default_rng(seed)
    out = np.zeros(len(values))
    for i, (outcome, row, voice) in enumerate(zip(values, answers, voices, strict=True)):
        known = {answer: code for code, answer in enumerate(dict.fromkeys(a for a in row if a is not None))}
        if not known:
            continue
        member = np.array(
            [[answer is not None and known[answer] == code for code in range(len(known))] for answer in row], dtype=np.float64
        )
        taken = _subsets(samples, k, resamples, rng)
        total, count, good = taken @ (voice[:, None] * member), taken @ member, taken @ (outcome[:, None] * member)
        voted = count > 0
        first = np.where(voted, total, -1.0).max(1, keepdims=True)
        winner = voted & (total >= first * (1 - 1e-12))
        accuracy = np.where(winner, good / np.maximum(count, 1), 0.0).sum(1) / np.maximum(winner.sum(1), 1)
        out[i] = accuracy.mean()
    return out


def _subsets(samples: int, k: int, resamples: int, rng: np.random.Generator) -> Floats:
    """[b, samples] of 0 and 1 with k ones in each row: all such rows, or `resamples` random ones."""
    if math.comb(samples, k) <= resamples:
        chosen = np.array(list(itertools.combinations(range(samples), k)))
    else:
        chosen = np.argpartition(rng.random((resamples, samples)), k - 1, axis=1)[:, :k]
    taken = np.zeros((len(chosen), samples))
    np.put_along_axis(taken, chosen, 1.0, axis=1)
    return taken


# Entropy of answers and tokens -----------------------------------------------------------------------------------------------------------


def answer_entropy(answers: Answers) -> Floats:
    """−Σ p log p in nats over the shares p of a problem's distinct answers (Wu et al. 2025: answer-level entropy); None is one answer of its own.

    The plain estimate, at most log(samples) and biased low by about (distinct − 1) / (2 · samples): compare models at the same number of samples.
    """
    if not answers or not all(len(row) for row in answers):
        raise UsageError("answers is empty; at least one problem with one sample is needed")
    out = []
    for row in answers:
        shares = np.array(list(Counter(row).values())) / len(row)
        out.append(float(-(shares * np.log(shares)).sum()) + 0.0)  # + 0.0: no minus sign before zero
    return np.array(out)


def mean_token_entropy(entropy: ArrayLike, mask: ArrayLike) -> float:
    """Mean of the entropies [..., tokens] in nats of the distributions from which tokens were drawn, over all tokens where `mask` is true (Wu
    et al. 2025: token-level entropy). Every token counts once, so long answers weigh more."""
    values, kept = np.asarray(entropy, dtype=np.float64), np.asarray(mask, dtype=bool)
    if values.shape != kept.shape:
        raise UsageError(f"entropy has shape {values.shape} and its mask {kept.shape}; they must agree")
    if not kept.any():
        raise UsageError("the mask leaves no token whose entropy could be averaged")
    return float(checked(values[kept], "entropy").mean())


# Support ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Support:
    """How the set of what a model can find has changed by training (Wu et al. 2025). NaN with infinite bounds where a measure has no denominator."""

    preserved: int  # P: found by both
    expanded: int  # E: found by the trained model alone
    shrunk: int  # S: found by the base model alone
    outside: int  # found by neither
    retention: Interval  # Support Retention Rate, P / (P + S): how much of the base model's support is left
    discovery: Interval  # Net Discovery Rate, E / (P + E): how much of the trained model's support is new
    dynamics: Interval  # Support Dynamic Score, the harmonic mean of both
    change: Interval  # Net Support Change Rate, (E − S) / (P + E + S): above 0 it grew, below it shrank


def detectable_probability(samples: int, missed: float = 0.05) -> float:
    """The probability that an answer must have to be found at least once in `samples` with probability 1 − `missed`: 1 − missed^(1 / samples).

    Wu et al. 2025 use its upper bound −log(missed) / samples, which leaves [0, 1] for few samples. What is not found may still be this likely.
    """
    if samples < 1 or not 0 < missed < 1:
        raise UsageError(f"samples = {samples} and missed = {missed}: at least one sample and a probability between 0 and 1 are needed")
    return -math.expm1(math.log(missed) / samples)


def in_support(base: ArrayLike, trained: ArrayLike, threshold: float = 0.0) -> Floats:
    """[..., 4] of 0 and 1, which of `CATEGORIES` each unit is in. `base`, `trained`: the shares of samples that found it, of one shape.

    A unit is in a model's empirical support when its share exceeds `threshold`, in [0, 1). Wu et al. 2025 ask for a probability above ε and
    read it off k samples as "found at all", which is the threshold 0; a higher one asks for more than a lucky hit.
    """
    first, second = np.asarray(base, dtype=np.float64), np.asarray(trained, dtype=np.float64)
    if first.shape != second.shape:
        raise UsageError(f"base has shape {first.shape} and trained {second.shape}; they must hold the same units in the same order")
    if not 0 <= threshold < 1:
        raise UsageError(f"threshold is {threshold}; give a share of samples from 0 (found at all) to below 1")
    before, after = first > threshold, second > threshold
    return np.stack([before & after, ~before & after, before & ~after, ~before & ~after], -1).astype(np.float64)


def problem_support(base_right: ArrayLike, trained_right: ArrayLike, threshold: float = 0.0) -> Floats:
    """[problems, 4]: the category of each problem, which a model supports when more than `threshold` of its samples are right.

    The numbers of samples may differ; then the model with more of them has the better chance to find an answer.
    """
    base, trained = _paired_outcomes(base_right, trained_right)
    return in_support(base.mean(1), trained.mean(1), threshold)


def answer_support(
    base_right: ArrayLike, base_answers: Answers, trained_right: ArrayLike, trained_answers: Answers, threshold: float = 0.0
) -> Floats:
    """[problems, 4]: how many distinct right answers of each problem are in each category. Give whole completions as answers to count ways of
    solving it. Only what some sample showed is counted, so at threshold 0 nothing is outside."""
    base, trained = _paired_outcomes(base_right, trained_right)
    _check_answers(base, base_answers)
    _check_answers(trained, trained_answers)
    out = np.zeros((len(base), len(CATEGORIES)))
    for i in range(len(base)):
        found = [
            Counter(a for a, good in zip(row[i], values[i], strict=True) if good)
            for row, values in ((base_answers, base), (trained_answers, trained))
        ]
        known = list(dict.fromkeys([*found[0], *found[1]]))
        shares = [np.array([counts[a] for a in known]) / values.shape[1] for counts, values in zip(found, (base, trained), strict=True)]
        out[i] = in_support(shares[0], shares[1], threshold).sum(0)
    return out


def support_by_chance(base_right: ArrayLike, trained_right: ArrayLike, threshold: float = 0.0) -> Floats:
    """[problems, 4]: the probabilities of the categories of `problem_support` if both models solved each problem equally often.

    Given how many of a problem's samples are right over both models, it is chance which model drew them (hypergeometric). With finitely many samples some
    problems cross over by that alone, in both directions; only what exceeds these figures says something of training. Assumes that the
    two models' samples are independent; common random numbers make real crossings of nearly equal models rarer.
    """
    base, trained = _paired_outcomes(base_right, trained_right)
    n, m = base.shape[1], trained.shape[1]
    cells = np.zeros((n + m + 1, len(CATEGORIES)))
    for total in range(n + m + 1):
        mine = np.arange(max(0, total - m), min(n, total) + 1)
        ways = np.exp(_log_choose(total, mine) + _log_choose(n + m - total, n - mine) - _log_choose(n + m, n))
        cells[total] = ways @ in_support(mine / n, (total - mine) / m, threshold)
    return cells[(base.sum(1) + trained.sum(1)).astype(int)]


def support(categories: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Support:
    """Totals and the four measures, from counts [problems, 4] of `problem_support` or `answer_support`. Intervals: bootstrap over problems; at
    0 or 1 those of Clopper and Pearson over the problems that enter (see `ratio_interval`)."""
    counts = checked(categories, "categories", (2,))
    if counts.shape[1] != len(CATEGORIES):
        raise UsageError(f"categories has {counts.shape[1]} columns; they are {', '.join(CATEGORIES)}")
    kept, new, lost, outside = counts.T

    def dynamics(sums: Floats) -> Floats:
        preserved, expanded, shrunk = sums.T[:3]
        retention, discovery = _ratio(preserved, preserved + shrunk), _ratio(expanded, preserved + expanded)
        both = retention + discovery
        return np.where(both > 0, 2 * retention * discovery / np.where(both > 0, both, 1.0), np.where(np.isnan(both), math.nan, 0.0))

    settings: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    return Support(
        *(int(column.sum()) for column in (kept, new, lost, outside)),
        retention=ratio_interval(kept, kept + lost, share=True, **settings),
        discovery=ratio_interval(new, kept + new, share=True, **settings),
        dynamics=sums_interval(counts, dynamics, **settings),
        change=ratio_interval(new - lost, kept + new + lost, **settings),
    )


# Intervals over problems -----------------------------------------------------------------------------------------------------------------


def rate_interval(values: ArrayLike, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean over problems of shares in [0, 1], such as what `pass_at_k` returns, with a bootstrap interval; `ratio_interval` says what is done when
    all are 0 or all are 1."""
    found = checked(values, "values", (1,))
    if (found < 0).any() or (found > 1).any():
        raise UsageError("values are shares and must lie in [0, 1]")
    return ratio_interval(found, np.ones_like(found), share=True, level=level, resamples=resamples, seed=seed)


def ratio_interval(
    numerator: ArrayLike, denominator: ArrayLike, *, share: bool = False, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Σ numerator / Σ denominator over problems ([problems] each, denominators >= 0), problems resampled with both.

    `share`: the ratio is a share in [0, 1]. When every problem says 0, or every one 1, a bootstrap has no width; then the interval is that of Clopper and
    Pearson over the problems whose denominator is not 0. `n` is the number of these.
    """
    top, bottom = checked(numerator, "numerator", (1,)), checked(denominator, "denominator", (1,))
    _same_shape(top, bottom, "denominator")
    if (bottom < 0).any():
        raise UsageError("denominators must be 0 or more")
    enters = bottom > 0
    if enters.sum() < 2:
        estimate = float(_ratio(top.sum(keepdims=True), bottom.sum(keepdims=True))[0])
        return Interval(estimate, -math.inf, math.inf, int(enters.sum()), level)
    ratios = top[enters] / bottom[enters]
    if share and (np.all(ratios == 0) or np.all(ratios == 1)):
        return win_rate(ratios, np.full(ratios.size, 0.5), level=level)  # every problem "wins", or "loses", against one half
    found = sums_interval(np.stack([top, bottom], 1), lambda sums: _ratio(sums[:, 0], sums[:, 1]), level, resamples, seed)
    return Interval(found.estimate, found.low, found.high, int(enters.sum()), level)


def sums_interval(
    parts: ArrayLike, statistic: Callable[[Floats], Floats], level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """`statistic` of the sums over problems of `parts` [problems, m], with a bootstrap interval over problems. It maps [b, m] to [b], NaN where undefined.

    Resamples in which it is undefined are left out. Where it is undefined on the data themselves, or there is one problem, bounds are infinite.
    """
    values = checked(parts, "parts", (2,))
    if not 0 < level < 1 or resamples < 1:
        raise UsageError(f"level = {level} and resamples = {resamples}: a level between 0 and 1 and at least one resample are needed")
    estimate = float(statistic(values.sum(0, keepdims=True))[0])
    if len(values) == 1 or math.isnan(estimate):
        return Interval(estimate, -math.inf, math.inf, len(values), level)
    draws = np.concatenate([statistic(counts @ values) for counts in bootstrap_counts(len(values), resamples, seed)])
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), len(values), level)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1.0), math.nan)


# Budgets of tokens -----------------------------------------------------------------------------------------------------------------------


def accuracy_at_budgets(right: ArrayLike, tokens: ArrayLike, budgets: ArrayLike, forced: ArrayLike | None = None) -> Floats:
    """[problems, budgets]: accuracy when answers are cut at each budget of tokens. `tokens` [problems, samples], the answers' lengths.

    An answer that fits counts as it is; one that is cut is wrong, or counts as `forced` [problems, samples, budgets] says: whether it is
    right when the model is made to answer from what it has by then.
    """
    values, lengths, limits = _outcomes(right, "right", 1), checked(tokens, "tokens", (2,)), checked(budgets, "budgets", (1,))
    _same_shape(values, lengths, "tokens")
    fits = lengths[:, :, None] <= limits
    cut = np.zeros(fits.shape) if forced is None else np.asarray(forced, dtype=np.float64)
    if cut.shape != fits.shape:
        raise UsageError(f"forced has shape {cut.shape}; {fits.shape} (problems, samples, budgets) expected")
    return np.where(fits, values[:, :, None], cut).mean(1)


def cumulative_regret(success: ArrayLike, best: ArrayLike = 1.0, widths: ArrayLike | None = None) -> Floats:
    """Δ_k = Σ_{j<k} (best_j − success_j) for k = 1 … K, along the last axis (Qu et al. 2025, the definition of cumulative regret).

    `success` [..., K]: the probability of a right answer when the model is made to answer after episode j of its output, j = 0 … K − 1 (the
    paper's meta-prover policy). `best`: that of the best policy with the same budget, a number or [..., K]; the paper's optimum is not known,
    so the default compares with a policy that is always right, and differences between models do not depend on it. `widths` [K]: how many
    tokens each success holds for; Δ is then in tokens, the area between both curves. Without, every episode counts 1.
    """
    found = checked(success, "success")
    gap = np.broadcast_to(np.asarray(best, dtype=np.float64), found.shape) - found
    if widths is not None:
        spans = checked(widths, "widths", (1,))
        if spans.size != found.shape[-1] or (spans < 0).any():
            raise UsageError(f"widths must be {found.shape[-1]} numbers of tokens, 0 or more, one for each success")
        gap = gap * spans
    return np.cumsum(gap, axis=-1)


# Entropy and reward ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EntropyFit:
    """R = −a exp(H) + b (Cui et al. 2025), H in nats a token."""

    a: float
    b: float
    r_squared: float  # share of the variance of R that the curve explains; NaN when R does not vary
    n: int  # points

    @property
    def ceiling(self) -> float:
        """The reward at H = 0, when entropy is used up: b − a."""
        return self.b - self.a

    def predict(self, entropy: ArrayLike) -> Floats:
        return -self.a * np.exp(np.asarray(entropy, dtype=np.float64)) + self.b


def fit_entropy(entropy: ArrayLike, reward: ArrayLike) -> EntropyFit:
    """Least squares of `reward` on exp(`entropy`), both [n]: linear in a and b, so the solution is exact. Needs three points with two different entropies.

    The paper fits a trajectory of checkpoints; neighbouring points are not independent, so no interval is given.
    """
    h, r = checked(entropy, "entropy", (1,)), checked(reward, "reward", (1,))
    _same_shape(h, r, "reward")
    if h.size < 3 or np.ptp(h) == 0:
        raise UsageError(
            f"{h.size} points with {np.unique(h).size} different entropies allow no fit; at least three points are needed, at two entropies"
        )
    a, b = (float(x) for x in np.linalg.lstsq(np.stack([-np.exp(h), np.ones_like(h)], 1), r, rcond=None)[0])
    residual, total = r - (b - a * np.exp(h)), float(((r - r.mean()) ** 2).sum())
    return EntropyFit(a, b, 1 - float(residual @ residual) / total if total > 0 else math.nan, h.size)


def entropy_change(probabilities: ArrayLike, logit_change: ArrayLike) -> Floats:
    """−Cov_{a∼π}(log π(a|s), Δz(s, a)), [...]: the first-order change of the entropy of softmax policies [..., actions] when their logits change by
    `logit_change` (Cui et al. 2025, Lemma 1). Actions of probability 0 contribute nothing."""
    p, change = checked(probabilities, "probabilities"), checked(logit_change, "logit_change")
    _same_shape(p, change, "logit_change")
    if (p < 0).any() or not np.allclose(p.sum(-1), 1):
        raise UsageError("probabilities must be 0 or more and add up to 1 over the last axis")
    logs = np.log(np.where(p > 0, p, 1.0))
    mean = (p * change).sum(-1, keepdims=True)
    return -(p * logs * (change - mean)).sum(-1)


Update = Literal["policy-gradient", "natural"]


def predicted_entropy_change(
    probabilities: ArrayLike, advantages: ArrayLike, step_size: float, update: Update = "policy-gradient"
) -> Floats:
    """The change of entropy that one update of a tabular softmax policy makes, to first order in `step_size` η. All of [..., actions].

    `policy-gradient`: Δz = η π(a) (A(a) − E_π A), the exact gradient; −η Cov(log π, π · A) (theorem 1 of Cui et al. 2025, where E_π A = 0).
    `natural`: Δz = η A; −η Cov(log π, A) (their theorem 2).
    """
    p, values = checked(probabilities, "probabilities"), checked(advantages, "advantages")
    _same_shape(p, values, "advantages")
    if update == "policy-gradient":
        values = p * (values - (p * values).sum(-1, keepdims=True))
    elif update != "natural":
        raise UsageError(f"update is 'policy-gradient' or 'natural', not {update!r}")
    return entropy_change(p, step_size * values)


def sampled_entropy_change(
    logprobs: ArrayLike, advantages: ArrayLike, step_size: float, update: Update = "natural", mask: ArrayLike | None = None
) -> float:
    """The same from sampled tokens: −η Cov(log π, A) (`natural`), or −η Cov(log π, π · A), over all tokens where `mask` is true.

    The covariance is the mean of the centred products over the batch, as in Clip-Cov and KL-Cov (Cui et al. 2025): it takes the tokens of a batch for
    draws from one distribution, so differences between their states enter it. Needs two tokens.
    """
    logs, values = np.asarray(logprobs, dtype=np.float64), np.asarray(advantages, dtype=np.float64)
    _same_shape(logs, values, "advantages")
    kept = np.ones(logs.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    _same_shape(logs, kept, "mask")
    logs, values = checked(logs[kept], "logprobs"), checked(values[kept], "advantages")
    if logs.size < 2:
        raise UsageError("one token has no covariance; at least two are needed")
    if update not in ("policy-gradient", "natural"):
        raise UsageError(f"update is 'policy-gradient' or 'natural', not {update!r}")
    values = np.exp(logs) * values if update == "policy-gradient" else values
    return -step_size * float(((logs - logs.mean()) * (values - values.mean())).mean())


# Checks ----------------------------------------------------------------------------------------------------------------------------------


def _all_from(among: ArrayLike, samples: int, k: int) -> Floats:
    """C(among, k) / C(samples, k): the probability that k of the samples, drawn without replacement, all lie in a part of size `among` [...]."""
    i = np.arange(k)
    return np.prod(np.maximum(np.asarray(among)[..., None] - i, 0) / (samples - i), axis=-1)


def _outcomes(right: ArrayLike, name: str, k: int) -> Floats:
    values = checked(right, name, (2,))
    if not np.isin(values, (0.0, 1.0)).all():
        raise UsageError(f"{name} must hold 0 (wrong) and 1 (right) alone; compare scores with a threshold first")
    if not 1 <= k <= values.shape[1]:
        raise UsageError(f"k = {k}: there are {values.shape[1]} samples a problem; give a number from 1 to that, or draw more")
    return values


def _paired_outcomes(base: ArrayLike, trained: ArrayLike) -> tuple[Floats, Floats]:
    first, second = _outcomes(base, "base_right", 1), _outcomes(trained, "trained_right", 1)
    if len(first) != len(second):
        raise UsageError(f"the base model answered {len(first)} problems and the trained one {len(second)}; they must be the same")
    return first, second


def _same_shape(first: NDArray[Any], second: NDArray[Any], name: str) -> None:
    if first.shape != second.shape:
        raise UsageError(f"{name} has shape {second.shape}; {first.shape} expected")


def _check_answers(values: Floats, answers: Answers) -> None:
    if len(answers) != len(values) or any(len(row) != values.shape[1] for row in answers):
        raise UsageError(f"answers must be {values.shape[0]} rows of {values.shape[1]}, as `right` has")


def _classes(values: Floats, answers: Answers) -> list[list[tuple[int, int]]]:
    """For each problem its distinct answers but None: (how many samples gave it, how many of these are right)."""
    _check_answers(values, answers)
    out = []
    for outcome, row in zip(values, answers, strict=True):
        size, good = Counter(a for a in row if a is not None), Counter(a for a, r in zip(row, outcome, strict=True) if a is not None and r)
        out.append([(size[answer], good[answer]) for answer in size])
    return out
