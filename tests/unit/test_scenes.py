"""The `scenes` testbed: pictures hold what their facts say, and the judge is exact."""

from __future__ import annotations

import json

import numpy as np
import pytest

from telos.algorithms.language import _rows
from telos.core.errors import UsageError
from telos.data.images import decode, source_of
from telos.environments.text import scenes
from telos.environments.text.base import Item, TextTestbed, load_testbed
from telos.environments.text.scenes import CELLS, COLOURS, KINDS, SIZE, TASKS, TESTBED, render
from telos.models.language import load_tokenizer
from telos.objectives.visual import visual


def seen(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Where a picture is nearer to a colour than to any other or the ground."""
    known = np.array([COLOURS[colour], (scenes._GROUND,) * 3, *(rgb for name, rgb in COLOURS.items() if name != colour)], dtype=float)
    return np.linalg.norm(pixels[:, :, None] - known, axis=-1).argmin(-1) == 0


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return TESTBED.items("train", 120, seed=3)


def test_it_is_a_testbed_that_is_found_by_its_name() -> None:
    assert isinstance(load_testbed("scenes"), TextTestbed)


@pytest.mark.parametrize("width", [10, 20, 30, 40])
@pytest.mark.parametrize("height", [10, 20, 30, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_reaches_all_sides_of_its_box(kind: str, width: int, height: int) -> None:
    x, y = ((2 * np.arange(n) + 1) / n - 1 for n in (width, height))
    inside = KINDS[kind](*np.meshgrid(x, y))
    assert inside[0].any()
    assert inside[-1].any()
    assert inside[:, 0].any()
    assert inside[:, -1].any()


def test_kinds_of_a_pair_differ_in_a_detail_and_none_are_alike() -> None:
    x, y = ((2 * np.arange(24) + 1) / 24 - 1 for _ in range(2))
    masks = {kind: function(*np.meshgrid(x, y)) for kind, function in KINDS.items()}
    for one in masks:
        for other in masks:
            assert one == other or (masks[one] != masks[other]).mean() > 0.03


def test_a_lone_shape_is_found_in_the_picture_where_its_facts_say() -> None:
    for item in TESTBED.task_items("classification", 40, seed=1):
        ((_, colour, box),) = item.facts["shapes"]
        rows, columns = seen(render(item.facts), colour).nonzero()
        cell = SIZE // CELLS
        assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [x * cell for x in box]


def test_a_picture_follows_from_its_facts_alone_and_survives_json(items: list[Item]) -> None:
    for item in items[:10]:
        again = render(json.loads(json.dumps(item.facts)))
        assert again.dtype == np.uint8
        assert again.shape == (SIZE, SIZE, 3)
        assert np.array_equal(again, render(item.facts))
        file = source_of(TESTBED.columns(item)["image"])
        assert isinstance(file, bytes)
        assert np.array_equal(decode(file), again)


def test_the_boxes_of_detection_are_those_of_the_asked_colour_and_no_other_task_has_any(items: list[Item]) -> None:
    assert {item.facts["task"] for item in items} == set(TASKS)
    counts = set()
    for item in items:
        columns = TESTBED.columns(item)
        if item.facts["task"] == "classification":
            assert columns["boxes"] is None
            assert columns["category"] == item.facts["shapes"][0][0]
            continue
        colour = item.prompt.split(".")[0].removeprefix("Find ")
        assert columns["category"] is None
        assert sorted(columns["boxes"]) == sorted(box for _, other, box in item.facts["shapes"] if other == colour)
        counts.add(len(columns["boxes"]))
    assert counts == {1, 2}


def test_references_are_right_and_fit_their_limit(items: list[Item]) -> None:
    tokenizer = load_tokenizer("tinylm")
    for item in items:
        assert TESTBED.attributes(item, item.reference) == {"format": 1.0, "right": 1.0}
        assert len(tokenizer(item.reference)["input_ids"]) < TESTBED.max_new_tokens  # and the end token
    columns = [TESTBED.columns(item) for item in items]
    rewards = visual([item.reference for item in items], [row["boxes"] for row in columns], [row["category"] for row in columns])
    assert rewards == [pytest.approx(2.9) if row["boxes"] else 2.0 for row in columns]


def test_gold_of_detection_is_matched_overlap_over_the_larger_number_of_boxes() -> None:
    item = Item("", "", {"task": "detection", "boxes": [[0, 0, 2, 2], [4, 4, 6, 8]]})
    gold = {
        "<answer>[0,0,2,2] 0.9; [4,4,6,8] 0.9</answer>": 1.0,
        "<answer>[0,0,2,2] 0.9</answer>": 0.5,
        "<answer>[0,0,2,2] 0.9; [4,4,6,7] 0.9</answer>": (1 + 6 / 8) / 2,
        "<answer>[0,0,2,2] 0.9; [4,4,6,8] 0.9; [6,0,8,2] 0.1</answer>": 2 / 3,
        "<answer>[0,0,2,2] 0.9; [4,4,6,6] 0.9</answer>": 0.5,  # half of the second box is none
        "[0,0,2,2] 0.9; [4,4,6,8] 0.9": 0.0,
        "<answer>none</answer>": 0.0,
    }
    for text, wanted in gold.items():
        assert TESTBED.gold(item, text) == pytest.approx(wanted), text


def test_gold_of_classification_takes_the_kind_in_tags_and_nothing_else() -> None:
    item = Item("", "", {"task": "classification", "category": "ring"})
    assert [TESTBED.gold(item, text) for text in ("<answer>ring</answer>", "<answer>disc</answer>", "ring")] == [1.0, 0.0, 0.0]


def test_seeds_and_splits_give_different_pictures_and_the_same_seed_the_same() -> None:
    def pictures(split: str, seed: int) -> set[str]:
        return {json.dumps(item.facts["shapes"]) for item in TESTBED.items(split, 200, seed)}  # type: ignore[arg-type]

    assert pictures("train", 0) == pictures("train", 0)
    assert not pictures("train", 0) & pictures("test", 0)
    assert not pictures("validation", 0) & pictures("test", 0)
    assert pictures("train", 0) != pictures("train", 1)


def test_rows_have_the_picture_and_what_rewards_need_as_json() -> None:
    rows = _rows.testbed_rows(TESTBED, "train", 4, 0, True)
    assert json.loads(json.dumps(rows)) == rows
    assert {"prompt", "completion", "image", "boxes", "category", "facts"} <= set(rows[0])


@pytest.mark.parametrize(
    ("given", "message"), [({"n": None}, "without end"), ({"n": -1}, "0 or more"), ({"n": 1, "split": "tset"}, "did you mean")]
)
def test_what_cannot_be_drawn_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TESTBED.items(**{"split": "train", **given})  # type: ignore[arg-type]
