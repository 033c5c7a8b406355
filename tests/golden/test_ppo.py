"""PPO-max piece by piece: estimates, clipped losses and running statistics against hand-computed cases and independent definitions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from telos.algorithms.language import ppo_max
from telos.functional.policy import (
    CriticView,
    PolicyView,
    Scored,
    clipped_surrogate,
    explained_variance,
    running_moments,
    sequence_kl,
    standard_deviation,
)
from telos.functional.reduction import Denominators, total

N, T = 4, 6
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=bool)  # row 1 has a foreign token


def plain(**changes: Any) -> ppo_max.Config:
    """PPO with every stabiliser off, and what is asked for on."""
    off: dict[str, Any] = {
        "kl_coef": 0.0,
        "normalize_reward": False,
        "clip_reward": 0.0,
        "normalize_advantage": False,
        "clip_range_vf": 0.0,
    }
    return ppo_max.Config(**(off | changes))


def scored(seed: int = 0, mask: np.ndarray = MASK, reference: bool = True) -> tuple[Scored, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    n, t = mask.shape
    raw = {
        "logprobs": -rng.exponential(1, (n, t)),
        "reference": -rng.exponential(1, (n, t)),
        "values": rng.normal(size=(n, t)),
        "scores": rng.normal(2, 3, n),
    }
    tensors = {name: torch.from_numpy(value).float() for name, value in raw.items()}
    found = Scored(
        torch.from_numpy(mask), tensors["logprobs"], tensors["reference"] if reference else None, tensors["values"], tensors["scores"],
        torch.ones(n, dtype=torch.bool), torch.arange(n),
    )  # fmt: skip
    return found, raw


def gae_row(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """A_t = Σ_l (γλ)^l δ_{t+l} over the row's own tokens."""
    deltas = rewards + gamma * np.append(values[1:], 0.0) - values
    return np.array([sum((gamma * lam) ** k * deltas[t + k] for k in range(len(rewards) - t)) for t in range(len(rewards))])


def advantages_by_definition(raw: dict[str, np.ndarray], scores: np.ndarray, eta: float, gamma: float, lam: float) -> np.ndarray:
    """The score on the last own token, −η (log π − log π_ref) on every own token, then the sum above (Zheng et al. 2023, eqs. 11 and 16)."""
    out = np.zeros(MASK.shape)
    for i in range(N):
        own = MASK[i]
        rewards = -eta * (raw["logprobs"][i, own] - raw["reference"][i, own])
        rewards[-1] += scores[i]
        out[i, own] = gae_row(rewards, raw["values"][i, own], gamma, lam)
    return out


# Estimates -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eta", "gamma", "lam"), [(0.0, 1.0, 0.95), (0.05, 1.0, 0.95), (0.3, 0.9, 0.5), (1.0, 1.0, 1.0)])
def test_advantages_are_those_of_the_definition(eta: float, gamma: float, lam: float) -> None:
    given_, raw = scored()
    found = ppo_max.estimate(plain(kl_coef=eta, gamma=gamma, gae_lambda=lam), given_, {})
    wanted = advantages_by_definition(raw, raw["scores"], eta, gamma, lam)
    np.testing.assert_allclose(found.advantages, wanted, rtol=1e-5, atol=1e-5)
    assert found.returns is not None
    np.testing.assert_allclose(found.returns, np.where(MASK, wanted + raw["values"], 0), rtol=1e-5, atol=1e-5)


def test_the_kl_penalty_stands_on_every_token_and_the_score_on_the_last_alone() -> None:
    """With zero values, γ = λ = 1, the advantage at t is the sum of the rewards from t on; its differences are the rewards themselves."""
    given_, raw = scored()
    given_ = Scored(given_.mask, given_.logprobs, given_.reference, torch.zeros(N, T), given_.scores, given_.ended, given_.group)
    found = ppo_max.estimate(plain(kl_coef=0.2, gae_lambda=1.0), given_, {}).advantages.numpy()
    for i in range(N):
        own = found[i, MASK[i]]
        rewards = own - np.append(own[1:], 0)
        wanted = -0.2 * (raw["logprobs"] - raw["reference"])[i, MASK[i]]
        wanted[-1] += raw["scores"][i]
        np.testing.assert_allclose(rewards, wanted, rtol=1e-4, atol=1e-5)


def test_an_answer_without_a_valid_reward_takes_no_part_in_anything() -> None:
    mask = MASK.copy()
    mask[2] = False
    given_, _ = scored(mask=mask)
    given_.scores[2] = 1e6
    config = ppo_max.Config()
    found = ppo_max.estimate(config, given_, {})
    assert (found.advantages[2] == 0).all()
    kept = [0, 1, 3]
    alone = Scored(
        *(part[kept] for part in (given_.mask, given_.logprobs, given_.reference, given_.values, given_.scores, given_.ended, given_.group))
    )  # type: ignore[index]
    other = ppo_max.estimate(config, alone, {})
    torch.testing.assert_close(found.advantages[kept], other.advantages)
    assert found.state == other.state
    assert found.metrics == pytest.approx(other.metrics, rel=1e-5)


def test_normalised_advantages_have_mean_zero_and_deviation_one_over_the_iteration() -> None:
    given_, raw = scored()
    found = ppo_max.estimate(plain(normalize_advantage=True), given_, {}).advantages.numpy()
    wanted = advantages_by_definition(raw, raw["scores"], 0.0, 1.0, 0.95)
    own = wanted[MASK]
    np.testing.assert_allclose(found[MASK], (own - own.mean()) / own.std(), rtol=1e-4, atol=1e-5)
    assert (found[~MASK] == 0).all()
    clipped = ppo_max.estimate(plain(normalize_advantage=True, clip_advantage=0.5), given_, {}).advantages
    np.testing.assert_allclose(clipped, np.clip(found, -0.5, 0.5), rtol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-1e3, 1e3), max_size=6), min_size=1, max_size=6))
def test_running_statistics_are_those_of_the_whole_history(batches: list[list[float]]) -> None:
    state: dict[str, float] = {}
    for batch in batches:
        state |= running_moments(state, torch.tensor(batch, dtype=torch.float64), "score")
    history = np.array([value for batch in batches for value in batch])
    assert state["score/count"] == len(history)
    if len(history):
        assert state["score/mean"] == pytest.approx(history.mean(), rel=1e-9, abs=1e-9)
        assert state["score/m2"] == pytest.approx(((history - history.mean()) ** 2).sum(), rel=1e-7, abs=1e-6)
    if len(history) > 1 and history.std() > 1e-3:
        assert standard_deviation(state, "score") == pytest.approx(history.std(), rel=1e-6)


def test_scores_are_normalised_by_all_that_was_seen_and_then_clipped() -> None:
    config, state, seen = plain(normalize_reward=True, clip_reward=0.8), {}, []
    for seed in range(3):
        given_, raw = scored(seed)
        found = ppo_max.estimate(config, given_, state)
        state = dict(found.state)
        seen += raw["scores"].tolist()
        z = np.clip((raw["scores"] - np.mean(seen)) / np.std(seen), -0.8, 0.8)
        np.testing.assert_allclose(found.advantages, advantages_by_definition(raw, z, 0.0, 1.0, 0.95), rtol=1e-4, atol=1e-5)


def test_the_first_score_alone_has_no_deviation_and_gives_no_nan() -> None:
    given_ = Scored(
        torch.ones(1, 1, dtype=torch.bool), torch.tensor([[-1.0]]), torch.tensor([[-1.0]]), torch.zeros(1, 1), torch.tensor([3.0]),
        torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.long),
    )  # fmt: skip
    found = ppo_max.estimate(ppo_max.Config(), given_, {})
    assert found.advantages.isfinite().all()
    assert all(math.isfinite(value) for value in (*found.metrics.values(), *found.state.values()))


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (60.0, 1.02), (6.6, 1.01), (0.0, 0.98), (5.7, 0.995)])
def test_the_adaptive_coefficient_moves_as_ziegler_et_al_say(kl: float, factor: float) -> None:
    """η ← η (1 + 0.1 clip(KL / target − 1, ±0.2)), target 6; it is used from the next iteration on."""
    logprobs = torch.zeros(2, 3)
    reference = torch.full((2, 3), -kl / 3)
    given_ = Scored(
        torch.ones(2, 3, dtype=torch.bool),
        logprobs,
        reference,
        torch.zeros(2, 3),
        torch.zeros(2),
        torch.ones(2, dtype=torch.bool),
        torch.arange(2),
    )
    config = plain(kl_coef=0.1, kl_target=6.0)
    first = ppo_max.estimate(config, given_, {})
    assert first.metrics["kl_coef"] == 0.1
    assert first.state["kl_coef"] == pytest.approx(0.1 * factor, rel=1e-6)
    assert ppo_max.estimate(config, given_, first.state).metrics["kl_coef"] == first.state["kl_coef"]
    np.testing.assert_allclose(sequence_kl(logprobs, reference, given_.mask), kl, rtol=1e-6)


def test_vanilla_is_every_starred_option_off_whatever_its_value() -> None:
    given_, _ = scored()
    loud: dict[str, Any] = {
        "kl_coef": 0.7,
        "kl_target": 3.0,
        "normalize_reward": True,
        "clip_reward": 0.1,
        "normalize_advantage": True,
        "clip_range_vf": 0.01,
    }
    vanilla, off = ppo_max.Config(preset="vanilla", **loud), plain()
    one, other = ppo_max.estimate(vanilla, given_, {}), ppo_max.estimate(off, given_, {})
    assert torch.equal(one.advantages, other.advantages)
    assert one.state == other.state
    view = CriticView(torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.ones(1, 1, dtype=torch.bool))
    assert torch.equal(ppo_max.critic_loss(vanilla, view).values, ppo_max.critic_loss(off, view).values)


# Losses ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    # −min(ρA, clip(ρ, 0.8, 1.2) A), and its derivative with respect to log ρ, by hand.
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # a gain beyond the bound is not taken
        (0.5, 2.0, -1.0, -1.0),  # a loss is, at any distance
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),
        (0.9, -2.0, 1.8, 1.8),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    log_ratio = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    found, low, high = clipped_surrogate(log_ratio, torch.tensor([[advantage]]).double(), 0.2, 0.2)
    found.sum().backward()
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert log_ratio.grad is not None
    assert log_ratio.grad.item() == pytest.approx(slope, rel=1e-12)
    assert low.item() == (ratio < 0.8 and advantage < 0)
    assert high.item() == (ratio > 1.2 and advantage > 0)


def test_bounds_may_differ_below_and_above() -> None:
    log_ratio = torch.tensor([0.6, 0.8, 1.25, 1.5], dtype=torch.float64).log()
    up, _, high = clipped_surrogate(log_ratio, torch.ones(4).double(), 0.3, 0.28)
    np.testing.assert_allclose(-up, [0.6, 0.8, 1.25, 1.28], rtol=1e-12)
    assert high.tolist() == [False, False, False, True]
    down, low, _ = clipped_surrogate(log_ratio, -torch.ones(4).double(), 0.3, 0.28)
    np.testing.assert_allclose(down, [0.7, 0.8, 1.25, 1.5], rtol=1e-12)
    assert low.tolist() == [True, False, False, False]


def policy_view(seed: int = 0) -> tuple[PolicyView, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    raw = {
        "new": -rng.exponential(1, (N, T)),
        "old": -rng.exponential(1, (N, T)),
        "adv": rng.normal(size=(N, T)),
        "entropy": rng.uniform(0, 3, (N, T)),
    }
    t = {name: torch.from_numpy(value) for name, value in raw.items()}
    return PolicyView(t["new"].requires_grad_(), t["entropy"].requires_grad_(), t["old"], None, t["adv"], torch.from_numpy(MASK)), raw


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_the_policy_loss_is_the_mean_over_own_tokens_minus_the_entropy_bonus(coefficient: float) -> None:
    view, raw = policy_view()
    losses = ppo_max.loss(plain(entropy_coef=coefficient, clip_range=0.2), view)
    ratio = np.exp(raw["new"] - raw["old"])
    per_token = np.maximum(-raw["adv"] * ratio, -raw["adv"] * np.clip(ratio, 0.8, 1.2)) - coefficient * raw["entropy"]
    loss = total(losses, Denominators(N, int(MASK.sum())))
    assert loss.item() == pytest.approx(per_token[MASK].mean(), rel=1e-12)
    loss.backward()
    gradient = view.entropy.grad
    assert (gradient is None and coefficient == 0) or (
        gradient is not None and np.allclose(gradient.numpy(), np.where(MASK, -coefficient / MASK.sum(), 0), rtol=1e-12)
    )
    assert view.logprobs.grad is not None
    assert (view.logprobs.grad.numpy()[~MASK] == 0).all()


def test_on_the_sampling_policy_the_gradient_is_that_of_the_plain_policy_gradient() -> None:
    view, raw = policy_view()
    same = PolicyView(view.old_logprobs.clone().requires_grad_(), view.entropy, view.old_logprobs, None, view.advantages, view.mask)
    total(ppo_max.loss(plain(), same), Denominators(N, int(MASK.sum()))).backward()
    assert same.logprobs.grad is not None
    np.testing.assert_allclose(same.logprobs.grad, np.where(MASK, -raw["adv"] / MASK.sum(), 0), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("old", "new", "target", "bound", "loss", "slope"),
    # ½ max((V − R)², (clip(V, V_old ± c) − R)²) and its derivative, by hand.
    [
        (0.0, 0.1, 1.0, 0.2, 0.405, -0.9),  # inside the bound: the plain error
        (0.0, 0.5, 1.0, 0.2, 0.32, 0.0),  # moved too far towards the target: no further gradient
        (0.0, -0.5, 1.0, 0.2, 1.125, -1.5),  # moved away: the larger, unclipped error pulls back
        (0.0, 1.5, 1.0, 0.2, 0.32, 0.0),
        (0.0, 0.5, 1.0, 0.0, 0.125, -0.5),  # 0 is no bound
    ],
)
def test_the_clipped_value_loss_by_hand(old: float, new: float, target: float, bound: float, loss: float, slope: float) -> None:
    values = torch.tensor([[new]], dtype=torch.float64, requires_grad=True)
    view = CriticView(values, torch.tensor([[old]]).double(), torch.tensor([[target]]).double(), torch.ones(1, 1, dtype=torch.bool))
    found = ppo_max.critic_loss(plain(clip_range_vf=bound), view)
    found.values.sum().backward()
    assert found.values.item() == pytest.approx(loss, rel=1e-12)
    assert values.grad is not None
    assert values.grad.item() == pytest.approx(slope, rel=1e-12)


def test_explained_variance_by_hand() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[True, True, True, False]])

    def of(values: list[float]) -> float:
        return explained_variance(torch.tensor([values]), returns, mask)

    assert of([1.0, 2.0, 3.0, 0.0]) == pytest.approx(1.0)
    assert of([6.0, 7.0, 8.0, 0.0]) == pytest.approx(1.0), "a constant error is bias, not variance"
    assert of([2.0, 2.0, 2.0, 0.0]) == pytest.approx(0.0, abs=1e-6)
    assert of([3.0, 2.0, 1.0, 0.0]) == pytest.approx(-3.0, rel=1e-5)
    assert explained_variance(torch.zeros(1, 4), torch.ones(1, 4), mask) == 0.0


def test_a_minibatch_split_changes_no_meaning() -> None:
    """The losses of two halves of a batch over its token count add up to the whole batch's."""
    view, _ = policy_view()
    whole = ppo_max.loss(plain(), view)
    counts = Denominators(N, int(MASK.sum()))

    def part(rows: slice) -> Tensor:
        cut = PolicyView(view.logprobs[rows], view.entropy[rows], view.old_logprobs[rows], None, view.advantages[rows], view.mask[rows])
        return total(ppo_max.loss(plain(), cut), counts)

    assert (part(slice(0, 1)) + part(slice(1, N))).item() == pytest.approx(total(whole, counts).item(), rel=1e-12)
