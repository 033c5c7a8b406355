"""RPO (S70): under partial coverage the chosen answers keep their probability, and gold at equal KL stays above DPO's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.language import dpo, rpo
from telos.catalogue._exact import gold_at, log_ratios, path
from telos.catalogue._review import DPO, SMOKE, dpo_baseline, mean_gold, measure_common, preferences, starting_policy
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.environments.bandit import random_bandit

BETA, ETA, PAIRS, STEPS = 0.1, 1.0, 48, 400


def partial_coverage(seed: int) -> dict[str, float]:
    """DPO and RPO on the same few pairs of a bandit whose data show half of the responses."""
    bandit = random_bandit(4, 8, seed, coverage="partial")
    pairs = bandit.sample_pairs(PAIRS, seed)
    ours = path(functools.partial(rpo.loss, rpo.Config(beta=BETA, eta=ETA)), bandit, pairs, STEPS)
    theirs = path(functools.partial(dpo.loss, dpo.Config(beta=BETA)), bandit, pairs, STEPS)
    common = min(max(p.kl for p in ours), max(p.kl for p in theirs))
    return {
        "chosen log-probability, change": ours[-1].chosen,
        "chosen log-probability, change under DPO": theirs[-1].chosen,
        "gold over DPO at equal KL, partial coverage": gold_at(ours, common) - gold_at(theirs, common),
        "KL of the comparison": common,
    }


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    run = lab.train(
        "rpo", "rpo", model=start, data=str(pairs), steps=settings["steps"], checkpoint_every=0, eta=0.4, nll_per_token=True, **DPO
    )
    baseline = dpo_baseline(lab, start, pairs, settings)
    items = lab.items(settings["held_out"])
    ours, theirs = lab.assess("rpo", run, items, reference=start), measure_common(lab, baseline, start, items)
    return partial_coverage(seed % 2**31) | {
        "gold, RPO": mean_gold(ours),
        "gold, DPO": mean_gold(theirs),
        "KL, RPO": float(np.mean(ours.kl)),
        "KL, DPO": float(np.mean(theirs.kl)),
        "chosen log-ratio on text, RPO": float(log_ratios(run.path / "model", start, pairs)[0].mean()),
        "chosen log-ratio on text, DPO": float(log_ratios(baseline.path / "model", start, pairs)[0].mean()),
    }


CLAIM = Claim(
    key="rpo",
    statement="Under partial coverage RPO keeps the chosen answers likely, and its gold reward is above DPO's at the same KL",
    baselines=("dpo",),
    facts=(
        Fact("chosen answers do not lose log-probability on `bandit`", "chosen log-probability, change", ">", 0.0),
        Fact("gold above DPO's at equal KL on `bandit`", "gold over DPO at equal KL, partial coverage", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, SMOKE),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "steps": 120, "held_out": 256}),
    },
    notes="The bandit's data are 48 drawn pairs over half of the responses. On text both are trained on full data; their figures are reported beside.",
)
