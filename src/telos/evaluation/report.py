"""One page that says what a run did: verdicts, tables, pictures, samples side by side, and everything needed to repeat it.

`Report` collects the parts; `write` makes `report.html` (one file: pictures inside, nothing fetched, no script) and `report.md` with
its pictures in the folder `report/` beside it. Text of models and data is shown as text: escaped, control characters made visible.
Nothing is shortened.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from telos.core.errors import Failure, UsageError
from telos.evaluation.statistics import Interval

Status = Literal["good", "bad", "neutral"]

_STATUS_WORDS: dict[str, str] = {"good": "good", "bad": "bad", "neutral": "undecided"}
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class VerdictBox:
    """A question, its answer in one or two words, and the sentence with the numbers behind it."""

    question: str
    answer: str
    text: str
    status: Status = "neutral"


@dataclass(frozen=True)
class Completion:
    """What one model answered. `scores`: name to number, or to text where there is none."""

    model: str
    text: str
    scores: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A prompt with the completions of several models."""

    prompt: str
    completions: Sequence[Completion]
    title: str = ""


@dataclass(frozen=True)
class _Heading:
    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class _Paragraph:
    text: str
    kind: str = "paragraph"


@dataclass(frozen=True)
class _Table:
    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]
    note: str
    kind: str = "table"


@dataclass(frozen=True)
class _Picture:
    name: str
    png: bytes
    caption: str
    alt: str
    kind: str = "picture"

    @property
    def uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class _Samples:
    caption: str
    samples: Sequence[Sample]
    kind: str = "samples"


_Block = _Heading | _Paragraph | _Table | _Picture | _Samples


class Report:
    """Collects the parts of a report in the order in which they are read, then writes it.

    Verdicts, warnings and the summary stand at the top, and the command, settings and versions at the end, whenever they were added.
    Methods return the report, so that calls can be chained.
    """

    def __init__(self, title: str) -> None:
        if not title.strip():
            raise UsageError("a report needs a title")
        self.title = title
        self._summary: list[str] = []
        self._verdicts: list[VerdictBox] = []
        self._warnings: list[str] = []
        self._blocks: list[_Block] = []
        self._command = ""
        self._facts: dict[str, list[tuple[str, str]]] = {}

    def summary(self, *sentences: str) -> Report:
        """Sentences under the title, each its own paragraph."""
        self._summary.extend(sentences)
        return self

    def verdict(self, question: str, answer: str, text: str, status: Status = "neutral") -> Report:
        """A coloured box. The colour repeats what the words say."""
        if status not in _STATUS_WORDS:
            raise UsageError(f"status of verdict {question!r} is {status!r}; one of {', '.join(_STATUS_WORDS)} expected")
        self._verdicts.append(VerdictBox(question, answer, text, status))
        return self

    def warning(self, text: str) -> Report:
        """Something the reader must know before trusting the numbers."""
        self._warnings.append(text)
        return self

    def heading(self, text: str) -> Report:
        """Starts a section."""
        self._blocks.append(_Heading(text))
        return self

    def paragraph(self, text: str) -> Report:
        """Plain text at this place."""
        self._blocks.append(_Paragraph(text))
        return self

    def table(self, caption: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> Report:
        """Cells may be text, numbers, `Interval` (level and n are stated once under the table), or None (shown as a dash).

        Raises UsageError when a row has another length than `headers`.
        """
        for i, row in enumerate(rows):
            if len(row) != len(headers):
                raise UsageError(f"table {caption!r}: row {i + 1} has {len(row)} cells and there are {len(headers)} headers")
        numeric = [bool(rows) and all(_is_number(row[k]) for row in rows) for k in range(len(headers))]
        cells = [[c.short() if isinstance(c, Interval) else cell_text(c) for c in row] for row in rows]
        note = _interval_note([c for row in rows for c in row if isinstance(c, Interval)])
        self._blocks.append(_Table(caption, tuple(headers), cells, numeric, note))
        return self

    def picture(self, name: str, png: bytes, caption: str, alt: str) -> Report:
        """A PNG. `name` becomes the file name beside the Markdown; `alt` says in words what the picture shows.

        Raises UsageError on bytes that are no PNG, an empty `alt`, and a name that is used twice.
        """
        if not png.startswith(_PNG):
            raise UsageError(f"picture {name!r} is not a PNG file")
        if not alt.strip():
            raise UsageError(f"picture {name!r} needs an alternative text that says what it shows")
        slug = _slug(name)
        if any(isinstance(b, _Picture) and b.name == slug for b in self._blocks):
            raise UsageError(f"two pictures are called {slug!r}; give each its own name")
        self._blocks.append(_Picture(slug, png, caption, alt))
        return self

    def samples(self, caption: str, samples: Sequence[Sample]) -> Report:
        """Prompts with the completions of the models side by side, as plain monospaced text."""
        shown = [
            replace(
                sample,
                prompt=visible(sample.prompt),
                completions=[
                    Completion(c.model, visible(c.text), {name: cell_text(value) for name, value in c.scores.items()})
                    for c in sample.completions
                ],
            )
            for sample in samples
        ]
        self._blocks.append(_Samples(caption, shown))
        return self

    def command(self, line: str) -> Report:
        """The command line that repeats the run."""
        self._command = line
        return self

    def facts(self, title: str, values: Mapping[str, Any]) -> Report:
        """A folded table at the end, such as "Settings" or "Versions". Nested mappings become dotted names; numbers are exact."""
        self._facts.setdefault(title, []).extend((name, cell_text(value, exact=True)) for name, value in _flatten(values))
        return self

    def html(self) -> str:
        """The page as one HTML document that loads nothing."""
        from jinja2 import Environment, StrictUndefined

        source = resources.files("telos.evaluation").joinpath("report.html.j2").read_text(encoding="utf-8")
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_readable)
        return environment.from_string(source).render(
            title=self.title,
            summary=self._summary,
            verdicts=self._verdicts,
            warnings=self._warnings,
            blocks=self._blocks,
            headings=[b.text for b in self._blocks if isinstance(b, _Heading)],
            command=self._command,
            facts=self._facts,
        )

    def markdown(self) -> str:
        """The same report as Markdown; pictures are links into the folder `report/`."""
        out: list[str] = [f"# {_md(self.title)}"]
        out += [f"> **{_md(v.question)}** {_md(v.answer)} ({_STATUS_WORDS[v.status]}). {_md(v.text)}" for v in self._verdicts]
        out += [f"> **Warning:** {_md(text)}" for text in self._warnings]
        out += [_md(sentence) for sentence in self._summary]
        for block in self._blocks:
            match block:
                case _Heading():
                    out.append(f"## {_md(block.text)}")
                case _Paragraph():
                    out.append(_md(block.text))
                case _Table():
                    out += [f"**{_md(block.caption)}**", _md_table(block.headers, block.rows, block.numeric)]
                    out += [_md(block.note)] if block.note else []
                case _Picture():
                    out += [f"![{_md(block.alt)}](report/{block.name}.png)", f"*{_md(block.caption)}*"]
                case _Samples():
                    out.append(f"**{_md(block.caption)}**")
                    for i, sample in enumerate(block.samples):
                        out += [f"### {_md(sample.title or f'Sample {i + 1}')}", "Prompt", _fence(sample.prompt)]
                        for c in sample.completions:
                            scores = "; ".join(f"{name} {value}" for name, value in c.scores.items())
                            out.append(f"**{_md(c.model)}**" + (f" ({_md(scores)})" if scores else ""))
                            out.append(_fence(c.text) if c.text else "(empty)")
        if self._command:
            out += ["## To repeat", _fence(visible(self._command))]
        for title, values in self._facts.items():
            out += [f"## {_md(title)}", _md_table(["name", "value"], values, [False, False])]
        return _readable("\n\n".join(out) + "\n")

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Writes `report.html`, `report.md` and `report/*.png` under `folder`; returns the paths of the first two.

        Each file appears whole or not at all, and the pages come after the pictures that they show. Raises Failure when the disk refuses.
        """
        folder = Path(folder)
        html_path, markdown_path = folder / "report.html", folder / "report.md"
        for block in self._blocks:
            if isinstance(block, _Picture):
                _write_whole(folder / "report" / f"{block.name}.png", block.png)
        _write_whole(markdown_path, self.markdown().encode("utf-8"))
        _write_whole(html_path, self.html().encode("utf-8"))
        return html_path, markdown_path


def cell_text(value: Any, exact: bool = False) -> str:
    """How a value is shown: a dash for None, yes and no, lists with commas, and fractions to four significant digits or `exact`ly."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return ", ".join(cell_text(v, exact) for v in items) or "–"
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        return cell_text(value.item(), exact)
    if isinstance(value, float):
        if not math.isfinite(value):
            return {math.inf: "∞", -math.inf: "−∞"}.get(value, "NaN")
        if exact:
            return repr(value)
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.6g}"
    return visible(str(value))


def visible(text: str) -> str:
    """`text` with characters that would hide, or break the page, made visible.

    Control characters become their Unicode pictures, direction overrides their code points, and lone surrogates U+FFFD.
    """
    return _HIDDEN.sub(_show, text)


_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def _show(match: re.Match[str]) -> str:
    code = ord(match.group())
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return "\ufffd" if 0xD800 <= code <= 0xDFFF else f"<U+{code:04X}>"


def _readable(value: Any) -> Any:
    """Last guard before text becomes UTF-8: titles, names and sentences are cleaned like samples. Markup of the template stays as it is."""
    return visible(value) if type(value) is str else value


def _is_number(value: Any) -> bool:
    """Right-aligned: numbers, missing values, and estimates with their interval."""
    return value is None or (not isinstance(value, (str, bool)) and (hasattr(value, "__float__") or isinstance(value, Interval)))


def _interval_note(intervals: Sequence[Interval]) -> str:
    if not intervals:
        return ""
    levels = " or ".join(f"{100 * level:g} %" for level in sorted({v.level for v in intervals}))
    low, high = min(v.n for v in intervals), max(v.n for v in intervals)
    return f"In brackets: {levels} intervals, n = {low if low == high else f'{low} to {high}'}."


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat += _flatten(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", None if isinstance(value, Mapping) else value))
    return flat


def _slug(name: str) -> str:
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug:
        raise UsageError(f"picture name {name!r} has no letter or digit to make a file name of")
    return slug


def _md(text: str) -> str:
    """Text in a line of Markdown: nothing in it is markup."""
    text = " ".join(visible(text).split())
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text).replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"^(#{1,6}|[-+>=])(?=\s|$)", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s)", r"\1\\\2", text)


def _md_table(headers: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    lines = [[_md(h) for h in headers], ["---:" if n else "---" for n in numeric], *([_md(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _fence(text: str) -> str:
    """A code block whose fence is longer than any run of backticks in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _write_whole(path: Path, content: bytes) -> None:
    """Writes to a temporary file in the same folder, then renames: a reader or a crash never sees half a file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Failure(f"cannot write the report file {path}: {error.strerror or error}. Free space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename; the folder itself may be missing after a failure
            temporary.unlink()
