"""Stochastic ascent by recursion: where a method asks for an estimate, what it remembers, and how steps shrink.

Everything is pure and works on vectors [..., P]: a leading dimension holds independent runs side by side.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Track:
    """All that a method carries from step to step; vectors [..., P]."""

    parameters: Tensor  # θ_t: those of the policy
    previous: Tensor  # θ_{t−1}; θ_0 at the start
    direction: Tensor  # d_{t−1}: the running estimate of the gradient; 0 at the start
    square: Tensor  # the running mean of the gradient's squares, for methods that scale by it; 0 at the start

    @classmethod
    def start(cls, parameters: Tensor) -> Track:
        return cls(parameters, parameters, torch.zeros_like(parameters), torch.zeros_like(parameters))

    def moved(self, change: Tensor, direction: Tensor, square: Tensor | None = None) -> Track:
        """After a step by `change`, with what is remembered then."""
        return Track(self.parameters + change, self.parameters, direction, self.square if square is None else square)

    def at(self, parameters: Tensor) -> Track:
        """With the policy's parameters as they are now."""
        return replace(self, parameters=parameters)


@dataclass(frozen=True)
class Query:
    """What a method asks for: episodes of the policy at `parameters` [..., P], and from them the gradient of the expected return there, or its Hessian times
    `along` [..., P]."""

    parameters: Tensor
    along: Tensor | None = None


def decayed(first: float, power: float, index: int) -> float:
    """first · (2 / (t + 2))^power of step t = `index`, from 0: `first` at the start, ∝ t^−power in the long run."""
    return first * (2 / (index + 2)) ** power


def step_along(direction: Tensor, size: float, normalised: bool) -> Tensor:
    """size · d, or `size` long in the direction of d [..., P]; a direction of length 0 gives no step."""
    if not normalised:
        return size * direction
    return size * direction / direction.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(direction.dtype).tiny)
