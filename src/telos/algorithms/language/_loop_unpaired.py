"""Offline training on single answers with a label or a score.

A method's `loss(config, batch)` takes a `functional.pairwise.LabelledLogps` and returns per-answer (or per-token) `Losses`. What it `needs`:

- "reference": log-probabilities under the model that regularises;
- "labels": whether each answer is desirable; the sides of pairs are taken as two answers;
- "scores": a number for each answer, from the data or from `--reward`;
- "advantages": the score minus the value of the prompt under the reference, the mean score of `value_samples` answers that it writes; a method with
  `value_filter` drops rows by it before training, and `priority` draws rows in proportion to it;
- "kl": an estimate of KL(π‖π_ref) for the batch: the mean log-ratio of each row's prompt with the answer to another prompt, at least 0
  (Ethayarajh et al. 2024, section 4.1).

A method that needs none of labels, scores and advantages learns from every answer as a demonstration: it gets the desirable ones only.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from telos.algorithms.language._alignment import AlignmentConfig, AlignmentProgram, ScoredConfig
from telos.algorithms.language._loop_rollouts import score
from telos.algorithms.language._roles import Reference, Scorer
from telos.algorithms.language._rows import labelled_table
from telos.algorithms.language._sampling import Writer
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import Run, write_atomically
from telos.core.seeds import derive, numpy_generator
from telos.data.batches import Labelled, Prompts
from telos.data.cursor import Cursor
from telos.data.tokenize import Table
from telos.dataflow import Group, make_backend
from telos.functional.pairwise import AnswerLogps, LabelledLogps
from telos.functional.reduction import Denominators, Losses
from telos.models.generation import Sampling
from telos.models.packing import Answers
from telos.objectives.rewards import require_some

_PROMPTS = 64  # prompts that the reference answers at once


@dataclass(frozen=True, kw_only=True)
class UnpairedConfig(AlignmentConfig):
    """Options of training on single answers."""

    @property
    def spares(self) -> frozenset[str]:
        """Of what the method needs, what these options do without."""
        return frozenset()


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig(ScoredConfig, UnpairedConfig):
    """Options of training on answers that are compared with what the reference would have written."""

    value_samples: int = 4  # answers of the reference whose mean score is the value of a prompt
    value_filter: bool = True  # leave out answers whose advantage is not positive
    priority: bool = True  # draw answers, with replacement, in proportion to their advantage, not each once an epoch; needs the filter

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "value_samples")
        if self.priority and not self.value_filter:
            raise UsageError(
                "--priority draws in proportion to advantages, which must be positive: it needs --value_filter, or --no-priority"
            )


def layout(batch: Labelled) -> Answers:
    """Each answer on its prompt."""
    return Answers.repeat(batch.prompt_ids, batch.prompt_length, (batch.completion_ids, batch.completion_length))


def mismatched(batch: Labelled) -> Answers:
    """Another row's answer on each prompt."""
    assert batch.other_ids is not None
    assert batch.other_length is not None
    return Answers.repeat(batch.prompt_ids, batch.prompt_length, (batch.other_ids, batch.other_length))


def another_prompts_row(table: Table, rows: Sequence[int]) -> list[int]:
    """For each of `rows` the next of them that has another prompt, or simply the next where all share one. Of a single row, the table's next."""
    pool = rows if len(rows) > 1 else range(len(table))
    prompts = [tuple(table.columns["prompt_ids"][row]) for row in pool]
    found = []
    for row in rows:
        place = pool.index(row)
        turns = [(place + step) % len(pool) for step in range(1, len(pool))] or [place]
        found.append(pool[next((i for i in turns if prompts[i] != prompts[place]), turns[0])])
    return found


class Program(AlignmentProgram):
    config: UnpairedConfig
    kinds = 1

    def __init__(self, method: Method, config: UnpairedConfig, run: Run) -> None:
        super().__init__(dataclasses.replace(method, needs=method.needs - config.spares), config, run)
        self.now = make_backend(config.backend).place(lambda: Scorer(self.model)) if "kl" in method.needs else None

    def prepare_tables(self) -> None:
        if isinstance(self.config, AdvantageConfig):
            self._take_advantages(self.config)

    def layout(self, batch: Labelled) -> Answers:
        return layout(batch)

    def read_table(self, source: str, option: str) -> Table:
        needs = self.method.needs
        labels, scores = "labels" in needs, bool(needs & {"scores", "advantages"})
        table = labelled_table(self.config, source, option, self.model, self.run, scorer=self.scorer, labels=labels, scores=scores)
        desirable = [i for i, label in enumerate(table.columns["label"]) if label]
        name = option.lstrip("-")
        self.run.describe(**{f"answers {name}": {"desirable": len(desirable), "undesirable": len(table) - len(desirable)}})
        if labels or scores or len(desirable) == len(table):
            return table
        if not desirable:
            raise UsageError(f"{option} {source} has no desirable answer, so there is nothing to imitate")
        return table.select(desirable)

    def denominators(self, batch: Labelled) -> Denominators:
        return Denominators(len(batch), int(batch.completion_length.sum()))

    def batch(self, table: Table, indices: Any) -> Labelled:
        rows = [int(i) for i in indices]
        batch = super().batch(table, rows)
        if "kl" in self.method.needs:
            other = super().batch(table, another_prompts_row(table, rows))
            batch = batch.replace(other_ids=other.completion_ids, other_length=other.completion_length)
        return batch

    def frozen_rows(self, batch: Labelled) -> tuple[Tensor, ...]:
        rows = super().frozen_rows(batch)
        if self.now is None:
            return rows
        assert self.reference is not None
        asked = {"layout": mismatched, "kinds": 1, "micro_batch_size": self.config.micro_batch_size}
        gap = self.now.call("logprobs", batch, **asked) - self.reference.call("logprobs", batch, **asked)
        return (*rows, gap.sum((1, 2)).mean().clamp(min=0).expand(len(batch)))

    def losses(self, model: Any, part: Labelled, *rows: Tensor) -> Losses:
        answers = layout(part)
        tokens, mask = model.logprobs(answers).logprobs, answers.mask
        reference = AnswerLogps(rows[0][:, 0], mask) if "reference" in self.method.needs else None
        labels = part.label if "labels" in self.method.needs else None
        kl = rows[-1] if self.now is not None else None
        assert self.method.loss is not None
        view = LabelledLogps(AnswerLogps(tokens, mask), reference, labels, part.score, part.advantage, kl)
        return self.method.loss(self.config, view)

    def step(self, index: int) -> dict[str, float]:
        return _with_margins(super().step(index), "")

    def evaluate(self) -> dict[str, float]:
        return _with_margins(super().evaluate(), "eval/")

    def next_rows(self, index: int) -> Any:
        config = self.config
        if not (isinstance(config, AdvantageConfig) and config.priority):
            return super().next_rows(index)
        weight = np.asarray(self.table.columns["advantage"])
        # With replacement: otherwise a batch that is not small against the table would hold the rows almost uniformly.
        return numpy_generator(config.seed, "priority", index).choice(len(weight), size=config.batch_size, p=weight / weight.sum())

    # -- advantages -----------------------------------------------------------------------------------------------------------------------------

    def _take_advantages(self, config: AdvantageConfig) -> None:
        """The tables with their advantages; of the training rows only those with a positive one are kept, where that is asked for."""
        if self.scorer is None:
            raise UsageError("--reward is missing: the answers that the reference writes must be scored as the data's are")
        self.scorer([], [], {})  # opens it, even where the data have scores and a resumed run has the values
        self.table = self._with_advantages(self.table, "data", config)
        if self.eval_table is not None:
            self.eval_table = self._with_advantages(self.eval_table, "eval_data", config)
        if config.value_filter:
            kept = [i for i, value in enumerate(self.table.columns["advantage"]) if value > 0]
            self.run.describe(**{"rows with a positive advantage": len(kept)})
            self.table = self.table.select(kept)
        if len(self.table) < config.batch_size:
            better = " that are better than the reference's own" if config.value_filter else ""
            raise UsageError(
                f"{config.data} has only {len(self.table)} answers{better}, fewer than --batch_size {config.batch_size}; take a smaller batch, "
                f"better data{', or --no-value_filter' if better else ''}"
            )
        self.cursor = Cursor(len(self.table), config.batch_size, derive(config.seed, "rows"), drop_last=True)

    def _with_advantages(self, table: Table, name: str, config: AdvantageConfig) -> Table:
        """Values are computed once and kept in the run's folder, so that a resumed run has the same. Rows without one are left out."""
        path = self.run.path / f"values-{name}.json"
        if not path.exists():
            write_atomically(path, json.dumps(self._values(table, config)))
        values = json.loads(path.read_text(encoding="utf-8"))
        advantages = [score - value for score, value in zip(table.columns["score"], values, strict=True)]
        usable = [i for i, advantage in enumerate(advantages) if math.isfinite(advantage)]
        if len(usable) < len(table):
            self.run.warn(f"--{name}: {len(table) - len(usable)} rows left out: no answer of the reference to their prompts got a score")
        return table.with_columns(advantage=advantages).select(usable)

    def _values(self, table: Table, config: AdvantageConfig) -> list[float]:
        """The mean score of the reference's own answers to each row's prompt, NaN where none has a score; rows with one prompt share it."""
        assert self.reward is not None
        writer, n = self._reference_writer(config), config.value_samples
        asked = dataclasses.replace(table, extra={key: values for key, values in table.extra.items() if key != "score"})
        first: dict[tuple[int, ...], int] = {}
        rows = [first.setdefault(tuple(ids), i) for i, ids in enumerate(table.columns["prompt_ids"])]
        distinct, means = sorted(first.values()), {}
        for start in range(0, len(distinct), _PROMPTS):
            chosen = distinct[start : start + _PROMPTS]
            batch: Any = table.batch(chosen).to(self.model.device)
            prompts = Prompts(prompt_ids=batch.prompt_ids, prompt_length=batch.prompt_length, row=batch.row, batch_size=[len(chosen)])
            sampling = Sampling(max_new_tokens=config.max_completion_length)
            drawn, texts = writer.call("write", prompts, sampling=sampling, n=n, seed=derive(config.seed, "values", start))
            scores, _ = score(self.reward, asked, drawn, texts)
            require_some(scores, self.reward.name)
            for i, values in zip(chosen, scores.values.view(-1, n), strict=True):
                usable = values[values.isfinite()]
                means[i] = float(usable.double().mean()) if len(usable) else math.nan
        return [means[row] for row in rows]

    def _reference_writer(self, config: AdvantageConfig) -> Group[Writer]:
        """Draws answers from the reference before training begins, when the policy is it unless another was named."""
        if config.reference is None:
            return self.writer
        theirs = Reference(self.model, config.reference)
        return make_backend(config.backend).place(lambda: Writer(theirs.model, under=theirs.as_it_scores))


def _with_margins(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The difference of what desirable and undesirable answers have in the mean, where both were there."""
    sides = [metrics.get(f"{prefix}rewards/{side}") for side in ("chosen", "rejected")]
    if sides[0] is None or sides[1] is None:
        return metrics
    return metrics | {f"{prefix}rewards/margins": sides[0] - sides[1]}
