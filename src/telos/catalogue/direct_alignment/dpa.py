"""DPA (S189): one model that trades brevity against telling what was asked for, as the direction in its prompt says, on `review`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.language.assess import Assessment
from telos.algorithms.language.dpa import directed, objective_names
from telos.catalogue._review import SMOKE, mean_gold, measure_common, starting_policy
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.direct_alignment._rewards import brief, told
from telos.catalogue.lab import Lab
from telos.environments.text.base import Item
from telos.evaluation.statistics import spearman

DPA: dict[str, Any] = {
    "region": "positive",
    "samples_per_prompt": 8,
    "epochs": 2,
    "minibatch_size": 16,
    "learning_rate": 3e-4,
    "max_completion_length": 72,
}
REWARDS = (f"{brief.__module__}:brief", f"{told.__module__}:told")
ANGLES = (0, 15, 30, 45, 60, 75, 90)  # degrees from telling towards brevity


def achieved(items: Sequence[Item], found: Assessment) -> tuple[float, float]:
    """The two objectives' means over the answers."""
    return float(np.mean(brief(found.texts))), float(np.mean(told([item.prompt for item in items], found.texts)))


def hypervolume(points: Iterable[tuple[float, float]]) -> float:
    """The area that points with coordinates >= 0 dominate above (0, 0), where both coordinates are to be high."""
    area = height = 0.0
    for x, y in sorted(points, reverse=True):
        area += x * max(0.0, y - height)
        height = max(height, y)
    return area


def rank_correlation(values: Sequence[float]) -> float:
    """Of the angles with what they achieve; 0 where all achieve the same, for then the angle does nothing."""
    found = spearman(ANGLES, values)
    return found if math.isfinite(found) else 0.0


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    run = lab.train(
        "dpa",
        "dpa",
        model=start,
        data="review",
        reward=REWARDS,
        batch_size=settings["prompts"],
        steps=settings["iterations"],
        checkpoint_every=0,
        **DPA,
    )
    items, names = lab.items(settings["held_out"]), objective_names(REWARDS)
    points, gold = [], []
    for angle in ANGLES:
        direction = (math.sin(math.radians(angle)), math.cos(math.radians(angle)))
        asked = [dataclasses.replace(item, prompt=directed(item.prompt, names, direction)) for item in items]
        found = lab.assess(f"dpa-{angle}", run, asked)
        points.append(achieved(items, found))
        gold.append(mean_gold(found))
    before = measure_common(lab, start, start, items)
    origin = achieved(items, before)
    return {
        "rank correlation of angle and brevity": rank_correlation([x for x, _ in points]),
        "rank correlation of angle and telling": rank_correlation([y for _, y in points]),
        "hypervolume over the start": hypervolume(points) - hypervolume([origin]),
        "hypervolume over its best single direction": hypervolume(points) - max(hypervolume([point]) for point in points),
        "hypervolume": hypervolume(points),
        "hypervolume, start": hypervolume([origin]),
        "brevity, start": origin[0],
        "telling, start": origin[1],
        "gold, start": mean_gold(before),
        **{f"brevity at {angle}°": x for angle, (x, _) in zip(ANGLES, points, strict=True)},
        **{f"telling at {angle}°": y for angle, (_, y) in zip(ANGLES, points, strict=True)},
        **{f"gold at {angle}°": value for angle, value in zip(ANGLES, gold, strict=True)},
    }


CLAIM = Claim(
    key="dpa",
    statement="one model trained by DPA traces a front between two conflicting rewards when the direction in its prompt is swept at inference",
    baselines=("sft",),
    facts=(
        Fact("the more the direction asks for brevity, the briefer the answers", "rank correlation of angle and brevity", ">", 0.0),
        Fact("the more the direction asks for brevity, the less is told", "rank correlation of angle and telling", "<", 0.0),
        Fact("the swept front dominates more than the starting policy's point", "hypervolume over the start", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "prompts": 8}),
        "full": Budget(3, {"sft_steps": 60, "prompts": 64, "iterations": 15, "held_out": 256}),
    },
    notes="Two programmatic rewards (shortness; the share of the request's words that the answer holds) stand for the paper's learned helpfulness and "
    "verbosity. Directions are drawn from the whole quarter between the two rewards, where the paper stays within 45° of the first and lets the second be "
    "negative. The hypervolume is measured above (0, 0), both objectives lying in 0 … 1; the starting policy is asked without a direction.",
)
