"""Bad input of the data room: each gives one error that names the file and the row and says what to do, with exit code 2."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from data_fixtures import CHATML, REWRITING, STRICT, assistant, system, tiny_tokenizer, user, write_jsonl
from telos.core.errors import DataError, UsageError
from telos.data.formats import read_examples
from telos.data.readers import read_rows
from telos.data.tokenize import Limits, load_table

GOOD = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
LINE = json.dumps(GOOD).encode() + b"\n"


def refused(path: Path | str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "place", "problem"),
    [
        ("a.jsonl", LINE + b'{"prompt": "caf\xe9"}\n', "a.jsonl:2: ", "not UTF-8 (byte 0xe9 at byte 16 of the line)"),
        ("a.jsonl", "{}".encode("utf-16"), "a.jsonl:1: ", "not UTF-8"),
        ("a.jsonl", LINE + LINE + b'{"prompt": "cut of', "a.jsonl:3: ", "broken JSON"),
        ("a.jsonl", LINE + b"[1, 2]\n", "a.jsonl:2: ", "the row is a list, not an object"),
        ("a.jsonl", b'"text"\n', "a.jsonl:1: ", "the row is a string, not an object"),
        ("a.jsonl", b"null\n", "a.jsonl:1: ", "the row is null, not an object"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: ", "broken JSON"),
        ("a.jsonl", b"", "a.jsonl: ", "the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: ", "the file is empty"),
        ("a.json", b"[]", "a.json: ", "holds no rows"),
        ("a.json", b'[\n{"a": 1},\n{"a" 2}\n]', "a.json:3: ", "broken JSON"),
        ("a.json", b'[{"a": 1}, 7]', "a.json, row 2: ", "the row is a number, not an object"),
        ("a.json", b'[\n{"a": "\xff"}]', "a.json:2: ", "not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINE, mtime=0)[:-12], "a.jsonl.gz: ", "damaged or cut off"),
        ("a.jsonl.gz", LINE, "a.jsonl.gz: ", "damaged or cut off"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet: ", "not a readable Parquet file"),
        ("a.csv", b"prompt,completion\na,b\nc\n", "a.csv:3: ", "does not have the 2 cells of the header"),
        ("a.csv", b"prompt,completion\na,b,c\n", "a.csv:2: ", "does not have the 2 cells of the header"),
        ("a.csv", b'prompt\n"a"b\n', "a.csv:2: ", "broken CSV"),
        ("a.csv", b"prompt\ncaf\xe9\n", "a.csv:2: ", "not UTF-8"),
        ("a.pkl", b"anything", "a.pkl: ", "unknown kind of data file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str, content: bytes, place: str, problem: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert place in message
    assert problem in message


def test_a_missing_file_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [GOOD])
    assert "no such file or folder (did you mean 'pairs.jsonl'?)" in refused(tmp_path / "pair.jsonl")
    assert "no such file or folder" in refused("nowhere/at/all/pairs.jsonl")
    assert "no such file or folder" in refused("pairs.parquet")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "holds no dataset and no data files" in refused(tmp_path)


def test_a_dataset_folder_with_a_missing_part_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_list([GOOD]).save_to_disk(str(tmp_path / "saved"))
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    assert "not a readable dataset folder" in refused(tmp_path / "saved")


def test_a_split_of_something_without_splits_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", [GOOD])
    datasets.Dataset.from_list([GOOD]).save_to_disk(str(tmp_path / "saved"))
    assert "has no splits" in refused(f"{tmp_path}/pairs.jsonl:train")
    assert "without splits" in refused(f"{tmp_path}/saved:train")


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_bytes(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD])
    monkeypatch.setattr(Path, "read_bytes", read_bytes)  # a real one would let root through
    assert "pairs.jsonl: cannot be read: Permission denied" in refused(path)


def test_data_of_no_known_kind_are_refused() -> None:
    with pytest.raises(UsageError, match="not dict"):
        read_rows({"train": [GOOD]})
    with pytest.raises(DataError, match="given rows, row 2: the row is a string"):
        read_rows([GOOD, "text"])
    with pytest.raises(DataError, match="holds no rows"):
        read_rows([])


BAD_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("empty-answer", GOOD | {"chosen": ""}, "'chosen' is empty"),
    ("empty-answer", GOOD | {"rejected": " \n"}, "'rejected' is empty"),
    ("missing-value", {"prompt": "a", "chosen": "b", "rejcted": "c"}, "the row has no 'rejected' (did you mean 'rejcted'?)"),
    ("missing-value", GOOD | {"prompt": None}, "the row has no 'prompt'; it has chosen, rejected"),
    ("wrong-type", GOOD | {"chosen": 3}, "'chosen' is int, wanted text or a list of messages"),
    ("wrong-type", GOOD | {"chosen": ["blue"]}, "'chosen' is list, wanted a list of messages"),
    ("mixed-kinds", GOOD | {"chosen": [assistant("blue")]}, "some of chosen, rejected are text, others lists of messages"),
    ("mixed-kinds", {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}, "the row holds messages where"),
    ("not-unicode", GOOD | {"prompt": "\ud83d"}, "lone surrogate"),
]


@pytest.mark.parametrize(("reason", "row", "problem"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line_or_dropped_and_counted(tmp_path: Path, reason: str, row: dict[str, Any], problem: str) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD, row, GOOD])
    with pytest.raises(DataError) as caught:
        read_examples(read_rows(path))
    assert str(caught.value).startswith("pairs.jsonl:2: ")
    assert problem in str(caught.value)
    assert "--on-bad-row drop" in str(caught.value)
    kept = read_examples(read_rows(path), on_bad_row="drop")
    assert len(kept) == 2
    assert kept.counts.dropped == {reason: 1}
    assert kept.counts.first == {reason: "pairs.jsonl:2"}
    assert kept.places == ["pairs.jsonl:1", "pairs.jsonl:3"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high", None, [1.0]])
def test_a_margin_that_is_no_finite_number_is_refused(tmp_path: Path, value: Any) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD | {"margin": 1.0}, GOOD | {"margin": value}])
    with pytest.raises(DataError, match=r"^pairs.jsonl:2: .*margin"):
        read_examples(read_rows(path))


def test_a_row_without_the_margin_that_others_have_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD | {"margin": 1.0}, GOOD])
    with pytest.raises(DataError, match=r"^pairs.jsonl:2: the row has no 'margin'; it has prompt, chosen, rejected"):
        read_examples(read_rows(path))


def test_only_bad_rows_is_an_error_that_lists_the_reasons(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD | {"chosen": ""}, GOOD | {"chosen": 1}])
    with pytest.raises(UsageError, match=r"no usable row is left of 2\. empty-answer 1 \(first: pairs.jsonl:1\), wrong-type 1"):
        read_examples(read_rows(path), on_bad_row="drop")


def test_only_overlong_rows_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"no usable row is left of 2\. overlong 2"):
        load_table([GOOD, GOOD], tiny_tokenizer(), limits=Limits(max_length=2, overlong="drop"))


def test_an_overlong_row_is_refused_with_its_lengths_and_the_limit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD, GOOD | {"prompt": "The sky is blue. " * 50}])
    with pytest.raises(
        DataError, match=r"^pairs.jsonl:2: the row is too long: \d+ prompt tokens, \d+ and \d+ completion tokens; max_length 50"
    ):
        load_table(path, tiny_tokenizer(), limits=Limits(max_length=50, overlong="error"))


def test_conversations_without_a_chat_template_name_the_remedy() -> None:
    row = {"prompt": [user("hello")], "completion": [assistant("good")]}
    with pytest.raises(UsageError, match=r"no chat template.*--chat-template file\.jinja"):
        load_table([row], tiny_tokenizer())


def test_a_tokenizer_without_end_token_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        load_table([GOOD], tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_row() -> None:
    good = {"messages": [user("hello"), assistant("good")]}
    bad = {"messages": [user("hello"), assistant("good"), user("What?"), assistant("bad")]}
    with pytest.raises(DataError, match=r"^given rows, row 2: the chat template renders the earlier turns differently"):
        load_table([good, bad], tiny_tokenizer(chat=REWRITING))
    table = load_table([good, bad], tiny_tokenizer(chat=REWRITING), on_bad_row="drop")
    assert len(table) == 1
    assert table.counts.dropped == {"no-boundary": 1}


def test_a_template_that_refuses_the_roles_is_reported_with_the_row() -> None:
    good = {"prompt": [user("hello")]}
    bad = {"prompt": [system("good"), user("hello")]}
    with pytest.raises(DataError, match=r"row 2: the chat template cannot render the messages: the first message must be of the user"):
        load_table([good, bad], tiny_tokenizer(chat=STRICT))
    assert len(load_table([good, bad], tiny_tokenizer(chat=STRICT), on_bad_row="drop")) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "cannot be read"), (b"\xff", "cannot be read"), (b"line\n{% for x %}", ":2: the chat template is not valid Jinja")],
)
def test_a_template_file_that_is_not_jinja_is_refused(tmp_path: Path, content: bytes | None, problem: str) -> None:
    path = tmp_path / "chat.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_table([{"prompt": [user("hello")]}], tiny_tokenizer(chat=CHATML), chat_template=path)
    assert "chat.jinja" in str(caught.value)
    assert problem in str(caught.value)


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(UsageError, match="on_bad_row is 'error' or 'drop', not 'skip'"):
        load_table([GOOD], tiny_tokenizer(), on_bad_row="skip")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"unknown pairing 'adjacant' \(did you mean 'adjacent'\?\)"):
        load_table([GOOD], tiny_tokenizer(), pairing="adjacant")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="overlong is"):
        Limits(overlong="cut")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_length must be at least 2 tokens, not 0"):
        Limits(max_length=0)
