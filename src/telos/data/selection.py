"""Which prompts of a training set to learn from, by how their rewards moved in an earlier run.

Historical variance (Wang et al. 2025, "Reinforcement Learning for Reasoning in Large Language Models with One Training Example", section 2):
train on all prompts, write down each prompt's mean reward whenever it is visited, and rank prompts by the variance of that list. A prompt
that is always or never solved has none.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from telos.core.errors import DataError, UsageError

REWARDS = "rewards.jsonl"


def historical_variance(run_folder: str | Path) -> dict[int, float]:
    """For each row of the run's table that was visited at least twice, the variance (divisor: visits) of its mean rewards over visits, by row.

    Rows count from 0 in the order of the data, without the rows that were dropped. Answers without a reward do not count, nor visits in which no
    answer had one. The run must have been made with `--log_rewards true`.
    """
    path = Path(run_folder) / REWARDS
    if not path.is_file():
        raise UsageError(f"{path} is missing: train with --log_rewards true, which writes each prompt's rewards at each iteration")
    visits: dict[int, list[float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            row, rewards = int(found["row"]), [float(reward) for reward in found["rewards"] if reward is not None]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}", f"not a prompt's rewards ({error})", "Train again with --log_rewards true.") from None
        if rewards:
            visits.setdefault(row, []).append(float(np.mean(rewards)))
    return {row: float(np.var(means)) for row, means in sorted(visits.items()) if len(means) > 1}


def select_by_variance(run_folder: str | Path, k: int) -> list[int]:
    """The `k` rows of the highest historical variance, highest first; of equal ones the earlier row. Raises `UsageError` where fewer were visited twice."""
    variance = historical_variance(run_folder)
    if not 1 <= k <= len(variance):
        raise UsageError(
            f"{k} rows were asked for and {len(variance)} were visited at least twice in {run_folder}; train for more iterations, so that prompts come again"
        )
    return sorted(variance, key=lambda row: (-variance[row], row))[:k]
