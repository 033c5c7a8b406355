"""What recipes on `arith` share that judge steps: labels by completions, models that learn them, and how answers are cut.

Steps are those of `objectives.process_reward.Cut`; an answer of the references' form has one for each operation and one for "Answer: …".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from telos.catalogue._arith import MOST_TOKENS, START
from telos.catalogue.lab import Lab, commons, named
from telos.evaluation.leash import Sampled
from telos.objectives.process_reward import DEFAULT_CUT

LABELS: dict[str, Any] = {"reward": ["gold:arith"], "n": 4, "max_completion_length": MOST_TOKENS, "checkpoint_every": 0}
MODEL: dict[str, Any] = {"batch_size": 32, "learning_rate": 3e-4, "lr_schedule": "linear", "checkpoint_every": 0}


def labelled_steps(lab: Lab, method: str, data: Path, batches: int, **options: Any) -> Path:
    """The rows in which `math-shepherd` or `pav` labels the steps of the starting policy's answers to `data`; made once for all recipes of a seed."""
    given = {**LABELS, "model": START, "data": str(data), "steps": batches, **options}
    return commons(lab).train(named(method, **given), method, **given).path / "stepwise.jsonl"


def judge_of_steps(lab: Lab, rows: Path, steps: int, **options: Any) -> str:
    """The folder of a process reward model that starts from the policy and learns the labels of `rows`; made once for all recipes of a seed."""
    given = {**MODEL, "model": START, "data": str(rows), "steps": steps, **options}
    return str(commons(lab).train(named("process-reward", **given), "process-reward", **given).path / "model")


def outcomes_alone(lab: Lab, rows: Path) -> Path:
    """The same answers with one step each, the whole, labelled by its success: what an outcome reward model learns from."""

    def made() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
        return [
            {"prompt": row["prompt"], "completions": ["".join(row["completions"])], "labels": [row["success"]], "step_separator": ""}
            for row in found
        ]

    return commons(lab).file(f"{named('outcomes', rows=rows)}.jsonl", made)


def steps_of(text: str) -> list[str]:
    """The steps of an answer, without blanks around them."""
    found, start = [], 0
    for last, _ in DEFAULT_CUT.pieces(text):
        found.append(text[start : last + 1].strip())
        start = last + 1
    return found


def repeated(steps: Iterable[str]) -> int:
    """How many steps say what an earlier one has said."""
    plain = [step.rstrip("".join(DEFAULT_CUT.separators)) for step in steps]
    return len(plain) - len(set(plain))


def steps_described(name: str, found: Sampled) -> dict[str, float]:
    """Figures of a policy's answers: how many steps they have, and how many of them are repetitions."""
    cut = [steps_of(text) for texts in found.texts for text in texts]
    return {
        f"steps, {name}": float(np.mean([len(steps) for steps in cut])),
        f"repeated steps, {name}": float(np.mean([repeated(steps) for steps in cut])),
        f"cut off, {name}": float(1 - found.ended.mean()),
    }


def last_mean(rows: Sequence[Mapping[str, Any]], key: str, count: int = 5) -> float:
    """The mean of a logged number over the last iterations."""
    return float(np.mean([row[key] for row in rows[-count:]]))
