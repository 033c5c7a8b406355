"""What the six tasks share: drawing problems of a split, training documents, and the metrics of a set of answers."""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import get_args

from telos.core.errors import UsageError, did_you_mean
from telos.environments.text.base import Item, Split
from telos.environments.text.grue._metrics import LEXICAL, diversity

_TRIES = 20  # drawings for a prompt that was not drawn yet; then one comes twice


def split_of(key: str) -> Split:
    """80 % train, 10 % validation, 10 % test, by a hash of what a problem is about."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def check_split(split: Split, n: int | None) -> None:
    """Raises `UsageError` for an unknown split and a negative number."""
    if split not in get_args(Split):
        raise UsageError(f"unknown split {split!r}{did_you_mean(split, get_args(Split))}; splits are {', '.join(get_args(Split))}")
    if n is not None and n < 0:
        raise UsageError(f"n = {n}: the number of problems cannot be negative")


class GrueTask(ABC):
    """A testbed (see `TextTestbed`) with corpus-level metrics.

    Every item's facts hold `references`: the good answers, the first of them the item's own `reference`. An answer begins with one space;
    judges strip it. `lexical` names the metrics that compare with the references.
    """

    name: str
    max_new_tokens = 40
    lexical: tuple[str, ...] = ()

    @abstractmethod
    def items(self, split: Split, n: int | None = None, seed: int = 0) -> list[Item]: ...

    @abstractmethod
    def attributes(self, item: Item, completion: str) -> dict[str, float]: ...

    @abstractmethod
    def gold(self, item: Item, completion: str) -> float: ...

    @abstractmethod
    def demonstrations(self, n: int, seed: int) -> Iterator[tuple[str, str]]:
        """`n` prompts of the training split, each with an answer as people write them: not all are good."""

    def corpus(self, n: int, seed: int) -> Iterator[str]:
        """The demonstrations as documents."""
        return (prompt + answer for prompt, answer in self.demonstrations(n, seed))

    def metrics(self, items: Sequence[Item], completions: Sequence[str], perplexity: float | None = None) -> dict[str, float]:
        """Corpus-level metrics of one answer to each item.

        `gold` and `task/…` are means of the judge and its parts, `lexical/…` compares with the references, and the rest is `naturalness`.
        Raises `UsageError` without items, when the numbers differ, and when a metric's library is not installed.
        """
        if not items or len(items) != len(completions):
            raise UsageError(
                f"{self.name}: {len(items)} items and {len(completions)} completions; metrics need one for each, and at least one"
            )
        texts = [text.strip() for text in completions]
        parts = [self.attributes(item, text) for item, text in zip(items, texts, strict=True)]
        found = {"gold": sum(self.gold(item, text) for item, text in zip(items, texts, strict=True)) / len(items)}
        found |= {f"task/{name}": sum(row[name] for row in parts) / len(parts) for name in parts[0]}
        references = [item.facts["references"] for item in items]
        found |= {f"lexical/{name}": LEXICAL[name](texts, references) for name in self.lexical}
        return found | self.naturalness(texts, perplexity)

    @staticmethod
    def naturalness(completions: Sequence[str], perplexity: float | None = None) -> dict[str, float]:
        """`diversity/…` of the answers, and `fluency/perplexity` where the caller has measured it (RL4LMs: the policy's perplexity on the
        references, so that a policy which has forgotten how people write is seen)."""
        found = {f"diversity/{name}": value for name, value in diversity(completions).items()}
        return found if perplexity is None else found | {"fluency/perplexity": perplexity}


class DrawnTask(GrueTask):
    """A task whose problems are drawn from a grammar, without end: it gives `_draw` and `_flawed`.

    `flaws` is the share of demonstrations whose answer is not what was asked for, so that a model of them still has something to learn.
    """

    flaws = 0.4

    @abstractmethod
    def _draw(self, rng: random.Random) -> tuple[str, Item]:
        """A problem of any split, and the key by which it is split."""

    @abstractmethod
    def _flawed(self, rng: random.Random, item: Item) -> str:
        """An answer with a fault of the kind that learners make; begins with one space."""

    def items(self, split: Split, n: int | None = None, seed: int = 0) -> list[Item]:
        """`n` problems of a split; the first k do not depend on `n`. Prompts differ until (nearly) no new one is left.

        Raises `UsageError` when `n` is missing (the split has no end) or negative, or the split is unknown.
        """
        check_split(split, n)
        rng, seen, items = self._generator(split, n, seed), set[str](), list[Item]()
        while len(items) < (n or 0):
            item = self._of(split, rng)
            for _ in range(_TRIES):
                if item.prompt not in seen:
                    break
                item = self._of(split, rng)
            seen.add(item.prompt)
            items.append(item)
        return items

    def demonstrations(self, n: int, seed: int) -> Iterator[tuple[str, str]]:
        """`n` prompts of the training split, each with an answer; the share `flaws` of the answers is flawed."""
        rng = self._generator("corpus", n, seed)
        for _ in range(n):
            item = self._of("train", rng)
            yield item.prompt, self._flawed(rng, item) if rng.random() < self.flaws else item.reference

    def _of(self, split: Split, rng: random.Random) -> Item:
        while True:
            key, item = self._draw(rng)
            if split_of(key) == split:
                return item

    def _generator(self, purpose: str, n: int | None, seed: int) -> random.Random:
        if n is None:
            raise UsageError(f"{self.name} makes problems without end; say how many (n)")
        check_split("train", n)
        return random.Random(f"{self.name}/{purpose}/{seed}")
