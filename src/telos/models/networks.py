"""Networks of control: perceptrons, the convolutions for pictures, running normalisation, and how small ones are evaluated without torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Activation = Literal["tanh", "relu", "silu", "gelu", "leaky_relu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU}


def perceptron(
    sizes: Sequence[int],
    activation: Activation = "tanh",
    *,
    gains: tuple[float, float] | None = None,
    layer_norm: bool | Literal["plain"] = False,
) -> nn.Sequential:
    """Linear layers of these sizes with the activation between them.

    `gains`: orthogonal initial weights with zero biases, the first gain for hidden layers and the second for the last (Andrychowicz et al. 2021 find the
    last of a policy best near 0.01); None leaves torch's initialisation. `layer_norm` normalises each hidden layer before its activation;
    "plain" without weights of its own.
    """
    layers: list[nn.Module] = []
    for i, (wide, out) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(wide, out)
        last = i == len(sizes) - 2
        if gains is not None:
            nn.init.orthogonal_(linear.weight, gains[1] if last else gains[0])
            nn.init.zeros_(linear.bias)
        layers.append(linear)
        if not last:
            layers += [nn.LayerNorm(out, elementwise_affine=layer_norm != "plain")] if layer_norm else []
            layers.append(_ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


class Pixels(nn.Module):
    """The convolutions of Mnih et al. 2015 (doi:10.1038/nature14236), [B, C, H, W] uint8 to [B, 512]; smaller pictures get smaller kernels."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        channels, height, width = shape
        small = min(height, width) < 36
        plan = [(32, 3, 2), (64, 3, 2), (64, 3, 1)] if small else [(32, 8, 4), (64, 4, 2), (64, 3, 1)]
        layers: list[nn.Module] = []
        for out, kernel, stride in plan:
            conv = nn.Conv2d(channels, out, kernel, stride)
            nn.init.orthogonal_(conv.weight, math.sqrt(2))
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers += [conv, nn.ReLU()]
            channels = out
        self.convolutions = nn.Sequential(*layers, nn.Flatten())
        with torch.no_grad():
            width = self.convolutions(torch.zeros(1, *shape)).shape[1]
        self.head = nn.Sequential(nn.Linear(width, 512), nn.ReLU())
        self.size = 512

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.convolutions(pictures.to(torch.float32) / 255))


class EnsembleLinear(nn.Module):
    """E linear layers as one batched product: [E, B, in] or [B, in] to [E, B, out]."""

    def __init__(self, members: int, wide: int, out: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(wide)
        self.weight = nn.Parameter(torch.empty(members, wide, out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, out).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        x = x.expand(len(self.weight), *x.shape[-2:])
        if self.weight.shape[2] == 1:  # batched products with vectors take several times as long as one after the other
            return torch.stack([part @ weight for part, weight in zip(x.unbind(), self.weight.unbind())]) + self.bias
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleNorm(nn.Module):
    """Layer normalisation with weights of its own for each of E members, [E, B, size]."""

    def __init__(self, members: int, size: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(members, 1, size)), nn.Parameter(torch.zeros(members, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:]) * self.weight + self.bias


def ensemble(members: int, sizes: Sequence[int], activation: Activation = "relu", *, layer_norm: bool = False) -> nn.Sequential:
    """`members` perceptrons side by side: [B, in] to [E, B, out]."""
    layers: list[nn.Module] = []
    for i, (wide, out) in enumerate(itertools.pairwise(sizes)):
        layers.append(EnsembleLinear(members, wide, out))
        if i < len(sizes) - 2:
            layers += [EnsembleNorm(members, out)] if layer_norm else []
            layers.append(_ACTIVATIONS[activation]())
    return nn.Sequential(*layers)


class Normaliser(nn.Module):
    """Running mean and variance of what has been seen, and inputs in their units, clipped to ±10. Frozen until `update` is called.

    The statistics are float64 buffers, so that they are saved with the network; Chan et al.'s parallel update makes them independent of how data are cut.
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("m2", torch.zeros(size, dtype=torch.float64))
        self._array: tuple[Any, np.ndarray, np.ndarray] = (None, np.zeros(0), np.ones(0))

    def update(self, values: np.ndarray) -> None:
        """Takes in values [N, size]."""
        new = torch.from_numpy(np.asarray(values, dtype=np.float64)).to(self.mean.device)
        n = len(new)
        mean = new.mean(0)
        m2 = ((new - mean) ** 2).sum(0)
        delta, total = mean - self.mean, self.count + n
        self.m2 += m2 + delta**2 * (self.count * n / total)
        self.mean += delta * (n / total)
        self.count.copy_(total)

    @property
    def deviation(self) -> Tensor:
        """[size], 1 before two values were seen and where they do not vary."""
        variance = self.m2 / self.count.clamp(min=1)
        return torch.where(variance > 1e-12, variance.sqrt(), torch.ones_like(variance))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean.to(x.dtype)) / self.deviation.to(x.dtype)).clamp(-10, 10)

    def of_array(self, x: np.ndarray) -> np.ndarray:
        """As `forward`, for an array. The statistics are brought into its form again only when they have changed."""
        place = (self.mean.data_ptr(), self.mean._version, self.m2._version)
        if self._array[0] != place:
            mean, deviation = (values.cpu().numpy().astype(np.float32) for values in (self.mean, self.deviation))
            self._array = place, mean, deviation
        _, mean, deviation = self._array
        return np.clip((x - mean) / deviation, -10, 10)


def _silu(x: np.ndarray) -> np.ndarray:
    return x * (0.5 + 0.5 * np.tanh(x / 2))  # no exponential that overflows


_FAST: dict[type[nn.Module], Callable[[np.ndarray], np.ndarray]] = {
    nn.Tanh: np.tanh,
    nn.ReLU: lambda x: np.maximum(x, 0.0),
    nn.SiLU: _silu,
}


class Fast:
    """A perceptron evaluated by NumPy on the very memory of its weights: for a handful of rows most of torch's time is overhead.

    `Fast.of` gives None for networks that it cannot evaluate (convolutions, another device); then torch does it.
    """

    def __init__(self, layers: list[tuple[np.ndarray, np.ndarray] | Callable[[np.ndarray], np.ndarray]]) -> None:
        self.layers = layers

    @classmethod
    def of(cls, network: nn.Module) -> Fast | None:
        if not isinstance(network, nn.Sequential):
            return None
        layers: list[tuple[np.ndarray, np.ndarray] | Callable[[np.ndarray], np.ndarray]] = []
        for layer in network:
            if isinstance(layer, nn.Linear) and layer.weight.device.type == "cpu" and layer.bias is not None:
                layers.append((layer.weight.detach().numpy().T, layer.bias.detach().numpy()))
            elif type(layer) in _FAST:
                layers.append(_FAST[type(layer)])
            else:
                return None
        return cls(layers)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """[N, in] float32 to [N, out]."""
        for layer in self.layers:
            x = layer(x) if callable(layer) else x @ layer[0] + layer[1]
        return x


class Cached:
    """The `Fast` form of a network, made anew when the network's weights lie elsewhere: after a copy, or on another device."""

    def __init__(self) -> None:
        self._place, self._made = -1, None

    def of(self, network: nn.Sequential) -> Fast | None:
        place = next(network.parameters()).data_ptr()
        if place != self._place:
            self._place, self._made = place, Fast.of(network)
        return self._made
