"""What recipes of offline reasoning share: answers that were sampled and judged once, and the baselines that learn from the same answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.catalogue import _arith
from telos.catalogue._arith import MOST_TOKENS, START, training_problems
from telos.catalogue.lab import Lab, commons, named
from telos.core.run import Run
from telos.core.seeds import numpy_generator

# Every arm takes as many optimiser steps of as many answers (pairs: half as many, of two answers), at a rate that has served DPO and GRPO on these testbeds.
LEARNER: dict[str, Any] = {
    "batch_size": 32,
    "learning_rate": 1e-4,
    "max_completion_length": MOST_TOKENS,
    "checkpoint_every": 0,
    "eval_prompts": 0,
}
DPO: dict[str, Any] = {**LEARNER, "batch_size": 16, "learning_rate": 3e-5, "beta": 0.1}
SFT: dict[str, Any] = {name: value for name, value in LEARNER.items() if name != "eval_prompts"}
SMOKE: Mapping[str, Any] = {"problems": 16, "answers": 8, "steps": 2, "held_out": 4, "samples": 2}
FULL: Mapping[str, Any] = {"problems": 480, "answers": 8, "steps": 120, "held_out": 128, "samples": 8}


def judged_answers(lab: Lab, settings: Mapping[str, Any]) -> Path:
    """Unpaired rows: the starting policy's answers to the training problems with the judge's score, 1 or 0. Those that were cut off are left out."""
    file = training_problems(lab, settings)

    def rows() -> list[dict[str, Any]]:
        found = _arith.answers(commons(lab), START, file, settings["answers"])
        prompts = [item.prompt for item in _arith.items_of(file)]
        return [
            {"prompt": prompt, "completion": text, "score": score, "label": score > 0.5}
            for prompt, texts, scores, ended in zip(prompts, found.texts, found.scores.tolist(), found.ended.tolist(), strict=True)
            for text, score, whole in zip(texts, scores, ended, strict=True)
            if whole and text.strip()
        ]

    return commons(lab).file(f"{named('judged', file=file, answers=settings['answers'])}.jsonl", rows)


def right_answers(lab: Lab, judged: Path) -> Path:
    """What rejection sampling keeps: every answer that is right, as a demonstration."""
    return commons(lab).file(
        f"{named('right', judged=judged)}.jsonl",
        lambda: [{"prompt": row["prompt"], "completion": row["completion"]} for row in _read(judged) if row["label"]],
    )


def pairs(lab: Lab, judged: Path) -> Path:
    """Preferences: every right answer beside one wrong answer to the same problem, drawn at random; problems without both kinds give none."""

    def rows() -> list[dict[str, Any]]:
        kinds: dict[str, tuple[list[str], list[str]]] = {}
        for row in _read(judged):
            kinds.setdefault(row["prompt"], ([], []))[row["label"]].append(row["completion"])
        generator = numpy_generator(lab.seed, "pairs")
        return [
            {"prompt": prompt, "chosen": good, "rejected": wrong[int(generator.integers(len(wrong)))]}
            for prompt, (wrong, right) in kinds.items()
            if wrong
            for good in right
        ]

    return commons(lab).file(f"{named('pairs', judged=judged)}.jsonl", rows)


def dpo_baseline(lab: Lab, settings: Mapping[str, Any]) -> Run:
    """DPO on pairs of the judged answers; made once for all recipes of a seed."""
    return _baseline(lab, "dpo", pairs(lab, judged_answers(lab, settings)), settings["steps"], DPO)


def rejection_baseline(lab: Lab, settings: Mapping[str, Any]) -> Run:
    """Fine-tuning on the right answers; made once for all recipes of a seed."""
    return _baseline(lab, "sft", right_answers(lab, judged_answers(lab, settings)), settings["steps"], SFT)


def _baseline(lab: Lab, method: str, data: Path, steps: int, options: Mapping[str, Any]) -> Run:
    few = len(_read(data)) < options["batch_size"]  # only a smoke run has so few
    given = {**options, "model": START, "data": str(data), "steps": steps, **({"batch_size": 1} if few else {})}
    return commons(lab).train(named(method, **given), method, **given)


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def accuracy_of_search(run: Run, file: Path) -> float:
    """The share of a file's problems that the answers which a search has chosen solve."""
    chosen = {row["prompt"]: row["completion"] for row in _read(run.path / "samples.jsonl")}
    return float(np.mean([_arith.TESTBED.gold(item, chosen[item.prompt]) for item in _arith.items_of(file)]))


def accuracy_of_greedy(lab: Lab, name: str, run: Run, file: Path) -> float:
    """The share of a file's problems that a policy's likeliest answers solve."""
    return float(np.mean(lab.assess(f"greedy {name}", run, _arith.items_of(file), temperature=0.0).gold))


def late_mean(run: Run, key: str, count: int = 5) -> float:
    """The mean of a logged number over the last steps that have it."""
    return float(np.mean([row[key] for row in run.metrics() if key in row][-count:]))
