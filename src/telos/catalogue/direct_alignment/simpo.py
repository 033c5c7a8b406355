"""SimPO (S191): no reference in memory, and a length-controlled win rate over DPO on `review`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telos.catalogue._review import SMOKE, dpo_baseline, mean_gold, measure_common, preferences, starting_policy, wins
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.core.errors import Failure
from telos.evaluation.statistics import length_controlled_win_rate

SIMPO: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-4, "beta": 2.0, "gamma_beta_ratio": 0.5, "lr_schedule": "linear"}
_PEAK = """
import sys, telos
telos.train(sys.argv[1], model=sys.argv[2], data=sys.argv[3], out=sys.argv[4], steps=3, batch_size=16, checkpoint_every=0, eval_prompts=0)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_memory_mib(method: str, model: str, data: Path, out: Path) -> float:
    """Peak resident memory of a process of its own that trains three steps, in MiB.

    The kernel's own high-water mark, because `ru_maxrss` of a child begins at its parent's memory.
    """
    done = subprocess.run([sys.executable, "-c", _PEAK, method, model, str(data), str(out)], capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"measuring the memory of {method} failed: {done.stderr.strip().splitlines()[-1:]}")
    return float(done.stdout.split()[-1]) / 1024


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    simpo = lab.train("simpo", "simpo", model=start, data=str(pairs), steps=settings["steps"], checkpoint_every=0, **SIMPO)
    items = lab.items(settings["held_out"])
    ours = lab.assess("simpo", simpo, items, reference=start)
    theirs = measure_common(lab, dpo_baseline(lab, start, pairs, settings), start, items)
    before = measure_common(lab, start, start, items)
    controlled = length_controlled_win_rate(ours.gold, theirs.gold, ours.length, theirs.length)
    measured = lab.folder("memory")
    peaks = {name: peak_memory_mib(name, start, pairs, measured / f"{name}-{_next(measured, name)}") for name in ("dpo", "simpo")}
    return {
        "memory saved against DPO [MiB]": peaks["dpo"] - peaks["simpo"],
        "length-controlled win rate over DPO": controlled.estimate,
        "win rate over DPO": wins(ours, theirs),
        "win rate over SFT": wins(ours, before),
        "gold, SFT": mean_gold(before),
        "gold, DPO": mean_gold(theirs),
        "gold, SimPO": mean_gold(ours),
        "tokens, DPO": sum(theirs.length) / len(theirs.length),
        "tokens, SimPO": sum(ours.length) / len(ours.length),
        "peak memory, DPO [MiB]": peaks["dpo"],
        "peak memory, SimPO [MiB]": peaks["simpo"],
    }


def _next(folder: Path, name: str) -> int:
    """A number that no earlier measurement has used."""
    return len(list(folder.glob(f"{name}-*"))) if folder.exists() else 0


CLAIM = Claim(
    key="simpo",
    statement="SimPO keeps no reference model in memory and is at least as good as DPO when length is controlled for",
    baselines=("dpo",),
    facts=(
        Fact("peak memory below DPO's on the same data", "memory saved against DPO [MiB]", ">", 0.0),
        Fact("length-controlled gold win rate over DPO above one half on `review`", "length-controlled win rate over DPO", ">", 0.5),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, SMOKE),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "steps": 120, "held_out": 256}),
    },
    notes="Memory is the peak resident size of a process that trains three steps; the reference of a 4.2 M-parameter model is 16 MiB in float32.",
)
