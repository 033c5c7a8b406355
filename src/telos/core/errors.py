"""The two ways in which a command ends badly, and the text that the user reads.

A message names the file, row or option, and says what to do. `UsageError` ends a command with exit code 2 (the user's
words, files or options are wrong and nothing was started); `Failure` with 1 (something broke while it ran). Neither shows a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TelosError(Exception):
    """Base of every error that Telos raises on purpose; the message is written for the user."""

    exit_code = 1


class UsageError(TelosError):
    """The request cannot be carried out as written: unknown option, bad file, wrong type."""

    exit_code = 2


class Failure(TelosError):
    """Something broke while a sound request was carried out: NaN, full disk, a reward function that raises."""

    exit_code = 1


class DataError(UsageError):
    """A data file or row cannot be used. `place` is "file:line" or "file, row 7"."""

    def __init__(self, place: str, problem: str, remedy: str = "") -> None:
        self.place = place
        super().__init__(f"{place}: {problem}" + (f". {remedy}" if remedy else ""))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' for the closest of `known`, or '' when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


class TelosWarning(UserWarning):
    """Something the user should know and that does not stop the run; also written to the run's `warnings.log`."""
