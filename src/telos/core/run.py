"""A run's folder: what was asked for, with what it was done, what came out. Everything needed to repeat the run is in `run.json`.

config.yaml        every option, resolved
run.json           method, command, versions, hardware, commit, status
metrics.jsonl      one line of numbers a logged step
checkpoints/       see `core.checkpoint`
warnings.log       what the user should know and that did not stop the run
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from telos.core import config as configs
from telos.core.errors import TelosWarning, UsageError

_PACKAGES = ("telos", "torch", "transformers", "tokenizers", "tensordict", "peft", "safetensors", "datasets", "numpy")


def write_atomically(path: Path, text: str) -> None:
    """The file is either the old one or the new one, whole, whenever the process dies."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    model = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(psutil.virtual_memory().total / 2**30, 1), "gpus": gpus}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def commit() -> str | None:
    """The commit of the Telos checkout that runs, '+' appended when files differ from it; None when it is installed from a package."""
    root = Path(__file__).parent
    try:
        # An installed package may lie in a folder of somebody else's repository.
        ours = subprocess.run(["git", "-C", root, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, timeout=10)
        if ours.returncode:
            return None
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changed = subprocess.run(["git", "-C", root, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else None


def _holds(file: Path, config: configs.RunConfig) -> bool:
    try:
        return configs.from_mapping(type(config), configs.read_yaml(file)) == config
    except UsageError:
        return False


class JsonLines:
    """A file of JSON lines that a run adds to. `written` is the count of bytes that belong to finished steps: it goes into the checkpoint, and what a
    killed run wrote after it is written over."""

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, 0

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        with self.path.open("ab") as file:
            file.truncate(self.written)
            file.seek(self.written)
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            self.written = file.tell()


_OURS = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "stepwise.jsonl",
    "rewards.jsonl",
    "warnings.log",
    "checkpoints",
    "model",
    "critic",
)


class Run:
    """One run's folder, new or reopened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = None

    @classmethod
    def create(cls, method: str, config: configs.RunConfig) -> Run:
        """Makes the folder. Raises `UsageError` when it already holds a run or files of the names a run writes: nothing is ever overwritten."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = Path(config.out) if config.out else Path("runs") / f"{method}-{stamp}-{uuid.uuid4().hex[:4]}"
        if (path / "run.json").exists():
            raise UsageError(f"--out {path} already holds a run; continue it with `telos resume {path}`, or name another folder")
        if taken := [name for name in _OURS if (path / name).exists() and not (name == "config.yaml" and _holds(path / name, config))]:
            raise UsageError(f"--out {path} holds {taken[0]}, which the run would overwrite; name another folder")
        facts = {
            "method": method,
            "status": "running",
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "reproduce": f"telos train {method} --config {shlex.quote(str(path / 'config.yaml'))} --out NEW_FOLDER",
            "versions": versions(),
            "hardware": hardware(),
            "commit": commit(),
        }
        run = cls(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            # `run.json` makes it a run and comes last; after a kill between the two the same command starts again.
            configs.write_yaml(path / "config.yaml", configs.to_mapping(config))
            run.describe(**facts)
        except OSError as error:
            run.discard()
            raise UsageError(f"--out {path}: cannot be written: {error.strerror or error}") from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Reopens a run's folder. Raises `UsageError` when there is none."""
        path = Path(path)
        if not (path / "run.json").is_file():
            raise UsageError(f"{path} is not a run's folder (it has no run.json)")
        run = cls(path)
        try:
            run.facts["method"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path / 'run.json'} is damaged: it is not the description of a run") from None
        return run

    @property
    def facts(self) -> dict[str, Any]:
        file = self.path / "run.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def describe(self, **facts: Any) -> None:
        """Adds facts to `run.json`."""
        write_atomically(self.path / "run.json", json.dumps(self.facts | facts, indent=1) + "\n")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line of numbers; written through at once, so that a kill loses none."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self._metrics.flush()

    def metrics(self) -> list[dict[str, float]]:
        """Every logged line that is whole."""
        rows = []
        for line in _lines(str(self.path / "metrics.jsonl")):
            try:
                rows.append(json.loads(line))
            except ValueError:  # the last line of a killed run may be cut
                continue
        return rows

    def rewind(self, step: int) -> None:
        """Forgets the lines after `step`: a resumed run writes them again."""
        kept = [json.dumps(row) for row in self.metrics() if row["step"] <= step]
        write_atomically(self.path / "metrics.jsonl", "".join(line + "\n" for line in kept))

    def warn(self, message: str) -> None:
        """Tells the user on the terminal and in `warnings.log`."""
        with (self.path / "warnings.log").open("a", encoding="utf-8") as file:
            file.write(message + "\n")
        warnings.warn(message, TelosWarning, stacklevel=2)

    def warnings(self) -> list[str]:
        return _lines(str(self.path / "warnings.log"))

    def discard(self) -> None:
        """Removes what `create` wrote, when the run could not be started at all."""
        with contextlib.suppress(OSError):  # the user's own files may be in the folder, or it could not be made
            for name in ("config.yaml", "run.json", "warnings.log"):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
