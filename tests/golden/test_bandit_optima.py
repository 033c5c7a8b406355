"""The methods' own losses on bandits, where the optimum is known: DPO's is the KL-regularised policy, the reward model's is the gold reward."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from telos.algorithms.language import dpo, ppo_max, reward_model
from telos.environments.bandit import TabularPolicy, fit, random_bandit, total_variation
from telos.functional.policy import PolicyView


def kl_optimum(reference: Tensor, reward: Tensor, beta: float) -> Tensor:
    """π*(a) ∝ π_ref(a) exp(r(a) / β), written out."""
    weights = reference.numpy() * np.exp((reward.numpy() - reward.numpy().max(-1, keepdims=True)) / beta)
    return torch.from_numpy(weights / weights.sum(-1, keepdims=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_dpo_reaches_the_regularised_optimum_under_full_coverage(seed: int, beta: float) -> None:
    bandit = random_bandit(3, 5, seed)
    assert bandit.reward is not None
    pairs = bandit.exact_pairs()
    policy = TabularPolicy(bandit.reference)
    config = dpo.Config(beta=beta)
    result = fit(policy, lambda logp: (pairs.weight * dpo.loss(config, bandit.pair_batch(logp, pairs)).values).sum(), steps=400)
    assert result.gradient < 1e-6
    optimum = kl_optimum(bandit.reference, bandit.reward, beta)
    assert float(total_variation(policy.probs(), optimum).max()) < 0.02
    assert float(total_variation(bandit.reference, optimum).max()) > 0.05, "there was something to learn"


def test_label_smoothing_shrinks_the_optimum_by_its_known_amount() -> None:
    """Smoothing treats labels with P(a ≻ b) as if they were flipped with probability ε: at its optimum σ(margin) = (1 − ε) P + ε (1 − P)."""
    bandit = random_bandit(1, 2, 3)
    assert bandit.reward is not None
    pairs, eps = bandit.exact_pairs(), 0.2
    policy = TabularPolicy(bandit.reference)
    config = dpo.Config(beta=1.0, label_smoothing=eps)
    fit(policy, lambda logp: (pairs.weight * dpo.loss(config, bandit.pair_batch(logp, pairs)).values).sum(), steps=400)
    ratio = (policy.log_probs() - bandit.reference.log())[0].detach()
    p = torch.sigmoid(bandit.reward[0, 0] - bandit.reward[0, 1])
    assert torch.sigmoid(ratio[0] - ratio[1]).item() == pytest.approx(float((1 - eps) * p + eps * (1 - p)), abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_bradley_terry_recovers_the_gold_reward_up_to_its_constant(seed: int) -> None:
    bandit = random_bandit(2, 4, seed)
    assert bandit.reward is not None
    pairs = bandit.exact_pairs()
    scores = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    config = reward_model.Config(center_coef=0.0)
    search = torch.optim.LBFGS([scores], max_iter=400, tolerance_grad=1e-12, tolerance_change=0.0, line_search_fn="strong_wolfe")

    def evaluate() -> Tensor:
        search.zero_grad()
        chosen, rejected = scores[pairs.context, pairs.chosen], scores[pairs.context, pairs.rejected]
        loss = (pairs.weight * reward_model.loss(config, chosen, rejected, torch.zeros_like(chosen)).values).sum()
        loss.backward()
        return loss

    search.step(evaluate)  # type: ignore[arg-type]
    found = scores.detach() - scores.detach().mean(-1, keepdim=True)
    torch.testing.assert_close(found, bandit.reward - bandit.reward.mean(-1, keepdim=True), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_ppo_in_exact_expectation_climbs_to_the_regularised_optimum(seed: int) -> None:
    """Every response is sampled with its exact probability; the advantage is the penalised reward against its mean. Each update must raise
    E[r] − β KL, and many of them reach its maximum."""
    bandit, beta = random_bandit(2, 4, seed), 1.0
    assert bandit.reward is not None
    reward = bandit.reward
    policy = TabularPolicy(bandit.reference)
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.02)
    config = ppo_max.Config(preset="vanilla")

    def objective() -> float:
        probs = policy.probs()
        return float((probs * (reward - beta * (probs / bandit.reference).log())).sum(-1).mean())

    history = [objective()]
    for _ in range(120):
        old = policy.log_probs().detach()
        penalised = reward - beta * (old - bandit.reference.log())
        advantages = penalised - (old.exp() * penalised).sum(-1, keepdim=True)
        for _ in range(4):
            new = policy.log_probs()
            view = PolicyView(new, torch.zeros_like(new), old, None, advantages, torch.ones_like(new, dtype=torch.bool))
            loss = (old.exp() * ppo_max.loss(config, view).values).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        history.append(objective())
    assert all(b > a - 1e-3 for a, b in itertools.pairwise(history))
    assert history[-1] > history[0] + 0.05
    optimum = kl_optimum(bandit.reference, reward, beta)
    assert float(total_variation(policy.probs(), optimum).max()) < 0.02
