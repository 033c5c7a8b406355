"""`telos`: the commands, their arguments, and how they end.

Exit codes: 0 done, 1 something broke (`Failure`, an interruption), 2 the request was wrong (`UsageError`). Errors are one line on standard error;
`--debug` anywhere shows the traceback. This module imports nothing heavy; a command's module is imported when the command is called.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, TextIO

from telos.core.errors import TelosError, TelosWarning, UsageError, did_you_mean

_EXAMPLES = """examples:
  telos quickstart                                        the whole path on bundled data, with a report
  telos list --family direct-alignment --status ready     what there is
  telos show dpo                                          paper, files, options, claim
  telos data make review --kind pairs --n 1000 --out pairs.jsonl
  telos train dpo --data pairs.jsonl --steps 200          any Hugging Face folder by --model
  telos report runs/RUN                                   curves and figures as one HTML page

`telos COMMAND --help` tells more. Errors name what to do; --debug adds the traceback."""


class _Parser(argparse.ArgumentParser):
    """Refuses what it does not know with a suggestion, as a `UsageError`, and never guesses from abbreviations."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **arguments})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args([self._underscored(word) for word in args or ()], namespace)
        if rest:
            word = rest[0].partition("=")[0]
            if not word.startswith("-"):
                raise UsageError(f"unexpected word {word!r}; see `{self.prog} --help`")
            hint = did_you_mean(word, [option for option in self._option_string_actions if option.startswith("--")])
            raise UsageError(f"unknown option {word}{hint}; see `{self.prog} --help`")
        return found, rest

    def _underscored(self, word: str) -> str:
        """`--label-temperature=1` as `--label_temperature=1`: hyphens and underscores are the same in the names of our options."""
        name, equals, value = word.partition("=")
        plain = "--" + name[2:].replace("-", "_")
        return plain + equals + value if name.startswith("--") and plain in self._option_string_actions else word

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        named = "/".join(action.option_strings) or action.metavar or action.dest
        raise UsageError(f"{named}: there is no {value!r}{did_you_mean(str(value), known)}; one of {', '.join(known)}")


def _command(commands: Any, name: str, target: str, help: str, **arguments: Any) -> _Parser:
    """A command carried out by `target`, "module:function" below `telos.cli`."""
    parser = commands.add_parser(name, help=help, description=arguments.pop("description", help), **arguments)
    parser.set_defaults(target=target)
    return parser


def _watched(parser: _Parser, seed: bool = False) -> None:
    """Options of commands that take long."""
    if seed:
        parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress")


def build_parser() -> argparse.ArgumentParser:
    from telos import __version__

    top = _Parser(prog="telos", description="From what is wanted to behaviour, with an honest report.", epilog=_EXAMPLES)
    top.add_argument("--version", action="version", version=f"telos {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error (may stand anywhere)")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    add = _command(
        commands, "quickstart", "catalogue_commands:quickstart", "align the bundled model on real text, with a report at the end"
    )
    add.add_argument("--out", default="runs/quickstart", help="folder (default: %(default)s)")
    add.add_argument("--fresh", action="store_true", help="start a new one beside the one that the folder holds")
    _watched(add, seed=True)

    add = _command(commands, "list", "catalogue_commands:list_systems", "list the systems with their status")
    add.add_argument("--family", help="only this family")
    add.add_argument("--status", help="only this status: planned, ready, supported, 'not supported', inconclusive")
    add.add_argument("--methods", action="store_true", help="also the baseline methods that are no system")
    add.add_argument("--json", action="store_true", help="as JSON")

    add = _command(commands, "where", "catalogue_commands:where", "say in which files a method or system is")
    add.add_argument("name", metavar="NAME", help="key, alias, title or number (S136)")

    add = _command(commands, "show", "catalogue_commands:show", "show a method or system: paper, files, options, claim")
    add.add_argument("key", metavar="KEY", help="key, alias, title or number (S136)")

    # `train` parses its own options (they come from the method) before this parser sees them; here it stands for the list of commands.
    _command(commands, "train", "", "train a method on your model and data, or on a bundled testbed", add_help=False)

    add = _command(commands, "resume", "train:resume", "continue an interrupted run bit for bit")
    add.add_argument("run", metavar="RUN", help="the run's folder, or a quickstart's")
    _watched(add)

    add = _command(commands, "report", "reports:report", "write the report of a run into its folder")
    add.add_argument("run", metavar="RUN", help="the run's folder")

    add = _command(commands, "compare", "reports:compare", "compare runs: final figures and differing options")
    add.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    add.add_argument("--metric", action="append", help="only this metric (may be given several times)")
    add.add_argument("--out", metavar="FOLDER", help="also write a report with the curves laid over each other")

    _add_leash(commands)

    add = _command(commands, "leaderboard", "leaderboard:leaderboard", "rank methods over tasks from records of their scores")
    add.add_argument("sources", metavar="RECORD", nargs="+", help="records (JSON), or folders that hold some (*.score.json)")
    add.add_argument("--metric", action="append", help="metric of the tables, several times if wanted; 'all' for every one (default: gold)")
    add.add_argument(
        "--out", metavar="FILE.md", help="where to write the tables (default: leaderboard.md in the folder, when one folder is named)"
    )

    _add_data(commands)

    add = _command(commands, "annotate", "annotate:annotate", "compare answers for a run that waits for a human (--judge human:FOLDER)")
    add.add_argument("folder", metavar="FOLDER", help="the folder that the run's --judge names")

    add = _command(commands, "run", "catalogue_commands:run", "run a system's recipe")
    add.add_argument("key", metavar="KEY", help="key or number of a system")
    add.add_argument("--budget", choices=("smoke", "full"), default="full", help="smoke only shows that it runs (default: full)")
    add.add_argument("--out", metavar="FOLDER", help="default: runs/KEY-BUDGET-SEED; an interrupted run there is continued")
    _watched(add, seed=True)

    _add_claims(commands)

    add = _command(commands, "docs", "catalogue_commands:docs", "write the generated tables of the documentation")
    add.add_argument("--check", action="store_true", help="write nothing; exit 1 when a table differs")
    return top


def _add_leash(commands: Any) -> None:
    from telos.cli.leash import add_options

    add = _command(commands, "leash", "leash:leash", "compare what two models can find: pass@k, support and entropies of many answers")
    add_options(add)
    _watched(add, seed=True)


def _add_data(commands: Any) -> None:
    from telos.environments.text.base import TESTBEDS

    data = _command(commands, "data", "", "make data from a testbed, or inspect a data set")
    actions = data.add_subparsers(dest="action", metavar="ACTION", parser_class=_Parser, required=True)
    add = _command(actions, "make", "data:make", "write rows of a bundled testbed, or data of control")
    add.add_argument("testbed", metavar="TESTBED", help=f"one of {', '.join(TESTBEDS)}, or data of control such as cartpole-medium")
    add.add_argument("--kind", choices=("prompts", "sft", "pairs", "corpus"), help="what each row of a testbed holds")
    add.add_argument("--n", type=int, help="rows of a testbed")
    add.add_argument("--out", required=True, metavar="PLACE", help="where to write: FILE.jsonl, or a folder for data of control")
    add.add_argument("--split", choices=("train", "validation", "test"), default="train", help="part of the testbed (default: train)")
    add.add_argument("--force", action="store_true", help="replace an existing file")
    _watched(add, seed=True)
    pairs = add.add_argument_group("for --kind pairs", "two answers to each prompt, labelled by the testbed's gold judge with noise")
    pairs.add_argument("--model", help="what answers: a Hugging Face folder or hub id (default: tinylm)")
    pairs.add_argument("--temperature", type=float, help="of sampling, > 0 (default: 1)")
    pairs.add_argument(
        "--label_temperature", type=float, help="Bradley-Terry noise of the labels, in units of gold score; 0 = none (default: 0.1)"
    )
    pairs.add_argument("--noise", type=float, help="probability that a label is turned, 0 to 0.5 (default: 0)")
    pairs.add_argument("--with_gold", action="store_true", help="write the gold scores into the rows; never train on such a file")
    pairs.add_argument("--threads", type=int, help="CPU threads; 0 = as many as there are cores (default: 0)")
    control = add.add_argument_group("for data of control", "TASK-KIND, such as hopper-medium-replay or pointmaze-play, as a Minari folder")
    control.add_argument("--steps", type=int, help="environment steps that the behaviour run learns for (default: the task's)")
    control.add_argument("--size", type=int, help="steps of the data, where they are no replay (default: the task's)")
    control.add_argument("--behaviour", metavar="RUN", help="behaviour/ of data made before, of the same environment")
    add = _command(actions, "inspect", "data:inspect", "describe a data set: format, bad rows, lengths, repetitions")
    add.add_argument("source", metavar="SOURCE", help="file, folder, hub id, or a bundled testbed")
    add.add_argument("--reference", metavar="DATA", help="data of control that coverage refers to: the full replay")
    add.add_argument("--tokenizer", default="tinylm", help="folder or hub id whose tokens are counted (default: tinylm)")


def _add_claims(commands: Any) -> None:
    claims = _command(commands, "claims", "", "run claims, or show what has been decided")
    actions = claims.add_subparsers(dest="action", metavar="ACTION", parser_class=_Parser, required=True)
    add = _command(actions, "run", "catalogue_commands:claims_run", "run a system's claim and write its record")
    add.add_argument("key", metavar="KEY", help="key or number of a system")
    add.add_argument("--budget", choices=("smoke", "full"), default="full", help="only a full run decides (default: full)")
    _watched(add)
    add = _command(actions, "table", "catalogue_commands:claims_table", "show the table of recorded verdicts")
    add.add_argument("--check", action="store_true", help="also exit 1 when the generated documentation differs from the records")


def main(argv: Sequence[str] | None = None) -> int:
    """Carries out one command and returns its exit code; everything it has to say is printed."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    # Nothing leaves the machine unasked: the hub's client reports usage unless told not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        with _notes():
            code = _dispatch(words)
        sys.stdout.flush()
        return code
    except SystemExit as end:  # --help and --version of argparse
        return end.code if isinstance(end.code, int) else 0
    except BrokenPipeError:
        # Whoever read us has gone. What is still buffered must not raise again while the interpreter ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException as error:
        if debug:
            raise
        return _say(error)


def _say(error: BaseException) -> int:
    """The one line for an error, and its exit code."""
    code = 1
    if isinstance(error, TelosError):
        code, message = error.exit_code, str(error)
    elif isinstance(error, KeyboardInterrupt):
        message = "interrupted"
    elif isinstance(error, OSError):
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    else:
        message = f"{type(error).__name__}: {error}; this is a defect of Telos or of what it was given; --debug shows where"
    with contextlib.suppress(OSError, ValueError):
        print("telos: error: " + " ".join(message.split("\n")), file=sys.stderr, flush=True)
    return code


def _dispatch(words: list[str]) -> int:
    if words and words[0] == "train":
        from telos.cli.train import train

        return train(words[1:])
    parser = build_parser()
    if not words:
        parser.print_help()
        return 2
    arguments = parser.parse_args(words)
    if not getattr(arguments, "target", ""):
        parser.print_help()
        return 2
    module, _, function = arguments.target.partition(":")
    return getattr(importlib.import_module(f"telos.cli.{module}"), function)(arguments) or 0


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Shows each `TelosWarning` as one line; other warnings as Python shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", TelosWarning)
        default = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
        ) -> None:
            if issubclass(category, TelosWarning):
                print(f"telos: note: {message}", file=sys.stderr, flush=True)
            else:
                default(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


if __name__ == "__main__":
    raise SystemExit(main())
