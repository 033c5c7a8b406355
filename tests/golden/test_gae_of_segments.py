"""Generalised advantage estimation over segments is, in every episode, the sum that defines it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from telos.functional.returns import gae_of_segments
from telos.functional.segments import Segment, explained_variance, flat, standardised


def by_definition(
    rewards: np.ndarray, values: np.ndarray, following: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, gamma: float, lam: float
) -> np.ndarray:
    """A_t = Σ_k (γ λ)^k δ_{t+k} of one environment, each sum written out and stopped at the end of its episode or of the data.

    `following` [T] is the critic's value of the state that each step led to, whatever happened there.
    """
    steps = len(rewards)
    found = np.zeros(steps)
    for t in range(steps):
        for k in range(steps - t):
            after = 0.0 if terminated[t + k] else following[t + k]
            delta = rewards[t + k] + gamma * after - values[t + k]
            found[t] += (gamma * lam) ** k * delta
            if terminated[t + k] or truncated[t + k]:
                break
    return found


def experience(steps: int, copies: int, seed: int) -> dict[str, np.ndarray]:
    """Rewards, values and the values of where each step led: of the next row's state where the episode goes on."""
    draws = np.random.default_rng(seed)
    rewards, values = draws.normal(size=(2, steps, copies))
    following = draws.normal(size=(steps, copies))
    return {"rewards": rewards, "values": values, "following": following}


def joined(data: dict[str, np.ndarray], terminated: np.ndarray, truncated: np.ndarray) -> dict[str, np.ndarray]:
    """With the value after a step that of the next row, unless the episode ended."""
    over = terminated | truncated
    following = data["following"].copy()
    following[:-1] = np.where(over[:-1], following[:-1], data["values"][1:])
    return data | {"following": following}


def ours(
    data: dict[str, np.ndarray], terminated: np.ndarray, truncated: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    next_values = np.where(terminated, 0.0, data["following"])
    tensors = [torch.from_numpy(x) for x in (data["rewards"], data["values"], next_values, terminated | truncated)]
    advantages, returns = gae_of_segments(*tensors, gamma=gamma, gae_lambda=lam)
    return advantages.numpy(), returns.numpy()


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (0.9, 1.0), (1.0, 0.7), (0.0, 0.5)])
def test_ends_of_either_kind_at_every_place_give_the_sums_of_the_definition(gamma: float, lam: float) -> None:
    """All 3^5 ways in which five steps may go on, terminate or be cut, side by side as copies."""
    kinds = np.array(list(itertools.product(range(3), repeat=5))).T
    terminated, truncated = kinds == 1, kinds == 2
    data = joined(experience(5, kinds.shape[1], 0), terminated, truncated)
    advantages, returns = ours(data, terminated, truncated, gamma, lam)
    for i in range(kinds.shape[1]):
        column = (data["rewards"][:, i], data["values"][:, i], data["following"][:, i], terminated[:, i], truncated[:, i])
        np.testing.assert_allclose(advantages[:, i], by_definition(*column, gamma, lam), atol=1e-12)
    np.testing.assert_allclose(returns, advantages + data["values"], atol=1e-12)


def test_two_episodes_by_hand() -> None:
    """γ = 0.5, λ = 0.5. The first episode terminates at its second step, the second goes on at the edge of the segment."""
    rewards, values = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [20.0], [30.0]])
    next_values, ended = torch.tensor([[20.0], [0.0], [40.0]]), torch.tensor([[False], [True], [False]])
    advantages, returns = gae_of_segments(rewards, values, next_values, ended, gamma=0.5, gae_lambda=0.5)
    # δ = (1 + 10 − 10, 2 + 0 − 20, 3 + 20 − 30) = (1, −18, −7)
    assert advantages[:, 0].tolist() == [1 - 0.25 * 18, -18.0, -7.0]
    assert returns[:, 0].tolist() == [6.5, 2.0, 23.0]


def test_with_lambda_one_returns_are_discounted_rewards_and_the_value_at_the_cut() -> None:
    terminated = np.array([[0, 0], [0, 1], [0, 0], [0, 0]], dtype=bool)
    truncated = np.array([[0, 0], [0, 0], [1, 0], [0, 0]], dtype=bool)
    data = joined(experience(4, 2, 1), terminated, truncated)
    _, returns = ours(data, terminated, truncated, 0.9, 1.0)
    r, v = data["rewards"], data["following"]
    cut = r[0, 0] + 0.9 * r[1, 0] + 0.81 * r[2, 0] + 0.729 * v[2, 0]
    over = r[0, 1] + 0.9 * r[1, 1]
    edge = r[2, 1] + 0.9 * r[3, 1] + 0.81 * v[3, 1]
    np.testing.assert_allclose([returns[0, 0], returns[0, 1], returns[2, 1]], [cut, over, edge], atol=1e-12)


def test_with_lambda_zero_advantages_are_errors_of_one_step() -> None:
    terminated = np.random.default_rng(2).random((6, 3)) < 0.3
    truncated = (np.random.default_rng(3).random((6, 3)) < 0.3) & ~terminated
    data = joined(experience(6, 3, 2), terminated, truncated)
    advantages, _ = ours(data, terminated, truncated, 0.9, 0.0)
    np.testing.assert_allclose(advantages, data["rewards"] + 0.9 * np.where(terminated, 0, data["following"]) - data["values"], atol=1e-12)


def test_what_happens_after_an_end_changes_nothing_before_it() -> None:
    ended = torch.tensor([[False], [True], [False], [False]])
    rewards, values, next_values = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(0)).unbind(0)
    first, _ = gae_of_segments(rewards, values, next_values, ended, gamma=0.9, gae_lambda=0.9)
    rewards, values, next_values = rewards.clone(), values.clone(), next_values.clone()
    for tensor in (rewards, values, next_values):
        tensor[2:] += 7
    second, _ = gae_of_segments(rewards, values, next_values, ended, gamma=0.9, gae_lambda=0.9)
    assert torch.equal(first[:2], second[:2])
    assert not torch.equal(first[2:], second[2:])


def test_exact_values_have_no_advantage_on_average() -> None:
    """A chain of certain rewards 1, 2, 3 with γ = 0.5: V = (1 + 1 + 0.75, 2 + 1.5, 3). Every error is 0 for every λ."""
    values = torch.tensor([[2.75], [3.5], [3.0]])
    for lam in (0.0, 0.4, 1.0):
        advantages, returns = gae_of_segments(
            torch.tensor([[1.0], [2.0], [3.0]]),
            values,
            torch.tensor([[3.5], [3.0], [0.0]]),
            torch.tensor([[False], [False], [True]]),
            gamma=0.5,
            gae_lambda=lam,
        )
        assert advantages.abs().max() == 0
        assert torch.equal(returns, values)


def test_a_segment_ends_where_it_terminates_or_is_cut() -> None:
    terminated, truncated = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    empty = torch.zeros(1, 3)
    segment = Segment(empty, empty, empty, empty, empty, empty, terminated, truncated)
    assert segment.ended.tolist() == [[True, True, False]]


def test_flat_keeps_time_first() -> None:
    values = torch.arange(24).view(2, 3, 4)
    assert flat(values).tolist() == [values[t, n].tolist() for t in range(2) for n in range(3)]


def test_standardised_advantages_are_those_of_numpy() -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, -3.0]])
    array = values.numpy().astype(np.float64)
    np.testing.assert_allclose(standardised(values).numpy(), (array - array.mean()) / (array.std(ddof=1) + 1e-8), atol=1e-6)
    assert torch.equal(standardised(torch.tensor([[5.0]])), torch.tensor([[5.0]]))
    assert torch.equal(standardised(torch.full((4,), 2.0)), torch.zeros(4))


def test_explained_variance_by_hand() -> None:
    """Residuals (0, 1, −1) have the variance 2/3, returns (1, 3, 2) the same: nothing is explained; half of each residual leaves a quarter."""
    returns = torch.tensor([1.0, 3.0, 2.0])
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0]), returns) == pytest.approx(0.0, abs=1e-6)
    assert explained_variance(torch.tensor([1.0, 2.5, 2.5]), returns) == pytest.approx(0.75, abs=1e-6)
    assert explained_variance(returns + 5, returns) == pytest.approx(1.0, abs=1e-6)
    assert explained_variance(returns, torch.full((3,), 2.0)) == 0.0
