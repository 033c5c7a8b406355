"""How training has moved what a model can find: two models' repeated answers to the same problems, compared as in "The Invisible Leash" (Wu et al. 2025).

Four questions, each with intervals over problems: is one answer right more often (pass@1), and many (pass@k); which problems, and which right answers to them,
are found by both models, by one, by neither (support); are answers more alike (entropy over final answers); and are tokens drawn with more or less doubt
(entropy over tokens)? The measures are those of `evaluation.reasoning`. This module opens no model: what is sampled comes as `Sampled`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from telos.core.errors import UsageError
from telos.core.run import commit, hardware, versions, write_atomically
from telos.evaluation.plots import _colour, _figure, _legend_above, _line, _marker
from telos.evaluation.reasoning import (
    CATEGORIES,
    Support,
    answer_entropy,
    answer_support,
    detectable_probability,
    majority_at_k,
    pass_at_k,
    problem_support,
    rate_interval,
    ratio_interval,
    sums_interval,
    support,
    support_by_chance,
)
from telos.evaluation.report import Completion, Report, Sample
from telos.evaluation.run_report import _prompt_text
from telos.evaluation.statistics import Floats, Interval

FILES = ("leash.json", "samples.jsonl", "report.html", "report.md", "report")
_WORDS = dict(
    zip(CATEGORIES, ("found by both", "found by the trained model alone", "found by the base model alone", "found by neither"), strict=True)
)
_COLOURS = {"preserved": 2, "expanded": 1, "shrunk": 0, "outside": 3}  # base and trained as in the other pictures
_LABELS = dict(zip(CATEGORIES, ("both", "trained alone", "base alone", "neither"), strict=True))
_SHOWN = 3  # problems of each kind of change in the report


@dataclass(frozen=True)
class Sampled:
    """The answers of one model: rows are problems, columns its samples of each."""

    name: str  # what the user called the model
    texts: list[list[str]]
    answers: list[list[str | None]]  # the final answer in each text; None where there is none
    scores: Floats  # rewards; NaN where the reward did not apply
    right: Floats  # 1 where the score reaches the threshold, else 0
    tokens: Floats  # length, the end token included
    ended: Floats  # 1 where the end token was produced, 0 where the answer was cut off
    entropy: Floats  # mean over the answer's tokens of the entropy of the model's distribution, nats


@dataclass(frozen=True)
class Row:
    """One measure of both models and the trained model's minus the base model's, paired by problem."""

    name: str
    base: Interval
    trained: Interval
    difference: Interval


@dataclass(frozen=True)
class Leash:
    """The comparison. `settings` is what was asked for, JSON-able; `notes` what a reader must know of the samples."""

    base: Sampled
    trained: Sampled
    prompts: Sequence[Any]
    settings: Mapping[str, Any]
    support_threshold: float = 0.0
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        shape = self.base.right.shape
        if len(shape) != 2 or shape != self.trained.right.shape or len(self.prompts) != shape[0] or min(shape) < 2:
            raise UsageError("both models must have answered the same problems, at least two, the same number of times, at least twice")

    @property
    def samples(self) -> int:
        return self.base.right.shape[1]

    @property
    def both(self) -> tuple[tuple[str, Sampled], ...]:
        return ("base", self.base), ("trained", self.trained)

    # -- figures --------------------------------------------------------------------------------------------------------------------------

    @property
    def budgets(self) -> list[int]:
        """1, 2, 4, … and the number of samples."""
        return sorted({*(2**i for i in range(self.samples.bit_length())), self.samples})

    @cached_property
    def passed(self) -> dict[str, list[Interval]]:
        """pass@k for each of `budgets`."""
        return {name: [rate_interval(pass_at_k(model.right, k)) for k in self.budgets] for name, model in self.both}

    @cached_property
    def voted(self) -> dict[str, list[Interval]]:
        """maj@k for each of `budgets`."""
        return {name: [rate_interval(majority_at_k(model.right, model.answers, k)) for k in self.budgets] for name, model in self.both}

    @cached_property
    def rows(self) -> list[Row]:
        base, trained, n = self.base, self.trained, self.samples
        middle = 2 ** (n.bit_length() // 2)
        rows = [_rates(f"pass@{k}", pass_at_k(base.right, k), pass_at_k(trained.right, k)) for k in sorted({1, middle, n})]
        votes = [majority_at_k(model.right, model.answers, n) for model in (base, trained)]
        return [
            *rows,
            _rates(f"maj@{n}", *votes),
            _means("entropy of answers [nats]", answer_entropy(base.answers), answer_entropy(trained.answers)),
            _per_token("entropy of tokens [nats]", base, trained),
            _means("distinct right texts a problem", _distinct(base), _distinct(trained)),
            _means("length [tokens]", base.tokens.mean(1), trained.tokens.mean(1)),
            _rates("cut off", 1 - base.ended.mean(1), 1 - trained.ended.mean(1)),
        ]

    @cached_property
    def support(self) -> dict[str, Support]:
        """Of problems, of distinct right final answers to them, and of distinct right texts (ways of solving them)."""
        base, trained, threshold = self.base, self.trained, self.support_threshold
        return {
            "problems": support(problem_support(base.right, trained.right, threshold)),
            "right answers": support(answer_support(base.right, base.answers, trained.right, trained.answers, threshold)),
            "right texts": support(answer_support(base.right, base.texts, trained.right, trained.texts, threshold)),
        }

    @cached_property
    def chance(self) -> dict[str, float]:
        """How many problems would be in each category if the models solved each equally often and drew independently."""
        totals = support_by_chance(self.base.right, self.trained.right, self.support_threshold).sum(0)
        return dict(zip(CATEGORIES, totals.tolist(), strict=True))

    def figures(self) -> dict[str, Any]:
        """Everything that was measured, JSON-able."""

        def curve(values: Mapping[str, list[Interval]]) -> dict[str, Any]:
            return {name: {str(k): v.as_dict() for k, v in zip(self.budgets, row, strict=True)} for name, row in values.items()}

        measures = {row.name: {part: getattr(row, part).as_dict() for part in ("base", "trained", "difference")} for row in self.rows}
        found = {
            unit: {name: getattr(of, name) for name in CATEGORIES}
            | {name: getattr(of, name).as_dict() for name in ("retention", "discovery", "dynamics", "change")}
            for unit, of in self.support.items()
        }
        return {
            "pass_at_k": curve(self.passed),
            "majority_at_k": curve(self.voted),
            "measures": measures,
            "support": found,
            "support_by_chance": self.chance,
            "detectable_probability": detectable_probability(self.samples),
        }

    # -- what is written ------------------------------------------------------------------------------------------------------------------

    def write(self, folder: Path, command: str = "") -> tuple[Path, Path]:
        """Writes `samples.jsonl`, `leash.json`, `report.html` and `report.md` with its pictures; returns the paths of both reports."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._sample_rows()))
        record = {
            "base": self.base.name,
            "trained": self.trained.name,
            "settings": dict(self.settings),
            "notes": list(self.notes),
            "figures": self.figures(),
            "command": command,
            "versions": versions(),
            "commit": commit(),
        }
        write_atomically(folder / "leash.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        return self.report(command).write(folder)

    def _sample_rows(self) -> list[dict[str, Any]]:
        rows = []
        for i, prompt in enumerate(self.prompts):
            row: dict[str, Any] = {"prompt": prompt}
            for name, model in self.both:
                row[name] = {
                    "completions": model.texts[i],
                    "answers": model.answers[i],
                    "scores": [None if math.isnan(score) else score for score in model.scores[i].tolist()],
                    "right": [bool(x) for x in model.right[i]],
                    "tokens": [int(x) for x in model.tokens[i]],
                    "ended": [bool(x) for x in model.ended[i]],
                    "entropy": [round(x, 6) for x in model.entropy[i].tolist()],
                }
            rows.append(row)
        return rows

    def report(self, command: str = "") -> Report:
        count, n = len(self.prompts), self.samples
        report = Report("Leash: what training has moved")
        report.summary(
            f"Base: {self.base.name}. Trained: {self.trained.name}. Each answered the same {count} problems {n} times.",
            f"An answer with a probability of {detectable_probability(n):.2g} or more is found in {n} samples in 95 of 100 cases; "
            "what is not found may still be less likely than that, and is not shown to be impossible.",
        )
        for note in self.notes:
            report.warning(note)
        self._verdicts(report)
        report.heading("Accuracy over samples")
        report.table(
            "Both models",
            ["measure", "base", "trained", "difference"],
            [[r.name, *map(_cell, (r.base, r.trained, r.difference))] for r in self.rows],
        )
        for name, values, what in (
            ("pass@k", self.passed, "Problems with a right answer among k samples"),
            ("maj@k", self.voted, "Problems whose most frequent answer among k samples is right"),
        ):
            ends = "; ".join(f"{model} from {row[0].estimate:.3g} to {row[-1].estimate:.3g}" for model, row in values.items())
            report.picture(
                name, self._curves(values, f"{name} [% of problems]"), f"{name}: {what.lower()}.", f"{what} by k from 1 to {n}: {ends}."
            )
        self._support_section(report)
        report.heading("Entropy")
        entropies = [row for row in self.rows if row.name.startswith("entropy")]
        spoken = "; ".join(f"{row.name}: base {row.base.estimate:.3g}, trained {row.trained.estimate:.3g}" for row in entropies)
        report.paragraph(
            "Entropy of answers is that of the distribution over a problem's distinct final answers; entropy of tokens is that of the model's "
            "distribution at each place of its answers, at the temperature of sampling and before top_p cuts it."
        )
        answers, tokens = entropies
        report.paragraph(f"Entropy of answers changed by {answers.difference.short()} nats, that of tokens by {tokens.difference.short()}.")
        report.picture("entropies", self._entropies(entropies), "Entropy of answers and of tokens.", spoken + ".")
        self._examples(report)
        if command:
            report.command(command)
        report.facts("Settings", dict(self.settings))
        report.facts("Versions", versions())
        report.facts("Hardware", hardware())
        return report

    def _verdicts(self, report: Report) -> None:
        first = self.rows[0]
        answer, status = _decided(first.difference, "yes", "no, less often")
        report.verdict(
            "Is one answer right more often?",
            answer,
            f"pass@1: {first.base.short()} before, {first.trained.short()} after.",
            _status(status),
        )
        found = self.support["problems"]
        answer, status = _decided(found.change, "it grew", "it shrank")
        text = (
            f"{found.expanded} problems are solved by the trained model alone and {found.shrunk} by the base model alone (equally good models "
            f"with independent samples: {self.chance['expanded']:.1f} each way); net change {_short(found.change)}."
        )
        report.verdict("Has the set of solved problems changed?", answer, text, _status(status))

    def _support_section(self, report: Report) -> None:
        report.heading("Support")
        asked = "at least once" if self.support_threshold == 0 else f"in more than {100 * self.support_threshold:g} % of its samples"
        report.paragraph(
            f"Found: right {asked}. Retention is the share of what the base model finds that is left, discovery the share of what the "
            "trained model finds that is new, dynamics their harmonic mean, change (new − lost) / all that is found. With finitely many "
            "samples some problems cross over by chance; the row says how many would if both models solved each problem equally often and "
            "drew independently. Both drew with the same random numbers, so that nearly equal models cross over less."
        )
        names = ["found by both", "new", "lost", "by neither"]
        rows: list[list[Any]] = [
            [unit, *(getattr(of, name) for name in CATEGORIES), *map(_cell, (of.retention, of.discovery, of.dynamics, of.change))]
            for unit, of in self.support.items()
        ]
        rows.insert(1, ["problems, by chance", *(self.chance[name] for name in CATEGORIES), None, None, None, None])
        report.table("What both models find", ["of", *names, "retention", "discovery", "dynamics", "change"], rows)
        found, texts = self.support["problems"], self.support["right texts"]
        spoken = "; ".join(f"{getattr(found, name)} problems and {getattr(texts, name)} texts {_WORDS[name]}" for name in CATEGORIES[:3])
        report.picture("support", self._bars(), "Problems and distinct right texts by which model finds them.", spoken + ".")

    def _examples(self, report: Report) -> None:
        """Problems that one model alone solved, then problems of both, each with one answer of each model: a right one where there is one."""
        categories = problem_support(self.base.right, self.trained.right, self.support_threshold).argmax(1)
        shown = []
        for kind, title in ((2, "found by the base model alone"), (1, "found by the trained model alone"), (0, "found by both")):
            for i in np.flatnonzero(categories == kind)[:_SHOWN]:
                answers = []
                for name, model in self.both:
                    place = int(model.right[i].argmax())
                    scores = {"right": f"{int(model.right[i].sum())} of {self.samples}"}
                    answers.append(
                        Completion(f"{name}, {'a right' if model.right[i, place] else 'a wrong'} answer", model.texts[i][place], scores)
                    )
                shown.append(Sample(_prompt_text(self.prompts[i]), answers, f"Problem {i + 1}, {title}"))
        if shown:
            report.heading("Examples").samples(f"Up to {_SHOWN} problems of each kind", shown)

    # -- pictures -------------------------------------------------------------------------------------------------------------------------

    def _curves(self, values: Mapping[str, list[Interval]], ylabel: str) -> bytes:
        with _figure(7.5, 3.9) as page:
            axes = page.figure.subplots()
            for i, (name, row) in enumerate(values.items()):
                y, low, high = (100 * np.array([getattr(v, part) for v in row]) for part in ("estimate", "low", "high"))
                axes.plot(self.budgets, y, color=_colour(i), linestyle=_line(i), marker=_marker(i), label=name)
                axes.fill_between(self.budgets, low, high, color=_colour(i), alpha=0.18, linewidth=0)
            axes.set_xscale("log", base=2)
            ticks = [k for k in self.budgets if k == self.samples or self.samples / k >= 1.4]  # else the last two would overlap
            axes.set_xticks(ticks, [str(k) for k in ticks])
            axes.set_xlabel("Samples of each problem, k")
            axes.set_ylabel(ylabel)
            axes.set_ylim(bottom=0)
            _legend_above(page.figure, axes)
            return page.png(f"Shades: {self._interval_note()}")

    def _interval_note(self) -> str:
        return f"{100 * self.rows[0].base.level:g} % intervals, n = {len(self.prompts)} problems"

    def _bars(self) -> bytes:
        found = {"Problems": (self.support["problems"], CATEGORIES), "Distinct right texts": (self.support["right texts"], CATEGORIES[:3])}
        with _figure(7.5, 3.1) as page:
            left, right = page.figure.subplots(1, 2)
            for axes, (title, (of, names)) in zip((left, right), found.items(), strict=True):
                counts = [getattr(of, name) for name in names]
                for row, (name, count) in enumerate(zip(names, counts, strict=True)):
                    expected = self.chance[name] if axes is left and name in ("expanded", "shrunk") else 0.0
                    if expected:
                        axes.plot([expected, expected], [row - 0.42, row + 0.42], color="#1a1a1a", linewidth=1.6, linestyle="--")
                    axes.barh(row, count, color=_colour(_COLOURS[name]), height=0.62)
                    axes.annotate(
                        str(count), (max(count, expected), row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
                    )
                axes.set_yticks(range(len(names)), [_LABELS[name] for name in names])
                axes.set_ylim(len(CATEGORIES) - 0.4, -0.6)
                axes.set_xlim(0, 1.18 * max(*counts, self.chance["expanded"], self.chance["shrunk"], 1))
                axes.grid(axis="y", visible=False)
                axes.set_title(title, loc="left", fontweight="bold")
                axes.set_xlabel("Count")
            return page.png("Dashed: expected by chance if both models solved each problem equally often")

    def _entropies(self, rows: Sequence[Row]) -> bytes:
        with _figure(7.5, 2.2) as page:
            for axes, row in zip(page.figure.subplots(1, len(rows)), rows, strict=True):
                for place, (name, interval) in enumerate((("base", row.base), ("trained", row.trained))):
                    if math.isfinite(interval.low) and math.isfinite(interval.high):
                        axes.plot([interval.low, interval.high], [place, place], color=_colour(place), linewidth=2.4, solid_capstyle="butt")
                    axes.plot(
                        [interval.estimate],
                        [place],
                        color=_colour(place),
                        marker=_marker(place),
                        markersize=7,
                        linestyle="none",
                        label=name,
                    )
                axes.set_yticks([0, 1], ["base", "trained"])
                axes.set_ylim(1.6, -0.6)
                axes.set_xlim(
                    0,
                    1.15
                    * max(
                        row.base.estimate, row.trained.estimate, *(v.high for v in (row.base, row.trained) if math.isfinite(v.high)), 0.1
                    ),
                )
                axes.grid(axis="y", visible=False)
                axes.set_xlabel(row.name.capitalize())
            return page.png(f"Bars: {self._interval_note()}")


def _rates(name: str, base: Floats, trained: Floats) -> Row:
    return Row(name, rate_interval(base), rate_interval(trained), ratio_interval(trained - base, np.ones_like(base)))


def _means(name: str, base: Floats, trained: Floats) -> Row:
    one = np.ones_like(base)
    return Row(name, ratio_interval(base, one), ratio_interval(trained, one), ratio_interval(trained - base, one))


def _per_token(name: str, base: Sampled, trained: Sampled) -> Row:
    """Means over all tokens of all answers, so that long answers weigh more, as in `reasoning.mean_token_entropy`."""
    parts = np.stack([part for model in (base, trained) for part in ((model.entropy * model.tokens).sum(1), model.tokens.sum(1))], 1)
    difference = sums_interval(parts, lambda sums: sums[:, 2] / sums[:, 3] - sums[:, 0] / sums[:, 1])
    return Row(name, ratio_interval(parts[:, 0], parts[:, 1]), ratio_interval(parts[:, 2], parts[:, 3]), difference)


def _distinct(model: Sampled) -> Floats:
    return np.array(
        [
            len({text for text, good in zip(texts, right, strict=True) if good})
            for texts, right in zip(model.texts, model.right, strict=True)
        ],
        dtype=np.float64,
    )


def _decided(interval: Interval, above: str, below: str) -> tuple[str, int]:
    """(words, 1 / −1 / 0) by where the interval lies of 0; a measure that is undefined decides nothing."""
    if not math.isnan(interval.estimate) and interval.low > 0:
        return above, 1
    if not math.isnan(interval.estimate) and interval.high < 0:
        return below, -1
    return "inconclusive", 0


def _status(sign: int) -> Any:
    return {1: "good", -1: "bad", 0: "neutral"}[sign]


def _cell(interval: Interval) -> Interval | None:
    return None if math.isnan(interval.estimate) else interval


def _short(interval: Interval) -> str:
    return "undefined" if math.isnan(interval.estimate) else interval.short()
