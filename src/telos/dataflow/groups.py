"""Groups of workers behind one face, and the inline backend that runs them in this process, one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from telos.core.errors import UsageError
from telos.data.batches import concatenate
from telos.dataflow.roles import Role, Transfer

R = TypeVar("R", bound=Role)


def row_count(value: Any) -> int | None:
    """The number of rows of something that can be split (tensor, tensor class, list), None for what is handed whole."""
    if isinstance(value, Tensor) and value.ndim > 0:
        return value.shape[0]
    if shape := getattr(value, "batch_size", ()):
        return int(shape[0])
    return len(value) if isinstance(value, list) else None


def split_rows(values: Sequence[Any], parts: int) -> list[list[Any]]:
    """Cuts all splittable values into the same contiguous row ranges, `parts` of them or as many as there are rows (at least one); the rest is
    repeated. Raises `ValueError` when rows disagree."""
    counts = {count for value in values if (count := row_count(value)) is not None}
    if len(counts) != 1:
        raise ValueError(f"arguments to be split by rows have {sorted(counts)} rows")
    rows = counts.pop()
    parts = max(1, min(parts, rows))  # a worker without rows is not called
    edges = [round(i * rows / parts) for i in range(parts + 1)]
    return [[value if row_count(value) is None else value[a:b] for value in values] for a, b in itertools.pairwise(edges)]


def join_rows(results: Sequence[Any]) -> Any:
    """Joins per-worker results row-wise: tensors, tensor classes, lists, and tuples or mappings of them."""
    first = results[0]
    if len(results) == 1 or first is None:
        return first
    if isinstance(first, dict):
        return {name: join_rows([result[name] for result in results]) for name in first}
    if isinstance(first, tuple):
        joined = [join_rows(list(parts)) for parts in zip(*results, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    if isinstance(first, list):
        return [item for result in results for item in result]
    if hasattr(first, "ragged"):
        return concatenate(list(results))
    return torch.cat(list(results), 0)


def add_up(results: Sequence[Any]) -> Any:
    first = results[0]
    if isinstance(first, dict):
        return {name: add_up([result[name] for result in results]) for name in first}
    if isinstance(first, tuple):
        return tuple(add_up(list(parts)) for parts in zip(*results, strict=True))
    return sum(results[1:], first)


class Group(Generic[R]):
    """Several workers of one role; `group.call("method", …)` splits, calls and collects as the method declares."""

    def __init__(self, workers: Sequence[R]) -> None:
        self.workers = tuple(workers)

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Calls a method of the role. Positional arguments are split as declared; keywords go to every worker. Raises `TypeError` for a method that
        declares no transfer."""
        method: Callable[..., Any] = getattr(self.workers[0], name)
        declared: Transfer | None = getattr(method, "transfer", None)
        if declared is None:
            raise TypeError(f"{type(self.workers[0]).__name__}.{name} does not declare how it is split and collected")
        if declared.sum_gradients and len(self.workers) > 1:
            self._sum_gradients()
        if declared.split == "rows" and len(self.workers) > 1:
            parts = split_rows(arguments, len(self.workers))
        else:
            parts = [list(arguments)] * len(self.workers)
        results = [getattr(worker, name)(*part, **options) for worker, part in zip(self.workers, parts)]
        if declared.collect == "rows":
            return join_rows(results)
        if declared.collect == "sum":
            return add_up(results)
        return results[0] if declared.collect == "first" else None

    def _sum_gradients(self) -> None:
        for replicas in zip(*(worker.parameters_to_reduce() for worker in self.workers), strict=True):
            gradients = [replica.grad for replica in replicas if replica.grad is not None]
            if gradients:
                total = add_up(gradients)
                for replica in replicas:
                    replica.grad = total.clone()


class Backend(Protocol):
    """Where roles live."""

    def place(self, role: Callable[[], R], workers: int = 1) -> Group[R]:
        """Builds `workers` replicas of a role; `role` is called once per worker."""
        ...


class Inline:
    """Everything in this process: no copies, no processes, breakpoints work."""

    def place(self, role: Callable[[], R], workers: int = 1) -> Group[R]:
        return Group([role() for _ in range(workers)])


def make_backend(name: str) -> Backend:
    """The backend called `name`. Raises `UsageError` for one that does not exist."""
    if name != "inline":
        raise UsageError(f"--backend {name}: only 'inline' exists in this version")
    return Inline()
