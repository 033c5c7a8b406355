"""Meta Reinforcement Fine-Tuning (S34): regret over the token budget and accuracy per token, beside GRPO's, on searches for countdown problems.

The start has seen trial and error: an answer is a series of tries, each with a verdict. To the outcome reward a search that succeeds at its third try is worth
one that succeeds at its first; progress pays the try that brings the answer within reach. Both learners have the same prompts, numbers of answers and
iterations; MRT adds the progress of blocks by forced answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telos.catalogue._search_traces import (
    FULL,
    GRPO,
    MOST_TOKENS,
    SMOKE,
    budgets_described,
    learn,
    outcome_baseline,
    searching_start,
    within_budgets,
)
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab

PROGRESS: Mapping[str, Any] = {"process_reward": "forced:2", "process_coef": 1.0}


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "arith", seed, watch)
    policies = {
        "start": searching_start(lab, settings),
        "GRPO": outcome_baseline(lab, settings),
        "MRT": learn(lab, "mrt", "mrt", settings, **GRPO, **PROGRESS),
    }
    figures: dict[str, float] = {}
    for name, policy in policies.items():
        figures |= budgets_described(name, within_budgets(lab, name, policy, settings))
    return figures | {
        "regret of MRT over GRPO": figures["regret, MRT"] / figures["regret, GRPO"],
        "accuracy of MRT over GRPO": figures["accuracy, MRT"] - figures["accuracy, GRPO"],
        "accuracy per token of MRT over GRPO": figures["accuracy per 100 tokens, MRT"]
        / max(figures["accuracy per 100 tokens, GRPO"], 1e-9),
    }


CLAIM = Claim(
    key="mrt",
    statement="rewarding the progress of blocks gives lower regret over the token budget and better accuracy per token than the outcome reward alone",
    baselines=("grpo on the outcome reward",),
    facts=(
        Fact(f"cumulative regret over {MOST_TOKENS} tokens is below GRPO's", "regret of MRT over GRPO", "<", 1.0),
        Fact("accuracy per token is above GRPO's", "accuracy per token of MRT over GRPO", ">", 1.0),
        Fact("accuracy is not more than 0.05 below GRPO's", "accuracy of MRT over GRPO", ">", -0.05),
    ),
    experiment=experiment,
    budgets={"smoke": Budget(1, SMOKE), "full": Budget(3, FULL)},
    notes="Regret is measured in tokens, against a policy that is always right at once. An answer is cut at the end of the last block that fits the budget. "
    "MRT's forced answers, some tokens for each block, are not held against it, as in the paper.",
)
