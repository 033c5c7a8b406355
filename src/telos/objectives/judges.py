"""Oracles that compare two answers: a function, the difference of two rewards, or a human who answers through a queue of files.

All speak `RewardSource`: a judge is a reward function with one more column, `opponents`, and returns the probability that the completion is preferred to
its opponent. So judges run in a process of their own, are timed out, typed and counted as rewards are.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from telos.core.errors import DataError, UsageError
from telos.data.batches import REWARD_VALID
from telos.objectives.rewards import Columns, OnError, RewardSource, Scores, load_reward, require_some

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Judged:
    """What an oracle says of n answers to each of P prompts."""

    wins: Floats  # [P, n, n] probability that answer i is preferred to answer j; NaN where they were not compared
    scores: Floats | None  # [P, n, k] rewards by objective, NaN where there is none; None where answers were only compared
    lengths: NDArray[np.int64]  # [P, n] tokens
    columns: Columns  # the data's own columns, one value a prompt
    generator: np.random.Generator  # for methods that draw labels or answers
    same: Bools | None = None  # [P, n, n] the two answers have the same text; None: no two have

    @property
    def pairs(self) -> Bools:
        """[P, n, n], i < j: answers that differ and were compared, so that a preference between them says something."""
        n = self.wins.shape[-1]
        different = True if self.same is None else ~self.same
        return np.triu(np.isfinite(self.wins) & different, 1) if n > 1 else np.zeros(self.wins.shape, dtype=bool)

    @property
    def valid(self) -> Bools:
        """[P, n]: the answer was judged, by a score or against another answer."""
        if self.scores is not None:
            return np.asarray(np.isfinite(self.scores).all(-1))
        return np.isfinite(self.win_rate)

    @property
    def win_rate(self) -> Floats:
        """[P, n]: the mean probability of winning against the prompt's other answers, over those that were compared; NaN where none was.

        An unbiased estimate of P(y ≻ π) for answers that are independent samples of one policy π.
        """
        others = np.isfinite(self.wins) & ~np.eye(self.wins.shape[-1], dtype=bool)
        count = others.sum(-1)
        return np.where(count > 0, np.where(others, self.wins, 0.0).sum(-1) / np.maximum(count, 1), np.nan)

    @property
    def reward(self) -> Floats:
        """[P, n]: the sum of the objectives, or without scores the win rate."""
        return self.win_rate if self.scores is None else self.scores.sum(-1)


def bradley_terry(scores: Floats, scale: float = 1.0) -> Floats:
    """[..., n] rewards as [..., n, n] probabilities of preference, σ((r_i − r_j) / scale)."""
    gap = (scores[..., :, None] - scores[..., None, :]) / scale
    return 0.5 * (1 + np.tanh(gap / 2))


def open_judge(spec: str, *, timeout: float, on_error: OnError, tell: Callable[[str], None] | None = None) -> RewardSource:
    """The judge that `spec` names: human:FOLDER, or a function as `load_reward` takes it. Raises `UsageError` for what compares nothing."""
    if spec.startswith("human:") and spec != "human:":
        return HumanQueue(spec.removeprefix("human:"), tell=tell)
    if ":" not in spec or spec.startswith(("gold:", "human:")):
        raise UsageError(
            f"--judge {spec}: give file.py:function or module:function that compares each completion with the one in `opponents`, or human:FOLDER"
        )
    judge = load_reward(spec, timeout=timeout, on_error=on_error)
    signature = getattr(judge, "_signature", None)
    if signature is not None and not signature.takes("opponents"):
        raise UsageError(
            f"--judge {spec}: the function has no parameter `opponents`, so it cannot compare; is it a reward? Then give it by --reward"
        )
    return judge


def same_texts(answers: list[list[str]]) -> Bools:
    """[P, n, n]: which answers to a prompt have the same text; each has its own."""
    return np.array([[[one == other for other in row] for one in row] for row in answers])


def compare_all(
    judge: RewardSource,
    prompts: list[Any],
    answers: list[list[str]],
    ids: list[list[list[int]]],
    columns: Columns,
    generator: np.random.Generator,
) -> Floats:
    """[P, n, n] `Judged.wins`: every two answers of a prompt compared once; equal ones are a draw and are not asked about.

    Which of the two is the completion and which the opponent is drawn, so that a judge who favours a place favours no answer. Raises `UsageError`
    for an answer of the judge that is no probability.
    """
    count, n = len(prompts), len(answers[0])
    wins = np.where(same_texts(answers), 0.5, np.nan)
    pairs = [(p, i, j) for p in range(count) for i in range(n) for j in range(i + 1, n) if answers[p][i] != answers[p][j]]
    asked = [(p, j, i) if swap else (p, i, j) for (p, i, j), swap in zip(pairs, generator.random(len(pairs)) < 0.5, strict=True)]
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
        """`poll`: seconds between looks at the answers; `tell` is called when a human is waited for."""
        self.folder, self.poll, self.tell = Path(folder), poll, tell
        self.name = f"human:{folder}"

    @property
    def questions(self) -> Path:
        return self.folder / "questions.jsonl"

    @property
    def answers(self) -> Path:
        return self.folder / "answers.jsonl"

    def score(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Columns) -> Scores:
        """See `RewardSource.score`; needs the column `opponents`. Waits as long as the human takes."""
        rows = [
            {"prompt": prompt, "first": first, "second": second}
            for prompt, first, second in zip(prompts, completions, columns["opponents"], strict=True)
        ]
        keys = [hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16] for row in rows]
        asked = {row["id"] for row in read_lines(self.questions)}
        append_lines(self.questions, ({"id": key, **row} for key, row in dict(zip(keys, rows, strict=True)).items() if key not in asked))
        found = self.given()
        if self.tell is not None and (open_ones := set(keys) - found.keys()):
            self.tell(
                f"{len(open_ones)} comparisons wait for a human: telos annotate {self.folder} (Ctrl-C twice leaves; telos resume goes on)"
            )
        while set(keys) - found.keys():
            time.sleep(self.poll)
            found = self.given()
        values = torch.tensor([found[key] for key in keys])
        return Scores(values, torch.full((len(keys),), REWARD_VALID, dtype=torch.int8))

    def given(self) -> dict[str, float]:
        """The probability that the first was preferred, by question; the last of several answers counts."""
        probability = {1: 1.0, 2: 0.0, 0: 0.5}
        found = {}
        for i, row in enumerate(read_lines(self.answers), 1):
            if row.get("preferred") not in probability or "id" not in row:
                raise DataError(
                    f"{self.answers}, answer {i}", 'an answer is {"id": …, "preferred": 1, 2, or 0 for a draw}', "Mend the line"
                )
            found[row["id"]] = probability[row["preferred"]]
        return found

    def waiting(self) -> list[dict[str, Any]]:
        """The questions without an answer, oldest first."""
        given = self.given()
        return [row for row in read_lines(self.questions) if row["id"] not in given]

    def answer(self, key: str, preferred: int) -> None:
        """Adds one answer: 1, 2, or 0 for a draw. Raises `UsageError` for anything else."""
        if preferred not in (0, 1, 2):
            raise UsageError(f"preferred is 1, 2 or 0 for a draw, not {preferred}")
        append_lines(self.answers, [{"id": key, "preferred": preferred}])

    def close(self) -> None: ...


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines that may be growing; none when it is not there. A last line that is not whole yet is left out; any other
    that is no object raises `DataError`."""
    if not path.exists():
        return []
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for i, line in enumerate([*lines, last] if _object(last) is not None else lines, 1):
        row = _object(line)
        if row is None and line.strip():
            raise DataError(f"{path}:{i}", "the line is no JSON object", "Mend or remove it")
        rows += [row] if row is not None else []
    return rows


def append_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds lines to a file, after what is left of a line whose writer was killed has been taken away."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        held = file.read()
        tail = held[held.rfind(b"\n") + 1 :]
        if _object(tail.decode("utf-8", "replace")) is None:
            file.truncate(len(held) - len(tail))
        elif tail:
            text = "\n" + text
        file.write(text.encode())


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
