"""`telos list`, `where`, `show`: what there is. And `run`, `claims`, `docs`, `quickstart`: doors to the catalogue's own modules."""

from __future__ import annotations

import importlib.util
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
from telos.core.errors import UsageError


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
        head += [] if entry.card.file else [["loop", method.loop]]
        head += [["needs", ", ".join(sorted(method.needs)) or "the policy alone"]]
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
    claim = None
    if entry.recipe is not None:
        from telos.catalogue.claims import claim_of

        claim = claim_of(entry.key)
    rows = [["to decide", entry.system.shows]]
    if claim is not None:
        rows += [["claim", claim.statement], *(["fact", fact.statement] for fact in claim.facts)]
        rows += [["baselines", ", ".join(claim.baselines)]]
    record = status.read_record(entry.key)
    if record is None:
        return [*rows, ["verdict", f"not run yet; `telos claims run {entry.key}`" if claim is not None else "not run yet"]]
    told = ", ".join(str(record[name]) for name in ("budget", "date", "commit") if record.get(name))
    return [*rows, ["verdict", f"{record.get('verdict', 'none recorded')}{f' ({told})' if told else ''}"]]


# Doors to the catalogue's own programs ---------------------------------------------------------------------------------------------------


def quickstart(arguments: Namespace) -> int:
    from telos.catalogue import quickstart as program
    from telos.cli.progress import Watch

    return finished_quickstart(
        program.run(Path(arguments.out), seed=arguments.seed, fresh=arguments.fresh, watch=Watch(quiet=arguments.quiet))
    )


def finished_quickstart(outcome: Any) -> int:
    for sentence in outcome.sentences:
        print(sentence)
    print(text.columns([["report", text.shown_path(outcome.report)], ["", text.shown_path(outcome.markdown)]]))
    return 0


def run(arguments: Namespace) -> int:
    from telos.catalogue import recipes
    from telos.cli.progress import Watch

    entry = _with_recipe(arguments.key)
    root, figures = recipes.run(entry.key, arguments.budget, seed=arguments.seed, out=arguments.out, watch=Watch(quiet=arguments.quiet))
    print(text.columns([[name, text.number_text(value)] for name, value in figures.items()]))
    print(f"\nin {text.shown_path(root)}")
    return 0


def claims_run(arguments: Namespace) -> int:
    from telos.catalogue import claims
    from telos.cli.progress import Watch

    entry = _with_recipe(arguments.key)
    # From the repository's code, records go where the list and the documentation look for them, whatever the working directory.
    record = claims.run_claim(entry.key, arguments.budget, records=status.repository_records(), watch=Watch(quiet=arguments.quiet))
    rows = [["FACT", "ESTIMATE", "95 % INTERVAL", "VERDICT"]]
    for fact in record["facts"]:
        estimate, low, high = (fact["interval"][name] for name in ("estimate", "low", "high"))
        known = "–" if low is None or high is None else f"[{text.number_text(low)}, {text.number_text(high)}]"
        rows.append([fact["statement"], "–" if estimate is None else text.number_text(estimate), known, fact["verdict"]])
    print(text.columns(rows))
    print(f"\n{entry.title}: {record['verdict']} (budget {record['budget']}, {len(record['seeds'])} seeds)")
    print(f"record: {text.shown_path(record['path'])}")
    return 0


def _with_recipe(name: str) -> Entry:
    """The system called `name`, once it has a recipe."""
    entry = status.find(name)
    if entry.system is None:
        raise UsageError(f"{entry.key} is a baseline method and has no recipe; train it with `telos train {entry.key}`")
    if entry.recipe is None:
        raise UsageError(
            f"{entry.key} ({entry.number}) is planned: it has no recipe yet; `telos list --status ready` shows what can be run"
        )
    return entry


def claims_table(arguments: Namespace) -> int:
    """What has been decided at full budget, and which recipes wait for it."""
    rows = [["KEY", "NUMBER", "VERDICT", "DATE", "COMMIT", "CLAIM"]]
    for entry in status.entries():
        record = status.read_record(entry.key) if entry.record else None
        if record is not None:
            told = [str(record.get(name) or "–") for name in ("verdict", "date", "commit", "statement")]
            rows.append([entry.key, entry.number, told[0], told[1], told[2][:10], told[3]])
        elif entry.recipe is not None:
            rows.append([entry.key, entry.number, "not run yet", "–", "–", "–"])
    print(text.columns(rows, width=text.terminal_width()) if len(rows) > 1 else "no recipe and no claim record yet")
    return docs(arguments) if arguments.check else 0


def docs(arguments: Namespace) -> int:
    from telos.catalogue import docs as tables

    return tables.main(arguments.check)
