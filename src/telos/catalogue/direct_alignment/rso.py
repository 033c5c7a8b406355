"""RSO (S61): what its sampler accepts follows the tilted policy, and it learns more from such pairs than DPO and SLiC from the policy's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import chisquare

from telos.algorithms.language import rso
from telos.catalogue._review import (
    SMOKE,
    dpo_baseline,
    learned_reward,
    mean_gold,
    measure_common,
    preferences,
    starting_policy,
    wins,
)
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.core.seeds import numpy_generator
from telos.environments.bandit import random_bandit
from telos.functional.equilibria import kl_optimum

# As many labelled pairs and optimiser steps as the baselines have: 15 iterations of 64 prompts with two pairs each. γ is the baselines' β.
RSO: dict[str, Any] = {
    "minibatch_size": 16,
    "samples_per_prompt": 16,
    "accepted": 4,
    "examples_per_prompt": 2,
    "beta": 0.5,
    "gamma": 0.1,
    "learning_rate": 1e-4,
    "lr_schedule": "linear",
    "max_completion_length": 72,
}
SLIC: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-4, "delta": 1.0, "nll_coef": 0.1, "lr_schedule": "linear"}


def p_values(seed: int, beta: float = 0.5, rounds: int = 500, candidates: int = 2000, accepted: int = 20) -> dict[str, float]:
    """Chi-square tests of the responses that the sampler accepts on a random bandit: against the tilted policy, and against that of another
    temperature, which says whether the test could tell."""
    bandit = random_bandit(1, 5, seed)
    assert bandit.reward is not None
    generator = numpy_generator(seed, "claim", "rso")
    reward, reference = bandit.reward[0].numpy(), bandit.reference[0].numpy()
    counts = np.zeros(bandit.responses)
    for _ in range(rounds):
        written = generator.choice(bandit.responses, size=candidates, p=reference)
        counts += np.bincount(written[rso.accept(reward[written], accepted, beta, generator)], minlength=bandit.responses)

    def p_value(temperature: float) -> float:
        target = kl_optimum(bandit.reward, bandit.reference, temperature)[0]
        return float(chisquare(counts, counts.sum() * target).pvalue)

    return {"p-value of the accepted samples": p_value(beta), "p-value against a temperature 20 % higher": p_value(1.2 * beta)}


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    reward = learned_reward(lab, start, pairs, settings)
    run = lab.train(
        "rso",
        "rso",
        model=start,
        data="review",
        reward=[reward],
        steps=settings["iterations"],
        checkpoint_every=0,
        batch_size=settings["prompts"],
        **RSO,
    )
    slic = lab.train("slic", "slic", model=start, data=str(pairs), steps=settings["steps"], checkpoint_every=0, **SLIC)
    items = lab.items(settings["held_out"])
    ours = lab.assess("rso", run, items, reference=start)
    hinge = lab.assess("slic", slic, items, reference=start)
    dpo = measure_common(lab, dpo_baseline(lab, start, pairs, settings), start, items)
    before = measure_common(lab, start, start, items)
    return p_values(seed % 2**31) | {
        "gold over DPO": mean_gold(ours) - mean_gold(dpo),
        "gold over SLiC": mean_gold(ours) - mean_gold(hinge),
        "win rate over DPO": wins(ours, dpo),
        "win rate over SLiC": wins(ours, hinge),
        "win rate over SFT": wins(ours, before),
        "gold, SFT": mean_gold(before),
        "gold, RSO": mean_gold(ours),
        "gold, DPO": mean_gold(dpo),
        "gold, SLiC": mean_gold(hinge),
        "KL, RSO": float(np.mean(ours.kl)),
        "KL, DPO": float(np.mean(dpo.kl)),
        "KL, SLiC": float(np.mean(hinge.kl)),
    }


CLAIM = Claim(
    key="rso",
    statement="RSO's rejection sampler draws from the tilted starting policy, and its pairs make a better policy than DPO and SLiC make of the start's own",
    baselines=("dpo", "slic"),
    facts=(
        Fact("chi-square test of 10,000 accepted samples on `bandit` not below 0.01", "p-value of the accepted samples", ">", 0.01),
        Fact("mean gold above DPO's on the start's own pairs, `review`", "gold over DPO", ">", 0.0),
        Fact("mean gold above SLiC's on the start's own pairs, `review`", "gold over SLiC", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "prompts": 16}),
        "full": Budget(
            3, {"sft_steps": 60, "pairs": 2000, "reward_steps": 125, "steps": 120, "iterations": 15, "prompts": 64, "held_out": 256}
        ),
    },
    notes="4 of 16 candidates are accepted (paper: 8 of 64). The reward that accepts and labels is learned from the pairs of DPO and SLiC. "
    "Policies are compared as they end, after equally many pairs and optimiser steps; their KL stands beside.",
)
