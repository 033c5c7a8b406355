from __future__ import annotations

import json
from typing import Any

import pytest

from data_fixtures import assistant, system, user
from telos.core.errors import DataError
from telos.data.formats import Examples, detect, read_examples, shared_beginning
from telos.data.readers import read_rows


def examples(*rows: dict[str, Any], **options: Any) -> Examples:
    return read_examples(read_rows(list(rows)), **options)


@pytest.mark.parametrize(
    ("row", "format", "conversational"),
    [
        ({"text": "The sky is blue."}, "language-modeling", False),
        ({"messages": [user("a"), assistant("b")]}, "language-modeling", True),
        ({"prompt": "a"}, "prompt-only", False),
        ({"prompt": [user("a")]}, "prompt-only", True),
        ({"prompt": "a", "completion": "b"}, "prompt-completion", False),
        ({"prompt": [user("a")], "completion": [assistant("b")]}, "prompt-completion", True),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", False),
        ({"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}, "preference", True),
        ({"chosen": "a b", "rejected": "a c"}, "preference", False),
        ({"prompt": "a", "completion": "b", "label": True}, "unpaired", False),
        ({"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}, "stepwise", False),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [2, 1]}, "preference", False),
        ({"data_source": "gsm", "prompt": [user("a")], "reward_model": {"ground_truth": "4"}, "extra_info": {}}, "prompt-only", True),
    ],
)
def test_the_format_follows_from_the_columns(row: dict[str, Any], format: str, conversational: bool) -> None:
    found = examples(row)
    assert (found.format, found.conversational) == (format, conversational)


def test_the_caller_chooses_among_the_formats_that_a_table_can_give() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    found = examples(row, wanted=("prompt-only",))
    assert found.records == [{"prompt": "a"}]
    assert found.extra == {"chosen": ["b"], "rejected": ["c"]}
    both = {"prompt": "a", "completion": "b", "text": "a b"}
    assert examples(both, wanted=("language-modeling", "prompt-completion")).format == "language-modeling"
    assert examples(both, wanted=("prompt-completion", "language-modeling")).format == "prompt-completion"


def test_a_missing_column_names_the_columns_found_the_format_and_the_nearest_name() -> None:
    with pytest.raises(DataError) as caught:
        detect(["prompt", "chosen", "rejectd", "source"], ("preference",), "pairs.jsonl")
    message = str(caught.value)
    assert message.startswith("pairs.jsonl: no column 'rejected' (did you mean 'rejectd'?); columns found: prompt, chosen, rejectd, source")
    assert "the rows look like prompt-only" in message
    assert "Wanted: ranked (prompt, completions, ranks|scores) or preference (prompt, chosen, rejected)" in message
    with pytest.raises(DataError, match=r"columns found: question, answer\. Wanted: verl"):
        detect(["question", "answer"])


def test_extra_columns_are_kept_and_listed_once() -> None:
    found = examples({"prompt": "a", "solution": 4}, {"prompt": "b", "level": "hard"})
    assert found.extra == {"solution": [4, None], "level": [None, "hard"]}
    assert found.counts.extra_columns == ("solution", "level")
    assert [line for line in found.counts.lines() if "solution" in line] == ["extra columns kept for reward functions: solution, level"]


def test_extra_columns_stay_with_their_rows_when_rows_are_dropped() -> None:
    rows = [{"prompt": "a", "completion": text, "n": n} for n, text in enumerate(["x", "", "y"])]
    found = examples(*rows, on_bad_row="drop")
    assert found.extra == {"n": [0, 2]}
    assert found.places == ["given rows, row 1", "given rows, row 3"]
    assert found.counts.lines()[:2] == ["given rows: 3 rows read, 2 examples kept", "dropped: empty-answer 1 (first: given rows, row 2)"]
    assert json.loads(json.dumps(found.counts.as_dict()))["dropped"] == {"empty-answer": 1}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # the answers part inside a word
        ("Q: why?\nyes", "Q: why?\nno", "Q: why?\n"),  # a line break ends the prompt, as it would stand there when the model answers
        ("Human: hi\n\nAssistant: I do", "Human: hi\n\nAssistant: You", "Human: hi\n\nAssistant:"),
        ("A b", "A b c", "A"),  # one is the beginning of the other: both keep an answer
        ("天空是蓝色", "天空是绿色", "天空是"),  # no spaces between words
        ("same text", "same text", "same"),
    ],
)
def test_text_without_prompt_is_parted_where_the_answers_part(chosen: str, rejected: str, prompt: str) -> None:
    assert shared_beginning(chosen, rejected) == (prompt, (chosen[len(prompt) :], rejected[len(prompt) :]))


def test_messages_without_prompt_are_parted_at_the_first_that_differs() -> None:
    start = [system("s"), user("a"), assistant("b"), user("c")]
    found = examples({"chosen": [*start, assistant("good")], "rejected": [*start, assistant("bad"), user("d"), assistant("worse")]})
    assert found.records[0]["prompt"] == start
    assert found.records[0]["chosen"] == [assistant("good")]
    assert len(found.records[0]["rejected"]) == 3


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "Blue it is", "rejected": "Black it is"}, "share no beginning"),
        ({"chosen": "", "rejected": "a b"}, "'chosen' is empty"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("b")]}, "share no beginning"),
        ({"chosen": "a b", "rejected": [assistant("b")]}, "one of chosen and rejected is text"),
        ({"chosen": [user("a"), user("b")], "rejected": [user("a"), user("c")]}, "begins with a message of 'user'"),
        ({"prompt": [user("a"), assistant("b")]}, "the last message of 'prompt' is the assistant's"),
        ({"prompt": []}, "'prompt' is an empty list"),
        ({"prompt": [{"from": "human", "value": "a"}]}, "needs 'role' and 'content'; it has from, value"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "is not text"),
        ({"prompt": [user("a")], "completion": [assistant(" ")]}, "holds an empty assistant message"),
        ({"prompt": [user("a")], "completion": [user("b")]}, "not of 'assistant'"),
        ({"messages": [user("a")]}, "no assistant message"),
        ({"text": " "}, "'text' is empty"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, "wanted true or false"),
        ({"prompt": "a", "completion": "b", "label": 2}, "wanted true or false"),
        ({"prompt": "a", "completions": ["b"], "labels": [True, False]}, "1 completions but 2 labels"),
        ({"prompt": "a", "completions": ["b", " "], "labels": [1, 0]}, "'completions[1]' is empty"),
        ({"prompt": "a", "completions": ["b"], "labels": [1.5]}, "number in [0, 1]"),
        ({"prompt": "a", "completions": [], "labels": []}, "a list that is not empty"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [1]}, "2 completions but 1 ranks"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}, "no completion is preferred"),
        ({"prompt": "a", "completions": ["b", "c"], "scores": [1, float("nan")]}, "'scores' is nan"),
        ({"prompt": [user("a")], "tools": "no json"}, "'tools' is text but not JSON"),
        ({"prompt": [user("a")], "tools": ["search"]}, "list of JSON schemas"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError) as caught:
        examples(row)
    assert problem in str(caught.value)
    assert str(caught.value).startswith("given rows, row 1: ")


@pytest.mark.parametrize(("value", "label"), [(True, True), (0, False), (1.0, True), ("true", True), ("False", False), ("0", False)])
def test_labels_may_be_written_as_numbers_or_words(value: object, label: bool) -> None:
    assert examples({"prompt": "a", "completion": "b", "label": value}).records[0]["label"] is label


def test_the_margin_is_zero_without_a_column_and_the_number_with_one() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert examples(row).records[0]["margin"] == 0.0
    assert examples(row | {"margin": "0.5"}).records[0]["margin"] == 0.5


@pytest.mark.parametrize(
    ("pairing", "pairs"),
    [
        ("all", [("good", "fair"), ("good", "fine"), ("good", "bad"), ("fair", "bad"), ("fine", "bad")]),
        ("adjacent", [("good", "fair"), ("fine", "bad")]),
        ("best-worst", [("good", "bad")]),
    ],
)
@pytest.mark.parametrize("by", [{"ranks": [2, 3, 1, 2]}, {"scores": [0.5, -1.0, 0.9, 0.5]}])
def test_ranked_completions_give_pairs_and_ties_give_none(pairing: Any, pairs: list[tuple[str, str]], by: dict[str, Any]) -> None:
    found = examples({"prompt": "a", "completions": ["fair", "bad", "good", "fine"], "id": 9} | by, pairing=pairing)
    assert [(record["chosen"], record["rejected"]) for record in found.records] == pairs
    assert all(high > low for high, low in zip(found.extra["chosen_quality"], found.extra["rejected_quality"], strict=True))
    assert found.extra["id"] == [9] * len(pairs)
    assert found.counts.kept == len(pairs)
    assert {record["margin"] for record in found.records} == {0.0}


def test_verl_rows_keep_what_their_reward_functions_need() -> None:
    row = {
        "data_source": "gsm8k",
        "prompt": [user("2+2?")],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 3},
    }
    found = examples(row)
    assert found.records == [{"prompt": [user("2+2?")]}]
    assert found.extra["data_source"] == ["gsm8k"]
    assert found.extra["ground_truth"] == ["4"]
    assert found.extra["extra_info"] == [{"index": 3}]


def test_a_text_prompt_beside_conversations_becomes_a_message() -> None:
    apart = examples({"prompt": "hi", "chosen": [assistant("b")], "rejected": [assistant("c")]})
    whole = examples({"prompt": "hi", "chosen": [user("hi"), assistant("b")], "rejected": [user("hi"), assistant("c")]})
    assert (
        apart.records
        == whole.records
        == [{"prompt": [user("hi")], "chosen": [assistant("b")], "rejected": [assistant("c")], "margin": 0.0}]
    )
    assert apart.counts.changed == {"text-prompt-made-message": 1}
    with pytest.raises(DataError, match="begins with a message of 'user'"):
        examples({"prompt": "other", "chosen": [user("hi"), assistant("b")], "rejected": [user("hi"), assistant("c")]})


def test_a_text_answer_to_a_conversation_becomes_a_message() -> None:
    found = examples({"prompt": [user("hi")], "completion": "b"})
    assert found.records == [{"prompt": [user("hi")], "completion": [assistant("b")]}]


def test_messages_lose_none_values_and_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    found = examples({"prompt": [{"role": "user", "content": parts, "tool_calls": None}]})
    assert found.records[0]["prompt"] == [user("ab")]


def test_a_call_of_tools_may_come_without_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "search"}]}
    found = examples({"prompt": [user("a")], "completion": [call], "tools": json.dumps([{"name": "search"}])})
    assert found.records[0]["completion"][0]["content"] == ""
    assert found.records[0]["tools"] == [{"name": "search"}]


def test_tools_beside_text_are_an_extra_column() -> None:
    found = examples({"prompt": "a", "tools": [{"name": "search"}]})
    assert found.counts.extra_columns == ("tools",)
    assert examples({"prompt": [user("a")], "tools": [{"name": "search"}]}).counts.extra_columns == ()


def test_equal_answers_are_counted() -> None:
    found = examples({"prompt": "a", "chosen": "b", "rejected": "b"})
    assert found.counts.changed == {"chosen-equals-rejected": 1}


def test_an_empty_text_prompt_is_no_bad_row() -> None:
    assert examples({"prompt": "", "completion": "b"}).counts.dropped == {}
