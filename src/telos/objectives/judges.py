"""Oracles that compare two answers: a function, the difference of two rewards, or a human who answers through a queue of files.

All speak `RewardSource`: a judge is a reward function with one more column, `opponents`, and returns the probability that the completion is preferred to
its opponent. So judges run in a process of their own, are timed out, typed and counted as rewards are.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from telos.core.errors import UsageError
from telos.data.batches import REWARD_VALID
from telos.objectives.rewards import Columns, RewardSource, Scores, require_some

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Judged:
    """What an oracle says of n answers to each of P prompts."""

    wins: Floats  # [P, n, n] probability that answer i is preferred to answer j; ½ on the diagonal, NaN where an answer was not judged
    scores: Floats | None  # [P, n, k] rewards by objective, NaN where there is none; None where answers were only compared
    lengths: NDArray[np.int64]  # [P, n] tokens
    columns: Columns  # the data's own columns, one value a prompt
    generator: np.random.Generator  # for methods that draw labels or answers

    @property
    def valid(self) -> NDArray[np.bool_]:
        """[P, n]: the answer was judged, by a score or against another answer."""
        if self.scores is not None:
            return np.asarray(np.isfinite(self.scores).all(-1))
        return np.asarray(np.isfinite(self.wins).sum(-1) > 1)

    @property
    def reward(self) -> Floats:
        """[P, n]: the sum of the objectives, or without scores the mean probability of winning against the prompt's other answers."""
        if self.scores is not None:
            return self.scores.sum(-1)
        n = self.wins.shape[-1]
        return (self.wins.sum(-1) - 0.5) / max(1, n - 1)


def bradley_terry(scores: Floats, scale: float = 1.0) -> Floats:
    """[..., n] rewards as [..., n, n] probabilities of preference, σ((r_i − r_j) / scale)."""
    gap = (scores[..., :, None] - scores[..., None, :]) / scale
    return 0.5 * (1 + np.tanh(gap / 2))


def compare_all(judge: RewardSource, prompts: list[Any], answers: list[list[str]], ids: list[list[list[int]]], columns: Columns) -> Floats:
    """[P, n, n]: every two answers of a prompt compared once. Equal answers are a draw and are not asked about."""
    count, n = len(prompts), len(answers[0])
    wins = np.full((count, n, n), np.nan)
    wins[:, range(n), range(n)] = 0.5
    asked = []
    for p in range(count):
        for i in range(n):
            for j in range(i + 1, n):
                if answers[p][i] == answers[p][j]:
                    wins[p, i, j] = wins[p, j, i] = 0.5
                else:
                    asked.append((p, i, j))
    if asked:
        rows = {name: [values[p] for p, _, _ in asked] for name, values in columns.items()}
        rows["opponents"] = [answers[p][j] for p, _, j in asked]
        scores = judge.score(
            [prompts[p] for p, _, _ in asked], [answers[p][i] for p, i, _ in asked], [ids[p][i] for p, i, _ in asked], rows
        )
        require_some(scores, judge.name)
        for (p, i, j), value in zip(asked, scores.values.tolist(), strict=True):
            if math.isfinite(value) and not 0 <= value <= 1:
                raise UsageError(
                    f"judge {judge.name!r} gave {value}; it must give the probability, from 0 to 1, that the completion is preferred"
                )
            wins[p, i, j], wins[p, j, i] = value, 1 - value
    return wins


class HumanQueue:
    """Asks a human through a folder. `questions.jsonl` gets one line for each comparison, with an id made of its texts; the run waits until
    `answers.jsonl` has a line {"id": …, "preferred": 1, 2 or 0 for a draw} for each. Answers that are there already are not asked for again, so
    an interrupted run goes on where the human is. `telos annotate FOLDER` asks in the terminal.
    """

    def __init__(self, folder: str | Path, *, poll: float = 0.5, tell: Callable[[str], None] | None = None) -> None:
        self.folder, self.poll, self.tell = Path(folder), poll, tell
        self.name = f"human:{folder}"

    @property
    def questions(self) -> Path:
        return self.folder / "questions.jsonl"

    @property
    def answers(self) -> Path:
        return self.folder / "answers.jsonl"

    def score(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Columns) -> Scores:
        rows = [
            {"prompt": prompt, "first": first, "second": second}
            for prompt, first, second in zip(prompts, completions, columns["opponents"], strict=True)
        ]
        keys = [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16] for row in rows]
        self.folder.mkdir(parents=True, exist_ok=True)
        asked = {row["id"] for row in read_lines(self.questions)}
        with self.questions.open("a", encoding="utf-8") as file:
            for key, row in dict(zip(keys, rows, strict=True)).items():
                if key not in asked:
                    file.write(json.dumps({"id": key, **row}) + "\n")
        found = self.given()
        if self.tell is not None and set(keys) - found.keys():
            self.tell(f"{len(set(keys) - found.keys())} comparisons wait for a human: telos annotate {self.folder}")
        while set(keys) - found.keys():
            time.sleep(self.poll)
            found = self.given()
        values = torch.tensor([found[key] for key in keys])
        return Scores(values, torch.full((len(keys),), REWARD_VALID, dtype=torch.int8))

    def given(self) -> dict[str, float]:
        """The probability that the first was preferred, by question."""
        return {row["id"]: {1: 1.0, 2: 0.0, 0: 0.5}[row["preferred"]] for row in read_lines(self.answers)}

    def waiting(self) -> list[dict[str, Any]]:
        """The questions without an answer, oldest first."""
        given = self.given()
        return [row for row in read_lines(self.questions) if row["id"] not in given]

    def answer(self, key: str, preferred: int) -> None:
        """Adds one answer: 1, 2, or 0 for a draw. Raises `UsageError` for anything else."""
        if preferred not in (0, 1, 2):
            raise UsageError(f"preferred is 1, 2 or 0 for a draw, not {preferred}")
        with self.answers.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": key, "preferred": preferred}) + "\n")

    def close(self) -> None: ...


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file that may be growing; none when it is not there."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:  # still being written
            continue
    return rows
