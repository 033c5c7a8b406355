"""The report of one training run, from what its folder holds: curves, final figures, settings, counts of data, warnings, samples.

It reads `run.json`, `config.yaml`, `metrics.jsonl`, `warnings.log` and, where there is one, `samples.jsonl`; it opens no model, so it can be written for a
run of any machine, finished or not.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from telos.core import config as configs
from telos.core.errors import DataError
from telos.core.run import Run
from telos.evaluation.plots import Curve, learning_curves
from telos.evaluation.report import Completion, Report, Sample

HELD_OUT = "eval/"
_MOST_POINTS = 200  # of a curve; more are averaged, with their range shaded
_SAMPLES = 6  # prompts shown
_ANSWERS = 4  # answers to each that are shown

# (title, unit of the axis, metrics or, ending in '/', their beginning), in the order of the report.
_GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Return", "Sum of an episode's rewards", ("episode/return", "evaluation/return")),
    ("Episode length", "Steps", ("episode/length", "evaluation/length")),
    ("Success", "Share of episodes", ("episode/success", "evaluation/success", "episode/is_success", "evaluation/is_success")),
    ("Loss", "Loss", ("loss", "loss/")),
    ("Reward", "Reward", ("reward", "reward_std", "reward/")),
    ("KL", "Nats per answer", ("kl",)),
    ("Rewards of both answers", "Reward", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("Pairs ranked rightly", "Share of pairs", ("rewards/accuracies",)),
    ("Answers without a valid reward", "Answers", ("rewards/error", "rewards/invalid", "rewards/unusable_prompts")),
    ("Log-probabilities", "Nats", ("logps/",)),
    ("Entropy", "Nats per token", ("entropy",)),
    ("Length of answers", "Tokens", ("completions/mean_length",)),
    ("Answers cut off", "Share of answers", ("completions/clipped_ratio",)),
    ("Clipped ratios", "Share of tokens", ("clip_ratio/",)),
    ("Critic", "Value", ("critic/",)),
    ("Gradient norm", "Norm before clipping", ("grad_norm", "grad_norm/")),
    ("Learning rate", "Learning rate", ("learning_rate",)),
)


# They only count on, and are axes rather than curves.
_COUNTERS = ("environment_steps", "improvements", "optimiser_steps", "episode/count", "evaluation/count")


@dataclass(frozen=True)
class Record:
    """What a run's folder says, read."""

    path: Path
    facts: dict[str, Any]
    options: dict[str, Any]
    rows: list[dict[str, Any]]  # metrics, by step
    warnings: list[str]

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def axis(self) -> str:
        """What curves run over: environment steps where they are counted, else the run's own."""
        return "environment_steps" if any("environment_steps" in row for row in self.rows) else "step"

    @property
    def metrics(self) -> list[str]:
        """Names of what was logged, in order of first appearance."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if name != "step"]

    def series(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric where it was logged, values that are not finite included."""
        found = [(row.get(self.axis, row["step"]), row[metric]) for row in self.rows if isinstance(row.get(metric), (int, float))]
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)

    def last(self, metric: str, count: int = 1) -> float | None:
        """The mean of the last `count` logged values (fewer when there are fewer); None when the metric was never logged."""
        values = self.series(metric)[1][-count:]
        return float(values.mean()) if len(values) else None


def read_record(path: str | Path) -> Record:
    """Reads a run's folder. Raises `UsageError` when it is none, `DataError` when a file of it cannot be read."""
    run = Run.open(path)
    try:
        facts = run.facts
    except ValueError as error:
        raise DataError(
            str(run.path / "run.json"), f"not valid JSON: {error}", "It is written whole or not at all; was it edited?"
        ) from None
    options = configs.read_yaml(run.path / "config.yaml") if (run.path / "config.yaml").is_file() else {}
    rows = [row for row in run.metrics() if isinstance(row, dict) and isinstance(row.get("step"), int)]
    return Record(run.path, facts, options, rows, run.warnings())


def grouped(metrics: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Metrics by picture: (title, axis, names). A held-out metric stands with the one it is held against; `time/…` is left out.

    Metrics that belong to no group come last, one picture for each first word.
    """
    rest = {name: name.removeprefix(HELD_OUT) for name in metrics if not name.startswith("time/") and name not in _COUNTERS}
    found = []
    for title, axis, wanted in _GROUPS:
        names = [name for name, plain in rest.items() if any(plain == w or (w.endswith("/") and plain.startswith(w)) for w in wanted)]
        if names:
            found.append((title, axis, names))
        for name in names:
            del rest[name]
    for word in dict.fromkeys(plain.partition("/")[0] for plain in rest.values()):
        found.append((f"Other: {word}", word, [name for name, plain in rest.items() if plain.partition("/")[0] == word]))
    return found


def curve_of(name: str, steps: np.ndarray, values: np.ndarray) -> tuple[Curve | None, int]:
    """A curve of the finite values, and how many were not. Long ones are averaged over stretches of steps; their range is the shade."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    left_out = int((~finite).sum())
    if not len(values):
        return None, left_out
    if len(values) <= _MOST_POINTS:
        return Curve(name, steps, values), left_out
    parts = np.array_split(np.arange(len(values)), _MOST_POINTS // 2)
    return (
        Curve(
            name,
            [float(steps[part].mean()) for part in parts],
            [float(values[part].mean()) for part in parts],
            [float(values[part].min()) for part in parts],
            [float(values[part].max()) for part in parts],
        ),
        left_out,
    )


def write_run_report(run_path: str | Path) -> tuple[Path, Path]:
    """Writes `report.html` and `report.md` into a run's folder and returns their paths.

    Raises `UsageError` when the folder is no run's, `DataError` for files of it that cannot be read, `Failure` when the disk refuses.
    """
    record = read_record(run_path)
    return build(record).write(record.path)


def build(record: Record) -> Report:
    facts, options = record.facts, record.options
    report = Report(f"{facts.get('method', 'run')}: {record.name}")
    report.summary(*_summary(record))
    if facts.get("status") != "finished":
        report.warning(
            f"The run is not finished (status: {facts.get('status', 'unknown')}). Continue it with `telos resume {record.path}`."
        )
    for text, times in Counter(record.warnings).items():
        report.warning(text + (f" ({times} times)" if times > 1 else ""))
    _curves(report, record)
    _final(report, record)
    if evaluation := facts.get("evaluation"):
        rows = [[name.removeprefix("evaluation/"), value] for name, value in evaluation.items()]
        report.heading("Evaluation").table("The trained policy, by its most probable actions", ["what", "value"], rows)
    if plan := facts.get("plan"):
        report.heading("Sizes").table("Which size is which", ["what", "size"], [[name, value] for name, value in plan.items()])
    _data(report, facts)
    _samples(report, record.path)
    if command := facts.get("reproduce"):
        report.command(command)
    named = ("method", "status", "started", "ended", "command", "commit")
    report.facts("Run", {name: facts[name] for name in named if name in facts})
    report.facts("Settings", options)
    report.facts("Versions", facts.get("versions") or {})
    report.facts("Hardware", facts.get("hardware") or {})
    return report


def _summary(record: Record) -> Iterator[str]:
    facts, options = record.facts, record.options
    steps = record.rows[-1]["step"] if record.rows else 0
    given = [f"{name} {options[name]}" for name in ("model", "env", "data", "reward", "seed") if options.get(name) not in (None, "")]
    yield (
        f"{facts.get('method', 'run')} on {', '.join(given)}: {steps} of {facts.get('steps', '?')} steps."
        if given
        else f"{steps} steps logged."
    )
    seconds = float(record.series("time/seconds")[1].sum())
    if seconds:
        hardware = facts.get("hardware") or {}
        machine = (
            ", ".join(map(str, hardware.get("gpus") or [])) or f"{hardware.get('cpu', 'unknown CPU')}, {hardware.get('cores', '?')} cores"
        )
        yield f"The logged steps took {seconds:.4g} s of computing on {machine}."


def _curves(report: Report, record: Record) -> None:
    if not record.rows:
        report.paragraph("No step was logged yet, so there are no curves.")
        return
    report.heading("Curves")
    for title, axis, names in grouped(record.metrics):
        drawn = [(name, *curve_of(_label(name), *record.series(name))) for name in names]
        curves = [curve for _, curve, _ in drawn if curve is not None]
        if not curves:
            continue
        averaged = any(
            len(np.asarray(curve.x)) < len(record.series(name)[0]) - left_out for name, curve, left_out in drawn if curve is not None
        )
        over = "Environment steps" if record.axis == "environment_steps" else "Step"
        caption = f"{title} by {over.lower()}" + ("; lines are means over stretches of steps, shades their range" if averaged else "")
        bad = {name: left_out for name, _, left_out in drawn if left_out}
        caption += "".join(f"; {count} values of {name} are not finite and not drawn" for name, count in bad.items())
        spoken = ", ".join(f"{curve.name} from {np.asarray(curve.y)[0]:.4g} to {np.asarray(curve.y)[-1]:.4g}" for curve in curves)
        report.picture(title, learning_curves(curves, axis, over), caption + ".", f"{title} by {over.lower()}: {spoken}.")


def _label(name: str) -> str:
    return f"{name.removeprefix(HELD_OUT)} (held out)" if name.startswith(HELD_OUT) else name


def _final(report: Report, record: Record) -> None:
    rows = []
    for _, _, names in grouped(record.metrics):
        for name in names:
            values = record.series(name)[1]
            if len(values):
                low, high = float(np.min(values)), float(np.max(values))
                rows.append([name, record.last(name), record.last(name, 3), float(values[0]), low, high, len(values)])
    if rows:
        headers = ["metric", "last", "mean of last 3", "first", "lowest", "highest", "logged"]
        report.heading("Final figures").table("Metrics at the end of the run", headers, rows)


def _data(report: Report, facts: Mapping[str, Any]) -> None:
    sources = {
        name.removeprefix("rows "): counts for name, counts in facts.items() if name.startswith("rows ") and isinstance(counts, dict)
    }
    if not sources:
        return
    report.heading("Data")
    rows = [
        [
            f"--{option}",
            counts.get("source"),
            counts.get("read"),
            counts.get("kept"),
            _reasons(counts, "dropped"),
            _reasons(counts, "changed"),
        ]
        for option, counts in sources.items()
    ]
    report.table("What became of the rows", ["option", "source", "rows read", "examples kept", "dropped", "changed"], rows)


def _reasons(counts: Mapping[str, Any], kind: str) -> str | None:
    first = counts.get("first") or {}
    return "; ".join(f"{reason}: {count} (first: {first.get(reason, '?')})" for reason, count in (counts.get(kind) or {}).items()) or None


def _samples(report: Report, path: Path) -> None:
    """Answers from `samples.jsonl`: `completion` was kept of `completions`, with `scores` where a reward was asked."""
    file = path / "samples.jsonl"
    if not file.is_file():
        return
    try:
        with file.open(encoding="utf-8") as stream:
            rows = [json.loads(line) for line, _ in zip(stream, range(_SAMPLES), strict=False) if line.endswith("\n")]
        shown = [_sample(row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            str(file), f"cannot be read as samples: {error!r}", "Each line is an object with prompt, completion, completions, scores"
        ) from None
    if shown:
        report.heading("Samples").samples(f"The first {len(shown)} prompts, the kept answer first", shown)


def _sample(row: Mapping[str, Any]) -> Sample:
    kept = str(row["completion"])
    answers = [str(answer) for answer in row.get("completions") or [kept]]
    scores = row.get("scores") or [None] * len(answers)
    place = answers.index(kept)
    order = [place, *(i for i in range(len(answers)) if i != place)][:_ANSWERS]
    completions = [Completion("kept" if i == place else f"answer {i + 1}", answers[i], {"score": _score(scores[i])}) for i in order]
    return Sample(_prompt_text(row["prompt"]), completions)


def _score(value: Any) -> Any:
    return "no valid score" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


def _prompt_text(prompt: Any) -> str:
    if isinstance(prompt, list):
        return "\n".join(f"{message.get('role', '?')}: {message.get('content', '')}" for message in prompt)
    return str(prompt)
