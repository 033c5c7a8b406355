"""VPO, HyPO and SRPO: their losses against formulae in numpy float64, and where they end on bandits against optima found without their losses.

The expectation over sampled answers is exact here: over the reference by giving each response as often as its probability, a multiple of 1/10, says;
over the policy by weighing each response with the policy's probability.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp, rel_entr, softmax
from test_pairwise_losses import LENGTHS, B, T, data, dpo_formula, logsig, mask_of, numerical, pair
from torch import Tensor

from data_fixtures import user
from support import World
from telos.algorithms.language import dpo, hypo, srpo, vpo, vpo_online
from telos.core.errors import UsageError
from telos.data.preferences import revision_prompt
from telos.environments.bandit import Bandit, TabularPolicy, fit, random_bandit, rock_paper_scissors, total_variation
from telos.functional.pairwise import AnswerLogps, PairLogps, SampleLogps
from telos.functional.reduction import Denominators, Losses, total
from telos.models.generation import Sampling
from telos.models.language import LanguageModel
from telos.objectives.judges import Judged

Values = dict[str, np.ndarray]
N = 3  # sampled answers to a prompt
SAMPLE_MASK = np.arange(T) < np.random.default_rng(5).integers(1, T + 1, (B, N))[..., None]


def sampled(seed: int) -> Values:
    """`data` with sampled answers [B, N, T] under the policy and the reference."""
    rng = np.random.default_rng(100 + seed)
    return data(seed) | {name: -rng.exponential(1.5, (B, N, T)) for name in ("samples", "ref_samples")}


def view(values: Values, leaves: dict[str, Tensor]) -> PairLogps:
    samples = SampleLogps(leaves["samples"], torch.from_numpy(values["ref_samples"]), torch.from_numpy(SAMPLE_MASK))
    return dataclasses.replace(pair(values, leaves), samples=samples)


def leaves_of(values: Values, *names: str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values[name].copy()).requires_grad_() for name in names}


def gradients(losses: Losses, leaves: dict[str, Tensor]) -> dict[str, np.ndarray]:
    total(losses, Denominators(len(losses.values), 10**6)).backward()
    assert all(leaf.grad is not None for leaf in leaves.values())
    return {name: leaf.grad.numpy() for name, leaf in leaves.items() if leaf.grad is not None}


def log_ratios(values: Values) -> np.ndarray:
    """log π/π_ref of the sampled answers, [B, N]."""
    return ((values["samples"] - values["ref_samples"]) * SAMPLE_MASK).sum(-1)


# VPO: losses ------------------------------------------------------------------------------------------------------------------------------


def vpo_formula(values: Values, beta: float, eps: float, alpha: float, sign: int) -> np.ndarray:
    """L_DPO + sign α β E[log π/π_ref]; sign is +1 for optimism and −1 for pessimism."""
    return dpo_formula(values, beta, eps) + sign * alpha * beta * log_ratios(values).mean(1)


@pytest.mark.parametrize(("mode", "sign"), [("pessimism", -1), ("optimism", 1)])
@pytest.mark.parametrize(("beta", "eps", "alpha"), [(0.1, 0.0, 0.1), (0.7, 0.2, 2.0)])
def test_vpo_is_the_papers_loss(mode: Any, sign: int, beta: float, eps: float, alpha: float) -> None:
    config = vpo.Config(beta=beta, label_smoothing=eps, value_coef=alpha, mode=mode)
    for seed in range(2):
        values = sampled(seed)
        leaves = leaves_of(values, *LENGTHS, "samples")
        losses = vpo.loss(config, view(values, leaves))
        np.testing.assert_allclose(losses.values.detach().numpy(), vpo_formula(values, beta, eps, alpha, sign), rtol=1e-12)
        for name, gradient in gradients(losses, leaves).items():
            wanted = numerical(lambda moved: float(vpo_formula(moved, beta, eps, alpha, sign).mean()), values, name)
            np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-9)
            assert (gradient[~(SAMPLE_MASK if name == "samples" else mask_of(name))] == 0).all()


@pytest.mark.parametrize("mode", ["pessimism", "optimism"])
def test_vpo_without_its_value_is_dpo(mode: Any) -> None:
    values = sampled(0)
    ours, theirs = leaves_of(values, *LENGTHS, "samples"), leaves_of(values, *LENGTHS)
    without = vpo.loss(vpo.Config(beta=0.3, label_smoothing=0.1, value_coef=0.0, mode=mode), view(values, ours))
    plain = dpo.loss(dpo.Config(beta=0.3, label_smoothing=0.1), pair(values, theirs))
    assert torch.equal(without.values, plain.values)
    mine, other = gradients(without, ours), gradients(plain, theirs)
    assert all((mine[side] == other[side]).all() for side in LENGTHS)
    assert (mine["samples"] == 0).all()
    assert without.metrics.keys() - plain.metrics.keys() == {"value"}


def test_online_vpo_is_vpo_with_optimism() -> None:
    values = sampled(1)
    found = [
        module.loss(config, view(values, leaves_of(values, *LENGTHS, "samples")))
        for module, config in (
            (vpo, vpo.Config(beta=0.4, value_coef=0.7, label_smoothing=0.1, mode="optimism")),
            (vpo_online, vpo_online.Config(beta=0.4, value_coef=0.7, label_smoothing=0.1)),
        )
    ]
    assert torch.equal(found[0].values, found[1].values)


def test_vpo_calibrates_on_the_reference_alone() -> None:
    with pytest.raises(UsageError, match="--samples_from policy"):
        vpo.Config(samples_from="policy")


def judged(wins: np.ndarray, seed: int = 0) -> Judged:
    shape = wins.shape[:2]
    return Judged(wins, None, np.ones(shape, dtype=np.int64), {}, np.random.default_rng(seed))


def test_online_vpo_pairs_the_policys_answers_and_labels_them_as_often_as_the_oracle_would() -> None:
    """Answers 0 and 1 are the policy's, 2 and 3 the reference's. 0 is preferred to 1 with probability 0.8."""
    config = vpo_online.Config(samples_per_prompt=2, reference_samples=2)
    assert vpo_online.writers(config) == {"policy": 2, "reference": 2}
    count = 4000
    wins = np.full((count, 4, 4), 0.5)
    wins[:, 0, 1], wins[:, 1, 0] = 0.8, 0.2
    found = vpo_online.arrange(config, judged(wins))
    assert found.second is not None
    assert found.samples is not None
    assert found.prompt.tolist() == list(range(count)), "one pair a prompt"
    assert {(a, b) for a, b in zip(found.first.tolist(), found.second.tolist(), strict=True)} == {(0, 1), (1, 0)}
    assert abs((found.first == 0).mean() - 0.8) < 4 * np.sqrt(0.16 / count)
    assert (found.samples == [2, 3]).all()


def test_online_vpo_leaves_out_what_was_not_judged_and_keeps_to_its_number_of_pairs() -> None:
    config = vpo_online.Config(samples_per_prompt=3, examples_per_prompt=2, reference_samples=1)
    wins = np.full((2, 4, 4), 0.5)
    wins[0] = np.nan
    found = vpo_online.arrange(config, judged(wins))
    assert found.second is not None
    assert found.samples is not None
    assert found.prompt.tolist() == [1, 1]
    assert max(found.first.max(), found.second.max()) < 3
    assert len({frozenset(p) for p in zip(found.first.tolist(), found.second.tolist(), strict=True)}) == 2, "two pairs, not one twice"
    assert found.samples.tolist() == [[3], [3]]


# VPO: optima ------------------------------------------------------------------------------------------------------------------------------

COUNTS = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1], [2, 5, 1, 2]])  # the reference's probabilities in tenths


def tenths_bandit(seed: int, covered: Tensor | None = None) -> Bandit:
    reward = torch.from_numpy(np.random.default_rng(seed).normal(size=tuple(COUNTS.shape)))
    reference = COUNTS.double() / 10
    behaviour = reference if covered is None else reference * covered / (reference * covered).sum(-1, keepdim=True)
    return Bandit.from_reward(reward, reference, behaviour)


def vpo_fit(bandit: Bandit, config: vpo.Config, start: Tensor) -> Tensor:
    """The policy that minimises the method's own loss; ten samples a prompt are the reference exactly."""
    pairs = bandit.exact_pairs()
    answers = torch.stack([torch.repeat_interleave(torch.arange(4), row) for row in COUNTS])[pairs.context]

    def loss(log_probs: Tensor) -> Tensor:
        tokens = log_probs[pairs.context[:, None], answers][..., None]
        reference = bandit.reference.log()[pairs.context[:, None], answers][..., None]
        samples = SampleLogps(tokens, reference, torch.ones_like(tokens, dtype=torch.bool))
        return (pairs.weight * vpo.loss(config, dataclasses.replace(bandit.pair_batch(log_probs, pairs), samples=samples)).values).sum()

    policy = TabularPolicy(start)
    assert fit(policy, loss, steps=600).gradient < 1e-7
    return policy.probs()


def optimal_value(bandit: Bandit, reward: np.ndarray, beta: float) -> np.ndarray:
    """max over π of E_π[r] − β KL(π‖ref), less E_ref[r] so that r is calibrated; in each context."""
    reference = bandit.reference.numpy()
    return beta * logsumexp(reward / beta, b=reference, axis=1) - (reference * reward).sum(1)


def reward_space_optimum(bandit: Bandit, beta: float, alpha: float, sign: int, start: np.ndarray) -> np.ndarray:
    """argmin over rewards [C, A] of the Bradley-Terry likelihood less sign α J*, by scipy."""
    pairs = bandit.exact_pairs()
    c, chosen, rejected, weight = (field.numpy() for field in pairs)

    def objective(flat: np.ndarray) -> float:
        reward = flat.reshape(start.shape)
        return float(
            -(weight * logsig(reward[c, chosen] - reward[c, rejected])).sum() - sign * alpha * optimal_value(bandit, reward, beta).mean()
        )

    found = minimize(objective, start.ravel(), method="BFGS", options={"gtol": 1e-7, "maxiter": 5000})
    return found.x.reshape(start.shape)


def implicit_reward(bandit: Bandit, policy: Tensor, beta: float) -> np.ndarray:
    return beta * (policy / bandit.reference).log().numpy()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("mode", "sign", "alpha"), [("pessimism", -1, 0.3), ("optimism", 1, 0.05)])
def test_vpo_reaches_the_optimum_of_its_objective_over_rewards(mode: Any, sign: int, alpha: float, seed: int) -> None:
    bandit, beta = tenths_bandit(seed), 0.5
    assert bandit.reward is not None
    gold = bandit.reward.numpy()
    start = torch.softmax(bandit.reference.log() + bandit.reward / beta, -1)  # DPO's optimum; at the reference optimism has no gradient
    policy = vpo_fit(bandit, vpo.Config(beta=beta, value_coef=alpha, mode=mode), start)
    reward = reward_space_optimum(bandit, beta, alpha, sign, gold)
    wanted = softmax(np.log(bandit.reference.numpy()) + reward / beta, axis=1)
    assert float(total_variation(policy, wanted).max()) < 1e-4
    assert float(total_variation(policy, start).max()) > 0.02, "the value term does something"
    moved = optimal_value(bandit, implicit_reward(bandit, policy, beta), beta) - optimal_value(bandit, gold, beta)
    assert (sign * moved > 0).all(), "pessimism lowers the optimal value, optimism raises it, in every context"


def test_the_value_that_vpo_reports_is_that_of_its_implicit_reward_and_the_forward_kl() -> None:
    bandit, beta = tenths_bandit(3), 0.7
    policy = torch.softmax(torch.from_numpy(np.random.default_rng(9).normal(size=(3, 4))), -1)
    answers = torch.stack([torch.repeat_interleave(torch.arange(4), row) for row in COUNTS])
    tokens, reference = (table.log().gather(1, answers)[..., None] for table in (policy, bandit.reference))
    found = vpo.optimal_value(beta, SampleLogps(tokens, reference, torch.ones_like(tokens, dtype=torch.bool)))
    np.testing.assert_allclose(found.numpy(), optimal_value(bandit, implicit_reward(bandit, policy, beta), beta), rtol=1e-12)
    forward = (bandit.reference * (bandit.reference / policy).log()).sum(-1)
    np.testing.assert_allclose(found.numpy(), beta * forward.numpy(), rtol=1e-12)


def test_pessimism_leaves_what_no_pair_shows_where_the_reference_has_it() -> None:
    """There only J* sees the reward, and its derivative in r(y) is π(y) − π_ref(y). DPO's own optimum there is whatever it was started from."""
    covered = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 0]])
    bandit = tenths_bandit(0, covered)
    start = torch.softmax(torch.tensor([[0.0, 1.0, 2.0, 0.0]], dtype=torch.float64).expand(3, -1), -1)
    hidden = covered == 0
    policy = vpo_fit(bandit, vpo.Config(beta=0.5, value_coef=0.1), start)
    np.testing.assert_allclose(policy[hidden].numpy(), bandit.reference[hidden].numpy(), atol=1e-6)
    plain = vpo_fit(bandit, vpo.Config(beta=0.5, value_coef=0.0), start)
    assert float((plain - bandit.reference)[hidden].abs().max()) > 0.1


# HyPO -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "eps", "coef"), [(0.1, 0.0, 0.01), (0.8, 0.2, 1.5)])
def test_hypo_is_dpo_plus_the_kl_whose_gradient_is_the_score_functions(beta: float, eps: float, coef: float) -> None:
    """The paper's surrogate is sg(ρ) log π: its numerical gradient holds ρ still. The value is that of ρ, the divergence itself."""
    values = sampled(2)
    leaves = leaves_of(values, *LENGTHS, "samples")
    losses = hypo.loss(hypo.Config(beta=beta, label_smoothing=eps, kl_coef=coef), view(values, leaves))
    wanted = dpo_formula(values, beta, eps) + coef * log_ratios(values).mean(1)
    np.testing.assert_allclose(losses.values.detach().numpy(), wanted, rtol=1e-12)
    held = log_ratios(values)

    def surrogate(moved: Values) -> float:
        log_prob = (moved["samples"] * SAMPLE_MASK).sum(-1)
        return float((dpo_formula(moved, beta, eps) + coef * (held * log_prob).mean(1)).mean())

    for name, gradient in gradients(losses, leaves).items():
        np.testing.assert_allclose(gradient, numerical(surrogate, values, name), rtol=1e-6, atol=1e-9)


def online_kl(bandit: Bandit, log_probs: Tensor) -> Tensor:
    """HyPO's estimate of the divergence in exact expectation over its samples, the mean over contexts."""
    tokens = log_probs[..., None]
    samples = SampleLogps(tokens, bandit.reference.log()[..., None], torch.ones_like(tokens, dtype=torch.bool))
    return (log_probs.detach().exp() * hypo.kl_surrogate(samples)).sum(-1).mean()


@pytest.mark.parametrize("seed", range(3))
def test_in_exact_expectation_hypos_surrogate_has_the_value_and_the_gradient_of_the_kl(seed: int) -> None:
    bandit = random_bandit(3, 5, seed)
    start = torch.from_numpy(np.random.default_rng(seed).normal(size=(3, 5)))
    found = []
    for exact in (True, False):
        logits = start.clone().requires_grad_()
        log_probs = torch.log_softmax(logits, -1)
        value = (log_probs.exp() * (log_probs - bandit.reference.log())).sum(-1).mean() if exact else online_kl(bandit, log_probs)
        value.backward()
        assert logits.grad is not None
        found.append((value.item(), logits.grad.numpy()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-10, atol=1e-14)
    assert np.abs(found[0][1]).max() > 1e-2
    logits = start.clone().requires_grad_()
    log_probs = torch.log_softmax(logits, -1)
    (log_probs.detach().exp() * (log_probs - bandit.reference.log())).sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().max()) < 1e-12, "differentiating the log-ratio of samples instead gives no gradient at all"


def hypo_fit(bandit: Bandit, config: hypo.Config, start: Tensor) -> tuple[Tensor, float]:
    """(the policy at the minimum, DPO's part of its loss)."""
    pairs, plain = bandit.exact_pairs(), dpo.Config(beta=config.beta)

    def preferences(log_probs: Tensor) -> Tensor:
        return (pairs.weight * dpo.loss(plain, bandit.pair_batch(log_probs, pairs)).values).sum()

    policy = TabularPolicy(start)
    end = fit(policy, lambda log_probs: preferences(log_probs) + config.kl_coef * online_kl(bandit, log_probs), steps=600)
    assert end.gradient < 1e-6
    return policy.probs(), preferences(policy.log_probs().detach()).item()


def reverse_kl(policy: Tensor, reference: Tensor) -> float:
    return float(rel_entr(policy.numpy(), reference.numpy()).sum(-1).max())


@pytest.mark.parametrize("rarity", [8.0, 30.0, 90.0])
def test_under_partial_coverage_hypos_reverse_kl_is_bounded_where_dpos_grows_with_what_the_pairs_hide(rarity: float) -> None:
    """Response 2 has probability about e^−rarity under the reference and is in no pair, so DPO has as good an optimum with 0.95 of its mass there."""
    hidden = np.exp(-rarity)
    reference = torch.tensor([[0.6 * (1 - hidden), 0.4 * (1 - hidden), hidden]], dtype=torch.float64)
    behaviour = torch.tensor([[0.6, 0.4, 0.0]], dtype=torch.float64)
    bandit = Bandit.from_reward(torch.tensor([[0.3, 1.0, -5.0]], dtype=torch.float64), reference, behaviour)
    beta, coef = 0.5, 0.1
    seen = softmax(np.log([0.6, 0.4]) + np.array([0.3, 1.0]) / beta)
    bad = torch.tensor([[*(0.05 * seen), 0.95]], dtype=torch.float64)

    unmoved, at_bad = hypo_fit(bandit, hypo.Config(beta=beta, kl_coef=0.0), bad)
    _, at_good = hypo_fit(bandit, hypo.Config(beta=beta, kl_coef=0.0), reference)
    assert at_bad == pytest.approx(at_good, abs=1e-9), "both are optima of DPO"
    assert reverse_kl(unmoved, reference) > 0.9 * rarity - 1

    policy, _ = hypo_fit(bandit, hypo.Config(beta=beta, kl_coef=coef), bad)
    again, _ = hypo_fit(bandit, hypo.Config(beta=beta, kl_coef=coef), reference)
    assert float(total_variation(policy, again).max()) < 1e-5, "one optimum, wherever it starts"
    assert reverse_kl(policy, reference) <= np.log(2) / coef, "at the reference the whole loss is log 2"
    assert reverse_kl(policy, reference) < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_hypo_spreads_what_no_pair_shows_as_the_reference_does(seed: int) -> None:
    """KL(π‖ref) splits into that of the mass on hidden responses and those within either group; DPO's loss sees the group of the others alone. So
    within the hidden group π is ref, and the odds of that group are ref's times e^KL within the other."""
    bandit = random_bandit(2, 6, seed, coverage="partial")
    start = torch.softmax(torch.from_numpy(np.random.default_rng(seed).normal(size=(2, 6))), -1)
    policy, _ = hypo_fit(bandit, hypo.Config(beta=0.3, kl_coef=0.05), start)
    reference, covered = bandit.reference, bandit.covered
    mass = (policy * covered).sum(-1, keepdim=True)
    held = (reference * covered).sum(-1, keepdim=True)
    np.testing.assert_allclose((policy * ~covered / (1 - mass)).numpy(), (reference * ~covered / (1 - held)).numpy(), atol=1e-6)
    within = rel_entr((policy * covered / mass).numpy(), (reference * covered / held).numpy()).sum(-1, keepdims=True)
    np.testing.assert_allclose(((1 - mass) / mass).numpy(), ((1 - held) / held).numpy() * np.exp(within), rtol=1e-4)
    assert within.max() > 0.05


def test_hypo_refuses_answers_of_anyone_but_the_policy() -> None:
    with pytest.raises(UsageError, match="--samples_from reference"):
        hypo.Config(samples_from="reference")


# SRPO -------------------------------------------------------------------------------------------------------------------------------------

CONTEXTS = ("plain", "after_chosen", "after_rejected")


def revised(seed: int) -> Values:
    """Token log-probabilities of both answers in three contexts, under the policy and the reference."""
    found: Values = {}
    for k, context in enumerate(CONTEXTS):
        found |= {f"{context} {name}": 0.4 * value for name, value in data(10 * seed + k).items() if name != "margin"}
    return found


def srpo_formula(values: Values, beta: float, alpha: float) -> np.ndarray:
    def ratio(context: str, side: str) -> np.ndarray:
        return ((values[f"{context} {side}"] - values[f"{context} ref_{side}"]) * mask_of(side)).sum(1)

    plain = ratio("plain", "chosen") - ratio("plain", "rejected")
    w_after_w, l_after_w = ratio("after_chosen", "chosen"), ratio("after_chosen", "rejected")
    w_after_l, l_after_l = ratio("after_rejected", "chosen"), ratio("after_rejected", "rejected")
    # The label 1 for (y2, y1) = (w, l) and 0 for (l, w), regressed on the probabilities of equation (1) …
    improve = (1 - (0.5 + beta * (w_after_l - l_after_l))) ** 2 + (0 - (0.5 + beta * (l_after_w - w_after_w))) ** 2
    # … and 1 on that of equation (2).
    generate = (1 - (0.5 + beta / 2 * (w_after_l - l_after_w + plain))) ** 2
    return (1 - alpha) * generate + alpha * improve


def srpo_view(values: Values, leaves: dict[str, Tensor]) -> PairLogps:
    tables = leaves | {name: torch.from_numpy(value) for name, value in values.items() if "ref_" in name}

    def one(context: str, **more: Any) -> PairLogps:
        names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
        found = (AnswerLogps(tables[f"{context} {name}"], torch.from_numpy(mask_of(name.removeprefix("ref_")))) for name in names)
        chosen, rejected, reference_chosen, reference_rejected = found
        return PairLogps(chosen, rejected, reference_chosen, reference_rejected, torch.zeros(B), **more)

    return one("plain", revisions=(one("after_chosen"), one("after_rejected")))


@pytest.mark.parametrize(("beta", "alpha"), [(0.1, 0.5), (0.6, 0.2), (0.3, 1.0), (0.3, 0.0)])
def test_srpo_is_the_regression_of_labels_on_the_games_two_equations(beta: float, alpha: float) -> None:
    values = revised(1)
    leaves = leaves_of(values, *(f"{context} {side}" for context in CONTEXTS for side in LENGTHS))
    losses = srpo.loss(srpo.Config(beta=beta, alpha=alpha), srpo_view(values, leaves))
    np.testing.assert_allclose(losses.values.detach().numpy(), srpo_formula(values, beta, alpha), rtol=1e-12)
    for name, gradient in gradients(losses, leaves).items():
        wanted = numerical(lambda moved: float(srpo_formula(moved, beta, alpha).mean()), values, name)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-6, atol=1e-9)


def game_solution(bandit: Bandit, reference: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """(π [C, A], π† [C, y1, y2]) of the game, where `reference` [C, y1, y2] is the improver's; in closed form."""
    improver = softmax(np.log(reference) + np.swapaxes(bandit.preference.numpy(), 1, 2) / beta, axis=-1)
    kept = np.diagonal(improver / reference, axis1=1, axis2=2)
    weights = bandit.reference.numpy() * kept
    return weights / weights.sum(-1, keepdims=True), improver


def srpo_fit(bandit: Bandit, reference: np.ndarray, config: srpo.Config) -> tuple[Tensor, Tensor]:
    """(π, π†) at the minimum of the method's loss. One table holds both: the contexts first, then each context after each response."""
    pairs, contexts, responses = bandit.exact_pairs(), bandit.contexts, bandit.responses
    shown = torch.from_numpy(reference)
    policy = TabularPolicy(torch.cat([bandit.reference, shown.flatten(0, 1)]))

    def answer(table: Tensor, *index: Tensor) -> AnswerLogps:
        tokens = table[index][:, None]
        return AnswerLogps(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def after(log_probs: Tensor, first: Tensor) -> PairLogps:
        chosen, rejected = (pairs.context, first, pairs.chosen), (pairs.context, first, pairs.rejected)
        mine, theirs = log_probs, shown.log()
        sides = answer(mine, *chosen), answer(mine, *rejected), answer(theirs, *chosen), answer(theirs, *rejected)
        return PairLogps(*sides, torch.zeros_like(pairs.weight))

    def loss(log_probs: Tensor) -> Tensor:
        improver = log_probs[contexts:].view(contexts, responses, responses)
        plain = bandit.pair_batch(log_probs[:contexts], pairs)
        revisions = after(improver, pairs.chosen), after(improver, pairs.rejected)
        return (pairs.weight * srpo.loss(config, dataclasses.replace(plain, revisions=revisions)).values).sum()

    assert fit(policy, loss, steps=1500).gradient < 1e-7
    probs = policy.probs()
    return probs[:contexts], probs[contexts:].view(contexts, responses, responses)


def improvers_reference(bandit: Bandit, seed: int) -> np.ndarray:
    """A reference after each response: it need not be what it is without one."""
    shape = (bandit.contexts, bandit.responses, bandit.responses)
    return softmax(np.random.default_rng(seed).normal(size=shape), axis=-1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("alpha", [0.5, 0.1])
@pytest.mark.parametrize("preference", ["bradley-terry", "intransitive"])
def test_srpo_solves_the_game_for_general_preferences_whoever_wrote_the_pairs(preference: Any, alpha: float, seed: int) -> None:
    drawn, beta = random_bandit(2, 4, seed, preference=preference), 0.3
    reference = improvers_reference(drawn, seed)
    wanted, wanted_improver = game_solution(drawn, reference, beta)
    other = torch.softmax(torch.from_numpy(np.random.default_rng(seed + 50).normal(size=(2, 4))), -1)
    for behaviour in (drawn.reference, other):
        bandit = dataclasses.replace(drawn, behaviour=behaviour)
        policy, improver = srpo_fit(bandit, reference, srpo.Config(beta=beta, alpha=alpha))
        assert float(total_variation(policy, wanted).max()) < 1e-4
        assert float(total_variation(improver, wanted_improver).max()) < 1e-4
    assert float(total_variation(drawn.reference, wanted).max()) > 0.05, "there was something to learn"


def test_the_loss_of_improving_alone_leaves_the_plain_answers_as_they_were() -> None:
    bandit = rock_paper_scissors()
    reference = improvers_reference(bandit, 0)
    policy, improver = srpo_fit(bandit, reference, srpo.Config(beta=0.3, alpha=1.0))
    assert float(total_variation(policy, bandit.reference).max()) < 1e-9
    assert float(total_variation(improver, game_solution(bandit, reference, 0.3)[1]).max()) < 1e-5


@pytest.mark.parametrize("seed", range(2))
def test_the_closed_form_is_a_saddle_point_of_the_games_objective(seed: int) -> None:
    """The objective is convex in π and concave in π†: scipy's minimum over π at the found π† is the found π, and the maximum over π† at π is π†."""
    bandit, beta = random_bandit(1, 3, seed, preference="intransitive"), 0.4
    reference = improvers_reference(bandit, seed)[0]
    (policy,), (improver,) = game_solution(bandit, reference[None], beta)
    prefers, base = bandit.preference[0].numpy(), bandit.reference[0].numpy()

    def objective(pi: np.ndarray, dagger: np.ndarray) -> float:
        inner = (dagger * prefers.T).sum(1) - beta * (dagger * np.log(dagger / reference)).sum(1)
        return float((pi * inner).sum() + beta * (pi * np.log(pi / base)).sum())

    def table(logits: np.ndarray) -> np.ndarray:
        return np.exp(log_softmax(logits.reshape(-1, 3), axis=1))

    smallest = minimize(lambda z: objective(table(z)[0], improver), np.zeros(3), method="BFGS", options={"gtol": 1e-9})
    largest = minimize(lambda z: -objective(policy, table(z)), np.zeros(9), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(table(smallest.x)[0], policy, atol=1e-5)
    np.testing.assert_allclose(table(largest.x), improver, atol=1e-5)


# Revising ---------------------------------------------------------------------------------------------------------------------------------


def test_each_revision_is_shown_the_answer_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    seeds: list[int] = []

    def answers(model: Any, prompts: list[str], sampling: Any, *, seed: int) -> list[list[str]]:
        asked.append(list(prompts))
        seeds.append(seed)
        return [[f"answer {len(asked)} to {i}"] for i in range(len(prompts))]

    monkeypatch.setattr(srpo, "sample_texts", answers)
    nothing: Any = None
    found = srpo.revise(nothing, ["P", "Q"], 2, nothing, seed=3)
    assert found == [[f"answer {step} to {i}" for i in range(2)] for step in (1, 2, 3)]
    assert asked == [["P", "Q"], *([revision_prompt(p, found[step][i]) for i, p in enumerate("PQ")] for step in (0, 1))]
    assert len(set(seeds)) == 3, "no step repeats another's noise"


@pytest.mark.parametrize("conversational", [False, True])
def test_a_model_revises_its_answers(world: World, conversational: bool) -> None:
    model = LanguageModel.load(world.chat_model if conversational else world.model, device="cpu")
    prompts: list[Any] = [[user(text)] if conversational else text for text in ("The sky is", "hello")]
    sampling = Sampling(max_new_tokens=5)
    found = srpo.revise(model, prompts, 3, sampling, seed=1)
    assert [len(step) for step in found] == [2] * 4
    assert found == srpo.revise(model, prompts, 3, sampling, seed=1)
    assert found[:2] == srpo.revise(model, prompts, 1, sampling, seed=1), "further steps change no earlier one"
