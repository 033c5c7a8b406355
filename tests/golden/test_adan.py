"""Adan against its recursion written out for one number, and its restart."""

from __future__ import annotations

import math

import pytest
import torch

from telos.models.optimisers import Adan


def reference(
    gradients: list[float], lr: float, betas: tuple[float, float, float], eps: float, weight_decay: float, start: float
) -> list[float]:
    """The weights, one number, after each of these gradients: the recursion of the module's docstring written out, for comparison."""
    b1, b2, b3 = betas
    weight, m, v, n, before, found = start, 0.0, 0.0, 0.0, gradients[0], []
    for k, g in enumerate(gradients, 1):
        d = g - before
        m, v, n, before = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * d, b3 * n + (1 - b3) * (g + b2 * d) ** 2, g
        step = lr * (m / (1 - b1**k) + b2 * v / (1 - b2**k)) / (math.sqrt(n / (1 - b3**k)) + eps)
        weight = (weight - step) / (1 + lr * weight_decay)
        found.append(weight)
    return found


@pytest.mark.parametrize("betas", [(0.98, 0.92, 0.99), (0.5, 0.3, 0.9)])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_weight_follows_the_recursion_step_by_step(betas: tuple[float, float, float], decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in ((3, 2), (5,))]
    start = [w.detach().clone() for w in weights]
    optimiser = Adan(weights, lr=0.05, betas=betas, eps=1e-6, weight_decay=decay)
    given: list[list[torch.Tensor]] = []
    for _ in range(12):
        gradients = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
        for w, g in zip(weights, gradients, strict=True):
            w.grad = g.clone()
        optimiser.step()
        given.append(gradients)
    for i, w in enumerate(weights):
        for place in torch.cartesian_prod(*[torch.arange(n) for n in w.shape]).reshape(-1, w.ndim).tolist():
            wanted = reference([float(g[i][tuple(place)]) for g in given], 0.05, betas, 1e-6, decay, float(start[i][tuple(place)]))
            assert float(w.detach()[tuple(place)]) == pytest.approx(wanted[-1], abs=1e-12)


def test_constant_gradients_move_by_the_learning_rate_at_every_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    optimiser = Adan([weight], lr=0.1, eps=0.0)
    for k in range(1, 4):
        weight.grad = torch.tensor([3.0, -0.5])
        optimiser.step()
        assert torch.allclose(weight.detach(), torch.tensor([-0.1 * k, 0.1 * k]), atol=1e-6)


def test_momentum_is_forgotten_beyond_the_radius_and_only_then() -> None:
    """Steps of 0.1 each: after k of them k times the sum of squares is 0.01 k², which passes 0.25² in the third."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = Adan([weight], lr=0.1, eps=0.0, restart=0.25)
    for k in range(1, 4):
        weight.grad = torch.ones(1)
        optimiser.step()
        assert (float(optimiser.state[weight]["step"]) == 0) == (k == 3)
    assert float(optimiser.state[weight]["m"]) == 0


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (1.0, 0.9, 0.9)}, {"weight_decay": -0.1}, {"restart": math.nan}])
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must be >= 0"):
        Adan([torch.nn.Parameter(torch.zeros(1))], **wrong)  # type: ignore[arg-type]
