"""Exact optima and equilibria against independent solvers (scipy's minimisers, closed forms by hand) and their defining conditions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit, rel_entr

from telos.core.errors import Failure, UsageError
from telos.functional.divergences import DIVERGENCES, alpha
from telos.functional.equilibria import (
    best_response,
    exploitability,
    f_optimum,
    kl_optimum,
    nash,
    regularised_best_response,
    regularised_gap,
    regularised_nash,
)

seeds = st.integers(0, 2**32 - 1)
check = settings(deadline=None, max_examples=25, derandomize=True, database=None)

# f and f', written again in plain numpy.
PLAIN = {
    "reverse-kl": (lambda u: u * np.log(u), lambda u: np.log(u) + 1),
    "forward-kl": (lambda u: -np.log(u), lambda u: -1 / u),
    "jensen-shannon": (lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2), lambda u: np.log(2 * u / (1 + u))),
    "chi-squared": (lambda u: (u - 1) ** 2, lambda u: 2 * (u - 1)),
    0.3: (lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7), lambda u: (1 - u**-0.3) / 0.3),
    -0.5: (lambda u: (u**1.5 - 1.5 * u + 0.5) / 0.75, lambda u: (u**0.5 - 1) / 0.5),
}
FLOOR = {"chi-squared": -2.0, -0.5: -2.0}  # f'(0) where it is finite


def named(which: str | float):
    return DIVERGENCES[which] if isinstance(which, str) else alpha(which)


def task(seed: int, contexts: int = 4, responses: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(contexts, responses)), rng.dirichlet(np.ones(responses), contexts)


def game(seed: int, contexts: int = 4, responses: int = 5, scale: float = 1.5) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(size=(contexts, responses, responses)) * scale
    return expit(scores - scores.swapaxes(1, 2))


ROCK_PAPER_SCISSORS = np.array([[0.5, 0.4, 0.7], [0.6, 0.5, 0.2], [0.3, 0.8, 0.5]])  # advantages 0.1, 0.2, 0.3: Nash (3, 2, 1)/6


@pytest.mark.parametrize("which", PLAIN, ids=str)
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_optimum_agrees_with_scipy_minimising_on_the_simplex(which: str | float, beta: float) -> None:
    reward, ref = task(7, contexts=2, responses=4)
    ref = 0.8 * ref + 0.05
    f, f_prime = PLAIN[which]
    ours = f_optimum(reward, ref, beta, named(which))
    for r, q, found in zip(reward, ref, ours):
        solved = minimize(
            lambda p, r=r, q=q: -(p @ r) + beta * (q @ f(p / q)),
            q,
            jac=lambda p, r=r, q=q: -r + beta * f_prime(p / q),
            bounds=[(1e-12, 1)] * 4,
            constraints=[{"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones(4)}],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 500},
        )
        np.testing.assert_allclose(found, solved.x, atol=2e-5)
        assert -(found @ r) + beta * (q @ f(np.maximum(found, 1e-300) / q)) <= solved.fun + 1e-9


@given(seed=seeds, beta=st.floats(0.02, 20))
@check
def test_kl_optimum_beats_every_other_policy_by_exactly_beta_times_its_kl(seed: int, beta: float) -> None:
    reward, ref = task(seed)
    best = kl_optimum(reward, ref, beta)
    other = np.random.default_rng(seed + 1).dirichlet(np.ones(5), 4)

    def value(p: np.ndarray) -> np.ndarray:
        return (p * reward).sum(-1) - beta * rel_entr(p, ref).sum(-1)

    np.testing.assert_allclose(value(best) - value(other), beta * rel_entr(other, best).sum(-1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("which", PLAIN, ids=str)
@given(seed=seeds, beta=st.floats(0.05, 20))
@check
def test_f_optimum_meets_its_kkt_conditions(which: str | float, seed: int, beta: float) -> None:
    reward, ref = task(seed)
    policy = f_optimum(reward, ref, beta, named(which))
    np.testing.assert_allclose(policy.sum(-1), 1, rtol=1e-12)
    f_prime = PLAIN[which][1]
    for r, q, p in zip(reward, ref, policy):
        on = p > 1e-200
        multiplier = r[on] - beta * f_prime(p[on] / q[on])
        np.testing.assert_allclose(multiplier, multiplier[0], rtol=1e-6, atol=1e-6)
        if which in FLOOR:
            assert np.all(r[~on] - beta * FLOOR[which] <= multiplier[0] + 1e-6)
        else:
            assert np.all(on | (beta < 0.1))


@given(seed=seeds, beta=st.floats(0.01, 50))
@check
def test_reverse_kl_optimum_is_the_kl_optimum(seed: int, beta: float) -> None:
    reward, ref = task(seed)
    np.testing.assert_allclose(f_optimum(reward, ref, beta, "reverse-kl"), kl_optimum(reward, ref, beta), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(f_optimum(reward, ref, beta, alpha(0.0)), kl_optimum(reward, ref, beta), rtol=1e-9, atol=1e-14)


def test_chi_squared_optimum_is_sparse_from_the_beta_computed_by_hand() -> None:
    # Rewards (1, 0), ref uniform: u = 1 ± 1/(4 beta), so the poor response gets nothing from beta = 1/4 downwards.
    np.testing.assert_allclose(f_optimum([1.0, 0.0], [0.5, 0.5], 0.5, "chi-squared"), [0.75, 0.25], atol=1e-12)
    np.testing.assert_array_equal(f_optimum([1.0, 0.0], [0.5, 0.5], 0.2, "chi-squared"), [1.0, 0.0])


def test_forward_kl_optimum_of_two_responses_solves_its_quadratic() -> None:
    # ref/(λ − 1) + ref/λ = 1/β with uniform ref and β = 1: λ² − 2λ + 1/2 = 0, so λ = 1 + √½ and π = (½/(λ − 1), ½/λ).
    root = 1 + np.sqrt(0.5)
    np.testing.assert_allclose(f_optimum([1.0, 0.0], [0.5, 0.5], 1.0, "forward-kl"), [0.5 / (root - 1), 0.5 / root], rtol=1e-12)


@pytest.mark.parametrize("which", PLAIN, ids=str)
def test_optimum_stays_on_the_support_and_ignores_shifts_of_the_reward(which: str | float) -> None:
    reward, ref = task(9)
    ref[:, 0] = 0
    ref /= ref.sum(-1, keepdims=True)
    reward[:, 0] = 100  # tempting, and outside the support
    policy = f_optimum(reward, ref, 0.5, named(which))
    assert np.all(policy[:, 0] == 0)
    np.testing.assert_allclose(policy, f_optimum(reward + 1000, ref, 0.5, named(which)), rtol=1e-8)
    np.testing.assert_allclose(f_optimum(reward, ref, 1e7, named(which)), ref, atol=1e-5)


@pytest.mark.parametrize("which", PLAIN, ids=str)
def test_small_beta_gives_the_best_response_nearly_all_mass(which: str | float) -> None:
    reward, ref = task(9)
    policy = f_optimum(reward, ref, 1e-4, named(which))
    np.testing.assert_array_equal(policy.argmax(-1), reward.argmax(-1))
    assert np.all(policy.max(-1) > 0.98)


def test_nash_of_rock_paper_scissors_is_the_one_found_by_hand() -> None:
    np.testing.assert_allclose(nash(ROCK_PAPER_SCISSORS), [3 / 6, 2 / 6, 1 / 6], atol=1e-12)


@given(seed=seeds, responses=st.integers(2, 12))
@check
def test_nash_of_random_preferences_cannot_be_exploited(seed: int, responses: int) -> None:
    p = game(seed, responses=responses, scale=3)
    policy = nash(p)
    assert np.all(exploitability(policy, p) < 1e-8)
    np.testing.assert_allclose(np.einsum("ca,cab,cb->c", policy, p, policy), 0.5, atol=1e-12)


def test_exploitability_by_hand() -> None:
    # Rock alone loses to paper 0.6 to 0.4: either player gains 0.1 over the value of 1/2.
    assert exploitability([1.0, 0.0, 0.0], ROCK_PAPER_SCISSORS) == pytest.approx(0.2)
    np.testing.assert_array_equal(best_response([1.0, 0.0, 0.0], ROCK_PAPER_SCISSORS), [0, 1, 0])
    np.testing.assert_array_equal(best_response([0.0, 1.0, 0.0], ROCK_PAPER_SCISSORS), [0, 0, 1])


@given(seed=seeds, tau=st.floats(0.003, 30))
@check
def test_regularised_nash_is_its_own_best_response(seed: int, tau: float) -> None:
    p, (_, ref) = game(seed), task(seed)
    found = regularised_nash(p, ref, tau)
    assert np.all(found.residual < 1e-10)
    tilted = ref * np.exp((np.einsum("cab,cb->ca", p, found.policy) - 1) / tau)
    np.testing.assert_allclose(found.policy, tilted / tilted.sum(-1, keepdims=True), atol=1e-9)
    assert np.all(regularised_gap(found.policy, p, ref, tau) < 1e-12)
    np.testing.assert_allclose(regularised_best_response(found.policy, p, ref, tau), found.policy, atol=1e-10)


@given(seed=seeds, tau=st.floats(0.05, 5))
@check
def test_regularised_gap_equals_the_two_players_gains_computed_directly(seed: int, tau: float) -> None:
    p, (_, ref) = game(seed), task(seed)
    policy = np.random.default_rng(seed + 1).dirichlet(np.ones(5), 4)

    def value(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.einsum("ca,cab,cb->c", a, p, b) - tau * rel_entr(a, ref).sum(-1) + tau * rel_entr(b, ref).sum(-1)

    response = ref * np.exp((np.einsum("cab,cb->ca", p, policy) - 1) / tau)
    response /= response.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        regularised_gap(policy, p, ref, tau), value(response, policy) - value(policy, response), rtol=1e-7, atol=1e-10
    )
    other = np.random.default_rng(seed + 2).dirichlet(np.ones(5), 4)
    assert np.all(value(other, policy) - value(policy, other) <= regularised_gap(policy, p, ref, tau) + 1e-10)


def test_regularised_nash_tends_to_the_reference_and_to_a_nash_equilibrium() -> None:
    p, (_, ref) = game(5, responses=6), task(5, responses=6)
    np.testing.assert_allclose(regularised_nash(p, ref, 1e6).policy, ref, atol=1e-6)
    gaps = [exploitability(regularised_nash(p, ref, tau).policy, p).max() for tau in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3
    small = regularised_nash(ROCK_PAPER_SCISSORS, [0.5, 0.3, 0.2], 1e-5).policy
    np.testing.assert_allclose(small, [3 / 6, 2 / 6, 1 / 6], atol=1e-3)


def test_regularised_nash_keeps_to_the_references_support() -> None:
    found = regularised_nash(ROCK_PAPER_SCISSORS, [0.5, 0.5, 0.0], 0.01)
    # Rock against paper, 0.4 to 0.6 whoever is met: log-odds of paper are 0.2 (the sum of both halves' 0.1) over τ times one half.
    np.testing.assert_allclose(found.policy, [1 / (1 + np.exp(10)), 1 / (1 + np.exp(-10)), 0], atol=1e-12)
    assert regularised_gap([0.4, 0.4, 0.2], ROCK_PAPER_SCISSORS, [0.5, 0.5, 0.0], 0.01) == np.inf


def test_wrong_values_are_refused_and_a_missed_tolerance_is_an_error() -> None:
    half = [[0.5, 0.5], [0.5, 0.5]]
    with pytest.raises(UsageError, match="beta is 0"):
        kl_optimum([1.0, 2.0], [0.5, 0.5], 0)
    with pytest.raises(UsageError, match="sum to 1"):
        kl_optimum([1.0, 2.0], [-0.7, -0.7], 1)
    with pytest.raises(UsageError, match=r"P\[a, b\] \+ P\[b, a\] = 1"):
        nash([[0.5, 0.9], [0.5, 0.5]])
    with pytest.raises(UsageError, match="no invertible derivative"):
        f_optimum([1.0, 2.0], [0.5, 0.5], 1, "total-variation")
    with pytest.raises(UsageError, match="NaN"):
        kl_optimum([np.nan, 2.0], [0.5, 0.5], 1)
    with pytest.raises(ValueError, match="differ"):
        regularised_nash(half, [[0.5, 0.5]], 1)
    with pytest.raises(ValueError, match=r"\[\.\.\., A, A\]"):
        nash([[0.5, 0.5]])
    with pytest.raises(Failure, match="use a larger tau"):
        regularised_nash(game(0), task(0)[1], 1e-9)
