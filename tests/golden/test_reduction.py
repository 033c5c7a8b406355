"""The reducer against sums written out: parts of a batch add up to the whole, masked entries count for nothing, metrics are divided once.

The independent side is numpy in float64, with the gradient of a small non-linear model in closed form.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from telos.functional.reduction import Denominators, Losses, MetricSums, masked_mean, masked_sum, means, total, whiten

WIDTH = 3
RUBBISH = [math.nan, math.inf, -math.inf, 1e30]


def inputs(lengths: list[int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [B, T, d], mask [B, T] with `lengths` true entries a row, w [d]."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(*lengths, 1)) < np.array(lengths)[:, None]
    return rng.normal(size=(*mask.shape, WIDTH)), mask, rng.normal(size=WIDTH)


def model_losses(w: Tensor, x: Tensor, mask: Tensor) -> Losses:
    """Per token tanh(w·x)²; beside it, half of it again as a term of its own; per example the square of w·(first token)."""
    tokens = torch.tanh(x @ w) ** 2
    metrics = {"tokens": (tokens, mask), "examples": x[:, 0] @ w}
    return Losses(tokens, mask, metrics, extra=(Losses((x[:, 0] @ w) ** 2), Losses(0.5 * tokens, mask)))


def gradient_by_hand(w: np.ndarray, x: np.ndarray, mask: np.ndarray, examples: int, tokens: int) -> np.ndarray:
    """d/dw of Σ_mask 1.5 tanh(w·x)² / tokens + Σ_rows (w·x₀)² / examples, with d tanh² = 2 tanh (1 − tanh²)."""
    t = np.tanh(x @ w)
    per_token = np.where(mask, 1.5 * 2 * t * (1 - t**2), 0.0)
    return np.einsum("bt,btd->d", per_token, x) / tokens + 2 * (x[:, 0] @ w) @ x[:, 0] / examples


def pieces(lengths: list[int], part_of: list[int]) -> list[np.ndarray]:
    """Row numbers of each part, of any sizes and in any order of rows."""
    assigned = np.resize(np.array(part_of), len(lengths))
    return [np.flatnonzero(assigned == part) for part in np.unique(assigned)]


LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(lambda found: sum(found) > 0)
PARTS = st.lists(st.integers(0, 4), min_size=1, max_size=8)


# Losses ----------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, part_of=PARTS, seed=st.integers(0, 1000))
def test_any_split_of_a_batch_gives_the_gradient_of_the_whole(lengths: list[int], part_of: list[int], seed: int) -> None:
    x, mask, w = inputs(lengths, seed)
    counts = Denominators(len(lengths), sum(lengths))
    weight = torch.from_numpy(w).requires_grad_()
    value = 0.0
    for rows in pieces(lengths, part_of):
        part = total(model_losses(weight, torch.from_numpy(x[rows]), torch.from_numpy(mask[rows])), counts)
        part.backward()
        value += part.item()
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.numpy(), gradient_by_hand(w, x, mask, counts.examples, counts.tokens), rtol=1e-9, atol=1e-12)
    tokens = np.tanh(x @ w) ** 2
    assert value == pytest.approx(1.5 * tokens[mask].sum() / sum(lengths) + ((x[:, 0] @ w) ** 2).mean(), rel=1e-9)


def test_a_mean_of_means_is_another_number() -> None:
    """Tokens 6, 0, 0 of one row and 4 of another: the mean is 10 / 4 and the parts are 6 / 4 and 4 / 4; the mean of the rows' means would be 3."""
    values, mask = torch.tensor([[6.0, 0.0, 0.0], [4.0, 9.0, 9.0]]), torch.tensor([[True, True, True], [True, False, False]])
    counts = Denominators(2, 4)
    assert total(Losses(values, mask), counts).item() == 2.5
    assert [total(Losses(values[i : i + 1], mask[i : i + 1]), counts).item() for i in (0, 1)] == [1.5, 1.0]


def test_examples_and_tokens_have_denominators_of_their_own() -> None:
    counts = Denominators(examples=4, tokens=10)
    tokens, mask = torch.tensor([[1.0, 2.0], [3.0, 100.0]]), torch.tensor([[True, True], [True, False]])
    examples = torch.tensor([8.0, -2.0])
    assert total(Losses(tokens, mask), counts).item() == pytest.approx(6 / 10)
    assert total(Losses(examples), counts).item() == pytest.approx(6 / 4)
    nested = Losses(tokens, mask, extra=(Losses(examples, extra=(Losses(examples, torch.tensor([True, False])),)),))
    assert total(nested, counts).item() == pytest.approx(6 / 10 + 6 / 4 + 8 / 4)


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_masked_entries_may_hold_anything_and_get_gradient_zero(rubbish: float) -> None:
    values = torch.tensor([[1.0, rubbish, 3.0], [rubbish, rubbish, rubbish]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])  # 0 and 1 serve as well as booleans
    loss = total(Losses(values, mask), Denominators(2, 2))
    assert loss.item() == 2.0
    loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_an_unmasked_bad_value_is_not_hidden(rubbish: float) -> None:
    loss = total(Losses(torch.tensor([[1.0, rubbish]]), torch.tensor([[True, True]])), Denominators(1, 2))
    assert not math.isfinite(loss.item())


def test_a_part_without_own_tokens_adds_nothing() -> None:
    values = torch.tensor([[5.0, 7.0]], requires_grad=True)
    loss = total(Losses(values, torch.zeros(1, 2, dtype=torch.bool)), Denominators(3, 9))
    loss.backward()
    assert loss.item() == 0.0
    assert values.grad is not None
    assert values.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("shape", [(1, 3), (3,), (2, 1)])
def test_a_mask_that_would_only_fit_by_broadcasting_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="does not fit values"):
        masked_sum(torch.ones(2, 3), torch.ones(shape, dtype=torch.bool))


# Means -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_masked_means_by_hand(rubbish: float) -> None:
    values = torch.tensor([[1.0, 2.0, rubbish], [6.0, rubbish, rubbish], [rubbish] * 3], requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    assert masked_mean(values, mask).item() == 3.0
    rows = masked_mean(values, mask, 1)
    assert rows.tolist() == [1.5, 6.0, 0.0], "a row without entries has mean 0, not NaN"
    assert masked_mean(values, mask, 0).tolist() == [3.5, 2.0, 0.0]
    rows.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0] * 3]


# Metrics ---------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, part_of=PARTS, seed=st.integers(0, 1000))
def test_metrics_of_any_split_are_those_of_the_whole(lengths: list[int], part_of: list[int], seed: int) -> None:
    x, mask, w = inputs(lengths, seed)
    sums = MetricSums()
    for rows in pieces(lengths, part_of):
        part = model_losses(torch.from_numpy(w).requires_grad_(), torch.from_numpy(x[rows]), torch.from_numpy(mask[rows]))
        sums.add(part.metrics)
    found = sums.totals()
    assert (found["tokens"][1], found["examples"][1]) == (sum(lengths), len(lengths))
    wanted = {"tokens": (np.tanh(x @ w) ** 2)[mask].mean(), "examples": (x[:, 0] @ w).mean()}
    assert means(found) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_a_metric_that_was_never_counted_is_left_out_and_one_that_came_late_is_not_diluted() -> None:
    sums = MetricSums()
    nothing = torch.zeros(2, dtype=torch.bool)
    sums.add({"absent": (torch.tensor([math.nan, 1.0]), nothing), "late": (torch.ones(2), nothing)})
    sums.add({"late": (torch.tensor([4.0, 9.0]), torch.tensor([True, False]))})
    assert sums.totals() == {"absent": (0.0, 0.0), "late": (4.0, 1.0)}
    assert means(sums.totals()) == {"late": 4.0}


def test_metrics_add_up_beyond_the_precision_of_float32() -> None:
    """2²⁴ + 1 is no float32; a sum of that kind kept in float32 would lose every single one."""
    sums = MetricSums()
    sums.add({"tokens": torch.tensor([2.0**24, 1.0, 1.0, 1.0])})
    sums.add({"tokens": torch.tensor([1.0])})
    assert sums.totals()["tokens"] == (2.0**24 + 4, 5.0)


# Whitening -------------------------------------------------------------------------------------------------------------------------------


def whitened(values: Any, mask: Any, **options: Any) -> np.ndarray:
    return whiten(torch.tensor(values, dtype=torch.float64), torch.tensor(mask, dtype=torch.bool), **options).numpy()


def test_whitening_by_hand() -> None:
    """1, 3, 8 have mean 4 and population variance (9 + 1 + 16) / 3 = 26 / 3."""
    wanted = np.array([[-3.0, -1.0, 0.0], [4.0, 0.0, 0.0]]) / math.sqrt(26 / 3)
    mask = [[1, 1, 0], [1, 0, 0]]
    np.testing.assert_allclose(whitened([[1.0, 3.0, 50.0], [8.0, -50.0, 0.0]], mask), wanted, rtol=1e-8)
    shifted = whitened([[1.0, 3.0, 50.0], [8.0, -50.0, 0.0]], mask, shift_mean=False)
    np.testing.assert_allclose(shifted, np.where(np.array(mask, dtype=bool), wanted + 4.0, 0.0), rtol=1e-8)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seed=st.integers(0, 1000), scale=st.sampled_from([1.0, 30.0, 1e4]), shift=st.sampled_from([0.0, -7.0, 1e3]))
def test_whitened_values_have_mean_zero_and_deviation_one(lengths: list[int], seed: int, scale: float, shift: float) -> None:
    x, mask, _ = inputs(lengths, seed)
    values = x[..., 0] * scale + shift
    found = whitened(values, mask)
    own = values[mask]
    np.testing.assert_allclose(found[mask], (own - own.mean()) / np.sqrt(own.var() + 1e-8), rtol=1e-6, atol=1e-8)
    assert (found[~mask] == 0).all()
    if own.std() > 0.1:  # far above the square root of epsilon
        assert found[mask].mean() == pytest.approx(0.0, abs=1e-8)
        assert found[mask].std() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_rubbish_behind_the_mask_changes_no_whitened_value(rubbish: float) -> None:
    mask = [[1, 1, 0], [1, 0, 0]]
    found = [whitened([[1.0, 3.0, fill], [8.0, fill, fill]], mask).tolist() for fill in (0.0, rubbish)]
    assert found[0] == found[1]


def test_values_without_spread_become_zero_and_not_nan() -> None:
    assert whitened([[3.0, 3.0], [3.0, 9.0]], [[1, 1], [1, 0]]).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert whitened([[3.0, 9.0]], [[1, 0]]).tolist() == [[0.0, 0.0]], "a single value"
    assert whitened([[3.0, 9.0]], [[0, 0]]).tolist() == [[0.0, 0.0]], "no value at all"


def test_the_held_out_loss_does_not_depend_on_the_batch_size(world, tmp_path) -> None:
    from telos.algorithms.run import train

    found = []
    for size in (1, 5, 12):
        options = world.options("supervised", steps=1, learning_rate=0.0, batch_size=size)
        run = train("sft", options | {"eval_data": options["data"], "out": str(tmp_path / str(size))})
        last = run.metrics()[-1]
        assert last["eval/loss"] == pytest.approx(-last["eval/logps/token"], rel=1e-5)
        found.append(last["eval/loss"])
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-5)
