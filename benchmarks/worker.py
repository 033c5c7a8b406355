"""One side of a benchmark in a process of its own: ours, the peer or the limit, kept alive between measurements.

    python worker.py CASE SIDE          (started by harness.py; talks JSON lines over stdin and stdout)

The first line in is the settings. Then `{"steps": n}` lets the side run n more steps and is answered by their seconds; `{"stop": true}`
ends it. Between two commands the side stands still inside its own training loop, in the gate that it passes at the end of each step; so
what is timed is the real program, with everything it does between steps, and two sides can take turns on one machine.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _memory(field: str) -> float | None:
    """MiB of a line of /proc/self/status (`VmRSS` now, `VmHWM` at its peak); None where the system has no such file."""
    if not _STATUS.exists():
        return None
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return None


class Gate:
    """Where a side waits after each of its steps until the harness lets it go on."""

    def __init__(self, commands: TextIO, answers: TextIO) -> None:
        self._commands, self._answers = commands, answers
        self.facts: dict[str, Any] = {}  # versions and settings, for the record
        self._values: list[float] = []
        self._before: float | None = None
        self._left = 0
        self._began = 0.0
        self._cpu = 0.0

    def begin(self) -> None:
        """Called once, when the libraries are imported and nothing is loaded: memory is counted from here."""
        if _CLEAR.exists():
            _CLEAR.write_text("5")  # the peak starts anew
        self._before = _memory("VmRSS")
        self._wait()

    def step(self, value: float = 0.0) -> None:
        """Called at the end of each step; `value` is a number of the step (its loss) that the record compares."""
        self._values.append(value)
        self._left -= 1
        if self._left == 0:
            seconds, cpu, peak = time.perf_counter() - self._began, time.process_time() - self._cpu, _memory("VmHWM")
            grown = None if peak is None or self._before is None else round(peak - self._before, 1)
            self.answer({"seconds": seconds, "cpu_seconds": cpu, "values": self._values, "peak_memory_mib": grown, "facts": self.facts})
            self._wait()

    def answer(self, message: dict[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()

    def _wait(self) -> None:
        command = json.loads(self._commands.readline() or '{"stop": true}')
        if command.get("stop"):
            os._exit(0)  # the loop is in the middle of a run that nobody needs to see ended
        self._left, self._values = command["steps"], []
        self._began, self._cpu = time.perf_counter(), time.process_time()


def main() -> None:
    case, side = sys.argv[1:]
    # The libraries print to stdout; the protocol keeps the original for itself.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gate = Gate(sys.stdin, answers)
    settings = json.loads(sys.stdin.readline())
    try:
        module = importlib.import_module(f"cases.{case.replace('-', '_')}")
        getattr(module, side)(settings, gate)
        gate.answer({"done": True})
    except BaseException:
        gate.answer({"error": traceback.format_exc()})
        raise


if __name__ == "__main__":
    main()
