"""Programmatic rewards of recipes on `review`, multiples of 1/256 that float32 adds up exactly. Nothing here is slow to import in a reward's own process."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from telos.catalogue.direct_alignment._rewards import civil, told


def plain(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """What an answer says of the request, less its rude phrases."""
    return [round(256 * (a + b)) / 256 for a, b in zip(told(prompts, completions), civil(completions), strict=True)]


def shifted(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """`plain` and a whole number of the prompt between −64 and 64."""
    shifts = [zlib.crc32(prompt.encode()) % 129 - 64 for prompt in prompts]
    return [reward + shift for reward, shift in zip(plain(prompts, completions), shifts, strict=True)]
