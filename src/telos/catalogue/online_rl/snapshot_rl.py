"""SnapshotRL (S32): PPO, SAC and TD3, unchanged, learn faster when some of their early episodes begin where an earlier policy has been."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Stages
from telos.core.run import Run
from telos.evaluation.normalised import normalised

ENV = "Hopper-v5"
S3RL: dict[str, Any] = {
    "snapshot_episodes": 20,
    "snapshot_groups": 20,
    "snapshot_share": 0.8,
    "snapshot_until": 0.4,
    "snapshot_length": 100,
}
COMMON: dict[str, Any] = {"env": ENV, "checkpoint_every": 0, "eval_episodes": 8, "hidden": [64, 64]}
ON_POLICY: dict[str, Any] = {"num_envs": 8, "rollout_steps": 128, "normalize_observations": True, "normalize_rewards": True}
OFF_POLICY: dict[str, Any] = {"learning_rate": 1e-3, "actor_learning_rate": 1e-3, "batch_size": 128, "replay_on_disk": False}


def options(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a student: the same with and without snapshots, with ten evaluations."""
    if method == "ppo":
        steps = settings["on_policy_steps"]
        return {**COMMON, **ON_POLICY, "total_steps": steps, "eval_every": max(1, steps // 1024 // 10)}
    steps = settings["off_policy_steps"]
    every = max(1, steps // 10)
    return {
        **COMMON,
        **OFF_POLICY,
        "total_steps": steps,
        "iteration_steps": every,
        "eval_every": 1,
        **dict.fromkeys(("start_steps", "random_steps"), every),
    }


def area(run: Run) -> float:
    """The mean normalised score (0: random, 100: D4RL's expert) of the evaluations, which lie at equal distances."""
    returns = [row["evaluation/return"] for row in run.metrics() if "evaluation/return" in row] + [
        run.facts["evaluation"]["evaluation/return"]
    ]
    return float(np.mean([normalised(ENV, value) for value in returns]))


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    stages = Stages(root, seed, watch)
    taught = {**options("sac", settings), "total_steps": settings["teacher_steps"], "seed": seed + 1}
    teacher = stages.train("teacher", "sac", **taught)
    score = float(normalised(ENV, teacher.facts["evaluation"]["evaluation/return"]))
    figures = {"score, teacher": score}
    for key in ("ppo", "sac", "td3"):
        alone = stages.train(key, key, **options(key, settings))
        helped = stages.train(f"{key}-s3rl", key, **options(key, settings), snapshots=str(teacher.path), **S3RL)
        figures |= {
            f"area with snapshots over without, {key}": area(helped) - area(alone),
            f"area with snapshots, {key}": area(helped),
            f"area without, {key}": area(alone),
        }
    return figures


CLAIM = Claim(
    key="snapshot-rl",
    statement="Beginning early episodes in grouped states of an earlier policy, and cutting them, raises the learning curves of PPO, SAC and TD3",
    baselines=("ppo", "sac", "td3"),
    facts=tuple(
        Fact(f"{key.upper()}: mean normalised score over learning above that without", f"area with snapshots over without, {key}", ">", 0.0)
        for key in ("ppo", "sac", "td3")
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {"teacher_steps": 300, "off_policy_steps": 300, "on_policy_steps": 1024}),
        "full": Budget(5, {"teacher_steps": 15_000, "off_policy_steps": 10_000, "on_policy_steps": 60_000}),
    },
    notes="One task (Hopper) and runs of 10,000 (PPO: 60,000) steps with layers of 64 where the paper has six tasks and a million: what is compared is how "
    "fast they begin to learn. The teacher is a SAC of 15,000 steps; its steps are not counted, as in the paper. Snapshots serve the first 40 % of the steps.",
)
