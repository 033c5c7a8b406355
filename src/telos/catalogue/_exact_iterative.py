"""What claims of iterative methods share on `bandit`: an iteration solved exactly, by minimising the method's own loss over all pairs of the last iterate.

Policies are [C, A] probabilities in float64. What a run adds (sampling, estimates of win rates) is not here: it is in the claims' parts on text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from telos.environments.bandit import Bandit, TabularPolicy, fit
from telos.functional.pairwise import AnswerLogps, LabelledLogps, PairLogps
from telos.functional.reduction import Losses


def wins_against(bandit: Bandit, policy: Tensor) -> Tensor:
    """P(a ≻ π) of every response, [C, A]."""
    return torch.einsum("cab,cb->ca", bandit.preference, policy)


def smallest_win(bandit: Bandit, policy: Tensor, other: Tensor) -> float:
    """P(policy ≻ other) in the context where it is smallest."""
    return float((policy * wins_against(bandit, other)).sum(-1).min())


def next_policy(
    loss: Callable[[PairLogps], Losses], bandit: Bandit, current: Tensor, steps: int = 200, writer: Tensor | None = None
) -> TabularPolicy:
    """The minimum of `loss` in exact expectation over labelled pairs of answers of `writer`, by default of the policy `current`, which is the anchor and
    against which win rates are the scores. A minimum that is the same for every writer is found best with one that writes every answer often."""
    pairs, rates = bandit.exact_pairs(current if writer is None else writer), wins_against(bandit, current)
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


def mirror_step(loss: Callable[[LabelledLogps], Losses], bandit: Bandit, policy: Tensor, opponent: Tensor, eta: float) -> Tensor:
    """∝ policy · exp(η Â), with Â [C, A] minus the derivative of each answer's loss in its log-probability, scored by its wins over `opponent`."""
    mask = torch.ones(policy.numel(), 1, dtype=torch.bool)
    leaf = policy.log().reshape(-1, 1).requires_grad_()
    reference = AnswerLogps(bandit.reference.log().reshape(-1, 1), mask)
    view = LabelledLogps(AnswerLogps(leaf, mask), reference, None, wins_against(bandit, opponent).flatten())
    (gradient,) = torch.autograd.grad(loss(view).values.sum(), leaf)
    return torch.softmax(policy.log() - eta * gradient.view_as(policy), -1)
