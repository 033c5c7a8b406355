"""Seeds: every random stream is derived from one number and a label, and the three uses of seeds never share a value.

`training` seeds are the user's own (`--seed`), `tuning` seeds are for choosing settings, `reporting` seeds for claims. They lie in separate
ranges, so that no result can be reported on a seed on which a setting was chosen. Streams are counter-based: the draw of step 17 depends on
(seed, label, 17) alone, so a resumed run needs no generator's inner state.
"""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING, Literal

from telos.core.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

Space = Literal["training", "tuning", "reporting"]
_RANGE = 1_000_000_000
_OFFSET: dict[Space, int] = {"training": 0, "tuning": _RANGE, "reporting": 2 * _RANGE}


def seed_in(space: Space, index: int) -> int:
    """The `index`-th seed of a space; spaces are disjoint. Raises `UsageError` outside 0 <= index < 10^9."""
    if not 0 <= index < _RANGE:
        raise UsageError(f"seed {index} is outside 0 … {_RANGE - 1}")
    return _OFFSET[space] + index


def derive(seed: int, *labels: str | int) -> int:
    """A 63-bit seed for the stream called `labels`, independent of every other stream of the same `seed`."""
    digest = hashlib.sha256(repr((seed, *labels)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def numpy_generator(seed: int, *labels: str | int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(derive(seed, *labels))


def torch_generator(seed: int, *labels: str | int, device: str = "cpu") -> torch.Generator:
    import torch

    return torch.Generator(device=device).manual_seed(derive(seed, *labels))


def seed_everything(seed: int) -> None:
    """Seeds the global generators, which only third-party code (dropout, initialisers) should still draw from."""
    import numpy as np
    import torch

    random.seed(derive(seed, "python"))
    np.random.seed(derive(seed, "numpy") % 2**32)
    torch.manual_seed(derive(seed, "torch"))
