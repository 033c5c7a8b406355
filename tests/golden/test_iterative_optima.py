"""Where the iterative methods go on bandits, against equilibria computed without learning and updates written in closed form.

All is in exact expectation: every pair of answers of the policy π_t has its probability and the label of the preference matrix (`exact_pairs`), every
answer its probability. An iteration is solved by minimising the method's own loss; what the loop adds (sampling, estimates of win rates) is in the tests of
the loop and, for RSO and best-of-n, in the sampled tests here.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import chisquare, kstest
from torch import Tensor

from telos.algorithms.language import apo, dno, dpa, inpo, nash_md, online_dpo, rejection_sampling_sft, rso, sppo
from telos.core.seeds import numpy_generator
from telos.environments.bandit import Bandit, BanditPairs, TabularPolicy, fit, random_bandit, rock_paper_scissors, total_variation
from telos.functional.equilibria import exploitability, kl_optimum, nash, regularised_gap, regularised_nash
from telos.functional.pairwise import AnswerLogps, LabelledLogps, PairLogps
from telos.functional.reduction import Losses
from telos.objectives.judges import Judged, bradley_terry

PairLoss = Callable[[PairLogps], Losses]
SEEDS = range(3)


def wins_against(bandit: Bandit, policy: Tensor) -> Tensor:
    """P(a ≻ π), [C, A]."""
    return torch.einsum("cab,cb->ca", bandit.preference, policy)


def tilted(policy: Tensor, exponent: Tensor) -> Tensor:
    """∝ policy · exp(exponent), written out."""
    weights = policy * (exponent - exponent.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


def distance(policy: Tensor, other: Any) -> float:
    """The largest total variation over contexts."""
    return float(total_variation(policy, torch.as_tensor(other)).max())


def iterate(loss: PairLoss, bandit: Bandit, current: Tensor, steps: int = 200) -> TabularPolicy:
    """The minimum of `loss` over pairs of the policy `current` [C, A], which is its anchor; win rates against it are the scores."""
    pairs, rates = bandit.exact_pairs(current), wins_against(bandit, current)
    start = bandit.pair_batch(current.log(), pairs)

    def value(log_probs: Tensor) -> Tensor:
        view = dataclasses.replace(
            bandit.pair_batch(log_probs, pairs),
            anchor_chosen=start.chosen,
            anchor_rejected=start.rejected,
            chosen_score=rates[pairs.context, pairs.chosen],
            rejected_score=rates[pairs.context, pairs.rejected],
        )
        return (pairs.weight * loss(view).values).sum()

    policy = TabularPolicy(current)
    fit(policy, value, steps=steps)
    return policy


def answer_view(log_probs: Tensor, reference: Tensor | None = None, score: Tensor | None = None) -> LabelledLogps:
    """Every response of every context as a single answer of one token."""
    mask = torch.ones(log_probs.numel(), 1, dtype=torch.bool)
    answers = [None if x is None else AnswerLogps(x.reshape(-1, 1), mask) for x in (log_probs, reference)]
    assert answers[0] is not None
    return LabelledLogps(answers[0], answers[1], None, None if score is None else score.flatten())


def cyclic(seed: int) -> Bandit:
    return random_bandit(2, 4, seed, preference="intransitive")


# DNO --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_an_iteration_of_dno_is_the_multiplicative_weights_update(seed: int) -> None:
    bandit, eta = cyclic(seed), 0.3
    config = dno.Config(eta=eta)
    found = iterate(functools.partial(dno.loss, config), bandit, bandit.reference)
    wanted = tilted(bandit.reference, wins_against(bandit, bandit.reference) / eta)
    assert distance(found.probs(), wanted) < 1e-6
    assert distance(bandit.reference, wanted) > 0.05, "there was something to learn"


@pytest.mark.parametrize(("bandit", "scale"), [(rock_paper_scissors(advantages=(0.4, 0.2, 0.3)), 0.3), (cyclic(0), 0.15)])
def test_dnos_average_goes_to_the_nash_equilibrium_and_its_last_iterate_does_not(bandit: Bandit, scale: float) -> None:
    """Steps 1/η_t of the size of 1/√t. The average of the iterates, weighted by them, has at most twice the regret of exponential weights:
    a duality gap below 2 (log 1/min π_1 + Σ η_t⁻²/8) / Σ η_t⁻¹."""
    current, iterates, steps = bandit.reference, [], []
    for t in range(1, 61):
        config = dno.Config(eta=scale * t**0.5)
        iterates.append(current)
        steps.append(1 / config.eta)
        current = iterate(functools.partial(dno.loss, config), bandit, current, steps=30).probs()
    weights = torch.tensor(steps, dtype=torch.float64)
    average = torch.einsum("t,tca->ca", weights / weights.sum(), torch.stack(iterates))
    gap = {name: exploitability(policy, bandit.preference).max() for name, policy in (("average", average), ("last", current))}
    proved = 2 * (-bandit.reference.log().min() + (weights**2).sum() / 8) / weights.sum()
    assert gap["average"] <= float(proved)
    assert gap["average"] < 0.03
    assert gap["last"] > 0.4
    if bandit.responses == 3:  # where the equilibrium is known to be the only one
        assert distance(average, nash(bandit.preference)) < 0.03
        assert distance(bandit.reference, nash(bandit.preference)) > 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_every_iteration_of_dno_wins_against_the_one_before_by_the_stated_amount(seed: int) -> None:
    bandit, eta = cyclic(seed), 0.2
    config, current = dno.Config(eta=eta), bandit.reference
    for _ in range(8):
        after = iterate(functools.partial(dno.loss, config), bandit, current).probs()
        won = (after * wins_against(bandit, current)).sum(-1)
        moved = (after * (after / current).log()).sum(-1)
        assert (won >= 0.5 + eta * moved - 1e-9).all()
        assert won.max() > 0.5 + 1e-4
        current = after


def test_dnos_hard_labels_are_dpos_loss_against_the_last_iterate() -> None:
    """Eq. 13: at its optimum over all pairs with labels of the matrix, η times the log-ratio is the logit of the preference."""
    bandit, eta = random_bandit(2, 4, 5), 0.7
    assert bandit.reward is not None
    found = iterate(functools.partial(dno.loss, dno.Config(eta=eta, labels="hard")), bandit, bandit.reference)
    assert distance(found.probs(), tilted(bandit.reference, bandit.reward / eta)) < 1e-6


# INPO -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_an_iteration_of_inpo_is_the_mirror_descent_step(seed: int) -> None:
    bandit, config = cyclic(seed), inpo.Config(eta=0.8, tau=0.3)
    current = tilted(bandit.reference, torch.from_numpy(numpy_generator(seed, "test").normal(size=(2, 4))))
    found = iterate(functools.partial(inpo.loss, config), bandit, current)
    share = config.tau / config.eta
    wanted = tilted(bandit.reference**share * current ** (1 - share), wins_against(bandit, current) / config.eta)
    assert distance(found.probs(), wanted) < 1e-6
    assert distance(current, wanted) > 0.05


@pytest.mark.parametrize("seed", SEEDS)
def test_inpos_last_iterate_goes_to_the_regularised_equilibrium_and_its_gap_falls_all_the_way(seed: int) -> None:
    bandit, config = cyclic(seed), inpo.Config(eta=0.5, tau=0.2)
    wanted = regularised_nash(bandit.preference, bandit.reference, config.tau).policy
    current, gaps = bandit.reference, []
    for _ in range(25):
        gaps.append(regularised_gap(current, bandit.preference, bandit.reference, config.tau).max())
        current = iterate(functools.partial(inpo.loss, config), bandit, current).probs()
    assert distance(current, wanted) < 1e-4
    assert distance(bandit.reference, wanted) > 0.1
    assert all(after < before for before, after in itertools.pairwise(gaps))
    assert gaps[-1] < 1e-6 * gaps[0]


def test_inpo_without_regularisation_is_the_unregularised_update() -> None:
    bandit, config = cyclic(4), inpo.Config(eta=0.5, tau=0.0)
    found = iterate(functools.partial(inpo.loss, config), bandit, bandit.behaviour)
    assert distance(found.probs(), tilted(bandit.behaviour, wins_against(bandit, bandit.behaviour) / config.eta)) < 1e-6


# SPPO -------------------------------------------------------------------------------------------------------------------------------------


def test_sppos_loss_is_zero_at_the_multiplicative_weights_update_with_the_papers_partition_function() -> None:
    bandit, config = cyclic(0), sppo.Config(eta=1.5)
    current, rates = bandit.reference, wins_against(bandit, bandit.reference)
    pairs = bandit.exact_pairs(current)
    log_weights = (current.log() + config.eta * rates - config.eta / 2).requires_grad_()
    start = bandit.pair_batch(current.log(), pairs)
    view = dataclasses.replace(
        bandit.pair_batch(log_weights, pairs),
        anchor_chosen=start.chosen,
        anchor_rejected=start.rejected,
        chosen_score=rates[pairs.context, pairs.chosen],
        rejected_score=rates[pairs.context, pairs.rejected],
    )
    value = (pairs.weight * sppo.loss(config, view).values).sum()
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-20)
    assert log_weights.grad is not None
    assert float(log_weights.grad.abs().max()) < 1e-12


def sppo_minimum(current: np.ndarray, target: np.ndarray) -> np.ndarray:
    """argmin over distributions of Σ π_t (log π/π_t − target)²: log π/π_t = target − m π/π_t with m such that the sum is one, by nested bisection."""

    def policy(m: float) -> np.ndarray:
        # u = π/π_t solves log u + m u = target; the left side grows in u for the m that can occur here.
        u = [brentq(lambda u, t=t: np.log(u) + m * u - t, 1e-9, 50, xtol=1e-14) for t in target]
        return current * np.array(u)

    m = brentq(lambda m: policy(m).sum() - 1, -0.02, 2.0, xtol=1e-14)
    return policy(float(m))  # type: ignore[arg-type]


def test_sppos_policy_is_the_stated_minimum_and_differs_from_multiplicative_weights_in_third_order() -> None:
    bandit = cyclic(1)
    rates, errors = wins_against(bandit, bandit.reference), []
    for eta in (0.4, 0.8):
        found = iterate(functools.partial(sppo.loss, sppo.Config(eta=eta)), bandit, bandit.reference, steps=400)
        for c in range(bandit.contexts):
            wanted = sppo_minimum(bandit.reference[c].numpy(), eta * (rates[c].numpy() - 0.5))
            np.testing.assert_allclose(found.probs()[c].numpy(), wanted, atol=1e-7)
        errors.append(distance(found.probs(), tilted(bandit.reference, eta * rates)))
    assert errors[1] < 2e-3
    assert errors[1] / errors[0] == pytest.approx(8, rel=0.25), "twice the step, eight times the difference"


# Nash-MD ----------------------------------------------------------------------------------------------------------------------------------


def mixture(policy: Tensor, reference: Tensor, share: float) -> Tensor:
    weights = policy ** (1 - share) * reference**share
    return weights / weights.sum(-1, keepdim=True)


def advantage(config: nash_md.Config, bandit: Bandit, log_probs: Tensor, opponent: Tensor) -> Tensor:
    """[C, A]: minus the derivative of the loss of each answer in its log-probability."""
    leaf = log_probs.detach().requires_grad_()
    view = answer_view(leaf, bandit.reference.log(), wins_against(bandit, opponent))
    (gradient,) = torch.autograd.grad(nash_md.loss(config, view).values.sum(), leaf)
    return -gradient


def mirror_step(config: nash_md.Config, bandit: Bandit, policy: Tensor, eta: float, share: float) -> Tensor:
    opponent = mixture(policy, bandit.reference, share)
    return tilted(policy, eta * advantage(config, bandit, policy.log(), opponent))


def test_the_gradient_of_nash_md_is_the_preference_less_a_half_less_the_log_ratio() -> None:
    bandit, config = cyclic(0), nash_md.Config(tau=0.3)
    policy, opponent = bandit.reference.roll(1, 1), bandit.reference
    wanted = wins_against(bandit, opponent) - 0.5 - 0.3 * (policy / bandit.reference).log()
    torch.testing.assert_close(advantage(config, bandit, policy.log(), opponent), wanted)


def test_a_tokens_log_ratio_reaches_itself_and_earlier_tokens_only() -> None:
    tokens = torch.tensor([[-1.0, -2.0, -0.5, 9.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0, -0.5, 0.0]])
    mask = torch.tensor([[True, True, True, False]])
    view = LabelledLogps(AnswerLogps(tokens, mask), AnswerLogps(reference, mask), None, torch.tensor([0.75]))
    nash_md.loss(nash_md.Config(tau=0.1), view).values.sum().backward()
    # Ratios 0.5, −1 and 0; those still to come: −0.5, −1, 0.
    torch.testing.assert_close(tokens.grad, -torch.tensor([[0.25 + 0.05, 0.25 + 0.1, 0.25, 0.0]]))


@pytest.mark.parametrize("seed", SEEDS)
def test_mirror_steps_on_nash_mds_gradient_go_to_the_regularised_equilibrium_as_proved(seed: int) -> None:
    """Steps η_t = 2/(τ (t + 2)), mixtures of the share η_t τ: KL(π*‖π_T) ≤ 8/(τ² (T + 1))."""
    bandit, tau = cyclic(seed), 0.3
    wanted = torch.from_numpy(regularised_nash(bandit.preference, bandit.reference, tau).policy)
    policy, config = bandit.behaviour.roll(1, 1), nash_md.Config(tau=tau)
    distances = {}
    for t in range(2000):
        eta = 2 / (tau * (t + 2))
        policy = mirror_step(config, bandit, policy, eta, eta * tau)
        kl = float((wanted * (wanted / policy).log()).sum(-1).max())
        assert kl <= 8 / (tau**2 * (t + 2))
        distances[t] = distance(policy, wanted)
    assert distances[1999] < 1e-3
    assert distances[1999] < distances[199] / 5


def test_self_play_circles_where_nash_md_settles() -> None:
    """Symmetric rock-paper-scissors with a uniform reference: the equilibrium is uniform for every τ, and a mirror step's linearisation there has the
    eigenvalues 1 − ητ ± iησ in self-play (σ = √3 a/3 for the advantage a) and (1 − ητ)(1 ± iησ) against the mixture. η between the two thresholds."""
    advantage_, tau = 0.4, 0.05
    bandit = rock_paper_scissors(advantages=(advantage_,) * 3, reference=(1 / 3, 1 / 3, 1 / 3))
    sigma, eta = 3**0.5 * advantage_ / 3, 2.0
    assert abs(complex(1 - eta * tau, eta * sigma)) > 1.01
    assert abs((1 - eta * tau) * complex(1, eta * sigma)) < 0.992
    config, start = nash_md.Config(tau=tau), torch.tensor([[0.4, 0.35, 0.25]], dtype=torch.float64)
    ends = {}
    for share in (0.0, eta * tau):
        policy = start
        for _ in range(1500):
            policy = mirror_step(config, bandit, policy, eta, share)
        ends[share] = distance(policy, bandit.reference)
    assert ends[eta * tau] < 1e-5
    assert ends[0.0] > 0.1 > distance(start, bandit.reference)


def climb(config: nash_md.Config, bandit: Bandit, opponent: Callable[[Tensor], Tensor], rate: float, steps: int) -> Tensor:
    """Gradient descent on the expected loss of answers of π, the opponent taken as fixed."""
    policy = TabularPolicy(bandit.reference)
    for _ in range(steps):
        log_probs = policy.log_probs()
        score = wins_against(bandit, opponent(log_probs.detach().exp()))
        weight = log_probs.detach().exp().flatten()
        (gradient,) = torch.autograd.grad(
            (weight * nash_md.loss(config, answer_view(log_probs, bandit.reference.log(), score)).values).sum(), policy.logits
        )
        with torch.no_grad():
            policy.logits -= rate * gradient
    return policy.probs()


def test_policy_gradient_against_the_average_rests_at_the_regularised_equilibrium() -> None:
    bandit, config = cyclic(2), nash_md.Config(tau=0.3, opponent="average", average_share=0.1)
    average = bandit.reference.log()

    def opponent(policy: Tensor) -> Tensor:
        average.lerp_(policy.log(), config.average_share)  # weights of a tabular policy are its log-probabilities
        return average.softmax(-1)

    found = climb(config, bandit, opponent, rate=5.0, steps=1500)
    wanted = regularised_nash(bandit.preference, bandit.reference, config.tau).policy
    assert distance(bandit.reference, wanted) > 0.05
    assert distance(found, wanted) < 1e-4


def test_policy_gradient_against_the_mixture_rests_where_stated_near_the_equilibrium_for_a_small_share() -> None:
    bandit, tau = cyclic(2), 0.3
    wanted = regularised_nash(bandit.preference, bandit.reference, tau).policy
    errors = []
    for share in (0.1, 0.2):
        config = nash_md.Config(tau=tau, mixture=share)
        found = climb(config, bandit, lambda policy, share=share: mixture(policy, bandit.reference, share), rate=5.0, steps=1500)
        rest = kl_optimum(wins_against(bandit, mixture(found, bandit.reference, share)), bandit.reference, tau)
        assert distance(found, rest) < 1e-6
        errors.append(distance(found, wanted))
    assert errors[0] < 0.7 * errors[1] < 0.05


# APO --------------------------------------------------------------------------------------------------------------------------------------


def accelerated(bandit: Bandit, alpha: float, inner: Any, beta: float, iterations: int) -> list[Tensor]:
    """π_0, π_1, …, by the method's own loss and `advance`."""
    config = apo.Config(alpha=alpha, inner=inner, beta=beta)
    weights = previous = {"logits": bandit.reference.log()}
    path = [bandit.reference]
    for _ in range(iterations):
        policy = iterate(functools.partial(apo.loss, config), bandit, path[-1], steps=300)
        learned = {"logits": policy.logits.detach()}
        weights = apo.advance(config, learned, previous)
        previous = learned
        path.append(weights["logits"].softmax(-1))
    return path


def test_apos_iterates_are_the_extrapolated_proximal_points() -> None:
    bandit, alpha, beta = random_bandit(2, 4, 1), 0.4, 2.0
    assert bandit.reward is not None
    log_now, log_hat = bandit.reference.log(), bandit.reference.log()
    for found in accelerated(bandit, alpha, "dpo", beta, 6)[1:]:
        before, log_hat = log_hat, log_now + bandit.reward / beta
        log_now = log_hat + alpha * (log_hat - before)
        assert distance(found, log_now.softmax(-1)) < 1e-5


def test_apo_reaches_a_gap_in_fewer_iterations_at_the_rate_of_one_over_one_less_momentum() -> None:
    """The reward's gap falls as exp(−t Δ/β) in iterative DPO and as exp(−t Δ/(β (1 − α))) with momentum, Δ being the best answer's lead."""
    reward = torch.tensor([[1.0, 0.4, 0.0, -0.5]], dtype=torch.float64)
    bandit, beta, alpha = Bandit.from_reward(reward, torch.full((1, 4), 0.25, dtype=torch.float64)), 1.5, 0.5
    needed, rates = {}, {}
    for momentum in (0.0, alpha):
        path = accelerated(bandit, momentum, "dpo", beta, 18 if momentum == 0 else 12)
        gaps = [float(reward.max() - (policy * reward).sum()) for policy in path]
        needed[momentum] = next(t for t, gap in enumerate(gaps) if gap < 0.02)
        rates[momentum] = np.log(gaps[-4] / gaps[-1]) / 3
    assert needed[alpha] < 0.75 * needed[0.0]
    assert rates[0.0] == pytest.approx(0.6 / beta, rel=0.03)
    assert rates[alpha] / rates[0.0] == pytest.approx(1 / (1 - alpha), rel=0.05)


def test_apo_around_sppo_moves_further_than_sppo_and_its_first_step_is_sppos() -> None:
    bandit, beta = cyclic(3), 2.0
    plain, fast = (accelerated(bandit, alpha, "sppo", beta, 5) for alpha in (0.0, 0.3))
    first = iterate(functools.partial(sppo.loss, sppo.Config(eta=1 / beta)), bandit, bandit.reference, steps=400)
    assert distance(plain[1], first.probs()) < 1e-6
    wanted = 1.3 * first.log_probs().detach() - 0.3 * bandit.reference.log()
    assert distance(fast[1], wanted.softmax(-1)) < 1e-6
    assert distance(fast[-1], bandit.reference) > 1.15 * distance(plain[-1], bandit.reference)


# Online DPO -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_online_dpo_goes_to_the_regularised_optimum_whatever_policy_writes(seed: int) -> None:
    bandit, config = random_bandit(2, 5, seed), online_dpo.Config(beta=0.5)
    assert bandit.reward is not None
    wanted, current = kl_optimum(bandit.reward, bandit.reference, config.beta), bandit.reference
    for _ in range(3):
        current = iterate(functools.partial(online_dpo.loss, config), bandit, current, steps=400).probs()
        assert distance(current, wanted) < 1e-4
    assert distance(bandit.reference, wanted) > 0.05


# RSO --------------------------------------------------------------------------------------------------------------------------------------


def draws(bandit: Bandit, beta: float, rounds: int, n: int, k: int, seed: int) -> np.ndarray:
    """[rounds, k] responses accepted by the sampler, in each round of n drawn from the reference of the first context."""
    assert bandit.reward is not None
    generator = numpy_generator(seed, "rso")
    reward, reference = bandit.reward[0].numpy(), bandit.reference[0].numpy()
    out = []
    for _ in range(rounds):
        answers = generator.choice(len(reward), size=n, p=reference)
        out.append(answers[rso.accept(reward[answers], k, beta, generator)])
    return np.array(out)


@pytest.mark.parametrize("beta", [0.4, 1.0, 5.0])
def test_rsos_sampler_draws_from_the_tilted_reference(beta: float) -> None:
    bandit = random_bandit(1, 5, 3)
    assert bandit.reward is not None
    accepted = draws(bandit, beta, rounds=1500, n=300, k=4, seed=1)
    counts = np.bincount(accepted.ravel(), minlength=5)

    def p_value(wanted: np.ndarray) -> float:
        return float(chisquare(counts, counts.sum() * wanted).pvalue)

    assert p_value(kl_optimum(bandit.reward, bandit.reference, beta)[0]) > 0.001
    assert p_value(kl_optimum(bandit.reward, bandit.reference, 1.5 * beta)[0]) < 0.001, "the test can tell another temperature"
    assert p_value(bandit.reference[0].numpy()) < 1e-6


def test_rsos_sampler_takes_each_candidate_once_leaves_out_what_was_not_judged_and_ends() -> None:
    rewards = np.array([3.0, np.nan, -50.0, 1.0, np.nan])
    for seed in range(20):
        accepted = rso.accept(rewards, 4, 0.1, numpy_generator(seed, "test"))
        assert sorted(accepted) == [0, 2, 3]
        assert accepted[0] == 0
        assert list(rso.accept(rewards, 1, 0.1, numpy_generator(seed, "test"))) == [0]
    assert len(rso.accept(np.full(3, np.nan), 2, 1.0, numpy_generator(0, "test"))) == 0


def labelled(bandit: Bandit, drawn: np.ndarray, seed: int) -> BanditPairs:
    """Pairs [N, 2] of the first context's responses with labels drawn from its preference."""
    swap = numpy_generator(seed, "labels").random(len(drawn)) >= bandit.preference[0].numpy()[drawn[:, 0], drawn[:, 1]]
    ordered = torch.from_numpy(np.where(swap[:, None], drawn[:, ::-1], drawn))
    return BanditPairs(
        torch.zeros(len(drawn), dtype=torch.int64), ordered[:, 0], ordered[:, 1], torch.full((len(drawn),), 1 / len(drawn)).double()
    )


def test_rsos_loss_on_accepted_pairs_finds_the_regularised_optimum() -> None:
    bandit, beta = random_bandit(1, 5, 3), 1.0
    assert bandit.reward is not None
    wanted = kl_optimum(bandit.reward, bandit.reference, beta)
    config = rso.Config(gamma=beta, beta=beta)
    pairs, policy = labelled(bandit, draws(bandit, beta, 4000, 64, 2, 7), 7), TabularPolicy(bandit.reference)
    fit(policy, lambda logp: (pairs.weight * rso.loss(config, bandit.pair_batch(logp, pairs)).values).sum(), steps=300)
    assert distance(policy.probs(), wanted) < 0.03
    assert distance(bandit.reference, wanted) > 0.15


def test_accepted_pairs_tell_the_odds_of_good_answers_that_the_reference_seldom_writes() -> None:
    """What the method is for: with as many labels, the odds of two good answers are estimated more exactly than from the reference's own pairs, and what
    is paid for it: of an answer that is hardly ever accepted, nothing is learned."""
    reward, beta = torch.tensor([[1.5, 1.2, 0.0, 0.1, -0.2, -3.0]]).double(), 0.5
    bandit = Bandit.from_reward(reward, torch.tensor([[0.05, 0.05, 0.25, 0.25, 0.2, 0.2]]).double())
    config, errors = rso.Config(gamma=beta, beta=beta), {"accepted": [], "reference": []}
    for seed in range(12):
        sets = {
            "accepted": draws(bandit, beta, 300, 64, 2, seed),
            "reference": numpy_generator(seed, "reference").choice(6, size=(300, 2), p=bandit.reference[0].numpy()),
        }
        for name, drawn in sets.items():
            pairs, policy = labelled(bandit, drawn, seed), TabularPolicy(bandit.reference)
            fit(policy, lambda logp, pairs=pairs: pulled(config, bandit, logp, pairs), steps=100)
            ratio = (policy.log_probs() - bandit.reference.log())[0].detach()
            errors[name].append([(ratio[0] - ratio[1]).item() - 0.3 / beta, (ratio[1] - ratio[5]).item() - 4.2 / beta])
    good, bad = ({name: np.sqrt(np.mean(np.square(values), 0))[i] for name, values in errors.items()} for i in (0, 1))
    assert good["accepted"] < 0.75 * good["reference"]
    assert bad["accepted"] > 2 * bad["reference"]


def pulled(config: rso.Config, bandit: Bandit, log_probs: Tensor, pairs: BanditPairs) -> Tensor:
    """RSO's expected loss and a little pull to the reference, which keeps the fit finite where an answer was never drawn."""
    values = rso.loss(config, bandit.pair_batch(log_probs, pairs)).values
    return (pairs.weight * values).sum() + 1e-5 * ((log_probs - bandit.reference.log()) ** 2).sum()


def test_rsos_hinge_norm_is_zero_from_a_scaled_margin_of_one_on() -> None:
    bandit = random_bandit(1, 3, 0)
    pairs = bandit.exact_pairs()
    log_probs = bandit.reference.log() + torch.tensor([[0.0, 4.0, 12.0]], dtype=torch.float64)
    config = rso.Config(loss_type="hinge-norm", gamma=0.2)
    found = rso.loss(config, bandit.pair_batch(log_probs, pairs)).values
    gap = 0.2 * torch.tensor([0.0, 4.0, 12.0], dtype=torch.float64)
    torch.testing.assert_close(found, (1 - gap[pairs.chosen] + gap[pairs.rejected]).clamp(min=0))


# Rejection sampling fine-tuning -----------------------------------------------------------------------------------------------------------


def best_of_n(policy: Tensor, values: Tensor, n: int) -> Tensor:
    """The law of the best of n samples [C, A] for distinct `values`: F(a)ⁿ − F(a−)ⁿ."""
    order = values.argsort(-1)
    below = policy.gather(-1, order).cumsum(-1)
    law = below**n - torch.cat([torch.zeros_like(below[:, :1]), below[:, :-1]], -1) ** n
    return torch.zeros_like(policy).scatter(-1, order, law)


def fit_likelihood(start: Tensor, kept: Tensor) -> Tensor:
    """The minimum of the method's loss over answers that come with probability `kept` [C, A]."""
    policy = TabularPolicy(start)

    def value(log_probs: Tensor) -> Tensor:
        losses = rejection_sampling_sft.loss(rejection_sampling_sft.Config(), answer_view(log_probs, score=torch.zeros_like(start)))
        return (kept.flatten() * losses.values.squeeze(1)).sum()

    fit(policy, value, steps=300)
    return policy.probs()


def judged_scores(scores: np.ndarray, **more: Any) -> Judged:
    """[P, n, k] scores as an oracle gives them."""
    lengths = np.ones(scores.shape[:2], dtype=np.int64)
    return Judged(bradley_terry(scores.sum(-1)), scores, lengths, more.get("columns", {}), numpy_generator(0, "arrange"))


@pytest.mark.parametrize("n", [2, 5])
def test_what_rejection_sampling_keeps_follows_the_law_of_the_best_of_n(n: int) -> None:
    bandit = random_bandit(1, 4, 2)
    assert bandit.reward is not None
    answers = numpy_generator(0, "answers", n).choice(4, size=(4000, n), p=bandit.reference[0].numpy())
    arranged = rejection_sampling_sft.arrange(
        rejection_sampling_sft.Config(samples_per_prompt=n), judged_scores(bandit.reward[0].numpy()[answers][..., None])
    )
    counts = np.bincount(answers[arranged.prompt, arranged.first], minlength=4)
    law = best_of_n(bandit.reference, bandit.reward, n)[0].numpy()
    assert chisquare(counts, counts.sum() * law).pvalue > 0.001
    assert chisquare(counts, counts.sum() * bandit.reference[0].numpy()).pvalue < 1e-6


def test_iterations_of_rejection_sampling_raise_the_reward_to_the_best_answer() -> None:
    bandit = random_bandit(3, 5, 1)
    assert bandit.reward is not None
    policy, rewards = bandit.reference, []
    for _ in range(8):
        rewards.append((policy * bandit.reward).sum(-1))
        wanted = best_of_n(policy, bandit.reward, 4)
        policy = fit_likelihood(policy, wanted)
        assert distance(policy, wanted) < 1e-5
    assert all((after > before - 1e-9).all() for before, after in itertools.pairwise(rewards))
    torch.testing.assert_close(rewards[-1], bandit.reward.amax(-1), atol=1e-3, rtol=0)
    best = torch.nn.functional.one_hot(bandit.reward.argmax(-1), 5).double()
    assert distance(best_of_n(best, bandit.reward, 4), best) == 0, "a policy that always writes the best answer stays"


# DPA --------------------------------------------------------------------------------------------------------------------------------------


def test_directions_of_two_rewards_are_uniform_in_the_configured_angle() -> None:
    for options, low, high in (({}, -45, 45), ({"max_angle": 20.0}, -20, 20), ({"region": "positive"}, 0, 90)):
        drawn = dpa.draw_directions(dpa.Config(**options), 4000, 2, numpy_generator(0, "test"))
        np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1)
        angles = np.degrees(np.arctan2(drawn[:, 1], drawn[:, 0]))
        assert kstest(angles, "uniform", args=(low, high - low)).pvalue > 0.001, options


def test_directions_of_several_rewards_have_length_one_and_keep_their_region() -> None:
    near = dpa.draw_directions(dpa.Config(max_angle=30.0), 500, 4, numpy_generator(1, "test"))
    np.testing.assert_allclose(np.linalg.norm(near, axis=1), 1)
    assert near[:, 0].min() >= np.cos(np.radians(30)) - 1e-12
    assert np.abs(near[:, 1:].mean(0)).max() < 0.05
    positive = dpa.draw_directions(dpa.Config(region="positive"), 500, 4, numpy_generator(1, "test"))
    assert positive.min() >= 0
    assert np.ptp(positive.mean(0)) < 0.05, "no reward is favoured"


def test_the_kept_answer_is_the_best_in_the_prompts_direction_and_units_do_not_matter() -> None:
    scores = np.array([[[3.0, 0.0], [0.0, 3.0], [2.0, 2.0], [9.0, np.nan]]] * 3)
    columns = {"direction": [[1.0, 0.0], [0.0, 1.0], [2**-0.5, 2**-0.5]]}
    for units in (1.0, 1000.0):
        found = dpa.arrange(dpa.Config(), judged_scores(scores * np.array([1.0, units]), columns=columns))
        assert found.first.tolist() == [0, 1, 2]
    plain = dpa.arrange(dpa.Config(normalize=False), judged_scores(scores * np.array([1.0, 1000.0]), columns=columns))
    assert plain.first.tolist() == [0, 1, 1]


def test_sweeping_the_direction_traces_a_front_on_which_each_policy_is_best_in_its_own_direction() -> None:
    """The exact minimum for each direction is the best of n under v · r, and none of the others has more of v · r."""
    generator = numpy_generator(5, "test")
    policy = torch.softmax(torch.from_numpy(generator.normal(size=(1, 8))), -1)
    rewards = torch.from_numpy(generator.normal(size=(8, 2)))
    angles = torch.linspace(0, torch.pi / 2, 7, dtype=torch.float64)
    directions = torch.stack([angles.cos(), angles.sin()], 1)
    values = directions @ rewards.T
    laws = best_of_n(policy.expand(7, -1), values, 6)
    found = fit_likelihood(policy.expand(7, -1).contiguous(), laws)
    assert distance(found, laws) < 1e-4
    reached = found @ rewards
    own = reached @ directions.T  # [policy, direction]
    assert (own.diagonal()[None] >= own - 1e-4).all()
    assert (reached[1:, 0] <= reached[:-1, 0] + 1e-4).all()
    assert (reached[1:, 1] >= reached[:-1, 1] - 1e-4).all()
    assert reached[0, 0] > reached[-1, 0] + 0.2
