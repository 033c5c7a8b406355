"""Targets and errors of action values."""

from __future__ import annotations

import torch
from torch import Tensor


def expectile(errors: Tensor, share: float) -> Tensor:
    """|share − 1(error < 0)| error², whose minimum over a constant is the expectile `share` in (0, 1) (Kostrikov et al. 2022, arXiv:2110.06169, eq. 5)."""
    return torch.where(errors < 0, 1 - share, share) * errors**2


def squared(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """The weighted squared error, [B], summed over the members of an ensemble [E, B]."""
    error = (values - target) ** 2
    return weight * (error.sum(0) if error.ndim == 2 else error)


def huber(values: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """As `squared`, with half the square below an error of 1 and a line beyond (Mnih et al. 2015)."""
    error = torch.nn.functional.huber_loss(values, target.expand_as(values), reduction="none")
    return weight * (error.sum(0) if error.ndim == 2 else error)


def gumbel(z: Tensor, bound: float) -> Tensor:
    """exp(z) − z − 1 with z clamped from above at `bound`, scaled down by the batch's largest exponential (Garg et al. 2023, arXiv:2301.02328, appendix D)."""
    z = z.clamp(max=bound)
    largest = z.detach().max().clamp(min=0.0)
    return torch.exp(z - largest) - (z + 1) * torch.exp(-largest)
