"""Offline training on single answers with a label or a score.

A method's `loss(config, batch)` takes a `functional.pairwise.LabelledLogps` and returns per-answer (or per-token) `Losses`. What it `needs`:

- "reference": log-probabilities under the model that regularises;
- "labels": whether each answer is desirable; the sides of pairs are taken as two answers;
- "scores": a number for each answer, from the data or from `--reward`;
- "advantages": the score minus the value of the prompt under the reference, the mean score of `value_samples` answers that it writes; a method with
  `value_filter` drops rows by it before training, and `priority` draws rows in proportion to it;
- "kl": an estimate of KL(π‖π_ref) for the batch: the mean log-ratio of each row's prompt with the next row's answer, at least 0 (Ethayarajh et al.
  2024, section 4.1).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from telos.algorithms.language._alignment import AlignmentConfig, AlignmentProgram, ScoredConfig
from telos.algorithms.language._roles import Reference, Scorer
from telos.algorithms.language._rows import labelled_table
from telos.algorithms.language._sampling import Writer, texts_of
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import Run, write_atomically
from telos.core.seeds import derive, numpy_generator
from telos.data.batches import Labelled, Prompts
from telos.data.cursor import Cursor
from telos.data.tokenize import Table
from telos.dataflow import make_backend
from telos.functional.pairwise import AnswerLogps, LabelledLogps
from telos.functional.reduction import Denominators, Losses
from telos.models.generation import Sampling
from telos.models.packing import Answers


@dataclass(frozen=True, kw_only=True)
class UnpairedConfig(AlignmentConfig):
    """Options of training on single answers."""


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig(ScoredConfig, UnpairedConfig):
    """Options of training on answers that are compared with what the reference would have written."""

    value_samples: int = 4  # answers of the reference whose mean score is the value of a prompt
    value_filter: bool = True  # leave out answers whose advantage is not positive
    priority: bool = True  # draw answers in proportion to their advantage instead of uniformly; needs the filter

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


class Program(AlignmentProgram):
    config: UnpairedConfig
    kinds = 1

    def __init__(self, method: Method, config: UnpairedConfig, run: Run) -> None:
        super().__init__(method, config, run)
        self.now = make_backend(config.backend).place(lambda: Scorer(self.model)) if "kl" in method.needs else None

    def prepare_tables(self) -> None:
        if isinstance(self.config, AdvantageConfig):
            self._take_advantages(self.config)

    def layout(self, batch: Labelled) -> Answers:
        return layout(batch)

    def read_table(self, source: str, option: str) -> Table:
        needs = self.method.needs
        labels, scores = "labels" in needs, bool(needs & {"scores", "advantages"})
        return labelled_table(self.config, source, option, self.model, self.run, scorer=self.scorer, labels=labels, scores=scores)

    def denominators(self, batch: Labelled) -> Denominators:
        return Denominators(len(batch), int(batch.completion_length.sum()))

    def batch(self, table: Table, indices: Any) -> Labelled:
        batch = super().batch(table, indices)
        if "kl" in self.method.needs:
            batch = batch.replace(other_ids=batch.completion_ids.roll(-1, 0), other_length=batch.completion_length.roll(-1, 0))
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

    # -- advantages -----------------------------------------------------------------------------------------------------------------------------

    def _take_advantages(self, config: AdvantageConfig) -> None:
        """The tables with their advantages; of the training rows only those with a positive one are kept, where that is asked for."""
        self.table = self._with_advantages(self.table, "data", config)
        if self.eval_table is not None:
            self.eval_table = self._with_advantages(self.eval_table, "eval_data", config)
        if not config.value_filter:
            return
        kept = [i for i, value in enumerate(self.table.columns["advantage"]) if value > 0]
        self.run.describe(**{"rows with a positive advantage": len(kept)})
        if len(kept) < config.batch_size:
            raise UsageError(
                f"only {len(kept)} of {len(self.table)} answers of {config.data} are better than the reference's own, fewer than --batch_size "
                f"{config.batch_size}; take a smaller batch, better data, or --no-value_filter"
            )
        self.table = self.table.select(kept)
        self.cursor = Cursor(len(kept), config.batch_size, derive(config.seed, "rows"), drop_last=True)

    def _with_advantages(self, table: Table, name: str, config: AdvantageConfig) -> Table:
        """Values are computed once and kept in the run's folder, so that a resumed run has the same."""
        path = self.run.path / f"values-{name}.json"
        if not path.exists():
            write_atomically(path, json.dumps(self._values(table, config)))
        values = json.loads(path.read_text(encoding="utf-8"))
        return table.with_columns(advantage=[score - value for score, value in zip(table.columns["score"], values, strict=True)])

    def _values(self, table: Table, config: AdvantageConfig) -> list[float]:
        """The mean score of the reference's own answers to each row's prompt; rows with the same prompt share it."""
        score = self.scorer
        if score is None:
            raise UsageError("--reward is missing: the answers that the reference writes must be scored as the data's are")
        writer = self.writer  # the policy has not been trained yet
        if config.reference is not None:
            theirs = Reference(self.model, config.reference)
            writer = make_backend(config.backend).place(lambda: Writer(theirs.model))
        first: dict[tuple[int, ...], int] = {}
        rows = [first.setdefault(tuple(ids), i) for i, ids in enumerate(table.columns["prompt_ids"])]
        distinct, means = sorted(first.values()), {}
        n, size = config.value_samples, 64
        for start in range(0, len(distinct), size):
            chosen = distinct[start : start + size]
            batch: Any = table.batch(chosen).to(self.model.device)
            prompts = Prompts(prompt_ids=batch.prompt_ids, prompt_length=batch.prompt_length, row=batch.row, batch_size=[len(chosen)])
            sampling = Sampling(max_new_tokens=config.max_completion_length)
            drawn, _ = writer.call("write", prompts, sampling=sampling, n=n, seed=derive(config.seed, "values", start))
            texts = texts_of(self.model, drawn.completion_ids, drawn.completion_length)
            columns = {key: [values[i] for i in chosen for _ in range(n)] for key, values in table.extra.items() if key != "score"}
            scores = np.array(score([table.prompts[i] for i in chosen for _ in range(n)], texts, columns)).reshape(-1, n)
            means |= dict(zip(chosen, np.nanmean(scores, 1).tolist(), strict=True))
        return [means[row] for row in rows]

    def next_rows(self, index: int) -> Any:
        config = self.config
        if not (isinstance(config, AdvantageConfig) and config.priority):
            return super().next_rows(index)
        weight = np.asarray(self.table.columns["advantage"])
        generator = numpy_generator(config.seed, "priority", index)
        return generator.choice(len(weight), size=config.batch_size, replace=False, p=weight / weight.sum())
