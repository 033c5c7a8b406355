"""VPO (S36): labels that optimism saves online, and gold that pessimism keeps off the data's support, both on `bandit`; offline also on `review`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telos.algorithms.language import dpo, vpo
from telos.catalogue._exact import expected
from telos.catalogue._partial_coverage import descend, instances
from telos.catalogue._review import DPO, SMOKE, dpo_baseline, mean_gold, measure_common, preferences, starting_policy, wins
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.core.seeds import derive, numpy_generator, torch_generator
from telos.environments.bandit import Bandit, BanditPairs
from telos.functional.equilibria import kl_optimum
from telos.functional.pairwise import SampleLogps

BETA, STEPS = 0.1, 400
VPO: dict[str, Any] = {"value_coef": 0.1, "samples_length": 72}  # pessimism; an answer's whole length on `review`

# Online: responses with rewards and reference logits uniform on [0, 1], a policy that follows all labels so far by a few steps of Adam an iteration.
CONTEXTS, RESPONSES, LABELS, UPDATES, LEARNING_RATE = 60, 10, 4, 20, 0.01  # labels a context and an iteration
OPTIMISM = 0.1  # of the first iteration; it falls as 1 / iterations, as the paper's does over a growing sum of losses
TARGET = 0.5  # share of the reference's regret


def off_support(seed: int, count: int) -> dict[str, float]:
    """DPO and pessimistic VPO trained alike on the same few pairs of `count` bandits that show half of the responses; the mean over them."""
    ours = functools.partial(vpo.loss, vpo.Config(beta=BETA, value_coef=VPO["value_coef"]))
    theirs = functools.partial(dpo.loss, dpo.Config(beta=BETA))
    found = [(descend(ours, given, STEPS, "reference"), descend(theirs, given, STEPS)) for given in instances(seed, count)]
    gold = np.mean([[pair[0][-1].gold, pair[1][-1].gold, pair[0][0].gold] for pair in found], 0)
    kl = np.mean([[path[-1].kl for path in pair] for pair in found], 0)
    return {
        "gold over DPO, partial coverage": float(gold[0] - gold[1]),
        "gold over the reference, VPO, partial coverage": float(gold[0] - gold[2]),
        "gold over the reference, DPO, partial coverage": float(gold[1] - gold[2]),
        "KL, VPO, partial coverage": float(kl[0]),
        "KL, DPO, partial coverage": float(kl[1]),
    }


def regrets(bandit: Bandit, optimism: float, iterations: int, seed: int) -> list[float]:
    """Mean over contexts of J(π*) − J(π_t) at the start of each iteration, J(π) = E_π[gold] − β KL(π‖π_ref).

    The objective is that of `vpo-online`, with the expectation over the reference taken exactly. As there, a label is asked for two answers of π_t that
    differ. Optimism 0 is iterative DPO on all labels.
    """
    reward = bandit.reward
    assert reward is not None
    log_reference, generator = bandit.reference.log(), torch_generator(seed, "online")
    logits = torch.zeros_like(log_reference).requires_grad_()
    adam = torch.optim.Adam([logits], lr=LEARNING_RATE)
    fit = functools.partial(dpo.loss, dpo.Config(beta=BETA))
    counts = torch.zeros_like(bandit.preference)
    everything = torch.ones_like(log_reference, dtype=torch.bool).flatten()[:, None, None]

    def value(policy: Tensor) -> Tensor:
        return (policy * (reward - BETA * (policy.clamp(min=1e-300).log() - log_reference))).sum(-1)

    best, found = value(torch.from_numpy(kl_optimum(bandit.reward, bandit.reference, BETA))), []
    for iteration in range(iterations):
        policy = torch.softmax(log_reference + logits.detach(), -1)
        found.append(float((best - value(policy)).mean()))
        counts += _labelled(bandit, policy, generator)
        context, chosen, rejected = counts.nonzero(as_tuple=True)
        pairs = BanditPairs(context, chosen, rejected, counts[context, chosen, rejected] / counts.sum())
        for _ in range(UPDATES):
            log_probs = torch.log_softmax(log_reference + logits, -1)
            answers = SampleLogps(log_probs.flatten()[:, None, None], log_reference.flatten()[:, None, None], everything)
            promised = (bandit.reference.flatten() * vpo.optimal_value(BETA, answers)).sum() / bandit.contexts
            adam.zero_grad()
            (expected(fit, bandit, log_probs, pairs) - optimism / (iteration + 1) * promised).backward()
            adam.step()
    return found


def _labelled(bandit: Bandit, policy: Tensor, generator: torch.Generator) -> Tensor:
    """`LABELS` labelled pairs of different responses in each context, counted by (context, chosen, rejected)."""
    law = policy[:, :, None] * policy[:, None, :] * (1 - torch.eye(bandit.responses, dtype=torch.float64))
    drawn = torch.multinomial(law.flatten(1), LABELS, replacement=True, generator=generator)
    context = torch.arange(bandit.contexts)[:, None].expand_as(drawn)
    first, second = drawn // bandit.responses, drawn % bandit.responses
    won = torch.rand(drawn.shape, dtype=torch.float64, generator=generator) < bandit.preference[context, first, second]
    chosen, rejected = torch.where(won, first, second), torch.where(won, second, first)
    found, one = torch.zeros_like(bandit.preference), torch.ones(drawn.numel(), dtype=torch.float64)
    return found.index_put_((context.flatten(), chosen.flatten(), rejected.flatten()), one, accumulate=True)


def online(seed: int, iterations: int) -> dict[str, float]:
    """Labels a context until the regret is `TARGET` of the reference's; as many as were asked for where it never is."""
    generator = numpy_generator(seed, "online")
    logits, reward = (torch.from_numpy(generator.uniform(size=(CONTEXTS, RESPONSES))) for _ in range(2))
    bandit = Bandit.from_reward(reward, torch.softmax(logits, -1))
    found = {name: regrets(bandit, optimism, iterations, derive(seed, "labels")) for name, optimism in (("VPO", OPTIMISM), ("DPO", 0.0))}
    labels = {
        name: LABELS * next((i for i, value in enumerate(path) if value < TARGET * path[0]), iterations) for name, path in found.items()
    }
    return {
        "labels saved against iterative DPO, share": 1 - labels["VPO"] / labels["DPO"],
        **{f"labels a context to the target, {name}": float(count) for name, count in labels.items()},
        **{f"regret after all labels, {name}": path[-1] for name, path in found.items()},
    }


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    run = lab.train("vpo", "vpo", model=start, data=str(pairs), steps=settings["steps"], checkpoint_every=0, **DPO, **VPO)
    items = lab.items(settings["held_out"])
    ours = lab.assess("vpo", run, items, reference=start)
    theirs = measure_common(lab, dpo_baseline(lab, start, pairs, settings), start, items)
    return (
        online(seed, settings["label_iterations"])
        | off_support(seed, settings["bandits"])
        | {
            "win rate over DPO": wins(ours, theirs),
            "gold, VPO": mean_gold(ours),
            "gold, DPO": mean_gold(theirs),
            "KL, VPO": float(np.mean(ours.kl)),
            "KL, DPO": float(np.mean(theirs.kl)),
        }
    )


CLAIM = Claim(
    key="vpo",
    statement="Online VPO needs fewer preference labels than iterative DPO to reach a regret; offline VPO is better than DPO off the data's support",
    baselines=("vpo-online --value_coef 0, which is iterative dpo", "dpo"),
    facts=(
        Fact("fewer labels than iterative DPO to half of the reference's regret", "labels saved against iterative DPO, share", ">", 0.0),
        Fact("gold above DPO's where the pairs show half of the responses", "gold over DPO, partial coverage", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "bandits": 2, "label_iterations": 8}),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "steps": 120, "held_out": 256, "bandits": 12, "label_iterations": 80}),
    },
    notes="Regret is that of the KL-regularised objective. Online, the policy is tabular and both methods take the same few optimiser steps an iteration; "
    "optimism is reached by them, not by a global search over rewards. Offline, policies share features between responses, and what no pair shows is rarer "
    "in the reference and worse. On `review` gold is reported and not bounded.",
)
