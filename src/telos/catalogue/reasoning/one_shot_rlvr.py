"""1-shot RLVR (S166): one problem of `arith`, chosen by the historical variance of its rewards, and what training on it does to all others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.language.assess import checkpoint_steps
from telos.catalogue._arith import (
    FULL,
    SMOKE,
    START,
    accuracy,
    answers,
    described,
    grpo_baseline,
    held_out_problems,
    items_of,
    learn,
    problems,
)
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab, commons
from telos.core.run import Run
from telos.data.selection import historical_variance, select_by_variance

# The paper's weights of divergence and entropy. One problem fills the batch: as many answers an iteration as GRPO's baseline has.
ONE_SHOT: dict[str, Any] = {"batch_size": 1, "samples_per_prompt": 128, "kl_coef": 0.001, "entropy_coef": 0.001}
CHECKPOINTS = 6
SATURATED = 0.9  # share of right answers to the problem, mean of three iterations, from which on it counts as learned
_WINDOW = 3


def choose(lab: Lab, settings: Mapping[str, Any]) -> tuple[Path, dict[str, float]]:
    """A file of the problem whose rewards varied most over the epochs of a short preliminary run, and figures of the choice."""
    candidates = problems(lab, "candidates", settings["candidates"])
    options = {"batch_size": len(items_of(candidates)), "log_rewards": True}
    run = learn(lab, "preliminary", "grpo", candidates, settings["epochs"], **options)
    (row,) = select_by_variance(run.path, 1)
    path = lab.folder("one.jsonl")
    path.write_text(candidates.read_text(encoding="utf-8").splitlines()[row] + "\n", encoding="utf-8")
    (item,) = items_of(path)
    return path, {"historical variance of the problem": historical_variance(run.path)[row], "level of the problem": item.facts["level"]}


def saturation(run: Run) -> int:
    """The iteration at which the problem is learned; the last where it never is."""
    rewards = [row["reward"] for row in run.metrics()]
    means = np.convolve(rewards, np.ones(_WINDOW) / _WINDOW, mode="valid")
    reached = np.flatnonzero(means >= SATURATED)
    return int(reached[0]) + _WINDOW if len(reached) else len(rewards)


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab, iterations, samples = Lab(root, "arith", seed, watch), settings["iterations"], settings["samples"]
    held_out = held_out_problems(lab, settings)
    one, figures = choose(lab, settings)
    options = {**ONE_SHOT, "checkpoint_every": max(1, iterations // CHECKPOINTS), "keep_checkpoints": CHECKPOINTS + 1}
    run = learn(lab, "one-shot", "grpo", one, iterations, **options)
    start = answers(commons(lab), START, held_out, samples)
    everything = answers(commons(lab), grpo_baseline(lab, settings), held_out, samples)
    last = answers(lab, run, held_out, samples)
    between = {step: accuracy(answers(lab, f"{run.path}:{step}", held_out, samples)) for step in checkpoint_steps(run)}
    path = {0: accuracy(start), **between, iterations: accuracy(last)}
    learned = saturation(run)
    at = min((step for step in path if step >= learned), default=max(path))
    gain = accuracy(last) - accuracy(start)
    figures |= {
        "accuracy gain": gain,
        "accuracy gain over GRPO's on all problems": gain - (accuracy(everything) - accuracy(start)),
        "training accuracy at the end": float(np.mean([row["reward"] for row in run.metrics()[-_WINDOW:]])),
        "iterations until the problem is learned": float(learned),
        "accuracy when the problem is learned": path[at],
        "accuracy gain after the problem is learned": accuracy(last) - path[at],
        "best accuracy after the problem is learned": max(value for step, value in path.items() if step >= at),
    }
    figures |= {f"accuracy after {step} iterations": value for step, value in path.items()}
    return figures | described("start", start, held_out) | described("1-shot", last, held_out) | described("GRPO", everything, held_out)


CLAIM = Claim(
    key="one-shot-rlvr",
    statement="reinforcement on one problem, chosen by the historical variance of its rewards, raises accuracy on held-out problems",
    baselines=("tinylm, the policy before training", "grpo on all problems"),
    facts=(Fact("accuracy on held-out problems rises by more than 0.02", "accuracy gain", ">", 0.02),),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "candidates": 4, "epochs": 2}),
        "full": Budget(3, {**FULL, "candidates": 32, "epochs": 8}),
    },
    notes="Accuracy along the run, and after the problem is learned (nine tenths of its answers right), is among the figures. The policy is judged at the end "
    "of the run, not at its best checkpoint. A problem is chosen among 32 in 8 epochs, where the paper ranks 1209 over hundreds of steps.",
)
