"""Boxes in images: how they are written, how far two overlap, which predicted box stands for which true one, and average precision.

A box is (left, top, right, bottom) in any unit, right and bottom exclusive. Plain Python: a picture has few boxes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]
Found = tuple[Box, float]  # a predicted box with its confidence in [0, 1]

_NUMBER = r"\s*(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*"
# A box, and the next number before another box: its confidence, whatever words stand between them.
_FOUND = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\](?:[^\[\]0-9.]{{0,40}}([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?))?")
_MOST = 100  # boxes of one answer; with more it is none


def read_boxes(text: str) -> list[Found] | None:
    """The boxes of an answer: `[1,2,3,4] 0.9; [5,6,7,8] 0.5`, or a list of `{'Position': [1, 2, 3, 4], 'Confidence': 0.9}`. None where there is no box, a
    box without a confidence from 0 to 1, or more than a hundred boxes."""
    found: list[Found] = []
    for match in _FOUND.finditer(text):
        if match[5] is None or float(match[5]) > 1 or len(found) == _MOST:
            return None
        found.append(((float(match[1]), float(match[2]), float(match[3]), float(match[4])), float(match[5])))
    return found or None


def write_boxes(found: Sequence[Found]) -> str:
    """Boxes with their confidences as `read_boxes` reads them, in the shorter form."""
    return "; ".join(f"[{','.join(f'{x:g}' for x in box)}] {confidence:g}" for box, confidence in found)


def iou(one: Box, other: Box) -> float:
    """Intersection over union, in [0, 1]; 0 where a box has no area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) if box[2] > box[0] and box[3] > box[1] else 0.0 for box in (one, other)]
    if width <= 0 or height <= 0 or min(areas) <= 0:
        return 0.0
    return width * height / (sum(areas) - width * height)


def by_confidence(predicted: Sequence[Found]) -> list[Found]:
    """The most confident first; equal ones in their order. A box that is there twice counts once, with its higher confidence."""
    found: dict[Box, Found] = {}
    for box, confidence in sorted(predicted, key=lambda one: -one[1]):
        found.setdefault(box, (box, confidence))
    return list(found.values())


def matched(predicted: Sequence[Found], true: Sequence[Box], threshold: float = 0.5) -> list[tuple[float, float]]:
    """(IoU, confidence) of each predicted box in the order of `by_confidence`.

    Each takes the true box that overlaps it most among those not yet taken; an overlap of `threshold` or less is none, and counts as 0.
    """
    free = list(true)
    out = []
    for box, confidence in by_confidence(predicted):
        best = max(free, key=lambda other: iou(box, other), default=None)
        overlap = 0.0 if best is None else iou(box, best)
        if best is None or overlap <= threshold:
            out.append((0.0, confidence))
            continue
        free.remove(best)
        out.append((overlap, confidence))
    return out


def average_precision(pictures: Sequence[tuple[Sequence[Found], Sequence[Box]]], threshold: float = 0.5) -> float:
    """Area under precision over recall of all pictures' boxes, most confident first, with precision made non-increasing (all points, as COCO's without its
    101 recall levels). Predictions of equal confidence enter together, so that their order decides nothing. NaN without a true box."""
    total = sum(len(true) for _, true in pictures)
    if total == 0:
        return float("nan")
    hits = sorted(((c, overlap > 0) for predicted, true in pictures for overlap, c in matched(predicted, true, threshold)), reverse=True)
    curve: list[tuple[float, float]] = []  # recall, precision
    right = 0
    for i, (confidence, hit) in enumerate(hits, 1):
        right += hit
        if i == len(hits) or hits[i][0] < confidence:
            curve.append((right / total, right / i))
    area, best, reached = 0.0, 0.0, curve[-1][0] if curve else 0.0
    for recall, precision in reversed(curve):
        area += (reached - recall) * best
        best, reached = max(best, precision), recall
    return area + reached * best
