"""`telos list`, `where`, `show`: what there is. And `run`, `claims`, `docs`, `quickstart`: doors to the catalogue's own modules."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telos.catalogue import status
from telos.catalogue.status import Entry
from telos.cli import text
from telos.core.discovery import Card


def list_systems(arguments: Namespace) -> int:
    entries = status.select(arguments.family, arguments.status, arguments.methods)
    if arguments.json:
        print(json.dumps([_as_dict(entry) for entry in entries], indent=1, ensure_ascii=False))
        return 0
    rows = [["KEY", "NUMBER", "TITLE", "FAMILY", "STATUS", "WHAT IT CHANGES"]]
    rows += [[entry.key, entry.number or "–", entry.title, entry.family, entry.status, entry.changes] for entry in entries]
    if entries:
        print(text.columns(rows, width=text.terminal_width(), last="cut"))
    print(_summary(entries))
    return 0


def _as_dict(entry: Entry) -> dict[str, Any]:
    return {
        "key": entry.key,
        "system": entry.system.s if entry.system else None,
        "title": entry.title,
        "family": entry.family,
        "status": entry.status,
        "changes": entry.changes,
        "method": entry.card.key if entry.card else None,
    }


def _summary(entries: Sequence[Entry]) -> str:
    systems = [entry for entry in entries if entry.system]
    counts = Counter(entry.status for entry in systems)
    parts = [f"{counts[name]} {name}" for name in status.STATUSES if counts[name]]
    line = f"{len(systems)} system{'s' * (len(systems) != 1)}" + (f": {', '.join(parts)}" if parts else "")
    baselines = len(entries) - len(systems)
    return line + (f"; {baselines} baseline method{'s' * (baselines != 1)}" if baselines else "")


def where(arguments: Namespace) -> int:
    """Every match with its files: names collide across fields."""
    found = status.matches(arguments.name)
    if not found:
        raise status.unknown(arguments.name)
    for entry in found:
        print(f"{entry.key}{f' ({entry.number})' if entry.number else ''}: {entry.title}, {entry.family}, {entry.status}")
        files = _files(entry)
        print(text.columns([[what, text.shown_path(path)] for what, path in files], indent=2) if files else "  planned: it has no file yet")
    return 0


def _files(entry: Entry) -> list[tuple[str, Path]]:
    files: list[tuple[str, Path]] = []
    if entry.card is not None:
        if entry.card.file is None:
            origin = importlib.util.find_spec(entry.card.module)
            files += [("method", Path(origin.origin))] if origin and origin.origin else []
        else:
            loop = entry.card.file.with_name(f"_loop_{entry.card.loop.replace('-', '_')}.py")
            files += [("method", entry.card.file), ("loop", loop)]
    files += [("recipe", entry.recipe)] if entry.recipe else []
    return files + ([("claim record", entry.record)] if entry.record else [])


def show(arguments: Namespace) -> int:
    entry = status.find(arguments.key)
    head = [["paper", _paper(entry)], ["changes", entry.changes], ["family", entry.family], ["status", entry.status]]
    head += [[what, text.shown_path(path)] for what, path in _files(entry)]
    groups = []
    if entry.card is not None:
        from telos.cli.options import groups_of
        from telos.core import discovery

        method = discovery.load(entry.card.key)
        head += [["loop", method.loop], ["needs", ", ".join(sorted(method.needs)) or "the policy alone"]]
        head += [["also called", ", ".join(entry.card.aliases)]] if entry.card.aliases else []
        groups = groups_of(method.config)
    width = text.terminal_width()
    print(f"{entry.title}{f' ({entry.number})' if entry.number else ''}: {entry.key}\n")
    print(text.columns(head, width=width, indent=2))
    if entry.system is not None:
        print("\nClaim:\n" + text.columns(_claim(entry), width=width, indent=2))
    if groups and entry.card is not None:
        from telos.cli.options import described

        print(f"\nOptions of `telos train {entry.card.key}` (name, type, default, meaning)\n\n" + described(groups, width))
    elif entry.card is None:
        print("\nPlanned: there is no method file yet, so it has no options.")
    return 0


def _paper(entry: Entry) -> str:
    card: Card | None = entry.card
    return card.paper if card and card.paper else entry.system.paper if entry.system else "–"


def _claim(entry: Entry) -> list[list[str]]:
    """What is claimed and what the last record says of it."""
    assert entry.system is not None
    claim = claim_of(entry.key)
    rows = [["to decide", entry.system.shows]]
    if statement := getattr(claim, "statement", None):
        rows.append(["statement", str(statement)])
    record = status.read_record(entry.key)
    if record is None:
        return [*rows, ["verdict", f"not run yet; `telos claims run {entry.key}`" if claim is not None else "not run yet"]]
    told = ", ".join(str(record[name]) for name in ("budget", "date", "commit") if record.get(name))
    return [*rows, ["verdict", f"{record.get('verdict', 'none recorded')}{f' ({told})' if told else ''}"]]


def claim_of(key: str) -> Any:
    """The claim that the recipe of `key` declares; None where there is none."""
    if importlib.util.find_spec("telos.catalogue.claims") is None:
        return None
    from telos.catalogue import claims  # type: ignore[attr-defined]

    return claims.claim_of(key)
