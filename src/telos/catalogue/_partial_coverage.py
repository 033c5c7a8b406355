"""Bandits whose pairs leave out what the reference hardly ever says, and policies of shared features, which cannot help guessing there.

A tabular policy learns nothing about a response that no pair shows. A language model does: what it learns of one answer moves others, for better or worse.
Here each response has `FEATURES` random features and the policy is π ∝ π_ref exp(φ·w), so that fitting the pairs moves every response, while the gold reward
has nothing to do with the features: off the data, what is learned is a guess. The responses that no pair shows are e^`RARITY` times rarer in the reference
and `WORSE` standard deviations of the reward worse, as are the texts that nobody writes. So the data cover a good policy, which is what the theory of
pessimistic methods asks for, and a policy that leaves them loses gold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from telos.catalogue._exact import PairLoss, Point, expected, point
from telos.core.seeds import derive, numpy_generator
from telos.environments.bandit import Bandit, BanditPairs

CONTEXTS, SHOWN, HIDDEN = 4, 8, 8  # responses in pairs and in none, in each context
FEATURES, PAIRS = 16, 64
RARITY, WORSE = 2.0, 1.0


@dataclass(frozen=True, eq=False)
class Instance:
    """A bandit, the features [C, A, d] of its responses, and the drawn pairs, equal ones added up."""

    bandit: Bandit
    features: Tensor
    pairs: BanditPairs


def instance(seed: int) -> Instance:
    generator = numpy_generator(seed, "partial coverage")
    shape = (CONTEXTS, SHOWN + HIDDEN)
    hidden = torch.arange(SHOWN + HIDDEN) >= SHOWN
    logits, reward = (torch.from_numpy(generator.normal(size=shape)) for _ in range(2))
    reference = torch.softmax(logits - RARITY * hidden, -1)
    shown = reference * ~hidden
    bandit = Bandit.from_reward(reward - WORSE * hidden, reference, shown / shown.sum(-1, keepdim=True))
    features = torch.from_numpy(generator.normal(size=(*shape, FEATURES))) / FEATURES**0.5
    return Instance(bandit, features, added_up(bandit, bandit.sample_pairs(PAIRS, seed)))


def instances(seed: int, count: int) -> list[Instance]:
    return [instance(derive(seed, "instance", i)) for i in range(count)]


def added_up(bandit: Bandit, pairs: BanditPairs) -> BanditPairs:
    """The same pairs, each once, with the sum of its weights."""
    table = torch.zeros_like(bandit.preference)
    table.index_put_((pairs.context, pairs.chosen, pairs.rejected), pairs.weight, accumulate=True)
    context, chosen, rejected = table.nonzero(as_tuple=True)
    return BanditPairs(context, chosen, rejected, table[context, chosen, rejected])


def descend(loss: PairLoss, given: Instance, steps: int, sampled: str = "", learning_rate: float = 0.1) -> list[Point]:
    """The policies that Adam passes from the reference (first) to step `steps` (last), on the drawn pairs; `sampled` as in `expected`."""
    log_reference = given.bandit.reference.log()
    weights = torch.zeros(given.features.shape[-1], dtype=torch.float64, requires_grad=True)
    optimiser, found = torch.optim.Adam([weights], lr=learning_rate), []
    for step in range(steps + 1):
        log_probs = torch.log_softmax(log_reference + given.features @ weights, -1)
        found.append(point(given.bandit, log_probs.detach(), given.pairs))
        if step < steps:
            optimiser.zero_grad()
            expected(loss, given.bandit, log_probs, given.pairs, sampled).backward()
            optimiser.step()
    return found
