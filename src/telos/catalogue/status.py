"""What stands behind each row of the map: the method's file, the recipe, the claim's record, and the status that follows from them.

Nothing here is kept by hand. A system is `planned` until its recipe file `catalogue/<family>/<key>.py` exists ('-' written as '_'), then `ready`, and when
its claim has been run at full budget its status is the recorded verdict: `supported`, `not supported` or `inconclusive`. Methods that are no
system (the baselines that systems are measured against) have the status `baseline`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telos.catalogue.systems import FAMILIES, System, load_systems
from telos.core import discovery
from telos.core.discovery import Card
from telos.core.errors import TelosWarning, UsageError, did_you_mean

VERDICTS = ("supported", "not supported", "inconclusive")
STATUSES = ("planned", "ready", *VERDICTS)
BASELINE = "baseline"

_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Entry:
    """A system, a method, or a system with its method."""

    system: System | None
    card: Card | None
    recipe: Path | None  # the recipe's file
    record: Path | None  # the claim's record, of any budget
    status: str

    @property
    def key(self) -> str:
        return self.system.key if self.system else self._card.key

    @property
    def title(self) -> str:
        return self.system.title if self.system else self._card.title

    @property
    def number(self) -> str:
        """'S136', or '' for a method that is no system."""
        return f"S{self.system.s}" if self.system else ""

    @property
    def family(self) -> str:
        return self.system.family if self.system else self._card.family

    @property
    def changes(self) -> str:
        return self.system.changes if self.system else self._card.changes

    @property
    def names(self) -> tuple[str, ...]:
        """All names under which it is found."""
        own = (self.system.key, self.system.title, self.number, str(self.system.s)) if self.system else ()
        return own + ((self.card.key, self.card.title, *self.card.aliases) if self.card else ())

    @property
    def _card(self) -> Card:
        assert self.card is not None
        return self.card


def records_folder() -> Path:
    """Where claim records lie: `claims/` of the repository, or the copies in the package where there is no repository."""
    return repository_records() or _PACKAGE / "assets" / "claims"


def repository_records() -> Path | None:
    """`claims/` of the repository that this code runs from; None for an installed package."""
    root = _PACKAGE.parent.parent
    return root / "claims" if (root / "pyproject.toml").is_file() else None


def recipe_file(family: str, key: str) -> Path:
    return _PACKAGE / "catalogue" / family.replace("-", "_") / f"{key.replace('-', '_')}.py"


def read_record(key: str) -> dict[str, Any] | None:
    """The claim record of `key`, of any budget; None when there is none. A record that cannot be read is warned of and counts as none."""
    path = records_folder() / f"{key}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(f"the claim record {path} cannot be read ({error}); run `telos claims run {key}` again", TelosWarning, stacklevel=2)
        return None
    return record if isinstance(record, dict) else None


def status_of(key: str, family: str) -> str:
    """One of `STATUSES` for a system."""
    record = read_record(key)
    if record is not None and record.get("budget") == "full" and record.get("verdict") in VERDICTS:
        return record["verdict"]
    return "ready" if recipe_file(family, key).is_file() else "planned"


def entries() -> tuple[Entry, ...]:
    """All systems by number, each with its method, then the methods that are no system, by key."""
    by_system = {card.system: card for card in discovery.cards() if card.system is not None}
    found = [_entry(system, by_system.get(system.s)) for system in load_systems()]
    baselines = [Entry(None, card, None, None, BASELINE) for card in discovery.cards() if card.system is None]
    return (*found, *baselines)


def _entry(system: System, card: Card | None) -> Entry:
    recipe, record = recipe_file(system.family, system.key), records_folder() / f"{system.key}.json"
    status = status_of(system.key, system.family)
    return Entry(system, card, recipe if recipe.is_file() else None, record if record.is_file() else None, status)


def select(family: str | None = None, status: str | None = None, methods: bool = False) -> tuple[Entry, ...]:
    """Entries of a family (the catalogue's, or the folder of the method) and a status; `methods` adds those that are no system.

    Raises `UsageError` with a suggestion for unknown words.
    """
    wanted = status.replace("-", " ") if status else None
    if wanted is not None and wanted not in (*STATUSES, BASELINE):
        raise UsageError(f"--status {status}: no such status{did_you_mean(wanted, (*STATUSES, BASELINE))}; one of {', '.join(STATUSES)}")
    everything = entries()
    known = sorted({*FAMILIES, *(card.family for card in discovery.cards())})
    wanted_family = family.replace("_", "-") if family else None
    if family is not None and wanted_family not in known:
        raise UsageError(f"--family {family}: no such family{did_you_mean(family, known)}; one of {', '.join(known)}")
    return tuple(
        entry
        for entry in everything
        if (entry.system or methods or wanted == BASELINE)
        and (wanted_family is None or wanted_family in (entry.family, entry.card.family if entry.card else ""))
        and (wanted is None or entry.status == wanted)
    )


def matches(word: str) -> tuple[Entry, ...]:
    """Every entry with `word` as key, alias, title or number ('S136', '136'); case and '-', '_' or space between words aside."""
    wanted = _plain(word)
    return tuple(entry for entry in entries() if wanted in {_plain(name) for name in entry.names})


def find(word: str) -> Entry:
    """The one entry called `word`. Raises `UsageError`: with a suggestion when there is none, with the list when there are several."""
    found = matches(word)
    exact = [entry for entry in found if _plain(word) in {entry.key, entry.card.key if entry.card else ""}]
    if len(found) == 1 or len(exact) == 1:
        return (exact or list(found))[0]
    if found:
        raise UsageError(f"{word!r} names several: {listed(found)}; use a key or a number")
    raise unknown(word)


def unknown(word: str) -> UsageError:
    """The error for a name that nothing has."""
    names = [name.lower() for entry in entries() for name in entry.names]
    return UsageError(f"no system or method is called {word!r}{did_you_mean(word.lower(), names)}; `telos list --methods` shows all")


def listed(found: Sequence[Entry]) -> str:
    return ", ".join(f"{entry.key}{f' ({entry.number})' if entry.number else ''}" for entry in found)


def _plain(name: str) -> str:
    return name.strip().lower().replace("_", "-").replace(" ", "-")
