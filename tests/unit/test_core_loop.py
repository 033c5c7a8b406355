"""The run loop: numbers are logged, checkpoints come when they should, and every way to end is clean. The program here is a counter with noise."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from support import numbers
from telos.core import checkpoint
from telos.core import loop as loops
from telos.core import run as runs
from telos.core.config import StepsConfig
from telos.core.errors import Failure, TelosWarning
from telos.core.loop import Interrupted, NotFinite, run_program
from telos.core.run import Run
from telos.core.seeds import seed_everything


class Noise:
    """Adds random numbers of all three global generators to a sum: whatever is not restored shows in the next line."""

    def __init__(self) -> None:
        self.sum = torch.zeros(3)
        self.last_batch: Mapping[str, Any] = {}
        self.finished = 0
        self.steps: list[int] = []

    def step(self, index: int) -> dict[str, float]:
        self.steps.append(index)
        drawn = torch.tensor([random.random(), np.random.random(), float(torch.rand(()))])
        self.last_batch = {"drawn": drawn, "row": index}
        self.sum = self.sum + drawn
        return {"loss": float(drawn.sum()), "sum": float(self.sum.sum())}

    def state(self) -> dict[str, Any]:
        return {"sum": self.sum}

    def load(self, state: Mapping[str, Any]) -> None:
        self.sum = state["sum"]

    def finish(self, run: Run) -> None:
        self.finished += 1
        (run.path / "result.json").write_text(json.dumps(self.sum.tolist()), encoding="utf-8")


class Log:
    """A callback that writes down what it hears; `do[step]` is called at that step."""

    def __init__(self, do: Mapping[int, Any] | None = None) -> None:
        self.heard: list[Any] = []
        self.do = do or {}

    def started(self, run: Run, program: Any, first: int, total: int) -> None:
        self.heard.append(("started", first, total))

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        self.heard.append(step)
        self.do.get(step, lambda: None)()

    def ended(self, status: str) -> None:
        self.heard.append(status)


def start(folder: Path, *, do: Mapping[int, Any] | None = None, program: Noise | None = None, **options: Any) -> tuple[Run, Noise, Log]:
    config = StepsConfig(out=str(folder), **{"steps": 6, "checkpoint_every": 2, **options})
    run, program, log = Run.create("noise", config), program or Noise(), Log(do)
    seed_everything(1)
    run_program(program, run, config, callbacks=[log])
    return run, program, log


def go_on(folder: Path, **options: Any) -> tuple[Run, Noise, Log]:
    config = StepsConfig(out=str(folder), **{"steps": 6, "checkpoint_every": 2, **options})
    run, program, log = Run.open(folder), Noise(), Log()
    seed_everything(99)  # whatever the new process has drawn so far must not matter
    run_program(program, run, config, callbacks=[log], resume=True)
    return run, program, log


def stop() -> None:
    os.kill(os.getpid(), signal.SIGINT)


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


def result(run: Run) -> tuple[Any, Any]:
    return numbers(run), json.loads((run.path / "result.json").read_text(encoding="utf-8"))


def test_steps_checkpoints_and_callbacks_come_in_order(tmp_path: Path) -> None:
    run, program, log = start(tmp_path / "run", keep_checkpoints=10)
    assert program.steps == [0, 1, 2, 3, 4, 5]
    assert log.heard == [("started", 0, 6), 1, 2, 3, 4, 5, 6, "finished"]
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == ["step-00000002", "step-00000004", "step-00000006"]
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert run.facts["status"] == "finished"
    assert program.finished == 1


def test_fewer_lines_are_logged_on_request_but_always_the_last(tmp_path: Path) -> None:
    run, _, _ = start(tmp_path / "run", log_every=4)
    assert [row["step"] for row in run.metrics()] == [4, 6]


def test_without_checkpoints_on_the_way_there_is_one_at_the_end(tmp_path: Path) -> None:
    run, _, _ = start(tmp_path / "run", checkpoint_every=0)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000006"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_whole_step_with_a_checkpoint_of_it(tmp_path: Path, number: int) -> None:
    whole, _, _ = start(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=rf"stopped after step 3 of 6; continue with `telos resume {tmp_path / 'run'}`"):
        start(tmp_path / "run", do={3: lambda: os.kill(os.getpid(), number)})
    assert signal.getsignal(number) == before
    run = Run.open(tmp_path / "run")
    assert run.facts["status"] == "interrupted"
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert checkpoint.load(run.checkpoints)[0] == 3
    run, program, log = go_on(tmp_path / "run")
    assert program.steps == [3, 4, 5]
    assert log.heard[0] == ("started", 3, 6)
    assert result(run) == result(whole)


def test_a_signal_in_the_last_step_loses_nothing(tmp_path: Path) -> None:
    whole, _, _ = start(tmp_path / "whole")
    with pytest.raises(Interrupted, match="step 6 of 6"):
        start(tmp_path / "run", do={6: stop})
    run, program, _ = go_on(tmp_path / "run")
    assert (program.steps, program.finished) == ([], 1)
    assert result(run) == result(whole)


def test_the_second_signal_ends_the_process_as_it_would_without_us(tmp_path: Path) -> None:
    def twice() -> None:
        stop()
        time.sleep(0.05)  # two signals at once may arrive as one
        stop()

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", do={3: twice})
    assert Run.open(tmp_path / "run").facts["status"] == "failed"
    assert checkpoint.load(tmp_path / "run" / "checkpoints")[0] == 2


def test_after_a_kill_the_lines_past_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    whole, _, _ = start(tmp_path / "whole")
    with pytest.raises(Killed):
        start(tmp_path / "run", do={5: kill})
    run = Run.open(tmp_path / "run")
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5]
    with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "loss": 0.')  # a line that the kill cut
    run, program, _ = go_on(tmp_path / "run")
    assert program.steps == [4, 5]
    assert result(run) == result(whole)
    assert len((run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()) == 6


def test_a_run_killed_before_its_first_checkpoint_starts_again_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(tmp_path / "run", do={1: kill})
    with pytest.warns(TelosWarning, match="has no checkpoint yet: starting from step 0"):
        run, program, _ = go_on(tmp_path / "run")
    assert program.steps == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path) -> None:
    whole, _, _ = start(tmp_path / "whole")
    with pytest.raises(Killed):
        start(tmp_path / "run", do={5: kill})
    (tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").write_text("{", encoding="utf-8")
    with pytest.warns(TelosWarning, match="passed over a damaged checkpoint: .*step-00000004"):
        run, program, _ = go_on(tmp_path / "run")
    assert program.steps == [2, 3, 4, 5]
    assert result(run) == result(whole)
    assert "step-00000004" in run.warnings()[0]


def test_a_run_with_only_damaged_checkpoints_does_not_start_over_silently(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        start(tmp_path / "run", do={3: kill})
    (tmp_path / "run" / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    with pytest.raises(Failure, match="no whole checkpoint"):
        go_on(tmp_path / "run")
    assert [row["step"] for row in Run.open(tmp_path / "run").metrics()] == [1, 2, 3], "nothing already written is lost"


def test_a_kill_while_the_result_is_written_is_made_good_without_touching_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _, _ = start(tmp_path / "whole")
    program = Noise()
    monkeypatch.setattr(program, "finish", lambda run: kill())
    with pytest.raises(Killed):
        start(tmp_path / "run", program=program)
    saved = (tmp_path / "run" / "checkpoints" / "step-00000006").stat().st_mtime_ns
    run, _, _ = go_on(tmp_path / "run")
    assert result(run) == result(whole)
    assert (run.checkpoints / "step-00000006").stat().st_mtime_ns == saved, "a whole checkpoint is not replaced by itself"


class Bad(Noise):
    """Its fourth step gives `loss`, or raises it."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.bad = loss

    def step(self, index: int) -> dict[str, float]:
        found = super().step(index)
        if index == 3 and isinstance(self.bad, Exception):
            raise self.bad
        return found | ({"loss/critic": self.bad} if index == 3 else {})


@pytest.mark.parametrize("bad", [math.nan, math.inf, NotFinite("the gradient's norm is nan", {"drawn": torch.ones(3), "row": 3})])
def test_a_number_that_is_not_finite_stops_the_run_and_saves_the_batch(tmp_path: Path, bad: Any) -> None:
    program = Bad(bad)
    with pytest.raises(Failure, match=r"The batch is saved in .*not-finite\.safetensors") as caught:
        start(tmp_path / "run", program=program)
    assert caught.value.exit_code == 1
    assert not isinstance(caught.value, NotFinite)
    run = Run.open(tmp_path / "run")
    assert run.facts["status"] == "failed"
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    batch = load_file(run.path / "not-finite.safetensors")
    assert [tensor.tolist() for tensor in batch.values()] == [program.last_batch["drawn"].tolist()] or isinstance(bad, NotFinite)
    assert json.loads((run.path / "not-finite.json").read_text(encoding="utf-8"))["row"] == 3


def test_other_numbers_may_be_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Noise()
    monkeypatch.setattr(program, "step", lambda index: {"loss": 0.0, "rewards/mean": math.nan})
    run, _, _ = start(tmp_path / "run", program=program)
    assert math.isnan(run.metrics()[0]["rewards/mean"])


def test_an_error_of_the_program_is_handed_on_and_noted(tmp_path: Path) -> None:
    program, log = Bad(ZeroDivisionError("division by zero")), Log()
    config = StepsConfig(out=str(tmp_path / "run"), steps=6)
    run = Run.create("noise", config)
    with pytest.raises(ZeroDivisionError):
        run_program(program, run, config, callbacks=[log])
    assert run.facts["status"] == "failed"
    assert log.heard[-1] == "failed"


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["checkpoint", "metrics", "result"])
def test_a_disk_that_fills_up_is_one_clear_error_wherever_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    program = Noise()
    if place == "result":
        monkeypatch.setattr(program, "finish", full)

    def fill() -> None:
        # Once the disk is full, run.json cannot be written either.
        monkeypatch.setattr(runs, "write_atomically", full)
        if place == "checkpoint":
            monkeypatch.setattr(checkpoint, "save_file", full)
        if place == "metrics":
            monkeypatch.setattr(Run, "log", full)

    with pytest.raises(Failure, match="the disk is full") as caught:
        start(tmp_path / "run", program=program, do={3: fill})
    assert f"telos resume {tmp_path / 'run'}" in str(caught.value)
    assert checkpoint.load(tmp_path / "run" / "checkpoints")[0] == (6 if place == "result" else 2)
    assert [row["step"] for row in Run.open(tmp_path / "run").metrics()][:3] == [1, 2, 3]
    monkeypatch.undo()
    whole, _, _ = start(tmp_path / "whole")
    assert result(go_on(tmp_path / "run")[0]) == result(whole)


def test_a_batch_that_cannot_be_saved_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "write_atomically", full)
    with pytest.raises(Failure, match=r"loss/critic is nan\. The batch could not be saved"):
        start(tmp_path / "run", program=Bad(math.nan))
