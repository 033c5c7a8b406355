"""Supervised training on text: every learned token has a weight, the loss is per token.

A method's `loss(config, logprobs, mask, entropy)` takes token log-probabilities [B, T], the mask of learned tokens [B, T] and the entropies, and
returns `Losses`. Data: `text`/`messages`, or `prompt` + `completion`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from telos.algorithms.language._minibatches import MinibatchConfig, MinibatchProgram
from telos.algorithms.language._options import load_policy
from telos.algorithms.language._rows import supervised_table
from telos.data.batches import Sequences
from telos.data.tokenize import Table
from telos.functional.reduction import Denominators, Losses
from telos.models.language import LanguageModel
from telos.models.packing import Answers


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(MinibatchConfig):
    """Options of supervised training."""

    learning_rate: float = 2e-5  # peak, AdamW


def layout(batch: Sequences) -> Answers:
    """Each sequence as a prompt of one token and an answer of the rest: every token after the first can be scored."""
    import torch

    return Answers(
        batch.ids[:, :1],
        torch.ones_like(batch.length),
        batch.ids[:, 1:],
        batch.length - 1,
        torch.arange(len(batch), device=batch.ids.device),
    )


class Program(MinibatchProgram):
    config: SupervisedConfig

    def build_model(self) -> LanguageModel:
        return load_policy(self.config)

    def read_table(self, source: str, option: str) -> Table:
        return supervised_table(self.config, source, option, self.model, self.run)

    def denominators(self, batch: Sequences) -> Denominators:
        return Denominators(len(batch), int(batch.loss_mask.sum()))

    def losses(self, model: Any, part: Sequences, *rows: Tensor) -> Losses:
        scores = model.logprobs(layout(part), want_entropy=False)
        assert self.method.loss is not None
        return self.method.loss(self.config, scores.logprobs, part.loss_mask[:, 1:])
