"""Preference pairs for a bundled testbed: two answers of a model to each prompt, labelled by the gold judge with noise.

    P(first is chosen) = σ((g_1 − g_2) / τ)                                        (Bradley and Terry 1952; τ is `label_temperature`)

and then the label is turned with probability `noise`. The gold scores themselves stay hidden: rows show them only on request, and learners must not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from telos.algorithms.language._rows import testbed_rows
from telos.algorithms.language._sampling import sample_texts
from telos.core.errors import Failure, UsageError
from telos.core.seeds import derive, numpy_generator
from telos.environments.text.base import Item, Split, TextTestbed
from telos.models.generation import Sampling
from telos.models.language import LanguageModel

_CHUNK = 256  # prompts answered at once, at most
_MOST_PROMPTS = 20  # prompts tried for each pair that is wanted, before it is given up


def choose_first(difference: float, label_temperature: float, noise: float, draws: tuple[float, float]) -> bool:
    """The label of a pair whose first answer scores `difference` more than its second. `draws`: two uniform numbers in [0, 1)."""
    if label_temperature == 0:
        first = difference > 0
    else:
        first = draws[0] < 1 / (1 + math.exp(-max(-700.0, min(700.0, difference / label_temperature))))
    return first != (draws[1] < noise)


def make_pairs(
    model: LanguageModel,
    testbed: TextTestbed,
    n: int,
    *,
    seed: int = 0,
    split: Split = "train",
    temperature: float = 1.0,
    label_temperature: float = 0.1,
    noise: float = 0.0,
    with_gold: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """`n` rows with prompt, chosen, rejected, facts, reference, testbed; and what happened on the way. The same arguments give the same rows.

    Prompts are drawn until there are `n` pairs, at most 20 for each pair or as many as the testbed has; then there are fewer rows. Left out and
    counted: answers without a word, equal answers, and equal gold scores, which the judge cannot tell apart. `label_temperature` is in units of gold score, 0
    = always the better one; `noise` is a probability in [0, 0.5); `temperature` is that of sampling; `on_progress` is told how many rows there are.
    Raises `UsageError` for values out of range, `Failure` when not one pair was found.
    """
    _check(n, temperature, label_temperature, noise)
    sampling = Sampling(temperature=temperature, max_new_tokens=testbed.max_new_tokens)
    counts = {"prompts": 0, "pairs": 0, "empty answers": 0, "equal answers": 0, "equal scores": 0, "labels against the gold score": 0}
    rows: list[dict[str, Any]] = []
    prompts = _prompts(testbed, split, n, seed)
    start = 0  # number of the first prompt of a batch
    while len(rows) < n and (batch := list(islice(prompts, _batch_size(n - len(rows), start, len(rows))))):
        answers = sample_texts(model, [item.prompt for item, _ in batch], sampling, n=2, seed=derive(seed, "answers", start))
        for number, ((item, record), (first, second)) in enumerate(zip(batch, answers, strict=True), start):
            counts["prompts"] += 1
            if reason := _useless(first, second):
                counts[reason] += 1
                continue
            scores = testbed.gold(item, first), testbed.gold(item, second)
            if scores[0] == scores[1]:
                counts["equal scores"] += 1
                continue
            draws = numpy_generator(seed, "labels", number).random(2)
            keep = choose_first(scores[0] - scores[1], label_temperature, noise, (float(draws[0]), float(draws[1])))
            counts["labels against the gold score"] += int(keep != (scores[0] > scores[1]))
            pair = {"chosen": first, "rejected": second} if keep else {"chosen": second, "rejected": first}
            gold = dict(zip(("chosen_score", "rejected_score"), scores if keep else scores[::-1], strict=True)) if with_gold else {}
            rows.append({"prompt": item.prompt, **pair, **{name: record[name] for name in ("facts", "reference", "testbed")}, **gold})
            if len(rows) == n:
                break
        start += len(batch)
        if on_progress is not None:
            on_progress(len(rows))
    counts["pairs"] = len(rows)
    if not rows:
        told = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
        raise Failure(
            f"no pair of answers to {testbed.name} can be told apart by the gold judge ({told}); try a model that solves some of it, or a higher temperature"
        )
    return rows, counts


def _check(n: int, temperature: float, label_temperature: float, noise: float) -> None:
    if n < 1:
        raise UsageError(f"n = {n}: ask for at least one pair")
    if not temperature > 0:
        raise UsageError(f"temperature = {temperature} must be > 0: the most likely answer twice makes no pair")
    if not (math.isfinite(label_temperature) and label_temperature >= 0):
        raise UsageError(f"label_temperature = {label_temperature} must be 0 (always the better one) or more")
    if not 0 <= noise < 0.5:
        raise UsageError(f"noise = {noise} must lie in [0, 0.5): at one half labels say nothing")


def _useless(first: str, second: str) -> str | None:
    if not first.strip() or not second.strip():
        return "empty answers"
    return "equal answers" if first.strip() == second.strip() else None


def _batch_size(missing: int, tried: int, found: int) -> int:
    """As many prompts as are likely to give the missing pairs, at most `_CHUNK`: every answer beyond them would be thrown away."""
    wanted = missing if tried == 0 else max(8, math.ceil(1.1 * missing * tried / max(found, 1)))
    return min(_CHUNK, wanted)


def _prompts(testbed: TextTestbed, split: Split, n: int, seed: int) -> Iterator[tuple[Item, dict[str, Any]]]:
    """The testbed's prompts in order with their rows, made as they are needed."""
    done, wanted = 0, n
    while done < n * _MOST_PROMPTS:
        items = testbed.items(split, wanted, seed)
        if len(items) == done:
            return
        yield from zip(items[done:], testbed_rows(testbed, split, wanted, seed, False)[done:], strict=True)
        done, wanted = len(items), min(2 * wanted, n * _MOST_PROMPTS)
