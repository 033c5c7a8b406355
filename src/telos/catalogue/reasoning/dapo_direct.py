"""Direct Advantage Policy Optimization (S19): the step-level critic, trained apart, against outcomes alone and DPO from the same answers, on `arith`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telos.algorithms.language.assess import checkpoint_steps
from telos.catalogue._arith import START, accuracy, answers, described, held_out_problems, training_problems
from telos.catalogue._arith_process import judge_of_steps, labelled_steps
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab, commons
from telos.catalogue.reasoning._offline import FULL, LEARNER, SMOKE, dpo_baseline, judged_answers, late_mean

DAPO: dict[str, Any] = {**LEARNER, "beta": 0.2}
# One step, the whole answer, whose advantage is its outcome minus the value of the prompt: the same method without credit to steps.
WHOLE: dict[str, Any] = {"step_separators": ["<no such text>"], "answer_mark": ""}
CHECKPOINTS = 4


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "arith", seed, watch)
    held_out, samples, steps = held_out_problems(lab, settings), settings["samples"], settings["steps"]
    judged = judged_answers(lab, settings)
    rows = labelled_steps(lab, "math-shepherd", training_problems(lab, settings), settings["label_batches"], labels="soft", completions=8)
    critic = judge_of_steps(lab, rows, settings["critic_steps"])
    given = {**DAPO, "model": START, "data": str(judged), "steps": steps, "process_reward": f"value:{critic}"}
    ours = lab.train(
        "dapo-direct", "dapo-direct", **{**given, "checkpoint_every": max(1, steps // CHECKPOINTS), "keep_checkpoints": CHECKPOINTS + 1}
    )
    arms = {"dapo-direct": ours, "outcomes alone": lab.train("whole", "dapo-direct", **given, **WHOLE), "DPO": dpo_baseline(lab, settings)}
    found = {"start": answers(commons(lab), START, held_out, samples)}
    found |= {name: answers(lab, run, held_out, samples) for name, run in arms.items()}
    path = [accuracy(found["start"])]
    path += [accuracy(answers(lab, f"{ours.path}:{step}", held_out, samples)) for step in checkpoint_steps(ours) if step < steps]
    path.append(accuracy(found["dapo-direct"]))
    figures = {
        "accuracy over DPO": accuracy(found["dapo-direct"]) - accuracy(found["DPO"]),
        "accuracy over outcomes alone": accuracy(found["dapo-direct"]) - accuracy(found["outcomes alone"]),
        "accuracy gain": path[-1] - path[0],
        "largest fall of accuracy along the run": max(max(path[: i + 1]) - value for i, value in enumerate(path)),
        "share of steps moved as their advantage says": late_mean(ours, "rewards/accuracies"),
    }
    figures |= {f"accuracy at checkpoint {i} of {len(path) - 1}": value for i, value in enumerate(path)}
    for name, sampled in found.items():
        figures |= described(name, sampled, held_out)
    return figures


CLAIM = Claim(
    key="dapo-direct",
    statement="regression of steps' log-ratios on advantages of a critic that was trained apart gives a better policy than DPO and than outcomes alone, from "
    "the same answers, and improves without falling back",
    baselines=("dpo on pairs of the same answers", "the same regression with the whole answer as one step"),
    facts=(
        Fact("more answers are right than after DPO", "accuracy over DPO", ">", 0.0),
        Fact("and than after the regression on outcomes alone", "accuracy over outcomes alone", ">", 0.0),
        Fact(
            "accuracy never falls more than 0.03 below what an earlier checkpoint had", "largest fall of accuracy along the run", "<", 0.03
        ),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "label_batches": 1, "critic_steps": 2}),
        "full": Budget(3, {**FULL, "label_batches": 4, "critic_steps": 60}),
    },
    notes="All arms learn from the same answers of the starting policy with the same number of optimiser steps. The critic learns soft labels from 8 "
    "completions of each prefix of 512 other answers to 128 of the problems; its sampling is not counted against DPO, which does without. That the "
    "critic stays as it is holds by construction; what is measured of stability is that accuracy does not fall back along the run. An answer has two or "
    "three steps, the last of which states the result.",
)
