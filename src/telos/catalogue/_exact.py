"""What claims of offline methods share: a pairwise loss minimised on a bandit, in exact expectation or on finitely many pairs, and the log-ratios of held-out
answers under a trained policy. Policies are [C, A] probabilities in float64."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telos.algorithms.language._loop_pairs import layout
from telos.data.formats import read_examples
from telos.data.readers import read_rows
from telos.data.tokenize import Limits, tokenize
from telos.environments.bandit import Bandit, BanditPairs, TabularPolicy, fit, total_variation
from telos.functional.pairwise import PairLogps, SampleLogps
from telos.functional.reduction import Losses
from telos.models.language import LanguageModel

PairLoss = Callable[[PairLogps], Losses]


@dataclasses.dataclass(frozen=True)
class Point:
    """A policy on its way."""

    kl: float  # KL(π‖π_ref) in nats, mean over contexts
    gold: float  # E_π[gold reward]
    chosen: float  # mean log π/π_ref of the chosen answers


def with_scores(bandit: Bandit, batch: PairLogps, pairs: BanditPairs) -> PairLogps:
    """The pairs with their answers' gold rewards as scores."""
    assert bandit.reward is not None
    scores = (bandit.reward[pairs.context, side] for side in (pairs.chosen, pairs.rejected))
    return dataclasses.replace(batch, **dict(zip(("chosen_score", "rejected_score"), scores, strict=True)))


def with_samples(bandit: Bandit, batch: PairLogps, pairs: BanditPairs, log_probs: Tensor, from_policy: bool) -> tuple[PairLogps, Tensor]:
    """Every pair beside every response as its one sample, and the weights [N A] that make sums expectations over both."""
    count, responses = len(pairs.weight), bandit.responses
    rows = torch.arange(count).repeat_interleave(responses)
    drawn = torch.arange(responses).repeat(count)
    place = (pairs.context[rows], drawn)
    law = (log_probs.detach().exp() if from_policy else bandit.reference)[place]
    repeated = bandit.pair_batch(log_probs, BanditPairs(*(part[rows] for part in pairs)))
    here = log_probs[place][:, None, None]
    samples = SampleLogps(here, bandit.reference.log()[place][:, None, None], torch.ones_like(here, dtype=torch.bool))
    return dataclasses.replace(repeated, samples=samples), pairs.weight[rows] * law


def expected(loss: PairLoss, bandit: Bandit, log_probs: Tensor, pairs: BanditPairs, sampled: str = "") -> Tensor:
    """The loss over weighted pairs; with `sampled` "policy" or "reference", also in exact expectation over an answer that is drawn from it."""
    batch, weight = bandit.pair_batch(log_probs, pairs), pairs.weight
    if sampled:
        batch, weight = with_samples(bandit, batch, pairs, log_probs, sampled == "policy")
    elif bandit.reward is not None:
        batch = with_scores(bandit, batch, pairs)
    return (weight * loss(batch).values).sum()


def optimum_of(loss: PairLoss, bandit: Bandit, pairs: BanditPairs | None = None, steps: int = 400) -> Tensor:
    """The policy at which the loss over `pairs` (default: all, in exact expectation) is least."""
    law, policy = pairs or bandit.exact_pairs(), TabularPolicy(bandit.reference)
    fit(policy, lambda log_probs: expected(loss, bandit, log_probs, law), steps=steps)
    return policy.probs()


def distance(policy: Tensor, wanted: Any) -> float:
    """The largest total variation over contexts."""
    return float(total_variation(policy, torch.as_tensor(wanted)).max())


def path(loss: PairLoss, bandit: Bandit, pairs: BanditPairs, steps: int, sampled: str = "", learning_rate: float = 0.05) -> list[Point]:
    """The policies of gradient descent (Adam) from the reference."""
    policy = TabularPolicy(bandit.reference)
    optimiser, found = torch.optim.Adam(policy.parameters(), lr=learning_rate), []
    for _ in range(steps):
        log_probs = policy.log_probs()
        found.append(point(bandit, log_probs.detach(), pairs))
        optimiser.zero_grad()
        expected(loss, bandit, log_probs, pairs, sampled).backward()
        optimiser.step()
    return [*found, point(bandit, policy.log_probs().detach(), pairs)]


def point(bandit: Bandit, log_probs: Tensor, pairs: BanditPairs) -> Point:
    assert bandit.reward is not None
    probs, ratio = log_probs.exp(), log_probs - bandit.reference.log()
    chosen = (pairs.weight * ratio[pairs.context, pairs.chosen]).sum()
    return Point(float((probs * ratio).sum(-1).mean()), float((probs * bandit.reward).sum(-1).mean()), float(chosen))


def gold_at(points: list[Point], kl: float) -> float:
    """Gold where a path's KL first is `kl`, interpolated between its points in order of KL."""
    found = sorted((p.kl, p.gold) for p in points)
    return float(np.interp(kl, [x for x, _ in found], [y for _, y in found]))


def log_ratios(model: str | Path, reference: str, pairs: Path, most: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """log π/π_ref of the chosen and the rejected answers of a file of pairs, both [N]."""
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()[:most]]
    policy, base = LanguageModel.load(str(model)), LanguageModel.load(reference)
    table = tokenize(read_examples(read_rows(rows), ("preference",)), policy.tokenizer, Limits(max_length=policy.context))
    found = []
    for start in range(0, len(table), 64):
        batch: Any = table.batch(range(start, min(start + 64, len(table)))).to(policy.device)
        with torch.no_grad():
            gap = policy.logprobs(layout(batch)).logprobs - base.logprobs(layout(batch)).logprobs
        found.append(gap.sum(1).view(-1, 2).cpu().numpy())
    both = np.concatenate(found)
    return both[:, 0], both[:, 1]


def calibration_error(margins: np.ndarray, bins: int = 10) -> float:
    """The expected calibration error of σ(margin) as the probability that the chosen answer is preferred, its confidence being max(p, 1 − p)."""
    p = 1 / (1 + np.exp(-margins))
    confidence, right = np.maximum(p, 1 - p), p > 0.5
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = [abs(confidence[place == b].mean() - right[place == b].mean()) * (place == b).mean() for b in range(bins) if (place == b).any()]
    return float(sum(gaps))
