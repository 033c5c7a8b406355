"""Writes the documentation that can be derived: tables of methods, systems, options, claims and benchmarks, and the README's list of methods.

Nothing here is kept by hand, so it cannot rot: `telos docs` writes the files, `telos docs --check` fails when a committed one differs. The text depends on
the source files and records alone (no clock, no machine), so two people get the same bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from telos.core.errors import UsageError
from telos.core.run import write_atomically

_ROOT = Path(__file__).parents[3]
_HEAD = "<!-- Written by `telos docs` from the source; edits here are lost. -->"
_BEGIN, _END = "<!-- methods -->", "<!-- /methods -->"


def main(check: bool = False, root: Path = _ROOT) -> int:
    """Writes what differs and names it; with `check`, writes nothing and returns 1 when something differs.

    Raises `UsageError` outside a checkout, or when the README has lost its markers.
    """
    if not (root / "README.md").is_file() or not (root / "pyproject.toml").is_file():
        raise UsageError(f"telos docs works in a checkout of Telos, and {root} is none")
    stale = [path for path, text in rendered(root).items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    names = ", ".join(str(path.relative_to(root)) for path in stale)
    if check and stale:
        print(f"generated documentation is out of date: {names}; run `telos docs` and commit the result", file=sys.stderr)
        return 1
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, texts[path])
    print(f"documentation written: {names}" if stale else "generated documentation is up to date")
    return 0
