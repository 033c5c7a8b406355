"""Accuracy as a function of the tokens that a model may spend before it has to answer.

An answer that is longer than the budget is cut at the end of the last step that fits, the mark of the final answer is written behind it, and the model goes on
in a few tokens (budget forcing; see `_forced`). The curve serves two papers: the area above it is the cumulative regret of Qu et al. 2025
(`evaluation.reasoning.cumulative_regret`), and its rise is what Hou et al. 2025 (T1) call inference scaling, examined by truncation.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from telos.algorithms.language._forced import DEFAULT_FORCING, Forcing, closing_tokens
from telos.algorithms.language._sampling import Writer, open_reward
from telos.algorithms.language.repeated_answers import Problems
from telos.algorithms.language.step_labels import estimate_successes
from telos.core.run import write_atomically
from telos.core.seeds import derive
from telos.data.batches import Rollouts
from telos.data.tokenize import Limits, tokenize
from telos.dataflow import make_backend
from telos.evaluation.reasoning import accuracy_at_budgets
from telos.evaluation.statistics import Floats
from telos.models.generation import Sampling
from telos.models.language import LanguageModel
from telos.objectives.process_reward import DEFAULT_CUT, Cut, step_ends

_ROWS = 256  # answers written at once


@dataclass(frozen=True)
class Budgeted:
    """Answers to problems, as they came and when they were cut short: rows are problems."""

    budgets: Floats  # [budgets] tokens before the answer has to be given
    right: Floats  # [problems, samples] 1 where the whole answer is right
    tokens: Floats  # [problems, samples] length of the whole answer
    accuracy: Floats  # [problems, budgets] at each budget: whole answers that fit, and forced ones

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(dataclasses.asdict(self), default=np.ndarray.tolist))

    @staticmethod
    def open(path: Path) -> Budgeted:
        return Budgeted(**{name: np.asarray(values, dtype=np.float64) for name, values in json.loads(path.read_text("utf-8")).items()})


def answer_within(
    model: LanguageModel,
    problems: Problems,
    samples: int,
    budgets: Sequence[int],
    *,
    forcing: Forcing = DEFAULT_FORCING,
    cut: Cut = DEFAULT_CUT,
    temperature: float = 1.0,
    seed: int = 0,
) -> Budgeted:
    """`samples` answers to each problem at `temperature`, cut at each of `budgets` (rising; 0 = answer at once), and what the model answers there."""
    limits = sorted({0, *budgets})
    sampling = Sampling(temperature=temperature, max_new_tokens=problems.max_new_tokens)
    table: Any = tokenize(problems.examples, model.tokenizer, Limits(max_prompt_length=model.context - problems.max_new_tokens))
    reward = open_reward(problems.reward, timeout=300.0, on_error="stop", policy=model)
    writer = make_backend("inline").place(lambda: Writer(model))

    def judge(answers: Rollouts, texts: list[str]) -> Tensor:
        rows = answers.row.tolist()
        columns = {name: [values[i] for i in rows] for name, values in table.extra.items()}
        ids = _rows(answers.completion_ids, answers.completion_length)
        return (reward.score([table.prompts[i] for i in rows], texts, ids, columns).values >= problems.threshold).float()

    right, tokens, forced = [], [], []
    step = max(1, _ROWS // samples)
    try:
        for start in range(0, len(table), step):
            prompts = table.batch(range(start, min(start + step, len(table)))).to(model.device)
            rollouts, texts = writer.call("write", prompts, sampling=sampling, n=samples, seed=derive(seed, "within budgets", start))
            outcomes, lengths = judge(rollouts, texts), rollouts.completion_length.tolist()
            ids = _rows(rollouts.completion_ids, rollouts.completion_length)
            whole_steps = [step_ends(model.tokenizer, row, cut) for row in ids]
            # Where each answer is cut: the last steps that fit the budgets, of those that are smaller than the answer.
            cuts = [[_fitting(ends, most) for most in limits if most < len(row)] for ends, row in zip(whole_steps, ids, strict=True)]
            ends = [[*sorted({place - 1 for place in places if place}), len(row) - 1] for places, row in zip(cuts, ids, strict=True)]
            options: dict[str, Any] = {"completions": forcing.answers, "sampling": sampling, "seed": derive(seed, "forced", start)}
            options |= {"closing": closing_tokens(model, cut), "room": forcing.tokens}
            found, _ = estimate_successes(rollouts, ends, outcomes, writer, model, judge, **options)
            right += outcomes.tolist()
            tokens += lengths
            for successes, last, places in zip(found, ends, cuts, strict=True):
                chance = dict(zip((0, *(end + 1 for end in last[:-1])), successes.values().tolist(), strict=False))
                early = [chance[place] for place in places]
                forced.append(early + [0.0] * (len(limits) - len(early)))
    finally:
        reward.close()
    whole, length = (np.array(values, dtype=np.float64).reshape(-1, samples) for values in (right, tokens))
    curve = accuracy_at_budgets(whole, length, np.array(limits, dtype=np.float64), np.array(forced).reshape(len(whole), samples, -1))
    wanted = [limits.index(budget) for budget in budgets]
    return Budgeted(np.array(budgets, dtype=np.float64), whole, length, curve[:, wanted])


def _fitting(ends: Sequence[int], most: int) -> int:
    """How many tokens of an answer are kept, of at most `most`: up to the end of a step."""
    return max((end + 1 for end in ends if end < most), default=0)


def _rows(ids: Tensor, length: Tensor) -> list[list[int]]:
    return [row[:n] for row, n in zip(ids.tolist(), length.tolist(), strict=True)]
