"""What is made of checked rows before they are encoded: scores for their answers, pairs conditioned on a target score, single answers from pairs,
and prompts that ask for a revision. Text and conversations alike.

Sources: Zhang et al. 2024 (arXiv 2410.08067) for reward-augmented pairs; Choi et al. 2024 (arXiv 2406.01660) for self-revision.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from telos.core.errors import DataError, UsageError
from telos.data.formats import Examples

SCORE_COLUMNS = {"chosen": ("chosen_score", "chosen_quality"), "rejected": ("rejected_score", "rejected_quality"), "completion": ("score",)}
TARGET_SCORE = "Write an answer whose score is {score:.3g}."
REVISE = "Write a better answer than this one."

# What scores answers: (prompts, answers, columns) -> one number each, NaN where there is none.
Scorer = Callable[[list[Any], list[str], dict[str, list[Any]]], Sequence[float]]


def answer_text(answer: Any) -> str:
    """The text of an answer that is text or a list of messages."""
    return answer if isinstance(answer, str) else "\n".join(message["content"] for message in answer if message["role"] == "assistant")


def with_scores(examples: Examples, names: Sequence[str], scorer: Scorer | None) -> Examples:
    """The examples with a score for each of their answers `names`, under the columns `chosen_score`, `rejected_score` or `score`.

    Numbers that the data have stay; otherwise `scorer` gives them, and rows in which an answer has none are dropped and counted as
    "no-score". Raises `DataError` for a value that is no number, and `UsageError` when there is neither a column nor a scorer.
    """
    columns = {}
    for name in names:
        found = next((column for column in SCORE_COLUMNS[name] if column in examples.extra), None)
        if found is not None:
            columns[SCORE_COLUMNS[name][0]] = [_number(value, found, examples.places[i]) for i, value in enumerate(examples.extra[found])]
            continue
        if scorer is None:
            raise UsageError(
                f"{examples.counts.source} has no column {SCORE_COLUMNS[name][0]!r} with the answers' scores; add it, or give --reward "
                "(file.py:function, module:function, a reward model's folder or hub id) to score them"
            )
        texts = [answer_text(record[name]) for record in examples.records]
        columns[SCORE_COLUMNS[name][0]] = list(scorer([record["prompt"] for record in examples.records], texts, examples.extra))
    kept = [i for i in range(len(examples)) if all(math.isfinite(values[i]) for values in columns.values())]
    for i in set(range(len(examples))) - set(kept):
        examples.counts.drop(examples.places[i], "no-score")
    return _select(dataclasses.replace(examples, extra=examples.extra | columns), kept)


def _number(value: Any, column: str, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(place, f"{column!r} is {value!r}, wanted a finite number", "Mend the row")
    return number


def _select(examples: Examples, rows: Sequence[int]) -> Examples:
    if not rows:
        raise UsageError(f"{examples.counts.source}: no answer could be scored, so nothing is left to learn from")
    examples.counts.kept = len(rows)
    return dataclasses.replace(
        examples,
        records=[examples.records[i] for i in rows],
        places=[examples.places[i] for i in rows],
        extra={name: [values[i] for i in rows] for name, values in examples.extra.items()},
    )


def reward_augmented(examples: Examples) -> Examples:
    """Twice the pairs: each one once with the chosen answer's score as its target, and once, sides exchanged, with the rejected answer's.

    For a target g the answer whose score is nearer to g is the better one, R(x, y, g) = −(g − r(x, y))², so both answers of a pair teach what
    an answer of their quality is, and a good rejected answer is not unlearnt. The target is written before the prompt (in front of a text,
    as a system message of a conversation); to ask for the best, condition on the highest score. Needs `chosen_score` and `rejected_score`.
    """
    records, places, extra = [], [], {name: [] for name in examples.extra}
    for i, record in enumerate(examples.records):
        scores = {side: examples.extra[f"{side}_score"][i] for side in ("chosen", "rejected")}
        for better, worse in (("chosen", "rejected"), ("rejected", "chosen")):
            prompt = conditioned(record["prompt"], scores[better])
            records.append(record | {"prompt": prompt, "chosen": record[better], "rejected": record[worse]})
            places.append(examples.places[i])
            for name, values in examples.extra.items():
                extra[name].append(values[i])
            extra["chosen_score"][-1], extra["rejected_score"][-1] = scores[better], scores[worse]
    examples.counts.kept = len(records)
    return dataclasses.replace(examples, records=records, places=places, extra=extra)


def conditioned(prompt: Any, score: float) -> Any:
    """A prompt that asks for an answer of this score."""
    wish = TARGET_SCORE.format(score=score)
    if isinstance(prompt, str):
        return f"{wish}\n{prompt}"
    if prompt[0]["role"] == "system":
        return [{"role": "system", "content": f"{wish}\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": wish}, *prompt]


def revision_prompt(prompt: Any, answer: Any, instruction: str = REVISE) -> Any:
    """A prompt that shows an answer and asks for a better one. A text prompt comes again after the instruction, because what is to be written
    continues it; in a conversation the instruction is the user's next turn."""
    if isinstance(prompt, str):
        return f"{prompt}{answer_text(answer)}\n{instruction}\n{prompt}"
    shown = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return [*prompt, *shown, {"role": "user", "content": instruction}]


def unpaired(examples: Examples) -> Examples:
    """Single labelled answers from any examples with answers: pairs give a desirable and an undesirable one, completions are desirable."""
    if examples.format == "unpaired":
        return examples
    sides = {"preference": (("chosen", True), ("rejected", False)), "prompt-completion": (("completion", True),)}[examples.format]
    records, places, extra = [], [], {name: [] for name in examples.extra}
    for i, record in enumerate(examples.records):
        shared = {name: record[name] for name in ("prompt", "tools") if name in record}
        for side, label in sides:
            records.append(shared | {"completion": record[side], "label": label})
            places.append(examples.places[i])
            for name, values in examples.extra.items():
                extra[name].append(values[i])
    for column in ("chosen_score", "rejected_score", "chosen_quality", "rejected_quality"):
        extra.pop(column, None)
    if examples.format == "preference" and (found := {side: _scores(examples, side) for side, _ in sides})["chosen"] is not None:
        extra["score"] = [value for pair in zip(found["chosen"], found["rejected"] or [], strict=True) for value in pair]
    examples.counts.kept = len(records)
    return dataclasses.replace(examples, format="unpaired", records=records, places=places, extra=extra)


def _scores(examples: Examples, side: str) -> list[Any] | None:
    column = next((column for column in SCORE_COLUMNS[side] if column in examples.extra), None)
    return None if column is None else examples.extra[column]
