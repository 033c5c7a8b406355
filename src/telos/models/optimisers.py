"""Optimisers beyond those of torch.

Adan: adaptive Nesterov momentum, reformulated so that no gradient is taken at an extrapolated point (Xie et al. 2022, arXiv:2208.06677, algorithm 1). With
decay rates β₁, β₂, β₃ (one minus the paper's) and d_k = g_k − g_{k−1}, d_0 = 0:

    m_k = β₁ m_{k−1} + (1 − β₁) g_k
    v_k = β₂ v_{k−1} + (1 − β₂) d_k
    n_k = β₃ n_{k−1} + (1 − β₃) (g_k + β₂ d_k)²
    θ_{k+1} = (θ_k − η (m_k + β₂ v_k) / (√n_k + ε)) / (1 + λ η)

The moments are corrected for their start at zero, as in the authors' code. The restart of the paper's theory is an option: when the steps since the
last one have moved the weights further than a radius, momentum is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Adan(Optimizer):
    """Arguments as torch's AdamW has them, where it has them.

    `betas`: β₁, β₂, β₃ in [0, 1) (authors: 0.98, 0.92, 0.99). `weight_decay`: λ >= 0, proximal. `restart`: radius R > 0; with k steps since the last
    restart and their changes Δ, momentum is forgotten when k Σ ‖Δ‖² > R²; 0 never does. Raises `ValueError` for values out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        restart: float = 0.0,
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and restart >= 0) or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr {lr}, eps {eps}, weight_decay {weight_decay} and restart {restart} must be >= 0, betas {betas} in [0, 1)")
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "restart": restart})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step(group, [p for p in group["params"] if p.grad is not None])
        return loss

    def _step(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        b1, b2, b3 = group["betas"]
        gradients: list[Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
        for p, gradient in zip(parameters, gradients):
            state = self.state[p]
            if not state:
                state |= {"step": torch.zeros(()), "moved": torch.zeros(()), "before": gradient.clone()}
                state |= {name: torch.zeros_like(p) for name in ("m", "v", "n")}
        states = [self.state[p] for p in parameters]
        m, v, n, before = ([state[name] for state in states] for name in ("m", "v", "n", "before"))
        difference = torch._foreach_sub(gradients, before)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_lerp_(m, gradients, 1 - b1)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_lerp_(v, difference, 1 - b2)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(difference, b2)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_add_(difference, gradients)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(n, b3)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_addcmul_(n, difference, difference, 1 - b3)  # type: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(before, gradients)  # type: ignore[reportPrivateImportUsage]
        for p, state in zip(parameters, states):
            state["step"] += 1
            k = float(state["step"])
            size = (state["n"] / (1 - b3**k)).sqrt_().add_(group["eps"])
            change = (state["m"] / (1 - b1**k)).add_(state["v"], alpha=b2 / (1 - b2**k)).div_(size).mul_(-group["lr"])
            old = p.clone() if group["restart"] else None
            p.add_(change).div_(1 + group["lr"] * group["weight_decay"])
            if old is not None:
                state["moved"] += float((p - old).square().sum())
        if group["restart"]:
            self._restart(group["restart"], states)

    def _restart(self, radius: float, states: list[dict[str, Tensor]]) -> None:
        """Forgets momentum where the weights of the group have moved further than the radius since it was last forgotten."""
        if float(states[0]["step"]) * sum(float(state["moved"]) for state in states) <= radius**2:
            return
        for state in states:
            for name in ("m", "v", "n", "step", "moved"):
                state[name].zero_()
