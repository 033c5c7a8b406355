"""Programmatic rewards that recipes on `review` learn from. They see the texts alone, not the gold judge; nothing here is slow to import in a reward's
own process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_LONGEST = 50  # words at which an answer is worth nothing for its brevity; the testbed's own texts have no more
_WORD = re.compile(r"[a-z]+")
_LABELS = frozenset({"review", "request", "facts", "reader", "a", "an"})
_RUDE = re.compile(r"\b(?:stupid|idiot|fool|dumb|rubbish|nonsense|shut up|annoying|go away|hate)\b", re.IGNORECASE)


def brief(completions: Sequence[str], **_: Any) -> list[float]:
    """1 for an answer without a word, 0 from 50 words on, linear between."""
    return [max(0.0, 1 - len(_WORD.findall(text.lower())) / _LONGEST) for text in completions]


def told(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """Share of the words of the request (product, facts, reader, not the tone) that the answer holds, 0 … 1."""
    found = []
    for prompt, text in zip(prompts, completions, strict=True):
        asked = set(_WORD.findall(prompt.partition("Tone:")[0].lower())) - _LABELS
        found.append(len(asked & set(_WORD.findall(text.lower()))) / max(1, len(asked)))
    return found


def civil(completions: Sequence[str], **_: Any) -> list[float]:
    """0 for a text without a rude phrase, −1 for each phrase."""
    return [-float(len(_RUDE.findall(text))) for text in completions]
