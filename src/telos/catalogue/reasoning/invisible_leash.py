"""The Invisible Leash (S162): what GRPO gains in one answer and loses among many, on `arith`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.catalogue._arith import FULL, LEVELS, SMOKE, START, answers, described, grpo_baseline, problems
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.evaluation.leash import Leash

BEYOND = 3  # a level that was not trained, which the start seldom solves


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "arith", seed, watch)
    asked = problems(lab, "many answers", settings["asked"], "test", (*LEVELS, BEYOND))
    run, samples = grpo_baseline(lab, settings), settings["many"]
    base, trained = (answers(lab, policy, asked, samples) for policy in (START, run))
    prompts = [[i] for i in range(len(base.texts))]
    leash = Leash(base, trained, prompts, {"samples": samples})
    gains = {row.name: row.difference.estimate for row in leash.rows}
    n, solved, texts = len(prompts), leash.support["problems"], leash.support["right texts"]
    figures = {
        "pass@1 gain": gains["pass@1"],
        f"pass@{samples} gain": gains[f"pass@{samples}"],
        "change of the entropy of answers": gains["entropy of answers [nats]"],
        "change of the entropy of tokens": gains["entropy of tokens [nats]"],
        "net change of support, problems": solved.change.estimate,
        "net change of support, ways of solving": texts.change.estimate,
        "ways of solving that are kept": texts.retention.estimate,
        "ways of solving that are new": texts.discovery.estimate,
        "problems lost beyond chance": (solved.shrunk - leash.chance["shrunk"]) / n,
        "problems won beyond chance": (solved.expanded - leash.chance["expanded"]) / n,
    }
    figures |= {f"problems {name}": float(getattr(solved, name)) for name in leash.chance}
    for name, of in leash.passed.items():
        figures |= {f"pass@{k}, {name}": rate.estimate for k, rate in zip(leash.budgets, of, strict=True)}
    figures = {name: float(np.nan_to_num(value)) for name, value in figures.items()}  # rates of an empty support: only a smoke run has one
    return figures | described("base", base, asked) | described("trained", trained, asked)


CLAIM = Claim(
    key="invisible-leash",
    statement="reinforcement with verifiable rewards raises pass@1 within the base model's support, of which it loses more than it adds",
    baselines=("tinylm, the policy before training",),
    facts=(
        Fact("one answer is right more often by more than 0.05", "pass@1 gain", ">", 0.05),
        Fact("more problems leave the support than enter it", "net change of support, problems", "<", 0.0),
        Fact("more ways of solving leave the support than enter it", "net change of support, ways of solving", "<", 0.0),
        Fact("more problems are lost than chance would lose between equal models", "problems lost beyond chance", ">", 0.0),
        Fact("answers to a problem are more alike", "change of the entropy of answers", "<", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "asked": 6, "many": 4}),
        "full": Budget(3, {**FULL, "asked": 60, "many": 128}),
    },
    notes="The trained policy is GRPO's on levels 1 and 2; problems are of levels 1 to 3. A problem, or a way of solving one (a right text), is in a model's "
    "support when one of 128 answers is it; both models draw with the same random numbers, which makes crossings by chance rarer than the figures of chance, "
    "which assume independent draws. `telos leash BASE TRAINED` reports the same on any two checkpoints.",
)
