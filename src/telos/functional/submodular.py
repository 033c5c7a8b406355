"""Monotone submodular functions of sets of n items, and greedy choice.

F is monotone where no item lowers it, and submodular where an item adds the less the more is there: F(A + i) − F(A) >= F(B + i) − F(B) for A ⊆ B. The greedy
set of k items then has at least 1 − 1/e of the value of the best one (Nemhauser, Wolsey and Fisher 1978). F(∅) = 0. Two forms cover many:

- `Facility`: Σ_j max_{i in S} s_ij. With s_ij = w_j where i covers place j and 0 elsewhere it is weighted coverage; with similarities, facility location.
- `LogDet`: scale · log det(I + K_SS / noise). With scale 1/2 it is the mutual information between a Gaussian process and its values at S, seen through noise
  (nats); with K = Φ Φᵀ the D-optimal criterion log det(I + Φ_Sᵀ Φ_S / noise).

Each grows sets in many copies at once: `empty(copies)` makes their memory, `add(memory, rows, items)` puts one item into each copy of `rows` and returns what
it adds. An item that is in the set already adds nothing: these are functions of sets, also where an item could be looked at twice.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

Memory = dict[str, np.ndarray]


class SetFunction(ABC):
    """A function of sets of `size` items."""

    size: int

    @abstractmethod
    def value(self, items: Sequence[int] | np.ndarray) -> float:
        """F of the set of these items (numbers below `size`; repeated ones count once)."""

    @abstractmethod
    def empty(self, copies: int) -> Memory:
        """What is remembered of `copies` empty sets: arrays whose first dimension is the copy."""

    @abstractmethod
    def gains(self, memory: Memory, rows: np.ndarray) -> np.ndarray:
        """[len(rows), size]: what each item would add to the sets of copies `rows`."""

    @abstractmethod
    def add(self, memory: Memory, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Puts item items[k] into the set of copy rows[k], in place; rows are distinct. Returns what each added, [len(rows)]."""


class Facility(SetFunction):
    """Σ_j max_{i in S} s_ij for similarities s [n, m] >= 0. Raises `ValueError` for negative ones."""

    def __init__(self, similarity: np.ndarray) -> None:
        self.similarity = np.asarray(similarity, dtype=np.float64)
        if self.similarity.ndim != 2 or not (self.similarity >= 0).all():
            raise ValueError("similarities [n, m] must not be negative")
        self.size = len(self.similarity)

    def value(self, items: Sequence[int] | np.ndarray) -> float:
        return float(self.similarity[list(items)].max(0, initial=0.0).sum())

    def empty(self, copies: int) -> Memory:
        return {"best": np.zeros((copies, self.similarity.shape[1]))}

    def gains(self, memory: Memory, rows: np.ndarray) -> np.ndarray:
        return np.maximum(self.similarity - memory["best"][rows][:, None], 0.0).sum(-1)

    def add(self, memory: Memory, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        before = memory["best"][rows]
        after = np.maximum(before, self.similarity[items])
        memory["best"][rows] = after
        return (after - before).sum(-1)


class LogDet(SetFunction):
    """scale · log det(I + K_SS / noise) for a covariance K [n, n] and noise > 0. At most `largest` items are put into one copy's set.

    A set is grown by one row of a Cholesky factor of its kernel at a time, against all items: the variance that is left of each follows from it.
    """

    def __init__(self, kernel: np.ndarray, noise: float, *, scale: float = 1.0, largest: int | None = None) -> None:
        self.kernel = np.asarray(kernel, dtype=np.float64)
        if self.kernel.ndim != 2 or self.kernel.shape[0] != self.kernel.shape[1] or not noise > 0 or not scale > 0:
            raise ValueError("a kernel is square, noise and scale are positive")
        self.noise, self.scale, self.size = noise, scale, len(self.kernel)
        self.largest = self.size if largest is None else largest

    def value(self, items: Sequence[int] | np.ndarray) -> float:
        chosen = np.unique(np.asarray(items, dtype=np.int64))
        part = self.kernel[np.ix_(chosen, chosen)]
        return self.scale * float(np.linalg.slogdet(np.eye(len(chosen)) + part / self.noise)[1])

    def empty(self, copies: int) -> Memory:
        return {
            "factor": np.zeros((copies, self.largest, self.size)),
            "variance": np.tile(np.diag(self.kernel), (copies, 1)),
            "member": np.zeros((copies, self.size), dtype=bool),
            "count": np.zeros(copies, dtype=np.int64),
        }

    def gains(self, memory: Memory, rows: np.ndarray) -> np.ndarray:
        left = np.maximum(memory["variance"][rows], 0.0)
        return np.where(memory["member"][rows], 0.0, self.scale * np.log1p(left / self.noise))

    def add(self, memory: Memory, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        new = ~memory["member"][rows, items]
        gain, rows, items = np.zeros(len(rows)), rows[new], items[new]
        left = np.maximum(memory["variance"][rows, items], 0.0)
        gain[new] = self.scale * np.log1p(left / self.noise)
        deepest = int(memory["count"][rows].max(initial=0))
        factor = memory["factor"][rows, :deepest]
        here = factor[np.arange(len(rows)), :, items]
        row = (self.kernel[items] - np.einsum("rk,rkn->rn", here, factor)) / np.sqrt(left + self.noise)[:, None]
        memory["factor"][rows, memory["count"][rows]] = row
        memory["variance"][rows] -= row**2
        memory["member"][rows, items] = True
        memory["count"][rows] += 1
        return gain


def greedy(function: SetFunction, count: int) -> tuple[list[int], float]:
    """(items, value) of the set of `count` items to which each was added that adds most (the first of equal ones)."""
    memory, row, items, total = function.empty(1), np.zeros(1, dtype=np.int64), [], 0.0
    for _ in range(count):
        items.append(int(function.gains(memory, row)[0].argmax()))
        total += float(function.add(memory, row, np.array(items[-1:]))[0])
    return items, total


def best(function: SetFunction, count: int) -> tuple[tuple[int, ...], float]:
    """(items, value) of the best set of `count` items, by trying all of them."""
    found = max(itertools.combinations(range(function.size), count), key=function.value)
    return found, function.value(found)
