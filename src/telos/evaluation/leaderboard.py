"""A leaderboard: tasks × methods × seeds, with means, intervals, ranks and the spread over seeds.

A record is one JSON file for one trained model: `{"task": …, "method": …, "seed": …, "metrics": {name: number or null}, "facts": {…}}`;
`facts` (settings, versions, anything) is optional and not read. Files that are to be found in a folder end in `.score.json`.

The score of a method on a task is the mean over seeds with its bootstrap interval. Ranks are by these means, ties sharing the better rank
(1, 1, 3). Over all tasks a method has its mean rank, and its mean score with seeds resampled within each task (Agarwal et al. 2021); only
methods that were run on every task have them. The spread is the sample standard deviation over seeds: how steady a method is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from telos.core.errors import DataError, UsageError, did_you_mean
from telos.core.run import write_atomically
from telos.evaluation.report import Report
from telos.evaluation.statistics import Interval, bootstrap_interval, finite_or_none

SUFFIX = ".score.json"
MAIN = "gold"  # the metric that a leaderboard is about unless another is asked for
_ABSENT = "–"
_LOWER = ("perplexity", "ter")  # last parts of the names of metrics whose smaller values are better
_NEITHER = ("length",)


@dataclass(frozen=True)
class Score:
    """What one trained model reached: metrics by name; those that could not be measured are absent."""

    task: str
    method: str
    seed: int
    metrics: Mapping[str, float]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A method on a task: mean over seeds, standard deviation over seeds (NaN for one seed), rank (None for a metric without a direction)."""

    score: Interval
    spread: float
    rank: int | None


@dataclass(frozen=True)
class Standing:
    """A method over all tasks. Without a run on each of them there is no mean of anything."""

    method: str
    tasks: int
    score: Interval | None = None
    rank: float | None = None
    spread: float | None = None


def write_record(folder: Path, score: Score) -> Path:
    """Writes a record as FOLDER/TASK-METHOD-SEED.score.json; metrics that are not finite become null. Raises `UsageError` for names that
    cannot stand in a file's name."""
    for what in (score.task, score.method):
        if not re.fullmatch(r"[\w.+-]+", what):
            raise UsageError(f"{what!r} cannot name a task or method of a leaderboard: letters, digits and . _ + - only")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{score.task}-{score.method}-{score.seed}{SUFFIX}"
    metrics = {name: finite_or_none(value) for name, value in score.metrics.items()}
    record = {"task": score.task, "method": score.method, "seed": score.seed, "metrics": metrics, "facts": dict(score.facts)}
    write_atomically(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path


def read_record(path: Path) -> Score:
    """Reads a record. Raises `DataError` that names the file and what is wrong with it."""
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"cannot be read as JSON ({error})") from None
    wanted = {"task": str, "method": str, "seed": int, "metrics": dict}
    if not isinstance(row, dict) or not wanted.keys() <= row.keys() or not row.keys() <= {*wanted, "facts"}:
        raise DataError(str(path), "is no leaderboard record", f"It needs {', '.join(wanted)} and may have facts, and nothing else")
    for name, kind in wanted.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise DataError(str(path), f"{name!r} is {type(row[name]).__name__}, wanted {kind.__name__}")
    for name, value in row["metrics"].items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DataError(str(path), f"the metric {name!r} is {type(value).__name__}, wanted a number or null")
    metrics = {name: float(value) for name, value in row["metrics"].items() if value is not None and math.isfinite(value)}
    return Score(row["task"], row["method"], row["seed"], metrics, row.get("facts") or {})


def record_files(sources: Sequence[Path]) -> list[Path]:
    """The files that are named, and all records (`*.score.json`) below the folders that are. Raises `UsageError` for a source without any."""
    files: list[Path] = []
    for source in sources:
        found = sorted(source.rglob(f"*{SUFFIX}")) if source.is_dir() else [source] if source.is_file() else []
        if not found:
            raise UsageError(f"{source}: {f'the folder holds no *{SUFFIX}' if source.is_dir() else 'there is no such file or folder'}")
        files += [path for path in found if path not in files]
    return files


def direction(metric: str) -> int:
    """1 when larger values are better, -1 when smaller ones are, 0 when neither is."""
    last = metric.rsplit("/", 1)[-1].lower()
    return -1 if last in _LOWER else 0 if last in _NEITHER else 1


def ranks(scores: Mapping[str, float], metric: str) -> dict[str, int | None]:
    """1 for the best; those that are equal share the better rank; None for a metric without a direction."""
    sign = direction(metric)
    return {name: 1 + sum(sign * other > sign * value for other in scores.values()) if sign else None for name, value in scores.items()}


class Leaderboard:
    """Scores arranged by task and method, both in the order of their first record."""

    def __init__(self, scores: Iterable[Score]) -> None:
        self._values: dict[tuple[str, str, str], dict[int, float]] = {}
        seen: set[tuple[str, str, int]] = set()
        tasks, methods, metrics = dict[str, None](), dict[str, None](), dict[str, None]()
        for score in scores:
            if (known := (score.task, score.method, score.seed)) in seen:
                raise UsageError(f"two records of task {score.task}, method {score.method}, seed {score.seed}; keep one of them")
            seen.add(known)
            tasks[score.task] = methods[score.method] = None
            for metric, value in score.metrics.items():
                metrics[metric] = None
                self._values.setdefault((metric, score.task, score.method), {})[score.seed] = value
        if not seen:
            raise UsageError("a leaderboard needs at least one record")
        self.tasks, self.methods, self.metrics = tuple(tasks), tuple(methods), tuple(metrics)

    def check(self, metric: str) -> str:
        """The metric, if any record has it. Raises `UsageError` with a suggestion."""
        if metric not in self.metrics:
            raise UsageError(
                f"no record has the metric {metric!r}{did_you_mean(metric, self.metrics)}; they have {', '.join(self.metrics)}"
            )
        return metric

    def values(self, metric: str, task: str, method: str) -> list[float]:
        """One value for each seed that has one, in order of the seeds."""
        return [value for _, value in sorted(self._values.get((metric, task, method), {}).items())]

    def cells(self, metric: str, task: str) -> dict[str, Cell]:
        """The methods that were measured on a task."""
        rows = {method: values for method in self.methods if (values := self.values(metric, task, method))}
        placed = ranks({method: float(np.mean(values)) for method, values in rows.items()}, metric)
        return {
            method: Cell(
                bootstrap_interval(values, _mean),
                float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
                placed[method],
            )
            for method, values in rows.items()
        }

    def standings(self, metric: str) -> list[Standing]:
        """The methods over all tasks that have the metric, best mean rank first; those without a run on each task come last."""
        tables = [cells for task in self.tasks if (cells := self.cells(metric, task))]
        found = []
        for method in self.methods:
            row = [cells[method] for cells in tables if method in cells]
            if len(row) < len(tables):
                found.append(Standing(method, len(row)))
                continue
            placed = [cell.rank for cell in row if cell.rank is not None]
            rank = float(np.mean(placed)) if placed else None
            found.append(Standing(method, len(row), self._over_tasks(metric, method), rank, float(np.mean([cell.spread for cell in row]))))
        return sorted(found, key=lambda s: (s.score is None, s.rank or 0.0, -direction(metric) * (s.score.estimate if s.score else 0.0)))

    def _over_tasks(self, metric: str, method: str) -> Interval:
        """Mean over tasks of means over seeds; no interval where the tasks have different numbers of seeds."""
        rows = [values for task in self.tasks if (values := self.values(metric, task, method))]
        if len({len(row) for row in rows}) == 1:
            return bootstrap_interval(rows, _mean)
        return Interval(float(np.mean([np.mean(row) for row in rows])), -math.inf, math.inf, min(map(len, rows)))

    def task_table(self, metric: str) -> list[list[str]]:
        """Headers and rows: a task a row, a method a column, each cell the score with its interval and its rank."""
        rows = [["task", *self.methods]]
        for task in self.tasks:
            if cells := self.cells(metric, task):
                rows.append([task, *(_cell_text(cells.get(method)) for method in self.methods)])
        return rows

    def standings_table(self, metric: str) -> list[list[str]]:
        """Headers and rows: a method a row, best first."""
        rows = [["method", "mean rank", "mean score", "spread over seeds", "tasks"]]
        for s in self.standings(metric):
            spread = _ABSENT if s.spread is None or math.isnan(s.spread) else f"{s.spread:.3g}"
            rank = _ABSENT if s.rank is None else f"{s.rank:.2f}"
            rows.append([s.method, rank, _ABSENT if s.score is None else s.score.short(), spread, str(s.tasks)])
        return rows

    def note(self, metric: str) -> str:
        """What the numbers of a table are."""
        counts = {len(v) for (name, _, _), v in self._values.items() if name == metric}
        seeds = f"{min(counts)} to {max(counts)} seeds" if len(counts) > 1 else f"{min(counts)} seed{'s' * (min(counts) > 1)}"
        better = {1: "larger is better", -1: "smaller is better", 0: "neither larger nor smaller is better"}[direction(metric)]
        return f"Means over {seeds} with 95 % bootstrap intervals; {better}" + ("; # is the rank." if direction(metric) else ".")

    def report(self, metrics: Sequence[str]) -> Report:
        """The tables of some metrics, the standings of the first of them on top."""
        report = Report("Leaderboard")
        report.summary(f"{len(self.tasks)} tasks, {len(self.methods)} methods.")
        for place, metric in enumerate(metrics):
            report.heading(metric).paragraph(self.note(metric))
            if place == 0:
                headers, *rows = self.standings_table(metric)
                report.table(f"{metric} over all tasks", headers, rows)
            headers, *rows = self.task_table(metric)
            report.table(f"{metric} by task", headers, rows)
        return report


def _mean(values: Any) -> float:
    return float(np.mean(values))


def _cell_text(cell: Cell | None) -> str:
    if cell is None:
        return _ABSENT
    return cell.score.short() + (f" #{cell.rank}" if cell.rank is not None else "")
