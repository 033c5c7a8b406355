"""`telos data make` and `telos data inspect` for data of control: datasets of steps."""

from __future__ import annotations

from argparse import Namespace

from telos.cli import text
from telos.core.errors import UsageError

_OF_TEXT = ("kind", "n", "force", "model", "temperature", "label_temperature", "noise", "with_gold", "threads")


def make(arguments: Namespace) -> int:
    """A Minari folder."""
    from telos.catalogue.step_data import described, make_data
    from telos.cli.progress import Watch

    for name in _OF_TEXT:
        if getattr(arguments, name) not in (None, False):
            raise UsageError(f"--{name} has no effect on data of control ({arguments.testbed})")
    if arguments.split != "train":
        raise UsageError(f"--split has no effect on data of control ({arguments.testbed})")
    folder = make_data(
        arguments.testbed,
        arguments.out,
        steps=arguments.steps,
        size=arguments.size,
        seed=arguments.seed,
        behaviour=arguments.behaviour,
        callbacks=Watch(quiet=arguments.quiet).callbacks(f"behaviour of {arguments.testbed}"),
    )
    print(text.columns([["data", text.shown_path(folder)], *described(folder)], width=text.terminal_width()))
    return 0


def inspect(arguments: Namespace) -> int:
    from telos.data.step_inspection import inspect_steps
    from telos.data.step_readers import read_steps
    from telos.evaluation.normalised import reference_of

    steps = read_steps(arguments.source)
    known = reference_of(steps.env, steps.provenance)
    found = inspect_steps(
        steps,
        returns=None if known is None else (known.random, known.expert),
        reference=None if arguments.reference is None else read_steps(arguments.reference),
    )
    print(text.columns(found.rows(), width=text.terminal_width()))
    return 0
