"""Rows from where users keep them, each with its place, so that every later complaint names a file and a line.

Files: .jsonl, .ndjson, .json (a list of objects, or JSON lines), each also with .gz; .parquet; .csv (cells stay text). Folders: a dataset
written by `datasets.save_to_disk`, or data files (also under `data/`, as a downloaded hub repository has them). Otherwise a Hugging Face
hub id. `:split` after a folder or an id chooses the split (default `train`), `:config:split` after an id the configuration too.
Lists of dictionaries and `datasets.Dataset` objects are taken as they are.

Lines and rows are counted from 1.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telos.core.errors import DataError, UsageError, did_you_mean

Record = dict[str, Any]
Placed = tuple[str, Record]  # ("pairs.jsonl:17", {...})

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".parquet", ".csv")
# Split names as they stand at the beginning of file names. Files named otherwise belong together.
_SPLITS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation"}
_SPLITS |= {"dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_ONE_OBJECT_PER_LINE = "Write one JSON object per line"


@dataclass(frozen=True)
class Rows:
    """`records[i]` was read from `places[i]`. `source` is what the user named."""

    source: str
    records: list[Record]
    places: list[str]

    def __len__(self) -> int:
        return len(self.records)

    @property
    def columns(self) -> list[str]:
        """Names that hold something other than None in at least one row, in order of first appearance."""
        seen: dict[str, None] = {}
        for record in self.records:
            seen.update((name, None) for name, value in record.items() if value is not None and name not in seen)
        return list(seen)


def read_rows(source: str | Path | Rows | Iterable[Mapping[str, Any]]) -> Rows:
    """All rows of `source` (see the module's docstring).

    Raises `DataError` for a missing, empty or unreadable file, text that is not UTF-8, broken JSON and rows that are not objects (with
    file:line); `UsageError` when a hub dataset cannot be loaded.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, str | Path):
        name, placed = _from_name(str(source))
    else:
        name, placed = "given rows", _from_memory(source)
    pairs = list(placed)
    if not pairs:
        raise DataError(name, "holds no rows", "Give at least one row")
    return Rows(name, [record for _, record in pairs], [place for place, _ in pairs])


def _from_name(source: str) -> tuple[str, Iterable[Placed]]:
    path = Path(source).expanduser()
    if path.is_dir():
        return source, _from_folder(path, None)
    if path.exists():
        return path.name, _from_file(path)
    stem, _, split = source.partition(":")
    base = Path(stem).expanduser()
    if split and base.is_dir():
        return source, _from_folder(base, split)
    if split and base.is_file():
        raise DataError(source, f"{base.name} is a file and has no splits", f"Give {stem} alone")
    if not _HUB_ID.fullmatch(stem) or _is_data_file(base):
        raise _missing(path)
    return source, _from_hub(stem, split)


def _is_data_file(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES)


def _missing(path: Path) -> DataError:
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    return DataError(str(path), "no such file or folder" + did_you_mean(path.name, siblings), "Check the path")


def _from_memory(source: Iterable[Mapping[str, Any]]) -> Iterator[Placed]:
    if isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise UsageError(f"data must be a path, a hub id, a list of dictionaries or one dataset split, not {type(source).__name__}")
    return _objects(source, "given rows, row")


def _objects(items: Iterable[Any], counted: str) -> Iterator[Placed]:
    """Items with the place '<counted> 1', '<counted> 2', ...; anything but a mapping is refused."""
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            raise _not_an_object(f"{counted} {number}", item)
        yield f"{counted} {number}", dict(item)


def _not_an_object(place: str, item: object) -> DataError:
    kinds = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
    return DataError(place, f"the row is {kinds.get(type(item), type(item).__name__)}, not an object with columns", _ONE_OBJECT_PER_LINE)


# Files -------------------------------------------------------------------------------------------------------------------------------


def _from_file(path: Path) -> Iterator[Placed]:
    name = path.name.lower()
    if not _is_data_file(path):
        raise DataError(str(path), "unknown kind of data file", f"Known endings: {' '.join(SUFFIXES)}")
    if name.endswith(".parquet"):
        return _from_parquet(path)
    raw = _content(path)
    if not raw.strip():
        raise DataError(str(path), "the file is empty", "Give at least one row")
    if name.endswith(".csv"):
        return _from_csv(path, raw)
    if ".json" in name and ".jsonl" not in name and raw.lstrip().startswith(b"["):
        return _from_json_list(path, raw)
    return _from_json_lines(path, raw)


def _content(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw).removeprefix(b"\xef\xbb\xbf")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(str(path), f"the gzip file is damaged or cut off ({error})", "Write or download it again") from None
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error.strerror or error}", "Check its permissions") from None


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 (byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line)"
        raise DataError(place, problem, "Save the file as UTF-8, for example with iconv -t UTF-8") from None


def _from_json_lines(path: Path, raw: bytes) -> Iterator[Placed]:
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{path.name}:{number}"
        try:
            item = json.loads(_decode(line, place))
        except (ValueError, RecursionError) as error:
            raise DataError(place, f"broken JSON: {error}", _ONE_OBJECT_PER_LINE) from None
        if not isinstance(item, dict):
            raise _not_an_object(place, item)
        yield place, item


def _from_json_list(path: Path, raw: bytes) -> Iterator[Placed]:
    lines = raw.split(b"\n")
    text = "\n".join(_decode(line, f"{path.name}:{number}") for number, line in enumerate(lines, 1))
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path.name}:{error.lineno}", f"broken JSON: {error}", "Write a list of objects, or one object per line") from None
    except (ValueError, RecursionError) as error:
        raise DataError(path.name, f"broken JSON: {error}", "Write a list of objects, or one object per line") from None
    return _objects(items, f"{path.name}, row")


def _from_csv(path: Path, raw: bytes) -> Iterator[Placed]:
    lines = [_decode(line, f"{path.name}:{number}") for number, line in enumerate(raw.split(b"\n"), 1)]
    # A cell may hold a whole document; the default limit of 128 KiB would refuse it.
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO("\n".join(lines), newline=""), strict=True)
    start = 2
    try:
        for record in reader:
            place = f"{path.name}:{start}"
            if None in record or None in record.values():
                cells = len(reader.fieldnames or ())
                raise DataError(place, f"the row does not have the {cells} cells of the header", "Quote cells with commas")
            yield place, dict(record)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path.name}:{start}", f"broken CSV: {error}", "Check the quotes") from None


def _from_parquet(path: Path) -> Iterator[Placed]:
    import pyarrow
    import pyarrow.parquet

    try:
        # One file alone: names of folders such as `split=train` must not become columns.
        table = pyarrow.parquet.ParquetFile(path).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(str(path), f"not a readable Parquet file: {_first_line(error)}", "Write or download it again") from None
    return _objects(table.to_pylist(), f"{path.name}, row")


# Folders and the hub -----------------------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, split: str | None) -> Iterator[Placed]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _from_saved(folder, split)
    groups: dict[str, list[Path]] = {}
    for path in sorted([*folder.glob("*"), *(folder / "data").glob("*")]):
        # A lone .json in a folder is as often a configuration as data.
        if path.is_file() and _is_data_file(path) and path.suffix.lower() != ".json":
            groups.setdefault(_SPLITS.get(re.split(r"[-_.]", path.name.lower())[0], "train"), []).append(path)
    if not groups:
        remedy = "Give a folder written by save_to_disk, or one with .jsonl or .parquet files"
        raise DataError(str(folder), "the folder holds no dataset and no data files", remedy)
    chosen = _choose_split(str(folder), split, list(groups))
    return (row for path in groups[chosen] for row in _from_file(path))


def _choose_split(source: str, split: str | None, known: list[str]) -> str:
    if split is None:
        split = known[0] if len(known) == 1 else "train"
    if split not in known:
        raise DataError(source, f"no split {split!r}{did_you_mean(split, known)}", f"Splits: {', '.join(known)}; write {source}:{known[0]}")
    return split


def _from_saved(folder: Path, split: str | None) -> Iterator[Placed]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library passes on whatever Arrow, JSON and the file system raise
        raise DataError(str(folder), f"not a readable dataset folder: {_first_line(error)}", "Write it again with save_to_disk") from None
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_choose_split(str(folder), split, [str(name) for name in loaded])]
    elif split is not None:
        raise DataError(f"{folder}:{split}", "the folder holds one dataset without splits", f"Give {folder} alone")
    return _objects(loaded.to_list(), f"{folder.name}, row")


def _from_hub(name: str, choice: str) -> Iterator[Placed]:
    import datasets

    config, _, split = choice.rpartition(":") if re.fullmatch(r"[\w.-]+:.+", choice) else ("", "", choice)
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # no network, no such dataset, no such split or configuration: a dozen types of the library and its clients
        raise UsageError(
            f"{name!r} is no file or folder here, and loading it from the Hugging Face hub failed: {_first_line(error)}. "
            "Check the path, the spelling and the network, or give a local file"
        ) from error
    return _objects(loaded, f"{name}, row")


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
