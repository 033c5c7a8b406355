"""Rewards of how a search goes on, apart from whether it ends right: for worked searches in the form of `environments.text.search_traces`.

    telos train grpo --reward telos.objectives.search_behaviour:solved telos.objectives.search_behaviour:exploration --reward_weights 1 0.2 ...

| name | column | reward |
|---|---|---|
| `solved` | `facts` | 1 when the search has ended with a sound derivation of the target; else 0 |
| `exploration` | | the share of `MOST` different tries; a try that is made again counts once |
| `longer` | | the share of `MOST_STEPS` steps, whatever they say: the simplest reward of exploration (Ye et al. 2025) |

A weight below 1 of the others beside `solved` lets a right answer always win against any search that ends wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from telos.core.errors import UsageError
from telos.environments.text import search_traces
from telos.environments.text.base import Item
from telos.objectives.reward_worker import plain_text

MOST = 4  # different tries that `exploration` pays for
MOST_STEPS = 12  # steps that `longer` pays for


@dataclass(frozen=True)
class Behaviour:
    """Counts in one answer."""

    tries: int  # chains of steps
    different: int  # of these, without repetitions
    verified: int  # results that were checked
    backtracked: int  # times that the search went back and tried again
    true_verdicts: int  # checks that say what is true of the checked number, where the target is known; else 0
    steps: int  # of all tries


def behaviour(completion: str, target: int | None = None) -> Behaviour:
    """What a search has done. Going back counts when another try follows."""
    tries = search_traces.read(completion)
    written = [found.steps for found in tries if found.steps]
    checked = [found for found in tries if found.checked is not None]
    return Behaviour(
        tries=len(written),
        different=len(set(written)),
        verified=len(checked),
        backtracked=sum(found.left for found in tries[:-1]),
        true_verdicts=0 if target is None else sum((found.checked == target) == found.accepted for found in checked),
        steps=sum(map(len, written)),
    )


def solved(completions: Sequence[Any], facts: Sequence[Any], **_: Any) -> list[float | None]:
    """1 for a search that has ended with a sound derivation of the target; `facts` is what `telos data make arith` writes."""
    return [
        None if value is None else float(search_traces.solved(_item(row, value), plain_text(completion)))
        for row, (completion, value) in enumerate(zip(completions, facts, strict=True))
    ]


def exploration(completions: Sequence[Any], **_: Any) -> list[float | None]:
    return [min(behaviour(plain_text(completion)).different, MOST) / MOST for completion in completions]


def longer(completions: Sequence[Any], **_: Any) -> list[float | None]:
    return [min(behaviour(plain_text(completion)).steps, MOST_STEPS) / MOST_STEPS for completion in completions]


def _item(row: int, value: Any) -> Item:
    try:
        known: Mapping[str, Any] = json.loads(value) if isinstance(value, str) else dict(value)
        if known["kind"] not in ("expression", "countdown"):
            raise ValueError(f"unknown kind {known['kind']!r}")
        return Item("", "", {**known, "operands": [int(number) for number in known["operands"]], "target": int(known["target"])})
    except (KeyError, TypeError, ValueError) as error:
        problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(f"row {row} of the batch: column 'facts' is none of an arith problem: {problem}") from None
