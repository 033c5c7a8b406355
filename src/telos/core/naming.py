"""Functions and classes that are handed over in Python, by name: so that the process which calls them and a run that is resumed find them again."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from telos.core.errors import UsageError

IMPORTING = "TELOS_IMPORTING"  # set while a user's file is imported for what it defines


def named(option: str, value: Any) -> Any:
    """`value` with each function or class in it as `file.py:name`, or as `package.module:name` where it is part of a package. Everything else is left as it is.

    Raises `UsageError` for what has no name of its own: a lambda, something defined inside a function or a notebook, an instance, a partial.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(named(option, part) for part in value)
    if not callable(value):
        return value
    what = f"{option}={getattr(value, '__qualname__', type(value).__name__)}"
    if not (inspect.isfunction(value) or inspect.isclass(value)) or "<" in value.__qualname__:
        raise UsageError(
            f"{what} cannot be found again by another process: give a function or class that a file defines at its top, or file.py:name"
        )
    if "." in value.__module__:
        return f"{value.__module__}:{value.__qualname__}"
    try:
        path = Path(inspect.getsourcefile(value) or "")
    except (TypeError, OSError):
        path = Path()
    if path.suffix != ".py" or not path.is_file():
        raise UsageError(f"{what} stands in no file: write it into one, so that another process and a resumed run find it")
    return f"{path}:{value.__qualname__}"


@contextlib.contextmanager
def importing(target: str) -> Iterator[None]:
    """While a user's file is imported for what it defines, training that it starts is refused (`refuse_while_importing`)."""
    before = os.environ.get(IMPORTING)
    os.environ[IMPORTING] = target
    try:
        yield
    finally:
        os.environ.pop(IMPORTING, None)
        if before is not None:
            os.environ[IMPORTING] = before


def refuse_while_importing() -> None:
    """Raises `UsageError` where a file that is imported for its functions would start training."""
    if target := os.environ.get(IMPORTING):
        raise UsageError(
            f'{target} starts training when it is imported for what it defines: put the call under `if __name__ == "__main__":`'
        )
