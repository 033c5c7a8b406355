"""Seeds: three disjoint ranges, and streams that know nothing of each other."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from telos.core.errors import UsageError
from telos.core.seeds import derive, numpy_generator, seed_everything, seed_in, torch_generator

indices = st.integers(0, 10**9 - 1)
spaces = st.sampled_from(["training", "tuning", "reporting"])


@given(spaces, indices, spaces, indices)
def test_two_seeds_are_equal_only_in_the_same_space_at_the_same_index(one: str, i: int, other: str, j: int) -> None:
    same = one == other and i == j
    assert (seed_in(one, i) == seed_in(other, j)) == same  # type: ignore[arg-type]


def test_a_users_seed_is_the_training_seed_of_that_number() -> None:
    assert seed_in("training", 17) == 17


@pytest.mark.parametrize("index", [-1, 10**9])
def test_an_index_outside_the_range_is_refused(index: int) -> None:
    with pytest.raises(UsageError, match=str(index)):
        seed_in("tuning", index)


@given(st.integers(0, 2**63), st.lists(st.text(max_size=5) | st.integers(), max_size=4))
def test_derived_seeds_fit_every_generator(seed: int, labels: list[str | int]) -> None:
    found = derive(seed, *labels)
    assert 0 <= found < 2**63
    assert found == derive(seed, *labels)


def test_no_two_labels_share_a_stream() -> None:
    labels: list[tuple[str | int, ...]] = [
        ("a", "b"),
        ("a,b",),
        ("ab",),
        ("a", "b", ""),
        (1,),
        ("1",),
        (),
        ("a", 1),
        ("a", "1"),
        ("a", 11),
        ("a1", 1),
    ]
    assert len({derive(0, *label) for label in labels}) == len(labels)
    assert derive(0, 1) != derive(1, 0)
    assert derive(1, 1) != derive(11)


def test_neighbouring_steps_and_seeds_are_uncorrelated_and_uniform() -> None:
    steps = np.array([numpy_generator(0, "noise", step).random() for step in range(2000)])
    seeds = np.array([numpy_generator(seed, "noise", 0).random() for seed in range(2000)])
    for draws in (steps, seeds):
        assert stats.kstest(draws, "uniform").pvalue > 1e-3
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / 2000**0.5
    assert abs(np.corrcoef(steps, seeds)[0, 1]) < 4 / 2000**0.5


def test_values_are_the_same_on_every_machine() -> None:
    """Fixed by the definition (first 8 bytes of SHA-256 of the text of the tuple, little-endian, without the lowest bit)."""
    import hashlib

    digest = hashlib.sha256(b"(3, 'rows', 1)").digest()
    assert derive(3, "rows", 1) == sum(byte << (8 * i) for i, byte in enumerate(digest[:8])) >> 1


def test_generators_repeat_and_touch_no_global_state() -> None:
    seed_everything(5)
    before = (random.random(), np.random.random(), float(torch.rand(())))
    seed_everything(5)
    one = (numpy_generator(1, "x").random(), float(torch.rand((), generator=torch_generator(1, "x"))))
    assert (random.random(), np.random.random(), float(torch.rand(()))) == before
    assert one == (numpy_generator(1, "x").random(), float(torch.rand((), generator=torch_generator(1, "x"))))
    seed_everything(6)
    assert (random.random(), np.random.random(), float(torch.rand(()))) != before
