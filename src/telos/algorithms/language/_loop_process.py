"""Training of models that judge the steps of answers.

A method's `loss(config, logits, labels, mask)` takes the head's number at every step's last token, the steps' labels in [0, 1] and which of them are there,
all [B, S], and returns per-step `Losses`. The result is a Hugging Face sequence-classification folder with one label, as that of a reward model.

Where the rows have a `prompt_label`, the prompt's last token is judged as a step of its own, and the model then knows how likely success is before the first
step. Metrics are those of `functional.process.step_metrics`; on held-out rows also `eval/steps/auc` and `eval/steps/calibration_error`, over all their steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from telos.algorithms.language._loop_reward_model import Program as RewardModelProgram
from telos.algorithms.language._loop_reward_model import RewardModelConfig
from telos.algorithms.language._roles import micro_batches
from telos.algorithms.language._rows import stepwise_table
from telos.data.batches import Stepwise, mask
from telos.data.tokenize import Table
from telos.functional.process import auc, calibration_error, step_metrics
from telos.functional.reduction import Denominators, Losses
from telos.models.packing import Answers
from telos.objectives.process_reward import ProcessRewardModel


@dataclass(frozen=True, kw_only=True)
class ProcessConfig(RewardModelConfig):
    """Options of training a model that judges steps."""

    step_separator: str | None = None  # closes each step that lacks it; default: the rows' column step_separator, or a new line
    hard_labels: bool = False  # a step whose label is above 0 is right, as if one success from it were enough; else labels are chances
    until_mistake: bool = False  # learn no step after the first whose label is below 1/2 (Lightman et al. 2023)


def layout(batch: Stepwise) -> Answers:
    """Each answer on its prompt."""
    return Answers.repeat(batch.prompt_ids, batch.prompt_length, (batch.completion_ids, batch.completion_length))


class Program(RewardModelProgram):
    config: ProcessConfig
    kind = ProcessRewardModel

    def read_table(self, source: str, option: str) -> Table:
        c = self.config
        options: dict[str, Any] = {"separator": c.step_separator, "hard": c.hard_labels, "until_mistake": c.until_mistake}
        table = stepwise_table(c, source, option, self.model, self.run, **options)
        if option == "--data":
            self.model.values_prompts = "prompt_label" in table.extra
        rows = zip(table.columns["step_ends"], table.columns["step_labels"], strict=True)
        labels = [label for ends, row in rows for end, label in zip(ends, row, strict=True) if end >= 0]
        wrong = sum(label <= 0.5 for label in labels)
        self.run.describe(**{f"steps {option.lstrip('-')}": {"right": len(labels) - wrong, "wrong": wrong}})
        return table

    def denominators(self, batch: Stepwise) -> Denominators:
        return Denominators(len(batch), int(batch.step_count.sum()))

    def losses(self, model: Any, part: Stepwise, *rows: Tensor) -> Losses:
        logits = model.steps(layout(part), part.step_ends)
        judged = mask(part.step_count, part.step_ends.shape[1])
        assert self.method.loss is not None
        found = self.method.loss(self.config, logits, part.step_labels, judged)
        return replace(found, metrics={**found.metrics, **step_metrics(logits, part.step_labels, judged & (part.step_ends >= 0))})

    def evaluate(self) -> dict[str, float]:
        found = super().evaluate()
        if self.eval_table is None:
            return found
        logits, labels = [], []
        with torch.no_grad():
            for start in range(0, len(self.eval_table), self.config.batch_size):
                batch = self.batch(self.eval_table, range(start, min(start + self.config.batch_size, len(self.eval_table))))
                for (part,) in micro_batches(self.config.micro_batch_size, batch):
                    steps = mask(part.step_count, part.step_ends.shape[1]) & (part.step_ends >= 0)
                    logits.append(self.model.steps(layout(part), part.step_ends)[steps])
                    labels.append(part.step_labels[steps])
        scores, truth = torch.cat(logits), torch.cat(labels)
        area = auc(scores, truth > 0.5)
        known = {"eval/steps/auc": area} if area == area else {}  # NaN where all steps are of one kind
        return found | known | {"eval/steps/calibration_error": calibration_error(scores.sigmoid(), truth)}
