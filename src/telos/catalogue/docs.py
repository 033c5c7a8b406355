"""Writes the documentation that can be derived: tables of methods, systems, options, claims and benchmarks, and the README's list of methods.

Nothing here is kept by hand, so it cannot rot: `telos docs` writes the files, `telos docs --check` fails when a committed one differs. The text
depends on the sources and records alone (no clock, no machine, no installed package), so everybody gets the same bytes.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from telos.catalogue import status
from telos.catalogue.systems import FAMILIES
from telos.core import discovery
from telos.core.config import Option, options_of
from telos.core.discovery import Card
from telos.core.errors import DataError, UsageError
from telos.core.method import Method
from telos.core.run import write_atomically
from telos.evaluation.statistics import Interval

_ROOT = Path(__file__).parents[3]
_HEAD = "<!-- Written by `telos docs` from the sources and records; edits here are lost. -->"
_BEGIN, _END = "<!-- methods -->", "<!-- /methods -->"


def main(check: bool = False, root: Path = _ROOT) -> int:
    """Writes what differs and names it; with `check`, writes nothing and returns 1 when a file differs.

    Raises `UsageError` outside a checkout and when the README has lost its markers, `DataError` for a record that is not JSON.
    """
    if not (root / "README.md").is_file() or not (root / "pyproject.toml").is_file():
        raise UsageError(f"`telos docs` works in a checkout of Telos; {root} is none")
    texts = rendered(root)
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    names = ", ".join(path.relative_to(root).as_posix() for path in stale)
    if check and stale:
        print(f"generated documentation is out of date: {names}. Run `make docs` and commit the result", file=sys.stderr)
        return 1
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, texts[path])
    print(f"documentation written: {names}" if stale else "generated documentation is up to date")
    return 0


def rendered(root: Path = _ROOT) -> dict[Path, str]:
    """Every generated file with the text it should have."""
    docs = root / "docs"
    return {
        docs / "methods.md": methods_page(),
        docs / "systems.md": systems_page(),
        docs / "options.md": options_page(),
        docs / "claims.md": claims_page(_records(root / "claims")),
        docs / "benchmarks.md": benchmarks_page(_records(root / "benchmarks" / "records")),
        root / "README.md": with_methods((root / "README.md").read_text(encoding="utf-8")),
    }


# Methods and systems ---------------------------------------------------------------------------------------------------------------------


def _own_cards() -> list[Card]:
    """The methods of this repository; those of installed third parties are not its documentation."""
    return [card for card in discovery.cards() if card.file is not None]


def methods_page() -> str:
    rows = []
    for card in _own_cards():
        system = f"S{card.system}" if card.system else "baseline"
        rows.append([f"`{card.key}`", card.title, system, card.family, card.loop, card.changes, card.paper, _link(card.file)])
    head = ["key", "title", "system", "family", "loop", "what it changes", "paper", "file"]
    text = "`telos train KEY` trains one, `telos show KEY` lists its options. A baseline is a method that others are measured against."
    return _page("Methods", text, _table(head, rows))


def systems_page() -> str:
    entries = [entry for entry in status.entries() if entry.system is not None]
    counts = Counter(entry.status for entry in entries)
    text = (
        f"All {len(entries)} systems: {_counted(counts)}. *planned*: there is no recipe yet. *ready*: the recipe runs, its claim has no verdict yet. The "
        "other words are verdicts of claims that were run in full (see [claims](claims.md)). The last column is what the claim run must decide."
    )
    parts = []
    for family in FAMILIES:
        members = [entry for entry in entries if entry.family == family]
        rows = []
        for entry in members:
            key = f"`{entry.key}`"
            file = entry.card.file if entry.card is not None else None
            rows.append([entry.number, _link(file, key) if file else key, entry.title, entry.status, entry.changes, _shows(entry)])
        title = f"## {family}\n\n{len(members)} systems: {_counted(Counter(entry.status for entry in members))}."
        parts.append(f"{title}\n\n" + _table(["number", "key", "title", "status", "what it changes", "to decide"], rows))
    return _page("Systems", text, "\n\n".join(parts))


def _shows(entry: status.Entry) -> str:
    return entry.system.shows if entry.system is not None else ""


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in status.STATUSES if counts.get(name))


def with_methods(readme: str) -> str:
    """The README with its block between the markers made anew. Raises `UsageError` when a marker is missing."""
    before, begin, rest = readme.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise UsageError(f"README.md has lost the markers {_BEGIN} and {_END}; put them back around the table of methods")
    entries = status.entries()
    counts = Counter(entry.status for entry in entries if entry.system is not None)
    by_loop: dict[tuple[str, str], list[str]] = {}
    for card in _own_cards():
        by_loop.setdefault((card.family, card.loop), []).append(f"[`{card.key}`](docs/options.md#{card.key})")
    rows = [[_loop_title(*place), " ".join(keys)] for place, keys in sorted(by_loop.items())]
    table = _table(["how they learn", "methods"], rows)
    return f"{before}{_BEGIN}\n{table}\n\nOf the {counts.total()} systems: {_counted(counts)}.\n{_END}{after}"


def _loop_title(family: str, loop: str) -> str:
    """What a loop's file says it is: its docstring up to the first colon or stop."""
    path = _ROOT / "src" / "telos" / "algorithms" / family / f"_loop_{loop.replace('-', '_')}.py"
    first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or loop).splitlines()[0]
    return first.partition(":")[0].partition(". ")[0].rstrip(".")


# Options ---------------------------------------------------------------------------------------------------------------------------------


def options_page() -> str:
    """One table for each config class: those that methods share stand once, and a method's own table holds what it adds or changes."""
    methods = [discovery.load(card.key) for card in _own_cards()]
    shared: dict[type, None] = {}
    for method in methods:
        shared |= dict.fromkeys(reversed(_bases(method.config)))
    # Those nearest to the root first: every run, then a family, then a loop.
    ordered = sorted(shared, key=lambda cls: (len(_bases(cls)), _title(cls)))
    text = (
        "On the command line `--name value` (hyphens and underscores are the same), in a `--config` file `name: value`, in Python `name=value`. "
        "A method takes the options of its own table and of the shared tables that it names; where an option stands in several, the method's "
        "own table holds, then the first named. The same, method by method: `telos train KEY --help`."
    )
    parts = ["## Methods", *(_method_options(method) for method in methods), "## Shared options"]
    parts += [f"### {_title(cls)}\n\n{_option_table(cls)}" for cls in ordered]
    return _page("Options", text, "\n\n".join(parts))


def _bases(config: type) -> list[type]:
    """The classes from which `config` takes options, nearest first, itself left out."""
    return [base for base in config.__mro__[1:] if dataclasses.is_dataclass(base)]


def _own_options(config: type) -> list[Option]:
    """The options that a class declares itself, new ones and changed ones."""
    declared = inspect.get_annotations(config)
    return [option for option in options_of(config) if option.name in declared]


def _method_options(method: Method) -> str:
    inherited = ", ".join(f"[{_title(base)}](#{_anchor(_title(base))})" for base in _bases(method.config) if _own_options(base))
    table = _option_table(method.config) if _own_options(method.config) else "No option of its own."
    kept = {option.name for option in options_of(method.config)}
    hidden = dict.fromkeys(o.name for base in _bases(method.config) for o in _own_options(base) if o.name not in kept)
    but = f", but not {', '.join(f'`{name}`' for name in hidden)}" if hidden else ""
    return f"### {method.key}\n\n{method.title}: {method.changes}. Takes also: {inherited}{but}.\n\n{table}"


def _option_table(config: type) -> str:
    hints = typing.get_type_hints(config)
    rows = [[f"`{o.name}`", _kind(hints[o.name]), f"`{_value(o.default)}`", o.help] for o in _own_options(config)]
    return _table(["option", "type", "default", "meaning"], rows)


def _title(config: type) -> str:
    """The first sentence of the class's docstring."""
    line = (config.__doc__ or config.__name__).strip().splitlines()[0]
    return line.partition(": ")[0].partition(". ")[0].rstrip(".")


def _kind(hint: Any) -> str:
    """A type as a user would say it: text, float, a | b, text or none."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, arguments))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in arguments)
    if typing.get_origin(hint) in (tuple, list):
        return f"list of {_kind(arguments[0])}"
    return {str: "text", bool: "true | false", type(None): "none"}.get(hint) or getattr(hint, "__name__", str(hint))


def _value(default: Any) -> str:
    if default is None or default == "" or default == ():
        return "none"
    if isinstance(default, tuple):
        return ",".join(map(str, default)).replace("\n", "\\n")
    return str(default).lower() if isinstance(default, bool) else str(default)


def _anchor(title: str) -> str:
    """GitHub's anchor of a heading."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


# Records ---------------------------------------------------------------------------------------------------------------------------------


def _records(folder: Path) -> list[dict[str, Any]]:
    """The JSON objects of a folder by file name. Raises `DataError` for a file that is none."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(str(path), f"not a readable record: {error}", "Make it anew, or take the file out") from None
        if not isinstance(record, dict):
            raise DataError(str(path), "not a record: its JSON is no object", "Make it anew, or take the file out")
        found.append(record)
    return found


def claims_page(records: Sequence[Mapping[str, Any]]) -> str:
    text = (
        "What was claimed of each system, and what came out. Facts and bounds stand in the recipe before the run; seeds come from a range on which "
        "nothing is tuned. A fact is *supported* when its whole 95 % interval (bootstrap of the interquartile mean over seeds) satisfies the bound, "
        "*not supported* when the whole interval violates it, *inconclusive* otherwise. Records: `claims/`; run one again with "
        "`telos claims run KEY --budget full`."
    )
    if not records:
        return _page("Claims", text, "No claim has been run yet.")
    rows = [[f"[{_system(r)}](#{_anchor(_system(r))})", f"**{r.get('verdict', '')}**", str(r.get("statement", ""))] for r in records]
    return _page("Claims", text, "\n\n".join([_table(["system", "verdict", "claim"], rows), *map(_claim, records)]))


def _system(record: Mapping[str, Any]) -> str:
    return f"S{record.get('system', '?')} {record.get('title') or record.get('key', '')}"


def _claim(record: Mapping[str, Any]) -> str:
    facts = record.get("facts") or []
    rows = [[f["statement"], f"{f['figure']} {f['relation']} {_flat(f['bound'])}", _interval(f["interval"]), f["verdict"]] for f in facts]
    parts = [f"## {_system(record)}", f"{record.get('statement', '')}: **{record.get('verdict', '')}**."]
    parts += [_table(["fact", "bound", "estimate and interval", "verdict"], rows)]
    seeds = record.get("seeds") or []
    figures = record.get("figures") or {}
    measured = [[name, _interval(value), ", ".join(_flat(s["figures"].get(name)) for s in seeds)] for name, value in figures.items()]
    parts += [_table(["figure", "estimate and interval", "each seed"], measured)]
    parts += [str(record["notes"])] if record.get("notes") else []
    told = {
        "baselines": record.get("baselines"),
        "seeds": [s.get("seed") for s in seeds],
        "budget": record.get("budget"),
        "settings": record.get("settings"),
        "commit": record.get("commit"),
        "date": record.get("date"),
        "hardware": record.get("hardware"),
    }
    return "\n\n".join([*parts, "\n".join(f"- {name}: {_flat(value)}" for name, value in told.items() if value)])


def _interval(found: Mapping[str, Any]) -> str:
    """A recorded interval as reports write it; bounds that were infinite are recorded as null."""
    low, high = (math.inf if found.get(name) is None else found[name] for name in ("low", "high"))
    estimate = found.get("estimate")
    return Interval(math.nan if estimate is None else estimate, low, high, found.get("n", 0)).short()


def benchmarks_page(records: Sequence[Mapping[str, Any]]) -> str:
    text = (
        "Ours and a peer in turn, in one run on one machine, with the same model, data, batches and threads. The ratio is the peer's time over "
        "ours: median, least and greatest over the pairs. The limit is the time of the matrix products that cannot be avoided, timed alone. "
        "Records: `benchmarks/records/`; measure on your machine with `make bench CASE=dpo`."
    )
    rows = []
    for record in records:
        peer, ratio, memory = record.get("peer", {}), record.get("ratio", {}), record.get("peak_memory", {})
        named = f"{peer.get('name', '')} {peer.get('version', '')}".strip() if isinstance(peer, Mapping) else str(peer)
        spread = f"{_flat(ratio.get('median'))}x ({_flat(ratio.get('min'))} to {_flat(ratio.get('max'))})"
        share = f"{record['limit_share']:.0%}" if isinstance(record.get("limit_share"), float) else ""
        peak = f"{_flat(memory.get('ours'))} / {_flat(memory.get('peer'))} MiB" if memory else ""
        rows.append(
            [f"`{record.get('case', '')}`", named, spread, share, peak, _flat(record.get("machine")), str(record.get("commit", ""))[:12]]
        )
    head = ["case", "peer", "speed", "share of the limit", "peak memory, ours / peer", "machine", "commit"]
    return _page("Benchmarks", text, _table(head, rows) if rows else "No benchmark has been recorded yet.")


# Markdown --------------------------------------------------------------------------------------------------------------------------------


def _page(title: str, text: str, body: str) -> str:
    return f"{_HEAD}\n\n# {title}\n\n{text}\n\n{body}\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _link(path: Path | None, text: str = "") -> str:
    """A link from a page in `docs/` to a file of the repository."""
    if path is None:
        return text
    return f"[{text or path.name}](../{path.relative_to(_ROOT).as_posix()})"


def _flat(value: Any) -> str:
    """A value of a record in one table cell; numbers to four significant digits."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items() if item not in (None, [], ""))
    if isinstance(value, (list, tuple)):
        return ", ".join(_flat(item) for item in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
