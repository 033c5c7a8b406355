"""Reward-augmented data (S154): good rejected answers are not unlearnt, and the best is asked for by its score."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.language._sampling import open_reward, scorer
from telos.catalogue._exact import log_ratios
from telos.catalogue._review import DPO, SMOKE, dpo_baseline, learned_reward, mean_gold, measure_common, preferences, starting_policy
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.data.preferences import conditioned
from telos.models.language import LanguageModel

BEST = 0.95  # quantile of the training scores that is asked for


def scored_rows(lab: Lab, start: str, pairs: Path, reward: str) -> list[dict[str, Any]]:
    """The pairs with the learned reward's scores of both answers, kept in the lab."""

    def rows() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
        model = LanguageModel.load(start)
        score = scorer(open_reward(reward, timeout=60.0, on_error="stop", policy=model), model)
        for side in ("chosen", "rejected"):
            values = score([row["prompt"] for row in found], [row[side] for row in found], {})
            for row, value in zip(found, values, strict=True):
                row[f"{side}_score"] = value
        return found

    return [json.loads(line) for line in lab.file("scored.jsonl", rows).read_text(encoding="utf-8").splitlines()]


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    rows = scored_rows(lab, start, pairs, learned_reward(lab, start, pairs, settings))
    data = lab.folder("scored.jsonl")
    run = lab.train("reward-augmented", "reward-augmented", model=start, data=str(data), steps=settings["steps"], checkpoint_every=0, **DPO)
    baseline = dpo_baseline(lab, start, pairs, settings)
    scores = np.array([[row["chosen_score"], row["rejected_score"]] for row in rows])
    good = [row for row in rows if row["rejected_score"] >= np.quantile(scores[:, 1], 0.75)]
    asked = lab.file(
        "good-rejected-conditioned.jsonl", lambda: [row | {"prompt": conditioned(row["prompt"], row["rejected_score"])} for row in good]
    )
    plain = lab.file("good-rejected.jsonl", lambda: good)
    kept = float(log_ratios(run.path / "model", start, asked)[1].mean())
    lost = float(log_ratios(baseline.path / "model", start, plain)[1].mean())
    items = lab.items(settings["held_out"])
    best = float(np.quantile(scores, BEST))
    wishes = [dataclasses.replace(item, prompt=conditioned(item.prompt, best)) for item in items]
    ours, theirs = lab.assess("reward-augmented", run, wishes), measure_common(lab, baseline, start, items)
    worst = [dataclasses.replace(item, prompt=conditioned(item.prompt, float(np.quantile(scores, 1 - BEST)))) for item in items]
    return {
        "log-ratio of good rejected answers over DPO": kept - lost,
        "gold over DPO, asked for the best": mean_gold(ours) - mean_gold(theirs),
        "log-ratio of good rejected answers": kept,
        "log-ratio of good rejected answers, DPO": lost,
        "gold, asked for the best": mean_gold(ours),
        "gold, asked for the worst": mean_gold(lab.assess("asked-for-the-worst", run, worst)),
        "gold, DPO": mean_gold(theirs),
    }


CLAIM = Claim(
    key="reward-augmented",
    statement="Reward-augmented pairs keep good rejected answers from being unlearnt and give more gold than DPO on the same pairs",
    baselines=("dpo",),
    facts=(
        Fact(
            "the best quarter of rejected answers keeps more probability than under DPO",
            "log-ratio of good rejected answers over DPO",
            ">",
            0.0,
        ),
        Fact("gold above DPO's when the best is asked for, on `review`", "gold over DPO, asked for the best", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, SMOKE),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "reward_steps": 125, "steps": 120, "held_out": 256}),
    },
    notes="Scores are those of a reward model learned from the same pairs; the judge scores the result alone. The base model has 4.2 M parameters and must "
    "learn what a target score means from these pairs. Log-ratios are to the start under the prompt that each policy was trained on.",
)
