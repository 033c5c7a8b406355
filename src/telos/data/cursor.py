"""Where a run stands in its data: shuffled epochs without end, resumed bit for bit from a few integers.

The order of epoch e is a function of (seed, e) alone: the ranks of n raw 64-bit words of the counter-based generator Philox
(Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"). Raw words, unlike `Generator.permutation`, are the same in every
version of numpy, so a checkpoint continues in the same order after an upgrade.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from telos.core.errors import UsageError


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """[n] int64: the permutation of 0..n-1 in which epoch `epoch` visits the rows."""
    words = np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


class Cursor:
    """Batches of row indices, epoch after epoch.

    n: rows (>= 1). batch_size: rows per batch (>= 1). seed: >= 0. drop_last: leave out the short batch at the end of an epoch; without it
    the last batch of an epoch has fewer rows. Every row comes exactly once per epoch (except those left out).
    Raises `UsageError` when no batch could ever be made.
    """

    def __init__(self, n: int, batch_size: int, seed: int, drop_last: bool = False) -> None:
        if n < 1 or batch_size < 1 or seed < 0:
            raise UsageError(f"a data cursor needs rows >= 1, batch size >= 1 and seed >= 0; got {n}, {batch_size}, {seed}")
        if drop_last and n < batch_size:
            raise UsageError(f"{n} rows never fill a batch of {batch_size}: lower the batch size or give more rows")
        self.n, self.batch_size, self.seed, self.drop_last = n, batch_size, seed, drop_last
        self.epoch = 0  # epochs completed
        self.position = 0  # rows taken in this epoch
        self._order = epoch_order(n, seed, 0)

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches in one epoch."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def next(self) -> np.ndarray:
        """Row indices of the next batch, int64 [batch_size] (fewer in the last batch of an epoch unless `drop_last`)."""
        rows = self._order[self.position : self.position + self.batch_size]
        self.position += len(rows)
        left = self.n - self.position
        if left == 0 or (self.drop_last and left < self.batch_size):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = epoch_order(self.n, self.seed, self.epoch)
        return rows

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, JSON-able."""
        names = ("n", "batch_size", "seed", "drop_last", "epoch", "position")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises `UsageError` when the data or the batches are not those of the interrupted run."""
        for name, meaning in (("n", "rows"), ("batch_size", "batch size"), ("seed", "seed"), ("drop_last", "drop_last")):
            if state[name] != getattr(self, name):
                raise UsageError(
                    f"cannot resume: the interrupted run had {meaning} {state[name]}, this one has {getattr(self, name)}. "
                    "Give the same data and options, or start a new run"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = epoch_order(self.n, self.seed, self.epoch)
