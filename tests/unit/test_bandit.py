"""The bandit testbed: its pairs follow their stated law, and a loss with a known optimum reaches it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.nn.functional import logsigmoid

from telos.core.errors import Failure, UsageError
from telos.environments.bandit import (
    Bandit,
    BanditPairs,
    TabularPolicy,
    fit,
    random_bandit,
    rock_paper_scissors,
    total_variation,
)
from telos.functional.equilibria import exploitability, kl_optimum, nash


def sigmoid_loss(bandit: Bandit, pairs: BanditPairs, log_probs: Tensor, beta: float) -> Tensor:
    logps = bandit.pair_logps(log_probs, pairs)
    margin = (logps.policy_chosen - logps.ref_chosen) - (logps.policy_rejected - logps.ref_rejected)
    return -(pairs.weight * logsigmoid(beta * margin)).sum()


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_sigmoid_loss_on_exact_pairs_with_full_coverage_reaches_the_kl_optimum(beta: float) -> None:
    bandit = random_bandit(3, 6, seed=0)
    pairs = bandit.exact_pairs()
    policy = TabularPolicy(bandit.reference)
    optimum = kl_optimum(bandit.reward, bandit.reference, beta)
    assert total_variation(policy.probs(), optimum).min() > 0.1
    end = fit(policy, lambda log_probs: sigmoid_loss(bandit, pairs, log_probs, beta), steps=500)
    assert total_variation(policy.probs(), optimum).max() < 1e-4
    assert end.gradient < 1e-6


def test_adam_on_sampled_pairs_comes_near_the_kl_optimum() -> None:
    bandit = random_bandit(2, 4, seed=1)
    pairs = bandit.sample_pairs(200_000, seed=3)
    policy = TabularPolicy(bandit.reference)
    fit(policy, lambda log_probs: sigmoid_loss(bandit, pairs, log_probs, 1.0), steps=200, learning_rate=0.05, optimiser="adam")
    assert total_variation(policy.probs(), kl_optimum(bandit.reward, bandit.reference, 1.0)).max() < 0.02


def test_partial_coverage_fixes_the_odds_of_covered_responses_only() -> None:
    bandit = random_bandit(3, 6, seed=0, coverage="partial")
    pairs = bandit.exact_pairs()
    policy = TabularPolicy(bandit.reference)
    fit(policy, lambda log_probs: sigmoid_loss(bandit, pairs, log_probs, 0.5), steps=500)
    optimum = torch.tensor(kl_optimum(bandit.reward, bandit.reference, 0.5))
    inside, expected = policy.probs() * bandit.covered, optimum * bandit.covered
    conditional = total_variation(inside / inside.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True))
    assert conditional.max() < 1e-4
    torch.testing.assert_close(policy.logits[~bandit.covered].detach(), bandit.reference[~bandit.covered].log())
    assert total_variation(policy.probs(), optimum).max() > 0.02


@pytest.mark.parametrize("preference", ["bradley-terry", "intransitive"])
@pytest.mark.parametrize("coverage", ["full", "partial"])
def test_exact_pairs_are_the_law_of_two_independent_draws_and_a_label(preference: str, coverage: str) -> None:
    bandit = random_bandit(2, 4, seed=5, coverage=coverage, preference=preference)  # type: ignore[arg-type]
    pairs = bandit.exact_pairs()
    law: dict[tuple[int, int, int], float] = {}
    mu, p = bandit.behaviour.numpy(), bandit.preference.numpy()
    for c, first, second in np.ndindex(2, 4, 4):
        for chosen, rejected, label in ((first, second, p[c, first, second]), (second, first, p[c, second, first])):
            law[c, chosen, rejected] = law.get((c, chosen, rejected), 0.0) + float(mu[c, first] * mu[c, second] * label) / 2
    found = {(c, a, b): w for c, a, b, w in zip(*(x.tolist() for x in pairs))}
    assert found == pytest.approx({key: w for key, w in law.items() if w > 0})
    assert pairs.weight.sum().item() == pytest.approx(1)


def test_sampled_pairs_follow_the_exact_law_and_repeat_with_the_seed() -> None:
    bandit = random_bandit(2, 3, seed=2, preference="intransitive")
    other = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64)
    for policy in (None, other):
        exact, drawn = bandit.exact_pairs(policy), bandit.sample_pairs(20_000, seed=7, policy=policy)

        def codes(pairs: BanditPairs) -> Tensor:
            return (pairs.context * 3 + pairs.chosen) * 3 + pairs.rejected

        counts = torch.bincount(codes(drawn), minlength=18)[codes(exact)]
        assert counts.sum() == 20_000
        assert chisquare(counts.numpy(), exact.weight.numpy() * 20_000).pvalue > 1e-3
    again, differs = bandit.sample_pairs(100, seed=7), bandit.sample_pairs(100, seed=8)
    assert torch.equal(bandit.sample_pairs(100, seed=7).chosen, again.chosen)
    assert not torch.equal(differs.chosen, again.chosen)
    assert again.weight.sum().item() == pytest.approx(1)


def test_partial_coverage_hides_half_of_the_responses_and_changes_nothing_else() -> None:
    full, partial = random_bandit(6, 5, seed=4), random_bandit(6, 5, seed=4, coverage="partial")
    assert torch.equal(full.reference, partial.reference)
    assert full.reward is not None
    assert partial.reward is not None
    assert torch.equal(full.reward, partial.reward)
    assert partial.covered.sum(-1).tolist() == [3] * 6
    assert len({tuple(row) for row in partial.covered.tolist()}) > 1
    ratio = (partial.behaviour / partial.reference)[partial.covered].view(6, 3)
    torch.testing.assert_close(ratio, ratio[:, :1].expand(6, 3))
    pairs = partial.sample_pairs(2_000, seed=0)
    assert bool(partial.covered[pairs.context, pairs.chosen].all())
    assert bool(partial.covered[pairs.context, pairs.rejected].all())


@pytest.mark.parametrize("responses", [3, 4, 8])
def test_intransitive_bandits_have_no_response_that_beats_all_others_and_a_mixed_equilibrium(responses: int) -> None:
    bandit = random_bandit(5, responses, seed=9, preference="intransitive")
    assert bandit.reward is None
    wins = (bandit.preference > 0.5).sum(-1)
    assert wins.max() < responses - 1
    assert np.all(nash(bandit.preference).max(-1) < 1 - 1e-6)


def test_bradley_terry_preferences_are_the_sigmoid_of_reward_gaps() -> None:
    bandit = random_bandit(2, 3, seed=0)
    assert bandit.reward is not None
    r = bandit.reward.numpy()
    for c, a, b in np.ndindex(2, 3, 3):
        assert bandit.preference[c, a, b].item() == pytest.approx(1 / (1 + np.exp(r[c, b] - r[c, a])))


def test_rock_paper_scissors_has_the_equilibrium_of_its_docstring() -> None:
    bandit = rock_paper_scissors(contexts=2, advantages=(0.1, 0.2, 0.3))
    assert bandit.preference[0, 1, 0].item() == pytest.approx(0.6)  # paper over rock
    assert bandit.preference[0, 0, 2].item() == pytest.approx(0.7)  # rock over scissors
    assert bandit.preference[0, 2, 1].item() == pytest.approx(0.8)  # scissors over paper
    by_hand = np.array([[3, 2, 1], [3, 2, 1]]) / 6
    assert exploitability(by_hand, bandit.preference).max() < 1e-12
    assert exploitability(bandit.reference, bandit.preference).min() > 0.01  # learning from the reference has somewhere to go


def test_pair_logps_read_the_right_cells_and_only_the_policy_carries_gradient() -> None:
    bandit = random_bandit(2, 3, seed=0)
    policy = TabularPolicy(torch.full((2, 3), 1 / 3, dtype=torch.float64))
    index = torch.tensor([1, 0]), torch.tensor([2, 1]), torch.tensor([0, 2])
    pairs = BanditPairs(*index, torch.full((2,), 0.5, dtype=torch.float64))
    logps = bandit.pair_logps(policy.log_probs(), pairs)
    assert logps.policy_chosen.tolist() == pytest.approx([-np.log(3)] * 2)
    assert logps.ref_chosen.tolist() == pytest.approx([np.log(bandit.reference[1, 2].item()), np.log(bandit.reference[0, 1].item())])
    assert logps.ref_rejected.tolist() == pytest.approx([np.log(bandit.reference[1, 0].item()), np.log(bandit.reference[0, 2].item())])
    assert [x.requires_grad for x in logps] == [True, True, False, False]
    batch = bandit.pair_batch(policy.log_probs(), pairs)
    assert batch.reference_chosen is not None
    assert torch.equal(batch.chosen.sum, logps.policy_chosen)
    assert torch.equal(batch.rejected.mean, logps.policy_rejected)
    assert torch.equal(batch.reference_chosen.sum, logps.ref_chosen)
    assert bandit.reward is not None
    assert batch.margin.tolist() == pytest.approx(
        [bandit.reward[1, 2].item() - bandit.reward[1, 0].item(), bandit.reward[0, 1].item() - bandit.reward[0, 2].item()]
    )


def test_tabular_policy_starts_where_it_is_told_and_keeps_zeros() -> None:
    start = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]], dtype=torch.float64)
    policy = TabularPolicy(start)
    torch.testing.assert_close(policy.probs(), start)
    fit(policy, lambda log_probs: -log_probs[0, 0] - log_probs[1, 1], steps=5)
    assert policy.probs()[0, 2] == 0
    torch.testing.assert_close(policy.probs().sum(-1), torch.ones(2, dtype=torch.float64))
    assert bool((policy.probs()[:, :2].diagonal() > start[:, :2].diagonal()).all())


def test_total_variation_by_hand() -> None:
    assert total_variation([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], np.array([[0.25, 0.25, 0.5], [0.0, 0.0, 1.0]])).tolist() == [0.5, 1.0]


def test_a_loss_that_is_not_finite_stops_the_fit() -> None:
    policy = TabularPolicy(torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    for optimiser in ("lbfgs", "adam"):
        with pytest.raises(Failure, match="became nan"):
            fit(policy, lambda log_probs: log_probs.sum() * torch.nan, steps=3, optimiser=optimiser)


def test_wrong_shapes_and_values_are_refused() -> None:
    bandit = random_bandit(2, 3, seed=0)
    with pytest.raises(UsageError, match="at least 1 context and 3 responses"):
        random_bandit(1, 2, seed=0, preference="intransitive")
    with pytest.raises(UsageError, match="known: full, partial"):
        random_bandit(1, 2, seed=0, coverage="half")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="advantages"):
        rock_paper_scissors(advantages=(0.6, 0.1, 0.1))
    with pytest.raises(UsageError, match="not logarithms"):
        bandit.exact_pairs(bandit.reference.log())
    with pytest.raises(UsageError, match="must be 1"):
        dataclasses.replace(bandit, preference=torch.full((2, 3, 3), 0.4, dtype=torch.float64))
    with pytest.raises(UsageError, match="float64"):
        dataclasses.replace(bandit, reward=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected reference"):
        dataclasses.replace(bandit, behaviour=bandit.reference[:1])
    with pytest.raises(ValueError, match="expected log-probabilities"):
        bandit.pair_logps(torch.zeros(2, 4), bandit.exact_pairs())
    with pytest.raises(UsageError, match="at least 1"):
        bandit.sample_pairs(0, seed=0)
    with pytest.raises(ValueError, match="scalar"):
        fit(TabularPolicy(bandit.reference), lambda log_probs: log_probs, steps=1)
