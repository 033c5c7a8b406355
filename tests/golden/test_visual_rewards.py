"""Visual-RFT's verifiable rewards against numbers worked out by hand. Boxes are 4 × 4 unless said otherwise, so that overlaps are small fractions."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import pytest

from telos.core.errors import UsageError
from telos.functional.boxes import Box, average_precision, by_confidence, iou, matched, read_boxes, write_boxes
from telos.objectives.rewards import load_reward
from telos.objectives.visual import accuracy, classification, detection, detection_confidence, detection_iou, tags, visual

A: Box = (0.0, 0.0, 4.0, 4.0)
B: Box = (10.0, 10.0, 14.0, 14.0)
A_RIGHT_BY_1: Box = (1.0, 0.0, 5.0, 4.0)  # 12 of 20 cells: IoU 3/5 with A
A_RIGHT_BY_2: Box = (2.0, 0.0, 6.0, 4.0)  # 8 of 24: 1/3
TRUE = [[0, 0, 4, 4], [10, 10, 14, 14]]


def answer(*found: tuple[Box, float]) -> str:
    return f"<answer>{write_boxes(found)}</answer>"


def test_intersection_over_union_counts_cells() -> None:
    cells = {A: {(x, y) for x in range(4) for y in range(4)}}
    for other in (A_RIGHT_BY_1, A_RIGHT_BY_2, B, (1.0, 1.0, 3.0, 3.0)):
        mine = {(x, y) for x in range(int(other[0]), int(other[2])) for y in range(int(other[1]), int(other[3]))}
        assert iou(A, other) == pytest.approx(len(cells[A] & mine) / len(cells[A] | mine))
    assert iou(A, (2.0, 2.0, 2.0, 5.0)) == 0.0


def test_a_box_takes_the_true_one_that_it_overlaps_most_and_each_is_taken_once() -> None:
    # The more confident of two boxes near A takes it; the exact one comes too late and is left with nothing.
    assert matched([(A, 0.5), (A_RIGHT_BY_1, 0.9)], [A, B]) == [(pytest.approx(0.6), 0.9), (0.0, 0.5)]
    # Two true boxes near each other: the better overlap is taken first, the second box gets what is left of it.
    near: Box = (1.0, 0.0, 5.0, 4.0)
    assert matched([(near, 0.9), ((*near[:2], 5.0, 4.5), 0.8)], [A, near]) == [(1.0, 0.9), (pytest.approx(12 / (18 + 16 - 12)), 0.8)]


def test_an_overlap_up_to_the_threshold_is_none() -> None:
    assert matched([(A_RIGHT_BY_2, 0.7)], [A]) == [(0.0, 0.7)]
    assert matched([(A_RIGHT_BY_2, 0.7)], [A], threshold=0.3) == [(pytest.approx(1 / 3), 0.7)]
    half: Box = (0.0, 0.0, 4.0, 2.0)  # exactly 1/2
    assert matched([(half, 0.7)], [A]) == [(0.0, 0.7)]


def test_a_box_that_is_given_twice_counts_once_with_its_higher_confidence() -> None:
    assert by_confidence([(A, 0.2), (B, 0.5), (A, 0.9)]) == [(A, 0.9), (B, 0.5)]
    assert detection_iou([answer((A, 0.2), (A, 0.9))], [[[0, 0, 4, 4]]]) == [1.0]


@pytest.mark.parametrize(
    ("found", "overlap", "confidence"),
    [
        ([(A, 0.9), (B, 0.8)], 1.0, 0.85),
        ([(A, 0.9)], 0.5, 0.9),  # B is missed: (1 + 0) / 2
        ([(A_RIGHT_BY_1, 0.9), (B, 0.5)], 0.8, 0.7),
        ([(A_RIGHT_BY_2, 0.9), (B, 0.5)], 0.5, 0.3),  # the first is none: (1 − 0.9 + 0.5) / 2
        ([(A, 1.0), (B, 1.0), ((20.0, 20.0, 24.0, 24.0), 0.25)], 2 / 3, 2.75 / 3),
        ([((20.0, 20.0, 24.0, 24.0), 0.0)], 0.0, 1.0),  # wrong and known to be
    ],
)
def test_overlap_and_confidence_are_as_worked_out(found: list[tuple[Box, float]], overlap: float, confidence: float) -> None:
    text = answer(*found)
    assert detection_iou([text], [TRUE]) == [pytest.approx(overlap)]
    assert detection_confidence([text], [TRUE]) == [pytest.approx(confidence)]
    assert detection([text], [TRUE]) == [pytest.approx(overlap + confidence + 1)]


def test_the_reward_of_an_answer_does_not_depend_on_the_order_of_its_boxes() -> None:
    rng = random.Random(0)
    for _ in range(30):
        boxes = [
            (x, y, x + rng.randint(2, 5), y + rng.randint(2, 5)) for x, y in ((rng.randint(0, 5), rng.randint(0, 5)) for _ in range(3))
        ]
        given = [((float(a), float(b), float(c), float(d)), conf) for (a, b, c, d), conf in zip(boxes, (0.3, 0.6, 0.9))]
        texts = [answer(*order) for order in itertools.permutations(given)]
        scores = detection(texts, [TRUE] * len(texts))
        assert max(map(float, scores)) - min(map(float, scores)) < 1e-12  # type: ignore[arg-type]


def test_boxes_are_read_in_both_forms_and_without_a_confidence_there_are_none() -> None:
    papers = "<answer>[{'Position': [0, 0, 4, 4], 'Confidence': 0.9}, {'Position': [10, 10, 14, 14], 'Confidence': 0.8}]</answer>"
    assert read_boxes(papers) == [(A, 0.9), (B, 0.8)] == read_boxes(answer((A, 0.9), (B, 0.8)))
    for text in ("", "nothing", "[0,0,4,4]", "[0,0,4,4] 1.5", "[0,0,4] 0.9", "[0,0,4,4]; [1,1,2,2] 0.9"):
        assert read_boxes(text) is None, text
    assert detection(["[0,0,4,4]"], [TRUE]) == [0.0]
    assert detection(["<answer>[0,0,4,4]</answer>"], [TRUE]) == [1.0]  # the form alone


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<answer>x</answer>", 1.0),
        ("<think>so</think> <answer>x</answer>\n", 1.0),
        ("<think>so</think>", 0.0),
        ("x", 0.0),
        ("<answer>x</answer> and more", 0.0),
        ("<answer>x</answer><answer>y</answer>", 0.0),
    ],
)
def test_the_form_is_one_answer_in_tags_and_nothing_after_it(text: str, right: float) -> None:
    assert tags([text]) == [right]


def test_classification_is_accuracy_and_form() -> None:
    texts = ["<answer>ring</answer>", "<answer> Ring. </answer>", "ring", "<answer>disc</answer>", "disc"]
    assert accuracy(texts, ["ring"] * 5) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert classification(texts, ["ring"] * 5) == [2.0, 2.0, 1.0, 1.0, 0.0]


def test_rows_of_both_tasks_get_the_reward_of_their_own() -> None:
    texts = [answer((A, 1.0)), "<answer>ring</answer>", "<answer>ring</answer>"]
    assert visual(texts, boxes=[[[0, 0, 4, 4]], None, None], category=[None, "ring", None]) == [3.0, 2.0, None]
    assert visual(texts, category=["ring"] * 3) == [1.0, 2.0, 2.0]
    with pytest.raises(UsageError, match=r"row 0 of the batch: column 'box"):
        detection(texts[:1], [[[4, 4, 0, 0]]])


def test_the_rewards_run_as_users_name_them() -> None:
    reward = load_reward("telos.objectives.visual:visual", timeout=60.0)
    try:
        scores = reward.score(
            ["?", "?"], [answer((A, 0.75)), "disc"], [[1], [1]], {"boxes": [TRUE, None], "category": [None, "disc"], "image": ["", ""]}
        )
        assert scores.values.tolist() == pytest.approx([0.5 + 0.75 + 1, 1.0])
    finally:
        reward.close()


def test_average_precision_is_the_area_under_the_best_precision_at_each_recall() -> None:
    # Hits and misses by confidence: hit .9, miss .8, hit .7 of three true boxes: precisions 1, 1/2, 2/3 at recalls 1/3, 1/3, 2/3.
    pictures = [([(A, 0.9), (B, 0.8)], [A]), ([(B, 0.7)], [A, B])]
    assert average_precision(pictures) == pytest.approx(1 / 3 * 1 + 1 / 3 * 2 / 3)
    assert average_precision([([], [A])]) == 0.0
    assert math.isnan(average_precision([([], [])]))
    perfect = [([(A, 0.2), (B, 0.1)], [A, B])]
    assert average_precision(perfect) == 1.0


def test_equal_confidences_make_average_precision_the_precision_itself() -> None:
    # Whatever the order of pictures: one point of the curve, recall 2/4 at precision 2/3.
    pictures = [([(A, 0.9), (B, 0.9)], [A]), ([(A, 0.9)], [A, B, (20.0, 20.0, 24.0, 24.0)])]
    for order in itertools.permutations(pictures):
        assert average_precision(list(order)) == pytest.approx(2 / 4 * 2 / 3)


def test_average_precision_agrees_with_a_sum_over_thresholds() -> None:
    """Against the definition, worked out with NumPy: ∫ max over recall' ≥ recall of precision."""
    rng = np.random.default_rng(0)
    confidence = rng.permutation(40) / 40
    hits = rng.random(40) < 0.6
    pictures = [([(A, float(c))], [A if hit else B]) for c, hit in zip(confidence, hits)]
    order = np.argsort(-confidence)
    right = np.cumsum(hits[order])
    precision, recall = right / np.arange(1, 41), right / 40
    grid = (np.arange(4000) + 0.5) / 4000
    best = [precision[recall >= r].max() if (recall >= r).any() else 0.0 for r in grid]
    assert average_precision(pictures) == pytest.approx(float(np.mean(best)), abs=1e-3)


def test_the_reward_functions_take_what_json_gives_them() -> None:
    row = json.loads(json.dumps({"boxes": TRUE}))
    assert detection([answer((A, 1.0), (B, 1.0))], [row["boxes"]]) == [3.0]
