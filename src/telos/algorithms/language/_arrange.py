"""From judged answers to what is learned from: pairs with drawn labels, the best answers. What the `arrange` functions of iterative methods share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from telos.functional.pairwise import PairLogps
from telos.objectives.judges import Judged

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Arranged:
    """What is learned from, M examples: `first` and `second` are answers (0 … n − 1) of the prompts `prompt` (0 … P − 1), the preferred one first where
    one is; `second` None makes single answers. `samples` [M, k] are further answers of the prompt for methods on pairs that use them."""

    prompt: Integers
    first: Integers
    second: Integers | None = None
    first_score: Floats | None = None  # what the loss reads as `chosen_score`, or as `score` of single answers
    second_score: Floats | None = None
    samples: Integers | None = None


def draw_pairs(judged: Judged, count: int, allowed: NDArray[np.bool_] | None = None) -> tuple[Integers, Integers, Integers]:
    """(prompt, i, j): at each prompt up to `count` of the pairs i < j of answers that differ and were compared, drawn without repetition. `allowed`
    [P, n, n] leaves some of them out. Where the answers are independent samples of a policy, so are the two of a drawn pair."""
    candidates = judged.pairs if allowed is None else judged.pairs & allowed
    n = candidates.shape[-1]
    order = np.where(candidates, judged.generator.random(candidates.shape), 2.0).reshape(len(candidates), -1).argsort(1)[:, :count]
    prompt = np.repeat(np.arange(len(candidates)), order.shape[1])
    i, j = np.divmod(order.ravel(), n)
    kept = candidates[prompt, i, j]
    return prompt[kept], i[kept], j[kept]


def labelled_pairs(judged: Judged, count: int, allowed: NDArray[np.bool_] | None = None) -> Arranged:
    """`draw_pairs`, each labelled as the oracle would: the preferred answer is drawn with the probability that the oracle states."""
    prompt, i, j = draw_pairs(judged, count, allowed)
    swap = judged.generator.random(len(prompt)) >= judged.wins[prompt, i, j]
    return Arranged(prompt, np.where(swap, j, i), np.where(swap, i, j))


def ranked_pairs(judged: Judged, count: int, allowed: NDArray[np.bool_] | None = None) -> Arranged:
    """`draw_pairs`, the answer with the higher win rate first, scored with the win rates of both."""
    prompt, i, j = draw_pairs(judged, count, allowed)
    rates = judged.win_rate
    swap = rates[prompt, i] < rates[prompt, j]
    first, second = np.where(swap, j, i), np.where(swap, i, j)
    return Arranged(prompt, first, second, rates[prompt, first], rates[prompt, second])


def draw_answers(values: Floats, count: int, generator: np.random.Generator) -> Arranged:
    """At each prompt up to `count` of the answers with finite `values` [P, n], drawn without repetition and scored with them."""
    found = best_answers(np.where(np.isfinite(values), generator.random(values.shape), np.nan), count)
    return dataclasses.replace(found, first_score=values[found.prompt, found.first])


def right_answers(judged: Judged, threshold: float, count: int, allowed: NDArray[np.bool_] | None = None) -> Arranged:
    """At each prompt up to `count` of the different answers whose reward is at least `threshold`, drawn without repetition and scored with them. `allowed`
    [P, n] leaves some of them out."""
    right = np.nan_to_num(judged.reward, nan=-np.inf) >= threshold
    if allowed is not None:
        right &= allowed
    if judged.same is not None:  # of answers with one text the first counts
        right &= ~(judged.same & right[:, None, :] & np.tri(right.shape[1], k=-1, dtype=bool)).any(2)
    return draw_answers(np.where(right, judged.reward, np.nan), count, judged.generator)


def best_answers(values: Floats, count: int) -> Arranged:
    """At each prompt up to `count` answers of the highest `values` [P, n], scored with them; those that are not finite never."""
    order = np.where(np.isfinite(values), -values, np.inf).argsort(1, kind="stable")[:, :count]
    prompt = np.repeat(np.arange(len(values)), order.shape[1])
    kept = np.isfinite(values[prompt, order.ravel()])
    prompt, first = prompt[kept], order.ravel()[kept]
    return Arranged(prompt, first, first_score=values[prompt, first])


def against_anchor(pair: PairLogps) -> PairLogps:
    """The pair with the policy at the start of the iteration as its reference: `chosen_ratio` is then log π(y_w|x) / π_t(y_w|x)."""
    return dataclasses.replace(pair, reference_chosen=pair.anchor_chosen, reference_rejected=pair.anchor_rejected)
