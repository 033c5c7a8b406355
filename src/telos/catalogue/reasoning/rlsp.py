"""RL via Self-Play (S38): a start that has seen searches, and reinforcement by correctness, by exploration, and by both, on countdown problems.

The system is a setting of existing options: `sft` on worked searches, then a policy gradient with two rewards kept apart, `--reward
telos.objectives.search_behaviour:solved telos.objectives.search_behaviour:exploration --reward_weights 1 W` with a small W, so that a right answer always earns
more than any search that ends wrong (Ye et al. 2025, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telos.catalogue._search_traces import (
    EXPLORATION,
    FULL,
    GRPO,
    SMOKE,
    SOLVED,
    learn,
    outcome_baseline,
    searches,
    searching,
    searching_start,
)
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab

WEIGHT = 0.2  # of exploration beside correctness
ARMS: Mapping[str, dict[str, Any]] = {
    "exploration": {"reward": [EXPLORATION]},
    "RLSP": {"reward": [SOLVED, EXPLORATION], "reward_weights": [1.0, WEIGHT]},
}


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "arith", seed, watch)
    policies = {"start": searching_start(lab, settings), "outcome": outcome_baseline(lab, settings)}
    policies |= {name: learn(lab, name.lower(), "grpo", settings, **GRPO, **options) for name, options in ARMS.items()}
    figures: dict[str, float] = {}
    for name, policy in policies.items():
        figures |= searching(name, searches(lab, name, policy, settings), lab, settings)
    return figures | {
        "backtrackings of exploration over start": figures["backtrackings, exploration"] - figures["backtrackings, start"],
        "verifications of exploration over start": figures["verifications, exploration"] - figures["verifications, start"],
        "accuracy of RLSP over outcome": figures["accuracy, RLSP"] - figures["accuracy, outcome"],
        "different tries of RLSP over outcome": figures["different tries, RLSP"] - figures["different tries, outcome"],
    }


CLAIM = Claim(
    key="rlsp",
    statement="a reward of exploration alone raises backtracking and verification, and beside the outcome it gives more right answers than the outcome alone",
    baselines=("the start, fine-tuned on searches", "grpo on the outcome reward"),
    facts=(
        Fact(
            "exploration alone: the search goes back more often, by a quarter of a time",
            "backtrackings of exploration over start",
            ">",
            0.25,
        ),
        Fact(
            "exploration alone: results are verified more often, by a quarter of a time",
            "verifications of exploration over start",
            ">",
            0.25,
        ),
        Fact("with both rewards accuracy is above that of the outcome alone", "accuracy of RLSP over outcome", ">", 0.0),
    ),
    experiment=experiment,
    budgets={"smoke": Budget(1, SMOKE), "full": Budget(3, FULL)},
    notes="Exploration is the share of four different tries. The paper trains with PPO and judges searches by a language model or by their length; GRPO "
    "without division by the deviation keeps the weights of both rewards as they are. Verification and backtracking are counted from the form's marks.",
)
