"""Several runs side by side: final figures, the options in which they differ, and their curves in one picture each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from telos.core.errors import UsageError, did_you_mean
from telos.evaluation.plots import learning_curves
from telos.evaluation.report import Report, cell_text
from telos.evaluation.run_report import Record, curve_of, grouped, read_record

_NOT_COMPARED = ("out",)  # differs by construction
_ABSENT = "–"


@dataclass(frozen=True)
class Comparison:
    """Runs with the names under which they are shown and the metrics that are compared."""

    records: list[Record]
    names: list[str]
    metrics: list[str]

    @classmethod
    def of(cls, paths: Sequence[Path], metrics: Sequence[str] = ()) -> Comparison:
        """Reads the runs. `metrics`: which to compare; by default all that any of them logged.

        Raises `UsageError` for a folder that is no run, one that is named twice, and a metric that none has logged (with a suggestion).
        """
        if repeated := [path for i, path in enumerate(paths) if path.resolve() in [other.resolve() for other in paths[:i]]]:
            raise UsageError(f"{repeated[0]} is named twice")
        records = [read_record(path) for path in paths]
        short = [record.name for record in records]
        names = short if len(set(short)) == len(short) else [str(path) for path in paths]
        known = list(dict.fromkeys(name for record in records for name in record.metrics))
        for metric in metrics:
            if metric not in known:
                raise UsageError(
                    f"--metric {metric}: none of the runs has logged it{did_you_mean(metric, known)}; logged: {', '.join(known) or 'nothing'}"
                )
        wanted = list(metrics) or [name for _, _, group in grouped(known) for name in group]
        return cls(records, names, wanted)

    def final_cells(self) -> list[tuple[str, list[str]]]:
        """For each metric and run: the last value and, in brackets, the mean of the last three; a dash where it was never logged."""
        return [(metric, [_final_cell(record, metric) for record in self.records]) for metric in self.metrics]

    def differing_options(self) -> list[tuple[str, list[Any]]]:
        """Options with another value, or that only some of the runs have (None there); the method first."""
        found: list[tuple[str, list[Any]]] = [("method", [record.facts.get("method") for record in self.records])]
        names = dict.fromkeys(name for record in self.records for name in record.options if name not in _NOT_COMPARED)
        found += [(name, [record.options.get(name) for record in self.records]) for name in names]
        return [(name, values) for name, values in found if any(value != values[0] for value in values)]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Writes `report.html` and `report.md`. Raises `UsageError` when the folder is a run's, whose own report this would replace."""
        if (folder / "run.json").exists():
            raise UsageError(f"--out {folder} is a run's folder and has its own report; name another folder")
        return self.report().write(folder)

    def report(self) -> Report:
        report = Report("Comparison of runs")
        report.summary(f"{len(self.records)} runs: {', '.join(self.names)}.")
        for name, record in zip(self.names, self.records, strict=True):
            if record.facts.get("status") != "finished":
                report.warning(f"{name} is not finished (status: {record.facts.get('status', 'unknown')}).")
        report.heading("Final figures")
        headers = ["metric", *(f"{name}, {what}" for name in self.names for what in ("last", "mean of last 3"))]
        rows = [[metric, *(record.last(metric, count) for record in self.records for count in (1, 3))] for metric in self.metrics]
        report.table("Metrics at the end of the runs", headers, rows)
        report.heading("Options that differ")
        if differing := self.differing_options():
            report.table(
                "Options with another value", ["option", *self.names], [[name, *map(cell_text, values)] for name, values in differing]
            )
        else:
            report.paragraph("The runs have the same options.")
        self._curves(report)
        return report

    def _curves(self, report: Report) -> None:
        report.heading("Curves")
        for _, axis, metrics in grouped(self.metrics):
            for metric in metrics:
                place = self.metrics.index(metric) + 1  # in the name, because a/b and a-b would be one file
                found = [curve_of(name, *record.series(metric)) for name, record in zip(self.names, self.records, strict=True)]
                curves = [curve for curve, _ in found if curve is not None]
                if curves:
                    left_out = sum(count for _, count in found)
                    caption = f"{metric} by step" + (f"; {left_out} values are not finite and not drawn" if left_out else "")
                    report.picture(
                        f"{place:02d} {metric}",
                        learning_curves(curves, axis, "Step"),
                        caption + ".",
                        f"{metric} by step of {', '.join(c.name for c in curves)}.",
                    )


def _final_cell(record: Record, metric: str) -> str:
    last, mean = record.last(metric), record.last(metric, 3)
    return _ABSENT if last is None else f"{cell_text(last)} ({cell_text(mean)})"
