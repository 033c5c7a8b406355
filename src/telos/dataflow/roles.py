"""What a role is: a class whose public methods say how their arguments travel to workers and their results back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Split = Literal["rows", "broadcast"]
Collect = Literal["rows", "sum", "first", "none"]
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Transfer:
    """`split`: batches (anything with rows) are cut into contiguous parts, one a worker, or handed whole to each. `collect`: results are joined
    row-wise, added up, taken from the first worker, or dropped. `sum_gradients`: before the call, the gradients of all workers' replicas are added
    up, so that each applies the same update."""

    split: Split
    collect: Collect
    sum_gradients: bool = False


def transfer(split: Split, collect: Collect, *, sum_gradients: bool = False) -> Callable[[F], F]:
    """Declares how a role's method is distributed. It only marks the function; nothing is registered or wrapped."""

    def mark(function: F) -> F:
        function.transfer = Transfer(split, collect, sum_gradients)  # type: ignore[attr-defined]
        return function

    return mark


class Role:
    """Base of actors, critics, references and rewards. A role that learns yields its trained parameters in `parameters_to_reduce`."""

    def parameters_to_reduce(self) -> list[Any]:
        return []
