"""Process rewards against the papers' formulae, written again with plain loops, against enumerations, and against exact optima."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit, softmax
from scipy.stats import mannwhitneyu
from torch import Tensor

from telos.algorithms.language import implicit_prm, nca, process_reward
from telos.environments.bandit import TabularPolicy, fit, total_variation
from telos.functional.pairwise import AnswerLogps, LabelledLogps, PairLogps
from telos.functional.process import aggregate, auc, calibration_error, progress, refine, step_metrics, success_of_best
from telos.functional.reduction import Denominators, Losses, total

CHANCES = st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=7)


def row(values: list[float]) -> tuple[Tensor, Tensor]:
    scores = torch.tensor([values], dtype=torch.float64)
    return scores, torch.ones_like(scores, dtype=torch.bool)


# Clip and Delta (Gao et al. 2024) ----------------------------------------------------------------------------------------------------------


def test_clip_and_delta_by_hand() -> None:
    scores, mask = row([0.9, 0.2, 0.6, 0.8])
    clipped, stepped = refine(scores, mask, clip=0.5), refine(scores, mask, delta=True)
    torch.testing.assert_close(clipped, torch.tensor([[0.0, -0.3, 0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(stepped, torch.tensor([[0.7, -0.4, 0.6, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(refine(scores, mask, clip=0.5, delta=True), torch.tensor([[0.3, -0.3, 0.0, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(refine(scores, mask), scores)


@settings(max_examples=60, deadline=None)
@given(CHANCES, st.one_of(st.none(), st.floats(0, 1)))
def test_after_delta_the_return_from_a_step_is_its_own_score_and_the_whole_is_the_firsts(values: list[float], clip: float | None) -> None:
    """Whatever follows; and the last step, which the success reward judges, has none."""
    found = refine(*row(values), clip=clip, delta=True)[0].numpy()
    own = values if clip is None else [min(value - clip, 0.0) for value in values]
    for k in range(len(values) - 1):
        assert found[k:].sum() == pytest.approx(own[k], abs=1e-12)
    assert found[-1] == 0


@settings(max_examples=60, deadline=None)
@given(CHANCES, st.floats(0, 1))
def test_after_clip_no_sum_of_rewards_is_positive(values: list[float], clip: float) -> None:
    assert (refine(*row(values), clip=clip) <= 0).all()
    assert refine(*row(values), clip=clip, delta=True).sum() <= 1e-12


def test_repeating_right_steps_gains_nothing_after_refinement_and_without_bound_before() -> None:
    plain, clipped, stepped = ([] for _ in range(3))
    for repeats in (1, 5, 50):
        scores, mask = row([0.8, *[0.95] * repeats, 0.7])
        plain.append(float(scores.sum()))
        clipped.append(float(refine(scores, mask, clip=0.9).sum()))
        stepped.append(float(refine(scores, mask, delta=True).sum()))
    assert plain[2] - plain[0] == pytest.approx(49 * 0.95)
    assert clipped == pytest.approx([-0.1 - 0.2] * 3)
    assert stepped == pytest.approx([0.8] * 3)


# Arithmetic on steps -----------------------------------------------------------------------------------------------------------------------


def scattered(values: list[list[float]], width: int = 12) -> tuple[Tensor, Tensor, list[list[int]]]:
    """The rows' numbers at random places among `width`, rubbish elsewhere."""
    rng = np.random.default_rng(len(values))
    places = [sorted(rng.choice(width, len(some), replace=False).tolist()) for some in values]
    scores, mask = torch.full((len(values), width), 7.5, dtype=torch.float64), torch.zeros(len(values), width, dtype=torch.bool)
    for i, (some, at) in enumerate(zip(values, places, strict=True)):
        scores[i, at], mask[i, at] = torch.tensor(some, dtype=torch.float64), True
    return scores, mask, places


ROWS = [[0.3, 0.9, 0.5, 0.2], [0.7], [0.4, 0.4, 0.1], [0.6, 0.1]]


@pytest.mark.parametrize("options", [{"clip": 0.5}, {"delta": True}, {"clip": 0.5, "delta": True}], ids=str)
def test_steps_anywhere_among_the_tokens_are_refined_as_steps_one_after_another(options: dict) -> None:
    scores, mask, places = scattered(ROWS)
    found = refine(scores, mask, **options)
    for i, some in enumerate(ROWS):
        torch.testing.assert_close(found[i, places[i]], refine(*row(some), **options)[0])
    assert (found[~mask] == 0).all()


def test_progress_is_the_difference_to_the_step_before_and_to_the_prompt_at_first() -> None:
    scores, mask, places = scattered(ROWS)
    first = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = progress(scores, mask, first)
    for i, some in enumerate(ROWS):
        np.testing.assert_allclose(found[i, places[i]].numpy(), np.diff([float(first[i]), *some]), atol=1e-12)
        assert float(found[i].sum()) == pytest.approx(some[-1] - float(first[i]))
    torch.testing.assert_close(progress(scores, mask)[1, places[1]], torch.tensor([0.7], dtype=torch.float64))
    assert (found[~mask] == 0).all()


def test_aggregates_are_those_of_plain_python() -> None:
    scores, mask, _ = scattered(ROWS)
    by_hand: dict[str, Callable[[list[float]], float]] = {
        "last": lambda some: some[-1],
        "min": min,
        "product": math.prod,
        "sum": sum,
        "mean": lambda some: sum(some) / len(some),
    }
    for how, function in by_hand.items():
        assert aggregate(scores, mask, how).tolist() == pytest.approx([function(some) for some in ROWS])  # type: ignore[arg-type]
        assert aggregate(scores, torch.zeros_like(mask), how).tolist() == [0.0] * 4  # type: ignore[arg-type]


# Best of K (Chen et al. 2021) --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 6])
def test_success_of_best_is_the_mean_over_all_subsets(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = [1] * c + [0] * (n - c)
        wanted = np.mean([max(subset) for subset in itertools.combinations(draws, k)])
        assert float(success_of_best(torch.tensor(c), torch.tensor(n), k)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("q", [0.05, 0.4, 0.9])
def test_success_of_best_has_no_bias(q: float) -> None:
    """Over all counts of 8 draws, weighted by the binomial law, the estimate averages to 1 − (1 − q)^K; 1 − (1 − c/8)^K does not."""
    counts = torch.arange(9)
    law = np.array([math.comb(8, c) * q**c * (1 - q) ** (8 - c) for c in range(9)])
    for k in (1, 2, 5):
        found = success_of_best(counts, torch.full((9,), 8), k).numpy()
        assert float(law @ found) == pytest.approx(1 - (1 - q) ** k, abs=1e-12)
    plugged_in = 1 - (1 - counts.numpy() / 8) ** 5
    assert abs(float(law @ plugged_in) - (1 - (1 - q) ** 5)) > 1e-4


def test_success_of_best_is_unknown_with_fewer_draws() -> None:
    assert success_of_best(torch.tensor([1, 1]), torch.tensor([2, 3]), 3).isnan().tolist() == [True, False]


# Metrics -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_area_under_the_curve_is_the_mann_whitney_statistic_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, right = rng.integers(0, 6, 40).astype(np.float64), rng.random(40) < 0.4
    statistic = mannwhitneyu(scores[right], scores[~right]).statistic
    assert auc(torch.from_numpy(scores), torch.from_numpy(right)) == pytest.approx(statistic / (right.sum() * (~right).sum()), abs=1e-12)
    assert math.isnan(auc(torch.zeros(3), torch.ones(3, dtype=torch.bool)))


def test_the_calibration_error_by_hand() -> None:
    """Two probabilities in [0.2, 0.3) with gap +0.04 together, one in [0.9, 1] with gap −0.05: (0.04 + 0.05) / 3."""
    chance, labels = torch.tensor([0.22, 0.26, 0.95]), torch.tensor([0.0, 0.44, 1.0])
    assert calibration_error(chance, labels) == pytest.approx(0.09 / 3, abs=1e-6)
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])) == 0


def test_the_order_of_steps_is_counted_within_answers_alone() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, -3.0, 9.0]])
    labels = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    wins, pairs = step_metrics(logits, labels, mask)["steps/order"]
    assert wins[pairs].tolist() == [1.0, 1.0, 0.5], "2 and 0.5 over −1; −3 and −3 are equal; the padded step has no part in it"
    chance, right = step_metrics(logits, labels, mask)["steps/right"]
    np.testing.assert_allclose(chance[right].numpy(), expit([2.0, 0.5, -3.0]), rtol=1e-6)


# Losses ------------------------------------------------------------------------------------------------------------------------------------


def assert_loss(
    ours: Callable[[Tensor], Losses], theirs: Callable[[np.ndarray], np.ndarray], at: np.ndarray, mask: np.ndarray | None = None
) -> None:
    """Values, and the gradient of their mean by central differences."""
    x = torch.from_numpy(at).requires_grad_()
    losses = ours(x)
    kept = np.ones_like(theirs(at), dtype=bool) if mask is None else mask
    np.testing.assert_allclose(losses.values.detach().numpy()[kept], theirs(at)[kept], rtol=1e-9)
    total(losses, Denominators(len(at), int(kept.sum()))).backward()
    wanted = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        sides = []
        for h in (1e-5, -1e-5):
            moved = at.copy()
            moved[index] += h
            sides.append(theirs(moved)[kept].mean())
        wanted[index] = (sides[0] - sides[1]) / 2e-5
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), wanted, rtol=1e-5, atol=1e-9)


RNG = np.random.default_rng(0)
LENGTHS = np.array([4, 1, 3])
MASK = np.arange(4) < LENGTHS[:, None]
POLICY, REFERENCE, REJECTED, REJECTED_REFERENCE = (-RNG.exponential(1.5, (3, 4)) for _ in range(4))


def answer(tokens: Tensor | np.ndarray) -> AnswerLogps:
    return AnswerLogps(torch.as_tensor(tokens), torch.from_numpy(MASK))


def ratios(tokens: np.ndarray, reference: np.ndarray) -> np.ndarray:
    return np.array([sum(tokens[i, t] - reference[i, t] for t in range(LENGTHS[i])) for i in range(3)])


def test_the_process_reward_models_loss_is_the_cross_entropy_of_each_step() -> None:
    logits, labels = RNG.normal(size=(3, 4)), np.array([[1, 0, 0.25, 1], [0.5, 0, 0, 0], [0, 1, 1, 0]])
    assert_loss(
        lambda z: process_reward.loss(process_reward.Config(), z, torch.from_numpy(labels), torch.from_numpy(MASK)),
        lambda z: -(labels * np.log(expit(z)) + (1 - labels) * np.log(1 - expit(z))),
        logits,
        MASK,
    )


def test_a_step_whose_labels_are_chances_ends_at_their_mean() -> None:
    labels = np.array([0.25, 1.0, 0.0, 0.5])
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([z], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = process_reward.loss(
            process_reward.Config(), z.expand(1, 4), torch.from_numpy(labels)[None], torch.ones(1, 4, dtype=torch.bool)
        )
        value = total(found, Denominators(1, 4))
        value.backward()
        return value

    optimiser.step(closure)  # type: ignore[arg-type]
    assert expit(z.item()) == pytest.approx(labels.mean(), abs=1e-4)


@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_the_implicit_prms_loss_is_the_cross_entropy_of_the_scaled_log_ratio(beta: float) -> None:
    labels = np.array([True, False, True])

    def formula(tokens: np.ndarray) -> np.ndarray:
        r = beta * ratios(tokens, REFERENCE)
        return -np.where(labels, np.log(expit(r)), np.log(1 - expit(r)))

    config, given_labels = implicit_prm.Config(beta=beta), torch.from_numpy(labels)
    assert_loss(lambda x: implicit_prm.loss(config, LabelledLogps(answer(x), answer(REFERENCE), given_labels)), formula, POLICY)


def nca_general(rewards: np.ndarray, scores: np.ndarray, alpha: float) -> np.ndarray:
    """L_NCA of Chen et al. 2024 for K answers [B, K] with scores [B, K]."""
    weight, k = softmax(scores / alpha, axis=1), rewards.shape[1]
    return -(weight * np.log(expit(rewards)) + np.log(expit(-rewards)) / k).sum(1)


@pytest.mark.parametrize("beta", [0.01, 0.5])
def test_ncas_pair_loss_is_its_general_loss_where_one_of_two_answers_is_preferred_for_certain(beta: float) -> None:
    def formula(tokens: np.ndarray) -> np.ndarray:
        rewards = beta * np.stack([ratios(tokens, REFERENCE), ratios(REJECTED, REJECTED_REFERENCE)], 1)
        return nca_general(rewards, np.array([[1.0, 0.0]] * 3), alpha=1e-3)

    def ours(tokens: Tensor) -> Losses:
        pair = PairLogps(answer(tokens), answer(REJECTED), answer(REFERENCE), answer(REJECTED_REFERENCE), torch.zeros(3))
        return nca.loss(nca.Config(beta=beta), pair)

    assert_loss(ours, formula, POLICY)


def test_nca_of_one_pair_by_hand() -> None:
    """Both log-ratios are 0: ln 2 + ½ ln 2 + ½ ln 2 whatever β; and the gradient still lifts the chosen answer, as ½ σ(r) − σ(−r) < 0 at r = 0."""
    one = torch.ones(1, 1, dtype=torch.bool)
    x = torch.tensor([[-1.0]], requires_grad=True)
    views = [AnswerLogps(x, one), *(AnswerLogps(torch.tensor([[-1.0]]), one) for _ in range(3))]
    values = nca.loss(nca.Config(beta=2.0), PairLogps(*views, torch.zeros(1))).values
    assert values.item() == pytest.approx(2 * math.log(2))
    values.backward()
    assert x.grad.item() == pytest.approx(2.0 * (0.25 - 0.5))  # type: ignore[union-attr]


# Optima ------------------------------------------------------------------------------------------------------------------------------------


def one_token(log_probs: Tensor, chosen: np.ndarray) -> AnswerLogps:
    return AnswerLogps(log_probs[torch.from_numpy(chosen)][:, None], torch.ones(len(chosen), 1, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_implicit_prm_ends_where_its_reward_is_the_log_odds_of_a_right_answer(seed: int, beta: float) -> None:
    """The data's chances of being right are those of a policy drawn at random, so that such a policy exists."""
    rng = np.random.default_rng(seed)
    reference, wanted, data = (softmax(rng.normal(size=5)) for _ in range(3))
    chance = expit(beta * np.log(wanted / reference))
    policy, answers = TabularPolicy(torch.from_numpy(reference)[None]), np.arange(5)
    fixed = torch.from_numpy(np.log(reference))

    def objective(log_probs: Tensor) -> Tensor:
        parts = []
        for label, weight in ((True, data * chance), (False, data * (1 - chance))):
            view = LabelledLogps(one_token(log_probs[0], answers), one_token(fixed, answers), torch.full((5,), label))
            parts.append((torch.from_numpy(weight) * implicit_prm.loss(implicit_prm.Config(beta=beta), view).values).sum())
        return torch.stack(parts).sum()

    fit(policy, objective, steps=400)
    found = policy.probs()[0].numpy()
    assert total_variation(found, wanted) < 1e-4
    np.testing.assert_allclose(beta * np.log(found / reference), logit(chance), atol=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_nca_with_beta_one_ends_at_the_law_of_chosen_answers(seed: int) -> None:
    """Pairs of two draws from the reference, ordered by Bradley–Terry: where DPO with the same β ends at another policy."""
    rng = np.random.default_rng(seed)
    reference, reward = softmax(rng.normal(size=4)), rng.normal(size=4)
    first, second = (side.ravel() for side in np.meshgrid(np.arange(4), np.arange(4), indexing="ij"))
    weight = 2 * reference[first] * reference[second] * expit(reward[first] - reward[second])  # first is chosen; both orders of drawing
    chosen = np.bincount(first, weight, minlength=4)
    assert chosen.sum() == pytest.approx(1.0)
    fixed = torch.from_numpy(np.log(reference))

    def objective(log_probs: Tensor) -> Tensor:
        views = [one_token(of, side) for of in (log_probs[0], fixed) for side in (first, second)]
        pair = PairLogps(*views, torch.zeros(16))
        return (torch.from_numpy(weight) * nca.loss(nca.Config(beta=1.0), pair).values).sum()

    policy = TabularPolicy(torch.from_numpy(reference)[None])
    fit(policy, objective, steps=400)
    assert total_variation(policy.probs()[0].numpy(), chosen) < 1e-4
    assert total_variation(chosen, softmax(np.log(reference) + reward)) > 0.02
