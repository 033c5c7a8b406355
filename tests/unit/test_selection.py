"""Prompts are chosen by the variance of their rewards over visits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support import World
from telos.algorithms.language import grpo
from telos.algorithms.run import train
from telos.core.errors import DataError, UsageError
from telos.data.selection import historical_variance, select_by_variance


def written(folder: Path, *visits: tuple[int, Sequence[float | None]]) -> Path:
    rows: list[dict[str, Any]] = [{"step": step, "row": row, "rewards": rewards} for step, (row, rewards) in enumerate(visits, 1)]
    (folder / "rewards.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_the_variance_is_that_of_the_means_over_visits_and_not_of_single_rewards(tmp_path: Path) -> None:
    # Row 4: means 0.5 and 0.5, though single rewards differ. Row 1: means 0, 1 and 0.5, by hand (0.25 + 0.25 + 0) / 3.
    folder = written(tmp_path, (4, [0, 1]), (1, [0, 0]), (4, [1, 0]), (1, [1, 1]), (1, [0, 1]))
    assert historical_variance(folder) == pytest.approx({1: 0.5 / 3, 4: 0.0})
    assert select_by_variance(folder, 2) == [1, 4]


def test_rows_seen_once_have_no_variance_and_answers_without_reward_do_not_count(tmp_path: Path) -> None:
    folder = written(tmp_path, (0, [1.0, None]), (0, [0.0, None]), (2, [1.0]), (3, [None]), (3, [0.5]), (5, [None, 0.2]), (5, [0.2]))
    assert historical_variance(folder) == pytest.approx({0: 0.25, 5: 0.0})
    with pytest.raises(UsageError, match="3 rows were asked for and 2 were visited at least twice"):
        select_by_variance(folder, 3)


def test_of_equal_variances_the_earlier_row_comes_first(tmp_path: Path) -> None:
    folder = written(tmp_path, *((row, [float(visit)]) for visit in (0, 1) for row in (7, 2, 5)))
    assert select_by_variance(folder, 3) == [2, 5, 7]


def test_a_run_without_rewards_and_a_broken_line_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--log_rewards true"):
        select_by_variance(tmp_path, 1)
    written(tmp_path, (0, [1.0]))
    with (tmp_path / "rewards.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "rewards": [1]}\n')
    with pytest.raises(DataError, match=r"rewards\.jsonl:2"):
        select_by_variance(tmp_path, 1)


def test_a_training_run_writes_what_selection_reads(world: World, tmp_path: Path) -> None:
    options = world.options(grpo.METHOD, steps=6, kl_coef=0.0)
    run = train("grpo", {**options, "log_rewards": True, "out": str(tmp_path / "run")})
    visits: dict[int, list[float]] = {}
    for line in (run.path / "rewards.jsonl").read_text().splitlines():
        row = json.loads(line)
        visits.setdefault(row["row"], []).append(sum(row["rewards"]) / len(row["rewards"]))
    again = {row: means for row, means in visits.items() if len(means) > 1}
    assert set(historical_variance(run.path)) == set(again) != set()
    first = max(again, key=lambda row: sum(m * m for m in again[row]) / len(again[row]) - (sum(again[row]) / len(again[row])) ** 2)
    assert select_by_variance(run.path, 1) == [first]
