"""Offline training on pairs of answers. One forward pass scores both answers of each pair; their prompt is computed once.

A method's `loss(config, pair)` takes a `functional.pairwise.PairLogps` and returns per-pair `Losses`. The reference is loaded only when the method
`needs` it, so that a reference-free method has none in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from telos.algorithms.language._minibatches import MinibatchConfig, MinibatchProgram
from telos.algorithms.language._options import load_policy
from telos.algorithms.language._roles import Reference
from telos.algorithms.language._rows import pairs_table
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.data.batches import Pairs
from telos.data.tokenize import Table
from telos.dataflow import make_backend
from telos.functional.pairwise import AnswerLogps, PairLogps
from telos.functional.reduction import Denominators, Losses
from telos.models.language import LanguageModel
from telos.models.packing import Answers


@dataclass(frozen=True, kw_only=True)
class PairsConfig(MinibatchConfig):
    """Options of training on pairs."""

    learning_rate: float = 1e-6  # peak, AdamW
    reference: str | None = None  # model that regularises; default: the policy as it is at the start
    label_smoothing: float = 0.0  # probability that a label is wrong, 0 … 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and < 0.5", "label_smoothing")


def layout(batch: Pairs) -> Answers:
    """Chosen and rejected answers, interleaved, on a shared prompt."""
    return Answers.repeat(
        batch.prompt_ids, batch.prompt_length, (batch.chosen_ids, batch.chosen_length), (batch.rejected_ids, batch.rejected_length)
    )


def pair_logps(tokens: Tensor, answers: Answers, reference: Tensor | None, margin: Tensor) -> PairLogps:
    """Sorts interleaved token scores [2B, La] and the reference's [B, 2, La] into sides."""
    mask = answers.mask
    chosen, rejected = mask[0::2], mask[1::2]
    return PairLogps(
        AnswerLogps(tokens[0::2], chosen),
        AnswerLogps(tokens[1::2], rejected),
        None if reference is None else AnswerLogps(reference[:, 0], chosen),
        None if reference is None else AnswerLogps(reference[:, 1], rejected),
        margin,
    )


class Program(MinibatchProgram):
    config: PairsConfig

    def __init__(self, method: Method, config: PairsConfig, run: Run) -> None:
        if config.reference is not None and "reference" not in method.needs:
            raise UsageError(f"--reference has no effect on {method.key}, which uses no reference model")
        super().__init__(method, config, run)
        self.reference = None
        if "reference" in method.needs:
            self.reference = make_backend(config.backend).place(lambda: Reference(self.model, config.reference))

    def build_model(self) -> LanguageModel:
        return load_policy(self.config)

    def read_table(self, source: str, option: str) -> Table:
        return pairs_table(self.config, source, option, self.model, self.run)

    def denominators(self, batch: Pairs) -> Denominators:
        return Denominators(len(batch), int(batch.chosen_length.sum() + batch.rejected_length.sum()))

    def frozen_rows(self, batch: Pairs) -> tuple[Tensor, ...]:
        if self.reference is None:
            return ()
        return (self.reference.call("logprobs", batch, layout=layout, kinds=2, micro_batch_size=self.config.micro_batch_size),)

    def losses(self, model: Any, part: Pairs, *rows: Tensor) -> Losses:
        answers = layout(part)
        tokens = model.logprobs(answers).logprobs
        assert self.method.loss is not None
        return self.method.loss(self.config, pair_logps(tokens, answers, rows[0] if rows else None, part.margin))
