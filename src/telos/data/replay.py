"""Replay: what has been seen, in files that grow no further, and how batches are drawn from it.

The newest `capacity` steps can be drawn. They lie in memory-mapped arrays of the run's folder, so that they need no copy in a checkpoint: the ring is
longer than `capacity` by `slack` steps, so that what a resumed run looks back on has not been overwritten since its checkpoint, as long as at most
`slack` steps were added after it. The system writes the files when it likes; a killed process loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from telos.core.errors import Failure, UsageError
from telos.data.transitions import Transitions


class Replay:
    """Steps of N environments side by side. Rows are times, columns are copies; `capacity` and `slack` count single steps.

    `folder` None keeps the arrays in memory. Raises `UsageError` when the disk has no room for them.
    """

    def __init__(
        self,
        capacity: int,
        copies: int,
        observation: tuple[tuple[int, ...], Any],
        action: tuple[tuple[int, ...], Any],
        *,
        slack: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.copies = copies
        self.capacity = -(-capacity // copies)  # in rows
        self.rows = self.capacity + -(-slack // copies)
        self.written = 0  # rows, over all time
        self._arrays: dict[str, np.ndarray] = {}
        plan = {
            "observation": observation,
            "next_observation": observation,
            "action": action,
            "reward": ((), np.float32),
            "terminated": ((), np.bool_),
            "ended": ((), np.bool_),
        }
        for name, (shape, kind) in plan.items():
            self._arrays[name] = self._array(name, (self.rows, copies, *shape), np.dtype(kind), folder)

    def _array(self, name: str, shape: tuple[int, ...], kind: np.dtype, folder: Path | None) -> np.ndarray:
        if folder is None:
            return np.zeros(shape, kind)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.npy"
        try:
            if path.exists():
                found = np.lib.format.open_memmap(path, mode="r+")
                if found.shape != shape or found.dtype != kind:
                    raise Failure(f"{path} holds {found.dtype} {found.shape}, and the run needs {kind} {shape}: its options have changed")
                return found
            return np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)  # sparse: grows as it is written
        except (OSError, ValueError) as error:
            raise UsageError(
                f"the replay {path} of {int(np.prod(shape)) * kind.itemsize / 2**20:.0f} MiB cannot be opened: {error}"
            ) from error

    @property
    def next_observation(self) -> np.ndarray:
        """[rows, N, …] as they lie in the ring."""
        return self._arrays["next_observation"]

    @property
    def ended(self) -> np.ndarray:
        """[rows, N] bool, as they lie in the ring."""
        return self._arrays["ended"]

    def __len__(self) -> int:
        """Steps that can be drawn."""
        return min(self.written, self.capacity) * self.copies

    def add(self, **values: np.ndarray) -> None:
        """One row: what all copies have seen in one step, [N, …] by name."""
        row = self.written % self.rows
        for name, array in self._arrays.items():
            array[row] = values[name]
        self.written += 1

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """`count` places [count], uniformly with replacement: row × N + copy, of rows counted over all time."""
        oldest = max(0, self.written - self.capacity)
        return generator.integers(oldest * self.copies, self.written * self.copies, count)

    def take(self, places: np.ndarray, *, gamma: float, steps: int = 1, weight: np.ndarray | None = None) -> Transitions:
        """Transitions of `steps` steps from `places`, fewer where the episode or the data end before."""
        row, copy = np.divmod(places, self.copies)
        a = self._arrays
        at = row % self.rows
        reward = a["reward"][at, copy].copy()
        discount = np.full(len(places), gamma, np.float32)
        last = row.copy()
        if steps > 1:
            going = ~a["ended"][at, copy]
            for _ in range(steps - 1):
                going = going & (last + 1 < self.written)
                if not going.any():
                    break
                last = np.where(going, last + 1, last)
                ahead = last % self.rows
                reward = reward + np.where(going, discount * a["reward"][ahead, copy], 0.0).astype(np.float32)
                discount = np.where(going, discount * gamma, discount).astype(np.float32)
                going = going & ~a["ended"][ahead, copy]
        end = last % self.rows
        discount = np.where(a["terminated"][end, copy], np.float32(0), discount)
        return Transitions(
            observation=torch.from_numpy(a["observation"][at, copy]),
            action=torch.from_numpy(a["action"][at, copy]),
            reward=torch.from_numpy(reward),
            next_observation=torch.from_numpy(a["next_observation"][end, copy]),
            discount=torch.from_numpy(discount),
            weight=torch.ones(len(places)) if weight is None else torch.from_numpy(weight.astype(np.float32)),
            index=torch.from_numpy(places),
            batch_size=[len(places)],
        )

    def state(self) -> dict[str, Any]:
        for array in self._arrays.values():
            if isinstance(array, np.memmap):
                array.flush()
        kept = {} if isinstance(self._arrays["reward"], np.memmap) else {"arrays": dict(self._arrays)}
        return {"written": self.written, **kept}

    def load(self, state: Mapping[str, Any]) -> None:
        self.written = int(state["written"])
        for name, array in state.get("arrays", {}).items():
            self._arrays[name][...] = array


class Priorities:
    """Sums over a binary tree of priorities, for drawing in proportion to them (Schaul et al. 2016, arXiv:1511.05952). All operations take arrays."""

    def __init__(self, size: int) -> None:
        self.leaves = 1 << max(0, size - 1).bit_length()
        self.size = size
        self.tree = np.zeros(2 * self.leaves)

    @property
    def total(self) -> float:
        return float(self.tree[1])

    def set(self, places: np.ndarray, values: np.ndarray) -> None:
        """Sets the priorities of `places` (repeated places: the last value counts)."""
        nodes = np.asarray(places) + self.leaves
        self.tree[nodes] = values
        while nodes[0] > 1:
            nodes = np.unique(nodes >> 1)
            self.tree[nodes] = self.tree[2 * nodes] + self.tree[2 * nodes + 1]

    def draw(self, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """(places, their probabilities), stratified: one from each of `count` equal parts of the total."""
        targets = (np.arange(count) + generator.random(count)) * (self.total / count)
        nodes = np.ones(count, dtype=np.int64)
        while nodes[0] < self.leaves:
            left = 2 * nodes
            mass = self.tree[left]
            right = targets >= mass
            # Rounding must not lead into an empty branch.
            right = np.where(self.tree[left + 1] <= 0, False, np.where(mass <= 0, True, right))
            targets = np.where(right, targets - mass, targets)
            nodes = left + right
        return nodes - self.leaves, self.tree[nodes] / self.total
