"""Worked searches are sound where they claim to be, are read as they were written, and are rewarded for what they do."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from telos.core.errors import UsageError
from telos.environments.text import arith, search_traces
from telos.environments.text.base import Item
from telos.objectives import search_behaviour
from telos.objectives.search_behaviour import behaviour, exploration, longer, solved

ITEM = Item(
    "Use 30, 12 to make 42.\nSteps:", " 30 + 12 = 42. Answer: 42", {"kind": "countdown", "level": 1, "operands": [30, 12], "target": 42}
)
SEARCH = " 30 - 12 = 18. 18 for 42? no, back. 30 + 12 = 42. 42 for 42? yes. Answer: 42"


def countdowns(level: int, n: int = 60) -> list[Item]:
    return [item for item in arith.TESTBED.level_items(level, n, seed=3) if item.facts["kind"] == "countdown"]


def test_a_search_is_judged_by_what_it_ends_with() -> None:
    assert search_traces.settled(SEARCH) == " 30 + 12 = 42. Answer: 42"
    assert search_traces.solved(ITEM, SEARCH)
    assert not arith.verify(ITEM, SEARCH)  # the plain verifier wants every step to be part of the derivation
    assert search_traces.solved(ITEM, ITEM.reference)
    for wrong in (
        " 30 - 12 = 18. 18 for 42? no, back. 30 + 12 = 43. 43 for 42? yes. Answer: 42",  # a false step
        " 30 + 12 = 42. 42 for 42? no, back. 30 - 12 = 18. Answer: 42",  # the solution was left
        " 30 - 12 = 18. 18 for 42? no, back. Answer: 42",  # nothing was found
        " 30 - 12 = 18. 18 for 42? no, back. 18 + 24 = 42. 42 for 42? yes. Answer: 42",  # numbers of an abandoned try are not there
        " 30 + 12 = 42. 42 for 42? yes. Answer: 41",
        " 30 + 12 = 42. 42 for 42? yes.",
        "",
    ):
        assert not search_traces.solved(ITEM, wrong), wrong


@pytest.mark.parametrize("level", [1, 2, 3])
def test_traces_miss_as_often_as_asked_and_then_solve_or_give_up(level: int) -> None:
    rng = random.Random(level)
    most = 0
    for item in countdowns(level):
        target = item.facts["target"]
        for failures in (0, 1, 3):
            text = search_traces.trace(item, rng, failures)
            found = behaviour(text, target)
            assert search_traces.solved(item, text), text
            assert found.tries == found.different == found.verified == found.true_verdicts == found.backtracked + 1
            assert found.backtracked <= failures
            most = max(most, found.backtracked)
            given_up = search_traces.trace(item, rng, failures, give_up=True)
            if behaviour(given_up, target).verified < behaviour(given_up, target).tries:  # there was a miss to end with
                assert not search_traces.solved(item, given_up), given_up
                assert arith.answer_of(given_up) != target
            for one in search_traces.read(text)[:-1]:  # every step that was tried is true
                verdicts = arith.check_steps(item, "; ".join(one.steps))
                assert all(verdict.arithmetic and verdict.available for verdict in verdicts)
    assert most >= 2


def test_verdicts_are_true_and_of_both_kinds_and_the_search_goes_on_to_a_solution() -> None:
    rng = random.Random(0)
    hits, slips = [], 0
    for item in countdowns(1):
        for _ in range(4):
            prompt, word, rest = search_traces.verdict(item, rng)
            text = prompt.removeprefix(item.prompt) + word + rest
            first = search_traces.read(text)[0]
            assert first.accepted == (first.checked == item.facts["target"])
            assert search_traces.solved(item, text), text
            hits.append(first.accepted)
            slips += not arith.check_steps(item, "; ".join(first.steps))[-1].arithmetic
    assert 0.3 < sum(hits) / len(hits) < 0.7
    assert 0 < slips < len(hits) / 2


def test_a_search_of_an_expression_is_refused() -> None:
    item = next(item for item in arith.TESTBED.level_items(1, 20) if item.facts["kind"] == "expression")
    with pytest.raises(UsageError, match="countdown"):
        search_traces.trace(item, random.Random(0), 1)


def test_behaviours_are_counted_by_hand() -> None:
    text = " 3 + 5 = 8; 8 * 7 = 56. 56 for 26? no, back. 3 + 5 = 8; 8 * 7 = 56. 56 for 26? no, back. 3 * 7 = 21; 21 + 5 = 26. 26 for 26? no. Answer: 26"
    found = behaviour(text, 26)
    assert (found.tries, found.different, found.verified, found.backtracked, found.true_verdicts, found.steps) == (3, 2, 3, 2, 2, 6)
    assert behaviour(" 30 - 12 = 18. 18 for 42? no, back. Answer: 18").backtracked == 0  # nothing was tried after it
    assert behaviour(" Answer: 3") == search_behaviour.Behaviour(0, 0, 0, 0, 0, 0)
    assert behaviour("what? no, back. yes?").verified == 0


def test_repeating_a_try_earns_no_exploration_and_a_right_answer_wins_against_any_search() -> None:
    again = " 30 - 12 = 18. 18 for 42? no, back." * 9
    wide = " 1 + 1 = 2. 2 for 42? no, back. 1 + 2 = 3. 3 for 42? no, back. 1 + 3 = 4. 4 for 42? no, back. 1 + 4 = 5. 5 for 42? no, back. 1 + 5 = 6. Answer: 6"
    assert exploration([ITEM.reference, SEARCH, again, wide]) == [0.25, 0.5, 0.25, 1.0]
    assert longer([ITEM.reference, SEARCH, again]) == [pytest.approx(1 / 12), pytest.approx(2 / 12), pytest.approx(9 / 12)]
    right = solved([ITEM.reference, wide], facts=[json.dumps(ITEM.facts)] * 2)
    assert right == [1.0, 0.0]
    total = np.array(right) + 0.2 * np.array(exploration([ITEM.reference, wide]))
    assert total[0] > total[1]


def test_rows_without_facts_have_no_reward_and_malformed_ones_are_named() -> None:
    assert solved(["x", SEARCH], facts=[None, ITEM.facts]) == [None, 1.0]
    for bad in ("{}", "no json", json.dumps({"kind": "riddle", "operands": [1], "target": 2})):
        with pytest.raises(UsageError, match=r"row 0 .* 'facts'"):
            solved(["x"], facts=[bad])
