"""Plain text for terminals and pipes: aligned columns, paths, durations. Imports nothing heavy."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Literal


def terminal_width() -> int | None:
    """Characters a line may have on standard output; None (no limit) when it is no terminal, so that pipes and files get whole lines."""
    return shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else None


def columns(rows: Sequence[Sequence[str]], *, width: int | None = None, last: Literal["wrap", "cut"] = "wrap", indent: int = 0) -> str:
    """Rows with cells aligned on the left, two spaces between columns. What is wider than `width` is wrapped or cut in the last column."""
    if not rows:
        return ""
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    before = indent + sum(sizes) + 2 * len(sizes)
    room = None if width is None else max(width - before, 20)
    lines: list[str] = []
    for row in rows:
        head = " " * indent + "".join(cell.ljust(size) + "  " for cell, size in zip(row, sizes, strict=False))
        cell = row[-1]
        if room is None or len(cell) <= room:
            parts = [cell]
        elif last == "cut":
            parts = [cell[: room - 1] + "…"]
        else:
            parts = textwrap.wrap(cell, room) or [""]
        lines += [(head + parts[0]).rstrip(), *(" " * before + part for part in parts[1:])]
    return "\n".join(lines)


def shown_path(path: str | Path) -> str:
    """A path as a user here would write it: relative when it lies below the working directory."""
    full = os.path.abspath(path)
    return os.path.relpath(full) if full.startswith(os.getcwd() + os.sep) else full


def seconds_text(seconds: float) -> str:
    """0:07, 12:40, 1:02:03."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def number_text(value: object) -> str:
    """Four significant digits; whole numbers whole."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ") if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return number_text(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
    return str(value)


def value_text(value: object) -> str:
    """An option's value as it could be written on the command line; 'none' for what is not set."""
    if value is None or value == "" or value == ():
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value)).replace("\n", "\\n")
    return str(value)
