"""Verifiable rewards against answers judged by hand, and how each of them refuses what it cannot understand."""

from __future__ import annotations

import inspect
import json
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telos.core.errors import UsageError
from telos.environments.text import arith
from telos.objectives import verifiers
from telos.objectives.rewards import FunctionReward, ProcessReward
from telos.objectives.verifiers import (
    all_unit_tests,
    answer_is,
    answer_match,
    arithmetic_steps,
    box_iou,
    code_of,
    cosine_length,
    exact_match,
    final_answer,
    format_pattern,
    format_tags,
    iou,
    length_cosine,
    length_linear,
    linear_length,
    ngram_repetition,
    normalised,
    numbers_in,
    program_output,
    repetition,
    tags_in_order,
    unit_tests,
    whole_match,
)

NAMED = {
    name: getattr(verifiers, name)
    for name in (
        *("exact_match", "answer_match", "format_tags", "format_pattern", "arithmetic_steps", "unit_tests", "all_unit_tests"),
        *("program_output", "box_iou", "length_cosine", "length_linear", "repetition"),
    )
}


# Called as rewards are ---------------------------------------------------------------------------------------------------------------------


def test_every_reward_of_the_table_can_be_named_and_no_other_is_in_it():
    assert verifiers.__doc__ is not None
    table = [line for line in verifiers.__doc__.splitlines() if line.startswith("| `")]
    assert {name.strip("` ") for line in table for name in line.split("|")[1].split(",")} == set(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_each_is_called_by_keyword_and_says_which_column_it_lacks(name: str):
    reward = FunctionReward(NAMED[name], name=name)
    needed = [p.name for p in inspect.signature(NAMED[name]).parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    columns = set(needed) - {"completions", "completion_ids"}
    if columns:
        with pytest.raises(UsageError, match=f"needs? a parameter|has a parameter '{next(iter(columns))}'"):
            reward.score(["p"], ["text"], [[1]], {})
        # A row without a value has no such reward.
        scores = reward.score(["p"], ["text"], [[1]], {column: [None] for column in columns})
        assert scores.counts() == {"valid": 0, "not_applicable": 1, "error": 0}
    else:
        assert reward.score(["p"], ["text"], [[1]], {}).counts()["valid"] == 1


def test_they_run_by_name_in_the_process_of_a_reward():
    reward = ProcessReward("telos.objectives.verifiers", "answer_match", timeout=60.0)
    try:
        scores = reward.score(["p"] * 3, ["Answer: 12", "13", "?"], [[1]] * 3, {"answer": ["12", 12, None], "other": [1, 2, 3]})
        assert scores.values[:2].tolist() == [1.0, 0.0]
        assert scores.counts() == {"valid": 2, "not_applicable": 1, "error": 0}
    finally:
        reward.close()


def test_conversations_are_judged_by_their_text():
    turns = [{"role": "assistant", "content": "The answer is 12."}]
    assert answer_match([turns], [12]) == [1.0]
    assert exact_match([[{"role": "assistant", "content": "Paris."}]], ["paris"]) == [1.0]


# Answers -----------------------------------------------------------------------------------------------------------------------------------


def test_exact_match_overlooks_case_space_and_punctuation_at_the_ends_only():
    given = ["Paris", "  paris. ", "“Paris!”", "in Paris", "<answer> PARIS </answer> indeed", "Par is", "", "Paris"]
    assert exact_match(given, ["Paris"] * 7 + [None]) == [1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, None]
    assert exact_match(["b", "c", "1.50"], [["a", "b"], ["a", "b"], 1.5]) == [1.0, 0.0, 0.0]
    assert normalised("  ＡＢＣ\tﬁne\n １２ ") == "abc fine 12"
    assert normalised(".5") == ".5"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("12", [12]),
        ("-12.50", [Fraction(-25, 2)]),
        ("−3 and +4", [-3, 4]),
        ("1,234,567.5", [Fraction(2469135, 2)]),
        ("1,2,3", [1, 2, 3]),
        ("12,34", [12, 34]),
        ("3/4", [Fraction(3, 4)]),
        ("-3 / 4", [Fraction(-3, 4)]),
        (r"\frac{3}{4}", [Fraction(3, 4)]),
        (r"-\dfrac34", [Fraction(-3, 4)]),
        (r"\frac{-3}{4}", [Fraction(-3, 4)]),
        (r"1\frac{3}{4}", [Fraction(7, 4)]),
        (r"\frac{1}{0}", []),
        ("1/0", []),
        ("$5", [5]),
        ("$1,000.25", [Fraction(400100, 400)]),
        ("-$5", [-5]),
        ("50%", [50]),
        ("1.5e3", [1500]),
        ("2E-2", [Fraction(1, 50)]),
        (".5", [Fraction(1, 2)]),
        ("5.", [5]),
        (r"12{,}345", [12345]),
        (r"12\,345", [12345]),
        ("17-5", [17, 5]),
        ("17 - 5 = 12", [17, 5, 12]),
        ("x=-3", [-3]),
        ("x2 y_3 v1.2", []),
        ("9" * 300, []),
        ("no numbers", []),
        ("²", []),
    ],
)
def test_numbers_are_read_exactly(text: str, numbers: list[Any]):
    assert numbers_in(text) == numbers


@settings(max_examples=60, deadline=None)
@given(value=st.fractions(max_denominator=1000, min_value=-(10**6), max_value=10**6))
def test_a_fraction_is_read_as_it_was_written_in_each_notation(value: Fraction):
    above, below = value.numerator, value.denominator
    assert numbers_in(f"so {above}/{below} it is") == [value]
    assert numbers_in(rf"so $\frac{{{above}}}{{{below}}}$") == [value]
    assert numbers_in(f"it is {above:,}") == [above]
    assert numbers_in(f"it is {above / 100:.2f}.") == [Fraction(above, 100)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12}.", "12"),
        (r"\boxed{\frac{1}{2}} then", r"\frac{1}{2}"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{unclosed {", "unclosed {"),
        (r"\boxed 7$ and", "7"),
        ("work\n#### 1,234\n", "1,234"),
        ("Answer: 12\nNot 13", "12"),
        ("**Answer:** 12", "12"),
        ("Answer:\n  12", "12"),
        ("The final answer is 12", "12"),
        ("the answer is: 12", "12"),
        ("<think>Answer: 3</think><answer>\n4\n</answer>", "4"),
        (r"<answer>\boxed{5}</answer>", "5"),
        ("<answer>The answer is 6</answer>", "6"),
        ("answers vary", None),
        ("12", None),
        ("", None),
    ],
)
def test_the_final_answer_is_what_the_last_marker_announces(text: str, answer: str | None):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        ("3 * 4 = 12. Answer: 12", "12", True),
        ("Answer: 12.0", "12", True),
        ("Answer: 12.5", "12", False),
        ("Answer: 3 + 9 = 12", "12", True),
        ("Answer: 12 apples in 3 boxes", "12", True),
        ("first 3, then 12", "12", True),
        ("first 12, then 3", "12", False),
        ("Answer: 12, so 13 is wrong", "12", True),
        ("Answer: twelve, which is 12", "12", True),
        ("Answer: unknown\n12", "12", False),
        ("", "12", False),
        (r"\boxed{1{,}000}", "1,000", True),
        ("#### 1000", "#### 1,000", True),
        ("$1,000", "1000", True),
        (r"\boxed{0.5}", r"\frac12", True),
        (r"\boxed{\dfrac{2}{4}}", "1/2", True),
        (r"\boxed{-\frac{1}{2}}", "-0.5", True),
        (r"\boxed{0.3333}", "1/3", False),
        (r"\boxed{50\%}", "50", True),
        (r"\boxed{x^2 + 1}", "x^2+1", True),
        (r"\boxed{x^2 + 2}", "x^2+1", False),
        (r"\boxed{\left(\tfrac{1}{2}, 3\right)}", r"(\frac{1}{2},3)", True),
        (r"\boxed{(1, 2)}", "(1, 3)", False),
        (r"\boxed{\text{Friday}}", "Friday", True),
        ("The answer is Friday.", "friday", True),
        ("Friday", "friday", True),
        (r"\boxed{2}", "x^2", False),
        ("Answer: 1e3", "1000", True),
        ("Answer: 9**99999", "1", False),  # nothing is evaluated
        (r"\boxed{__import__('os').getpid()}", "1", False),
    ],
)
def test_final_answers_are_compared_as_numbers_or_else_as_expressions(text: str, expected: str, right: bool):
    assert answer_is(text, expected) is right
    assert answer_match([text], [expected]) == [float(right)]


def test_answers_may_be_numbers_and_lists_of_alternatives():
    assert answer_match(["Answer: 0.1", "Answer: 7", "Answer: 7", "?"], [0.1, 7, ["6", 7.0], None]) == [1.0, 1.0, 1.0, None]


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.text(max_size=80), st.text(alphabet=r"0123456789.,/\fracboxed{}#<>answer:= -$%", max_size=80)))
def test_no_text_makes_the_answer_rewards_raise(text: str):
    assert answer_match([text], ["12"])[0] in (0.0, 1.0)
    assert answer_match(["12"], [text])[0] in (0.0, 1.0)
    assert exact_match([text], [text]) == [1.0]


def test_long_hostile_text_is_read_in_no_time():
    import time

    begun = time.process_time()
    for text in (
        "1," * 30_000,
        "\\boxed{" * 20_000,
        "<answer>" * 20_000,
        "9" * 200_000,
        "answer is " * 20_000,
        "\\frac" * 20_000,
        " 1" * 50_000,
        "1/" * 30_000,
        "1 " + " " * 50_000,
    ):
        answer_match([text], ["12"])
        exact_match([text], ["12"])
        box_iou([text], [[0, 0, 1, 1]])
        format_tags(["<think>" + text])
        repetition([text])
    assert time.process_time() - begun < 10


# Form --------------------------------------------------------------------------------------------------------------------------------------


def test_format_tags_wants_both_tags_once_in_order_and_nothing_else():
    right = ["<think>a\nb</think><answer>c</answer>", " <think>x < y</think>\n\n<answer><b>c</b></answer>\n"]
    wrong = [
        *(
            "<think>a</think>",
            "<answer>c</answer><think>a</think>",
            "<think></think><answer>c</answer>",
            "<think>a</think><answer> </answer>",
        ),
        *("x<think>a</think><answer>c</answer>", "<think>a</think><answer>c</answer>x", "<think>a</think>b<answer>c</answer>", ""),
        *("<think>a</think><think>a</think><answer>c</answer>", "<think><answer>c</answer></think>", "<think>a</think><answer>c"),
    ]
    assert format_tags(right + wrong) == [1.0] * 2 + [0.0] * len(wrong)
    assert tags_in_order("plan", "code", "test")(["<plan>a</plan> <code>b</code> <test>c</test>", "<plan>a</plan> <code>b</code>"]) == [
        1.0,
        0.0,
    ]


def test_patterns_must_match_the_whole():
    assert whole_match(r"[0-9]+ apples?")(["3 apples", "1 apple", "3 apples!", "so 3 apples"]) == [1.0, 1.0, 0.0, 0.0]
    assert format_pattern(["a\nb", "ab", "ab"], ["a.b", "a", None]) == [1.0, 0.0, None]


def test_arithmetic_steps_give_the_share_up_to_the_first_mistake():
    facts = {"kind": "countdown", "level": 2, "operands": [3, 5, 7], "target": 26}
    steps = [" 3 * 7 = 21; 21 + 5 = 26. Answer: 26", " 3 * 7 = 21; 21 + 5 = 27. Answer: 27", " 3 * 7 = 22; 22 + 5 = 27.", " Answer: 26", ""]
    assert arithmetic_steps(steps, [json.dumps(facts), facts, facts, facts, None]) == [1.0, 0.5, 0.0, 0.0, None]
    for item in arith.TESTBED.items("train", 20, seed=5):
        assert arithmetic_steps([item.reference], [json.dumps(item.facts)]) == [1.0]


# Programs ----------------------------------------------------------------------------------------------------------------------------------

GOOD = "def add(a, b):\n    return a + b\n"
HALF = "def add(a, b):\n    return abs(a) + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 2) == 1"]


def test_unit_tests_give_the_share_that_holds():
    answers = [
        f"Here it is:\n```python\n{GOOD}```\nDone.",
        HALF,
        "def add(a, b):\n    return a +",
        "import sys\nsys.exit(0)",
        "raise ValueError",
        f"```python\nprint('no')\n```\nor rather\n```\n{GOOD}",
        GOOD + "if __name__ == '__main__':\n    print(add(int(input()), 1))\n",
        GOOD,
        GOOD,
    ]
    tests: list[Any] = [TESTS] * 7 + [None, []]
    assert unit_tests(answers, tests) == [1.0, 0.5, 0.0, 0.0, 0.0, 1.0, 1.0, None, None]
    assert all_unit_tests([*answers[:2], GOOD], [TESTS, TESTS, None]) == [1.0, 0.0, None]


def test_tests_as_one_text_count_their_asserts_and_run_what_prepares_them():
    text = "import math\nfor i in range(3):\n    assert add(i, i) == 2 * i\nassert math.isclose(add(-0.5, 1), 0.5)\n"
    assert unit_tests([GOOD, HALF], [text, text]) == [1.0, 0.5]
    check = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, 2) == 1\ncheck(add)\n"
    assert unit_tests([GOOD, HALF], [check, check]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "cheat",
    [
        "import os\nos._exit(0)",
        "print('0\\n1\\n')\nimport sys\nsys.exit(0)",
        "import os\nfor fd in range(1, 10):\n    try:\n        os.write(fd, b'token 0\\ntoken 1\\n')\n    except OSError:\n        pass",
        "def add(a, b):\n    import os\n    os._exit(0)",
        "def add(a, b):\n    raise SystemExit(0)",
        "def add(a, b):\n    while True: pass",
        "import builtins\nbuiltins.AssertionError = KeyboardInterrupt\ndef add(a, b): return None",
    ],
)
def test_programs_that_only_look_as_if_they_passed_get_nothing(cheat: str):
    assert unit_tests([cheat], [TESTS]) == [0.0]


def test_program_output_compares_what_is_printed():
    cases = [{"input": "1 2\n", "output": "3"}, {"input": "-1 2\n", "output": "1\n"}]
    right = "a, b = map(int, input().split())\nprint(a + b, end='  \\n\\n')"
    half = "a, b = map(int, input().split())\nprint(abs(a) + b)"
    fails = "a, b = map(int, input().split())\nprint(a + b)\nassert b != 2"
    assert program_output([right, half, fails, right, right], [cases, cases, cases, None, []]) == [1.0, 0.5, 0.0, None, None]


def test_code_is_the_last_fenced_block_or_everything():
    assert code_of("x = 1\n") == "x = 1\n"
    assert code_of("a\n```python\nx = 1\n```\nb\n```py\nx = 2\n```\n") == "x = 2\n"
    assert code_of("```\nx = 1\n") == "x = 1\n"
    assert code_of("```Python3\nx = 1```") == "x = 1"


# Boxes -------------------------------------------------------------------------------------------------------------------------------------


def test_iou_of_boxes_worked_out_by_hand():
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 4, 2), (0, 0, 2, 2)) == 0.5
    assert iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0.0
    assert iou((0, 0, 1, 1), (2, 2, 1, 1)) == 0.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=8, max_size=8))
def test_iou_agrees_with_counting_cells(numbers: list[int]):
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in (numbers[:4], numbers[4:])]
    cells = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in boxes]
    union = cells[0] | cells[1]
    expected = len(cells[0] & cells[1]) / len(union) if cells[0] and cells[1] else 0.0
    assert iou(boxes[0], boxes[1]) == pytest.approx(expected)


def test_box_rewards_pair_boxes_and_charge_for_missing_and_superfluous_ones():
    one, other = [0, 0, 2, 2], [10, 10, 12, 12]
    given = [
        "The box is [0, 0, 2, 2].",
        '<think>[9, 9, 9, 9]</think><answer>[{"bbox_2d": [1, 1, 3, 3]}]</answer>',
        "(0.0, 0.0, 2.0, 2.0) and [10,10,12,12]",
        "[10,10,12,12] [0,0,2,2]",
        "[0,0,2,2]",
        "[0, 0, 2]",
        "",
        "[0,0,2,2]",
    ]
    expected: list[Any] = [one, one, one, [one, other], [one, other], one, one, None]
    assert box_iou(given, expected) == pytest.approx([1.0, 1 / 7, 0.5, 1.0, 0.5, 0.0, 0.0, None])


# Length and repetition ---------------------------------------------------------------------------------------------------------------------


def test_the_cosine_starts_and_ends_where_it_should_and_passes_the_middle():
    reward = cosine_length(max_tokens=100, correct=(2.0, 1.0), wrong=(-10.0, 0.0), exceeded=-10.0)
    lengths = [0, 50, 99, 100, 150]
    ids = [[0] * n for n in lengths]
    right = reward(["Answer: 1"] * 5, ids, [1] * 5)
    wrong = reward(["Answer: 2"] * 5, ids, [1] * 5)
    near = (1 - math.cos(math.pi * 0.99)) / 2  # share of the way after 99 of 100 tokens
    assert right == pytest.approx([2.0, 1.5, 2.0 - near, -10.0, -10.0])
    assert wrong == pytest.approx([-10.0, -5.0, -10.0 + 10 * near, -10.0, -10.0])
    assert reward(["?"], [[0]], [None]) == [None]
    # Right answers lose and wrong ones gain with length.
    values = length_cosine(["Answer: 1"] * 4, [[0] * n for n in (1, 300, 600, 900)], [1] * 4)
    assert values == sorted(values, reverse=True)  # type: ignore[type-var]


def test_the_linear_penalty_falls_over_the_buffer():
    reward = linear_length(max_tokens=100, buffer=20)
    assert reward(completion_ids=[[0] * n for n in (0, 80, 85, 90, 100, 500)]) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert length_linear(completion_ids=[[0] * 768, [0] * 1024]) == [0.0, -1.0]


def test_repetition_is_the_share_of_phrases_that_were_there_before():
    # 7 words, 5 trigrams: abc bca cab abc bca, two of them again.
    assert repetition(["a b c a b C a", "a b c d", "a b", ""]) == pytest.approx([-0.4, 0.0, 0.0, 0.0])
    assert ngram_repetition(n=1, worst=-2.0)(["x x x x", "x y"]) == [-1.5, 0.0]


# Refusals ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "column", "value", "said"),
    [
        (exact_match, "answer", {"a": 1}, "must be a text, a number"),
        (answer_match, "answer", True, "must be a text, a number"),
        (answer_match, "answer", [], "empty list"),
        (answer_match, "answer", math.nan, "must be a text, a number"),
        (format_pattern, "pattern", "(", "is no regular expression"),
        (format_pattern, "pattern", 3, "is no regular expression"),
        (arithmetic_steps, "facts", "{", "none of an arith problem"),
        (arithmetic_steps, "facts", {"kind": "countdown"}, "lacks 'operands'"),
        (arithmetic_steps, "facts", {"kind": "x", "operands": [1], "target": 1}, "unknown kind 'x'"),
        (unit_tests, "tests", 3, "must be Python code"),
        (unit_tests, "tests", ["assert f(", "assert True"], "is no Python code"),
        (unit_tests, "tests", "def check(f):\n    assert f(1)\n", "tests nothing"),
        (all_unit_tests, "tests", [3], "must be Python code"),
        (program_output, "cases", "x", "must be a list"),
        (program_output, "cases", [{"input": "x"}], "must have texts"),
        (box_iou, "box", [1, 2, 3], "must be \\[left, top, right, bottom\\]"),
        (box_iou, "box", [3, 3, 1, 1], "left < right"),
        (box_iou, "box", "1,2,3,4", "must be \\[left"),
    ],
)
def test_a_column_that_cannot_be_understood_names_the_row_and_the_remedy(reward: Any, column: str, value: Any, said: str):
    with pytest.raises(UsageError, match=f"row 1 of the batch: column '{column}' .*{said}"):
        reward(completions=["text", "text"], **{column: [None, value]})


def test_columns_of_another_length_and_settings_out_of_range_are_refused():
    with pytest.raises((UsageError, ValueError)):
        unit_tests(["a", "b"], [None])
    with pytest.raises(ValueError):
        answer_match(["a", "b"], [None])
    for make in (lambda: linear_length(10, 0), lambda: linear_length(10, 11), lambda: cosine_length(0), lambda: ngram_repetition(0)):
        with pytest.raises(UsageError):
            make()
