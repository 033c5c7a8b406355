"""Verifiable rewards of Visual-RFT (Liu et al. 2025, arXiv:2503.01785, section 3.2), in the signature of TRL's reward functions.

    telos train grpo --reward telos.objectives.visual:visual ...

| name | column | reward |
|---|---|---|
| `detection_iou` | `boxes` | R_IoU = Σ IoU_i / max(predicted boxes, true boxes), in [0, 1] |
| `detection_confidence` | `boxes` | R_conf = mean of c_i where box i overlaps a true one, of 1 − c_i where it does not, in [0, 1] |
| `tags` | | R_format = 1 for `<answer>…</answer>`, at most after `<think>…</think>`, and nothing else; else 0 |
| `detection` | `boxes` | R_IoU + R_conf + R_format, in [0, 3] |
| `accuracy` | `category` | R_acc = 1 for the right class in the answer's tags, else 0 |
| `classification` | `category` | R_acc + R_format, in [0, 2] |
| `visual` | either | `detection` for rows with `boxes`, `classification` for rows with `category` |

Predicted boxes choose a true one in the order of their confidence, the one that they overlap most among those not yet taken; an overlap of τ = 1/2 or
less is none (`functional.boxes.matched`). `boxes` is a list of [left, top, right, bottom], `category` the class or a list of names for it. A row whose column
is None has no such reward.

What the paper has otherwise: it divides R_IoU by the number of predicted boxes; its authors' code divides by the larger of both numbers, as is done here,
so that a missed box costs. A text without a readable box gets 0 for IoU and confidence. Thinking is not demanded, because a small policy may have nothing to
think with (`verifiers.format_tags` demands it).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from telos.functional.boxes import matched, read_boxes
from telos.objectives.reward_worker import plain_text
from telos.objectives.verifiers import Rewards, boxes_of, by_row, exact_match, tagged

THRESHOLD = 0.5  # τ: an IoU up to which two boxes do not overlap
_FORM = re.compile(r"\s*(?:<think>.*?</think>\s*)?<answer>.*?</answer>\s*", re.DOTALL)


def _matches(row: int, text: str, boxes: Any) -> tuple[list[tuple[float, float]], int]:
    """(IoU, confidence) of each predicted box, and how many true ones there are."""
    true = boxes_of(row, boxes)
    return matched(read_boxes(tagged(text)) or [], true, THRESHOLD), len(true)


def detection_iou(completions: Sequence[Any], boxes: Sequence[Any], **_: Any) -> Rewards:
    """R_IoU: matched overlap over the larger number of boxes, predicted or true."""

    def score(row: int, text: str, value: Any) -> float:
        found, true = _matches(row, text, value)
        return math.fsum(overlap for overlap, _ in found) / max(len(found), true)

    return by_row(completions, boxes, score)


def detection_confidence(completions: Sequence[Any], boxes: Sequence[Any], **_: Any) -> Rewards:
    """R_conf: how far confidences tell the boxes that match from those that do not; 0 without a box."""

    def score(row: int, text: str, value: Any) -> float:
        found, _ = _matches(row, text, value)
        return math.fsum(c if overlap > 0 else 1 - c for overlap, c in found) / max(1, len(found))

    return by_row(completions, boxes, score)


def tags(completions: Sequence[Any], **_: Any) -> Rewards:
    """R_format."""
    texts = map(plain_text, completions)
    return [float(_FORM.fullmatch(text) is not None and text.count("<answer>") == 1) for text in texts]


def accuracy(completions: Sequence[Any], category: Sequence[Any], **_: Any) -> Rewards:
    """R_acc: the class in the answer's tags, up to case, white space and punctuation at its ends."""
    return exact_match(completions, category)


def _sum(*parts: Rewards) -> Rewards:
    """Row by row, None where a part does not apply."""
    rows = zip(*parts, strict=True)
    return [None if any(value is None for value in row) else math.fsum(value for value in row if value is not None) for row in rows]


def detection(completions: Sequence[Any], boxes: Sequence[Any], **_: Any) -> Rewards:
    """R_d = R_IoU + R_conf + R_format, in [0, 3]."""
    return _sum(detection_iou(completions, boxes), detection_confidence(completions, boxes), tags(completions))


def classification(completions: Sequence[Any], category: Sequence[Any], **_: Any) -> Rewards:
    """R_cls = R_acc + R_format, in [0, 2]."""
    return _sum(accuracy(completions, category), tags(completions))


def visual(completions: Sequence[Any], boxes: Sequence[Any] | None = None, category: Sequence[Any] | None = None, **_: Any) -> Rewards:
    """The reward of the row's task; None for a row of neither."""
    nothing: Rewards = [None] * len(completions)
    found = nothing if boxes is None else detection(completions, boxes)
    named = nothing if category is None else classification(completions, category)
    return [other if one is None else one for one, other in zip(found, named, strict=True)]
