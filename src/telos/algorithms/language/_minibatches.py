"""The shape that supervised, reward-model and pairwise training share: shuffled minibatches of a table, one optimiser step each.

A loop built on it says what its batch looks like (`layout`), what its loss is on a part of a batch (`losses`), and over how many examples and tokens the whole
batch runs (`denominators`). Everything else, micro-batches, replicas, evaluation, checkpoints, happens here once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from telos.algorithms.language._options import TrainingConfig
from telos.algorithms.language._roles import Learner
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import derive
from telos.data.cursor import Cursor
from telos.data.tokenize import Table
from telos.dataflow import make_backend
from telos.functional.reduction import Denominators, Losses, means


@dataclass(frozen=True, kw_only=True)
class MinibatchConfig(TrainingConfig):
    """Options of training on a fixed table."""

    eval_data: str | None = None  # held-out rows in the format of --data
    eval_every: int = 50  # steps between evaluations; the last step is always evaluated

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "eval_every")


class MinibatchProgram:
    """One optimiser step per call on the next shuffled minibatch."""

    model: Any  # what is trained and, at the end, saved

    def __init__(self, method: Method, config: MinibatchConfig, run: Run) -> None:
        self.method, self.config, self.run = method, config, run
        self.last_batch: Mapping[str, Any] = {}
        self.model = self.build_model()
        self.table = self.read_table(config.data, "--data")
        self.eval_table = self.read_table(config.eval_data, "--eval_data") if config.eval_data else None
        if len(self.table) < config.batch_size:
            raise UsageError(f"--batch_size {config.batch_size} is larger than the {len(self.table)} usable rows of {config.data}")
        self.cursor = Cursor(len(self.table), config.batch_size, derive(config.seed, "rows"), drop_last=True)
        self.learner = make_backend(config.backend).place(lambda: Learner(self.model, config, config.steps))

    # -- what a loop supplies -----------------------------------------------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        raise NotImplementedError

    def read_table(self, source: str, option: str) -> Table:
        raise NotImplementedError

    def denominators(self, batch: Any) -> Denominators:
        raise NotImplementedError

    def losses(self, model: Any, part: Any, *rows: Tensor) -> Losses:
        raise NotImplementedError

    def frozen_rows(self, batch: Any) -> tuple[Tensor, ...]:
        """What frozen models say of the whole batch, row by row; handed to `losses` beside the part."""
        return ()

    # -- the program --------------------------------------------------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        epochs = self.config.steps * self.config.batch_size / len(self.table)
        trained = sum(p.numel() for p in self.learner.workers[0].parameters_to_reduce())
        return {
            "rows": len(self.table),
            "rows a step": self.config.batch_size,
            "rows a pass": self.config.micro_batch_size or self.config.batch_size,
            "steps": self.config.steps,
            "epochs": round(epochs, 2),
            "trained parameters": trained,
        }

    def step(self, index: int) -> dict[str, float]:
        batch = self.batch(self.table, self.next_rows(index))
        self.last_batch = {name: value for name, value in batch.to_dict().items() if isinstance(value, Tensor)}
        result = self.learner.call("accumulate", batch, *self.frozen_rows(batch), losses=self.losses, denominators=self.denominators(batch))
        update = self.learner.call("apply", self.last_batch)
        metrics = {"loss": result["loss"], **means(result["metrics"]), **update}
        due = (index + 1) % self.config.eval_every == 0 or index + 1 == self.config.steps
        return metrics | self.evaluate() if due else metrics

    def next_rows(self, index: int) -> Any:
        """Which rows of the table step `index` learns from: every row once an epoch, shuffled."""
        return self.cursor.next()

    def batch(self, table: Table, indices: Any) -> Any:
        return table.batch(indices).to(self.model.device)

    def evaluate(self) -> dict[str, float]:
        """Loss and metrics over all held-out rows, under `eval/`; nothing without `--eval_data`."""
        table, size = self.eval_table, self.config.batch_size
        if table is None:
            return {}
        batches = [range(start, min(start + size, len(table))) for start in range(0, len(table), size)]
        # The counts of the whole table first: a mean of the batches' means would depend on their size.
        counts = [self.denominators(table.batch(rows)) for rows in batches]
        whole = Denominators(sum(count.examples for count in counts), sum(count.tokens for count in counts))
        loss, totals = 0.0, {}
        for rows in batches:
            batch = self.batch(table, rows)
            result = self.learner.call("assess", batch, *self.frozen_rows(batch), losses=self.losses, denominators=whole)
            loss += result["loss"]
            for name, (value, count) in result["metrics"].items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + value, before[1] + count)
        return {"eval/loss": loss, **{f"eval/{name}": value for name, value in means(totals).items()}}

    def state(self) -> dict[str, Any]:
        return {"learner": self.learner.workers[0].state(), "cursor": self.cursor.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        for worker in self.learner.workers:
            worker.load(state["learner"])
        self.cursor.load_state_dict(state["cursor"])

    def finish(self, run: Run) -> None:
        self.model.save(run.path / "model")
