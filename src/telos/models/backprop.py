"""Perceptrons whose gradients are written out, by NumPy on the very memory of torch's weights: at control's sizes most of autograd's time is overhead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from telos.models.networks import Fast


def _of_tanh(slope: np.ndarray, _: np.ndarray, out: np.ndarray) -> np.ndarray:
    taken = out * out
    taken *= slope
    slope -= taken
    return slope


def _of_relu(slope: np.ndarray, _: np.ndarray, out: np.ndarray) -> np.ndarray:
    slope *= out > 0
    return slope


def _of_silu(slope: np.ndarray, x: np.ndarray, _: np.ndarray) -> np.ndarray:
    gate = 0.5 + 0.5 * np.tanh(x / 2)
    slope *= gate * (1 + x * (1 - gate))
    return slope


_SLOPES: dict[type[nn.Module], Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    nn.Tanh: _of_tanh,
    nn.ReLU: _of_relu,
    nn.SiLU: _of_silu,
}


# Activations whose derivative follows from what they give are written over their input, which a linear layer has just made.
_IN_PLACE: dict[type[nn.Module], Callable[[np.ndarray], np.ndarray]] = {
    nn.Tanh: lambda x: np.tanh(x, out=x),
    nn.ReLU: lambda x: np.maximum(x, 0.0, out=x),
}


class Backprop:
    """A perceptron on the CPU, forward and backward. `gradient_of(parameter)` is the array into which that parameter's gradient is written.

    Raises `ValueError` for a network that is none of linear layers with tanh, ReLU or SiLU between them: ask `supports`.
    """

    def __init__(self, network: nn.Sequential, gradient_of: Callable[[Any], np.ndarray]) -> None:
        if not self.supports(network):
            raise ValueError(f"no gradients are written out for {network}")
        fast = Fast.of(network)
        assert fast is not None
        self.layers = [
            _IN_PLACE.get(type(layer), known) if i and callable(known) else known
            for i, (layer, known) in enumerate(zip(network, fast.layers, strict=True))
        ]
        self.slopes = [_SLOPES.get(type(layer)) for layer in network]
        self.gradients = [
            (gradient_of(layer.weight), gradient_of(layer.bias)) if isinstance(layer, nn.Linear) else None for layer in network
        ]
        self.seen: list[np.ndarray] = []
        self._ones = np.ones(0, dtype=np.float32)

    @staticmethod
    def supports(network: nn.Module) -> bool:
        return Fast.of(network) is not None and all(isinstance(layer, nn.Linear) or type(layer) in _SLOPES for layer in network)  # type: ignore[union-attr]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """[B, in] float32 to [B, out]; what `backward` needs is kept until the next call."""
        self.seen = [x]
        for layer in self.layers:
            if callable(layer):
                x = layer(x)
            else:
                x = x @ layer[0]
                x += layer[1]
            self.seen.append(x)
        return x

    def backward(self, slope: np.ndarray) -> None:
        """Writes the gradients of Σ_B loss from its derivative in the outputs [B, out], which is used up."""
        if len(self._ones) != len(slope):
            self._ones = np.ones(len(slope), dtype=np.float32)
        for i in range(len(self.layers) - 1, -1, -1):
            into, layer, of = self.gradients[i], self.layers[i], self.slopes[i]
            if into is None:
                assert of is not None
                slope = of(slope, self.seen[i], self.seen[i + 1])
                continue
            np.matmul(slope.T, self.seen[i], out=into[0])
            np.dot(self._ones, slope, out=into[1])  # a sum over rows, by a third of the time that a reduction takes
            if i:
                assert not callable(layer)
                slope = slope @ layer[0].T
