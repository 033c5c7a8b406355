"""OREO and DAPO (direct advantage) on problems small enough to list every answer: their optima against enumerations, their gradients against the formulae."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from telos.algorithms.language import dapo_direct, oreo
from telos.algorithms.language._loop_values import ValuedLogps
from telos.functional.equilibria import kl_optimum
from telos.functional.pairwise import AnswerLogps
from telos.functional.reduction import Denominators, total

END, LONGEST = 2, 3
PREFIXES: list[tuple[int, ...]] = [prefix for n in range(LONGEST) for prefix in itertools.product((0, 1), repeat=n)]
ANSWERS: list[tuple[int, ...]] = [*((*prefix, END) for prefix in PREFIXES), *itertools.product((0, 1), repeat=LONGEST)]
BETA = 0.4
MASK = torch.tensor([[t < len(answer) for t in range(LONGEST)] for answer in ANSWERS])
STATE = torch.tensor([[PREFIXES.index(answer[:t]) if t < len(answer) else 0 for t in range(LONGEST)] for answer in ANSWERS])
TOKEN = torch.tensor([[*answer, *[0] * (LONGEST - len(answer))] for answer in ANSWERS])
# A token 0 ends a step, and the answer does.
ENDS = torch.tensor([[t < len(answer) and (answer[t] == 0 or t == len(answer) - 1) for t in range(LONGEST)] for answer in ANSWERS])
GENERATOR = np.random.default_rng(5)
REFERENCE = torch.from_numpy(GENERATOR.normal(size=(len(PREFIXES), 3))).log_softmax(-1)  # log π_ref(token | prefix)
OUTCOME = torch.from_numpy((GENERATOR.random(len(ANSWERS)) < 0.5).astype(np.float64))


def tokens(table: Tensor) -> Tensor:
    """[15, 3]: log-probabilities of all answers' tokens under a table [7, 3]; rubbish where padded."""
    return table[STATE, TOKEN].masked_fill(~MASK, -7.5)


def of_answers(table: Tensor) -> np.ndarray:
    """The probability of every answer."""
    return tokens(table).masked_fill(~MASK, 0.0).sum(1).exp().numpy()


def view(policy: Tensor, values: Tensor | None = None, **changes: Tensor) -> ValuedLogps:
    given = ValuedLogps(AnswerLogps(tokens(policy), MASK), AnswerLogps(tokens(REFERENCE), MASK), OUTCOME, ENDS)
    return replace(given, **({} if values is None else {"values": values[STATE].masked_fill(~MASK, 3.3)}), **changes)


def soft_value(prefix: tuple[int, ...]) -> float:
    """β log E_ref[exp(R/β)] over all ways to go on."""
    whole = 0.0
    for answer, outcome in zip(ANSWERS, OUTCOME.tolist(), strict=True):
        if answer[: len(prefix)] == prefix:
            rest = sum(float(REFERENCE[PREFIXES.index(answer[:t]), answer[t]]) for t in range(len(prefix), len(answer)))
            whole += math.exp(rest + outcome / BETA)
    return BETA * math.log(whole)


def optimum() -> tuple[Tensor, Tensor]:
    """(log π* [7, 3] by its answers' conditional probabilities, V* [7])."""
    best = kl_optimum(OUTCOME.numpy(), of_answers(REFERENCE), BETA)
    table = np.zeros((len(PREFIXES), 3))
    for i, prefix in enumerate(PREFIXES):
        for token in range(3):
            table[i, token] = sum(p for p, answer in zip(best, ANSWERS, strict=True) if answer[: len(prefix) + 1] == (*prefix, token))
    return torch.from_numpy(np.log(table / table.sum(1, keepdims=True))), torch.tensor(
        [soft_value(p) for p in PREFIXES], dtype=torch.float64
    )


def config(variant: str, **changes: float) -> oreo.Config:
    return oreo.Config(variant=variant, beta=BETA, **({"kl_coef": 0.0} | changes))  # type: ignore[arg-type]


def whole(losses: object, weights: Tensor | None = None) -> Tensor:
    values = losses.values  # type: ignore[attr-defined]
    return values.mean() if weights is None else (values * weights).sum()


VARIANTS = ("token", "step", "response")


# OREO --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_oreo_has_no_error_at_the_regularised_optimum_and_its_soft_values(variant: str) -> None:
    policy, values = optimum()
    np.testing.assert_allclose(of_answers(policy), kl_optimum(OUTCOME.numpy(), of_answers(REFERENCE), BETA), rtol=1e-12)
    found = oreo.loss(config(variant), view(policy, values))
    assert float(found.values.abs().max()) < 1e-24
    assert float(oreo.critic_loss(config(variant), view(policy, values)).values.abs().max()) < 1e-24
    error, mask = found.metrics["bellman/error"]
    assert float(error[mask].max()) < 1e-24, "each action by itself keeps the soft Bellman equation"
    away = oreo.loss(config(variant), view(REFERENCE, values))
    assert float(away.values.max()) > 0.01


def descend(variant: str, steps: int = 300, **options: float) -> tuple[Tensor, Tensor]:
    """Policy and values after gradient descent on both losses at once, over all answers, from the reference and from nothing."""
    chosen = config(variant, **options)
    logits, values = REFERENCE.clone().requires_grad_(), torch.zeros(len(PREFIXES), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([{"params": [logits], "lr": 0.1}, {"params": [values], "lr": 0.05}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        policy = logits.log_softmax(-1)
        whole(oreo.loss(chosen, view(policy, values.detach()))).backward()
        whole(oreo.critic_loss(chosen, view(policy.detach(), values))).backward()
        optimiser.step()
        schedule.step()
    return logits.detach().log_softmax(-1), values.detach()


@pytest.mark.parametrize("variant", VARIANTS)
def test_oreo_learns_the_regularised_optimum_from_single_answers(variant: str) -> None:
    policy, values = descend(variant)
    best, best_values = optimum()
    assert 0.5 * np.abs(of_answers(policy) - of_answers(best)).sum() < 1e-5
    assert 0.5 * np.abs(of_answers(REFERENCE) - of_answers(best)).sum() > 0.1
    known = torch.ones(len(PREFIXES), dtype=torch.bool)
    if variant == "step":  # states inside a step have no value
        known = torch.tensor([not prefix or prefix[-1] == 0 for prefix in PREFIXES])
    assert float((values - best_values)[known].abs().max()) < 1e-5
    if variant == "step":
        assert (values[~known] == 0).all()


def test_the_penalty_keeps_the_policy_nearer_to_the_reference() -> None:
    def divergence(policy: Tensor) -> float:
        p = of_answers(policy)
        return float((p * np.log(p / of_answers(REFERENCE))).sum())

    free, held = (divergence(descend("token", 150, kl_coef=coefficient)[0]) for coefficient in (0.0, 1.0))
    assert 0 < held < 0.5 * free


def by_hand(variant: str, policy: Tensor, values: Tensor) -> tuple[list[float], np.ndarray, np.ndarray]:
    """(losses, gradient by the tokens' log-probabilities, gradient of the critic's loss by values), answer by answer with plain loops."""
    losses, by_token, by_value = [], np.zeros(MASK.shape), np.zeros(MASK.shape)
    gap = (tokens(policy) - tokens(REFERENCE)).numpy()
    for i, answer in enumerate(ANSWERS):
        inner = [t for t in range(1, len(answer)) if answer[t - 1] == 0]
        starts = {"token": [*range(len(answer))], "step": [0, *inner], "response": [0]}[variant]
        v = {t: float(values[PREFIXES.index(answer[:t])]) for t in range(len(answer))}
        delta = {t: v[t] - float(OUTCOME[i]) + BETA * gap[i, t : len(answer)].sum() for t in v}
        losses.append(sum(delta[t] ** 2 for t in starts) / len(starts))
        for start, after in zip(starts, [*starts[1:], len(answer)], strict=True):
            by_token[i, start:after] = 2 * BETA * delta[start] / len(starts)
        learned = starts if variant == "step" else [*range(len(answer))]
        for t in learned:
            by_value[i, t] = 2 * delta[t] / len(learned)
    return losses, by_token, by_value


@pytest.mark.parametrize("variant", VARIANTS)
def test_oreos_losses_and_gradients_are_those_of_the_formulae(variant: str) -> None:
    """An action answers for its own log-ratio, not for what follows; the policy's loss moves no value, the critic's no policy."""
    policy, values = torch.from_numpy(GENERATOR.normal(size=(7, 3))).log_softmax(-1), torch.from_numpy(GENERATOR.normal(size=7))
    losses, by_token, by_value = by_hand(variant, policy, values)
    given = view(policy, values)
    learned = given.answer.tokens.clone().requires_grad_()
    found = oreo.loss(config(variant), replace(given, answer=AnswerLogps(learned, MASK)))
    np.testing.assert_allclose(found.values.detach().numpy(), losses, rtol=1e-12)
    found.values.sum().backward()
    assert learned.grad is not None
    np.testing.assert_allclose(learned.grad.numpy(), by_token, rtol=1e-10, atol=1e-12)
    assert given.values is not None
    held = given.values.clone().requires_grad_()
    oreo.critic_loss(config(variant), replace(given, values=held)).values.sum().backward()
    assert held.grad is not None
    np.testing.assert_allclose(held.grad.numpy(), by_value, rtol=1e-10, atol=1e-12)


def test_the_penalty_on_the_references_tokens_is_the_divergence_over_the_vocabulary_in_value_and_gradient() -> None:
    """In the mean over what the reference writes after each prefix."""
    logits = torch.from_numpy(GENERATOR.normal(size=(7, 3))).requires_grad_()
    exact = (logits.log_softmax(-1).exp() * (logits.log_softmax(-1) - REFERENCE)).sum()
    (wanted,) = torch.autograd.grad(exact, logits)
    # Answers of one token each: row = a prefix and a token after it.
    state, token = (torch.tensor(values) for values in zip(*itertools.product(range(7), range(3)), strict=True))
    one, zeros = torch.ones(21, 1, dtype=torch.bool), torch.zeros(21, dtype=torch.float64)

    def penalties() -> Tensor:
        rows = [AnswerLogps(table[state, token][:, None], one) for table in (logits.log_softmax(-1), REFERENCE)]
        given = ValuedLogps(rows[0], rows[1], zeros, values=zeros[:, None])
        with_, without = (oreo.loss(config("token", kl_coef=coefficient), given).values for coefficient in (1.0, 0.0))
        return with_ - without

    mean = (penalties() * REFERENCE[state, token].exp()).sum()
    assert float(mean.detach()) == pytest.approx(float(exact.detach()), rel=1e-12)
    (found,) = torch.autograd.grad(mean, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert (penalties() >= 0).all(), "wherever the tokens are from"


# DAPO (direct advantage) -------------------------------------------------------------------------------------------------------------------


def chance(prefix: tuple[int, ...]) -> float:
    """V: the chance that the reference succeeds from here."""
    if prefix in ANSWERS:
        return float(OUTCOME[ANSWERS.index(prefix)])
    return sum(math.exp(float(REFERENCE[PREFIXES.index(prefix), token])) * chance((*prefix, token)) for token in range(3))


ADVANTAGES = torch.tensor([[chance((*prefix, token)) - chance(prefix) for token in range(3)] for prefix in PREFIXES], dtype=torch.float64)


def dapo_view(policy: Tensor, advantages: Tensor) -> ValuedLogps:
    """Every token is a step."""
    return view(policy, ends=MASK, advantages=advantages[STATE, TOKEN].masked_fill(~MASK, 0.0))


def minimise(advantages: Tensor, beta: float) -> Tensor:
    """The policy of least loss where the reference writes the answers."""
    logits = REFERENCE.clone().requires_grad_()
    weights = torch.from_numpy(of_answers(REFERENCE))[:, None] * MASK
    optimiser = torch.optim.LBFGS([logits], max_iter=400, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = whole(dapo_direct.loss(dapo_direct.Config(beta=beta), dapo_view(logits.log_softmax(-1), advantages)), weights)
        value.backward()
        return value

    optimiser.step(closure)
    return logits.detach().log_softmax(-1)


def test_dapo_is_without_loss_where_the_log_ratio_is_the_advantage_over_beta() -> None:
    wanted = torch.from_numpy(GENERATOR.normal(size=(7, 3))).log_softmax(-1)
    advantages = BETA * (wanted - REFERENCE)
    at = dapo_direct.loss(dapo_direct.Config(beta=BETA), dapo_view(wanted, advantages))
    assert at.mask is not None
    assert float(at.values[at.mask].max()) < 1e-30
    np.testing.assert_allclose(of_answers(minimise(advantages, BETA)), of_answers(wanted), atol=1e-5)


def shared_out(advantages: list[float], base: list[float]) -> list[float]:
    """The π with log ρ + λ ρ = A/β, ρ = π / base, and the λ that makes π sum to 1; by bisection in bisection."""

    def policy(scale: float) -> list[float]:
        def ratio(a: float) -> float:
            return float(brentq(lambda x: x + scale * math.exp(x) - a / BETA, -60, 60, xtol=1e-14))  # type: ignore[arg-type]

        return [p * math.exp(ratio(a)) for p, a in zip(base, advantages, strict=True)]

    # Without λ there is too much, because E[exp(A/β)] >= 1.
    return policy(float(brentq(lambda scale: sum(policy(scale)) - 1, 0, 20, xtol=1e-13)))  # type: ignore[arg-type]


def test_dapos_optimum_shares_the_normaliser_out() -> None:
    """After each prefix, where the reference writes the answers."""
    found = minimise(ADVANTAGES, BETA).exp().numpy()
    for i in range(len(PREFIXES)):
        np.testing.assert_allclose(found[i], shared_out(ADVANTAGES[i].tolist(), REFERENCE[i].exp().tolist()), atol=1e-5)


def test_with_growing_beta_the_log_ratio_becomes_the_advantage_over_beta() -> None:
    """The normaliser is of second order, because advantages have mean 0 under the reference."""
    torch.testing.assert_close((REFERENCE.exp() * ADVANTAGES).sum(-1), torch.zeros(7, dtype=torch.float64), atol=1e-12, rtol=0.0)
    missed = [float((beta * (minimise(ADVANTAGES, beta) - REFERENCE) - ADVANTAGES).abs().max()) for beta in (4.0, 8.0)]
    assert missed[0] < 0.05
    assert missed[1] / missed[0] == pytest.approx(0.5, abs=0.1)


def test_at_the_reference_dapos_gradient_is_the_policy_gradient() -> None:
    logits = REFERENCE.clone().requires_grad_()
    weights = torch.from_numpy(of_answers(REFERENCE))
    policy = logits.log_softmax(-1)
    value = whole(dapo_direct.loss(dapo_direct.Config(beta=BETA), dapo_view(policy, ADVANTAGES)), weights[:, None] * MASK)
    (found,) = torch.autograd.grad(value, logits, retain_graph=True)
    success = (tokens(policy).masked_fill(~MASK, 0.0).sum(1).exp() * OUTCOME).sum()  # the chance of success itself
    (gradient,) = torch.autograd.grad(success, logits)
    torch.testing.assert_close(found, -gradient / BETA, rtol=1e-10, atol=1e-12)


def test_dapos_steps_have_the_sums_of_their_tokens_and_its_gradient_is_that_of_the_formula() -> None:
    policy = torch.from_numpy(GENERATOR.normal(size=(7, 3))).log_softmax(-1)
    advantages = torch.from_numpy(GENERATOR.normal(size=MASK.shape)) * ENDS
    given = view(policy, advantages=advantages)
    learned = given.answer.tokens.clone().requires_grad_()
    found = dapo_direct.loss(dapo_direct.Config(beta=BETA), replace(given, answer=AnswerLogps(learned, MASK)))
    count = int(ENDS.sum())
    scalar = total(found, Denominators(len(ANSWERS), count))
    scalar.backward()
    gap, loss, gradient = (tokens(policy) - tokens(REFERENCE)).numpy(), 0.0, np.zeros(MASK.shape)
    for i, answer in enumerate(ANSWERS):
        start = 0
        for t in range(len(answer)):
            if answer[t] == 0 or t == len(answer) - 1:
                miss = gap[i, start : t + 1].sum() - float(advantages[i, t]) / BETA
                loss += 0.5 * miss**2 / count
                gradient[i, start : t + 1] = miss / count
                start = t + 1
    assert float(scalar.detach()) == pytest.approx(loss, rel=1e-12)
    assert learned.grad is not None
    np.testing.assert_allclose(learned.grad.numpy(), gradient, rtol=1e-10, atol=1e-13)


def test_a_right_step_of_an_answer_that_fails_is_made_likelier_and_its_wrong_step_less_likely() -> None:
    """What an outcome alone cannot say: the same answer has steps of both signs."""
    mixed = [
        (i, t)
        for i, answer in enumerate(ANSWERS)
        if OUTCOME[i] == 0
        for t in range(len(answer))
        if float(ADVANTAGES[STATE[i, t], TOKEN[i, t]]) > 0.02
    ]
    assert mixed
    found = minimise(ADVANTAGES, BETA) - REFERENCE
    for i, t in mixed:
        assert found[STATE[i, t], TOKEN[i, t]] > 0
        assert found[STATE[i, len(ANSWERS[i]) - 1], TOKEN[i, len(ANSWERS[i]) - 1]] < 0
