"""kill -9 at any moment loses at most the steps since the last checkpoint, and resuming equals the uninterrupted run bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support import World, last_state, outcome
from telos.algorithms.run import resume, train
from telos.core import checkpoint
from telos.core.run import Run

STEPS = 60
CODE = "import json, sys\nfrom telos.algorithms.run import train\ntrain(sys.argv[1], json.loads(sys.argv[2]))\n"


def start(key: str, options: dict[str, Any]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, key, json.dumps(options)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )


def kill_after_first_checkpoint(process: subprocess.Popen[bytes], folder: Path, rng: random.Random) -> int:
    """Waits for a checkpoint, then a random moment more, and kills. Returns the steps that were logged by then."""
    deadline = time.monotonic() + 240
    while not list((folder / "checkpoints").glob("step-*")):
        assert process.poll() is None, (process.stderr.read() if process.stderr else b"").decode()[-2000:]
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.12))
    process.send_signal(signal.SIGKILL)
    process.wait()
    return len(Run.open(folder).metrics())


@pytest.mark.parametrize("key", ["dpo", "best-of-n"])
def test_a_killed_run_continues_as_if_nothing_had_happened(key: str, world: World, tmp_path: Path) -> None:
    loop = {"dpo": "pairs", "best-of-n": "sampling"}[key]
    options = world.options(loop, steps=STEPS, checkpoint_every=3)
    whole = train(key, options | {"out": str(tmp_path / "whole")})
    rng = random.Random(os.getpid())
    folder = tmp_path / "killed"
    process = start(key, options | {"out": str(folder)})
    logged = kill_after_first_checkpoint(process, folder, rng)
    assert process.returncode == -signal.SIGKILL, f"it was done before it could be killed (after {logged} steps)"
    step, _, faults = checkpoint.load(folder / "checkpoints")
    assert faults == [], "what was renamed into place is whole"
    assert logged - step <= 3, "at most the steps since the last checkpoint are lost"
    assert Run.open(folder).facts["status"] == "running"
    resumed = resume(folder)
    assert outcome(resumed) == outcome(whole)
    assert last_state(resumed) == last_state(whole)
    assert [path.name for path in sorted(resumed.checkpoints.iterdir())] == [path.name for path in sorted(whole.checkpoints.iterdir())]


def test_a_run_killed_again_and_again_still_arrives(world: World, tmp_path: Path) -> None:
    options = world.options("pairs", steps=30, checkpoint_every=2)
    whole = train("dpo", options | {"out": str(tmp_path / "whole")})
    folder, rng = tmp_path / "killed", random.Random(7)
    kills = [rng.randint(1, 9) for _ in range(4)]

    class Kill(BaseException):
        pass

    class After:
        """Ends the run `steps` after it starts."""

        def __init__(self, steps: int) -> None:
            self.left = steps

        def started(self, *_: Any) -> None: ...

        def stepped(self, *_: Any) -> None:
            self.left -= 1
            if self.left == 0:
                raise Kill

        def ended(self, status: str) -> None: ...

    with pytest.raises(Kill):
        train("dpo", options | {"out": str(folder)}, callbacks=[After(kills[0] + 2)])
    for steps in kills[1:]:
        with pytest.raises(Kill):
            resume(folder, callbacks=[After(steps)])
    resumed = resume(folder)
    assert outcome(resumed) == outcome(whole)
    assert last_state(resumed) == last_state(whole)
