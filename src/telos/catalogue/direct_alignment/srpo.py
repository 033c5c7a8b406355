"""SRPO (S56): answers get better with revisions, and hold under prompts of another form, where DPO drops."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.language import srpo
from telos.catalogue._review import DPO, SMOKE, dpo_baseline, mean_gold, measure_common, preferences, starting_policy
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.core.run import write_atomically
from telos.core.seeds import derive
from telos.environments.text.base import Item
from telos.models.generation import Sampling
from telos.models.language import LanguageModel

REVISIONS = 3


def shifted(items: Sequence[Item]) -> list[Item]:
    """The same requests with their sentences in reverse order, which the training prompts never have."""

    def turn(prompt: str) -> str:
        request, mark, rest = prompt.partition("\n")
        return " ".join(f"{part.strip()}." for part in reversed(request.rstrip(".").split(". "))) + mark + rest

    return [dataclasses.replace(item, prompt=turn(item.prompt)) for item in items]


def revised_gold(lab: Lab, model: str, items: Sequence[Item]) -> list[float]:
    """Mean gold of the answers and of each revision, kept in the lab."""
    path = lab.folder("revisions.json")
    if not path.exists():
        sampling = Sampling(max_new_tokens=lab.testbed.max_new_tokens)
        texts = srpo.revise(
            LanguageModel.load(model), [item.prompt for item in items], REVISIONS, sampling, derive(lab.seed, "revisions") >> 1
        )
        gold = [float(np.mean([lab.testbed.gold(item, text) for item, text in zip(items, row, strict=True)])) for row in texts]
        write_atomically(path, json.dumps(gold))
    return json.loads(path.read_text(encoding="utf-8"))


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    run = lab.train("srpo", "srpo", model=start, data=str(pairs), steps=settings["steps"], checkpoint_every=0, **DPO)
    baseline = dpo_baseline(lab, start, pairs, settings)
    items = lab.items(settings["held_out"])
    other = shifted(items)
    ours, theirs = lab.assess("srpo", run, items, reference=start), measure_common(lab, baseline, start, items)
    ours_there, theirs_there = lab.assess("srpo-shifted", run, other), measure_common(lab, baseline, start, other)
    gold = revised_gold(lab, str(run.path / "model"), items)
    return {
        "gold gained by revisions": gold[-1] - gold[0],
        "fall under the shift, DPO's over SRPO's": (mean_gold(theirs) - mean_gold(theirs_there))
        - (mean_gold(ours) - mean_gold(ours_there)),
        **{f"gold after {i} revisions": value for i, value in enumerate(gold)},
        "gold, SRPO": mean_gold(ours),
        "gold, DPO": mean_gold(theirs),
        "gold under the shift, SRPO": mean_gold(ours_there),
        "gold under the shift, DPO": mean_gold(theirs_there),
        "KL, SRPO": float(np.mean(ours.kl)),
    }


CLAIM = Claim(
    key="srpo",
    statement="SRPO's answers get better with self-revisions, and it holds under prompts of another form where DPO drops",
    baselines=("dpo",),
    facts=(
        Fact("gold after three revisions above that of the first answers", "gold gained by revisions", ">", 0.0),
        Fact("falls less than DPO when the prompts' sentences come in reverse", "fall under the shift, DPO's over SRPO's", ">", 0.0),
    ),
    experiment=experiment,
    budgets={"smoke": Budget(1, SMOKE), "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "steps": 120, "held_out": 256})},
    notes="The base model has 4.2 M parameters and was not trained to read an instruction; it learns revising from these pairs alone. Gold is the mean score "
    "of the judge, where the paper has win rates.",
)
