"""MDPO (S42): on par with PPO and TRPO on-policy, and with SAC off-policy, on MuJoCo's tasks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Stages
from telos.evaluation.normalised import normalised

TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
ON_POLICY: dict[str, Any] = {"num_envs": 8, "rollout_steps": 256, "normalize_observations": True, "normalize_rewards": True}
# PPO's minibatches are its own matter; MDPO and TRPO look at all steps of an iteration.
OF: dict[str, dict[str, Any]] = {
    "ppo": {"minibatch_size": 64, "epochs": 10},
    "trpo": {"minibatch_size": 64, "epochs": 10, "gae_lambda": 0.97},
    "mdpo": {"minibatch_size": 64, "epochs": 10},
}
PAR = 5.0  # points of the normalised score that count as the same


def scores(stages: Stages, method: str, tasks: int, **options: Any) -> dict[str, float]:
    """The normalised score (0: random, 100: D4RL's expert) of a method's last policy on each task, over its evaluation's episodes."""
    runs = {env: stages.train(f"{method}-{env}", method, env=env, checkpoint_every=0, eval_episodes=20, **options) for env in TASKS[:tasks]}
    return {env: float(normalised(env, run.facts["evaluation"]["evaluation/return"])) for env, run in runs.items()}


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    stages = Stages(root, seed, watch)
    found = {key: scores(stages, key, settings["tasks"], total_steps=settings["steps"], **ON_POLICY, **own) for key, own in OF.items()}
    early = {"total_steps": settings["off_policy_steps"], "start_steps": settings["start"], "random_steps": settings["start"]}
    found |= {key: scores(stages, key, settings["tasks"], **early) for key in ("sac", "soft-mdpo")}
    mean = {key: float(np.mean(list(of.values()))) for key, of in found.items()}
    return {
        "score over PPO": mean["mdpo"] - mean["ppo"],
        "score over TRPO": mean["mdpo"] - mean["trpo"],
        "score over SAC, off-policy": mean["soft-mdpo"] - mean["sac"],
        **{f"score, {key}": value for key, value in mean.items()},
        **{f"{env}, {key}": value for key, of in found.items() for env, value in of.items()},
    }


CLAIM = Claim(
    key="mdpo",
    statement="MDPO is on par with PPO and TRPO, and its off-policy form with SAC, or above, on MuJoCo's tasks",
    baselines=("ppo", "trpo", "sac"),
    facts=(
        Fact("normalised score at most 5 points below PPO's", "score over PPO", ">", -PAR),
        Fact("normalised score at most 5 points below TRPO's", "score over TRPO", ">", -PAR),
        Fact("off-policy: normalised score at most 5 points below SAC's", "score over SAC, off-policy", ">", -PAR),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {"tasks": 1, "steps": 2048, "off_policy_steps": 1000, "start": 900}),
        "full": Budget(3, {"tasks": 3, "steps": 200_000, "off_policy_steps": 20_000, "start": 2000}),
    },
    notes="Runs of 200,000 and 20,000 steps where the paper has a million: what is compared is how fast they learn. Scores are D4RL's, 0 for random play and "
    "100 for its experts. On-policy methods share observations' and rewards' normalisation; settings are PPO's usual ones, not tuned for any of them.",
)
