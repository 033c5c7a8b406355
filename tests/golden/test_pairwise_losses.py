"""Losses on pairs and on single answers against the papers' formulae, written again in numpy float64, with gradients by central differences.

Nothing of ours is used on the independent side: log σ(x) = −log(1 + e^−x), sums and means over the real tokens of each row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from telos.algorithms.language import dpo, reward_model, sft, simpo
from telos.functional.pairwise import AnswerLogps, PairLogps
from telos.functional.reduction import Denominators, Losses, total

B, T = 5, 7
LENGTHS = {"chosen": [7, 1, 4, 3, 6], "rejected": [2, 5, 7, 1, 3]}


def logsig(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


def data(seed: int = 0) -> dict[str, np.ndarray]:
    """Token log-probabilities [B, T] of both sides under the policy and the reference, with rubbish behind each row's end, and margins."""
    rng = np.random.default_rng(seed)
    found = {name: -rng.exponential(1.5, (B, T)) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")}
    return found | {"margin": rng.uniform(0, 2, B)}


def mask_of(side: str) -> np.ndarray:
    return np.arange(T) < np.array(LENGTHS[side])[:, None]


def pair(values: dict[str, np.ndarray], policy: dict[str, Tensor]) -> PairLogps:
    masks = {side: torch.from_numpy(mask_of(side)) for side in LENGTHS}
    references = {side: AnswerLogps(torch.from_numpy(values[f"ref_{side}"]), masks[side]) for side in LENGTHS}
    return PairLogps(
        AnswerLogps(policy["chosen"], masks["chosen"]),
        AnswerLogps(policy["rejected"], masks["rejected"]),
        references["chosen"],
        references["rejected"],
        torch.from_numpy(values["margin"]),
    )


def sums(values: dict[str, np.ndarray], side: str, prefix: str = "") -> np.ndarray:
    return np.array([values[prefix + side][i, : LENGTHS[side][i]].sum() for i in range(B)])


def numerical(function: Callable[[dict[str, np.ndarray]], float], values: dict[str, np.ndarray], name: str, h: float = 1e-5) -> np.ndarray:
    """The gradient of `function` with respect to values[name], by central differences."""
    out = np.zeros_like(values[name])
    for index in np.ndindex(*out.shape):
        sides = []
        for sign in (h, -h):
            moved = {key: value.copy() for key, value in values.items()}
            moved[name][index] += sign
            sides.append(function(moved))
        out[index] = (sides[0] - sides[1]) / (2 * h)
    return out


def assert_loss(ours: Callable[[PairLogps], Losses], theirs: Callable[[dict[str, np.ndarray]], np.ndarray]) -> None:
    """Values to 1e-6 and gradients to 1e-5, per pair and for the mean over all pairs."""
    values = data()
    policy = {side: torch.from_numpy(values[side]).requires_grad_() for side in LENGTHS}
    losses = ours(pair(values, policy))
    assert losses.mask is None
    np.testing.assert_allclose(losses.values.detach().numpy(), theirs(values), rtol=1e-6, atol=1e-6)
    total(losses, Denominators(B, 10**6)).backward()
    for side in LENGTHS:
        wanted = numerical(lambda moved: float(theirs(moved).mean()), values, side)
        gradient = policy[side].grad
        assert gradient is not None
        np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-5, atol=1e-8)
        assert (gradient.numpy()[~mask_of(side)] == 0).all(), "tokens behind an answer's end have no gradient"


# DPO (Rafailov et al. 2023, eq. 7) and its conservative form (Mitchell 2023) ------------------------------------------------------------


def dpo_formula(values: dict[str, np.ndarray], beta: float, eps: float) -> np.ndarray:
    h = (sums(values, "chosen") - sums(values, "chosen", "ref_")) - (sums(values, "rejected") - sums(values, "rejected", "ref_"))
    return -(1 - eps) * logsig(beta * h) - eps * logsig(-beta * h)


@pytest.mark.parametrize(("beta", "eps"), [(0.1, 0.0), (0.5, 0.0), (2.0, 0.0), (0.1, 0.1), (1.0, 0.49)])
def test_dpo_is_the_papers_loss(beta: float, eps: float) -> None:
    config = dpo.Config(beta=beta, label_smoothing=eps)
    assert_loss(lambda p: dpo.loss(config, p), lambda values: dpo_formula(values, beta, eps))


def test_dpo_of_one_pair_by_hand() -> None:
    """log π/π_ref is ln 2 for the chosen and −ln 2 for the rejected answer: with β = 1 the margin is ln 4, σ = 4/5, the loss ln 5/4."""
    one = torch.ones(1, 1, dtype=torch.bool)
    chosen = torch.tensor([[math.log(0.5)]], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([[math.log(0.2)]], dtype=torch.float64, requires_grad=True)
    reference = [AnswerLogps(torch.tensor([[math.log(p)]], dtype=torch.float64), one) for p in (0.25, 0.4)]
    losses = dpo.loss(dpo.Config(beta=1.0), PairLogps(AnswerLogps(chosen, one), AnswerLogps(rejected, one), *reference, torch.zeros(1)))
    assert losses.values.item() == pytest.approx(math.log(5 / 4), abs=1e-12)
    losses.values.sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.2, abs=1e-12)  # −σ(−margin)
    metrics = {name: value.detach() for name, value in losses.metrics.items() if isinstance(value, Tensor)}
    assert float(metrics["rewards/chosen"]) == pytest.approx(math.log(2))
    assert float(metrics["rewards/margins"]) == pytest.approx(math.log(4))
    assert float(metrics["rewards/accuracies"]) == 1.0
    assert float(metrics["logps/chosen"]) == pytest.approx(math.log(0.5))


def test_dpo_at_the_reference_is_log_two_whatever_beta_and_smoothing() -> None:
    values = data()
    values |= {"ref_chosen": values["chosen"], "ref_rejected": values["rejected"]}
    policy = {side: torch.from_numpy(values[side]) for side in LENGTHS}
    for beta, eps in ((0.1, 0.0), (3.0, 0.3)):
        losses = dpo.loss(dpo.Config(beta=beta, label_smoothing=eps), pair(values, policy))
        np.testing.assert_allclose(losses.values.numpy(), math.log(2), rtol=1e-12)


def test_smoothed_dpo_has_its_least_value_where_the_odds_are_those_of_the_labels() -> None:
    """d/dm = 0 at σ(m) = 1 − ε."""
    one, eps = torch.ones(1, 1, dtype=torch.bool), 0.2
    margin = torch.tensor([[math.log((1 - eps) / eps)]], dtype=torch.float64, requires_grad=True)
    zero = AnswerLogps(torch.zeros(1, 1, dtype=torch.float64), one)
    dpo.loss(
        dpo.Config(beta=1.0, label_smoothing=eps), PairLogps(AnswerLogps(margin, one), zero, zero, zero, torch.zeros(1))
    ).values.sum().backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_dpo_takes_margins_of_any_size_without_overflow() -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    zero, reference = AnswerLogps(torch.zeros(1, 1), one), AnswerLogps(torch.tensor([[-2500.0]]), one)
    for logp in (-5000.0, 0.0):
        side = torch.tensor([[logp]], requires_grad=True)
        values = dpo.loss(dpo.Config(beta=1.0), PairLogps(AnswerLogps(side, one), zero, reference, zero, torch.zeros(1))).values
        values.sum().backward()
        assert values.item() == pytest.approx(2500.0 if logp else 0.0)
        assert side.grad is not None
        assert side.grad.isfinite().all()


# SimPO (Meng et al. 2024, eq. 6) ---------------------------------------------------------------------------------------------------------


def simpo_formula(values: dict[str, np.ndarray], beta: float, ratio: float, eps: float) -> np.ndarray:
    means = {side: sums(values, side) / np.array(LENGTHS[side]) for side in LENGTHS}
    x = beta * means["chosen"] - beta * means["rejected"] - ratio * beta
    return -(1 - eps) * logsig(x) - eps * logsig(-x)


@pytest.mark.parametrize(("beta", "ratio", "eps"), [(2.0, 0.5, 0.0), (2.5, 0.0, 0.0), (10.0, 0.3, 0.0), (2.0, 0.8, 0.2)])
def test_simpo_is_the_papers_loss(beta: float, ratio: float, eps: float) -> None:
    config = simpo.Config(beta=beta, gamma_beta_ratio=ratio, label_smoothing=eps)
    assert_loss(lambda p: simpo.loss(config, p), lambda values: simpo_formula(values, beta, ratio, eps))


def test_simpo_needs_no_reference_and_ignores_length() -> None:
    """Twice the same tokens have the same reward."""
    one, two = torch.tensor([[True, False]]), torch.tensor([[True, True]])
    tokens = torch.tensor([[-1.5, -1.5]])
    losses = simpo.loss(
        simpo.Config(beta=2.0, gamma_beta_ratio=0.5),
        PairLogps(AnswerLogps(tokens, one), AnswerLogps(tokens, two), None, None, torch.zeros(1)),
    )
    assert losses.values.item() == pytest.approx(math.log(1 + math.e), rel=1e-6)  # −log σ(−γ), γ = 0.5 · 2
    assert float(losses.metrics["rewards/chosen"]) == pytest.approx(-3.0)


# Reward model (Ouyang et al. 2022, eq. 1; Touvron et al. 2023, eq. 2; Eisenstein et al. 2023) ---------------------------------------------


@pytest.mark.parametrize(
    ("center", "use_margin", "eps"), [(0.0, False, 0.0), (0.0, True, 0.0), (0.01, True, 0.0), (0.5, False, 0.0), (0.05, True, 0.25)]
)
def test_the_reward_models_loss_is_bradley_terry_with_margin_and_centring(center: float, use_margin: bool, eps: float) -> None:
    rng = np.random.default_rng(1)
    values = {"chosen": rng.normal(0, 3, 6), "rejected": rng.normal(0, 3, 6), "margin": rng.uniform(0, 2, 6)}

    def formula(v: dict[str, np.ndarray]) -> np.ndarray:
        x = v["chosen"] - v["rejected"] - (v["margin"] if use_margin else 0)
        return -(1 - eps) * logsig(x) - eps * logsig(-x) + center * (v["chosen"] + v["rejected"]) ** 2

    sides = {name: torch.from_numpy(values[name]).requires_grad_() for name in ("chosen", "rejected")}
    config = reward_model.Config(center_coef=center, use_margin=use_margin, label_smoothing=eps)
    losses = reward_model.loss(config, sides["chosen"], sides["rejected"], torch.from_numpy(values["margin"]))
    np.testing.assert_allclose(losses.values.detach().numpy(), formula(values), rtol=1e-6, atol=1e-6)
    total(losses, Denominators(6, 1)).backward()
    for name, side in sides.items():
        assert side.grad is not None
        np.testing.assert_allclose(side.grad.numpy(), numerical(lambda v: float(formula(v).mean()), values, name), rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(losses.metrics["rewards/accuracies"], values["chosen"] > values["rejected"])


def test_a_constant_added_to_all_scores_changes_bradley_terry_only_through_centring() -> None:
    chosen, rejected, margin = torch.tensor([1.0, -2.0]), torch.tensor([0.5, -1.0]), torch.zeros(2)
    for center in (0.0, 0.01):
        config = reward_model.Config(center_coef=center)
        before, after = (reward_model.loss(config, chosen + c, rejected + c, margin).values for c in (0.0, 7.0))
        assert torch.allclose(before, after) == (center == 0.0)


# SFT -------------------------------------------------------------------------------------------------------------------------------------


def test_sft_is_the_mean_over_the_tokens_of_the_whole_batch_not_of_means() -> None:
    values = data()["chosen"]
    mask = mask_of("chosen")
    logprobs = torch.from_numpy(values).requires_grad_()
    losses = sft.loss(sft.Config(), logprobs, torch.from_numpy(mask))
    tokens = int(mask.sum())
    loss = total(losses, Denominators(B, tokens))
    assert loss.item() == pytest.approx(-values[mask].sum() / tokens, rel=1e-12)
    assert loss.item() != pytest.approx(np.mean([-values[i, : LENGTHS["chosen"][i]].mean() for i in range(B)]), rel=1e-3)
    loss.backward()
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad.numpy(), np.where(mask, -1 / tokens, 0.0), rtol=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("kind", ["sft", "dpo", "simpo"])
def test_parts_of_a_batch_add_up_to_the_whole(kind: str, parts: int) -> None:
    values = data()
    policy = {side: torch.from_numpy(values[side]) for side in LENGTHS}
    counts = Denominators(B, sum(LENGTHS["chosen"]))

    def loss_of(rows: slice) -> float:
        if kind == "sft":
            return total(sft.loss(sft.Config(), policy["chosen"][rows], torch.from_numpy(mask_of("chosen"))[rows]), counts).item()
        whole = pair(values, policy)

        def cut(side: AnswerLogps | None) -> Any:
            return None if side is None else AnswerLogps(side.tokens[rows], side.mask[rows])

        part = PairLogps(
            *(cut(side) for side in (whole.chosen, whole.rejected, whole.reference_chosen, whole.reference_rejected)), whole.margin[rows]
        )
        method: Any = dpo if kind == "dpo" else simpo
        return total(method.loss(method.Config(), part), counts).item()

    edges = np.linspace(0, B, parts + 1).astype(int)
    assert sum(loss_of(slice(a, b)) for a, b in itertools.pairwise(edges)) == pytest.approx(loss_of(slice(0, B)), rel=1e-12)


@pytest.mark.parametrize("rubbish", [math.nan, math.inf, -math.inf, 1e30])
def test_what_stands_behind_an_answers_end_changes_neither_loss_nor_gradient(rubbish: float) -> None:
    values = data()
    found = []
    for fill in (0.0, rubbish):
        policy = {side: torch.from_numpy(np.where(mask_of(side), values[side], fill)).requires_grad_() for side in LENGTHS}
        p = pair(values, policy)
        loss = total(dpo.loss(dpo.Config(), p), Denominators(B, 1)) + total(simpo.loss(simpo.Config(), p), Denominators(B, 1))
        loss = loss + total(sft.loss(sft.Config(), policy["chosen"], p.chosen.mask), Denominators(B, 21))
        loss.backward()
        found.append((loss.item(), *(side.grad.tolist() for side in policy.values() if side.grad is not None)))
    assert found[0] == found[1]
