"""The learned text of a row (a document, a completion, or what the assistant says) in segments: lines, sentences, or the whole."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from telos.data.readers import Record

By = Literal["sentence", "line", "document"]
# A sentence ends with its marks and closing quotes or brackets before white space; the white space begins the next sentence, as tokenizers see words.
_ENDS = {"sentence": re.compile(r"[.!?]+[\"'”’)\]]*(?=\s)"), "line": re.compile(r"\n")}


def split(text: str, by: By) -> list[str]:
    """The segments of a text; joined they are the text. None is white space alone: that belongs to the segment before, or else to the next."""
    if by == "document":
        return [text] if text else []
    ends = [match.end() for match in _ENDS[by].finditer(text)]
    found: list[str] = []
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        segment = text[start:end]
        if found and (not segment.strip() or not found[-1].strip()):
            found[-1] += segment
        elif segment:
            found.append(segment)
    return found


def learned_texts(record: Record) -> list[str]:
    """What of a checked row is learned: its document or completion, or each of the assistant's messages in it."""
    value = record[_learned_column(record)]
    return [value] if isinstance(value, str) else [message["content"] for message in value if message["role"] == "assistant"]


def with_learned_texts(record: Record, texts: Sequence[str]) -> Record:
    """The row with other texts in the places of `learned_texts`."""
    column, remaining = _learned_column(record), iter(texts)

    def replaced(message: dict[str, Any]) -> dict[str, Any]:
        return message | {"content": next(remaining)} if message["role"] == "assistant" else message

    value = record[column]
    return record | {column: next(remaining) if isinstance(value, str) else [replaced(message) for message in value]}


def _learned_column(record: Record) -> str:
    return next(name for name in ("text", "messages", "completion") if name in record)
