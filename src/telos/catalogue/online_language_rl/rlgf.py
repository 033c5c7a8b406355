"""RLGF (S13): PPO with an imperfect guide that begins or ends some of the answers, beside plain PPO and the guide itself, on `grue-concepts`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.catalogue._review import mean_gold
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.catalogue.online_language_rl._grue import PPO, fine_tuned

TASK = "grue-concepts"
ROLL_IN = (
    0.4  # share of the prompts whose answers the guide begins (paper: 0.2); more, because the start is far from the guide and the run short
)
LONGEST = 18  # tokens of an answer; references take 16 at most. The guide's place is drawn among so many


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, TASK, seed, watch)
    start, guide = fine_tuned(lab, settings["sft_steps"]), fine_tuned(lab, settings["guide_steps"], "guide")
    common = {"model": start, "data": TASK, "reward": [f"gold:{TASK}"], "steps": settings["iterations"], **PPO}
    common |= {"max_completion_length": LONGEST, **settings.get("small", {})}
    schemes: Mapping[str, dict[str, Any]] = {
        "PPO++": {"scheme": "ppo++", "guide_share": ROLL_IN},
        "D²LOLS": {"scheme": "d2lols", "guide_share": ROLL_IN, "switch_step": settings["iterations"] // 3},
    }
    policies: dict[str, Any] = {"SFT": start, "guide": guide, "PPO": lab.train("ppo", "ppo-max", **common)}
    for name, options in schemes.items():
        policies[name] = lab.train(options["scheme"], "rlgf", guide=guide, **common, **options)
    items = lab.items(settings["held_out"])
    found = {name: lab.assess(name, policy, items, reference=start) for name, policy in policies.items()}
    gold = {name: mean_gold(each) for name, each in found.items()}
    figures = {f"gold of {ours} over {theirs}": gold[ours] - gold[theirs] for ours in schemes for theirs in ("PPO", "guide")}
    figures["gold of the guide over SFT"] = gold["guide"] - gold["SFT"]
    for name, each in found.items():
        figures |= {f"gold, {name}": gold[name], f"KL, {name}": float(np.mean(each.kl)), f"tokens, {name}": float(np.mean(each.length))}
    return figures


CLAIM = Claim(
    key="rlgf",
    statement="With an imperfect guide that begins some of its answers a policy ends above both plain PPO and the guide",
    baselines=("ppo-max", "the guide"),
    facts=(
        Fact("the guide writes better than the start on `grue-concepts`", "gold of the guide over SFT", ">", 0.0),
        Fact("the guide is imperfect: gold below 0.7, of 1", "gold, guide", "<", 0.7),
        Fact("gold of PPO++ above PPO's after as many answers", "gold of PPO++ over PPO", ">", 0.0),
        Fact("gold of PPO++ above the guide's", "gold of PPO++ over guide", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(
            1,
            {
                "sft_steps": 3,
                "guide_steps": 4,
                "iterations": 4,
                "held_out": 8,
                "small": {"batch_size": 4, "minibatch_size": 4, "epochs": 1, "max_completion_length": 12},
            },
        ),
        "full": Budget(3, {"sft_steps": 30, "guide_steps": 60, "iterations": 40, "held_out": 512}),
    },
    notes="The guide is the same model, fine-tuned twice as long on the same demonstrations, two in five of them flawed. D²LOLS lets the guide end all "
    "answers for the first third of the iterations and begin two in five of them afterwards; it is reported beside.",
)
