"""What every bundled text testbed offers.

A testbed is prompts with a gold judge. The judge is exact and programmatic, so that "is the behaviour what was wanted?" has an
answer that no learner can touch: learners see prompts, preferences and learned rewards; only reports and claims call `gold`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from telos.core.errors import UsageError, did_you_mean

Split = Literal["train", "validation", "test"]

TESTBEDS = (
    "arith",
    "docstrings",
    "grue-concepts",
    "grue-dialogue",
    "grue-qa",
    "grue-sentiment",
    "grue-summaries",
    "grue-translation",
    "pyfunc",
    "review",
    "scenes",
)


@dataclass(frozen=True)
class Item:
    """One prompt. `prompt` ends exactly where the answer begins; `reference` is a good answer without end token; `facts` are
    JSON-able and are what the gold judge needs beside the completion."""

    prompt: str
    reference: str
    facts: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class TextTestbed(Protocol):
    """`name`, `max_new_tokens` (enough for every reference under `tinylm`'s tokenizer) and four functions."""

    name: str
    max_new_tokens: int

    def items(self, split: Split, n: int | None = None, seed: int = 0) -> list[Item]:
        """`n` items of a split, in an order fixed by `seed`; the three splits share no item. `None` means all (finite testbeds only)."""
        ...

    def gold(self, item: Item, completion: str) -> float:
        """The gold score of a completion (text after the prompt, end token removed); higher is better."""
        ...

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        """The named parts of which `gold` is made, each in [0, 1]."""
        ...

    def corpus(self, n: int, seed: int) -> Iterator[str]:
        """`n` training documents for pre-training a small language model (no item of validation or test among them)."""
        ...


def item_columns(testbed: TextTestbed, item: Item) -> dict[str, Any]:
    """What an item's row has beside prompt and facts: nothing, unless the testbed has a function `columns` (a picture, for instance)."""
    columns = getattr(testbed, "columns", None)
    return {} if columns is None else columns(item)


def load_testbed(name: str) -> TextTestbed:
    """The bundled testbed called `name`. Raises `UsageError` for an unknown name."""
    if name not in TESTBEDS:
        raise UsageError(f"unknown testbed {name!r}{did_you_mean(name, TESTBEDS)}; bundled: {', '.join(TESTBEDS)}")
    testbed: TextTestbed = importlib.import_module(f"telos.environments.text.{name.replace('-', '.')}").TESTBED
    return testbed
