"""A-LoL (S30): learning from answers of which half are spoilt, beside likelihood and GOLD, and the diversity of its answers beside DPO's, on `review`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from telos.catalogue._review import SMOKE, dpo_baseline, learned_reward, mean_gold, measure_common, preferences, starting_policy
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.core.run import Run

NLL: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-4, "lr_schedule": "linear"}
OFFLINE: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-4, "lr_schedule": "linear"}


def spoil(pairs: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(good, bad) demonstrations: to the even prompts the preferred answers, to the odd ones those that were not."""
    good = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs[::2]]
    bad = [{"prompt": row["prompt"], "completion": row["rejected"]} for row in pairs[1::2]]
    return good, bad


def distinct_2(texts: Sequence[str], count: int | None = None) -> tuple[float, int]:
    """Share of different pairs of neighbouring words among the first `count` of them (default: all), over all texts; and how many there were."""
    found = [pair for text in texts for words in [text.lower().split()] for pair in pairwise(words)][:count]
    return len(set(found)) / max(1, len(found)), len(found)


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab, steps = Lab(root, "review", seed, watch), settings["steps"]
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    reward = learned_reward(lab, start, pairs, settings)
    good, bad = spoil([json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()])
    mixed, clean = lab.file("mixed.jsonl", lambda: good + bad), lab.file("clean.jsonl", lambda: good)

    def learn(name: str, method: str, data: Path, **options: Any) -> Run:
        return lab.train(name, method, data=str(data), steps=steps, checkpoint_every=0, **options)

    nll = learn("nll", "sft", mixed, model=start, **NLL)
    imitated = str(nll.path / "model")
    longer = learn("nll-longer", "sft", mixed, model=imitated, **NLL)
    runs = {
        "A-LoL": learn("a-lol", "a-lol", mixed, model=imitated, reward=reward, **OFFLINE),
        "GOLD": learn("gold", "gold", mixed, model=imitated, **OFFLINE),
        "NLL": longer,
        "NLL on the good half": learn("nll-clean", "sft", clean, model=start, **NLL),
    }
    items = lab.items(settings["held_out"])
    found = {name: lab.assess(name, run, items, reference=start) for name, run in runs.items()}
    found["DPO"] = measure_common(lab, dpo_baseline(lab, start, pairs, settings), start, items)
    found["start"] = measure_common(lab, start, start, items)
    gold = {name: mean_gold(answers) for name, answers in found.items()}
    count = min(distinct_2(answers.texts)[1] for answers in found.values())
    return {
        "gold over NLL": gold["A-LoL"] - gold["NLL"],
        "gold over GOLD": gold["A-LoL"] - gold["GOLD"],
        "distinct-2 over DPO": distinct_2(found["A-LoL"].texts, count)[0] - distinct_2(found["DPO"].texts, count)[0],
        "gold over NLL on the good half": gold["A-LoL"] - gold["NLL on the good half"],
        **{f"gold, {name}": value for name, value in gold.items()},
        **{f"distinct-2, {name}": distinct_2(answers.texts, count)[0] for name, answers in found.items()},
        **{f"tokens, {name}": float(np.mean(answers.length)) for name, answers in found.items()},
    }


CLAIM = Claim(
    key="a-lol",
    statement="A-LoL learns from data of which half are bad where maximum likelihood and GOLD suffer, and its answers are more diverse than DPO's",
    baselines=("sft", "gold", "dpo"),
    facts=(
        Fact("gold above that of maximum likelihood on the same half-spoilt answers", "gold over NLL", ">", 0.0),
        Fact("gold above that of GOLD on the same half-spoilt answers", "gold over GOLD", ">", 0.0),
        Fact("more distinct pairs of words than DPO trained on the usual pairs", "distinct-2 over DPO", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "pairs": 128}),  # enough rows that a batch has a positive advantage
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "reward_steps": 125, "steps": 120, "held_out": 256}),
    },
    notes="Half of the answers are those preferred in the pairs, the other half those that were not, as the paper's are by votes. A-LoL and "
    "GOLD start from the model that maximum likelihood gave on the mixture, as their papers ask; the likelihood that they are compared with goes on for as "
    "many steps. A-LoL's scores and values come from a reward learned from the pairs. Distinct-2 is taken over equally many pairs of words.",
)
