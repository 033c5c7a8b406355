"""Pictures for reports, as PNG bytes: dark text on white, readable at the width of a web page and without colour vision.

Colours are those of Okabe and Ito (2008) and every series also has its own marker or line style. The same data give the same bytes.
Matplotlib is imported inside the functions and used without pyplot: no window, no global state.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from telos.core.errors import UsageError
from telos.evaluation.statistics import Floats, Interval, checked

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5D3A9B")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")
_INK = "#1a1a1a"
_DPI = 144  # 7.5 inches give 1080 pixels: sharp at the report's width on ordinary screens
_LEGEND_WIDTH = 88  # characters that fit side by side

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}


@dataclass(frozen=True)
class Curve:
    """One named line: x, y [points], and bounds of the interval around y where there are any.

    Infinite or NaN bounds are left undrawn; x and y must be finite.
    """

    name: str
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None


@dataclass(frozen=True)
class RewardCurves:
    """Proxy and gold of one method over its checkpoints. `kl` [checkpoints] in nats; one Interval per checkpoint.

    `fit`: the fitted gold curve as (kl, gold), each [points], drawn as a thin dotted line.
    """

    name: str
    kl: ArrayLike
    proxy: Sequence[Interval]
    gold: Sequence[Interval]
    fit: tuple[ArrayLike, ArrayLike] | None = None


def reward_against_kl(methods: Sequence[RewardCurves], proxy_label: str = "Proxy reward", gold_label: str = "Gold score") -> bytes:
    """Two panels over KL(policy || reference): what was optimised, and what was wanted. Bars are the intervals."""
    _need(methods, "methods")
    proxies = [_from_intervals(m.name, m.kl, m.proxy) for m in methods]
    golds = [_from_intervals(m.name, m.kl, m.gold) for m in methods]
    with _figure(7.5, 3.9) as page:
        left, right = page.figure.subplots(1, 2, sharex=True)
        for axes, curves, label in ((left, proxies, proxy_label), (right, golds, gold_label)):
            for i, curve in enumerate(curves):
                _error_bars(axes, curve, i)
            axes.set_title(_plain(label), loc="left", fontweight="bold")
            axes.set_ylabel("Mean over prompts")
            axes.set_xlabel("KL from the reference [nats per completion]")
        for i, method in enumerate(methods):
            if method.fit is not None:
                x, y = checked(method.fit[0], "fit of KL"), checked(method.fit[1], "fit of gold")
                right.plot(x, y, color=_colour(i), linestyle=(0, (1, 1.5)), linewidth=1.2)
        _legend_above(page.figure, left)
        note = _interval_note([v for m in methods for v in (*m.proxy, *m.gold)])
        return page.png(note + ("; dotted: fitted curve" if any(m.fit for m in methods) else ""))


def learning_curves(curves: Sequence[Curve], ylabel: str, xlabel: str = "Optimiser step") -> bytes:
    """A metric against training step, one line for each curve, its interval shaded. Labels carry the units."""
    _need(curves, "curves")
    with _figure(7.5, 3.9) as page:
        axes = page.figure.subplots()
        for i, curve in enumerate(curves):
            x, y, low, high = _arrays(curve)
            marker = _marker(i) if x.size <= 30 else None
            axes.plot(x, y, color=_colour(i), linestyle=_line(i), marker=marker, label=_plain(curve.name))
            axes.fill_between(x, low, high, where=np.isfinite(low) & np.isfinite(high), color=_colour(i), alpha=0.18, linewidth=0)
        axes.set_xlabel(_plain(xlabel))
        axes.set_ylabel(_plain(ylabel))
        _integer_ticks(axes, curves)
        if len(curves) > 1:
            _legend_above(page.figure, axes)
        return page.png()


def win_rates(rates: Mapping[str, Interval], against: str) -> bytes:
    """One row for each model with its win rate against `against` in percent, the interval as a bar, and the line of 50 %."""
    _need(rates, "rates")
    names, intervals = list(rates), list(rates.values())
    with _figure(7.5, 1.35 + 0.42 * len(names)) as page:
        axes = page.figure.subplots()
        axes.axvline(50, color=_INK, linewidth=1.2, linestyle="--", zorder=1)
        for row, interval in enumerate(intervals):
            estimate = 100 * interval.estimate
            if np.isfinite(interval.low) and np.isfinite(interval.high):
                axes.plot([100 * interval.low, 100 * interval.high], [row, row], color=_colour(0), linewidth=2.4, solid_capstyle="butt")
            axes.plot([estimate], [row], color=_colour(0), marker="o", markersize=7, linestyle="none", clip_on=False, zorder=3)
            axes.annotate(_percent(interval), (1.025, row), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        axes.set_yticks(range(len(names)), [_plain(name) for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(_plain(f"Win rate against {against} [%]"))
        return page.png(_interval_note(intervals))


def length_histogram(lengths: Mapping[str, ArrayLike], unit: str = "tokens") -> bytes:
    """Share of completions by length for each model on common bins; the vertical lines are the medians."""
    _need(lengths, "lengths")
    arrays = {name: checked(values, f"lengths of {name}", dimensions=(1,)) for name, values in lengths.items()}
    edges = _bins(np.concatenate(list(arrays.values())))
    with _figure(7.5, 3.6) as page:
        axes = page.figure.subplots()
        for i, (name, values) in enumerate(arrays.items()):
            share = 100 * np.histogram(values, edges)[0] / values.size
            median = float(np.median(values))
            label = f"{name} (median {median:g}, n = {values.size})"
            axes.stairs(share, edges, color=_colour(i), linestyle=_line(i), linewidth=1.8, label=_plain(label))
            axes.stairs(share, edges, color=_colour(i), fill=True, alpha=0.12)
            axes.axvline(median, color=_colour(i), linestyle=_line(i), linewidth=1.0)
        axes.set_xlabel(_plain(f"Length of the completion [{unit}]"))
        axes.set_ylabel("Share of completions [%]")
        axes.set_ylim(bottom=0)
        _legend_above(page.figure, axes)
        return page.png()


class _figure:
    """A styled figure for a `with` block; the style ends with the block."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self._context = rc_context(_STYLE)
        self._context.__enter__()
        self.figure: Figure = Figure(figsize=(width, height), dpi=_DPI)
        self.figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
        FigureCanvasAgg(self.figure)

    def __enter__(self) -> _figure:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)

    def png(self, note: str = "") -> bytes:
        if note:
            self.figure.supxlabel(note, fontsize=8, color="#555555", x=0.99, ha="right")
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", metadata={"Software": None})  # the version of matplotlib would change the bytes
        return buffer.getvalue()


def _error_bars(axes: Axes, curve: Curve, i: int) -> None:
    x, y, low, high = _arrays(curve)
    order = np.argsort(x, kind="stable")
    reach = np.stack([y - low, high - y])[:, order]
    # A percentile interval need not contain its estimate; a bar cannot have negative length.
    reach = np.where(np.isfinite(reach), np.maximum(reach, 0.0), 0.0)
    axes.errorbar(
        x[order],
        y[order],
        yerr=reach,
        color=_colour(i),
        marker=_marker(i),
        linestyle=_line(i),
        elinewidth=1.1,
        capsize=2.5,
        label=_plain(curve.name),
    )


def _from_intervals(name: str, x: ArrayLike, intervals: Sequence[Interval]) -> Curve:
    return Curve(name, x, [v.estimate for v in intervals], [v.low for v in intervals], [v.high for v in intervals])


def _arrays(curve: Curve) -> tuple[Floats, Floats, Floats, Floats]:
    x, y = checked(curve.x, f"x of {curve.name}", dimensions=(1,)), checked(curve.y, f"y of {curve.name}", dimensions=(1,))
    unknown = np.full(y.shape, np.nan)
    low = unknown if curve.low is None else np.asarray(curve.low, dtype=np.float64)
    high = unknown if curve.high is None else np.asarray(curve.high, dtype=np.float64)
    if not x.shape == y.shape == low.shape == high.shape:
        raise UsageError(f"curve {curve.name}: x {x.shape}, y {y.shape} and its bounds {low.shape}, {high.shape} differ in length")
    return x, y, low, high


def _bins(values: Floats) -> Floats:
    """Edges of at most 40 bins. Whole values get bins of whole width, else one bin would hold more of them than the next."""
    low, high = float(values.min()), float(values.max())
    if np.all(values == np.round(values)):
        width = max(1.0, float(np.ceil((high - low + 1) / 40)))
        return np.arange(low - 0.5, high + width, width)
    return np.linspace(low, high, 41)


def _percent(interval: Interval) -> str:
    if not (np.isfinite(interval.low) and np.isfinite(interval.high)):
        return f"{100 * interval.estimate:.1f} (n = {interval.n})"
    return f"{100 * interval.estimate:.1f} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _interval_note(intervals: Sequence[Interval]) -> str:
    """One line that says what the bars are: their level and the number of prompts, as a range where the series differ."""
    counts = [v.n for v in intervals]
    n = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    levels = " or ".join(f"{100 * level:g} %" for level in sorted({v.level for v in intervals}))
    return f"Bars: {levels} intervals, n = {n} prompts"


def _integer_ticks(axes: Axes, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import MaxNLocator

    if all(np.all(np.asarray(c.x) == np.round(np.asarray(c.x))) for c in curves):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    widths = [len(label) + 7 for label in labels]  # in characters, with the key
    columns = len(labels) if sum(widths) <= _LEGEND_WIDTH else max(1, _LEGEND_WIDTH // max(widths))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


def _plain(text: str) -> str:
    """Names as written: no mathematics between dollar signs, and no name hidden from the legend for its leading underscore."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _marker(i: int) -> str:
    return _MARKERS[i % len(_MARKERS)]


def _line(i: int) -> str:
    return _LINES[i % len(_LINES)]


def _need(items: Sequence[Any] | Mapping[str, Any], name: str) -> None:
    if not items:
        raise UsageError(f"{name} is empty; a picture needs at least one series")
