"""Effective RL reward at training time (S37): success and a learned process reward, as it is and refined by Clip and Delta, on `arith`.

The system is a setting of the on-policy loop: `--process_reward FOLDER --process_clip η --process_delta true` beside `--reward`. Three runs of one method
differ in nothing else: the success reward alone, with the process reward's probabilities, and with these after Clip and Delta
(Gao et al. 2024, section 4). The judge of steps learns hard Math-Shepherd labels of the starting policy's own answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telos.catalogue._arith import FULL, SMOKE, START, accuracy, answers, described, held_out_problems, learn, training_problems
from telos.catalogue._arith_process import judge_of_steps, labelled_steps, last_mean, steps_described
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab, commons

LEARNER: dict[str, Any] = {"group_baseline": True}  # returns of tokens with the mean of the prompt's answers taken off
THRESHOLD = 0.5  # η of Clip: a step is not paid for a probability above it
ARMS: Mapping[str, dict[str, Any]] = {
    "success": {},
    "process": {"process_coef": 1.0},
    "clip and delta": {"process_coef": 1.0, "process_clip": THRESHOLD, "process_delta": True},
}


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "arith", seed, watch)
    data, held_out, samples = training_problems(lab, settings), held_out_problems(lab, settings), settings["samples"]
    rows = labelled_steps(lab, "math-shepherd", data, settings["label_batches"], batch_size=settings["label_prompts"], completions=4)
    judge = judge_of_steps(lab, rows, settings["judge_steps"])
    found, figures = {"start": answers(commons(lab), START, held_out, samples)}, {}
    for name, options in ARMS.items():
        scored = {"process_reward": judge, **options} if options else {}
        run = learn(lab, name.replace(" ", "-"), "reinforce-plus-plus", data, settings["iterations"], **LEARNER, **scored)
        found[name] = answers(lab, run, held_out, samples)
        if scored:
            log = run.metrics()
            figures[f"reward of steps, last iterations, {name}"] = last_mean(log, "reward/steps")
            figures[f"gain of the reward of steps, {name}"] = last_mean(log, "reward/steps") - last_mean(log[:5], "reward/steps")
    for name, sampled in found.items():
        figures |= described(name, sampled, held_out) | steps_described(name, sampled)
    for name in ("process", "clip and delta"):
        figures[f"steps of {name} over success"] = figures[f"steps, {name}"] / figures["steps, success"]
        figures[f"accuracy of {name} over success"] = accuracy(found[name]) - accuracy(found["success"])
    figures["accuracy of clip and delta over process"] = accuracy(found["clip and delta"]) - accuracy(found["process"])
    return figures


CLAIM = Claim(
    key="reward-clip-delta",
    statement="a learned process reward beside the success reward is hacked by needless steps; with Clip and Delta it is not, and accuracy is kept",
    baselines=("reinforce-plus-plus on the success reward", "the same with the process reward as it is"),
    facts=(
        Fact("with the process reward answers have at least half as many steps again", "steps of process over success", ">", 1.5),
        Fact("while their steps earn more", "gain of the reward of steps, process", ">", 0.0),
        Fact("and fewer are right, by more than 0.05", "accuracy of process over success", "<", -0.05),
        Fact("with Clip and Delta there is not a tenth more", "steps of clip and delta over success", "<", 1.1),
        Fact("and not fewer are right by 0.02", "accuracy of clip and delta over success", ">", -0.02),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "iterations": 2, "label_batches": 1, "label_prompts": 10, "judge_steps": 2}),
        "full": Budget(3, {**FULL, "iterations": 40, "label_batches": 4, "label_prompts": 32, "judge_steps": 50}),
    },
    notes="The paper trains with PPO; here returns have no critic, whose few iterations would say little. The paper's finding is that rewards of steps are "
    "hacked, not that they never help, so the claim asks of Clip and Delta that accuracy is kept; the figures say whether it is above.",
)
