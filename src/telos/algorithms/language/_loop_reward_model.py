"""Training of models that score an answer with one number, from pairs.

A method's `loss(config, chosen, rejected, margin)` takes the scores of both answers and the annotated margin, all [B], and returns per-pair `Losses`.
The result is a Hugging Face sequence-classification folder with one label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from telos.algorithms.language._loop_pairs import layout
from telos.algorithms.language._minibatches import MinibatchConfig, MinibatchProgram
from telos.algorithms.language._options import lora_of
from telos.algorithms.language._rows import pairs_table
from telos.data.batches import Pairs
from telos.data.tokenize import Table
from telos.functional.reduction import Denominators, Losses
from telos.objectives.reward_model import RewardModel


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig(MinibatchConfig):
    """Options of training a reward model."""

    learning_rate: float = 1e-5  # peak, AdamW


class Program(MinibatchProgram):
    config: RewardModelConfig
    kind: type[RewardModel] = RewardModel

    def build_model(self) -> RewardModel:
        c = self.config
        return self.kind.load(
            c.model,
            fresh=True,
            tokenizer=c.tokenizer,
            chat_template=c.chat_template,
            lora=lora_of(c),
            precision=c.precision,
            device=c.device,
        )

    def read_table(self, source: str, option: str) -> Table:
        return pairs_table(self.config, source, option, self.model, self.run)

    def denominators(self, batch: Pairs) -> Denominators:
        return Denominators(len(batch), int(batch.chosen_length.sum() + batch.rejected_length.sum()))

    def losses(self, model: Any, part: Pairs, *rows: Tensor) -> Losses:
        scores = model.scores(layout(part))
        assert self.method.loss is not None
        return self.method.loss(self.config, scores[0::2], scores[1::2], part.margin)
