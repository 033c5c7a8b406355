"""The command line as a process of its own: readers that go away, full disks, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from telos.cli.data import write_jsonl
from telos.cli.main import main
from telos.core.errors import Failure

TELOS = [sys.executable, "-m", "telos"]


def test_a_module_run_is_the_same_command_and_ends_with_its_exit_code():
    done = subprocess.run([*TELOS, "lst"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("telos: error: COMMAND: there is no 'lst' (did you mean 'list'?)")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_has_gone_away_causes_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*TELOS, "list"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_under_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*TELOS, "list"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "telos: error: No space left on device\n"


def test_debug_shows_the_traceback():
    done = subprocess.run([*TELOS, "--debug", "where", "nothing-like-it"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "UsageError: no system or method is called" in done.stderr


def test_rows_that_cannot_be_written_leave_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")

    def rows() -> Any:
        yield {"prompt": "a"}
        raise OSError(28, "No space left on device")

    with pytest.raises(Failure, match=r"rows\.jsonl: the disk is full; nothing was written"):
        write_jsonl(path, rows())
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(Failure, match="cannot write"):
        write_jsonl(path / "below-a-file.jsonl", [])


def test_ctrl_c_stops_a_training_after_a_whole_step_and_resume_finishes_it(world, tmp_path, capsys):
    out = tmp_path / "run"
    words = ["--model", world.model, "--data", world.data["prompt-completion"], "--batch_size", "4", "--threads", "1", "--device", "cpu"]
    process = subprocess.Popen([*TELOS, "train", "sft", *words, "--steps", "100000", "--out", str(out)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size < 200:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    steps = len((out / "metrics.jsonl").read_text().splitlines())
    assert said.splitlines()[-1] == f"telos: error: stopped after step {steps} of 100000; continue with `telos resume {out}`"
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    # What is left would take minutes: three steps more are enough to see it continue.
    config = (out / "config.yaml").read_text().replace("steps: 100000", f"steps: {steps + 3}")
    (out / "config.yaml").write_text(config)
    assert main(["resume", str(out), "--quiet"]) == 0
    assert f" {out / 'report.html'}\n" in capsys.readouterr().out
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == list(range(1, steps + 4))
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
