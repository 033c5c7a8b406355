"""What is made of checked rows before they are encoded."""

from __future__ import annotations

from typing import Any

import pytest

from data_fixtures import assistant, user
from telos.core.errors import DataError, UsageError
from telos.data.formats import Examples, read_examples
from telos.data.preferences import answer_text, conditioned, revision_prompt, reward_augmented, unpaired, with_scores
from telos.data.readers import read_rows

PAIR = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
TALK = {"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}


def pairs(*rows: dict[str, Any]) -> Examples:
    return read_examples(read_rows(list(rows)), ("preference",))


def by_length(prompts: list[Any], answers: list[str], columns: dict[str, list[Any]]) -> list[float]:
    return [float(len(answer)) for answer in answers]


@pytest.mark.parametrize("row", [PAIR, TALK])
def test_a_scorer_is_asked_where_the_data_have_no_scores(row: dict[str, Any]) -> None:
    found = with_scores(pairs(row), ("chosen", "rejected"), by_length)
    assert (found.extra["chosen_score"], found.extra["rejected_score"]) == ([4.0], [3.0])


def test_the_datas_own_scores_come_first_and_ranked_rows_bring_theirs() -> None:
    own = with_scores(pairs(PAIR | {"chosen_score": "7", "rejected_score": 2}), ("chosen", "rejected"), by_length)
    assert (own.extra["chosen_score"], own.extra["rejected_score"]) == ([7.0], [2.0])
    ranked = with_scores(pairs({"prompt": "Q", "completions": ["a", "b"], "scores": [1, 5]}), ("chosen", "rejected"), None)
    assert (ranked.extra["chosen_score"], ranked.extra["rejected_score"]) == ([5.0], [1.0])


def test_without_a_column_and_without_a_scorer_the_user_is_told_both_remedies() -> None:
    with pytest.raises(UsageError, match=r"no column 'chosen_score'.*--reward"):
        with_scores(pairs(PAIR), ("chosen", "rejected"), None)


def test_a_score_that_is_no_number_names_its_row() -> None:
    with pytest.raises(DataError, match=r"'chosen_score' is 'high'"):
        with_scores(pairs(PAIR | {"chosen_score": "high", "rejected_score": 1}), ("chosen", "rejected"), None)


def test_rows_without_a_score_are_dropped_and_counted() -> None:
    rows = [PAIR, PAIR | {"rejected": "none"}]
    found = with_scores(pairs(*rows), ("chosen", "rejected"), lambda p, a, c: [float("nan") if x == "none" else 1.0 for x in a])
    assert len(found) == 1
    assert found.counts.dropped == {"no-score": 1}
    with pytest.raises(UsageError, match="no answer could be scored"):
        with_scores(pairs(PAIR), ("chosen", "rejected"), lambda p, a, c: [float("nan")])


@pytest.mark.parametrize("row", [PAIR, TALK])
def test_augmented_pairs_come_twice_and_the_target_says_which_side_is_better(row: dict[str, Any]) -> None:
    scored = pairs(row | {"chosen_score": 8, "rejected_score": 3, "note": "kept"})
    first, second = reward_augmented(with_scores(scored, ("chosen", "rejected"), None)).records
    assert answer_text(first["chosen"]) == answer_text(second["rejected"]) == "good"
    assert first["prompt"] == conditioned(row["prompt"], 8.0)
    assert second["prompt"] == conditioned(row["prompt"], 3.0)
    assert first["prompt"] != second["prompt"]
    augmented = reward_augmented(with_scores(scored, ("chosen", "rejected"), None))
    assert augmented.extra["chosen_score"] == [8.0, 3.0]
    assert augmented.extra["rejected_score"] == [3.0, 8.0]
    assert augmented.extra["note"] == ["kept", "kept"]
    assert len(augmented.places) == 2


def test_a_condition_joins_the_system_message_that_is_there() -> None:
    before = [{"role": "system", "content": "Be brief."}, user("Q")]
    after = conditioned(before, 2.5)
    assert [message["role"] for message in after] == ["system", "user"]
    assert "2.5" in after[0]["content"]
    assert after[0]["content"].endswith("Be brief.")
    assert [message["role"] for message in conditioned([user("Q")], 1)] == ["system", "user"]


def test_a_revision_shows_the_answer_and_asks_again() -> None:
    text = revision_prompt("Say: ", "bad")
    assert text.startswith("Say: bad\n")
    assert text.endswith("\nSay: ")
    talk = revision_prompt([user("Q")], [assistant("bad")])
    assert [message["role"] for message in talk] == ["user", "assistant", "user"]
    assert revision_prompt([user("Q")], "bad") == talk


@pytest.mark.parametrize("row", [PAIR, TALK])
def test_a_pair_gives_a_desirable_and_an_undesirable_answer(row: dict[str, Any]) -> None:
    found = unpaired(pairs(row | {"chosen_score": 8, "rejected_score": 3}))
    assert found.format == "unpaired"
    assert [(answer_text(record["completion"]), record["label"]) for record in found.records] == [("good", True), ("bad", False)]
    assert found.extra["score"] == [8, 3]
    assert "chosen_score" not in found.extra


def test_unpaired_rows_stay_and_completions_are_desirable() -> None:
    labelled = read_examples(read_rows([{"prompt": "Q", "completion": "x", "label": False}]), ("unpaired",))
    assert unpaired(labelled) is labelled
    demonstrations = read_examples(read_rows([{"prompt": "Q", "completion": "x"}]), ("prompt-completion",))
    assert [record["label"] for record in unpaired(demonstrations).records] == [True]
