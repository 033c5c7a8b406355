"""The offline pairwise methods beside DPO and SimPO against their papers' formulae, written again in numpy float64 with gradients by
central differences.

Where another library computes something else under the same name, a test says which one is ours.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import logit
from test_pairwise_losses import LENGTHS, B, data, dpo_formula, logsig, mask_of, numerical, pair, sums
from torch import Tensor

from telos.algorithms.language import copg, cpo, dpo, f_dpo, ipo, orpo, rpo, slic
from telos.core.config import from_mapping
from telos.core.errors import UsageError
from telos.functional.pairwise import AnswerLogps, PairLogps
from telos.functional.reduction import Denominators, Losses, total

Values = dict[str, np.ndarray]
SCORES = (
    np.array([0.3, -1.2, 2.0, 0.0, 0.7]),
    np.array([0.1, 0.4, -0.5, 0.0, 1.9]),
)  # of the two answers of each pair, better ones on either side


def scored(p: PairLogps) -> PairLogps:
    dtype = p.chosen.tokens.dtype
    chosen, rejected = (torch.from_numpy(scores).to(dtype) for scores in SCORES)
    return dataclasses.replace(p, chosen_score=chosen, rejected_score=rejected)


def leaves(values: Values) -> dict[str, Tensor]:
    return {side: torch.from_numpy(values[side]).requires_grad_() for side in LENGTHS}


def gradients(losses: Losses, policy: dict[str, Tensor]) -> list[np.ndarray]:
    total(losses, Denominators(len(losses.values), 10**6)).backward()
    found = []
    for side in policy.values():
        assert side.grad is not None
        found.append(side.grad.numpy())
    return found


def assert_loss(ours: Callable[[PairLogps], Losses], theirs: Callable[[Values], np.ndarray]) -> None:
    """Values to 1e-12 and gradients to 1e-6, per pair and for the mean over all pairs; nothing behind an answer's end counts."""
    for seed in range(3):
        # Log-ratios of a few nats: u^-1 of one pair then leaves the central differences of the others their digits.
        values = {name: 0.4 * value for name, value in data(seed).items()}
        policy = leaves(values)
        losses = ours(pair(values, policy))
        assert losses.mask is None
        np.testing.assert_allclose(losses.values.detach().numpy(), theirs(values), rtol=1e-12, atol=1e-12)
        for side, gradient in zip(LENGTHS, gradients(losses, policy), strict=True):
            wanted = numerical(lambda moved: float(theirs(moved).mean()), values, side)
            np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-8 * max(1.0, float(np.abs(wanted).max())))
            assert (gradient[~mask_of(side)] == 0).all(), "tokens behind an answer's end have no gradient"


def lengths(side: str) -> np.ndarray:
    return np.array(LENGTHS[side], dtype=float)


def ratios(values: Values) -> tuple[np.ndarray, np.ndarray]:
    chosen, rejected = (sums(values, side) - sums(values, side, "ref_") for side in ("chosen", "rejected"))
    return chosen, rejected


def smoothed(margin: np.ndarray, eps: float) -> np.ndarray:
    return -(1 - eps) * logsig(margin) - eps * logsig(-margin)


# IPO (Azar et al. 2023, eq. 17) ----------------------------------------------------------------------------------------------------------


def ipo_formula(values: Values, tau: float) -> np.ndarray:
    chosen, rejected = ratios(values)
    return (chosen - rejected - 1 / (2 * tau)) ** 2


def trl_ipo_formula(values: Values, tau: float) -> np.ndarray:
    """TRL averages all four log-probabilities over their answer's tokens first."""
    chosen, rejected = ((sums(values, side) - sums(values, side, "ref_")) / lengths(side) for side in ("chosen", "rejected"))
    return (chosen - rejected - 1 / (2 * tau)) ** 2


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_ipo_is_the_papers_loss_on_whole_answers(tau: float) -> None:
    assert_loss(lambda p: ipo.loss(ipo.Config(beta=tau), p), lambda values: ipo_formula(values, tau))


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_length_normalised_ipo_is_trls_loss_and_not_the_papers(tau: float) -> None:
    config = ipo.Config(beta=tau, length_normalized=True)
    assert_loss(lambda p: ipo.loss(config, p), lambda values: trl_ipo_formula(values, tau))
    assert not np.allclose(trl_ipo_formula(data(), tau), ipo_formula(data(), tau), rtol=0.01)


def test_ipo_stops_where_the_margin_is_half_of_one_over_tau_and_pulls_back_beyond() -> None:
    one = torch.ones(3, 1, dtype=torch.bool)
    zero = AnswerLogps(torch.zeros(3, 1, dtype=torch.float64), one)
    side = torch.tensor([[0.9], [1.0], [1.1]], dtype=torch.float64, requires_grad=True)
    ipo.loss(ipo.Config(beta=0.5), PairLogps(AnswerLogps(side, one), zero, zero, zero, torch.zeros(3))).values.sum().backward()
    assert side.grad is not None
    np.testing.assert_allclose(side.grad[:, 0].numpy(), [-0.2, 0.0, 0.2], atol=1e-12)


# f-DPO (Wang et al. 2023, table 1) -------------------------------------------------------------------------------------------------------

DIVERGENCES: list[tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]] = [
    ({"divergence": "reverse-kl"}, lambda u: np.log(u) + 1),
    ({"divergence": "forward-kl"}, lambda u: -1 / u),
    ({"divergence": "jensen-shannon"}, lambda u: np.log(2 * u / (1 + u))),
    *(({"divergence": "alpha", "alpha": a}, lambda u, a=a: (1 - u**-a) / a) for a in (0.3, 0.5, 0.7, 1.0)),
]
NAMES = [" ".join(map(str, options.values())) for options, _ in DIVERGENCES]


@pytest.mark.parametrize(("beta", "eps"), [(0.1, 0.0), (1.0, 0.0), (0.5, 0.2)])
@pytest.mark.parametrize(("options", "f_prime"), DIVERGENCES, ids=NAMES)
def test_f_dpo_is_the_papers_loss(options: dict[str, Any], f_prime: Callable[[np.ndarray], np.ndarray], beta: float, eps: float) -> None:
    config = f_dpo.Config(beta=beta, label_smoothing=eps, **options)

    def formula(values: Values) -> np.ndarray:
        chosen, rejected = ratios(values)
        return smoothed(beta * f_prime(np.exp(chosen)) - beta * f_prime(np.exp(rejected)), eps)

    assert_loss(lambda p: f_dpo.loss(config, p), formula)


@pytest.mark.parametrize(("beta", "eps"), [(0.1, 0.0), (2.0, 0.3)])
def test_f_dpo_with_the_reverse_kl_is_dpo(beta: float, eps: float) -> None:
    found = []
    for method in (dpo, f_dpo):
        policy = leaves(data())
        losses = method.loss(method.Config(beta=beta, label_smoothing=eps), pair(data(), policy))
        metrics = {name: value.detach().numpy() for name, value in losses.metrics.items() if isinstance(value, Tensor)}
        found.append((losses.values.detach().numpy(), *metrics.values(), *gradients(losses, policy)))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("divergence", ["forward-kl", "jensen-shannon", "alpha"])
def test_f_dpo_has_the_forms_that_trl_writes(divergence: Any) -> None:
    """TRL writes the margins for α as (u_l^−α − u_w^−α)/α, with α = 1 for the forward KL, and Jensen-Shannon's as DPO's less two
    softplus."""
    chosen, rejected = ratios(data())
    alpha = {"forward-kl": 1.0, "alpha": 0.5}.get(divergence)
    if alpha is None:
        margin = chosen - rejected - (np.logaddexp(0, chosen) - np.logaddexp(0, rejected))
    else:
        margin = (np.exp(-alpha * rejected) - np.exp(-alpha * chosen)) / alpha
    losses = f_dpo.loss(f_dpo.Config(beta=0.1, divergence=divergence), pair(data(), leaves(data())))
    np.testing.assert_allclose(losses.values.detach().numpy(), -logsig(0.1 * margin), rtol=1e-12)


@pytest.mark.parametrize("options", [options for options, _ in DIVERGENCES], ids=NAMES)
def test_f_dpos_rewards_are_zero_at_the_reference_whatever_the_divergence(options: dict[str, Any]) -> None:
    values = data()
    values |= {"ref_chosen": values["chosen"], "ref_rejected": values["rejected"]}
    losses = f_dpo.loss(f_dpo.Config(beta=2.0, **options), pair(values, leaves(values)))
    for name in ("rewards/chosen", "rewards/rejected"):
        np.testing.assert_allclose(losses.metrics[name].detach().numpy(), 0.0, atol=1e-15)  # type: ignore[union-attr]
    np.testing.assert_allclose(losses.values.detach().numpy(), math.log(2), rtol=1e-14)


@pytest.mark.parametrize("options", [options for options, _ in DIVERGENCES], ids=NAMES)
@pytest.mark.parametrize(("chosen", "rejected"), [(-3000.0, 0.0), (0.0, -3000.0), (-3000.0, -3000.0), (300.0, -300.0), (-300.0, 300.0)])
def test_f_dpo_stays_finite_in_float32_and_always_favours_the_chosen_answer(
    options: dict[str, Any], chosen: float, rejected: float
) -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    zero = AnswerLogps(torch.zeros(1, 1), one)
    sides = [torch.tensor([[x]], requires_grad=True) for x in (chosen, rejected)]
    losses = f_dpo.loss(f_dpo.Config(beta=0.1, **options), PairLogps(*(AnswerLogps(x, one) for x in sides), zero, zero, torch.zeros(1)))
    losses.values.sum().backward()
    assert losses.values.isfinite().all()
    for side, sign in zip(sides, (-1, 1), strict=True):
        assert side.grad is not None
        assert side.grad.isfinite().all()
        assert sign * side.grad.item() >= 0
    if chosen < rejected:
        assert sides[0].grad is not None
        assert sides[0].grad.item() < 0, "a chosen answer that was given up is pulled back"


def test_f_dpos_tangent_starts_beyond_every_ratio_that_float64_can_still_tell() -> None:
    """The continued derivative and the formula agree down to u^−α = e^30, and the slope does not jump there."""
    for alpha in (0.3, 1.0):
        edge = -30 / alpha
        config = f_dpo.Config(divergence="alpha", alpha=alpha)
        for x in (edge + 1e-6, edge - 1e-6):
            ratio = torch.tensor([x], dtype=torch.float64, requires_grad=True)
            found = f_dpo.derivative(f_dpo.by_name("alpha", alpha), alpha, ratio)
            found.sum().backward()
            assert ratio.grad is not None
            assert found.item() == pytest.approx(-math.expm1(-alpha * x) / alpha, rel=1e-9)
            assert ratio.grad.item() == pytest.approx(math.exp(-alpha * x), rel=1e-5)
        assert config.alpha == alpha


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divergence": "reverse-kl", "alpha": 0.3}, "--alpha has no effect while --divergence is reverse-kl"),
        ({"divergence": "alpha", "alpha": 0.0}, "--alpha"),
        ({"divergence": "alpha", "alpha": -1.0}, "--alpha"),
        ({"divergence": "chi-squared"}, "divergence"),
        ({"divergence": "total-variation"}, "divergence"),
    ],
)
def test_f_dpo_refuses_what_it_cannot_reach_and_what_has_no_effect(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_mapping(f_dpo.Config, options)


# RPO (Liu et al. 2024) and CPO (Xu et al. 2024) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "eta", "eps"), [(0.1, 0.005, 0.0), (0.5, 2.0, 0.0), (0.1, 1.0, 0.1)])
@pytest.mark.parametrize("per_token", [False, True])
def test_rpo_is_dpo_and_eta_beta_times_the_chosen_answers_likelihood(beta: float, eta: float, eps: float, per_token: bool) -> None:
    config = rpo.Config(beta=beta, eta=eta, label_smoothing=eps, nll_per_token=per_token)

    def formula(values: Values) -> np.ndarray:
        nll = -sums(values, "chosen") / (lengths("chosen") if per_token else 1)
        return dpo_formula(values, beta, eps) + eta * beta * nll

    assert_loss(lambda p: rpo.loss(config, p), formula)


@pytest.mark.parametrize("per_token", [False, True])
def test_rpo_of_weight_zero_is_dpo_to_the_last_bit(per_token: bool) -> None:
    found = []
    for loss in (
        lambda p: rpo.loss(rpo.Config(beta=0.3, eta=0.0, label_smoothing=0.1, nll_per_token=per_token), p),
        lambda p: dpo.loss(dpo.Config(beta=0.3, label_smoothing=0.1), p),
    ):
        policy = leaves(data())
        losses = loss(pair(data(), policy))
        found.append([losses.values.detach().numpy(), *gradients(losses, policy)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("beta", "coef", "eps"), [(0.1, 1.0, 0.0), (0.5, 0.0, 0.0), (0.1, 0.3, 0.2)])
@pytest.mark.parametrize("per_token", [False, True])
def test_cpo_is_the_margin_of_plain_log_probabilities_and_the_likelihood(beta: float, coef: float, eps: float, per_token: bool) -> None:
    config = cpo.Config(beta=beta, nll_coef=coef, label_smoothing=eps, nll_per_token=per_token)

    def formula(values: Values) -> np.ndarray:
        chosen, rejected = sums(values, "chosen"), sums(values, "rejected")
        return smoothed(beta * (chosen - rejected), eps) - coef * chosen / (lengths("chosen") if per_token else 1)

    assert_loss(lambda p: cpo.loss(config, p), formula)


def test_cpo_without_its_likelihood_is_dpo_with_a_uniform_reference() -> None:
    """A reference that gives every whole answer the same probability: its log-probability is one number, however it is spread over
    tokens."""
    values = data()
    for side in LENGTHS:
        values[f"ref_{side}"] = np.where(mask_of(side), -7.0 / lengths(side)[:, None], 0.0)
    found = []
    for loss in (
        lambda p: cpo.loss(cpo.Config(beta=0.3, nll_coef=0.0), dataclasses.replace(p, reference_chosen=None, reference_rejected=None)),
        lambda p: dpo.loss(dpo.Config(beta=0.3), p),
    ):
        policy = leaves(values)
        losses = loss(pair(values, policy))
        found.append([losses.values.detach().numpy(), *gradients(losses, policy)])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["rpo", "cpo"])
def test_the_likelihood_per_token_is_trls_only_where_all_answers_have_one_length(kind: str) -> None:
    """TRL averages over the chosen tokens of the batch; ours over each answer first, so that no answer counts more for being long."""
    weight = 0.25

    def likelihood_term(mask: np.ndarray) -> tuple[float, float]:
        tokens = data()["chosen"] * lengths("chosen")[:, None]
        chosen = AnswerLogps(torch.from_numpy(tokens), torch.from_numpy(mask))
        zero = AnswerLogps(torch.zeros(B, 1, dtype=torch.float64), torch.ones(B, 1, dtype=torch.bool))
        p = PairLogps(chosen, zero, chosen, zero, torch.zeros(B))
        if kind == "rpo":
            with_, without = (rpo.loss(rpo.Config(beta=0.5, eta=w / 0.5, nll_per_token=True), p).values for w in (weight, 0.0))
        else:
            with_, without = (cpo.loss(cpo.Config(nll_coef=w, nll_per_token=True), p).values for w in (weight, 0.0))
        return float((with_ - without).mean()), weight * -tokens[mask].mean()

    same, trl_same = likelihood_term(np.ones_like(mask_of("chosen")))
    assert same == pytest.approx(trl_same, rel=1e-12)
    ragged, trl_ragged = likelihood_term(mask_of("chosen"))
    assert ragged != pytest.approx(trl_ragged, rel=1e-2)


# ORPO (Hong et al. 2024, eq. 3 to 10) ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("coef", "eps"), [(0.1, 0.0), (1.0, 0.0), (0.5, 0.2), (0.0, 0.0)])
def test_orpo_is_the_likelihood_per_token_and_the_log_odds_ratio(coef: float, eps: float) -> None:
    def formula(values: Values) -> np.ndarray:
        chosen, rejected = (np.exp(sums(values, side) / lengths(side)) for side in ("chosen", "rejected"))
        ratio = np.log((chosen / (1 - chosen)) / (rejected / (1 - rejected)))
        return -np.log(chosen) + coef * smoothed(ratio, eps)

    assert_loss(lambda p: orpo.loss(orpo.Config(odds_coef=coef, label_smoothing=eps), p), formula)


def test_orpos_gradient_is_the_papers_closed_form() -> None:
    """∇ −log σ(log OR) = −δ (∇log P_w / (1 − P_w) − ∇log P_l / (1 − P_l)) with δ = 1 / (1 + odds_w / odds_l): the rarer the chosen answer
    beside the rejected one, the larger; always up for the chosen, down for the rejected."""
    values, coef = data(), 0.7
    policy = leaves(values)
    chosen, rejected = gradients(orpo.loss(orpo.Config(odds_coef=coef), pair(values, policy)), policy)
    p_w, p_l = (np.exp(sums(values, side) / lengths(side)) for side in ("chosen", "rejected"))
    delta = 1 / (1 + (p_w / (1 - p_w)) / (p_l / (1 - p_l)))
    for side, gradient, per_answer in (
        ("chosen", chosen, -1 - coef * delta / (1 - p_w)),
        ("rejected", rejected, coef * delta / (1 - p_l)),
    ):
        per_token = per_answer / lengths(side) / B  # each token of the mean, in the mean over pairs
        np.testing.assert_allclose(gradient, np.where(mask_of(side), per_token[:, None], 0.0), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_are_exact_for_rare_and_for_nearly_certain_answers(dtype: torch.dtype) -> None:
    logps = torch.tensor([-5000.0, -80.0, -1.0, -math.log(2), -0.5, -1e-3, -1e-5, 0.0], dtype=dtype, requires_grad=True)
    odds = orpo.log_odds(logps)
    odds.sum().backward()
    assert logps.grad is not None
    assert odds.isfinite().all()
    assert logps.grad.isfinite().all()
    x = logps.detach().double().numpy()[1:-1]
    np.testing.assert_allclose(odds.detach().numpy()[1:-1], logit(np.exp(x)), rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=1e-6)
    assert odds[0].item() == -5000.0
    assert odds[-1].item() == pytest.approx(-math.log(torch.finfo(dtype).eps), rel=1e-3)


# SLiC-HF (Zhao et al. 2023) and its hinge -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("delta", "coef"), [(1.0, 0.1), (10.0, 0.0), (0.0, 1.0)])
def test_slic_is_the_papers_loss(delta: float, coef: float) -> None:
    def formula(values: Values) -> np.ndarray:
        chosen, rejected = sums(values, "chosen"), sums(values, "rejected")
        return np.maximum(0, delta - chosen + rejected) - coef * chosen

    assert_loss(lambda p: slic.loss(slic.Config(delta=delta, nll_coef=coef), p), formula)


def test_the_hinge_is_zero_beyond_its_margin_and_falls_with_slope_one_before_it() -> None:
    margins = torch.tensor([-3.0, 0.0, 0.9, 1.1, 50.0], requires_grad=True)
    values = slic.hinge(margins)
    values.sum().backward()
    np.testing.assert_allclose(values.detach().numpy(), [4.0, 1.0, 0.1, 0.0, 0.0], atol=1e-6)
    assert margins.grad is not None
    assert margins.grad.tolist() == [-1.0, -1.0, -1.0, 0.0, 0.0]


def test_the_hinge_of_log_ratios_is_the_one_that_trl_and_rso_call_hinge_and_slic_does_not_use_the_reference() -> None:
    values, beta = data(), 0.1
    p = pair(values, leaves(values))
    chosen, rejected = ratios(values)
    norm = slic.hinge(beta * (p.chosen_ratio - p.rejected_ratio)).detach().numpy()
    np.testing.assert_allclose(norm, np.maximum(0, 1 - beta * (chosen - rejected)), rtol=1e-12)
    without = dataclasses.replace(p, reference_chosen=None, reference_rejected=None)
    ours = slic.loss(slic.Config(), without).values.detach().numpy()
    np.testing.assert_array_equal(ours, slic.loss(slic.Config(), p).values.detach().numpy())


# CoPG (Flet-Berliac et al. 2024) ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_copg_is_the_papers_loss_with_half_of_beta_inside(beta: float) -> None:
    def formula(values: Values) -> np.ndarray:
        first, second = ratios(values)
        r_first, r_second = SCORES[0] - beta / 2 * first, SCORES[1] - beta / 2 * second
        return -((r_first - r_second) * first + (r_second - r_first) * second)

    assert_loss(lambda p: copg.loss(copg.Config(beta=beta), scored(p)), formula)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_copgs_gradient_weighs_each_answer_by_its_regularised_score_against_the_others(beta: float) -> None:
    values = data()
    policy = leaves(values)
    first, second = gradients(copg.loss(copg.Config(beta=beta), scored(pair(values, policy))), policy)
    ratio = ratios(values)
    advantage = (SCORES[0] - beta * ratio[0]) - (SCORES[1] - beta * ratio[1])
    np.testing.assert_allclose(-first * B, np.where(mask_of("chosen"), advantage[:, None], 0.0), rtol=1e-12)
    np.testing.assert_allclose(-second * B, np.where(mask_of("rejected"), -advantage[:, None], 0.0), rtol=1e-12)


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_copg_with_scores_of_plus_and_minus_a_quarter_has_beta_over_two_times_ipos_gradient(beta: float) -> None:
    """−ℓ = (β/2) (h − (R − R′)/β)² less a constant; it is IPO's square, aimed at 1/(2β), exactly when R − R′ = ½."""
    quarter = torch.full((B,), 0.25, dtype=torch.float64)

    def of_scores(scale: float) -> list[np.ndarray]:
        policy = leaves(data())
        p = dataclasses.replace(pair(data(), policy), chosen_score=scale * quarter, rejected_score=-scale * quarter)
        return gradients(copg.loss(copg.Config(beta=beta), p), policy)

    policy = leaves(data())
    wanted = [beta / 2 * g for g in gradients(ipo.loss(ipo.Config(beta=beta), pair(data(), policy)), policy)]
    for ours, theirs, other in zip(of_scores(1.0), wanted, of_scores(4.0), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)
        assert not np.allclose(other, theirs, rtol=1e-3)


def test_copg_does_not_care_which_answer_stands_first() -> None:
    p = scored(pair(data(), leaves(data())))
    swapped = PairLogps(
        p.rejected,
        p.chosen,
        p.reference_rejected,
        p.reference_chosen,
        p.margin,
        chosen_score=p.rejected_score,
        rejected_score=p.chosen_score,
    )
    one, other = (copg.loss(copg.Config(), x) for x in (p, swapped))
    np.testing.assert_allclose(one.values.detach().numpy(), other.values.detach().numpy(), rtol=1e-14)
    for name in ("rewards/accuracies", "rewards/residual"):
        left, right = one.metrics[name], other.metrics[name]
        for a, b in zip(left if isinstance(left, tuple) else (left,), right if isinstance(right, tuple) else (right,), strict=True):
            np.testing.assert_allclose(a.detach().numpy(), b.detach().numpy(), rtol=1e-12)


def test_copg_counts_accuracy_by_the_scores_and_leaves_ties_out() -> None:
    values = data()
    accuracy = copg.loss(copg.Config(), scored(pair(values, leaves(values)))).metrics["rewards/accuracies"]
    assert isinstance(accuracy, tuple)
    first, second = ratios(values)
    np.testing.assert_array_equal(accuracy[1].numpy(), [True, True, True, False, True])
    keep = accuracy[1].numpy()
    np.testing.assert_array_equal(accuracy[0].numpy()[keep], ((first > second) == (SCORES[0] > SCORES[1]))[keep])


# What all of them keep --------------------------------------------------------------------------------------------------------------------

ALL: dict[str, Callable[[PairLogps], Losses]] = {
    "ipo": lambda p: ipo.loss(ipo.Config(), p),
    "ipo length-normalised": lambda p: ipo.loss(ipo.Config(length_normalized=True), p),
    **{
        f"f-dpo {name}": lambda p, o=options: f_dpo.loss(f_dpo.Config(**o), p)
        for name, (options, _) in zip(NAMES, DIVERGENCES, strict=True)
    },
    "rpo": lambda p: rpo.loss(rpo.Config(), p),
    "rpo per token": lambda p: rpo.loss(rpo.Config(nll_per_token=True), p),
    "cpo": lambda p: cpo.loss(cpo.Config(), p),
    "orpo": lambda p: orpo.loss(orpo.Config(), p),
    "slic": lambda p: slic.loss(slic.Config(), p),
    "copg": lambda p: copg.loss(copg.Config(), p),
}


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", ALL)
def test_what_stands_behind_an_answers_end_changes_neither_loss_nor_gradient(name: str, rubbish: float) -> None:
    found = []
    for fill in (0.0, rubbish):
        values = data()
        for side in LENGTHS:
            for key in (side, f"ref_{side}"):
                values[key] = np.where(mask_of(side), values[key], fill)
        policy = leaves(values)
        losses = ALL[name](scored(pair(values, policy)))
        metrics = [value[0] if isinstance(value, tuple) else value for value in losses.metrics.values()]
        found.append([losses.values.tolist(), [m.tolist() for m in metrics], *(g.tolist() for g in gradients(losses, policy))])
    assert found[0] == found[1]


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize("name", ALL)
def test_parts_of_a_batch_add_up_to_the_whole(name: str, parts: int) -> None:
    p = scored(pair(data(), leaves(data())))

    def cut(value: Any, rows: slice) -> Any:
        if isinstance(value, AnswerLogps):
            return AnswerLogps(value.tokens[rows], value.mask[rows])
        return value[rows] if isinstance(value, Tensor) else value

    def loss_of(rows: slice) -> float:
        part = PairLogps(**{field.name: cut(getattr(p, field.name), rows) for field in dataclasses.fields(p)})
        return total(ALL[name](part), Denominators(B, 1)).item()

    edges = np.linspace(0, B, parts + 1).astype(int)
    assert sum(loss_of(slice(a, b)) for a, b in itertools.pairwise(edges)) == pytest.approx(loss_of(slice(0, B)), rel=1e-12)
