"""`telos leaderboard`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from telos.cli import text
from telos.core.errors import UsageError


def leaderboard(arguments: Namespace) -> int:
    """Prints the tables of the metrics that are asked for, and writes them as Markdown: to --out, or beside the records when one folder is named."""
    sources = [Path(source) for source in arguments.sources]
    out = Path(arguments.out) if arguments.out else sources[0] / "leaderboard.md" if len(sources) == 1 and sources[0].is_dir() else None
    if out is not None and out.suffix != ".md":
        raise UsageError(f"--out {out}: the leaderboard is written as Markdown; give a name that ends in .md")
    from telos.core.run import write_atomically
    from telos.evaluation.leaderboard import MAIN, Leaderboard, read_record, record_files

    board = Leaderboard(map(read_record, record_files(sources)))
    wanted = list(dict.fromkeys(arguments.metric or [MAIN]))
    metrics = list(board.metrics) if wanted == ["all"] else [board.check(metric) for metric in wanted]
    for place, metric in enumerate(metrics):
        print(f"{metric}: {board.note(metric)}\n")
        if place == 0:
            headers, *rows = board.standings_table(metric)
            print(text.columns([[name.upper() for name in headers], *rows]) + "\n")
        (task, *methods), *rows = board.task_table(metric)
        print(text.columns([[task.upper(), *methods], *rows]) + "\n")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, board.report(metrics).markdown())
        print(text.columns([["written to", text.shown_path(out)]]))
    return 0
