from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from data_fixtures import BOS, CHATML, END, PAD, assistant, ids_of, tiny_tokenizer, user, write_jsonl
from telos.core.errors import UsageError
from telos.data.batches import Labelled, Pairs, Prompts, Sequences, Stepwise, field_names
from telos.data.tokenize import Limits, Table, load_table

PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green and good."}
EOS = ids_of(END)[0]


def rows_of(table: Table, name: str) -> list[list[int]]:
    return [np.asarray(row).tolist() for row in table.columns[name]]


def test_a_pair_is_prompt_and_answers_with_one_end_token_each() -> None:
    table = load_table([PAIR], tiny_tokenizer())
    batch = table.batch([0])
    assert isinstance(batch, Pairs)
    assert batch.prompt_ids[0].tolist() == ids_of("The sky is")
    assert batch.chosen_ids[0, : batch.chosen_length[0]].tolist() == [*ids_of(" blue."), EOS]
    assert batch.rejected_ids[0, : batch.rejected_length[0]].tolist() == [*ids_of(" green and good."), EOS]


@pytest.mark.parametrize("ending", ["", END, END + END])
def test_the_end_token_comes_exactly_once(ending: str) -> None:
    table = load_table([{"prompt": "a", "completion": "blue" + ending, "label": True}], tiny_tokenizer())
    assert rows_of(table, "completion_ids") == [[*ids_of("blue"), EOS]]
    assert table.counts.changed == {}


def test_an_end_token_inside_an_answer_is_counted() -> None:
    table = load_table([{"prompt": "a", "completion": f"blue{END} sky", "label": True}], tiny_tokenizer())
    assert table.counts.changed == {"end-token-inside-answer": 1}


@pytest.mark.parametrize("row", [PAIR, {"prompt": [user("hello")], "chosen": [assistant("good")], "rejected": [assistant("bad.")]}])
@pytest.mark.parametrize("options", [{"pad_is_eos": True}, {"padding_side": "left"}, {"pad_is_eos": True, "padding_side": "left"}])
def test_padding_token_and_side_change_nothing(row: dict[str, Any], options: dict[str, Any]) -> None:
    usual = load_table([row, PAIR] if row is PAIR else [row], tiny_tokenizer(chat=CHATML))
    other = load_table([row, PAIR] if row is PAIR else [row], tiny_tokenizer(chat=CHATML, **options))
    ours, theirs = usual.batch(range(len(usual))), other.batch(range(len(other)))
    for name in field_names(Pairs):
        one, two = getattr(ours, name), getattr(theirs, name)
        assert (one is None and two is None) or torch.equal(one, two), name


def test_every_format_gives_its_batch() -> None:
    tokenizer = tiny_tokenizer(chat=CHATML)
    kinds = {
        Sequences: [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"messages": [user("a"), assistant("b")]}],
        Prompts: [{"prompt": "a"}, {"prompt": [user("a")]}],
        Pairs: [PAIR, {"chosen": "a b", "rejected": "a c"}, {"prompt": "a", "completions": ["b", "c"], "scores": [1, 2]}],
        Labelled: [{"prompt": "a", "completion": "b", "label": 1}],
        Stepwise: [{"prompt": "a", "completions": ["b", "c"], "labels": [1, 0]}],
    }
    for kind, rows in kinds.items():
        for row in rows:
            batch = load_table([row, row], tokenizer).batch([1, 0, 1])
            assert type(batch) is kind
            assert batch.batch_size == torch.Size([3])


def test_dtypes_and_rows_of_a_batch() -> None:
    table = load_table([PAIR | {"margin": m} for m in (0.5, 1.5, 2.5)], tiny_tokenizer())
    batch = table.batch(np.array([2, 0]))
    assert isinstance(batch, Pairs)
    assert batch.row.tolist() == [2, 0]
    assert batch.margin.tolist() == [2.5, 0.5]
    assert batch.margin.dtype == torch.float32
    assert batch.prompt_ids.dtype == batch.prompt_length.dtype == batch.row.dtype == torch.int64
    labelled = load_table([{"prompt": "a", "completion": "b", "label": False}], tiny_tokenizer()).batch([0])
    assert isinstance(labelled, Labelled)
    assert labelled.label.dtype == torch.bool


def test_a_document_is_learnt_from_its_second_token_to_its_end_token() -> None:
    batch = load_table([{"text": "The sky is blue."}, {"text": "good"}], tiny_tokenizer()).batch([0, 1])
    assert isinstance(batch, Sequences)
    for b, text in enumerate(["The sky is blue.", "good"]):
        ids = [*ids_of(text), EOS]
        assert batch.ids[b, : len(ids)].tolist() == ids
        assert batch.length[b] == len(ids)
        assert batch.loss_mask[b].nonzero().flatten().tolist() == list(range(1, len(ids)))


def test_of_prompt_and_completion_only_the_completion_is_learnt() -> None:
    batch = load_table([{"prompt": "The sky is", "completion": " blue."}], tiny_tokenizer()).batch([0])
    assert isinstance(batch, Sequences)
    prompt, completion = ids_of("The sky is"), [*ids_of(" blue."), EOS]
    assert batch.ids[0].tolist() == prompt + completion
    assert batch.loss_mask[0].tolist() == [False] * len(prompt) + [True] * len(completion)


def test_the_prompt_of_an_sft_row_is_the_prompt_the_model_is_given() -> None:
    """The tokens before a completion are those of the prompt alone, also where the tokenizer would merge across the boundary."""
    sft = load_table([{"prompt": "The gre", "completion": "en grass"}], tiny_tokenizer())
    prompts = load_table([{"prompt": "The gre"}], tiny_tokenizer())
    (prompt,) = rows_of(prompts, "prompt_ids")
    assert rows_of(sft, "ids")[0][: len(prompt)] == prompt
    assert ids_of("The green grass")[: len(prompt)] != prompt


def test_the_beginning_token_comes_once_and_only_where_the_tokenizer_puts_it() -> None:
    bos = ids_of(BOS)
    for prompt in ("The sky", BOS + "The sky"):
        assert rows_of(load_table([{"prompt": prompt}], tiny_tokenizer(adds_bos=True)), "prompt_ids") == [bos + ids_of("The sky")]
    assert rows_of(load_table([{"prompt": "The sky"}], tiny_tokenizer()), "prompt_ids") == [ids_of("The sky")]
    document = load_table([{"text": "The sky"}], tiny_tokenizer(adds_bos=True))
    assert rows_of(document, "ids") == [[*bos, *ids_of("The sky"), EOS]]
    pair = load_table([PAIR], tiny_tokenizer(adds_bos=True))
    assert rows_of(pair, "chosen_ids") == [[*ids_of(" blue."), EOS]]


def test_an_empty_prompt_is_one_special_token() -> None:
    row = {"prompt": "", "completion": "blue", "label": True}
    assert rows_of(load_table([row], tiny_tokenizer()), "prompt_ids") == [[EOS]]
    assert rows_of(load_table([row], tiny_tokenizer(adds_bos=True)), "prompt_ids") == [ids_of(BOS)]


def test_conversations_end_as_their_template_writes_them() -> None:
    row = {"prompt": [user("hello")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}
    table = load_table([row], tiny_tokenizer(chat=CHATML))
    assert rows_of(table, "chosen_ids") == [[*ids_of("good"), EOS]]
    assert rows_of(table, "prompt_ids") == [ids_of("<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n")]


def test_steps_end_at_their_separators() -> None:
    row = {"prompt": "What?", "completions": ["The sky", "is blue.\n", "good"], "labels": [True, 0.5, False]}
    batch = load_table([row], tiny_tokenizer()).batch([0])
    assert isinstance(batch, Stepwise)
    steps = [ids_of("The sky\n"), ids_of("is blue.\n"), ids_of("good\n")]
    assert batch.completion_ids[0].tolist() == [*steps[0], *steps[1], *steps[2], EOS]
    ends = np.cumsum([len(step) for step in steps]) - 1
    assert batch.step_ends[0].tolist() == ends.tolist()
    assert batch.step_labels[0].tolist() == [1.0, 0.5, 0.0]
    assert batch.step_count.tolist() == [3]


# Rows that are too long -------------------------------------------------------------------------------------------------------------------


def test_a_long_prompt_loses_its_beginning_but_not_its_first_token_when_that_is_special() -> None:
    prompt = "The sky is blue. The grass is green."
    table = load_table([PAIR | {"prompt": prompt}], tiny_tokenizer(), limits=Limits(max_prompt_length=5))
    assert rows_of(table, "prompt_ids") == [ids_of(prompt)[-5:]]
    assert table.counts.changed == {"prompt-truncated": 1}
    with_bos = load_table([PAIR | {"prompt": prompt}], tiny_tokenizer(adds_bos=True), limits=Limits(max_prompt_length=5))
    assert rows_of(with_bos, "prompt_ids") == [ids_of(BOS) + ids_of(prompt)[-4:]]


def test_a_completion_that_is_cut_has_no_end_token_and_one_that_just_fits_has() -> None:
    n = len(ids_of(" blue."))
    just = load_table([PAIR], tiny_tokenizer(), limits=Limits(max_completion_length=n + 1))
    assert rows_of(just, "chosen_ids") == [[*ids_of(" blue."), EOS]]
    cut = load_table([PAIR], tiny_tokenizer(), limits=Limits(max_completion_length=n))
    assert rows_of(cut, "chosen_ids") == [ids_of(" blue.")]
    assert rows_of(cut, "rejected_ids") == [ids_of(" green and good.")[:n]]
    assert cut.counts.changed == {"completion-truncated": 1}


@pytest.mark.parametrize(
    ("prompt", "answer", "limit", "lengths"),
    [
        (3, 4, 7, (3, 4)),  # fits
        (3, 9, 8, (3, 5)),  # a short prompt leaves its share to the answer
        (9, 2, 8, (6, 2)),  # and the other way round
        (9, 9, 8, (4, 4)),  # both too long: half each
        (50, 1, 2, (1, 1)),  # an answer is never cut to nothing
    ],
)
def test_prompt_and_completion_share_the_length(prompt: int, answer: int, limit: int, lengths: tuple[int, int]) -> None:
    row = {"prompt": "!" * prompt, "completion": "?" * (answer - 1), "label": True}  # one token per character, and the end token
    if answer == 1:
        row["completion"] = "?"
    table = load_table([row], tiny_tokenizer(), limits=Limits(max_length=limit))
    assert (len(table.columns["prompt_ids"][0]), len(table.columns["completion_ids"][0])) == lengths


def test_both_answers_of_a_pair_keep_the_same_prompt() -> None:
    row = {"prompt": "!" * 20, "chosen": "?" * 3, "rejected": "?" * 30}
    table = load_table([row], tiny_tokenizer(), limits=Limits(max_length=16))
    assert [len(table.columns[name][0]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [8, 4, 8]


def test_a_prompt_leaves_room_for_one_token_to_be_generated() -> None:
    table = load_table([{"prompt": "!" * 20}], tiny_tokenizer(), limits=Limits(max_length=8))
    assert len(table.columns["prompt_ids"][0]) == 7


def test_overlong_rows_are_dropped_and_counted_with_their_first_place(tmp_path: Any) -> None:
    rows = [PAIR, PAIR | {"prompt": "!" * 60}, PAIR | {"rejected": "?" * 60}]
    table = load_table(write_jsonl(tmp_path / "p.jsonl", rows), tiny_tokenizer(), limits=Limits(max_length=50, overlong="drop"))
    assert len(table) == 1
    assert table.counts.dropped == {"overlong": 2}
    assert table.counts.lines() == ["p.jsonl: 3 rows read, 1 examples kept", "dropped: overlong 2 (first: p.jsonl:2)"]


def test_a_long_document_is_cut_on_the_right_without_end_token() -> None:
    table = load_table([{"text": "The sky is blue."}, {"text": "a"}], tiny_tokenizer(), limits=Limits(max_length=3))
    assert rows_of(table, "ids") == [ids_of("The sky is blue.")[:3], [*ids_of("a"), EOS]]
    assert table.counts.changed == {"document-truncated": 1}


def test_a_conversation_cut_before_the_first_answer_is_dropped_and_counted() -> None:
    rows = [{"messages": [user(text), assistant("good")]} for text in ("!" * 90, "!")]
    table = load_table(rows, tiny_tokenizer(chat=CHATML), limits=Limits(max_length=60))
    assert len(table) == 1
    assert table.counts.dropped == {"nothing-left-to-learn": 1}
    assert table.batch([0]).loss_mask.any()


def test_steps_that_are_cut_off_lose_their_labels() -> None:
    rows = [{"prompt": "a", "completions": steps, "labels": [1, 0]} for steps in (["??", "!!!!"], ["?" * 20, "!"])]
    table = load_table(rows, tiny_tokenizer(), limits=Limits(max_completion_length=5))
    assert rows_of(table, "step_ends") == [[2]]
    assert table.columns["step_labels"] == [[1.0]]
    assert table.counts.dropped == {"nothing-left-to-learn": 1}


@pytest.mark.parametrize(
    ("row", "limits"),
    [
        ({"text": "a"}, Limits(max_prompt_length=5)),
        ({"text": "a"}, Limits(max_completion_length=5)),
        ({"prompt": "a"}, Limits(max_completion_length=5)),
    ],
)
def test_limits_that_would_do_nothing_are_refused(row: dict[str, Any], limits: Limits) -> None:
    with pytest.raises(UsageError, match="does not apply"):
        load_table([row], tiny_tokenizer(), limits=limits)


# The table --------------------------------------------------------------------------------------------------------------------------------


def test_prompts_extra_columns_and_places_follow_their_rows() -> None:
    rows = [{"prompt": p, "chosen": "b", "rejected": "c", "answer": a} for p, a in (("!" * 60, 1), ("x", 2), ("y", 3))]
    table = load_table(rows, tiny_tokenizer(), limits=Limits(max_prompt_length=50, overlong="drop"))
    assert table.prompts == ["x", "y"]
    assert table.extra == {"answer": [2, 3]}
    assert table.places == ["given rows, row 2", "given rows, row 3"]
    batch = table.batch([1])
    assert isinstance(batch, Pairs)
    assert table.extra["answer"][int(batch.row[0])] == 3


def test_special_tokens_are_never_added_to_the_text_by_padding() -> None:
    table = load_table([PAIR, PAIR | {"prompt": "x"}], tiny_tokenizer())
    pad = ids_of(PAD)[0]
    assert all(pad not in row for name in ("prompt_ids", "chosen_ids", "rejected_ids") for row in rows_of(table, name))


def test_encoding_examples_twice_counts_once() -> None:
    from telos.data.formats import read_examples
    from telos.data.readers import read_rows
    from telos.data.tokenize import tokenize

    found = read_examples(read_rows([PAIR | {"prompt": "!" * 60}]))
    limits = Limits(max_prompt_length=5)
    first, second = (tokenize(found, tiny_tokenizer(), limits) for _ in range(2))
    assert first.counts.changed == second.counts.changed == {"prompt-truncated": 1}
    assert found.counts.changed == {}
