"""Divergences against plain numpy formulas, and KL estimators against exact enumeration of all sequences."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from telos.core.errors import UsageError
from telos.functional.divergences import (
    DIVERGENCES,
    JENSEN_SHANNON,
    TOTAL_VARIATION,
    FDivergence,
    alpha,
    by_name,
    divergence,
    entropy,
    kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_loss,
)

seeds = st.integers(0, 2**32 - 1)
check = settings(deadline=None, max_examples=40, derandomize=True, database=None)
INF = float("inf")
FAMILY: list[FDivergence] = [*DIVERGENCES.values(), *(alpha(a) for a in (-1.0, -0.3, 0.0, 1e-7, 0.3, 0.5, 0.8, 1.0, 2.0))]
INVERTIBLE = [d for d in FAMILY if d.f_prime_inverse is not None]


def names(d: FDivergence) -> str:
    return d.name


def two(seed: int, shape: tuple[int, ...] = (3, 5)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(shape[-1]), shape[:-1]), rng.dirichlet(np.ones(shape[-1]), shape[:-1])


def logs(*arrays: object) -> list[Tensor]:
    return [torch.tensor(np.asarray(a, dtype=np.float64)).log() for a in arrays]


PLAIN = {
    "reverse-kl": lambda p, q: rel_entr(p, q).sum(-1),
    "forward-kl": lambda p, q: rel_entr(q, p).sum(-1),
    "jensen-shannon": lambda p, q: (rel_entr(p, (p + q) / 2) + rel_entr(q, (p + q) / 2)).sum(-1),
    "chi-squared": lambda p, q: ((p - q) ** 2 / q).sum(-1),
    "total-variation": lambda p, q: np.abs(p - q).sum(-1) / 2,
}


@pytest.mark.parametrize("name", sorted(PLAIN))
@given(seed=seeds)
@check
def test_each_divergence_equals_its_textbook_sum(name: str, seed: int) -> None:
    p, q = two(seed)
    np.testing.assert_allclose(divergence(name, *logs(p, q)), PLAIN[name](p, q), rtol=1e-9, atol=1e-12)


@given(seed=seeds, a=st.floats(-2, 3).filter(lambda a: abs(a) > 0.01 and abs(a - 1) > 0.01))
@check
def test_alpha_divergence_equals_the_papers_formula(seed: int, a: float) -> None:
    p, q = two(seed)
    u = p / q
    expected = (q * (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))).sum(-1)
    np.testing.assert_allclose(divergence(alpha(a), *logs(p, q)), expected, rtol=1e-7, atol=1e-9)


def test_named_members_of_the_alpha_family_are_the_classical_divergences() -> None:
    p, q = two(3)
    log_p, log_q = logs(p, q)
    np.testing.assert_allclose(divergence(alpha(0.0), log_p, log_q), PLAIN["reverse-kl"](p, q), rtol=1e-12)
    np.testing.assert_allclose(divergence(alpha(1.0), log_p, log_q), PLAIN["forward-kl"](p, q), rtol=1e-12)
    np.testing.assert_allclose(divergence(alpha(1e-9), log_p, log_q), PLAIN["reverse-kl"](p, q), rtol=1e-7)
    np.testing.assert_allclose(divergence(alpha(1 - 1e-9), log_p, log_q), PLAIN["forward-kl"](p, q), rtol=1e-7)
    np.testing.assert_allclose(divergence(alpha(-1.0), log_p, log_q), PLAIN["chi-squared"](p, q) / 2, rtol=1e-12)
    np.testing.assert_allclose(divergence(alpha(0.5), log_p, log_q), 4 * (1 - np.sqrt(p * q).sum(-1)), rtol=1e-10)


@pytest.mark.parametrize("d", FAMILY, ids=names)
def test_f_is_zero_at_one_and_f_prime_is_its_derivative(d: FDivergence) -> None:
    assert d.f(torch.zeros(1, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-15)
    u = torch.tensor([0.05, 0.4, 0.9, 1.3, 4.0, 40.0], dtype=torch.float64)
    step = 1e-6 * u
    slope = (d.f((u + step).log()) - d.f((u - step).log())) / (2 * step)
    torch.testing.assert_close(d.f_prime(u.log()), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d", INVERTIBLE, ids=names)
def test_f_prime_inverse_undoes_f_prime_also_where_the_ratio_would_underflow(d: FDivergence) -> None:
    assert d.f_prime_inverse is not None
    log_u = torch.linspace(-6, 6, 49, dtype=torch.float64)
    torch.testing.assert_close(d.f_prime_inverse(d.f_prime(log_u)), log_u, rtol=1e-7, atol=1e-7)
    if d.name in ("reverse-kl", "alpha(0)", "jensen-shannon"):
        far = torch.tensor([-2000.0], dtype=torch.float64)
        torch.testing.assert_close(d.f_prime_inverse(d.f_prime(far)), far)


def test_inverses_saturate_outside_the_range_of_f_prime() -> None:
    y = torch.tensor([-3.0, 5.0], dtype=torch.float64)
    assert by_name("chi-squared").f_prime_inverse(y)[0] == -INF  # type: ignore[misc]  # below f'(0) = -2: no mass
    assert by_name("forward-kl").f_prime_inverse(y)[1] == INF  # type: ignore[misc]  # above f'(inf) = 0
    assert JENSEN_SHANNON.f_prime_inverse(y)[1] == INF  # type: ignore[misc]  # above log 2
    assert alpha(0.5).f_prime_inverse(y)[1] == INF  # type: ignore[misc]  # above 1/a = 2
    assert alpha(-0.5).f_prime_inverse(y)[0] == -INF  # type: ignore[misc]  # below f'(0) = -2


@pytest.mark.parametrize(
    ("name", "expected"),
    # p = (1/2, 1/2, 0), q = (1/4, 0, 3/4): mass on either side that the other lacks.
    [
        ("reverse-kl", INF),
        ("forward-kl", INF),
        ("jensen-shannon", 0.5 * np.log(4 / 3) + 0.25 * np.log(2 / 3) + 0.5 * np.log(2) + 0.75 * np.log(2)),
        ("chi-squared", INF),
        ("total-variation", 0.75),
    ],
)
def test_missing_support_is_counted_by_hand(name: str, expected: float) -> None:
    log_p, log_q = logs([0.5, 0.5, 0.0], [0.25, 0.0, 0.75])
    assert divergence(name, log_p, log_q).item() == pytest.approx(expected)


def test_missing_support_on_one_side_is_finite_where_the_formula_is() -> None:
    log_p, log_q = logs([1.0, 0.0], [0.5, 0.5])
    assert divergence("reverse-kl", log_p, log_q).item() == pytest.approx(np.log(2))
    assert kl(log_p, log_q).item() == pytest.approx(np.log(2))
    assert kl(log_q, log_p).item() == INF
    assert divergence("forward-kl", log_q, log_p).item() == pytest.approx(np.log(2))
    assert divergence("chi-squared", log_p, log_q).item() == pytest.approx(1.0)
    assert divergence(alpha(0.5), log_p, log_q).item() == pytest.approx(4 * (1 - np.sqrt(0.5)))
    assert divergence(alpha(0.5), log_q, log_p).item() == pytest.approx(4 * (1 - np.sqrt(0.5)))


@given(seed=seeds)
@check
def test_kl_and_entropy_agree_with_scipy_and_have_finite_gradients_at_zero_probability(seed: int) -> None:
    p, q = two(seed)
    p[0] = [0.5, 0, 0, 0.5, 0]
    log_p, log_q = logs(p, q)
    np.testing.assert_allclose(kl(log_p, log_q), rel_entr(p, q).sum(-1), rtol=1e-10)
    np.testing.assert_allclose(entropy(log_p), scipy_entropy(p, axis=-1), rtol=1e-10)
    log_p.requires_grad_()
    (kl(log_p, log_q) + entropy(log_p) + divergence("reverse-kl", log_p, log_q) + divergence(JENSEN_SHANNON, log_p, log_q)).sum().backward()
    assert log_p.grad is not None
    assert bool(log_p.grad.isfinite().all())


def test_float32_ratios_beyond_float32_do_not_overflow() -> None:
    log_p, log_q = torch.tensor([-0.6931472, -0.6931472]), torch.tensor([-100.0, 0.0])
    out = divergence("reverse-kl", log_p, log_q)
    assert out.dtype == torch.float32
    assert out.item() == pytest.approx(50 - np.log(2), rel=1e-5)


def test_wrong_names_shapes_and_types_are_refused_with_a_hint() -> None:
    with pytest.raises(UsageError, match="did you mean 'reverse-kl'"):
        divergence("revers-kl", torch.zeros(2), torch.zeros(2))
    with pytest.raises(UsageError, match="finite"):
        alpha(INF)
    with pytest.raises(ValueError, match="shapes differ"):
        kl(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(TypeError, match="floating point"):
        entropy(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        kl_k1(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="mask must be bool"):
        kl_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))
    with pytest.raises(UsageError, match="k1, k2, k3"):
        kl_loss(torch.zeros(2, 3), torch.zeros(2, 3), estimator="k4")  # type: ignore[arg-type]
    assert TOTAL_VARIATION.f_prime_inverse is None


def test_monte_carlo_means_of_k1_and_k3_are_the_exact_kl_and_that_of_k2_is_not() -> None:
    p, q = two(11, (8,))
    log_p, log_q = logs(p, q)
    exact = float(rel_entr(p, q).sum())
    n = 400_000
    drawn = torch.multinomial(torch.tensor(p), n, replacement=True, generator=torch.Generator().manual_seed(0)).view(-1, 1)
    lp, lq = log_p[drawn], log_q[drawn]
    spread = {}
    for name, estimator in (("k1", kl_k1), ("k3", kl_k3)):
        values = estimator(lp, lq)
        spread[name] = values.std().item()
        assert abs(values.mean().item() - exact) < 4 * spread[name] / n**0.5, name
    k2 = kl_k2(lp, lq)
    assert abs(k2.mean().item() - exact) > 20 * k2.std().item() / n**0.5
    assert bool((kl_k3(lp, lq) >= 0).all())
    assert spread["k3"] < 0.2 * n**0.5 * exact  # the bound above is not empty


def test_k3_has_the_lower_variance_near_the_reference() -> None:
    _, q = two(5, (8,))
    near = q * np.exp(0.05 * np.random.default_rng(5).normal(size=8))
    near /= near.sum()
    log_p, log_q = logs(near, q)
    weights = torch.tensor(near)

    def deviation(values: Tensor) -> float:
        return float(((values - (weights * values).sum()) ** 2 * weights).sum() ** 0.5)

    k1, k3 = kl_k1(log_p[None], log_q[None])[0], kl_k3(log_p[None], log_q[None])[0]
    assert deviation(k3) < deviation(k1) / 10


# Sequences over a vocabulary of 3 whose token 2 ends them, at most 3 tokens long: every outcome can be listed, with its probability.
V, T, END = 3, 3, 2
SEQUENCES = [s for n in range(1, T + 1) for s in itertools.product(range(V), repeat=n) if END not in s[:-1] and (n == T or s[-1] == END)]
PREFIXES = [p for n in range(T) for p in itertools.product(range(END), repeat=n)]


def tabulate(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Per-token log-probabilities [B, T] of every sequence under one softmax per prefix, and the mask; padding is NaN."""
    table = torch.log_softmax(logits, -1)
    rows = []
    for s in SEQUENCES:
        tokens = [table[PREFIXES.index(s[:t]), s[t]] for t in range(len(s))]
        rows.append(torch.stack(tokens + [torch.full((), torch.nan, dtype=torch.float64)] * (T - len(s))))
    logprobs = torch.stack(rows)
    return logprobs, ~logprobs.isnan()


def problem(seed: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    shape = (len(PREFIXES), V)
    return torch.tensor(rng.normal(size=shape), requires_grad=True), torch.tensor(rng.normal(size=shape))


def expected_gradient(logits: Tensor, logprobs: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    """Σ over sequences of π(s) ∇ (Σ_t values), with π(s) held fixed: what autograd gives on average over samples."""
    probability = logprobs.detach().nan_to_num(0).sum(1).exp()
    assert probability.sum().item() == pytest.approx(1)
    return torch.autograd.grad((probability * values.masked_fill(~mask, 0.0).sum(1)).sum(), logits, retain_graph=True)[0]


def exact_kl(logits: Tensor, ref_logits: Tensor, forward: bool = False) -> tuple[float, Tensor]:
    log_pi, log_ref = (tabulate(x)[0].nan_to_num(0).sum(1) for x in (logits, ref_logits))
    value = kl(log_ref, log_pi) if forward else kl(log_pi, log_ref)
    return value.item(), torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@given(seed=seeds)
@settings(check, max_examples=10)
def test_expected_gradient_of_kl_loss_is_the_gradient_of_the_exact_sequence_kl(estimator: str, seed: int) -> None:
    logits, ref_logits = problem(seed)
    logprobs, mask = tabulate(logits)
    ref_logprobs, _ = tabulate(ref_logits)
    loss = kl_loss(logprobs, ref_logprobs, mask, estimator=estimator)  # type: ignore[arg-type]
    value, gradient = exact_kl(logits, ref_logits)
    torch.testing.assert_close(expected_gradient(logits, logprobs, mask, loss), gradient, rtol=1e-9, atol=1e-10)
    assert bool((loss[~mask] == 0).all())
    mean = (logprobs.detach().nan_to_num(0).sum(1).exp() * loss.sum(1)).sum().item()
    if estimator == "k2":
        assert mean != pytest.approx(value, rel=1e-3)
    else:
        assert mean == pytest.approx(value, rel=1e-9)


def test_masked_tokens_and_the_reference_get_no_gradient() -> None:
    logprobs = torch.full((1, 3), -1.0, dtype=torch.float64, requires_grad=True)
    ref = torch.full((1, 3), -2.0, dtype=torch.float64, requires_grad=True)
    for estimator in ("k1", "k2", "k3"):
        loss = kl_loss(logprobs, ref, torch.tensor([[True, True, False]]), estimator=estimator)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
        assert gradient[0, 2] == 0
        assert bool((gradient[0, :2] != 0).all())
        assert torch.autograd.grad(kl_loss(logprobs, ref, estimator=estimator).sum(), ref, allow_unused=True)[0] is None


def test_differentiating_the_value_k1_gives_a_gradient_of_mean_zero() -> None:
    logits, ref_logits = problem(1)
    logprobs, mask = tabulate(logits)
    wrong = expected_gradient(logits, logprobs, mask, kl_k1(logprobs, tabulate(ref_logits)[0]))
    torch.testing.assert_close(wrong, torch.zeros_like(wrong), rtol=0, atol=1e-12)
    assert exact_kl(logits, ref_logits)[1].abs().max() > 0.01


def test_differentiating_the_value_k3_of_sequences_gives_the_gradient_of_the_forward_kl() -> None:
    logits, ref_logits = problem(2)
    logprobs, _ = tabulate(logits)
    whole = logprobs.nan_to_num(0).sum(1, keepdim=True)
    ref_whole = tabulate(ref_logits)[0].nan_to_num(0).sum(1, keepdim=True)
    wrong = expected_gradient(logits, whole, torch.ones_like(whole, dtype=torch.bool), kl_k3(whole, ref_whole))
    torch.testing.assert_close(wrong, exact_kl(logits, ref_logits, forward=True)[1], rtol=1e-9, atol=1e-12)
    assert (wrong - exact_kl(logits, ref_logits)[1]).abs().max() > 0.01


def test_differentiating_k2_is_right_for_whole_sequences_and_wrong_for_single_tokens() -> None:
    logits, ref_logits = problem(3)
    logprobs, mask = tabulate(logits)
    ref_logprobs, _ = tabulate(ref_logits)
    truth = exact_kl(logits, ref_logits)[1]
    tokens = expected_gradient(logits, logprobs, mask, kl_k2(logprobs, ref_logprobs))
    whole, ref_whole = (x.nan_to_num(0).sum(1, keepdim=True) for x in (logprobs, ref_logprobs))
    sequences = expected_gradient(logits, whole, torch.ones_like(whole, dtype=torch.bool), kl_k2(whole, ref_whole))
    torch.testing.assert_close(sequences, truth, rtol=1e-9, atol=1e-12)
    assert (tokens - truth).abs().max() > 0.01
