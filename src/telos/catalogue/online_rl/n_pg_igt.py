"""N-PG-IGT and N-HARPG (S127): how many episodes a suboptimality costs, as exponents measured on processes whose returns are known exactly.

The theorems bound the suboptimality J* − E J after n episodes by n^−1/p up to logarithms: p = 3 for the plain policy gradient, 2.5 for N-PG-IGT, 2 for N-HARPG.
p is read off as minus one over the slope of log suboptimality, the mean over 64 random processes, in the logarithm of n, over the last two decades. All
methods have one episode an estimate, no baseline, and the schedules of their theorems.

The facts are on Gaussian policies (`_tabular_gradients`), which meet the theorems' assumption. Softmax policies do not: their Fisher matrices and the variance
of their estimates vanish together as they become deterministic, and rates may be faster than the theorems'. Their exponents are reported beside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.run import prepare_threads
from telos.catalogue._tabular_gradients import PolicyClass, Processes, course, exponent, with_gaps
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Stages
from telos.core.seeds import numpy_generator

METHODS = {"policy-gradient": "plain", "n-pg-igt": "N-PG-IGT", "harpg": "N-HARPG"}
STEP_SIZE = 1.0  # of every method: of 1/2 and 1 the one with the lower suboptimality after 100,000 episodes, for each of them
STATES, HORIZON, POINTS = 2, 2, 17


def measured(stages: Stages, policy_class: PolicyClass, method: str, episodes: int, processes: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers of episodes [17], over the last two decades; mean suboptimality [17])."""
    looked_at = np.unique(np.geomspace(max(1, episodes // 100), episodes, POINTS).astype(int))
    actions = 2 if policy_class == "gaussian" else 3

    def play() -> list[dict[str, Any]]:
        prepare_threads(1)
        each = with_gaps(processes, STATES, actions, HORIZON, numpy_generator(stages.seed, "processes", policy_class))
        draws = numpy_generator(stages.seed, "draws", policy_class, method)
        found = course(Processes(each, policy_class), method, {"step_size": STEP_SIZE}, episodes, looked_at.tolist(), draws)
        return [{"episodes": int(n), "suboptimality": float(row.mean())} for n, row in zip(looked_at, found, strict=True)]

    path = stages.file(f"{policy_class}-{method}.jsonl", play)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return np.array([row["episodes"] for row in rows]), np.array([row["suboptimality"] for row in rows])


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    stages = Stages(root, seed, watch)
    curves = {name: measured(stages, "gaussian", key, settings["episodes"], settings["processes"]) for key, name in METHODS.items()}
    p = {name: exponent(*curve) for name, curve in curves.items()}
    last = {name: float(curve[1][-1]) for name, curve in curves.items()}
    softmax = {name: measured(stages, "softmax", key, settings["softmax_episodes"], settings["processes"]) for key, name in METHODS.items()}
    return {
        "distance of N-PG-IGT's exponent from 2.5": abs(p["N-PG-IGT"] - 2.5),
        "distance of N-HARPG's exponent from 2": abs(p["N-HARPG"] - 2.0),
        "plain exponent less N-PG-IGT's": p["plain"] - p["N-PG-IGT"],
        "N-PG-IGT's exponent less N-HARPG's": p["N-PG-IGT"] - p["N-HARPG"],
        **{f"exponent, {name}": value for name, value in p.items()},
        **{f"suboptimality at the end, {name}": value for name, value in last.items()},
        **{f"exponent on softmax policies, {name}": exponent(*curve) for name, curve in softmax.items()},
        **{f"suboptimality at the end on softmax policies, {name}": float(curve[1][-1]) for name, curve in softmax.items()},
    }


CLAIM = Claim(
    key="n-pg-igt",
    statement="Measured sample-complexity exponents are near 2.5 for N-PG-IGT and near 2 for N-HARPG, and below the plain policy gradient's",
    baselines=("policy-gradient",),
    facts=(
        Fact("N-PG-IGT's exponent within 1/2 of 2.5", "distance of N-PG-IGT's exponent from 2.5", "<", 0.5),
        Fact("N-HARPG's exponent within 1/2 of 2", "distance of N-HARPG's exponent from 2", "<", 0.5),
        Fact("the plain policy gradient's exponent is above N-PG-IGT's", "plain exponent less N-PG-IGT's", ">", 0.0),
        Fact("N-PG-IGT's exponent is above N-HARPG's", "N-PG-IGT's exponent less N-HARPG's", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {"episodes": 600, "softmax_episodes": 200, "processes": 8}),
        "full": Budget(5, {"episodes": 400_000, "softmax_episodes": 100_000, "processes": 64}),
    },
    notes="The theorems are upper bounds up to logarithms, and exponents over two decades still hold some of what precedes the asymptote. Processes have "
    "2 states, 2 steps and gaps of at least 1 between actions' rewards, so that two decades show a rate at all. Schedules are the theorems' (steps ∝ t^-2/3, "
    "t^-1, t^-1); the constant is one for all, the better of two on a tuning seed for each of them. N-HARPG plays two episodes an iteration; both are counted. "
    "Softmax policies, whose figures stand beside, are outside the theorems' assumption.",
)
