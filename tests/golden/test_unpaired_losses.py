"""Losses on single answers, on ranked lists and on scored text against the papers' formulae, written again in numpy float64 with plain loops, with gradients
by central differences. Where a formula holds a weight without gradient, the independent side takes it from the unmoved log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from telos.algorithms.language import a_lol, gold, kto, phf, pro, rrhf, sft
from telos.core.errors import UsageError
from telos.functional.pairwise import AnswerLogps, LabelledLogps, RankedLogps
from telos.functional.reduction import Denominators, Losses, total

B, T = 5, 7
LENGTHS = np.array([7, 1, 4, 3, 6])
MASK = np.arange(T) < LENGTHS[:, None]
RNG = np.random.default_rng(0)
POLICY, REFERENCE = (-RNG.exponential(1.5, (B, T)) for _ in range(2))
LABEL = np.array([True, False, False, True, False])
ADVANTAGE = RNG.normal(size=B)
SCORE = RNG.normal(size=B)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def numerical(function: Callable[[np.ndarray], float], at: np.ndarray, h: float = 1e-5) -> np.ndarray:
    """The gradient of `function` by central differences."""
    out = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        sides = []
        for step in (h, -h):
            moved = at.copy()
            moved[index] += step
            sides.append(function(moved))
        out[index] = (sides[0] - sides[1]) / (2 * h)
    return out


def assert_loss(ours: Callable[[Tensor], Losses], theirs: Callable[[np.ndarray], np.ndarray], at: np.ndarray, mask: np.ndarray) -> None:
    """Values, and the gradient of their mean: over examples for values [B], over true tokens of `mask` for values [B, T]."""
    tokens = torch.from_numpy(at).requires_grad_()
    losses = ours(tokens)
    wanted = theirs(at)
    per_token = losses.mask is not None
    shown = losses.values.detach().numpy()
    np.testing.assert_allclose(shown[mask] if per_token else shown, wanted[mask] if per_token else wanted, rtol=1e-9, atol=1e-12)
    total(losses, Denominators(len(at), int(mask.sum()))).backward()

    def mean(moved: np.ndarray) -> float:
        found = theirs(moved)
        return float(found[mask].mean() if per_token else found.mean())

    assert tokens.grad is not None
    np.testing.assert_allclose(tokens.grad.numpy(), numerical(mean, at), rtol=1e-5, atol=1e-8)
    assert (tokens.grad.numpy()[~mask] == 0).all(), "tokens behind an answer's end have no gradient"


def view(tokens: Tensor, **changes: Any) -> LabelledLogps:
    mask = torch.from_numpy(MASK)
    found = LabelledLogps(AnswerLogps(tokens, mask), AnswerLogps(torch.from_numpy(REFERENCE), mask), None)
    return replace(found, **changes)


def sums(tokens: np.ndarray) -> np.ndarray:
    return np.array([tokens[i, : LENGTHS[i]].sum() for i in range(B)])


# KTO (Ethayarajh et al. 2024, section 4.1) ------------------------------------------------------------------------------------------------


def kto_formula(tokens: np.ndarray, beta: float, desirable: float, undesirable: float, kl: float) -> np.ndarray:
    found = []
    for i, r in enumerate(sums(tokens) - sums(REFERENCE)):
        if LABEL[i]:
            found.append(desirable - desirable * sigmoid(beta * (r - kl)))
        else:
            found.append(undesirable - undesirable * sigmoid(beta * (kl - r)))
    return np.array(found)


def kto_view(tokens: Tensor, kl: float) -> LabelledLogps:
    return view(tokens, label=torch.from_numpy(LABEL), kl=torch.full((B,), kl, dtype=torch.float64))


@pytest.mark.parametrize(("beta", "desirable", "undesirable", "kl"), [(0.1, 1.0, 1.0, 0.0), (0.5, 4 / 3, 1.0, 0.7), (2.0, 1.0, 0.0, 3.0)])
def test_kto_is_the_papers_loss(beta: float, desirable: float, undesirable: float, kl: float) -> None:
    config = kto.Config(beta=beta, desirable_weight=desirable, undesirable_weight=undesirable)
    assert_loss(
        lambda tokens: kto.loss(config, kto_view(tokens, kl)),
        lambda tokens: kto_formula(tokens, beta, desirable, undesirable, kl),
        POLICY,
        MASK,
    )


def test_kto_of_one_answer_by_hand() -> None:
    """log π/π_ref is ln 4 and z_0 is ln 2: with β = 1 the gain is ln 2, its σ 2/3; the loss is 1/3 if desirable, 2/3 if not."""
    one = torch.ones(1, 1, dtype=torch.bool)
    answer, reference = (AnswerLogps(torch.tensor([[math.log(p)]]), one) for p in (0.8, 0.2))
    for label, wanted in ((True, 1 / 3), (False, 2 / 3)):
        batch = LabelledLogps(answer, reference, torch.tensor([label]), kl=torch.tensor([math.log(2)]))
        assert kto.loss(kto.Config(beta=1.0), batch).values.item() == pytest.approx(wanted, rel=1e-6)


def test_ktos_metrics_are_those_of_desirable_and_of_undesirable_answers() -> None:
    metrics = kto.loss(kto.Config(beta=0.5), kto_view(torch.from_numpy(POLICY), 0.3)).metrics
    for name, side in (("chosen", LABEL), ("rejected", ~LABEL)):
        for kind, values in (("rewards", 0.5 * (sums(POLICY) - sums(REFERENCE))), ("logps", sums(POLICY))):
            shown, mask = metrics[f"{kind}/{name}"]
            np.testing.assert_array_equal(mask.numpy(), side)
            np.testing.assert_allclose(shown.numpy(), values)
    assert isinstance(metrics["kl/reference_point"], Tensor)
    assert metrics["kl/reference_point"].tolist() == [0.3] * B


# GOLD (Pang and He 2021, algorithm 1) ------------------------------------------------------------------------------------------------------


def gold_formula(tokens: np.ndarray, c: gold.Config) -> np.ndarray:
    """Per token, with the weight taken from POLICY."""
    found = np.zeros((B, T))
    for i in range(B):
        for t in range(LENGTHS[i]):
            if c.variant == "delta":
                q = c.gamma ** (LENGTHS[i] - 1 - t)
            else:
                q = 0.0
                for k in range(c.horizon + 1):
                    logp = REFERENCE[i, t + k] if t + k < LENGTHS[i] else 0.0
                    q += c.gamma**k * max(logp - c.baseline if c.variant == "p" else math.exp(logp), c.reward_floor)
            found[i, t] = -max(math.exp(POLICY[i, t]), c.weight_floor) * q * tokens[i, t]
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_floor": 0.0, "reward_floor": 1.0, "baseline": -1.5, "horizon": 2, "gamma": 0.7},
        {"horizon": 0},
        {"horizon": 9, "gamma": 0.5},
        {"variant": "s", "reward_floor": 0.2, "gamma": 0.9},
        {"variant": "delta", "weight_floor": 0.2},
        {"variant": "delta", "gamma": 0.5},
    ],
    ids=str,
)
def test_gold_is_the_weighted_policy_gradient_of_its_returns(options: dict[str, Any]) -> None:
    config = gold.Config(**options)
    assert_loss(lambda tokens: gold.loss(config, view(tokens)), lambda tokens: gold_formula(tokens, config), POLICY, MASK)


def test_golds_options_that_a_reward_does_not_read_are_refused() -> None:
    gold.Config(variant="s", horizon=1)
    for options in ({"variant": "s", "baseline": -5.0}, {"variant": "delta", "horizon": 1}, {"variant": "delta", "reward_floor": 0.2}):
        with pytest.raises(UsageError, match=f"--{list(options)[1]} has no effect with --variant {options['variant']}"):
            gold.Config(**options)


# A-LoL (Baheti et al. 2023) ----------------------------------------------------------------------------------------------------------------


def a_lol_formula(tokens: np.ndarray, c: a_lol.Config) -> np.ndarray:
    found = []
    for i in range(B):
        own = range(LENGTHS[i])
        gaps = [POLICY[i, t] - REFERENCE[i, t] for t in own]
        low, high = max(0.0, 1 - c.clip_range), 1 + c.clip_range
        if c.variant == "seq":
            likelihood = sum(min(max(math.exp(gaps[t]), low), high) * tokens[i, t] for t in own)
        elif c.variant == "a-lol":
            likelihood = min(max(math.exp(sum(gaps)), low), high) * sum(tokens[i, t] for t in own)
        else:
            likelihood = sum(tokens[i, t] for t in own)
        penalty = c.kl_coef * sum(tokens[i, t] - REFERENCE[i, t] for t in own) if c.variant == "kl" else 0.0
        found.append(-ADVANTAGE[i] * likelihood + penalty)
    return np.array(found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_range": 0.2},
        {"clip_range": 5.0},
        {"variant": "seq"},
        {"variant": "seq", "clip_range": 0.0},
        {"variant": "ref-free"},
        {"variant": "kl"},
        {"variant": "kl", "kl_coef": 2.0},
    ],
    ids=str,
)
def test_a_lol_is_the_weighted_likelihood_of_whole_answers(options: dict[str, Any]) -> None:
    config = a_lol.Config(**options)
    advantage = torch.from_numpy(ADVANTAGE)
    assert_loss(lambda tokens: a_lol.loss(config, view(tokens, advantage=advantage)), lambda x: a_lol_formula(x, config), POLICY, MASK)


def test_a_lol_with_a_kl_penalty_has_the_gradient_of_ref_free_with_the_advantage_less_beta() -> None:
    found = []
    for config, advantage in ((a_lol.Config(variant="kl", kl_coef=0.4), ADVANTAGE), (a_lol.Config(variant="ref-free"), ADVANTAGE - 0.4)):
        tokens = torch.from_numpy(POLICY).requires_grad_()
        a_lol.loss(config, view(tokens, advantage=torch.from_numpy(advantage))).values.sum().backward()
        found.append(tokens.grad)
    torch.testing.assert_close(*found)


def test_a_lols_clipped_weights_are_counted() -> None:
    """Weights π/π_ref of 4, 1 and 1/20 in answers of one token, clipped to [0.1, 1.9]."""
    one = torch.ones(3, 1, dtype=torch.bool)
    answer, reference = (AnswerLogps(torch.tensor(p).log()[:, None], one) for p in ([0.4, 0.3, 0.01], [0.1, 0.3, 0.2]))
    for variant in ("a-lol", "seq"):
        metrics = a_lol.loss(a_lol.Config(variant=variant), LabelledLogps(answer, reference, None, advantage=torch.ones(3))).metrics
        shown = {name: (value[0] if isinstance(value, tuple) else value).flatten().tolist() for name, value in metrics.items()}
        assert shown["importance_weight"] == pytest.approx([1.9, 1.0, 0.1])
        assert shown["clip_ratio/high"] == [1, 0, 0]
        assert shown["clip_ratio/low"] == [0, 0, 1]


def test_a_lols_options_that_a_variant_does_not_read_are_refused() -> None:
    for variant, name in (("ref-free", "clip_range"), ("kl", "clip_range"), ("a-lol", "kl_coef"), ("seq", "kl_coef")):
        with pytest.raises(UsageError, match=f"--{name} has no effect with --variant {variant}"):
            a_lol.Config(**{"variant": variant, name: 0.5})


@pytest.mark.parametrize(("method", "variant"), [(a_lol, "ref-free"), (gold, "delta")])
def test_without_importance_weights_or_rewards_of_it_the_reference_is_spared_unless_one_was_named(method: Any, variant: str) -> None:
    assert method.Config().spares == frozenset()
    assert method.Config(variant=variant).spares == {"reference"}
    assert method.Config(variant=variant, reference="folder").spares == frozenset()


# Ranked lists ------------------------------------------------------------------------------------------------------------------------------

K = 4
ANSWERS = np.array([[3, 7, 1, 2], [5, 2, 0, 0], [4, 4, 6, 0], [1, 3, 2, 7], [2, 2, 0, 0]])  # lengths; 0: the list is shorter
RANKED_MASK = np.arange(T) < ANSWERS[:, :, None]
# Ties, an order that is not that of the list, and a list without any preference.
QUALITY = np.array([[2.0, 0.5, 0.5, -1.0], [1, 0, 0, 0], [0.3, 0.9, 0.1, 0], [3, 3, 1, 2], [1, 1, 0, 0]])
RANKED = -RNG.exponential(1.5, (B, K, T))


def ranked(tokens: Tensor) -> RankedLogps:
    there = torch.from_numpy(ANSWERS > 0)
    return RankedLogps(tokens, torch.from_numpy(RANKED_MASK), torch.from_numpy(QUALITY).masked_fill(~there, -torch.inf))


def list_scores(tokens: np.ndarray, i: int, penalty: float = 1.0) -> list[float]:
    return [tokens[i, k, : ANSWERS[i, k]].sum() / ANSWERS[i, k] ** penalty for k in range(K) if ANSWERS[i, k]]


def best_of(i: int) -> int:
    return max((k for k in range(K) if ANSWERS[i, k]), key=lambda k: (QUALITY[i, k], -k))


def rrhf_formula(tokens: np.ndarray, c: rrhf.Config) -> np.ndarray:
    found = []
    for i in range(B):
        p = list_scores(tokens, i, c.length_penalty)
        rank = sum(max(0.0, p[a] - p[b]) for a in range(len(p)) for b in range(len(p)) if QUALITY[i, a] < QUALITY[i, b])
        nll = -list_scores(tokens, i, 1.0 if c.nll_per_token else 0.0)[best_of(i)]
        found.append(c.rank_coef * rank + nll)
    return np.array(found)


@pytest.mark.parametrize("options", [{}, {"rank_coef": 100.0, "nll_per_token": True}, {"length_penalty": 0.5}], ids=str)
def test_rrhf_is_the_papers_loss_on_lists_of_any_size(options: dict[str, Any]) -> None:
    config = rrhf.Config(**options)
    assert_loss(lambda tokens: rrhf.loss(config, ranked(tokens)), lambda tokens: rrhf_formula(tokens, config), RANKED, RANKED_MASK)


def pro_formula(tokens: np.ndarray, c: pro.Config) -> np.ndarray:
    found = []
    for i in range(B):
        s, value = list_scores(tokens, i), 0.0
        for k in range(len(s)):
            below = [j for j in range(len(s)) if QUALITY[i, j] < QUALITY[i, k]]
            if not below:
                continue
            temperature = {j: 1 / (QUALITY[i, k] - QUALITY[i, j]) if c.reward_gaps else 1.0 for j in below}
            own = math.exp(s[k] / min(temperature.values()))
            value -= math.log(own / (own + sum(math.exp(s[j] / temperature[j]) for j in below)))
        nll = -list_scores(tokens, i, 0.0)[best_of(i)]
        found.append(value + c.nll_coef * (len(s) - 1) ** 2 * nll)
    return np.array(found)


@pytest.mark.parametrize("options", [{}, {"reward_gaps": False}, {"nll_coef": 1.0}], ids=str)
def test_pro_is_the_papers_loss_on_lists_of_any_size(options: dict[str, Any]) -> None:
    config = pro.Config(**options)
    assert_loss(lambda tokens: pro.loss(config, ranked(tokens)), lambda tokens: pro_formula(tokens, config), RANKED, RANKED_MASK)


@pytest.mark.parametrize("gap", [0.25, 1.0, 3.0])
def test_pro_of_two_answers_is_the_logistic_loss_of_their_scaled_margin(gap: float) -> None:
    tokens, mask = torch.tensor([[[-1.0, -2.0], [-0.5, 0.0]]]), torch.tensor([[[True, True], [True, False]]])
    batch = RankedLogps(tokens, mask, torch.tensor([[gap, 0.0]]))
    values = pro.loss(pro.Config(nll_coef=0.0), batch).values
    assert values.item() == pytest.approx(math.log(1 + math.exp(-gap * (-1.5 + 0.5))), rel=1e-6)


@pytest.mark.parametrize("method", [rrhf, pro])
def test_the_order_in_which_a_lists_answers_stand_does_not_matter(method: Any) -> None:
    """Four answers of different quality, in every order of a rotation."""
    tokens, mask = torch.from_numpy(RANKED[:1]), torch.from_numpy(RANKED_MASK[:1])
    quality = torch.tensor([[2.0, 0.5, 0.1, -1.0]], dtype=torch.float64)
    found = [
        method.loss(method.Config(), RankedLogps(*(x.roll(turn, 1) for x in (tokens, mask, quality)))).values.item() for turn in range(K)
    ]
    assert found == pytest.approx([found[0]] * K, rel=1e-12)


def test_lists_are_described_under_the_names_of_pairs() -> None:
    metrics = rrhf.diagnostics(ranked(torch.from_numpy(RANKED)), ranked(torch.from_numpy(RANKED)).mean)
    scores = [list_scores(RANKED, i) for i in range(B)]
    chosen = [scores[i][best_of(i)] for i in range(B)]
    np.testing.assert_allclose(metrics["rewards/chosen"], chosen)
    rejected, several = metrics["rewards/rejected"]
    np.testing.assert_allclose(rejected, [(sum(s) - best) / (len(s) - 1) for s, best in zip(scores, chosen, strict=True)])
    assert several.all()
    agree, judged = metrics["rewards/accuracies"]
    np.testing.assert_array_equal(judged, [True, True, True, True, False])
    for i in range(4):
        pairs = [(a, b) for a in range(len(scores[i])) for b in range(len(scores[i])) if QUALITY[i, a] > QUALITY[i, b]]
        assert float(agree[i]) == pytest.approx(np.mean([scores[i][a] > scores[i][b] for a, b in pairs]))


# Pretraining with human feedback (Korbak et al. 2023) ---------------------------------------------------------------------------------------

NUMBERS, VALUES = RNG.normal(size=(B, T)), RNG.normal(size=(B, T))
GOOD = RNG.random((B, T)) < 0.5


def test_phf_by_maximum_likelihood_filtering_or_conditioning_is_sft_on_other_rows() -> None:
    mask = torch.from_numpy(MASK)
    for config in (phf.Config(objective="mle"), phf.Config(objective="filter"), phf.Config(objective="conditional")):
        found = []
        for loss in (lambda x, c=config: phf.loss(c, x, mask), lambda x: sft.loss(sft.Config(), x, mask)):
            tokens = torch.from_numpy(POLICY).requires_grad_()
            value = total(loss(tokens), Denominators(B, int(MASK.sum())))
            value.backward()
            assert tokens.grad is not None
            found.append((value.item(), tokens.grad.tolist()))
        assert found[0] == found[1]


@pytest.mark.parametrize("alpha", [1.0, 0.01, 0.0])
def test_unlikelihood_lowers_tokens_of_bad_segments_by_the_logarithm_of_the_rest(alpha: float) -> None:
    def formula(tokens: np.ndarray) -> np.ndarray:
        return np.where(GOOD, -tokens, -alpha * np.log(1 - np.exp(tokens)))

    config = phf.Config(objective="unlikelihood", unlikelihood_coef=alpha)
    scores, mask = torch.from_numpy(GOOD).double(), torch.from_numpy(MASK)
    assert_loss(lambda tokens: phf.loss(config, tokens, mask, scores), formula, POLICY, MASK)


def test_unlikelihood_of_a_certain_token_is_finite() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    for tokens in (torch.tensor([[0.0, -1e-9, -80.0]], requires_grad=True), torch.tensor([[0.0, -1e-4, -1e4]], requires_grad=True)):
        losses = phf.loss(phf.Config(objective="unlikelihood"), tokens, mask, torch.zeros(1, 3))
        losses.values.sum().backward()
        assert losses.values.isfinite().all()
        assert tokens.grad is not None
        assert tokens.grad.isfinite().all()


def test_reward_weighted_regression_weighs_tokens_by_the_numbers_of_their_segments() -> None:
    scores, mask = torch.from_numpy(np.exp(NUMBERS)), torch.from_numpy(MASK)
    assert_loss(lambda tokens: phf.loss(phf.Config(objective="rwr"), tokens, mask, scores), lambda x: -np.exp(NUMBERS) * x, POLICY, MASK)


@pytest.mark.parametrize(("beta", "alpha", "most"), [(1.0, 0.5, 1000.0), (0.1, 0.9, 50.0), (10.0, 1.0, 1.05)])
def test_advantage_weighted_regression_is_the_papers_loss_and_trains_values_by_their_error_alone(
    beta: float, alpha: float, most: float
) -> None:
    def formula(tokens: np.ndarray, values: np.ndarray = VALUES) -> np.ndarray:
        weight = np.minimum(np.exp((NUMBERS - VALUES) / beta), most)
        return -alpha * weight * tokens + (1 - alpha) * (values - NUMBERS) ** 2

    config = phf.Config(objective="awr", beta=beta, policy_coef=alpha, max_weight=most)
    scores, mask = torch.from_numpy(NUMBERS), torch.from_numpy(MASK)
    assert_loss(lambda tokens: phf.loss(config, tokens, mask, scores, torch.from_numpy(VALUES)), formula, POLICY, MASK)
    assert_loss(lambda values: phf.loss(config, torch.from_numpy(POLICY), mask, scores, values), lambda v: formula(POLICY, v), VALUES, MASK)


# All ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_behind_an_answers_end_changes_neither_loss_nor_gradient(rubbish: float) -> None:
    found = []
    for fill in (0.0, rubbish):
        tokens = torch.from_numpy(np.where(MASK, POLICY, fill)).requires_grad_()
        lists = torch.from_numpy(np.where(RANKED_MASK, RANKED, fill)).requires_grad_()
        mask, scores = torch.from_numpy(MASK), torch.from_numpy(NUMBERS)
        reference = AnswerLogps(torch.from_numpy(np.where(MASK, REFERENCE, fill)), mask)
        batch = replace(kto_view(tokens, 0.3), advantage=torch.from_numpy(ADVANTAGE), reference=reference)
        losses = [
            kto.loss(kto.Config(), batch),
            *(gold.loss(gold.Config(variant=variant), batch) for variant in ("p", "s", "delta")),
            *(a_lol.loss(a_lol.Config(variant=variant), batch) for variant in ("a-lol", "seq", "ref-free", "kl")),
            *(method.loss(method.Config(), ranked(lists)) for method in (rrhf, pro)),
            *(
                phf.loss(phf.Config(objective=objective), tokens, mask, scores, torch.from_numpy(VALUES))
                for objective in ("mle", "unlikelihood", "rwr", "awr")
            ),
        ]
        value = torch.stack([total(loss, Denominators(B, int(MASK.sum()))) for loss in losses]).sum()
        value.backward()
        assert tokens.grad is not None
        assert lists.grad is not None
        found.append((value.item(), tokens.grad.tolist(), lists.grad.tolist()))
    assert found[0] == found[1]
