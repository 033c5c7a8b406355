"""SPO (S171): the preference-degree loss improves how the implicit reward ranks degrees, and composes with other pairwise methods."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from telos.algorithms.language import _degree
from telos.catalogue._exact import log_ratios
from telos.catalogue._review import DPO, SMOKE, dpo_baseline, mean_gold, measure_common, preferences, starting_policy
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab

LEVELS = 4
COMPOSED = ("dpo", "simpo", "f-dpo")


def degraded_pairs(lab: Lab, pairs: Path) -> Path:
    """Held-out answers with versions that lack more of their key content: every two versions of an answer as a pair, the fuller one chosen."""

    def rows() -> list[dict[str, Any]]:
        found = []
        for line in pairs.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            left = [text for text in _degree.versions(row["chosen"], LEVELS) if text is not None and text.strip()]
            found += [{"prompt": row["prompt"], "chosen": more, "rejected": less} for more, less in combinations(left, 2)]
        return found

    return lab.file("degraded.jsonl", rows)


def rank_correlation(model: Path, start: str, pairs: Path) -> float:
    """Kendall's τ between the implicit reward and the content that is left: concordant minus discordant pairs."""
    fuller, emptier = log_ratios(model, start, pairs, most=600)
    return float((fuller > emptier).mean() - (fuller < emptier).mean())


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    versions = degraded_pairs(lab, preferences(lab, start, settings, split="validation"))
    common = {"model": start, "data": str(pairs), "checkpoint_every": 0}
    run = lab.train("spo-degree", "spo-degree", steps=settings["steps"], **common, **DPO)
    baseline = dpo_baseline(lab, start, pairs, settings)
    composed = 0
    for method in COMPOSED:
        metrics = lab.train(f"composed-{method}", method, steps=2, loss_degree=0.1, **common).metrics()
        composed += "degree/loss" in metrics[-1]
    items = lab.items(settings["held_out"])
    ours, theirs = lab.assess("spo-degree", run, items, reference=start), measure_common(lab, baseline, start, items)
    tau = {name: rank_correlation(found.path / "model", start, versions) for name, found in (("SPO", run), ("DPO", baseline))}
    return {
        "rank correlation over DPO": tau["SPO"] - tau["DPO"],
        "methods it composes with": float(composed),
        "rank correlation, SPO": tau["SPO"],
        "rank correlation, DPO": tau["DPO"],
        "degree accuracy at the end": run.metrics()[-1]["degree/accuracy"],
        "gold, SPO": mean_gold(ours),
        "gold, DPO": mean_gold(theirs),
    }


CLAIM = Claim(
    key="spo-degree",
    statement="The preference-degree loss composes with pairwise methods by a flag and improves the ranking of preference degrees",
    baselines=("dpo",),
    facts=(
        Fact("Kendall's τ of implicit reward and remaining content above DPO's", "rank correlation over DPO", ">", 0.0),
        Fact("DPO, SimPO and f-DPO train with the flag", "methods it composes with", ">", 2.5),
    ),
    experiment=experiment,
    budgets={"smoke": Budget(1, SMOKE), "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "steps": 120, "held_out": 256})},
    notes="Degrees are made on held-out answers as in training, by taking key phrases away; the implicit reward is log π/π_ref of the whole answer.",
)
