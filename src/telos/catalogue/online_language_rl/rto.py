"""RTO (S122): fewer answers than PPO with a reward for the whole answer, when DPO's policy says which tokens earned it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.catalogue._review import DPO, dpo_baseline, mean_gold, measure_common
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.direct_alignment.dpo import PPO
from telos.catalogue.online_language_rl._online import (
    SMALL,
    SPREAD,
    first_step_at,
    gap_at_equal_kl,
    learn,
    mean_kl,
    mean_over_run,
    mean_proxy,
    ppo_baseline,
    prepare,
    trajectory,
)

# β of DPO, in the deviations of the score in which PPO's normalised rewards count: the tokens of an answer get what DPO's policy takes it to be worth.
RTO: dict[str, Any] = {**PPO, "token_coef": round(DPO["beta"] / SPREAD, 2)}


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    scene = prepare(root, seed, settings, watch)
    teacher = dpo_baseline(scene.lab, scene.start, scene.pairs, settings)
    taught = measure_common(scene.lab, teacher, scene.start, scene.items)
    ours = trajectory(scene, learn(scene, "rto", "rto", settings, teacher=str(teacher.path / "model"), **RTO))
    theirs = ppo_baseline(scene, settings)
    level = mean_proxy(theirs[-1][1])
    return {
        "gold over PPO, mean over the run": mean_over_run(ours, mean_gold) - mean_over_run(theirs, mean_gold),
        "learned reward over PPO, mean over the run": mean_over_run(ours, mean_proxy) - mean_over_run(theirs, mean_proxy),
        "share of PPO's answers to its last learned reward": first_step_at(ours, level, mean_proxy) / theirs[-1][0],
        "gold over PPO at equal KL": gap_at_equal_kl(ours, theirs, mean_gold),
        "gold, SFT": mean_gold(scene.before),
        "gold, DPO": mean_gold(taught),
        "gold, RTO": mean_gold(ours[-1][1]),
        "gold, PPO": mean_gold(theirs[-1][1]),
        "learned reward, SFT": mean_proxy(scene.before),
        "learned reward, RTO": mean_proxy(ours[-1][1]),
        "learned reward, PPO": level,
        "KL, RTO": mean_kl(ours[-1][1]),
        "KL, PPO": mean_kl(theirs[-1][1]),
        "tokens, RTO": float(np.mean(ours[-1][1].length)),
        "tokens, PPO": float(np.mean(theirs[-1][1].length)),
    }


CLAIM = Claim(
    key="rto",
    statement="RTO learns from fewer answers than PPO with a reward for the whole answer",
    baselines=("ppo-max",),
    facts=(
        Fact("gold above PPO's after as many answers on `review`, mean over the run", "gold over PPO, mean over the run", ">", 0.0),
        Fact("learned reward above PPO's after as many answers, mean over the run", "learned reward over PPO, mean over the run", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, SMALL),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "reward_steps": 125, "steps": 120, "iterations": 30, "held_out": 256}),
    },
    notes="The areas are under seven points of a run of 960 answers. DPO's policy and the reward are learned from the same preferences, and DPO's "
    "own training, which sees no new answers, is not counted.",
)
