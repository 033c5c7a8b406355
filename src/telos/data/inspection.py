"""What is in a data set, before anything is trained on it: format, columns, bad rows by reason, lengths, repetitions, pairs that teach nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from telos.data.chat import encode_texts
from telos.data.formats import Counts, Examples, detect, read_examples
from telos.data.readers import Rows, read_rows

_TEXTS = ("text", "messages", "prompt", "completion", "chosen", "rejected", "completions")


@dataclass(frozen=True)
class Lengths:
    """Statistics of the lengths of one part of the rows, in characters or tokens."""

    mean: float
    median: float
    p95: float
    shortest: int
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        values = np.asarray(lengths)
        return cls(float(values.mean()), float(np.median(values)), float(np.percentile(values, 95)), int(values.min()), int(values.max()))


@dataclass(frozen=True)
class PairFacts:
    """What pairs of answers differ in, apart from what they say."""

    identical: int  # pairs whose answers are the same
    chosen_longer: float  # share of pairs whose chosen answer is longer; 0.5 when length says nothing; equal lengths count half
    mean_difference: float  # chosen minus rejected
    unit: str  # of the difference: tokens or characters


@dataclass(frozen=True)
class Inspection:
    source: str
    layout: str  # the set of columns that was recognised
    format: str  # the format it is read as
    conversational: bool
    columns: list[str]
    counts: Counts
    characters: dict[str, Lengths]
    tokens: dict[str, Lengths]  # empty without a tokenizer
    identical_rows: int  # rows that repeat an earlier one
    repeated_prompts: int  # rows whose prompt was there before
    pairs: PairFacts | None
    example: dict[str, Any] = field(default_factory=dict)


def inspect(source: Any, tokenizer: Any = None) -> Inspection:
    """Reads `source` as `data.readers.read_rows` does and describes it. `tokenizer`: a Hugging Face tokenizer, for lengths in tokens.

    Bad rows are counted by reason. Raises `DataError` for a file that cannot be read at all (with its line) or whose columns fit no format, `UsageError`
    when no row is usable.
    """
    rows: Rows = read_rows(source)
    layout = detect(rows.columns, None, rows.source)
    examples = read_examples(rows, None, on_bad_row="drop")
    parts = {name: [_plain(record[name]) for record in examples.records if name in record] for name in _TEXTS}
    parts = {name: texts for name, texts in parts.items() if texts}
    tokens = {} if tokenizer is None else {name: [len(ids) for ids in encode_texts(tokenizer, texts)] for name, texts in parts.items()}
    characters = {name: [len(text) for text in texts] for name, texts in parts.items()}
    keys = [json.dumps(record, sort_keys=True, default=str) for record in examples.records]
    prompts = parts.get("prompt", [])
    return Inspection(
        source=rows.source,
        layout=layout.name,
        format=examples.format,
        conversational=examples.conversational,
        columns=rows.columns,
        counts=examples.counts,
        characters={name: Lengths.of(lengths) for name, lengths in characters.items()},
        tokens={name: Lengths.of(lengths) for name, lengths in tokens.items()},
        identical_rows=len(keys) - len(set(keys)),
        repeated_prompts=len(prompts) - len(set(prompts)),
        pairs=_pair_facts(examples, tokens or characters, "tokens" if tokens else "characters"),
        example=examples.records[0],
    )


def _pair_facts(examples: Examples, lengths: dict[str, list[int]], unit: str) -> PairFacts | None:
    if examples.format != "preference":
        return None
    chosen, rejected = np.asarray(lengths["chosen"]), np.asarray(lengths["rejected"])
    identical = sum(record["chosen"] == record["rejected"] for record in examples.records)
    longer = float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())
    return PairFacts(identical, longer, float((chosen - rejected).mean()), unit)


def _plain(value: Any) -> str:
    """A text as it is; the contents of messages, or the steps of an answer, one after the other."""
    if isinstance(value, str):
        return value
    return "\n".join(str(part.get("content", "")) if isinstance(part, dict) else str(part) for part in value)
