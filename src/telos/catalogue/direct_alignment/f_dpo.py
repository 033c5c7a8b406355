"""f-DPO (S174): each divergence reaches its own optimum on `bandit`; entropy and calibration side by side on `review`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from telos.algorithms.language import f_dpo
from telos.catalogue._exact import calibration_error, distance, log_ratios, optimum_of
from telos.catalogue._review import DPO, SMOKE, mean_gold, preferences, starting_policy
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.environments.bandit import random_bandit
from telos.functional.divergences import by_name
from telos.functional.equilibria import f_optimum

DIVERGENCES: Mapping[str, dict[str, Any]] = {
    "reverse-kl": {},
    "jensen-shannon": {},
    "alpha 0.5": {"divergence": "alpha", "alpha": 0.5},
    "forward-kl": {},
}


def options_of(name: str) -> dict[str, Any]:
    return DIVERGENCES[name] or {"divergence": name}


def distances(seed: int, beta: float = 0.5) -> dict[str, float]:
    """Total variation, in the worst context, between each divergence's fit and its own exact optimum."""
    bandit, found = random_bandit(3, 5, seed), {}
    for name in DIVERGENCES:
        options = options_of(name)
        policy = optimum_of(functools.partial(f_dpo.loss, f_dpo.Config(beta=beta, **options)), bandit)
        wanted = f_optimum(bandit.reward, bandit.reference, beta, by_name(options["divergence"], options.get("alpha", 0.5)))
        found[name] = distance(policy, wanted)
    return found


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    held_out = preferences(lab, start, settings, split="validation")
    exact = distances(seed % 2**31)
    figures = {"largest distance to the own optimum": max(exact.values())} | {f"distance, {name}": value for name, value in exact.items()}
    items = lab.items(settings["held_out"])
    entropy = {}
    for name in DIVERGENCES:
        stage = name.replace(" ", "-").replace(".", "")
        options = {**DPO, **options_of(name), "steps": settings["steps"], "checkpoint_every": 0, "eval_prompts": settings["held_out"]}
        run = lab.train(stage, "f-dpo", model=start, data=str(pairs), **options)
        found = lab.assess(stage, run, items, reference=start)
        chosen, rejected = log_ratios(run.path / "model", start, held_out)
        f_prime = by_name(options["divergence"], options.get("alpha", 0.5)).f_prime
        rewards = [DPO["beta"] * f_prime(torch.from_numpy(side).double()).numpy() for side in (chosen, rejected)]
        entropy[name] = run.metrics()[-1]["entropy"]
        figures |= {
            f"entropy, {name}": entropy[name],
            f"calibration error, {name}": calibration_error(rewards[0] - rewards[1]),
            f"gold, {name}": mean_gold(found),
            f"KL, {name}": float(np.mean(found.kl)),
        }
    return figures | {"entropy, forward KL over reverse KL": entropy["forward-kl"] - entropy["reverse-kl"]}


CLAIM = Claim(
    key="f-dpo",
    statement="f-DPO reaches the optimum of each divergence, and the forward KL keeps answers more diverse than the reverse KL",
    baselines=("f-dpo --divergence reverse-kl, which is dpo",),
    facts=(
        Fact(
            "every divergence within 0.02 total variation of its own optimum on `bandit`", "largest distance to the own optimum", "<", 0.02
        ),
        Fact("more entropy under the forward than under the reverse KL on `review`", "entropy, forward KL over reverse KL", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, SMOKE),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "steps": 120, "held_out": 256}),
    },
    notes="Entropy is the mean over tokens of sampled answers, nats. The calibration error is that of σ(margin) on held-out pairs with drawn labels, "
    "reported and not bounded. One β and learning rate for all divergences.",
)
