"""Groups split, call and collect as the role declares, whatever the number of workers."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from data_fixtures import tiny_tokenizer
from telos.core.errors import UsageError
from telos.data.formats import read_examples
from telos.data.readers import read_rows
from telos.data.tokenize import tokenize
from telos.dataflow import Group, Inline, Role, make_backend, transfer
from telos.dataflow.groups import split_rows


class Found(NamedTuple):
    total: Tensor
    names: list[str]


class Adder(Role):
    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(3))
        self.calls: list[int] = []

    def parameters_to_reduce(self) -> list[Any]:
        return [self.weight]

    @transfer(split="rows", collect="rows")
    def double(self, x: Tensor, *, times: int = 2) -> Tensor:
        self.calls.append(len(x))
        return x * times

    @transfer(split="rows", collect="rows")
    def many(self, x: Tensor, names: list[str]) -> dict[str, Any]:
        return {"found": Found(x + 1, [name.upper() for name in names]), "pair": (x, names)}

    @transfer(split="rows", collect="rows")
    def echo(self, batch: Any) -> Any:
        return batch

    @transfer(split="rows", collect="sum")
    def learn(self, x: Tensor) -> dict[str, Any]:
        loss = (self.weight * x).sum()
        loss.backward()
        return {"loss": loss.item(), "metrics": {"mean": (float(x.sum()), float(len(x)))}}

    @transfer(split="broadcast", collect="first", sum_gradients=True)
    def apply(self) -> Tensor:
        assert self.weight.grad is not None
        return self.weight.grad.clone()

    @transfer(split="broadcast", collect="none")
    def forget(self) -> int:
        return 1

    def undeclared(self) -> None: ...


@pytest.mark.parametrize("workers", [1, 2, 3, 5, 9])
def test_rows_come_back_in_their_order(workers: int) -> None:
    group = Inline().place(Adder, workers)
    x = torch.arange(7.0)
    assert torch.equal(group.call("double", x), 2 * x)
    assert torch.equal(group.call("double", x, times=3), 3 * x)
    found = group.call("many", x, [f"n{i}" for i in range(7)])
    assert isinstance(found["found"], Found)
    assert torch.equal(found["found"].total, x + 1)
    assert found["found"].names == [f"N{i}" for i in range(7)]
    assert torch.equal(found["pair"][0], x)
    assert all(n > 0 for worker in group.workers for n in worker.calls), "a worker without rows is not called"


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_gradients_and_totals_add_up_to_those_of_one_worker(workers: int) -> None:
    group = Inline().place(Adder, workers)
    x = torch.arange(21.0).view(7, 3)
    found = group.call("learn", x)
    assert found["loss"] == pytest.approx(float(x.sum()))
    assert found["metrics"]["mean"] == (float(x.sum()), 7.0)
    assert torch.equal(group.call("apply"), x.sum(0))
    gradients = [worker.weight.grad for worker in group.workers]
    assert all(torch.equal(gradient, x.sum(0)) for gradient in gradients), "every replica applies the same"
    assert len({gradient.data_ptr() for gradient in gradients}) == workers, "each has its own"
    assert group.call("forget") is None


def test_typed_batches_are_split_and_joined_again() -> None:
    rows = [{"prompt": "a" * (i + 1), "chosen": "b" * (5 - i), "rejected": "c"} for i in range(5)]
    batch = tokenize(read_examples(read_rows(rows), ("preference",)), tiny_tokenizer()).batch(range(5))
    joined = Inline().place(Adder, 2).call("echo", batch)
    assert type(joined) is type(batch)
    assert all(torch.equal(getattr(joined, name), getattr(batch, name)) for name in ("prompt_ids", "chosen_ids", "chosen_length", "row"))


def test_an_undeclared_method_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Adder\.undeclared does not declare"):
        Inline().place(Adder).call("undeclared")


@given(st.integers(0, 20), st.integers(1, 8))
def test_parts_are_contiguous_even_and_complete(rows: int, parts: int) -> None:
    found = [part[0].tolist() for part in split_rows([torch.arange(rows), {"handed": "whole"}], parts)]
    assert [row for part in found for row in part] == list(range(rows))
    assert len(found) == max(1, min(rows, parts))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_arguments_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] rows"):
        split_rows([torch.zeros(2), torch.zeros(3)], 2)


def test_only_the_backend_that_exists_is_accepted() -> None:
    assert isinstance(make_backend("inline").place(Adder), Group)
    with pytest.raises(UsageError, match="--backend ray"):
        make_backend("ray")
