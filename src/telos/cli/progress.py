"""Progress of a run: a bar with rate and time left on a terminal, a line every ten seconds elsewhere, with the few numbers that matter.

`Progress` watches a run through the callback protocol of `core.loop`; `Bar` is what it draws with, and serves other long work too.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from telos.cli.text import columns, number_text, seconds_text, shown_path

if TYPE_CHECKING:
    from telos.core.loop import Program
    from telos.core.run import Run

# In the order in which they are shown; the first that a run logs are taken.
WATCHED = (
    "episode/return",
    "evaluation/return",
    "evaluation/success",
    "loss",
    "reward",
    "reward/kept",
    "reward/mean",
    "rewards/margins",
    "rewards/accuracies",
    "kl",
    "entropy",
    "eval/loss",
    "eval/rewards/accuracies",
    "completions/mean_length",
    "rewards/error",
    "rewards/invalid",
    "clip_ratio/high",
    "grad_norm",
    "loss/critic",
    "loss/actor",
)
_SHOWN = 6  # numbers beside the bar
_AVERAGED = 10  # values in the mean beside the last one
_WINDOW = 30  # steps over which the rate is measured
_LINE_EVERY = 10.0  # seconds between lines where there is no terminal


def watched(metrics: Mapping[str, float], most: int = _SHOWN) -> dict[str, float]:
    """The few numbers that matter, in the order of `WATCHED`; of metrics that are none of these, the first ones."""
    names = [name for name in WATCHED if name in metrics] or [name for name in metrics if not name.startswith("time/")]
    return {name: metrics[name] for name in names[:most]}


class Pace:
    """How fast steps come, over the last `_WINDOW` of them."""

    def __init__(self, first: int, now: float) -> None:
        self._began = now
        self._marks: deque[tuple[float, int]] = deque([(now, first)], maxlen=_WINDOW + 1)

    def mark(self, done: int, now: float) -> None:
        self._marks.append((now, done))

    def elapsed(self, now: float) -> float:
        return now - self._began

    @property
    def rate(self) -> float | None:
        """Steps a second; None before the first step."""
        (earlier, a), (later, b) = self._marks[0], self._marks[-1]
        return (b - a) / (later - earlier) if b > a and later > earlier else None

    def rate_text(self, unit: str) -> str:
        rate = self.rate
        if rate is None:
            return "–"
        return f"{rate:.3g} {unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{unit}"

    def left(self, done: int, total: int) -> str:
        rate = self.rate
        return "–" if rate is None else seconds_text((total - done) / rate)


class Bar:
    """Draws how far something is. `stream` is standard error, so that standard output holds results alone."""

    def __init__(
        self,
        title: str,
        total: int,
        *,
        first: int = 0,
        unit: str = "step",
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.title, self.total, self.unit, self.quiet = title, total, unit, quiet
        self._clock = clock
        self._pace = Pace(first, clock())
        self._said = clock()
        self._live: Any = None
        self._numbers: dict[str, float] = {}
        self._history: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_AVERAGED))
        self._done = first
        if not quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            # Drawn anew four times a second, so that the elapsed time runs on while a step takes long.
            self._live = Live(get_renderable=self._drawing, console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._live.start()

    def update(self, done: int, numbers: Mapping[str, float] | None = None) -> None:
        """`done` of the total are done. Numbers that are not given again stay: some are measured now and then."""
        if self.quiet:
            return
        now = self._clock()
        self._done = done
        for name, value in (numbers or {}).items():
            self._history[name].append(value)
        self._numbers = {**self._numbers, **(numbers or {})}  # a new one: the drawing thread may be reading the old
        self._pace.mark(done, now)
        if self._live is None and (now - self._said >= _LINE_EVERY or done >= self.total):
            self._said = now
            print(self.line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """The whole state in one line of text."""
        share = 100 * self._done / max(self.total, 1)
        figures = "".join(f"  {name} {number_text(value)}" for name, value in self._numbers.items())
        return f"{self.title}  {self._done}/{self.total} ({share:.0f} %)  {self._times()}{'  |' + figures if figures else ''}"

    def _times(self) -> str:
        elapsed = seconds_text(self._pace.elapsed(self._clock()))
        return f"{self._pace.rate_text(self.unit)}  {elapsed} elapsed  {self._pace.left(self._done, self.total)} left"

    def _drawing(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 1))
        share = 100 * self._done / max(self.total, 1)
        head.add_row(Text(self.title), ProgressBar(self.total, self._done, width=30), Text(f"{self._done}/{self.total} ({share:.0f} %)"))
        parts: list[Any] = [head, Text(self._times())]
        if numbers := self._numbers:
            table = Table.grid(padding=(0, 3, 0, 0))
            table.add_row("", Text("now", style="dim"), Text(f"mean of last {_AVERAGED}", style="dim"))
            for name, value in numbers.items():
                recent = list(self._history[name])
                table.add_row(Text(name), Text(number_text(value)), Text(number_text(sum(recent) / len(recent))))
            parts.append(table)
        return Group(*parts)


class Progress:
    """A `core.loop.Callback`: says what is about to happen (which size is which), then how far it is."""

    def __init__(self, *, quiet: bool = False, title: str = "") -> None:
        self.quiet, self.title = quiet, title
        self._bar: Bar | None = None

    def started(self, run: Run, program: Program, first: int, total: int) -> None:
        facts = run.facts
        title = self.title or str(facts.get("method", ""))
        if not self.quiet:
            print(f"{title}: {shown_path(run.path)}" + (f", from step {first}" if first else ""), file=sys.stderr)
            if plan := facts.get("plan"):
                print(columns([[str(name), number_text(value)] for name, value in plan.items()], indent=2), file=sys.stderr, flush=True)
        self._bar = Bar(title, total, first=first, quiet=self.quiet)

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        assert self._bar is not None
        self._bar.update(step, watched(metrics))

    def ended(self, status: str) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Watch:
    """What the catalogue's programs ask for when they want to be watched: progress of their training stages, bars for other work."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet

    def callbacks(self, title: str) -> list[Progress]:
        return [Progress(quiet=self.quiet, title=title)]

    def bar(self, title: str, total: int) -> Bar:
        return Bar(title, total, unit="part", quiet=self.quiet)
