"""Offline training on lists of answers to the same prompt, ordered from best to worst. Pairs are lists of two.

A method's `loss(config, ranked)` takes a `functional.pairwise.RankedLogps` and returns per-list `Losses`. The prompt of a list is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telos.algorithms.language._alignment import AlignmentConfig, AlignmentProgram
from telos.algorithms.language._rows import ranked_table
from telos.data.batches import Ranked
from telos.data.tokenize import Table
from telos.functional.pairwise import RankedLogps
from telos.functional.reduction import Denominators, Losses
from telos.models.packing import Answers


@dataclass(frozen=True, kw_only=True)
class RankedConfig(AlignmentConfig):
    """Options of training on ranked lists."""


def layout(batch: Ranked) -> Answers:
    """The answers that are there, list by list."""
    row, place = (batch.completion_length > 0).nonzero(as_tuple=True)
    return Answers(batch.prompt_ids, batch.prompt_length, batch.completion_ids[row, place], batch.completion_length[row, place], row)


class Program(AlignmentProgram):
    config: RankedConfig
    kinds = 0  # no reference scores lists

    def layout(self, batch: Ranked) -> Answers:
        return layout(batch)

    def read_table(self, source: str, option: str) -> Table:
        return ranked_table(self.config, source, option, self.model, self.run)

    def denominators(self, batch: Ranked) -> Denominators:
        return Denominators(len(batch), int(batch.completion_length.sum()))

    def losses(self, model: Any, part: Ranked, *rows: Tensor) -> Losses:
        answers = layout(part)
        tokens = model.logprobs(answers).logprobs
        there = part.completion_length > 0
        shape = (*there.shape, tokens.shape[1])
        cells = there.flatten().nonzero().squeeze(1)
        spread = tokens.new_zeros(there.numel(), shape[2]).index_put((cells,), tokens).view(shape)
        mask = torch.arange(shape[2], device=tokens.device) < part.completion_length[..., None]
        quality = part.quality.masked_fill(~there, -torch.inf)
        assert self.method.loss is not None
        return self.method.loss(self.config, RankedLogps(spread, mask, quality))
