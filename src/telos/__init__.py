"""Telos: from what is wanted to behaviour, with an honest report.

run = telos.train("simpo", model="path/or/hub-id", data="pairs.jsonl", beta=2.0)
model = telos.load(run.path)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from telos.core.run import Run

__version__ = "0.1.0"
__all__ = ["load", "resume", "train"]


def train(method: str, **options: Any) -> Run:
    """Trains `method` with the same options as `telos train METHOD`; returns the run, whose `path` holds everything it wrote. Functions and classes
    (`reward=my_reward`, `env=MyEnvironment`) may be given as such where a file defines them at its top.

    Raises `telos.core.errors.UsageError` for unknown or unfit options and `Failure` for what breaks while it runs.
    """
    from telos.core.naming import named, refuse_while_importing

    refuse_while_importing()
    from telos.algorithms.run import train as start

    return start(method, {name: named(name, value) for name, value in options.items()})


def resume(path: str | Path) -> Run:
    """Continues an interrupted run bit for bit."""
    from telos.algorithms.run import resume as continue_run

    return continue_run(path)


def load(path: str | Path) -> Any:
    """What a run has trained: a `LanguageModel`, a `RewardModel` for runs that train one, a `Policy` for runs in an environment."""
    from telos.algorithms.results import load_result

    return load_result(Path(path))
