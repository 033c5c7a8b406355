"""Worked searches on `arith`'s countdown problems: tries, verification of each result, and backtracking from those that miss.

    Use 30, 12 to make 42.
    Steps: 30 - 12 = 18. 18 for 42? no, back. 30 + 12 = 42. 42 for 42? yes. Answer: 42

A try is a chain of steps that uses every number once. Behind it its result is held against the target, with the verdict: `yes`, or `no, back`, after which the
next try begins anew with the given numbers. A search that gives up answers with what its last try made. `read` finds tries and verdicts in any text, and
`settled` is the derivation that a search has ended with, in the form that `arith.verify` judges: what was abandoned is no part of the solution.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from telos.core.errors import UsageError
from telos.environments.text.arith import LEVELS, Step, _combine, _near, split_steps, verify
from telos.environments.text.base import Item

_VERDICT = re.compile(r"(-?[0-9]+)\s+for\s+-?[0-9]+\?\s*(yes|no)(?:,\s*(back))?")


@dataclass(frozen=True)
class Try:
    """One try of a search: its steps as written, what it claims to have made, and what the search says of that. None where nothing is said."""

    steps: tuple[str, ...]
    checked: int | None = None
    accepted: bool | None = None
    left: bool = False  # the search went back from here


def read(completion: str) -> list[Try]:
    """The tries of a completion, in order: what stands before the first "Answer:", cut behind each verdict. Never raises."""
    found: list[Try] = []
    steps: list[str] = []
    for span in split_steps(completion):
        verdict = _VERDICT.fullmatch(span.text)
        if verdict is None:
            steps.append(span.text)
        else:
            found.append(Try(tuple(steps), int(verdict[1]), verdict[2] == "yes", verdict[3] is not None))
            steps = []
    return [*found, Try(tuple(steps))] if steps else found


def settled(completion: str) -> str:
    """The last try's steps and the answer, as one derivation. Text without verdicts stays as it is, up to blanks."""
    tries = read(completion)
    _, mark, answer = completion.partition("Answer:")
    work = "; ".join(tries[-1].steps) if tries else ""
    return f" {work}. {mark}{answer}" if mark else f" {work}"


def solved(item: Item, completion: str) -> bool:
    """Whether the search has ended with a sound derivation of the target. Never raises."""
    return verify(item, settled(completion))


def trace(item: Item, rng: random.Random, failures: int, give_up: bool = False) -> str:
    """A search on a countdown problem that misses `failures` times, with tries that all differ, and then finds the reference's derivation; or, with `give_up`,
    answers with the last miss. Fewer misses where there are no more different ones. Raises `UsageError` for another kind of problem."""
    if item.facts["kind"] != "countdown":
        raise UsageError(f"a search is written for countdown problems, not for an {item.facts['kind']}")
    target = item.facts["target"]
    missed = _misses(item, rng, failures + give_up)
    parts = [f"{_written(steps)}. {steps[-1][3]} for {target}? no, back." for steps in missed]
    if give_up and missed:
        *parts, _ = parts
        last = missed[-1]
        return " " + " ".join([*parts, f"{_written(last)}. Answer: {last[-1][3]}"])
    derivation = item.reference.partition(". Answer:")[0].strip()
    return " " + " ".join([*parts, f"{derivation}. {target} for {target}? yes. Answer: {target}"])


def verdict(item: Item, rng: random.Random) -> tuple[str, str, str]:
    """One try up to its question mark as a prompt, the verdict on it, and how the search goes on from there. In one case of two the try is a hit, else another
    derivation or the right one with a slip in its result. For learning to verify apart from searching, and from slips without learning to make them."""
    target = item.facts["target"]
    derivation = item.reference.partition(". Answer:")[0].strip()
    if rng.random() < 0.5:
        return f"{item.prompt} {derivation}. {target} for {target}?", " yes", f". Answer: {target}"
    missed = _misses(item, rng, 1)
    if missed and rng.random() < 0.5:
        written, result = _written(missed[0]), missed[0][-1][3]
    else:
        result = _near(rng, target)
        written = f"{derivation.rpartition(' ')[0]} {result}"
    found = f" {derivation}. {target} for {target}? yes. Answer: {target}"
    return f"{item.prompt} {written}. {result} for {target}?", " no", f", back.{found}"


def _misses(item: Item, rng: random.Random, count: int) -> list[list[Step]]:
    """Up to `count` different derivations that do not make the target."""
    found: dict[str, list[Step]] = {}
    for _ in range(8 * count):
        steps = _combine(rng, item.facts["operands"], LEVELS[item.facts["level"]])
        if steps is not None and steps[-1][3] != item.facts["target"]:
            found.setdefault(_written(steps), steps)
        if len(found) == count:
            break
    return list(found.values())


def _written(steps: list[Step]) -> str:
    return "; ".join(f"{a} {operator} {b} = {c}" for a, operator, b, c in steps)
