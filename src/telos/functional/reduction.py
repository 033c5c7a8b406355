"""The one place where losses are averaged.

A loss returns values per token [B, T] or per example [B] and the loop says over how many tokens or examples the WHOLE batch runs. Micro-batches, ranks and
packing then change no gradient: each part contributes sum / global count, never a mean of means (the bug behind many a trainer whose result
depended on its micro-batch size).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Losses:
    """What a loss function returns. `values` [B, T] with `mask` [B, T], or [B] with `mask` None; `metrics` likewise, detached by the reducer.

    `extra` are further terms with a denominator of their own kind (a value loss beside a policy loss), already weighted.
    """

    values: Tensor
    mask: Tensor | None = None
    metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)
    extra: tuple[Losses, ...] = ()


@dataclass(frozen=True)
class Denominators:
    """Counts over the whole batch, fixed before it is split."""

    examples: int
    tokens: int

    def of(self, values: Tensor) -> int:
        count = self.examples if values.ndim == 1 else self.tokens
        if count < 1:
            raise ValueError(f"a batch without {'examples' if values.ndim == 1 else 'learned tokens'} has no mean loss")
        return count


def masked_sum(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum over the entries where `mask` is true; masked entries may hold anything, NaN too, and get zero gradient."""
    if mask is None:
        return values.sum()
    _same_shape(values, mask)
    return torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device)).sum()


def _same_shape(values: Tensor, mask: Tensor) -> None:
    if mask.shape != values.shape:
        raise ValueError(f"mask {tuple(mask.shape)} does not fit values {tuple(values.shape)}")


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean over true entries, over all or along `dim`; 0 where there is none."""
    _same_shape(values, mask)
    kept = torch.where(mask.bool(), values, torch.zeros((), dtype=values.dtype, device=values.device))
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def total(losses: Losses, denominators: Denominators) -> Tensor:
    """The scalar whose gradients add up over parts of a batch: sum of masked values over the global count."""
    out = masked_sum(losses.values, losses.mask) / denominators.of(losses.values)
    for term in losses.extra:
        out = out + total(term, denominators)
    return out


class MetricSums:
    """Adds up per-example and per-token metrics over micro-batches; `means(totals)` divides once, by what was counted."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]]) -> None:
        for name, value in metrics.items():
            values, mask = value if isinstance(value, tuple) else (value, None)
            self._sums[name] = self._sums.get(name, 0.0) + float(masked_sum(values.detach().double(), mask))
            self._counts[name] = self._counts.get(name, 0.0) + float(values.numel() if mask is None else mask.sum())

    def totals(self) -> dict[str, tuple[float, float]]:
        """(sum, count) by name: what may be added up over workers."""
        return {name: (self._sums[name], self._counts[name]) for name in self._sums}


def means(totals: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """sum / count by name; names that were never counted are left out."""
    return {name: value / count for name, (value, count) in totals.items() if count}


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """(values − mean) / std over true entries (population variance); with `shift_mean` False the mean is added back. Masked entries are 0."""
    values = torch.where(mask.bool(), values, torch.zeros_like(values))  # what is masked may be NaN, and its gradient too
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    out = (values - mean) * torch.rsqrt(variance + epsilon) + (0.0 if shift_mean else mean)
    return torch.where(mask.bool(), out, torch.zeros_like(out))
