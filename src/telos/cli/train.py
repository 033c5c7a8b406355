"""`telos train` and `telos resume`: a method's options from its config class, progress while it runs, a report and a list of what was written."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from telos.cli import options, text
from telos.cli.progress import Progress, Watch
from telos.core.errors import UsageError

USAGE = """usage: telos train METHOD [--config FILE.yaml] [--option VALUE ...]

Options come from the method: `telos train METHOD --help` lists them with their defaults. Those given here override those of
--config. `telos list --methods` lists methods; `telos show METHOD` says what one does.

examples:
  telos train sft --data docstrings --steps 100
  telos train dpo --model path/or/hub-id --data pairs.jsonl --beta 0.1 --out runs/my-dpo
  telos train ppo-max --config ppo.yaml --reward rewards.py:score --seed 1"""

_COMMON = """usage: telos train {key} [--config FILE.yaml] [--option VALUE ...]

{title}: {changes}.

  --config FILE.yaml   options as lines `name: value`; options given here override them
  --quiet              no plan and no progress
  --help               this text

Write --name value or --name=value, --flag or --no-flag, lists as a,b,c; none unsets what may be unset. Each line below: name, type, default, meaning.
"""


def train(words: Sequence[str]) -> int:
    """`words`: all that follows `telos train`."""
    from telos.catalogue import status
    from telos.core import discovery

    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0].startswith("-"):
        raise UsageError("name the method first: telos train METHOD --option value")
    if not discovery.matches(words[0]):
        # A name of the catalogue that has no method yet deserves a better answer than "unknown".
        entry = status.find(words[0])
        if entry.card is None:
            raise UsageError(
                f"{entry.key} ({entry.number}) is planned: it has no method file yet; `telos list --status ready` shows what can be run"
            )
        words = [entry.card.key, *words[1:]]
    method = discovery.load(words[0])
    groups = options.groups_of(method.config)
    rest = list(words[1:])
    if "-h" in rest or "--help" in rest:
        print(_COMMON.format(key=method.key, title=method.title, changes=method.changes))
        print(options.described(groups, text.terminal_width()))
        return 0
    quiet = "--quiet" in rest
    given = options.parse([word for word in rest if word != "--quiet"], groups, extra=("config",))
    config_file = given.pop("config", None)

    from telos.algorithms.run import train as start

    run = start(method.key, given, callbacks=[Progress(quiet=quiet)], config_file=config_file)
    _finished(run)
    return 0


def resume(arguments: Namespace) -> int:
    path = Path(arguments.run)
    if (path / "quickstart.json").is_file():
        from telos.catalogue import quickstart
        from telos.cli.catalogue_commands import finished_quickstart

        return finished_quickstart(quickstart.resume(path, watch=Watch(quiet=arguments.quiet)))
    from telos.core.run import Run

    _not_several(path)
    facts = Run.open(path).facts
    if facts.get("status") == "finished":
        print(f"{text.shown_path(path)} is finished (since {facts.get('ended', 'an unknown time')}); there is nothing to resume")
        return 0
    from telos.algorithms.run import resume as continue_run

    _finished(continue_run(path, callbacks=[Progress(quiet=arguments.quiet)]))
    return 0


def _not_several(path: Path) -> None:
    """A recipe's folder holds several runs, and only the recipe knows their order."""
    runs = sorted(file.parent.name for file in path.glob("*/run.json")) if not (path / "run.json").exists() else []
    if runs:
        raise UsageError(f"{path} holds several runs ({', '.join(runs)}); repeat the command that made it, and it continues where it was")


def _finished(run: Any) -> None:
    """Writes the report and says where everything is."""
    from telos.evaluation.run_report import write_run_report

    html, markdown = write_run_report(run.path)
    rows = [["run", text.shown_path(run.path)]]
    rows += [[name, text.shown_path(run.path / name)] for name in ("model", "critic", "samples.jsonl") if (run.path / name).exists()]
    rows += [["report", text.shown_path(html)], ["", text.shown_path(markdown)], ["repeat with", run.facts.get("reproduce", "")]]
    print(text.columns(rows))
