"""Finds methods by reading files, without importing them: `telos list` must not wait for torch.

A method is a file under `telos/algorithms/<family>/` whose last statement assigns `METHOD = Method(...)`. Third parties add methods by an
entry point in the group `telos.methods` (name = key, value = "package.module"); those are listed by name and read in full when used.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telos.core.errors import Failure, UsageError, did_you_mean
from telos.core.method import Method

_ROOT = Path(__file__).parent.parent / "algorithms"


@dataclass(frozen=True)
class Card:
    """What can be said of a method without importing it."""

    key: str
    title: str
    family: str
    loop: str
    changes: str
    paper: str
    system: int | None
    aliases: tuple[str, ...]
    module: str
    file: Path | None


def _card_of(path: Path) -> Card | None:
    source = path.read_text(encoding="utf-8")
    if "METHOD = Method(" not in source:
        return None
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and getattr(node.targets[0], "id", "") == "METHOD":
            values: dict[str, Any] = {"system": None, "aliases": ()}
            for word in node.value.keywords:
                if word.arg in {"key", "title", "family", "loop", "changes", "paper", "system", "aliases"}:
                    try:
                        values[word.arg] = ast.literal_eval(word.value)
                    except ValueError:
                        raise Failure(
                            f"{path}: METHOD's {word.arg} must be a literal, so that it can be listed without being imported"
                        ) from None
            if missing := [name for name in Card.__dataclass_fields__ if name not in {*values, "module", "file"}]:
                raise Failure(f"{path}: METHOD has no {missing[0]}")
            module = "telos.algorithms." + ".".join(path.relative_to(_ROOT).with_suffix("").parts)
            return Card(**values, module=module, file=path)
    return None


@functools.cache
def cards() -> tuple[Card, ...]:
    """Every method, by key. Raises `Failure` when two share a key."""
    found = [card for path in sorted(_ROOT.glob("*/[!_]*.py")) if (card := _card_of(path))]
    for entry in importlib.metadata.entry_points(group="telos.methods"):
        found.append(Card(entry.name, entry.name, "third-party", "", "", "", None, (), entry.value, None))
    by_key: dict[str, Card] = {}
    for card in found:
        if card.key in by_key:
            raise Failure(f"two methods are called {card.key!r}: {by_key[card.key].module} and {card.module}; rename one")
        by_key[card.key] = card
    return tuple(by_key[key] for key in sorted(by_key))


def matches(word: str) -> tuple[Card, ...]:
    """Every method whose key, alias or title is `word`, case and '-'/'_' aside: names collide across fields."""
    wanted = word.lower().replace("_", "-")
    return tuple(card for card in cards() if wanted in {card.key, card.title.lower(), *(alias.lower() for alias in card.aliases)})


def find(word: str) -> Card:
    """The one method called `word`. Raises `UsageError` with a suggestion when there is none, with the list when there are several."""
    found = matches(word)
    exact = [card for card in found if card.key == word.lower().replace("_", "-")]
    if len(found) == 1 or exact:
        return exact[0] if exact else found[0]
    if found:
        raise UsageError(f"{word!r} names several methods: {', '.join(card.key for card in found)}; use one of these keys")
    names = [name for card in cards() for name in (card.key, *card.aliases)]
    raise UsageError(f"there is no method {word!r}{did_you_mean(word, names)}; `telos list` shows all")


def load(word: str) -> Method:
    """Imports the method called `word`. Raises `Failure` for a third party's entry point that leads nowhere."""
    card = find(word)
    try:
        module = importlib.import_module(card.module)
    except ImportError as error:
        if card.file is not None:
            raise
        raise Failure(f"method {card.key!r}: its entry point names {card.module}, which cannot be imported ({error})") from error
    method = getattr(module, "METHOD", None)
    if not isinstance(method, Method):
        raise Failure(f"{module.__name__} has no METHOD = Method(...)")
    if method.key != card.key:
        raise Failure(f"{module.__name__}: METHOD's key {method.key!r} is not the name of its entry point, {card.key!r}")
    return method
