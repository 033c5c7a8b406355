"""Dr. PO (S20): answers that the start hardly ever writes from the prompt, beside PPO from the prompt alone and DPO on the same pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from telos.algorithms.language.assess import Assessment
from telos.catalogue._review import DPO
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.catalogue.online_language_rl._grue import ENOUGH, PPO, SOLVED, fine_tuned
from telos.core.run import Run
from telos.core.seeds import derive
from telos.environments.text.grue._task import DrawnTask

TASK = "grue-concepts"
RESETS = 0.75  # share of the prompts whose answers go on from the data
# Right answers are rare, so fresh ones count for more than second passes over the same.
RL: dict[str, Any] = {**PPO, "epochs": 1, "learning_rate": 3e-4}


def good_and_flawed(lab: Lab, count: int) -> Path:
    """Preferences between a good and a flawed demonstration for the same words, with what the judge needs."""
    task, generator = cast(DrawnTask, lab.testbed), random.Random(derive(lab.seed, "flaws"))

    def rows() -> list[dict[str, Any]]:
        items = task.items("train", count, derive(lab.seed, "pairs") % 2**31)
        return [
            {"prompt": item.prompt, "chosen": item.reference, "rejected": task._flawed(generator, item)}
            | {"facts": json.dumps(item.facts), "testbed": task.name}
            for item in items
        ]

    return lab.file("pairs.jsonl", rows)


def success(found: Assessment) -> float:
    """The share of answers that count as right."""
    return float(np.mean(np.asarray(found.gold) >= ENOUGH))


def first_rewards(run: Run) -> float:
    """The mean reward of the answers that were drawn before the policy changed."""
    return float(np.mean([row["reward"] for row in run.metrics()[: RL["critic_warmup"] + 1]]))


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, TASK, seed, watch)
    start, pairs = fine_tuned(lab, settings["sft_steps"]), good_and_flawed(lab, settings["pairs"])
    common = {"model": start, "data": str(pairs), "reward": [SOLVED], "steps": settings["iterations"], **RL, **settings.get("small", {})}
    ours = lab.train("dr-po", "dr-po", reset_share=RESETS, **common)
    plain = lab.train("ppo", "ppo-max", **common)
    offline = lab.train("dpo", "dpo", model=start, data=str(pairs), steps=settings["steps"], checkpoint_every=0, **DPO)
    items = lab.items(settings["held_out"])
    policies = {"SFT": start, "Dr. PO": ours, "PPO": plain, "DPO": offline}
    found = {name: lab.assess(name, policy, items, reference=start) for name, policy in policies.items()}
    figures = {
        "success over PPO": success(found["Dr. PO"]) - success(found["PPO"]),
        "success over DPO": success(found["Dr. PO"]) - success(found["DPO"]),
        "success of the start in training, from the prompt": first_rewards(plain),
        "success of the start in training, with resets": first_rewards(ours),
    }
    for name, each in found.items():
        figures |= {
            f"success, {name}": success(each),
            f"gold, {name}": float(np.mean(each.gold)),
            f"KL, {name}": float(np.mean(each.kl)),
            f"tokens, {name}": float(np.mean(each.length)),
        }
    return figures


CLAIM = Claim(
    key="dr-po",
    statement="Where the start hardly ever reaches a right answer from the prompt, Dr. PO beats PPO and DPO",
    baselines=("ppo-max", "dpo"),
    facts=(
        Fact("the start succeeds from the prompt in less than one answer in twenty", "success, SFT", "<", 0.05),
        Fact(
            "right answers to held-out problems of `grue-concepts`: a larger share than PPO's after as many answers",
            "success over PPO",
            ">",
            0.0,
        ),
        Fact("a larger share than that of DPO on the same pairs", "success over DPO", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(
            1,
            {
                "sft_steps": 3,
                "pairs": 16,
                "iterations": 4,
                "steps": 3,
                "held_out": 8,
                "small": {"batch_size": 4, "minibatch_size": 4, "max_completion_length": 16},
            },
        ),
        "full": Budget(3, {"sft_steps": 90, "pairs": 2000, "iterations": 100, "steps": 80, "held_out": 1000}),
    },
    notes="Pairs are good and flawed demonstrations for the same words. Dr. PO resets into the good ones; PPO has their prompts alone. Both are paid 1 for a "
    "right answer as a whole and 0 otherwise; DPO learns from the pairs and sees no new answers.",
)
