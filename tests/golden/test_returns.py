"""Returns and advantages against their definitions, above all where tokens of others stand between the policy's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from telos.functional.returns import at_last_action, discounted_returns, gae


def gae_by_definition(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float, bootstrap: float = 0.0) -> np.ndarray:
    """A_t = Σ_l (γλ)^l δ_{t+l}, δ_t = r_t + γ V_{t+1} − V_t (Schulman et al. 2016, eq. 16), each sum written out."""
    following = np.append(values[1:], bootstrap)
    deltas = rewards + gamma * following - values
    return np.array([sum((gamma * lam) ** k * deltas[t + k] for k in range(len(rewards) - t)) for t in range(len(rewards))])


def k_step(rewards: np.ndarray, values: np.ndarray, gamma: float, t: int, k: int) -> float:
    """The advantage from k rewards and the value after them."""
    end = min(t + k, len(rewards))
    tail = gamma ** (end - t) * values[end] if end < len(values) else 0.0
    return sum(gamma ** (i - t) * rewards[i] for i in range(t, end)) + tail - values[t]


def draw(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=n), rng.normal(size=n)


def row(x: np.ndarray) -> Tensor:
    return torch.tensor(x)[None]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.5, 0.0), (1.0, 1.0), (0.0, 0.5)])
@pytest.mark.parametrize("bootstrap", [0.0, 1.7])
def test_gae_is_the_papers_sum(gamma: float, lam: float, bootstrap: float) -> None:
    rewards, values = draw(0, 9)
    found, returns = gae(
        row(rewards),
        row(values),
        torch.ones(1, 9, dtype=torch.bool),
        gamma=gamma,
        gae_lambda=lam,
        bootstrap=torch.tensor([bootstrap], dtype=torch.float64),
    )
    wanted = gae_by_definition(rewards, values, gamma, lam, bootstrap)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(returns[0], wanted + values, rtol=1e-12, atol=1e-12)


def test_gae_is_the_geometric_average_of_the_k_step_advantages() -> None:
    rewards, values = draw(1, 6)
    gamma, lam = 0.9, 0.7
    found, _ = gae(row(rewards), row(values), torch.ones(1, 6, dtype=torch.bool), gamma=gamma, gae_lambda=lam)
    for t in range(6):
        left = 6 - t
        weights = [(1 - lam) * lam ** (k - 1) for k in range(1, left)] + [lam ** (left - 1)]
        wanted = sum(weight * k_step(rewards, values, gamma, t, k) for k, weight in enumerate(weights, 1))
        assert found[0, t].item() == pytest.approx(wanted, rel=1e-12)


def test_gae_by_hand() -> None:
    """Rewards 0, 0, 1; values ½, ½, ½; γ = 1, λ = ½: δ = 0, 0, ½, so A = ⅛, ¼, ½."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.full((1, 3), 0.5)
    found, returns = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, gae_lambda=0.5)
    assert found.tolist() == [[0.125, 0.25, 0.5]]
    assert returns.tolist() == [[0.625, 0.75, 1.0]]


def test_lambda_one_gives_returns_minus_values_and_lambda_zero_one_step_errors() -> None:
    rewards, values = draw(2, 8)
    mask = torch.ones(1, 8, dtype=torch.bool)
    one, _ = gae(row(rewards), row(values), mask, gamma=0.9, gae_lambda=1.0)
    returns = discounted_returns(row(rewards), mask, 0.9)
    np.testing.assert_allclose(one, returns - row(values), rtol=1e-12, atol=1e-12)
    wanted = [sum(0.9 ** (i - t) * rewards[i] for i in range(t, 8)) for t in range(8)]
    np.testing.assert_allclose(returns[0], wanted, rtol=1e-12)
    zero, _ = gae(row(rewards), row(values), mask, gamma=0.9, gae_lambda=0.0)
    np.testing.assert_allclose(zero[0], rewards + 0.9 * np.append(values[1:], 0) - values, rtol=1e-12, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=14),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    seed=st.integers(0, 2**20),
    bootstrap=st.floats(-3, 3),
)
def test_foreign_tokens_change_nothing(mask: list[bool], gamma: float, lam: float, seed: int, bootstrap: float) -> None:
    """A row with tokens of others anywhere equals the row of the policy's own tokens alone, wherever the gaps are and whatever is in them."""
    own = np.array(mask)
    rewards, values = draw(seed, len(mask))
    rewards = np.where(own, rewards, 0.0)
    m = torch.tensor(mask)[None]
    found, returns = gae(
        row(rewards), row(values), m, gamma=gamma, gae_lambda=lam, bootstrap=torch.tensor([bootstrap], dtype=torch.float64)
    )
    wanted = gae_by_definition(rewards[own], values[own], gamma, lam, bootstrap)
    np.testing.assert_allclose(found[0].numpy()[own], wanted, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(returns[0].numpy()[own], wanted + values[own], rtol=1e-9, atol=1e-9)
    assert (found[0].numpy()[~own] == 0).all()
    assert (returns[0].numpy()[~own] == 0).all()
    sums = discounted_returns(row(rewards), m, gamma)[0].numpy()
    compact = rewards[own]
    np.testing.assert_allclose(
        sums[own], [sum(gamma ** (i - t) * compact[i] for i in range(t, len(compact))) for t in range(len(compact))], atol=1e-9
    )
    assert (sums[~own] == 0).all()


def test_rows_do_not_touch_each_other() -> None:
    rng = np.random.default_rng(3)
    rewards, values = rng.normal(size=(4, 6)), rng.normal(size=(4, 6))
    mask = rng.random((4, 6)) < 0.6
    rewards = np.where(mask, rewards, 0.0)
    together, _ = gae(torch.tensor(rewards), torch.tensor(values), torch.tensor(mask), gamma=0.9, gae_lambda=0.9)
    for i in range(4):
        alone, _ = gae(row(rewards[i]), row(values[i]), torch.tensor(mask[i])[None], gamma=0.9, gae_lambda=0.9)
        assert torch.equal(together[i], alone[0])


def test_no_gradient_flows_through_advantages() -> None:
    values = torch.randn(1, 4, requires_grad=True)
    found, returns = gae(torch.randn(1, 4), values, torch.ones(1, 4, dtype=torch.bool), gamma=1.0, gae_lambda=0.9)
    assert not found.requires_grad
    assert not returns.requires_grad


def test_a_score_stands_on_the_last_action() -> None:
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    found = at_last_action(torch.tensor([2.0, -1.0, 5.0, 0.5]), mask)
    assert found.tolist() == [[0, 0, 0, 2, 0], [-1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0.5]]


def test_what_belongs_to_no_action_is_refused() -> None:
    mask = torch.tensor([[True, False]])
    with pytest.raises(ValueError, match="a token that the policy did not produce"):
        discounted_returns(torch.tensor([[0.0, 1.0]]), mask, 1.0)
    with pytest.raises(ValueError, match="boolean mask"):
        gae(torch.zeros(1, 2), torch.zeros(1, 2), mask.long(), gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        gae(torch.zeros(1, 2), torch.zeros(1, 3), mask, gamma=1.0, gae_lambda=1.0)
    with pytest.raises(ValueError, match="do not fit"):
        at_last_action(torch.zeros(2), mask)
