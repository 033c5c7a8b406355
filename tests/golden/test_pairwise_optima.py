"""Where the offline pairwise methods end on bandits, against optima computed without learning or equations derived by hand.

Notation: μ is the policy that wrote the answers, P[a, b] the probability that a is preferred to b, c(a) = 2 μ(a) Σ_b μ(b) P[a, b] the
probability that the chosen answer of a pair is a. By `exact_pairs`, a pair (chosen a, rejected b) has probability 2 μ(a) μ(b) P[a, b].

SLiC-HF, ORPO and CPO with its likelihood maximise no stated objective over policies. SLiC-HF is tested on its margin (the hinge's minimum
on two responses), ORPO on the root of its stationary equation on two responses, CPO on the optimum of DPO with a uniform reference and,
with its likelihood, on its stationary equation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.special import expit
from torch import Tensor

from telos.algorithms.language import copg, cpo, dpo, f_dpo, ipo, orpo, rpo, slic
from telos.core.seeds import numpy_generator
from telos.environments.bandit import Bandit, BanditPairs, Fit, TabularPolicy, fit, random_bandit, rock_paper_scissors, total_variation
from telos.functional.divergences import CHI_SQUARED, by_name
from telos.functional.equilibria import f_optimum
from telos.functional.pairwise import PairLogps
from telos.functional.reduction import Losses

SEEDS = range(3)


def tilted(reference: Any, exponent: Any) -> np.ndarray:
    """∝ reference · exp(exponent), written out."""
    exponent = np.asarray(exponent)
    weights = np.asarray(reference) * np.exp(exponent - exponent.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def distance(policy: TabularPolicy | Tensor, other: Any) -> float:
    """The largest total variation over contexts."""
    return float(total_variation(policy if isinstance(policy, Tensor) else policy.probs(), torch.as_tensor(other)).max())


def expected(loss: Callable[[PairLogps], Losses], bandit: Bandit, log_probs: Tensor, pairs: BanditPairs | None = None) -> Tensor:
    """The loss in exact expectation over pairs."""
    pairs = bandit.exact_pairs() if pairs is None else pairs
    batch = bandit.pair_batch(log_probs, pairs)
    if bandit.reward is not None:
        scores = bandit.reward[pairs.context, pairs.chosen], bandit.reward[pairs.context, pairs.rejected]
        batch = dataclasses.replace(batch, chosen_score=scores[0], rejected_score=scores[1])
    return (pairs.weight * loss(batch).values).sum()


def minimise(
    loss: Callable[[PairLogps], Losses], bandit: Bandit, start: Tensor | None = None, steps: int = 500
) -> tuple[TabularPolicy, Fit]:
    policy = TabularPolicy(bandit.reference if start is None else start)
    return policy, fit(policy, lambda log_probs: expected(loss, bandit, log_probs), steps=steps)


def other_policy(bandit: Bandit, seed: int, spread: float = 1.0) -> Tensor:
    """A random policy of full support that has nothing to do with the reference."""
    logits = numpy_generator(seed, "test", "behaviour").normal(size=tuple(bandit.reference.shape))
    return torch.softmax(spread * torch.from_numpy(logits), -1)


# IPO --------------------------------------------------------------------------------------------------------------------------------------


def ipo_optimum(bandit: Bandit, beta: float) -> np.ndarray:
    """argmax E_π[P(y ≻ μ)] − β KL(π‖ref). The expected gradient of IPO's loss in log π(a) is 4 μ(a) (g(a) − E_μ g − (P(a ≻ μ) − ½)/β), with
    g = log π/ref: it is 0 everywhere exactly when g is P(a ≻ μ)/β up to a constant."""
    wins = np.einsum("cab,cb->ca", bandit.preference.numpy(), bandit.behaviour.numpy())
    return tilted(bandit.reference.numpy(), wins / beta)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("preference", ["bradley-terry", "intransitive"])
def test_ipo_reaches_the_most_wins_against_the_answers_policy_for_general_preferences(preference: Any, beta: float, seed: int) -> None:
    drawn = random_bandit(3, 5, seed, preference=preference)
    bandit = dataclasses.replace(drawn, behaviour=other_policy(drawn, seed))
    policy, result = minimise(lambda p: ipo.loss(ipo.Config(beta=beta), p), bandit)
    assert result.gradient < 1e-6
    assert distance(policy, ipo_optimum(bandit, beta)) < 1e-6
    assert distance(bandit.reference, ipo_optimum(bandit, beta)) > 0.02, "there was something to learn"
    assert distance(policy, ipo_optimum(drawn, beta)) > 1e-3, "it is this μ against which wins are counted"


def test_ipo_on_rock_paper_scissors_favours_what_beats_the_reference() -> None:
    """Against (½, 0.3, 0.2), paper wins most: 0.5·0.8 + 0.3·0.5 + 0.2·0.2 = 0.59, rock 0.25 + 0.06 + 0.16 = 0.47, scissors 0.1 + 0.24 +
    0.1 = 0.44."""
    bandit = rock_paper_scissors()
    policy, _ = minimise(lambda p: ipo.loss(ipo.Config(beta=0.1), p), bandit)
    assert distance(policy, tilted([[0.5, 0.3, 0.2]], np.array([[0.47, 0.59, 0.44]]) / 0.1)) < 1e-6


def test_ipo_keeps_its_regularisation_when_preferences_are_certain_and_dpo_loses_it() -> None:
    reference = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    certain = torch.triu(torch.ones(3, 3, dtype=torch.float64), 1) + 0.5 * torch.eye(3, dtype=torch.float64)
    bandit = Bandit(reference, reference, certain[None])
    policy, result = minimise(lambda p: ipo.loss(ipo.Config(beta=1.0), p), bandit)
    assert result.gradient < 1e-9
    assert distance(policy, ipo_optimum(bandit, 1.0)) < 1e-6
    assert float(policy.probs().max()) < 0.7
    unbounded, _ = minimise(lambda p: dpo.loss(dpo.Config(beta=1.0), p), bandit)
    assert float(unbounded.probs()[0, 0]) > 0.999


# f-DPO ------------------------------------------------------------------------------------------------------------------------------------

DIVERGENCES = [
    {"divergence": "reverse-kl"},
    {"divergence": "forward-kl"},
    {"divergence": "jensen-shannon"},
    {"divergence": "alpha", "alpha": 0.3},
    {"divergence": "alpha", "alpha": 0.7},
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.5, 2.0])
@pytest.mark.parametrize("options", DIVERGENCES, ids=lambda options: " ".join(map(str, options.values())))
def test_f_dpo_reaches_its_own_divergences_optimum_and_no_others(options: dict[str, Any], beta: float, seed: int) -> None:
    bandit = random_bandit(2, 4, seed)
    config = f_dpo.Config(beta=beta, **options)
    policy, result = minimise(lambda p: f_dpo.loss(config, p), bandit)
    assert result.gradient < 1e-7
    assert distance(policy, f_optimum(bandit.reward, bandit.reference, beta, by_name(config.divergence, config.alpha))) < 1e-4
    for other in DIVERGENCES:
        if other != options:
            apart = f_optimum(bandit.reward, bandit.reference, beta, by_name(other["divergence"], other.get("alpha", 0.5)))
            assert distance(policy, apart) > 1e-3


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_the_f_dpo_loss_misses_an_optimum_that_gives_some_responses_no_probability(seed: int) -> None:
    """Chi-squared has f′(0) = −2. Where its optimum drops poor responses but keeps several, the margin β (f′(u_w) − f′(u_l)) that
    Bradley-Terry asks of the dropped ones lies below what f′ can reach, and the loss trades it against the margins of those that stay.
    With a β so large that the optimum drops none, the loss does reach it. This is why the option is not offered."""
    bandit = random_bandit(2, 4, seed)

    def minimum(beta: float, start: Tensor | None = None) -> TabularPolicy:
        def loss(p: PairLogps) -> Losses:
            chosen, rejected = (beta * f_dpo.derivative(CHI_SQUARED, 0.0, ratio) for ratio in (p.chosen_ratio, p.rejected_ratio))
            return Losses(-torch.nn.functional.logsigmoid(chosen - rejected))

        return minimise(loss, bandit, start, steps=200)[0]

    sparse, dense = (f_optimum(bandit.reward, bandit.reference, beta, CHI_SQUARED) for beta in (0.1, 3.0))
    assert (sparse == 0).any()
    assert distance(minimum(0.1), sparse) > 0.02
    start = np.maximum(sparse, 1e-9)  # nor does the optimum hold when it is the start
    assert distance(minimum(0.1, torch.from_numpy(start / start.sum(-1, keepdims=True))), sparse) > 0.02
    assert (dense > 0).all()
    assert distance(minimum(3.0), dense) < 1e-6


# RPO --------------------------------------------------------------------------------------------------------------------------------------


def chosen_answers(bandit: Bandit) -> np.ndarray:
    """c [C, A]."""
    mu = bandit.behaviour.numpy()
    return 2 * mu * np.einsum("cab,cb->ca", bandit.preference.numpy(), mu)


def preference_gradient(bandit: Bandit, rewards: np.ndarray) -> np.ndarray:
    """2 μ(a) Σ_b μ(b) (σ(r̂(a) − r̂(b)) − P[a, b]): the logistic loss's gradient in the implicit rewards r̂ [C, A], in each context."""
    mu = bandit.behaviour.numpy()
    error = expit(rewards[..., :, None] - rewards[..., None, :]) - bandit.preference.numpy()
    return 2 * mu * np.einsum("cab,cb->ca", error, mu)


@pytest.mark.parametrize("seed", SEEDS)
def test_rpo_of_weight_zero_reaches_dpos_optimum_under_full_coverage(seed: int) -> None:
    bandit, beta = random_bandit(3, 5, seed), 0.5
    assert bandit.reward is not None
    policy, result = minimise(lambda p: rpo.loss(rpo.Config(beta=beta, eta=0.0), p), bandit)
    assert result.gradient < 1e-7
    assert distance(policy, tilted(bandit.reference, bandit.reward.numpy() / beta)) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("coverage", ["full", "partial"])
@pytest.mark.parametrize("eta", [0.05, 0.5])
def test_rpo_ends_where_the_preferences_pull_balances_that_of_the_chosen_answers(eta: float, coverage: Any, seed: int) -> None:
    """The gradient in the logit of a is β · 2 μ(a) Σ_b μ(b) (σ(m_ab) − P[a, b]) + η β (π(a) − c(a)): β divides out."""
    bandit, beta = random_bandit(3, 5, seed, coverage=coverage), 0.5
    policy, _ = minimise(lambda p: rpo.loss(rpo.Config(beta=beta, eta=eta), p), bandit)
    pi = policy.probs().numpy()
    rewards = beta * (policy.log_probs().detach().numpy() - bandit.reference.log().numpy())
    balance = preference_gradient(bandit, rewards) + eta * (pi - chosen_answers(bandit))
    np.testing.assert_allclose(balance, 0.0, atol=1e-6)
    covered = bandit.covered.numpy()
    assert (np.abs(preference_gradient(bandit, rewards))[covered] > 1e-4).any(), "neither side of the balance is zero by itself"
    # Where the data say nothing, the equation reads η π(a) = 0: all mass is on answers that the data show.
    assert pi[~covered].sum() < 1e-5
    np.testing.assert_allclose(np.where(covered, pi, 0.0).sum(-1), 1.0, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_under_partial_coverage_dpo_lets_the_chosen_answers_collapse_and_rpo_does_not(seed: int) -> None:
    """DPO's loss is the same however much mass has left the answers of the data, by the same factor for all: margins do not see it. From
    a policy that has lost them, DPO's minimum leaves them lost; RPO's loss falls by η β for each nat that they regain, and its minimum
    gives all back."""
    bandit, beta, eta = random_bandit(2, 6, seed, coverage="partial"), 0.5, 0.2
    chosen = torch.from_numpy(chosen_answers(bandit))

    def left_with(mass: float) -> Tensor:
        inside = bandit.reference * bandit.covered
        outside = bandit.reference * ~bandit.covered
        return mass * inside / inside.sum(-1, keepdim=True) + (1 - mass) * outside / outside.sum(-1, keepdim=True)

    def chosen_logp(policy: Tensor) -> float:
        return float((chosen * policy.clamp(min=1e-300).log()).sum(-1).mean())

    of_dpo, of_rpo = (
        [expected(loss, bandit, left_with(mass).log()).item() for mass in (0.9, 0.9 * np.exp(-1), 0.9 * np.exp(-20))]
        for loss in (lambda p: dpo.loss(dpo.Config(beta=beta), p), lambda p: rpo.loss(rpo.Config(beta=beta, eta=eta), p))
    )
    np.testing.assert_allclose(of_dpo, of_dpo[0], rtol=1e-12)
    np.testing.assert_allclose(np.diff(of_rpo), [eta * beta, 19 * eta * beta], rtol=1e-9)

    collapsed = left_with(0.001)
    by_dpo, result = minimise(lambda p: dpo.loss(dpo.Config(beta=beta), p), bandit, start=collapsed)
    assert result.gradient < 1e-8, "it is a minimum of DPO's loss"
    by_rpo, _ = minimise(lambda p: rpo.loss(rpo.Config(beta=beta, eta=eta), p), bandit, start=collapsed)
    assert chosen_logp(by_dpo.probs()) < np.log(0.02)
    assert chosen_logp(by_rpo.probs()) > chosen_logp(bandit.reference)
    from_reference, _ = minimise(lambda p: rpo.loss(rpo.Config(beta=beta, eta=eta), p), bandit)
    assert distance(by_rpo, from_reference.probs()) < 1e-4, "RPO's minimum is one policy, wherever it starts"


# CPO, ORPO, SLiC-HF -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_cpo_without_its_likelihood_reaches_the_optimum_of_a_uniform_reference(seed: int) -> None:
    drawn, beta = random_bandit(3, 5, seed), 0.5
    assert drawn.reward is not None
    bandit = dataclasses.replace(drawn, behaviour=other_policy(drawn, seed))
    policy, result = minimise(lambda p: cpo.loss(cpo.Config(beta=beta, nll_coef=0.0), p), bandit)
    assert result.gradient < 1e-7
    assert distance(policy, tilted(np.ones((3, 5)), drawn.reward.numpy() / beta)) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("coef", [0.1, 1.0])
def test_cpo_ends_where_the_preferences_pull_balances_that_of_the_chosen_answers(coef: float, seed: int) -> None:
    bandit, beta = random_bandit(3, 5, seed), 0.5
    policy, _ = minimise(lambda p: cpo.loss(cpo.Config(beta=beta, nll_coef=coef), p), bandit)
    rewards = beta * policy.log_probs().detach().numpy()
    balance = beta * preference_gradient(bandit, rewards) + coef * (policy.probs().numpy() - chosen_answers(bandit))
    np.testing.assert_allclose(balance, 0.0, atol=1e-7)


def two_responses(q: float, mu: float = 0.4) -> Bandit:
    """Response 0 is preferred with probability q and written with probability `mu`."""
    preference = torch.tensor([[[0.5, q], [1 - q, 0.5]]], dtype=torch.float64)
    behaviour = torch.tensor([[mu, 1 - mu]], dtype=torch.float64)
    return Bandit(torch.tensor([[0.5, 0.5]], dtype=torch.float64), behaviour, preference)


@pytest.mark.parametrize("q", [0.2, 0.6, 0.95])
@pytest.mark.parametrize("coef", [0.0, 0.1, 1.0, 10.0])
def test_orpo_on_two_responses_ends_at_the_root_of_its_stationary_equation(coef: float, q: float) -> None:
    """With z the log-odds of response 0 the odds ratio of the two is e^{2z}, and the gradient in z is σ(z) − c(0) + λ 4 μ(0) μ(1) (σ(2z)
    − q)."""
    bandit, mu = two_responses(q), 0.4
    c = 2 * mu * (0.5 * mu + (1 - mu) * q)
    root = brentq(lambda z: expit(z) - c + coef * 4 * mu * (1 - mu) * (expit(2 * z) - q), -30, 30, xtol=1e-13)
    policy, result = minimise(lambda p: orpo.loss(orpo.Config(odds_coef=coef), p), bandit)
    assert result.gradient < 1e-9
    assert float(policy.probs()[0, 0]) == pytest.approx(float(expit(root)), abs=1e-8)
    # Alone, the likelihood ends at the share of chosen answers and the odds ratio at half the log-odds of winning.
    if coef == 0:
        assert root == pytest.approx(np.log(c / (1 - c)))
    if coef == 10:
        assert expit(2 * root) == pytest.approx(q, abs=0.03)


@pytest.mark.parametrize("delta", [0.5, 2.0])
@pytest.mark.parametrize(("q", "sign"), [(0.7, 1), (0.95, 1), (0.2, -1)])
def test_slic_on_two_responses_ends_at_its_margin_however_sure_the_preference(q: float, sign: int, delta: float) -> None:
    """Between −δ and δ the hinge falls at the rate 2q − 1 towards the winner, beyond δ it rises: the minimum is the corner at ±δ, where a
    small likelihood term leaves it. Bradley-Terry's log-odds, at which a logistic loss would end, play no part."""
    bandit = two_responses(q)
    config = slic.Config(delta=delta, nll_coef=0.01)

    def value(z: float) -> float:
        log_probs = torch.log_softmax(torch.tensor([[z, 0.0]], dtype=torch.float64), -1)
        return expected(lambda p: slic.loss(config, p), bandit, log_probs).item()

    found = minimize_scalar(value, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9})
    assert found.x == pytest.approx(sign * delta, abs=1e-5)
    assert abs(np.log(q / (1 - q))) != pytest.approx(delta, abs=0.1)


def test_slic_has_neither_loss_nor_gradient_once_every_pair_keeps_its_margin() -> None:
    bandit = two_responses(1.0)
    pairs = bandit.exact_pairs()
    distinct = pairs.chosen != pairs.rejected
    pairs = BanditPairs(*(field[distinct] for field in pairs))
    for z, active in ((0.99, True), (1.01, False), (40.0, False)):
        log_probs = torch.log_softmax(torch.tensor([[z, 0.0]], dtype=torch.float64), -1).requires_grad_()
        loss = expected(lambda p: slic.loss(slic.Config(nll_coef=0.0), p), bandit, log_probs, pairs)
        loss.backward()
        assert log_probs.grad is not None
        assert (loss.item() > 0) == active == bool((log_probs.grad != 0).any())


# CoPG -------------------------------------------------------------------------------------------------------------------------------------


def far_away(bandit: Bandit) -> Tensor:
    """Answers from a policy that has turned the optimum upside down: the better a response, the rarer it is."""
    assert bandit.reward is not None
    return torch.softmax(-1.5 * bandit.reward - bandit.reference.log(), -1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("behaviour", ["reference", "another", "upside down"])
def test_copg_reaches_the_regularised_optimum_from_data_of_any_policy(behaviour: str, beta: float, seed: int) -> None:
    drawn = random_bandit(3, 5, seed)
    assert drawn.reward is not None
    mu = {"reference": drawn.reference, "another": other_policy(drawn, seed, 2.0), "upside down": far_away(drawn)}[behaviour]
    bandit = dataclasses.replace(drawn, behaviour=mu)
    policy, result = minimise(lambda p: copg.loss(copg.Config(beta=beta), p), bandit)
    assert result.gradient < 1e-8
    assert distance(policy, tilted(drawn.reference, drawn.reward.numpy() / beta)) < 1e-4


def test_copg_needs_scores_not_labels_and_so_no_preference_behind_them() -> None:
    """The reward stands beside an unrelated, intransitive preference: which answer is called chosen does not matter."""
    scores, labels = random_bandit(2, 4, 0), random_bandit(2, 4, 1, preference="intransitive")
    bandit = dataclasses.replace(labels, reward=scores.reward)
    policy, _ = minimise(lambda p: copg.loss(copg.Config(beta=0.5), p), bandit)
    assert scores.reward is not None
    assert distance(policy, tilted(bandit.reference, scores.reward.numpy() / 0.5)) < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_plain_off_policy_gradient_misses_the_optimum_that_copg_finds_on_the_same_data(seed: int) -> None:
    """Plain: Σ_y μ(y) R_β(y) ∇log π(y), the policy gradient's formula on answers of μ without importance weights. At the optimum R_β is
    the constant β log Z, and what is left of the plain gradient is β log Z (μ − π*), which is not 0; the baseline E_μ[R_β], which CoPG's
    pairs supply, takes it away."""
    drawn, beta = random_bandit(2, 4, seed), 1.0
    assert drawn.reward is not None
    reward = drawn.reward + 1.0
    bandit = dataclasses.replace(drawn, behaviour=far_away(drawn), reward=reward)
    mu, optimum = bandit.behaviour, torch.from_numpy(tilted(drawn.reference, drawn.reward.numpy() / beta))

    def regularised(log_probs: Tensor) -> Tensor:
        return (reward - beta * (log_probs - bandit.reference.log())).detach()

    def off_policy(with_baseline: bool) -> Callable[[Tensor], Tensor]:
        def loss(log_probs: Tensor) -> Tensor:
            advantage = regularised(log_probs)
            if with_baseline:
                advantage = advantage - (mu * advantage).sum(-1, keepdim=True)
            return -(mu * advantage * log_probs).sum(-1).mean()

        return loss

    logits = optimum.log().requires_grad_()
    off_policy(False)(torch.log_softmax(logits, -1)).backward()
    log_z = torch.logsumexp(bandit.reference.log() + reward / beta, -1, keepdim=True)
    assert logits.grad is not None
    np.testing.assert_allclose(-logits.grad.numpy() * bandit.contexts, (beta * log_z * (mu - optimum)).numpy(), rtol=1e-9)

    ends = {}
    for with_baseline in (False, True):
        policy = TabularPolicy(bandit.reference)
        fit(policy, off_policy(with_baseline), steps=1200, learning_rate=0.03, optimiser="adam")
        ends[with_baseline] = distance(policy, optimum)
    by_copg, _ = minimise(lambda p: copg.loss(copg.Config(beta=beta), p), bandit)
    assert distance(by_copg, optimum) < 1e-5
    assert ends[True] < 0.01, "the baseline is what it takes"
    assert ends[False] > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_on_policy_copgs_gradient_is_twice_the_regularised_policy_gradient(seed: int) -> None:
    """In exact expectation over two independent answers of π itself: the other answer's R_β is a baseline, so it adds no bias."""
    bandit, beta = random_bandit(3, 5, seed), 0.4
    assert bandit.reward is not None
    start = other_policy(bandit, seed)
    by_copg, by_objective = (TabularPolicy(start) for _ in range(2))
    expected(lambda p: copg.loss(copg.Config(beta=beta), p), bandit, by_copg.log_probs(), bandit.exact_pairs(start)).backward()
    log_probs = by_objective.log_probs()
    (log_probs.exp() * (bandit.reward - beta * (log_probs - bandit.reference.log()))).sum(-1).mean().backward()
    assert by_copg.logits.grad is not None
    assert by_objective.logits.grad is not None
    assert float(by_objective.logits.grad.abs().max()) > 1e-3
    np.testing.assert_allclose(-by_copg.logits.grad.numpy(), 2 * by_objective.logits.grad.numpy(), rtol=1e-9, atol=1e-15)
