"""Times a case side by side: ours, the peer and the physical limit in turn, on the same model, data, batches and threads.

Nothing is imported here but the standard library: each side runs in its own process and virtual environment (see `worker`). The ratio of
a pair is the peer's time over ours for the same steps; the record holds its median, least and greatest over the pairs. The share of the
limit is the time of the matrix products that the method cannot avoid, over ours.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "records"
PEERS = HERE / ".venv-peers" / "bin" / "python"
SIDES = ("ours", "peer", "limit")


class Side:
    """A worker process and the pipe to it."""

    def __init__(self, case: str, side: str, settings: dict[str, Any]) -> None:
        self.side = side
        self.log = Path(settings["folder"]) / f"{side}.log"
        python = PEERS if side == "peer" else Path(sys.executable)
        if not python.exists():
            raise SystemExit(f"{python} is missing: make it with `make bench-peers`")
        threads = str(settings["threads"])
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
        environment = os.environ | quiet | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, HERE / "worker.py", case, side],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        self._send(settings)

    def _send(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The worker's next line. Raises `SystemExit` with the end of its log when it has failed."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        message = json.loads(line) if line else {"error": "it ended without a word"}
        if "error" in message:
            tail = "".join(self.log.read_text(errors="replace").splitlines(keepends=True)[-15:])
            raise SystemExit(f"{self.side} failed: {message['error']}\n{tail}")
        return message

    def measure(self, steps: int) -> dict[str, Any]:
        self._send({"steps": steps})
        return self.answer()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._send({"stop": True})
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextlib.contextmanager
def sides(case: str, settings: dict[str, Any]) -> Iterator[dict[str, Side]]:
    """The three workers of a case, ready before their first step; the model folder and the data are made first."""
    maker = Side(case, "prepare", settings)
    maker.answer()
    maker.close()
    started: dict[str, Side] = {}
    try:
        for side in SIDES:
            started[side] = Side(case, side, settings)
        yield started
    finally:
        for side in started.values():
            side.close()


def run(case: str, pairs: int, threads: int, steps: int | None = None, warmup: int | None = None) -> dict[str, Any]:
    """Times `pairs` pairs of `steps` steps (default: the case's own number) after `warmup` steps on each side, and returns the record."""
    module = importlib.import_module(f"cases.{case.replace('-', '_')}")
    steps, warmup = int(steps or module.STEPS), int(warmup or module.WARMUP)
    with tempfile.TemporaryDirectory(prefix="telos-bench-") as folder:
        settings = {**module.SETTINGS, "folder": folder, "threads": threads, "total_steps": warmup + pairs * steps}
        with sides(case, settings) as started:
            first = {side: worker.measure(warmup) for side, worker in started.items()}
            rounds: list[dict[str, float]] = []
            processor: list[dict[str, float]] = []
            last: dict[str, dict[str, Any]] = {}
            for index in range(pairs):
                last = {side: worker.measure(steps) for side, worker in started.items()}
                rounds.append({side: answer["seconds"] / steps for side, answer in last.items()})
                processor.append({side: answer["cpu_seconds"] / steps for side, answer in last.items()})
                figures = (f"{side} {1000 * rounds[-1][side]:.1f} ms a step (CPU {1000 * processor[-1][side]:.1f})" for side in SIDES)
                print(f"pair {index + 1}/{pairs}: " + ", ".join(figures), flush=True)
    record = _record(module, rounds, first, last)
    extra = module.compare(first["ours"], first["peer"])
    asked = {name: value for name, value in settings.items() if name != "folder"} | {"steps_a_measurement": steps, "warmup_steps": warmup}
    facts = first["ours"]["facts"]
    return {
        "case": case,
        **record,
        **extra,
        "commit": facts["commit"],
        "machine": facts["machine"],
        "threads": threads,
        "pairs": pairs,
        "settings": {"case": asked, "ours": facts["settings"], "peer": first["peer"]["facts"]["settings"], "versions": _versions(first)},
        "seconds_a_step": rounds,
        "cpu_seconds_a_step": processor,
    }


def _record(module: Any, rounds: list[dict[str, float]], first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    ratios = [r["peer"] / r["ours"] for r in rounds]
    return {
        "peer": {"name": module.PEER, "version": first["peer"]["facts"]["versions"][module.PEER]},
        "ratio": _spread(ratios),
        "limit_share": round(statistics.median(r["limit"] / r["ours"] for r in rounds), 3),
        "ours": _absolute(module, rounds, "ours"),
        "peer_absolute": _absolute(module, rounds, "peer"),
        "limit_absolute": _absolute(module, rounds, "limit"),
        "peak_memory": {side: last[side]["peak_memory_mib"] for side in ("ours", "peer")},
    }


def _versions(first: dict[str, Any]) -> dict[str, Any]:
    return {side: first[side]["facts"]["versions"] for side in ("ours", "peer")}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


def _absolute(module: Any, rounds: list[dict[str, float]], side: str) -> dict[str, float]:
    seconds = statistics.median(r[side] for r in rounds)
    return {"seconds_a_step": round(seconds, 5), f"{module.UNIT}_a_second": round(module.UNITS_A_STEP / seconds, 2)}


def write(record: dict[str, Any]) -> Path:
    """Writes the record in place of the case's older one."""
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{record['case']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
