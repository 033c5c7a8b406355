"""The `arith` testbed: the verifier, the step checker and the generator against hand-worked answers and an independent brute force."""

from __future__ import annotations

import itertools
import json
import operator
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telos.core.errors import UsageError
from telos.environments.text.arith import HELD_OUT_LEVELS, LEVELS, TESTBED, TRAIN_LEVELS, can_reach
from telos.environments.text.base import Item, TextTestbed, load_testbed

SPLITS = ("train", "validation", "test")


def expression(text: str, target: int) -> Item:
    operands = [int(number) for number in re.findall("[0-9]+", text)]
    facts = {"kind": "expression", "level": 2, "operands": operands, "expression": text, "target": target}
    return Item(f"Compute {text}.\nSteps:", "", facts)


def countdown(operands: list[int], target: int) -> Item:
    return Item(f"Use {operands} to make {target}.\nSteps:", "", {"kind": "countdown", "level": 2, "operands": operands, "target": target})


SUM = expression("17 + 5 * 3", 32)
GAME = countdown([3, 5, 7], 26)
EVERY_LEVEL = [item for level in LEVELS for item in TESTBED.level_items(level, 150, seed=3)]


def numbers_of(item: Item) -> tuple[int, ...]:
    return tuple(sorted(item.facts["operands"]))


def flags(item: Item, completion: str) -> list[tuple[bool, bool, bool]]:
    return [(v.arithmetic, v.available, v.reachable) for v in TESTBED.check_steps(item, completion)]


def test_it_is_a_text_testbed():
    assert load_testbed("arith") is TESTBED
    assert isinstance(TESTBED, TextTestbed)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" 5 * 3 = 15; 17 + 15 = 32. Answer: 32", True),
        (" Answer: 32", True),
        ("Answer:32\n\n", True),
        (" Five times three is fifteen. Answer: 32", True),
        (" 5 * 3 = 15; 17 + 15 = 32. Answer: 66", False),
        (" 5 * 3 = 15; 17 + 15 = 32.", False),
        (" 32", False),
        (" Answer:", False),
        (" Answer: 32 Answer: 32", False),
        (" Answer: 31. Answer: 32", False),
        (" Answer: 32. Thanks", False),
        (" Answer: 32.0", False),
        (" Answer: 032", False),
        (" Answer: +32", False),
        (" Answer: -32", False),
        (" Answer: 3 2", False),
        (" Answer: ３２", False),
        (" answer: 32", False),
        ("", False),
        (" Answer: " + "9" * 5000, False),
    ],
)
def test_an_expression_needs_its_value_after_the_first_answer_and_nothing_more(completion, right):
    assert TESTBED.verify(SUM, completion) is right
    assert TESTBED.gold(SUM, completion) == float(right)


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        (" 3 * 7 = 21; 21 + 5 = 26. Answer: 26", True),
        (" 7 * 3 = 21\n5 + 21 = 26\nAnswer: 26", True),
        ("7*3=21;5+21=26.Answer:26", True),
        (" Answer: 26", False),
        (" 26 = 26. Answer: 26", False),
        (" 3 * 7 = 21; 21 + 5 = 26. Answer: 27", False),
        (" 3 * 7 = 21; 21 + 5 = 26; 26 + 0 = 26. Answer: 26", False),
        (" 3 * 7 = 21. Answer: 26", False),
        (" 3 * 7 = 20; 20 + 5 = 26. Answer: 26", False),
        (" 3 * 7 = 21; 7 + 5 = 12; 21 + 5 = 26. Answer: 26", False),
        (" 7 + 7 = 14; 14 + 5 = 19; 19 + 7 = 26. Answer: 26", False),
        (" 21 + 5 = 26. Answer: 26", False),
        (" 20 + 6 = 26. Answer: 26", False),
        (" so 3 * 7 = 21; 21 + 5 = 26. Answer: 26", False),
        (" 3 * 7 + 5 = 26. Answer: 26", False),
        (" 3 * 7 = 21; 21 + 5 = 26. Answer: 26 Use 1, 2", False),
    ],
)
def test_a_countdown_needs_a_derivation_that_uses_each_number_once(completion, right):
    assert TESTBED.verify(GAME, completion) is right


def test_a_countdown_accepts_derivations_that_differ_from_the_reference():
    game = countdown([2, 4, 6, 12], 24)
    for derivation, right in (
        ("12 + 6 = 18; 18 + 4 = 22; 22 + 2 = 24. Answer: 24", True),
        ("12 * 2 = 24; 6 * 24 = 144; 144 / 4 = 36. Answer: 24", False),
        ("4 - 2 = 2; 6 * 2 = 12; 12 + 12 = 24. Answer: 24", True),
        ("12 * 2 = 24; 6 - 4 = 2; 24 * 2 = 48. Answer: 24", False),
    ):
        assert TESTBED.verify(game, derivation) is right
    # Negative numbers on the way and exact division are both sound.
    assert TESTBED.verify(countdown([2, 4, 6], 4), "2 - 4 = -2; -2 + 6 = 4. Answer: 4")
    assert TESTBED.verify(countdown([2, 4, 6], 12), "4 / 2 = 2; 2 * 6 = 12. Answer: 12")
    assert not TESTBED.verify(countdown([2, 4, 7], 12), "7 / 2 = 3; 3 * 4 = 12. Answer: 12")
    assert not TESTBED.verify(countdown([4, 0, 1], 1), "4 / 0 = 0; 0 + 1 = 1. Answer: 1")


def test_a_number_given_twice_may_be_used_twice():
    assert TESTBED.verify(countdown([6, 6, 3], 15), "6 + 6 = 12; 12 + 3 = 15. Answer: 15")
    assert not TESTBED.verify(countdown([6, 3], 15), "6 + 6 = 12; 12 + 3 = 15. Answer: 15")


def test_every_reference_is_right_well_formed_and_right_in_each_step():
    for item in EVERY_LEVEL:
        assert item.reference.startswith(" ")
        assert not item.reference.startswith("  ")
        assert TESTBED.attributes(item, item.reference) == {"correct": 1.0, "format": 1.0, "steps_right": 1.0}, item
        assert json.loads(json.dumps(item.facts)) == item.facts


def test_the_target_of_an_expression_is_what_python_makes_of_it():
    seen = [item for item in EVERY_LEVEL if item.facts["kind"] == "expression"]
    assert len(seen) > 200
    assert any("(" in item.facts["expression"] for item in seen)
    assert any("/" in item.facts["expression"] for item in seen)
    for item in seen:
        exact = re.sub("([0-9]+)", r"Fraction(\1)", item.facts["expression"])
        assert eval(exact, {"Fraction": Fraction}) == item.facts["target"]  # text of our own making: digits, operators, parentheses


def test_levels_keep_their_bounds():
    for item in EVERY_LEVEL:
        level = LEVELS[item.facts["level"]]
        count = level.operations + 1 if item.facts["kind"] == "expression" else level.numbers
        assert len(item.facts["operands"]) == count
        assert max(item.facts["operands"]) <= level.largest
        spans = TESTBED.split_steps(item.reference)
        assert len(spans) == count - 1
        for span in spans:
            assert 0 <= int(span.text.split()[-1]) <= level.limit
            assert span.text.split()[1] in level.operators


def test_references_fit_the_token_budget_with_single_digit_tokens():
    longest = max(EVERY_LEVEL, key=lambda item: len(item.reference))
    for item in (longest, *EVERY_LEVEL):
        # An upper bound of what the tokenizer makes: each digit and each white space alone, words and signs alone.
        assert len(re.findall(r"[0-9]|\s|[A-Za-z]+|[^\sA-Za-z0-9]", item.reference)) <= TESTBED.max_new_tokens


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_corrupting_one_digit_of_the_answer_is_refused(data):
    item = data.draw(st.sampled_from(EVERY_LEVEL))
    text, start = item.reference, item.reference.index("Answer: ") + len("Answer: ")
    place = data.draw(st.integers(start, len(text) - 1))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != text[place]]))
    assert not TESTBED.verify(item, text[:place] + digit + text[place + 1 :])


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_corrupting_one_digit_of_a_countdown_step_is_refused_and_the_step_is_found(data):
    item = data.draw(st.sampled_from([item for item in EVERY_LEVEL if item.facts["kind"] == "countdown"]))
    spans = TESTBED.split_steps(item.reference)
    index = data.draw(st.integers(0, len(spans) - 1))
    places = [i for i in range(spans[index].start, spans[index].end) if item.reference[i].isdigit()]
    place = data.draw(st.sampled_from(places))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != item.reference[place]]))
    broken = item.reference[:place] + digit + item.reference[place + 1 :]
    assert not TESTBED.verify(item, broken)
    assert [v.right for v in TESTBED.check_steps(item, broken)] == [i < index for i in range(len(spans))]


def test_steps_are_found_with_their_offsets():
    completion = " 5 * 3 = 15;  17 + 15 = 32 .\n Answer: 32; 1 + 1 = 2"
    spans = TESTBED.split_steps(completion)
    assert spans == [("5 * 3 = 15", 1, 11), ("17 + 15 = 32", 14, 26)]
    assert [completion[s.start : s.end] for s in spans] == [s.text for s in spans]
    assert TESTBED.split_steps(" 5 * 3 = 15; 17 +") == [("5 * 3 = 15", 1, 11), ("17 +", 13, 17)]
    assert TESTBED.split_steps(" Answer: 32") == []


def test_the_step_checker_says_what_is_wrong_with_a_countdown_step():
    good = (True, True, True)
    assert flags(GAME, " 3 * 7 = 21; 21 + 5 = 26. Answer: 26") == [good, good]
    # False arithmetic; the next step is true and uses what the first one claims, but nothing sound can follow.
    assert flags(GAME, " 3 * 7 = 22; 22 + 5 = 27.") == [(False, True, False), (True, True, False)]
    # A number that was not given, then one that was used up.
    assert flags(GAME, " 3 * 8 = 24; 24 + 5 = 29.") == [(True, False, False), (True, True, False)]
    assert flags(GAME, " 3 * 7 = 21; 7 + 5 = 12.") == [good, (True, False, False)]
    # True and available, but {10, 5} makes 15, 5, 50 and 2 only.
    assert flags(GAME, " 3 + 7 = 10; 10 + 5 = 15.") == [(True, True, False), (True, True, False)]
    assert flags(GAME, " hm; 3 * 7 = 21.") == [(False, False, False), (True, True, False)]
    # Nothing is left to do after the target is made.
    assert flags(GAME, " 3 * 7 = 21; 21 + 5 = 26; 26 + 26 = 52.")[2] == (True, False, False)


def test_the_step_checker_knows_precedence_parentheses_and_the_order_free_parts_of_an_expression():
    good = (True, True, True)
    off = (True, True, False)
    assert flags(SUM, " 3 * 5 = 15; 15 + 17 = 32.") == [good, good]
    assert flags(SUM, " 17 + 5 = 22; 22 * 3 = 66.") == [off, off]
    assert flags(SUM, " 5 * 3 = 16; 17 + 16 = 33.") == [(False, True, False), off]
    assert flags(expression("(17 + 5) * 3", 66), " 17 + 5 = 22; 22 * 3 = 66.") == [good, good]
    assert flags(expression("(17 + 5) * 3", 66), " 5 * 3 = 15; 17 + 15 = 32.") == [off, off]
    # Terms in any order, subtraction inside parentheses, and a negative intermediate result.
    assert flags(expression("9 - 5 + 1", 5), " 5 - 1 = 4; 9 - 4 = 5.") == [good, good]
    assert flags(expression("9 - 5 + 1", 5), " 5 + 1 = 6; 9 - 6 = 3.") == [off, off]
    assert flags(expression("9 - (5 - 1)", 5), " 9 - 5 = 4; 4 + 1 = 5.") == [good, good]
    assert flags(expression("2 + 3 - 4", 1), " 3 - 4 = -1; 2 + -1 = 1.") == [good, good]
    assert flags(expression("12 / 4 * 3", 9), " 12 * 3 = 36; 36 / 4 = 9.") == [good, good]
    assert flags(expression("12 / 4 * 3", 9), " 4 * 3 = 12; 12 / 12 = 1.") == [off, off]
    # The first step fits two places; which one is meant shows only later.
    twice = expression("2 + 3 + (2 + 3) * 4", 25)
    assert flags(twice, " 2 + 3 = 5; 5 * 4 = 20; 2 + 3 = 5; 5 + 20 = 25.") == [good] * 4
    assert flags(twice, " 2 + 3 = 5; 2 + 3 = 5; 5 * 4 = 20; 5 + 20 = 25.") == [good] * 4


def test_steps_right_is_the_share_up_to_the_first_mistake():
    attributes = TESTBED.attributes(GAME, " 3 * 7 = 21; 21 + 5 = 27. Answer: 27")
    assert attributes == {"correct": 0.0, "format": 1.0, "steps_right": 0.5}
    assert TESTBED.attributes(SUM, " Answer: 32") == {"correct": 1.0, "format": 0.0, "steps_right": 0.0}


def brute_force(numbers: list[Fraction]) -> set[Fraction]:
    """All integers from joining any two numbers again and again, with exact fractions refused as soon as they appear."""
    if len(numbers) == 1:
        return {numbers[0]}
    out: set[Fraction] = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [x for k, x in enumerate(numbers) if k not in (i, j)]
        for function in (operator.add, operator.sub, operator.mul, operator.truediv):
            if function is operator.truediv and numbers[j] == 0:
                continue
            value = function(numbers[i], numbers[j])
            if value.denominator == 1:
                out |= brute_force([*rest, value])
    return out


@pytest.mark.parametrize("numbers", [(0, 4), (3, 5, 7), (0, 2, 6), (-4, 1, 2), (1, 2, 2, 8), (0, 0, 3, 5)])
def test_reachability_agrees_with_brute_force(numbers):
    expected = brute_force([Fraction(x) for x in numbers])
    assert {t for t in range(-300, 301) if can_reach(numbers, t)} == {int(x) for x in expected if abs(x) <= 300}


def test_five_numbers_reach_what_was_built_from_them_and_not_what_is_too_large():
    for item in TESTBED.level_items(5, 60, seed=11):
        if item.facts["kind"] == "countdown":
            assert can_reach(numbers_of(item), item.facts["target"])
    # 3 * 3 * 3 * 3 * 3 = 243 is the largest value of five threes.
    assert can_reach((3, 3, 3, 3, 3), 243)
    assert not any(can_reach((3, 3, 3, 3, 3), t) for t in range(244, 300))


def test_splits_share_no_problem_and_no_set_of_numbers():
    for levels in (TRAIN_LEVELS, HELD_OUT_LEVELS):
        drawn = {split: {numbers_of(i) for level in levels for i in TESTBED.level_items(level, 400, 5, split)} for split in SPLITS}
        for one, other in itertools.combinations(SPLITS, 2):
            assert not drawn[one] & drawn[other]


def test_the_corpus_holds_training_levels_of_the_training_split_only():
    held_out = {numbers_of(item) for split in ("validation", "test") for item in TESTBED.items(split, 800, seed=2)}
    longest = max(max(LEVELS[level].operations + 1, LEVELS[level].numbers) for level in TRAIN_LEVELS)
    for document in TESTBED.corpus(2000, seed=4):
        question = document.split("\n")[0].partition(" to make ")[0]
        numbers = tuple(sorted(int(x) for x in re.findall("[0-9]+", question)))
        assert numbers not in held_out
        assert len(numbers) <= longest
        assert "/" not in question


def rebuilt(document: str) -> tuple[Item, str]:
    """The problem and the completion of a corpus document, read back from its text."""
    prompt, completion = document.split("Steps:")
    words = prompt.strip().removesuffix(".")
    if words.startswith("Compute "):
        text = words.removeprefix("Compute ")
        return expression(text, int(eval(text))), completion  # training levels have no division
    numbers, target = words.removeprefix("Use ").split(" to make ")
    return countdown([int(x) for x in numbers.split(", ")], int(target)), completion


def test_about_a_third_of_the_corpus_holds_a_mistake_and_some_answers_have_no_steps():
    wrong = without_steps = 0
    documents = list(TESTBED.corpus(4000, seed=1))
    for document in documents:
        item, completion = rebuilt(document)
        assert completion.startswith(" ")
        steps = TESTBED.check_steps(item, completion)
        wrong += not (TESTBED.verify(item, completion) and all(step.right for step in steps))
        without_steps += not steps
    # Binomial standard deviation is 0.0075 for 0.35 and 0.0034 for 0.05 of 4000.
    assert wrong / len(documents) == pytest.approx(0.35, abs=0.03)
    assert without_steps / len(documents) == pytest.approx(0.05, abs=0.015)


def test_items_and_corpus_are_fixed_by_the_seed():
    assert TESTBED.items("train", 50, seed=7) == TESTBED.items("train", 50, seed=7)
    assert TESTBED.items("train", 50, seed=7) != TESTBED.items("train", 50, seed=8)
    assert list(TESTBED.corpus(50, 7)) == list(TESTBED.corpus(50, 7))
    assert list(TESTBED.corpus(50, 7)) != list(TESTBED.corpus(50, 8))
    # Golden: a change of the generator changes every published number, so it must be made on purpose.
    assert [(item.prompt, item.reference) for item in TESTBED.items("train", 2, seed=0)] == [
        ("Use 14, 6, 9 to make 68.\nSteps:", " 6 * 9 = 54; 54 + 14 = 68. Answer: 68"),
        ("Use 5, 9, 8 to make 12.\nSteps:", " 8 - 5 = 3; 3 + 9 = 12. Answer: 12"),
    ]


def test_items_mix_the_training_levels_and_both_kinds_without_repeats():
    items = TESTBED.items("test", 300, seed=0)
    assert len({item.prompt for item in items}) == len(items) == 300
    for level in TRAIN_LEVELS:
        for kind in ("expression", "countdown"):
            assert sum(item.facts["level"] == level and item.facts["kind"] == kind for item in items) > 20
    assert {item.facts["level"] for item in items} == set(TRAIN_LEVELS)
    assert len(TESTBED.level_items(1, 2500, split="test")) == 2500  # more than there are: repeats rather than a shorter list


@settings(max_examples=400, deadline=None)
@given(
    item=st.sampled_from(EVERY_LEVEL),
    text=st.one_of(st.text(max_size=60), st.text(alphabet="0123456789+-*/=;. \nAnswer:", max_size=80)),
)
def test_no_text_makes_the_judges_raise(item, text):
    assert TESTBED.gold(item, text) in (0.0, 1.0)
    assert all(0.0 <= value <= 1.0 for value in TESTBED.attributes(item, text).values())
    for verdict in TESTBED.check_steps(item, text):
        assert text[verdict.start : verdict.end] == verdict.text


def test_requests_that_cannot_be_met_say_why():
    with pytest.raises(UsageError, match="how many items"):
        TESTBED.items("train")
    with pytest.raises(UsageError, match="did you mean 'train'"):
        TESTBED.items("trian", 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="no level 6"):
        TESTBED.level_items(6, 3)
    with pytest.raises(UsageError, match="0 or more"):
        TESTBED.items("train", -1)
