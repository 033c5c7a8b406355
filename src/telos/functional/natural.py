"""Natural gradients: directions in which a policy changes fastest for the distance that it moves, and steps of a given distance along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def conjugate_gradient(product: Callable[[Tensor], Tensor], target: Tensor, iterations: int = 10, tolerance: float = 1e-10) -> Tensor:
    """x with A x = target for a symmetric positive matrix that is known by its products, [P]; at most `iterations` of them, fewer when the squared residual
    falls below `tolerance`."""
    x, residual = torch.zeros_like(target), target.clone()
    direction, size = residual.clone(), residual @ residual
    for _ in range(iterations):
        if size < tolerance:
            break
        image = product(direction)
        length = size / (direction @ image)
        x = x + length * direction
        residual = residual - length * image
        following = residual @ residual
        direction = residual + (following / size) * direction
        size = following
    return x


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@torch.no_grad()
def add_to(parameters: Sequence[Tensor], change: Tensor, scale: float = 1.0) -> None:
    """Adds `scale` times parts of `change` [P] to the parameters, in their order."""
    place = 0
    for parameter in parameters:
        size = parameter.numel()
        parameter.add_(change[place : place + size].view_as(parameter), alpha=scale)
        place += size


def fisher_product(kl: Tensor, parameters: Sequence[Tensor], damping: float) -> Callable[[Tensor], Tensor]:
    """v → (H + damping) v with H the Hessian of a mean KL divergence at its minimum, which there is the Fisher matrix."""
    slope = flat(torch.autograd.grad(kl, parameters, create_graph=True))

    def product(vector: Tensor) -> Tensor:
        return flat(torch.autograd.grad(slope @ vector, parameters, retain_graph=True)).detach() + damping * vector

    return product


def trust_region_step(
    parameters: Sequence[Tensor],
    gain_and_kl: Callable[[], tuple[Tensor, Tensor]],
    *,
    max_kl: float,
    damping: float,
    cg_iterations: int,
    backtracks: int,
) -> Searched:
    """Moves `parameters` along the natural gradient of a surrogate gain, as far as a mean KL divergence from where they are allows. `gain_and_kl` gives both
    at the parameters as they then are, with gradient (Schulman et al. 2015, arXiv:1502.05477, appendix C)."""
    gain, kl = gain_and_kl()
    gradient = flat(torch.autograd.grad(gain, parameters, retain_graph=True)).detach()
    if float(gradient.norm()) < 1e-12:
        return Searched(0.0, 0.0, 0.0)
    product = fisher_product(kl, parameters, damping)
    direction = conjugate_gradient(product, gradient, cg_iterations)
    length = torch.sqrt(2 * max_kl / (direction @ product(direction)).clamp(min=1e-12))

    @torch.no_grad()
    def numbers() -> tuple[float, float]:
        gain, kl = gain_and_kl()
        return float(gain), float(kl)

    return line_search(parameters, direction * length, numbers, max_kl, tries=backtracks)


@dataclass(frozen=True)
class Searched:
    """How a line search ended: the share of the full step that was taken (0: none), and surrogate gain and KL there."""

    share: float
    gain: float
    kl: float

    @property
    def metrics(self) -> dict[str, float]:
        return {"policy/step": self.share, "policy/gain": self.gain, "policy/kl": self.kl}


def line_search(
    parameters: Sequence[Tensor],
    step: Tensor,
    gain_and_kl: Callable[[], tuple[float, float]],
    limit: float,
    *,
    shrink: float = 0.8,
    tries: int = 10,
) -> Searched:
    """Moves `parameters` by the largest of `step`, shrink · step, shrink² · step … that raises the surrogate and keeps the KL divergence within `limit`;
    where none does they stay as they are."""
    before, _ = gain_and_kl()
    kept = [parameter.detach().clone() for parameter in parameters]
    share = 1.0
    for _ in range(tries):
        add_to(parameters, step, share)
        gain, kl = gain_and_kl()
        if gain > before and kl <= limit:
            return Searched(share, gain - before, kl)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept):
                parameter.copy_(value)
        share *= shrink
    return Searched(0.0, 0.0, 0.0)
