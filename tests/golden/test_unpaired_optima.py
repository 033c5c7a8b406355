"""Where losses on single answers, on ranked lists and on scored text lead a tabular policy, in exact expectation over the data, against closed forms.

An answer is one token in one context. μ is the law of the data, π_ref the reference, R the reward.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

from telos.algorithms.language import a_lol, gold, kto, phf, pro, rrhf, sft
from telos.environments.bandit import TabularPolicy, fit, random_bandit, total_variation
from telos.functional.pairwise import AnswerLogps, LabelledLogps, RankedLogps
from telos.functional.reduction import Losses

SEEDS = range(3)
LARGE = 1e9  # a clipping range that clips nothing


def drawn(seed: int, n: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(π_ref, μ, R), each [A]."""
    rng = np.random.default_rng(seed)
    reference, data = (np.exp(rng.normal(size=n)) for _ in range(2))
    return reference / reference.sum(), data / data.sum(), rng.normal(size=n)


def view(log_probs: Tensor, reference: np.ndarray, **more: Any) -> LabelledLogps:
    """One row an answer, of one token."""
    one = torch.ones(len(reference), 1, dtype=torch.bool)
    found = {"label": None} | {name: torch.as_tensor(value) for name, value in more.items()}
    return LabelledLogps(AnswerLogps(log_probs.view(-1, 1), one), AnswerLogps(torch.from_numpy(np.log(reference))[:, None], one), **found)


def expected(losses: Losses, weights: np.ndarray) -> Tensor:
    """Σ weight · loss over rows of one token."""
    return (torch.from_numpy(weights) * losses.values.view(len(weights))).sum()


def minimise(loss: Callable[[Tensor], Tensor], start: np.ndarray, steps: int = 300, **options: Any) -> np.ndarray:
    """The policy [A] at which `loss(log_probs [A])` ends."""
    policy = TabularPolicy(torch.from_numpy(start)[None])
    fit(policy, lambda log_probs: loss(log_probs[0]), steps=steps, **options)
    return policy.probs()[0].numpy()


def gradient(loss: Callable[[Tensor], Tensor], at: np.ndarray) -> np.ndarray:
    """d loss / d logits of the softmax policy `at` [A]."""
    logits = torch.from_numpy(np.log(at)).requires_grad_()
    loss(torch.log_softmax(logits, 0)).backward()
    assert logits.grad is not None
    return logits.grad.numpy()


def in_logits(of_log_probs: np.ndarray, policy: np.ndarray) -> np.ndarray:
    """A gradient with respect to log-probabilities, in logits."""
    return of_log_probs - policy * of_log_probs.sum()


def normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


# KTO ----------------------------------------------------------------------------------------------------------------------------------------


def kto_objective(config: kto.Config, reference: np.ndarray, data: np.ndarray, desirable: np.ndarray) -> Callable[[Tensor], Tensor]:
    """Answers from `data`, desirable with a probability each; z_0 is the exact KL(π‖π_ref), without gradient as in the loop."""

    def loss(log_probs: Tensor) -> Tensor:
        now = log_probs.detach()
        kl = (now.exp() * (now - torch.from_numpy(np.log(reference)))).sum().clamp(min=0).expand(len(reference))
        sides = [kto.loss(config, view(log_probs, reference, label=[label] * len(data), kl=kl)) for label in (True, False)]
        return expected(sides[0], data * desirable) + expected(sides[1], data * (1 - desirable))

    return loss


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (4 / 3, 1.0), (1.0, 2.0)])
def test_ktos_gradient_is_that_of_its_value_function_with_the_reference_point_held_fixed(weights: tuple[float, float], seed: int) -> None:
    """−β μ (λ_D p − λ_U (1 − p)) σ(βg) σ(−βg) in log π, with g = r − z_0: nothing comes from z_0."""
    reference, data, reward = drawn(seed)
    desirable, policy, beta = expit(reward), normalised(np.exp(reward) * data), 0.5
    kl = float((policy * np.log(policy / reference)).sum())
    assert kl > 0.1
    gain = beta * (np.log(policy / reference) - kl)
    pull = weights[0] * desirable - weights[1] * (1 - desirable)
    wanted = in_logits(-beta * data * pull * expit(gain) * expit(-gain), policy)
    config = kto.Config(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    np.testing.assert_allclose(gradient(kto_objective(config, reference, data, desirable), policy), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_kto_with_sure_labels_ends_at_the_reference_among_desirable_answers(seed: int) -> None:
    """Data of the reference: every desirable answer has the same pull, and the undesirable ones keep nothing."""
    reference, _, reward = drawn(seed)
    desirable = (reward > np.median(reward)).astype(float)
    policy = minimise(
        kto_objective(kto.Config(beta=0.5), reference, reference, desirable), reference, 700, learning_rate=0.1, optimiser="adam"
    )
    assert total_variation(policy, normalised(reference * desirable)) < 0.01


@pytest.mark.parametrize("beta", [0.2, 0.8])
def test_kto_prefers_answers_in_the_order_in_which_they_are_desirable_and_drops_those_below_even_odds(beta: float) -> None:
    """Among the answers that stay, μ (λ_D p − λ_U (1 − p)) σ(βg) σ(−βg) is proportional to π; for β < 1 this orders π/π_ref by p. Answers with
    p < λ_U/(λ_D + λ_U) are dropped."""
    reference = np.array([0.3, 0.25, 0.25, 0.2])
    desirable, weights = np.array([0.95, 0.8, 0.7, 0.55]), (1.0, 1.5)
    stay = desirable > weights[1] / sum(weights)
    assert stay.tolist() == [True, True, True, False]
    config = kto.Config(beta=beta, desirable_weight=weights[0], undesirable_weight=weights[1])
    policy = minimise(kto_objective(config, reference, reference, desirable), reference, 1000, learning_rate=0.1, optimiser="adam")
    assert policy[~stay].sum() < 0.01
    ratio = policy / reference
    assert (np.diff(ratio) < 0).all()
    gain = beta * (np.log(ratio) - (policy * np.log(ratio)).sum())
    pull = reference * (weights[0] * desirable - weights[1] * (1 - desirable)) * expit(gain) * expit(-gain)
    np.testing.assert_allclose((pull / policy)[stay], (pull / policy)[stay].mean(), rtol=0.02)


def test_the_root_of_ktos_balance_is_where_two_answers_end() -> None:
    """Two good answers: with odds e^x of the first, μ_1 w_1 s_1/π_1 = μ_2 w_2 s_2/π_2, solved by bisection."""
    reference, desirable, beta = np.array([0.4, 0.6]), np.array([0.9, 0.7]), 0.5

    def balance(x: float) -> float:
        policy = np.array([expit(x), expit(-x)])
        ratio = np.log(policy / reference)
        gain = beta * (ratio - policy @ ratio)
        pull = reference * (2 * desirable - 1) * expit(gain) * expit(-gain) / policy
        return pull[0] - pull[1]

    root = brentq(balance, -10, 10)
    config = kto.Config(beta=beta)
    policy = minimise(kto_objective(config, reference, reference, desirable), reference, 600, learning_rate=0.1, optimiser="adam")
    assert policy[0] == pytest.approx(float(expit(root)), abs=1e-3)


def test_ktos_weights_decide_which_noisy_answers_are_learned() -> None:
    """An answer that is desirable in 60 of 100 cases is learned with equal weights and unlearned with λ_U = 2 λ_D."""
    reference, desirable = np.array([0.5, 0.5]), np.array([0.6, 0.95])
    for undesirable, sign in ((1.0, -1), (2.0, 1)):
        loss = kto_objective(kto.Config(undesirable_weight=undesirable), reference, reference, desirable)
        log_probs = torch.from_numpy(np.log(reference)).requires_grad_()
        loss(log_probs).backward()
        assert log_probs.grad is not None
        assert np.sign(log_probs.grad[0].item()) == sign


# GOLD ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_gold_goes_from_maximum_likelihood_to_the_datas_mode_as_its_floor_falls(seed: int) -> None:
    """Every token at weight 1 is maximum likelihood, with optimum μ. At weight π the gradient is that of −Σ μ(a) π(a), whose optimum is the mode."""
    reference, data, _ = drawn(seed)
    policy = drawn(seed + 100)[0]

    def objective(floor: float) -> Callable[[Tensor], Tensor]:
        config = gold.Config(variant="delta", weight_floor=floor)
        return lambda log_probs: expected(gold.loss(config, view(log_probs, reference)), data)

    assert total_variation(minimise(objective(1.0), reference), data) < 1e-6
    np.testing.assert_allclose(gradient(objective(0.0), policy), -policy * (data - data @ policy), rtol=1e-9, atol=1e-12)
    mode = minimise(objective(0.0), reference, 700, learning_rate=0.1, optimiser="adam")
    assert mode[data.argmax()] > 0.99


@pytest.mark.parametrize(("variant", "worth"), [("p", lambda p: np.log(p) + 10), ("s", lambda p: p)])
def test_gold_ascends_the_policys_share_of_the_data_times_what_the_likelihood_model_says(
    variant: Any, worth: Callable[[np.ndarray], np.ndarray]
) -> None:
    reference, data, _ = drawn(0)
    policy = drawn(100)[0]
    config = gold.Config(variant=variant, weight_floor=0.0, reward_floor=0.0, horizon=0)
    value = data * worth(reference)
    wanted = -policy * (value - value @ policy)
    found = gradient(lambda log_probs: expected(gold.loss(config, view(log_probs, reference)), data), policy)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


# A-LoL --------------------------------------------------------------------------------------------------------------------------------------


def a_lol_objective(config: a_lol.Config, reference: np.ndarray, data: np.ndarray, advantage: np.ndarray) -> Callable[[Tensor], Tensor]:
    return lambda log_probs: expected(a_lol.loss(config, view(log_probs, reference, advantage=advantage)), data)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", ["a-lol", "seq", "ref-free"])
def test_at_the_reference_a_lols_first_step_is_the_policy_gradient_of_the_reward(variant: Any, seed: int) -> None:
    reference, _, reward = drawn(seed)
    advantage = reward - reference @ reward
    found = gradient(a_lol_objective(a_lol.Config(variant=variant), reference, reference, advantage), reference)
    np.testing.assert_allclose(found, -reference * (reward - reference @ reward), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("filtered", [False, True])
def test_a_lol_with_whole_weights_is_ascent_on_the_reward_within_its_filter_from_any_policy(filtered: bool, seed: int) -> None:
    """On data of the reference the gradient is that of −E_π[A], or of −E_π[max(A, 0)] under the filter: the reward falls at no step, and what is left in
    the end is the best answer."""
    reference, _, reward = drawn(seed)
    advantage = reward - reference @ reward
    worth = advantage.clip(0) if filtered else advantage
    objective = a_lol_objective(a_lol.Config(clip_range=LARGE), reference, reference, worth)
    policy = drawn(seed + 100)[0]
    np.testing.assert_allclose(gradient(objective, policy), -policy * (worth - policy @ worth), rtol=1e-9, atol=1e-12)
    logits, gained = np.log(reference), []
    for _ in range(400):
        now = normalised(np.exp(logits))
        gained.append(now @ worth)
        logits -= gradient(objective, now)
    assert (np.diff(gained) >= 0).all()
    assert gained[-1] > 0.9 * worth.max()
    assert now.argmax() == reward.argmax()


@pytest.mark.parametrize("seed", SEEDS)
def test_clipped_weights_leave_the_gradient_of_weights_within_the_range_and_bound_the_others(seed: int) -> None:
    reference, _, reward = drawn(seed)
    advantage = reward - reference @ reward
    policy = normalised(reference * np.exp(2 * reward))
    weight = policy / reference
    assert weight.max() > 1.5
    assert weight.min() < 0.5
    wanted = in_logits(-reference * advantage * weight.clip(0.5, 1.5), policy)
    found = gradient(a_lol_objective(a_lol.Config(clip_range=0.5), reference, reference, advantage), policy)
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_ref_free_a_lol_learns_the_data_in_proportion_to_their_positive_advantages(seed: int) -> None:
    reference, data, reward = drawn(seed)
    kept = (reward - reference @ reward).clip(0)
    objective = a_lol_objective(a_lol.Config(variant="ref-free"), reference, data, kept)
    assert total_variation(minimise(objective, reference), normalised(data * kept)) < 1e-6
    # Drawn in proportion to the advantage, which weighs them in the loss once more.
    drawn_by_priority = a_lol_objective(a_lol.Config(variant="ref-free"), reference, normalised(data * kept), kept)
    assert total_variation(minimise(drawn_by_priority, reference), normalised(data * kept**2)) < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_half_the_data_bad_spoils_likelihood_and_gold_and_not_a_lol(seed: int) -> None:
    """Half of the data from a policy of bad answers. Their share in the optimum is one half by likelihood and nothing by A-LoL; GOLD, which sees no
    reward, ends at the data's mode, which is bad here."""
    rng = np.random.default_rng(seed)
    good, bad = (normalised(rng.uniform(1, 2, 3)) for _ in range(2))
    bad[0] += 2.0  # the commonest answer of all
    data = np.concatenate([good, normalised(bad)]) / 2
    is_bad = np.array([False] * 3 + [True] * 3)
    reward = np.where(is_bad, -1.0, 1.0) + rng.uniform(-0.3, 0.3, 6)
    reference = data  # the model fine-tuned on all of it
    advantage = (reward - reference @ reward).clip(0)
    assert (advantage[is_bad] == 0).all()
    nll = minimise(lambda x: expected(sft.loss(sft.Config(), x[:, None], torch.ones(6, 1, dtype=torch.bool)), data), np.full(6, 1 / 6))
    by_gold = minimise(
        lambda x: expected(gold.loss(gold.Config(weight_floor=0.0), view(x, reference)), data),
        reference,
        700,
        learning_rate=0.1,
        optimiser="adam",
    )
    assert nll[is_bad].sum() == pytest.approx(0.5, abs=1e-6)
    assert by_gold[is_bad].sum() > 0.99
    for variant in ("ref-free", "a-lol", "seq"):
        config = a_lol.Config(variant=variant)  # type: ignore[arg-type]
        policy = minimise(a_lol_objective(config, reference, data, advantage), reference, 700, learning_rate=0.1, optimiser="adam")
        assert policy[is_bad].sum() < 1e-3
        assert policy @ reward > 0.69, "good answers have rewards from 0.7 to 1.3"


# Ranked lists -------------------------------------------------------------------------------------------------------------------------------


def lists(log_probs: Tensor, orders: list[tuple[int, ...]]) -> RankedLogps:
    """Lists of one-token answers from best to worst, with qualities K, K − 1, …"""
    tokens = log_probs[torch.tensor(orders)][..., None]
    quality = torch.arange(len(orders[0]), 0, -1, dtype=torch.float64).expand(len(orders), -1)
    return RankedLogps(tokens, torch.ones_like(tokens, dtype=torch.bool), quality)


def test_rrhfs_ranking_is_satisfied_by_every_policy_of_the_right_order_and_asks_for_no_margin() -> None:
    config = rrhf.Config()
    for logits, violated in (([3.0, 2.0, 1.0], 0.0), ([1.02, 1.01, 1.0], 0.0), ([1.0, 2.0, 0.0], 1.0), ([0.0, 1.0, 2.0], 1 + 1 + 2)):
        log_probs = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).requires_grad_()
        losses = rrhf.loss(config, lists(log_probs, [(0, 1, 2)]))
        rank = losses.metrics["rank_loss"]
        assert isinstance(rank, Tensor)
        assert rank.item() == pytest.approx(violated, abs=1e-12)
        losses.values.sum().backward()
        assert log_probs.grad is not None
        likelihood_alone = [-1.0, 0.0, 0.0]
        assert (log_probs.grad.tolist() == likelihood_alone) == (violated == 0.0)


def test_the_likelihood_in_rrhf_pulls_all_mass_to_the_best_answer() -> None:
    policy = minimise(
        lambda x: rrhf.loss(rrhf.Config(), lists(x, [(2, 0, 1)])).values.sum(), np.full(3, 1 / 3), 500, learning_rate=0.1, optimiser="adam"
    )
    assert policy[2] > 0.99


@pytest.mark.parametrize("seed", SEEDS)
def test_pro_without_gaps_recovers_the_reward_behind_pairs_and_rankings(seed: int) -> None:
    """Rankings of a Plackett–Luce model, of which Bradley–Terry is the case of two: the list-wise loss is their likelihood, so π ∝ exp(R) over answers of
    one length, where the mean log-probability is log π."""
    reward = random_bandit(1, 4, seed).reward
    assert reward is not None
    r = reward[0].numpy()
    for size in (2, 3, 4):
        orders = list(permutations(range(4), size))
        chances = np.array([np.prod([np.exp(r[o[k]]) / np.exp(r[list(o[k:])]).sum() for k in range(size)]) for o in orders])
        config = pro.Config(reward_gaps=False, nll_coef=0.0)
        policy = minimise(lambda x, o=orders, c=config, p=chances: expected(pro.loss(c, lists(x, o)), p), np.full(4, 0.25))
        assert total_variation(policy, normalised(np.exp(r))) < 1e-5


@pytest.mark.parametrize("gap", [0.5, 2.0])
def test_pros_gaps_set_the_scale_of_what_pairs_say(gap: float) -> None:
    """An answer that wins with probability 0.8 against another, qualities a gap apart: gap · log-odds of π = ln 4."""
    one = torch.ones(2, 2, 1, dtype=torch.bool)

    def loss(log_probs: Tensor) -> Tensor:
        tokens = torch.stack([log_probs, log_probs.flip(0)])[..., None]
        quality = torch.tensor([[gap, 0.0], [gap, 0.0]], dtype=torch.float64)
        return expected(pro.loss(pro.Config(nll_coef=0.0), RankedLogps(tokens, one, quality)), np.array([0.8, 0.2]))

    policy = minimise(loss, np.array([0.5, 0.5]))
    assert gap * np.log(policy[0] / policy[1]) == pytest.approx(np.log(4), abs=1e-6)


# Pretraining with human feedback --------------------------------------------------------------------------------------------------------------


def phf_objective(config: phf.Config, data: np.ndarray, numbers: Any = None, values: Any = None) -> Callable[[Tensor], Tensor]:
    one = torch.ones(len(data), 1, dtype=torch.bool)
    given = [None if x is None else torch.as_tensor(np.asarray(x, float)).view(-1, 1) for x in (numbers, values)]
    return lambda log_probs: expected(phf.loss(config, log_probs[:, None], one, *given), data)


def documents(data: np.ndarray, reward: np.ndarray, total: int = 20_000) -> tuple[list[list[float]], np.ndarray]:
    """Documents of one segment in about the shares of `data`: their scores, and the exact shares."""
    counts = np.round(total * data).astype(int)
    return [[r] for r, n in zip(reward, counts, strict=True) for _ in range(n)], counts / counts.sum()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_reward_weighted_regression_ends_at_the_data_tilted_by_the_reward(beta: float, seed: int) -> None:
    _, data, reward = drawn(seed)
    config = phf.Config(objective="rwr", beta=beta)
    rows, share = documents(data, reward)
    made = phf.prepare(config, rows, None)
    assert made.scores is not None
    weights = [row[0] for row in made.scores]
    assert np.mean(weights) == pytest.approx(1.0)
    first = np.cumsum([0, *np.round(20_000 * data).astype(int)[:-1]])
    policy = minimise(phf_objective(config, share, np.array(weights)[first]), np.full(5, 0.2))
    assert total_variation(policy, normalised(share * np.exp(reward / beta))) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_advantage_weighted_regression_ends_at_the_same_tilt_once_the_value_is_the_mean_score(seed: int) -> None:
    """One state: the value's error is least at E[R], and exp(−E[R]/β) is a constant factor."""
    _, data, reward = drawn(seed)
    config = phf.Config(objective="awr", beta=0.7)
    one = torch.ones(5, 1, dtype=torch.bool)
    for guess in (0.0, data @ reward):
        value = torch.tensor(guess, dtype=torch.float64, requires_grad=True)
        log_probs = torch.from_numpy(np.log(data))[:, None]
        expected(phf.loss(config, log_probs, one, torch.from_numpy(reward)[:, None], value.expand(5, 1)), data).backward()
        assert value.grad is not None
        assert value.grad.item() == pytest.approx(2 * 0.5 * (guess - data @ reward), abs=1e-12)
    policy = minimise(phf_objective(config, data, reward, np.full(5, data @ reward)), np.full(5, 0.2))
    assert total_variation(policy, normalised(data * np.exp(reward / 0.7))) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_filtering_ends_at_the_data_above_the_threshold(seed: int) -> None:
    _, data, reward = drawn(seed)
    rows, share = documents(data, reward)
    threshold = float(np.sort(reward)[2])
    made = phf.prepare(phf.Config(objective="filter", threshold=threshold), rows, None)
    assert made.kept is not None
    kept = np.array([rows[i][0] for i in made.kept])
    left = np.array([(kept == r).mean() for r in reward])
    policy = minimise(phf_objective(phf.Config(objective="filter"), left), np.full(5, 0.2))
    assert total_variation(policy, normalised(share * (reward >= threshold))) < 1e-5


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_unlikelihood_of_two_tokens_ends_where_likelihood_and_unlikelihood_balance(alpha: float) -> None:
    """Token a is good with probability p_a: π(0) ∝ μ_0 p_0 + α μ_1 (1 − p_1), and the other way round."""
    data, good = np.array([0.6, 0.4]), np.array([0.9, 0.3])
    config = phf.Config(objective="unlikelihood", unlikelihood_coef=alpha)

    def loss(log_probs: Tensor) -> Tensor:
        return phf_objective(config, data * good, [1, 1])(log_probs) + phf_objective(config, data * (1 - good), [0, 0])(log_probs)

    wanted = normalised(data * good + alpha * (data * (1 - good))[::-1])
    assert total_variation(minimise(loss, np.array([0.5, 0.5])), wanted) < 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_unlikelihood_ends_at_the_data_above_the_threshold_where_segments_are_always_good_or_always_bad(seed: int) -> None:
    _, data, reward = drawn(seed)
    good = reward >= np.median(reward)
    config = phf.Config(objective="unlikelihood")
    policy = minimise(phf_objective(config, data, good), np.full(5, 0.2), 700, learning_rate=0.1, optimiser="adam")
    assert total_variation(policy, normalised(data * good)) < 0.01


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_conditional_training_learns_the_data_given_their_control_token(drop: float) -> None:
    """With one context for each control token and one for none, the optimum after <|good|> is the data above the threshold, after <|bad|> the rest, and
    after neither all of them."""
    _, data, reward = drawn(0)
    rows, share = documents(data, reward)
    config = phf.Config(threshold=float(np.median(reward)), drop_control=drop, seed=3)
    made = phf.prepare(config, rows, None)
    assert made.controls is not None
    contexts = [phf.GOOD, phf.BAD, ""]
    counts = np.zeros((3, 5))
    for row, controls in zip(rows, made.controls, strict=True):
        counts[contexts.index(controls[0]), np.flatnonzero(reward == row[0])[0]] += 1
    assert counts[2].sum() / counts.sum() == pytest.approx(drop, abs=0.01)
    one = torch.ones(5, 1, dtype=torch.bool)
    policy = TabularPolicy(torch.full((3, 5), 0.2, dtype=torch.float64))

    def loss(log_probs: Tensor) -> Tensor:
        parts = [expected(phf.loss(config, x[:, None], one), n / counts.sum()) for x, n in zip(log_probs, counts, strict=True)]
        return torch.stack(parts).sum()

    fit(policy, loss, steps=400)
    good = reward >= np.median(reward)
    np.testing.assert_allclose(policy.probs()[0], normalised(share * good), atol=0.01 if drop else 1e-5)
    np.testing.assert_allclose(policy.probs()[1], normalised(share * ~good), atol=0.01 if drop else 1e-5)
    if drop:
        np.testing.assert_allclose(policy.probs()[2], share, atol=0.02)


def test_thresholds_and_normalisers_of_held_out_rows_are_those_of_the_training_rows() -> None:
    training, held_out = [[0.0, 1.0], [2.0], [3.0, 4.0]], [[10.0], [1.0]]
    by_percentile = phf.Config(objective="unlikelihood", percentile=50)
    facts = phf.prepare(by_percentile, training, None).facts
    assert facts == {"threshold": 2.0, "share of good": 0.6}
    assert phf.prepare(by_percentile, held_out, facts).scores == [[1.0], [0.0]]
    rwr = phf.Config(objective="rwr", beta=2.0)
    mean = np.mean(np.exp(np.arange(5) / 2.0))
    scores = phf.prepare(rwr, held_out, phf.prepare(rwr, training, None).facts).scores
    assert scores is not None
    np.testing.assert_allclose(np.concatenate(scores), np.exp(np.array([10.0, 1.0]) / 2.0) / mean)
    by_document = phf.Config(objective="filter", percentile=50)
    made = phf.prepare(by_document, training, None)
    assert made.kept == [1, 2], "documents have means 0.5, 2 and 3.5"
    assert phf.prepare(by_document, [[-9.0]], made.facts).kept is None, "held-out documents all stay"
