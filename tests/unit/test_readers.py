from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pytest

from data_fixtures import write_jsonl
from telos.core.errors import DataError, UsageError
from telos.data.readers import read_rows

ROWS = [{"prompt": "The sky is", "completion": " blue."}, {"prompt": "Das Gras ist", "completion": " grün."}]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def test_json_lines_know_their_lines_and_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\n" + JSON_LINES.replace(b"\n", b"\r\n\n"))
    rows = read_rows(path)
    assert rows.records == ROWS
    assert rows.places == ["pairs.jsonl:2", "pairs.jsonl:4"]
    assert rows.source == "pairs.jsonl"


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz", "A.JSONL"])
def test_json_lines_are_read_under_every_ending(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(JSON_LINES) if name.endswith(".gz") else JSON_LINES)
    assert read_rows(str(tmp_path / name)).records == ROWS


def test_a_json_list_is_read_with_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS, indent=2))
    rows = read_rows(path)
    assert rows.records == ROWS
    assert rows.places == ["rows.json, row 1", "rows.json, row 2"]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + JSON_LINES)
    assert read_rows(tmp_path / "bom.jsonl").records == ROWS


def test_parquet_is_read_with_row_numbers(tmp_path: Path) -> None:
    path = tmp_path / "split=a" / "rows.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_list(ROWS).to_parquet(str(path))
    rows = read_rows(path)
    assert rows.records == ROWS
    assert rows.places[1] == "rows.parquet, row 2"


def test_csv_places_count_lines_of_cells_that_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"two\nlines, one cell",yes\nshort,no\n', encoding="utf-8")
    rows = read_rows(path)
    assert rows.records == [{"prompt": "two\nlines, one cell", "completion": "yes"}, {"prompt": "short", "completion": "no"}]
    assert rows.places == ["rows.csv:2", "rows.csv:4"]


def test_a_saved_dataset_folder_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    rows = read_rows(tmp_path / "saved")
    assert rows.records == ROWS
    assert rows.places == ["saved, row 1", "saved, row 2"]


def test_a_split_is_chosen_by_suffix_and_is_train_otherwise(tmp_path: Path) -> None:
    splits = {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert read_rows(tmp_path / "saved").records == ROWS[:1]
    assert read_rows(f"{tmp_path}/saved:test").records == ROWS[1:]
    with pytest.raises(DataError, match=r"no split 'tset' \(did you mean 'test'\?\)"):
        read_rows(f"{tmp_path}/saved:tset")


def test_a_folder_of_a_downloaded_repository_is_read_by_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "config.json").write_text("{}")
    for name, row in (("train-00000-of-00002", ROWS[0]), ("train-00001-of-00002", ROWS[1]), ("test-00000-of-00001", ROWS[0])):
        datasets.Dataset.from_list([row]).to_parquet(str(tmp_path / "data" / f"{name}.parquet"))
    assert read_rows(tmp_path).records == ROWS
    assert read_rows(tmp_path).places == ["train-00000-of-00002.parquet, row 1", "train-00001-of-00002.parquet, row 1"]
    assert read_rows(f"{tmp_path}:test").records == ROWS[:1]


def test_files_without_split_names_belong_together(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part_a.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "part_b.jsonl", ROWS[1:])
    assert read_rows(tmp_path).records == ROWS


def test_lists_and_datasets_in_memory_are_taken_as_they_are() -> None:
    assert read_rows(ROWS).records == ROWS
    assert read_rows(ROWS).places == ["given rows, row 1", "given rows, row 2"]
    assert read_rows(datasets.Dataset.from_list(ROWS)).records == ROWS
    rows = read_rows(ROWS)
    assert read_rows(rows) is rows


def test_columns_are_those_with_a_value_somewhere() -> None:
    rows = read_rows([{"a": None, "b": 1}, {"c": 2, "b": None}, {"d": None}])
    assert rows.columns == ["b", "c"]


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("org/pairs", ("org/pairs", None, "train")),
        ("org/pairs:test", ("org/pairs", None, "test")),
        ("org/pairs:train[:10]", ("org/pairs", None, "train[:10]")),
        ("org/pairs:english:test", ("org/pairs", "english", "test")),
        ("pairs", ("pairs", None, "train")),
    ],
)
def test_a_hub_id_names_configuration_and_split(monkeypatch: pytest.MonkeyPatch, name: str, call: tuple[str, str | None, str]) -> None:
    seen = []

    def load(path: str, config: str | None, split: str) -> datasets.Dataset:
        seen.append((path, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows(name).places == [f"{call[0]}, row 1", f"{call[0]}, row 2"]
    assert seen == [call]


def test_without_network_a_hub_id_gives_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach 'org/pairs' on the Hub (LocalEntryNotFoundError)\nTraceback ...")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UsageError) as caught:
        read_rows("org/pairs")
    assert "'org/pairs' is no file or folder here" in str(caught.value)
    assert "Couldn't reach 'org/pairs'" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert caught.value.exit_code == 2
