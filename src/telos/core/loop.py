"""The run loop: steps a program, logs, checkpoints, and stops cleanly on Ctrl-C, on SIGTERM and on numbers that are not finite.

A *program* is one shape of training (the `_loop_*.py` files). It owns all that continues (`state`/`load`); the loop owns time. Because a program
draws all randomness from (seed, label, step), restoring its state and the process's generators continues the run bit for bit.
"""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, Protocol

from telos.core import checkpoint
from telos.core.config import RunConfig
from telos.core.errors import Failure, TelosError
from telos.core.run import Run, write_atomically


class Program(Protocol):
    """What the run loop drives. `step` is one optimiser step, or one iteration of sample and learn."""

    def step(self, index: int) -> dict[str, float]:
        """Does step `index` (from 0) and returns the numbers to log. Raises `NotFinite` before any weight is touched by bad numbers."""
        ...

    def state(self) -> Mapping[str, Any]:
        """Everything that continues: weights, optimiser, data cursor, normalisers, counters."""
        ...

    def load(self, state: Mapping[str, Any]) -> None: ...

    def finish(self, run: Run) -> None:
        """Writes what the run is for (the trained model) after the last step."""
        ...


class Callback(Protocol):
    """Watches a run; never changes it."""

    def started(self, run: Run, program: Program, first: int, total: int) -> None: ...

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def ended(self, status: str) -> None: ...


class NotFinite(Failure):
    """A loss, gradient or reward is NaN or infinite; `batch` holds what led to it (tensors and plain values)."""

    def __init__(self, message: str, batch: Mapping[str, Any]) -> None:
        self.batch = batch
        super().__init__(message)


class Interrupted(TelosError):
    """Stopped by Ctrl-C or SIGTERM after a whole step; a checkpoint was written."""

    exit_code = 1


class _Stop:
    """The first signal asks for a stop after the current step; a second one ends the process at once, as it would without us."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def run_program(program: Program, run: Run, config: RunConfig, *, callbacks: Sequence[Callback] = (), resume: bool = False) -> None:
    """Runs `program` to the end; with `resume`, from its newest whole checkpoint.

    Raises `Interrupted` after a signal, `NotFinite` with the batch saved beside the run, and whatever the program raises; in each case
    `run.json` says how it ended and nothing already written is lost.
    """
    first = 0
    if resume:
        if checkpoint.newest(run.checkpoints) is None and not any(run.checkpoints.glob("step-*")):
            run.warn(f"{run.path} has no checkpoint yet: starting from step 0")
        else:
            first, state, faults = checkpoint.load(run.checkpoints)
            for fault in faults:
                run.warn(f"passed over a damaged checkpoint: {fault}")
            program.load(state["program"])
            checkpoint.restore_random_states(state["random"])
        run.rewind(first)
    for callback in callbacks:
        callback.started(run, program, first, config.program_steps)
    status = "failed"

    def save(step: int) -> None:
        checkpoint.save(
            run.checkpoints, step, {"program": dict(program.state()), "random": checkpoint.random_states()}, config.keep_checkpoints
        )

    try:
        run.describe(status="running", steps=config.program_steps)
        with _Stop() as stop:
            for index in range(first, config.program_steps):
                began = time.perf_counter()
                metrics = program.step(index)
                done = index + 1
                if bad := [name for name, value in metrics.items() if name.startswith("loss") and not math.isfinite(value)]:
                    raise NotFinite(f"step {done}: {bad[0]} is {metrics[bad[0]]}", getattr(program, "last_batch", {}))
                if done % config.log_every == 0 or done == config.program_steps:
                    run.log(done, {**metrics, "time/seconds": round(time.perf_counter() - began, 4)})
                for callback in callbacks:
                    callback.stepped(done, metrics)
                if stop.asked:
                    save(done)
                    status = "interrupted"
                    raise Interrupted(f"stopped after step {done} of {config.program_steps}; continue with `telos resume {run.path}`")
                if config.checkpoint_every and done % config.checkpoint_every == 0 and done < config.program_steps:
                    save(done)
            if first < config.program_steps:
                save(config.program_steps)
            program.finish(run)
        status = "finished"
    except NotFinite as error:
        raise Failure(
            f"{error}. {_save_batch(run, error.batch)}; a lower --learning_rate or a look at that batch is the usual remedy"
        ) from error
    except Exception as error:
        if isinstance(error, TelosError) or not checkpoint.disk_full(error):
            raise
        raise Failure(f"the disk is full: {error}. Free space, then `telos resume {run.path}`") from error
    finally:
        with contextlib.suppress(OSError):  # on a full disk the error on its way says more
            run.describe(status=status, ended=time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        with contextlib.suppress(OSError):
            run.close()
        for callback in callbacks:
            callback.ended(status)


def _save_batch(run: Run, batch: Mapping[str, Any]) -> str:
    import json

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    structure, tensors = checkpoint.pack(dict(batch))
    place = run.path / "not-finite.safetensors"
    try:
        save_file(tensors, place)
        write_atomically(run.path / "not-finite.json", json.dumps(structure))
    except (OSError, SafetensorError) as error:
        return f"The batch could not be saved in {place} ({error})"
    return f"The batch is saved in {place}"
