"""Distributions over actions agree with torch.distributions, with numerical integrals, and with their own samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch import distributions as reference

from telos.functional.distributions import Categorical, Gaussian, MultiCategorical, TanhGaussian, log_tanh_slope

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64) * 3 + 20
OTHER_LOGITS = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64)
MEAN, OTHER_MEAN = (torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
LOG_STD, OTHER_LOG_STD = (torch.randn(5, 3, generator=GENERATOR, dtype=torch.float64) * 0.5 for _ in range(2))


def same(one: Tensor, two: Tensor, tolerance: float = 1e-10) -> None:
    assert one.shape == two.shape
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


# -- against torch.distributions --------------------------------------------------------------------------------------------------------------------


def test_a_categorical_has_torchs_log_probabilities_entropy_and_kl() -> None:
    ours, theirs = Categorical(LOGITS), reference.Categorical(logits=LOGITS)
    action = torch.tensor([0, 1, 2, 3, 0, 2])
    same(ours.log_prob(action), theirs.log_prob(action))
    same(ours.entropy(), theirs.entropy())
    same(ours.kl(Categorical(OTHER_LOGITS)), reference.kl_divergence(theirs, reference.Categorical(logits=OTHER_LOGITS)))
    assert torch.equal(ours.mode(), theirs.probs.argmax(-1))
    assert (ours.kl(ours) == 0).all()


def test_a_categorical_of_two_actions_by_hand() -> None:
    """p = (3/4, 1/4), q = (1/2, 1/2)."""
    p, q = Categorical(torch.tensor([[math.log(3.0), 0.0]])), Categorical(torch.tensor([[5.0, 5.0]]))
    assert float(p.log_prob(torch.tensor([1]))) == pytest.approx(math.log(0.25), abs=1e-6)
    assert float(p.entropy()) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), abs=1e-6)
    assert float(p.kl(q)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert float(q.kl(p)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2.0), abs=1e-6)


def test_several_choices_are_the_product_of_single_ones() -> None:
    sizes = (2, 3, 4)
    logits, other = (torch.randn(5, 9, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    action = torch.tensor([[0, 2, 3], [1, 0, 0], [0, 1, 2], [1, 1, 1], [0, 0, 3]])
    ours = MultiCategorical(logits, sizes)
    edges = [(0, 2), (2, 5), (5, 9)]
    parts = [reference.Categorical(logits=logits[:, a:b]) for a, b in edges]
    others = [reference.Categorical(logits=other[:, a:b]) for a, b in edges]
    same(ours.log_prob(action), sum(part.log_prob(action[:, i]) for i, part in enumerate(parts)))  # type: ignore[arg-type]
    same(ours.entropy(), sum(part.entropy() for part in parts))  # type: ignore[arg-type]
    same(ours.kl(MultiCategorical(other, sizes)), sum(reference.kl_divergence(a, b) for a, b in zip(parts, others)))  # type: ignore[arg-type]
    assert torch.equal(ours.mode(), torch.stack([part.probs.argmax(-1) for part in parts], -1))


@pytest.mark.parametrize("by_state", [True, False])
def test_a_gaussian_has_torchs_log_probabilities_entropy_and_kl(by_state: bool) -> None:
    """The deviation of each state its own [B, D], or one for all [D]."""
    log_std, other_log_std = (LOG_STD, OTHER_LOG_STD) if by_state else (LOG_STD[0], OTHER_LOG_STD[0])
    ours, other = Gaussian(MEAN, log_std), Gaussian(OTHER_MEAN, other_log_std)
    theirs, their_other = (
        reference.Independent(reference.Normal(mean, log.exp().expand(5, 3)), 1)
        for mean, log in ((MEAN, log_std), (OTHER_MEAN, other_log_std))
    )
    action = MEAN * 0.3 + 1
    same(ours.log_prob(action), theirs.log_prob(action))
    same(ours.entropy(), theirs.entropy())
    same(ours.kl(other), reference.kl_divergence(theirs, their_other))
    same(ours.mode(), MEAN)


def test_a_squashed_gaussian_has_torchs_density() -> None:
    ours = TanhGaussian(MEAN, LOG_STD)
    theirs = reference.Independent(
        reference.TransformedDistribution(reference.Normal(MEAN, LOG_STD.exp()), [reference.transforms.TanhTransform()]), 1
    )
    action = torch.tanh(MEAN + 0.7 * LOG_STD.exp())
    same(ours.log_prob(action), theirs.log_prob(action), 1e-8)
    same(ours.mode(), torch.tanh(MEAN))


def test_the_density_of_a_squashed_gaussian_integrates_to_one() -> None:
    found = TanhGaussian(torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([[-0.2]], dtype=torch.float64))

    def density(x: float) -> float:
        return float(found.log_prob(torch.tensor([[x]], dtype=torch.float64)).exp())

    assert integrate.quad(density, -1, 1, limit=200)[0] == pytest.approx(1, abs=1e-5)


def test_the_density_at_the_edge_is_finite() -> None:
    found = TanhGaussian(torch.zeros(3, 2), torch.zeros(3, 2))
    edge = torch.tensor([[1.0, -1.0], [1.0, 0.0], [0.999999, -0.999999]])
    assert found.log_prob(edge).isfinite().all()


def test_the_slope_of_tanh_is_exact_where_the_formula_overflows() -> None:
    x = torch.tensor([-30.0, -3.0, 0.0, 0.5, 8.0, 400.0], dtype=torch.float64)
    exact = [math.log(4) - 2 * abs(v) if abs(v) > 20 else math.log(1 - math.tanh(v) ** 2) for v in x.tolist()]
    np.testing.assert_allclose(log_tanh_slope(x).numpy(), exact, rtol=1e-8, atol=1e-12)
    inside = x.clone().requires_grad_()
    log_tanh_slope(inside).sum().backward()
    assert inside.grad is not None
    np.testing.assert_allclose(inside.grad.numpy(), -2 * np.tanh(x.numpy()), rtol=1e-9, atol=1e-12)


# -- KL numerically ---------------------------------------------------------------------------------------------------------------------------------


def distribution_of(mean: float, deviation: float) -> Any:
    return stats.norm(mean, deviation)


def test_the_kl_of_gaussians_is_the_integral() -> None:
    (m, s), (n, t) = (0.3, 0.6), (-0.5, 1.4)
    one, two = (
        Gaussian(torch.tensor([[a]], dtype=torch.float64), torch.tensor([math.log(b)], dtype=torch.float64)) for a, b in ((m, s), (n, t))
    )
    p, q = distribution_of(m, s), distribution_of(n, t)
    forth = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), -10, 10)[0]
    back = integrate.quad(lambda x: q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), -12, 12)[0]
    assert float(one.kl(two)) == pytest.approx(forth, abs=1e-8)
    assert float(two.kl(one)) == pytest.approx(back, abs=1e-8)
    assert forth != pytest.approx(back, abs=0.05)


def test_the_kl_of_squashed_gaussians_is_the_integral_over_actions() -> None:
    one, two = (
        TanhGaussian(torch.tensor([[m]], dtype=torch.float64), torch.tensor([[s]], dtype=torch.float64))
        for m, s in ((0.3, -0.5), (-0.2, 0.1))
    )
    action = torch.tanh(torch.linspace(-7, 7, 40001, dtype=torch.float64))[:, None]
    p, q = one.log_prob(action), two.log_prob(action)
    whole = torch.trapezoid(p.exp() * (p - q), action[:, 0])
    assert float(one.kl(two)) == pytest.approx(float(whole), abs=1e-4)


# -- samples ----------------------------------------------------------------------------------------------------------------------------------------


def test_a_categorical_draws_with_its_probabilities() -> None:
    """Chi-square of 200,000 draws at the 0.1 % level; logits far from zero draw alike."""
    probabilities = np.array([0.5, 0.3, 0.15, 0.049, 0.001])
    for shift in (0.0, 50.0):
        logits = (torch.log(torch.tensor(probabilities)) + shift).float()
        drawn = Categorical(logits.expand(200_000, -1)).sample(torch.Generator().manual_seed(1))
        counts = np.bincount(drawn.numpy(), minlength=5)
        assert stats.chisquare(counts, probabilities * 200_000).pvalue > 1e-3


def test_an_impossible_action_is_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, -200.0, 1.0]).expand(100_000, -1)
    drawn = Categorical(logits).sample(torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {0, 3}


def test_several_choices_are_drawn_independently() -> None:
    p, q = np.array([0.3, 0.7]), np.array([0.2, 0.5, 0.3])
    logits = torch.log(torch.tensor(np.concatenate([p, q]))).float().expand(100_000, -1)
    drawn = MultiCategorical(logits, (2, 3)).sample(torch.Generator().manual_seed(2)).numpy()
    counts = np.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=6)
    assert stats.chisquare(counts, np.outer(p, q).reshape(-1) * 100_000).pvalue > 1e-3


def test_a_gaussian_draws_with_its_moments() -> None:
    mean, log_std = torch.tensor([0.5, -2.0]), torch.tensor([-0.7, 0.4])
    drawn = Gaussian(mean.expand(200_000, -1), log_std).sample(torch.Generator().manual_seed(3)).numpy()
    for i in range(2):
        assert stats.kstest(drawn[:, i], stats.norm(float(mean[i]), float(log_std[i].exp())).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.01


def test_a_squashed_gaussian_draws_the_tanh_of_a_normal_variable() -> None:
    mean, log_std = torch.full((100_000, 1), 0.8), torch.full((100_000, 1), 0.2)
    drawn = TanhGaussian(mean, log_std).sample(torch.Generator().manual_seed(4)).numpy()[:, 0]
    assert stats.kstest(np.arctanh(drawn.clip(-1 + 1e-7, 1 - 1e-7)), stats.norm(0.8, math.exp(0.2)).cdf).pvalue > 1e-3


def test_the_log_probability_that_comes_with_a_sample_is_that_of_the_action() -> None:
    found = TanhGaussian(MEAN, LOG_STD)
    action, logprob = found.rsample(torch.Generator().manual_seed(5))
    assert action.abs().max() < 1
    same(logprob, found.log_prob(action), 1e-7)


def test_mean_log_probabilities_of_samples_are_minus_the_entropy() -> None:
    """Of every kind that has one, within four standard errors of 100,000 draws."""
    for found in (
        Categorical(OTHER_LOGITS[:1].expand(100_000, -1)),
        MultiCategorical(OTHER_LOGITS[:1].expand(100_000, -1), (1, 3)),
        Gaussian(MEAN[:1].expand(100_000, -1), LOG_STD[0]),
    ):
        told = -found.log_prob(found.sample(torch.Generator().manual_seed(6)))
        assert abs(float(told.mean() - found.entropy()[0])) < 4 * float(told.std()) / math.sqrt(100_000)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Categorical(OTHER_LOGITS),
        lambda: MultiCategorical(OTHER_LOGITS, (2, 2)),
        lambda: Gaussian(MEAN, LOG_STD),
        lambda: TanhGaussian(MEAN, LOG_STD),
    ],
)
def test_the_same_generator_draws_the_same_and_none_of_it_touches_the_global_one(make: Callable[[], Any]) -> None:
    state = torch.get_rng_state()
    one, two, other = (make().sample(torch.Generator().manual_seed(seed)) for seed in (7, 7, 8))
    assert torch.equal(one, two)
    assert not torch.equal(one, other) or one.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), state)


# -- gradients --------------------------------------------------------------------------------------------------------------------------------------


def test_reparametrised_samples_carry_the_gradient_of_the_expectation() -> None:
    """d/dm and d/ds of E[tanh(m + s ε)²] by quadrature, against the mean gradient of 400,000 samples."""
    m, log_s = 0.4, -0.3
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    inner = np.tanh(m + math.exp(log_s) * nodes)
    slope = 2 * inner * (1 - inner**2)
    exact = np.array([(weights * slope).sum(), (weights * slope * nodes * math.exp(log_s)).sum()])
    parameters = torch.tensor([m, log_s], dtype=torch.float64, requires_grad=True)
    rows = parameters.expand(400_000, -1)
    action, _ = TanhGaussian(rows[:, :1], rows[:, 1:]).rsample(torch.Generator().manual_seed(8))
    (action**2).mean().backward()
    assert parameters.grad is not None
    np.testing.assert_allclose(parameters.grad.numpy(), exact, atol=3e-3)


def test_the_log_probability_of_a_reparametrised_sample_has_the_gradient_of_the_entropy() -> None:
    """d E[log π(a)] / d(m, log s) by finite differences of a quadrature of log N(ε) − log s − log(1 − tanh²)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()

    def negative_entropy(m: float, log_s: float) -> float:
        x = m + math.exp(log_s) * nodes
        return float((weights * (-0.5 * nodes**2 - log_s - 0.5 * math.log(2 * math.pi) - np.log(1 - np.tanh(x) ** 2))).sum())

    m, log_s, h = 0.4, -0.3, 1e-5
    exact = [
        (negative_entropy(m + h, log_s) - negative_entropy(m - h, log_s)) / (2 * h),
        (negative_entropy(m, log_s + h) - negative_entropy(m, log_s - h)) / (2 * h),
    ]
    parameters = torch.tensor([m, log_s], dtype=torch.float64, requires_grad=True)
    rows = parameters.expand(400_000, -1)
    _, logprob = TanhGaussian(rows[:, :1], rows[:, 1:]).rsample(torch.Generator().manual_seed(9))
    logprob.mean().backward()
    assert parameters.grad is not None
    np.testing.assert_allclose(parameters.grad.numpy(), exact, atol=5e-3)


@pytest.mark.parametrize(
    "make", [lambda x: Categorical(x), lambda x: MultiCategorical(x, (2, 2)), lambda x: Gaussian(x, x), lambda x: TanhGaussian(x, x)]
)
def test_what_is_detached_carries_no_gradient(make: Callable[[Tensor], Any]) -> None:
    found = make(OTHER_LOGITS.clone().requires_grad_())
    assert found.kl(found.fixed()).requires_grad
    assert not found.fixed().kl(found.fixed()).requires_grad


def test_the_entropy_of_a_squashed_gaussian_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no closed form"):
        TanhGaussian(MEAN, LOG_STD).entropy()
