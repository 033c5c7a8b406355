"""`scenes`: small rendered pictures with two tasks, detection and fine-grained classification, and an exact judge.

    Find red.                                                  Name the shape.
    <image>Boxes:<answer>[0,1,3,3] 0.9; [4,2,5,4] 0.9</answer>     <image>Shape:<answer>frame</answer>

A picture is 50 × 50 RGB: shapes of eight kinds in six colours on a dark ground, of various sizes and proportions, side by side or touching, under noise.
Detection asks for the shapes of a colour among others; classification for the kind of the one shape that is there, in any colour, and kinds come in pairs
that differ in one detail (disc and ring, square and frame, triangle and arrow, cross and saltire). Everything in a picture follows from an item's facts, so a
picture is drawn where it is needed: `columns` gives it as text (a PNG data URI) with what rewards need, `boxes` for detection and `category` for
classification.

What is right. An answer stands in `<answer>` tags, at most after `<think>…</think>`, and nothing follows. Boxes are [left, top, right, bottom] in
cells of 10 × 10 pixels, on whose grid shapes lie (so that a coordinate, 0 to 5, is one digit), each with a confidence from 0 to 1, separated by semicolons.
The gold score of detection is the sum of the matched boxes' IoU (`functional.boxes.matched`: the most confident chooses first, an IoU of 1/2 or less is
none) over the larger number of boxes, predicted or true: missing and superfluous ones both cost. That of classification is 1 for the right kind, else 0.
Splits go by what is in a picture.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np

from telos.core.errors import UsageError, did_you_mean
from telos.core.seeds import numpy_generator
from telos.data.images import data_uri, encode_png
from telos.environments.text.base import Item, Split
from telos.functional.boxes import Box, Found, iou, matched, read_boxes, write_boxes

Task = Literal["detection", "classification"]
TASKS: tuple[Task, ...] = get_args(Task)
SIZE = 50  # pixels, of a picture's side
CELLS = 5  # of a side: the unit of boxes
COLOURS = {
    "red": (220, 60, 50),
    "green": (60, 180, 75),
    "blue": (60, 100, 230),
    "yellow": (230, 210, 60),
    "purple": (170, 70, 200),
    "white": (230, 230, 230),
}
_GROUND = 40  # level of the background, of 255
_NOISE = 8  # standard deviation, in levels
_SIDES = {"detection": (1, 3), "classification": (2, 4)}  # smallest and largest side of a shape, in cells
_TWO, _OTHER = 0.15, 0.4  # shares of the detection items with a second shape to be found, and with one of another colour

# Whether a point belongs to a shape; x and y in [−1, 1] over the shape's box, y downwards. Each reaches all four sides of its box at any size.
KINDS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "disc": lambda x, y: x**2 + y**2 <= 1,
    "ring": lambda x, y: (x**2 + y**2 <= 1) & (x**2 + y**2 >= 0.3),
    "square": lambda x, y: np.ones_like(x, dtype=bool),
    "frame": lambda x, y: np.maximum(abs(x), abs(y)) >= 0.55,
    "triangle": lambda x, y: abs(x) <= (y + 1) / 2 + 0.1,
    "arrow": lambda x, y: (abs(x) <= y + 1.1) & ((y <= 0) | (abs(x) <= 0.35)),
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) <= 0.35,
    "saltire": lambda x, y: abs(abs(x) - abs(y)) <= 0.4,
}

_ANSWER = re.compile(r"\s*(?:<think>.*?</think>\s*)?<answer>(.*?)</answer>\s*", re.DOTALL)


def answer_in(completion: str) -> str | None:
    """What stands in the answer's tags, or None for a completion in another form."""
    match = _ANSWER.fullmatch(completion)
    return match[1] if match and "<answer>" not in match[1] else None


def boxes_in(completion: str) -> list[Found] | None:
    """The boxes of an answer with their confidences; None where it is not in the form."""
    answer = answer_in(completion)
    return None if answer is None else read_boxes(answer)


def render(facts: dict[str, Any]) -> np.ndarray:
    """The picture of an item, [50, 50, 3] uint8."""
    pixels = np.full((SIZE, SIZE, 3), _GROUND, dtype=np.float64)
    for kind, colour, box in facts["shapes"]:
        left, top, right, bottom = (x * SIZE // CELLS for x in box)
        x = (2 * np.arange(right - left) + 1) / (right - left) - 1  # centres of pixels
        y = (2 * np.arange(bottom - top) + 1) / (bottom - top) - 1
        inside = KINDS[kind](*np.meshgrid(x, y))
        pixels[top:bottom, left:right][inside] = COLOURS[colour]
    pixels += numpy_generator(facts["noise"], "noise").normal(0.0, _NOISE, pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _shapes(rng: np.random.Generator, colours: list[str], sides: tuple[int, int]) -> list[list[Any]] | None:
    """[kind, colour, box] of shapes in these colours at random places; None when there was no room."""
    kinds = list(KINDS)
    placed: list[list[Any]] = []
    for colour in colours:
        for _ in range(20):
            width, height = (int(side) for side in rng.integers(sides[0], sides[1] + 1, 2))
            left, top = int(rng.integers(CELLS - width + 1)), int(rng.integers(CELLS - height + 1))
            box = [left, top, left + width, top + height]
            if all(iou(_box(box), _box(other)) == 0 for _, _, other in placed):
                placed.append([kinds[int(rng.integers(len(kinds)))], colour, box])
                break
        else:
            return None
    return placed


def _box(values: list[int]) -> Box:
    return (float(values[0]), float(values[1]), float(values[2]), float(values[3]))


def _split_of(shapes: list[list[Any]]) -> Split:
    """80 % train, 10 % validation, 10 % test, by the shapes alone."""
    bucket = hashlib.sha256(json.dumps(shapes).encode()).digest()[0] * 10 // 256
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _item(rng: np.random.Generator, task: Task, split: Split) -> Item:
    names = list(COLOURS)
    while True:
        asked = names[int(rng.integers(len(names)))]
        wanted = 1 + int(task == "detection" and rng.random() < _TWO)
        others = [names[(names.index(asked) + int(rng.integers(1, len(names)))) % len(names)]]
        others = others if task == "detection" and rng.random() < _OTHER else []
        shapes = _shapes(rng, [asked] * wanted + others, _SIDES[task])
        if shapes is None or _split_of(shapes) != split:
            continue
        facts: dict[str, Any] = {"task": task, "noise": int(rng.integers(2**31)), "shapes": shapes}
        if task == "classification":
            facts["category"] = shapes[0][0]
            return Item("Name the shape.\n<image>Shape:", f"<answer>{facts['category']}</answer>", facts)
        # From left to right, so that there is one reference.
        facts["boxes"] = sorted(box for _, colour, box in shapes if colour == asked)
        reference = write_boxes([(_box(box), 0.9) for box in facts["boxes"]])
        return Item(f"Find {asked}.\n<image>Boxes:", f"<answer>{reference}</answer>", facts)


class Scenes:
    """The `scenes` testbed; see the module's docstring."""

    name = "scenes"
    max_new_tokens = 64

    def items(self, split: Split, n: int | None = None, seed: int = 0) -> list[Item]:
        """`n` items, detection and classification in turn. Raises `UsageError` for `n=None`, because the pictures have no end, and for an unknown split."""
        return self.task_items(None, n, seed, split)

    def task_items(self, task: Task | None, n: int | None, seed: int = 0, split: Split = "test") -> list[Item]:
        """As `items`, all of one task."""
        if n is None:
            raise UsageError("scenes makes pictures without end; say how many items are wanted")
        if split not in get_args(Split):
            raise UsageError(f"unknown split {split!r}{did_you_mean(split, get_args(Split))}; splits are {', '.join(get_args(Split))}")
        if task is not None and task not in TASKS:
            raise UsageError(f"scenes has no task {task!r}{did_you_mean(task, TASKS)}; tasks are {', '.join(TASKS)}")
        if n < 0:
            raise UsageError(f"{n} items cannot be drawn; n must be 0 or more")
        rng = numpy_generator(seed, "scenes", split, task or "all")
        return [_item(rng, task or TASKS[i % len(TASKS)], split) for i in range(n)]

    def columns(self, item: Item) -> dict[str, Any]:
        """What a row has beside its prompt: the picture, and what rewards compare an answer with."""
        return {
            "image": data_uri(encode_png(render(item.facts))),
            "boxes": item.facts.get("boxes"),
            "category": item.facts.get("category"),
        }

    def gold(self, item: Item, completion: str) -> float:
        """In [0, 1]; see the module's docstring."""
        if item.facts["task"] == "classification":
            return float((answer_in(completion) or "").strip() == item.facts["category"])
        found = boxes_in(completion)
        true = [_box(box) for box in item.facts["boxes"]]
        overlaps = [overlap for overlap, _ in matched(found or [], true)]
        return math.fsum(overlaps) / max(len(overlaps), len(true))

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        """`format` is 1 for an answer in the form; `right` is the gold score."""
        form = answer_in(completion) if item.facts["task"] == "classification" else boxes_in(completion)
        return {"format": float(form is not None), "right": self.gold(item, completion)}

    def corpus(self, n: int, seed: int) -> Iterator[str]:
        """`n` documents of the training split, without their pictures."""
        for item in self.items("train", n, seed):
            yield item.prompt + item.reference


TESTBED = Scenes()
