"""`telos report` and `telos compare`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from telos.cli import text
from telos.core.errors import UsageError


def report(arguments: Namespace) -> int:
    if (Path(arguments.run) / "quickstart.json").is_file():
        html = Path(arguments.run) / "report.html"
        if not html.is_file():
            raise UsageError(
                f"{arguments.run} is a quickstart that is not finished; `telos resume {arguments.run}` continues it and writes its report"
            )
        print(text.columns([["report", text.shown_path(html)], ["", text.shown_path(html.with_suffix(".md"))]]))
        return 0
    from telos.evaluation.run_report import write_run_report

    html, markdown = write_run_report(arguments.run)
    print(text.columns([["report", text.shown_path(html)], ["", text.shown_path(markdown)]]))
    return 0


def compare(arguments: Namespace) -> int:
    from telos.evaluation.run_comparison import Comparison

    if len(arguments.runs) < 2:
        raise UsageError("name at least two runs to compare")
    comparison = Comparison.of([Path(run) for run in arguments.runs], arguments.metric or ())
    width = text.terminal_width()
    print("Last value, and in brackets the mean of the last three logged\n")
    print(text.columns([["METRIC", *comparison.names], *([name, *cells] for name, cells in comparison.final_cells())], width=width))
    print("\nOptions that differ\n")
    differing = comparison.differing_options()
    if differing:
        print(
            text.columns([["OPTION", *comparison.names], *([name, *map(text.value_text, cells)] for name, cells in differing)], width=width)
        )
    else:
        print("none")
    if arguments.out:
        html, markdown = comparison.write(Path(arguments.out))
        print("\n" + text.columns([["report", text.shown_path(html)], ["", text.shown_path(markdown)]]))
    return 0
