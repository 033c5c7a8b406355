"""Images of rows: where they come from, and how prompts hold them.

A row's `image` (or `images`, a list of them) is a path, relative to the folder of the data file or to the working folder; a data URI
(`data:image/png;base64,…`), which JSON lines can hold; the bytes of a file; {"bytes", "path"}, as `datasets` stores images; an array [H, W, 3] or
[H, W] of uint8; or a Pillow image.

To a vision–language model an image is a run of tokens, `Images.length` of them, whose ids belong to this image alone: `FIRST` + number × length + place,
where the number counts the images that the model was shown. These ids lie above every vocabulary. They stand in prompts like any others, so an image
travels wherever a prompt does (through batches, groups, minibatches and workers of every loop, packed or padded), and the model that embeds them looks the
picture up. No such id is ever drawn. A tokenizer with an attribute `images` belongs to such a model.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.core.errors import DataError, UsageError
from telos.data.formats import BadRow, Examples, Record
from telos.data.readers import Rows

COLUMNS = ("image", "images")
FIRST = 1 << 30  # the least id that stands for a part of an image
_ROOM = (1 << 31) - FIRST  # ids are 32 bits wide in tables
DIGEST = (
    "image_sha256"  # a further column: the hash of the row's images, so that a table's fingerprint sees another picture under the same path
)
_SHOWN = "images in the prompt"
_URI = "data:image/"


def encode_png(pixels: np.ndarray) -> bytes:
    """An array [H, W, 3] or [H, W] of uint8 as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def data_uri(file: bytes, kind: str = "png") -> str:
    """The bytes of an image's file as text."""
    return f"{_URI}{kind};base64,{base64.b64encode(file).decode('ascii')}"


def decode(file: bytes) -> np.ndarray:
    """[H, W, 3] uint8 of an image's file in any format that Pillow reads. Raises `BadRow` for anything else."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # Pillow raises a dozen kinds here, and a hostile file any
        raise BadRow(
            "unreadable-image", f"the image cannot be read: {_first_line(error)}", "Give a PNG, JPEG or other image file"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def located(rows: Rows, source: Any) -> Rows:
    """Rows whose image paths are found from the folder of the data file `source`, where there is such a file; others are left as they are."""
    if not isinstance(source, (str, Path)) or not any(row.get(name) is not None for row in rows.records for name in COLUMNS):
        return rows
    path = Path(source).expanduser()
    folder = path if path.is_dir() else path.parent

    def found(value: Any) -> Any:
        if isinstance(value, list):
            return [found(one) for one in value]
        if isinstance(value, str) and not value.startswith(_URI) and (folder / value).is_file():
            return str(folder / value)
        return value

    records = [row | {name: found(row[name]) for name in COLUMNS if row.get(name) is not None} for row in rows.records]
    return dataclasses.replace(rows, records=records)


def source_of(value: Any) -> Path | bytes:
    """The file that a row names, or the bytes of one that it holds. Raises `BadRow` for other values and for a file that does not exist."""
    if isinstance(value, Mapping):
        held = value.get("bytes")
        return source_of(value.get("path") if held is None else held)
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if isinstance(value, str) and value.startswith(_URI):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error:
            raise BadRow("unreadable-image", "the image is a data URI with broken base64", "Write it again") from None
    if isinstance(value, (str, Path)):
        path = Path(value).expanduser()
        if not path.is_file():
            raise BadRow(
                "no-image", f"there is no image file {value}", "Its path is taken from the data file's folder or the working folder"
            )
        return path
    pixels = np.empty(0) if value is None else np.asarray(value)
    if (
        pixels.dtype.kind not in "ui"
        or pixels.ndim not in (2, 3)
        or not pixels.size
        or pixels.shape[2:] not in ((), (3,))
        or pixels.max() > 255
    ):
        raise BadRow("bad-image", f"an image is {type(value).__name__}, wanted a path, a data URI, bytes or an array [height, width, 3]")
    return encode_png(pixels.astype(np.uint8))


def _content(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise BadRow("unreadable-image", f"the image {source} cannot be read: {error.strerror or error}") from None


class Images:
    """The images that a model was shown, by number, and how its prompts hold them.

    `token` is the placeholder in texts, `token_id` its id, `length` the tokens that one image takes. Where a prompt has no placeholder its images stand
    first. Files are read when they are needed; images that rows hold themselves are kept as they came, compressed.
    """

    def __init__(self, token: str, token_id: int, length: int) -> None:
        self.token, self.token_id, self.length = token, token_id, length
        self._sources: list[Path | bytes] = []
        self._numbers: dict[str, int] = {}  # by the hash of the content: the same image has one number
        self._digests: list[str] = []

    def __len__(self) -> int:
        return len(self._sources)

    def __deepcopy__(self, memory: Any) -> Images:
        return self  # copies of a tokenizer must know the images of its tables

    def add(self, value: Any) -> int:
        """The number of an image in any form that a row may have. Raises `BadRow` for one that cannot be read."""
        source = source_of(value)
        file = _content(source)
        key = hashlib.sha256(file).hexdigest()
        if key not in self._numbers:
            decode(file)
            if (len(self._sources) + 1) * self.length > _ROOM:
                raise UsageError(f"more than {len(self._sources)} images of {self.length} tokens cannot be told apart; take fewer rows")
            self._numbers[key] = len(self._sources)
            self._sources.append(source)
            self._digests.append(key)
        return self._numbers[key]

    def pixels(self, number: int) -> np.ndarray:
        """[H, W, 3] uint8. Raises `UsageError` when its file has gone meanwhile."""
        try:
            return decode(_content(self._sources[number]))
        except BadRow as bad:
            raise UsageError(f"{bad.problem}; it was there when the data were read") from None

    def ids(self, number: int) -> np.ndarray:
        """[length] int32, the tokens of an image."""
        return (FIRST + number * self.length + np.arange(self.length)).astype(np.int32)

    # -- rows -----------------------------------------------------------------------------------------------------------------------------------

    def show(self, examples: Examples) -> Examples:
        """The examples with a placeholder for each token of their images in their prompts; `place` puts the tokens there when they are encoded.

        A row without an image, with one that cannot be read, or with another number of placeholders than images is a bad row.
        """
        columns = [examples.extra.get(name) or [None] * len(examples) for name in COLUMNS]
        kept: list[int] = []
        records: list[Record] = []
        shown: list[tuple[list[int], Any]] = []
        for i, (record, values) in enumerate(zip(examples.records, zip(*columns, strict=True), strict=True)):
            try:
                given = _given(values)
                if not given:
                    remedy = "Give each row a column 'image', or take a model without vision"
                    raise BadRow("no-image", "the row has no image, and the model is one that looks at images", remedy)
                numbers = [self.add(value) for value in given]
                records.append(self._expanded(record, len(numbers)))
            except BadRow as bad:
                examples.counts.bad(examples.places[i], bad)
                continue
            kept.append(i)
            shown.append((numbers, record.get("prompt", "")))
        examples.counts.kept = len(kept)
        examples.counts.require_some()
        extra = {name: [values[i] for i in kept] for name, values in examples.extra.items()}
        extra[DIGEST] = [" ".join(self._digests[number] for number in numbers) for numbers, _ in shown]
        for name in COLUMNS:
            if name in extra:
                extra[name] = [_as_text(value) for value in extra[name]]
        places = [examples.places[i] for i in kept]
        return dataclasses.replace(examples, records=records, places=places, extra=extra | {_SHOWN: shown})

    def _expanded(self, record: Record, count: int) -> Record:
        """The record with `length` placeholders for each of its images."""
        name = next(name for name in ("prompt", "messages", "text") if name in record)
        value, token = record[name], self.token
        texts = [value] if isinstance(value, str) else [message["content"] for message in value]
        there = sum(text.count(token) for text in texts)
        if there not in (0, count):
            raise BadRow("wrong-count", f"{name!r} has {there} placeholders {token} for {count} images", "Write one for each, or none")
        if there == 0:
            first = 0 if isinstance(value, str) else next((i for i, message in enumerate(value) if message["role"] == "user"), 0)
            texts[first] = token * count + texts[first]
        texts = [text.replace(token, token * self.length) for text in texts]
        if isinstance(value, str):
            return record | {name: texts[0]}
        return record | {name: [message | {"content": text} for message, text in zip(value, texts, strict=True)]}

    def place(self, table: Any) -> Any:
        """The table (`data.tokenize.Table`) with the images' own tokens where their placeholders were encoded, and prompts as they were given.

        Raises `DataError` for a row that lost a part of an image because it was too long, or that has placeholders elsewhere.
        """
        name = "prompt_ids" if "prompt_ids" in table.columns else "ids"
        extra = dict(table.extra)
        shown = extra.pop(_SHOWN)
        rows: list[np.ndarray] = []
        for row, (numbers, _), place in zip(table.columns[name], shown, table.places, strict=True):
            at = np.flatnonzero(row == self.token_id)
            wanted = np.concatenate([self.ids(number) for number in numbers])
            if len(at) != len(wanted):
                raise DataError(
                    place,
                    f"{len(at)} of the {len(wanted)} tokens of its images are left of the row as it was encoded",
                    f"Raise --max_prompt_length (an image takes {self.length} tokens), and write {self.token} only in prompts",
                )
            filled = row.copy()
            filled[at] = wanted
            rows.append(filled)
        prompts = [prompt for _, prompt in shown]
        return dataclasses.replace(table, columns=table.columns | {name: rows}, extra=extra, prompts=prompts)


def _given(values: tuple[Any, ...]) -> list[Any]:
    """The images of a row, from its values of `COLUMNS`."""
    found: list[Any] = []
    for name, value in zip(COLUMNS, values, strict=True):
        if value is not None:
            found += value if name == "images" and isinstance(value, list) else [value]
    return found


def _as_text(value: Any) -> Any:
    """An image as reward functions get it: its path, or a data URI."""
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    if value is None or isinstance(value, str):
        return value
    source = source_of(value)
    return data_uri(source) if isinstance(source, bytes) else str(source)


def shown(examples: Examples, tokenizer: Any) -> tuple[Examples, Callable[[Any], Any]]:
    """The examples as they are to be encoded, and what is to be done with the table then.

    Raises `DataError` for a row with an image where the tokenizer's model reads text alone.
    """
    images: Images | None = getattr(tokenizer, "images", None)
    if images is not None:
        return images.show(examples), images.place
    for name in COLUMNS:
        for value, place in zip(examples.extra.get(name, ()), examples.places):
            if value is not None:
                remedy = f"Take a vision–language model (a folder of LLaVA's architecture), or leave the column {name!r} out"
                raise DataError(place, f"the row has a column {name!r}, but the model reads text alone", remedy)
    return examples, lambda table: table
