"""The map of the 200 systems: one row each in `systems.toml`, read and checked here.

A row says what a system adds and what its claim run decides. Whether it is built or its claim has been run is not stored:
that follows from the recipe files and claim records that exist. Reading imports nothing heavy, so `telos list` stays fast.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from telos.core.errors import DataError, UsageError, did_you_mean

N_SYSTEMS = 200

FAMILIES = (
    "agents",
    "applied",
    "bandits",
    "code-and-decoding",
    "continual-and-diversity",
    "direct-alignment",
    "games-safety-robustness",
    "generative",
    "goals-and-imitation",
    "models-and-meta",
    "objectives",
    "offline-rl",
    "online-language-rl",
    "online-rl",
    "preferences",
    "reasoning",
    "rewards",
    "robots-and-language",
    "systems",
)

MAX_CHANGES = 120  # characters; one table cell
MAX_SHOWS = 160  # characters

_FILE = Path(__file__).with_name("systems.toml")
_KEY = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_NUMBER = re.compile(r"s?([0-9]+)")


@dataclass(frozen=True, slots=True)
class System:
    """One of the 200 systems that Telos covers."""

    key: str  # kebab-case name, unique: the word in `telos run KEY`
    s: int  # the system's number, 1 to 200
    title: str  # short name, as the field uses it
    paper: str  # full title of the paper
    family: str  # one of FAMILIES
    changes: str  # one sentence: what the system adds
    shows: str  # what its claim run must decide


@cache
def load_systems() -> tuple[System, ...]:
    """All systems in the order of their numbers. Raises DataError when `systems.toml` cannot be used."""
    try:
        table = tomllib.loads(_FILE.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise DataError(_FILE.name, f"not valid TOML: {error}") from error
    systems = parse_systems(table)
    check_systems(systems)
    return tuple(sorted(systems, key=lambda system: system.s))


def parse_systems(table: dict[str, Any]) -> list[System]:
    """Rows of a parsed `systems.toml`, in file order. Raises DataError on a missing, unknown or wrongly typed field."""
    if unknown := sorted(table.keys() - {"system"}):
        raise DataError(_FILE.name, f"unknown table {unknown[0]!r}", "every row is a [[system]]")
    types = {field.name: int if field.name == "s" else str for field in fields(System)}
    systems = []
    for index, row in enumerate(table.get("system", []), start=1):
        place = f"{_FILE.name}, row {index}"
        if missing := sorted(types.keys() - row.keys()):
            raise DataError(place, f"field {missing[0]!r} is missing")
        if unknown := sorted(row.keys() - types.keys()):
            raise DataError(place, f"unknown field {unknown[0]!r}{did_you_mean(unknown[0], types)}")
        for name, wanted in types.items():
            if type(row[name]) is not wanted:  # bool is an int to isinstance
                raise DataError(place, f"field {name!r} must be {wanted.__name__}, not {type(row[name]).__name__}")
        systems.append(System(**row))
    return systems


def check_systems(systems: Sequence[System]) -> None:
    """Raise DataError unless numbers 1 to 200 and all keys occur exactly once and every row keeps the written limits."""
    numbers = Counter(system.s for system in systems)
    if repeated := sorted(number for number, count in numbers.items() if count > 1):
        raise DataError(_FILE.name, f"duplicated system numbers: {_listed(repeated)}")
    if missing := sorted(set(range(1, N_SYSTEMS + 1)) - numbers.keys()):
        raise DataError(_FILE.name, f"missing system numbers: {_listed(missing)}")
    if outside := sorted(numbers.keys() - set(range(1, N_SYSTEMS + 1))):
        raise DataError(_FILE.name, f"system numbers outside 1 to {N_SYSTEMS}: {_listed(outside)}")
    keys = Counter(system.key for system in systems)
    if repeated := sorted(key for key, count in keys.items() if count > 1):
        raise DataError(_FILE.name, f"duplicated keys: {', '.join(repeated)}")
    for system in systems:
        place = f"{_FILE.name}, S{system.s}"
        # A key that reads as a number would make `find` ambiguous.
        if not _KEY.fullmatch(system.key) or _NUMBER.fullmatch(system.key):
            raise DataError(place, f"key {system.key!r} is not a kebab-case word that starts with a letter")
        if system.family not in FAMILIES:
            raise DataError(place, f"unknown family {system.family!r}{did_you_mean(system.family, FAMILIES)}")
        for name in ("title", "paper", "changes", "shows"):
            if not getattr(system, name).strip():
                raise DataError(place, f"field {name!r} is empty")
        for name, limit in (("changes", MAX_CHANGES), ("shows", MAX_SHOWS)):
            if (length := len(getattr(system, name))) > limit:
                raise DataError(place, f"field {name!r} has {length} characters", f"shorten it to {limit}")


def find(name: str | int) -> System:
    """The system called `name`: its key ("dpo", any case, "_" for "-") or its number ("S136", "136", 136).

    Raises UsageError with the nearest key when nothing matches.
    """
    systems = load_systems()
    word = str(name).strip().lower().replace("_", "-")
    if number := _NUMBER.fullmatch(word):
        s = int(number[1])
        if 1 <= s <= N_SYSTEMS:
            return systems[s - 1]
        raise UsageError(f"no system has the number {s}: numbers run from S1 to S{N_SYSTEMS}")
    by_key = {system.key: system for system in systems}
    if word in by_key:
        return by_key[word]
    raise UsageError(f"no system is called {str(name)!r}{did_you_mean(word, by_key)}")


def _listed(numbers: Sequence[int]) -> str:
    """'S3, S4, S5 and 12 more': short enough for one error message."""
    shown = ", ".join(f"S{number}" for number in numbers[:10])
    return shown + (f" and {len(numbers) - 10} more" if len(numbers) > 10 else "")
