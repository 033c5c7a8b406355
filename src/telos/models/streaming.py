"""Perceptrons that learn from one observation at a time, in NumPy: forward, gradient, eligibility trace, step.

For a single row nearly all of torch's time is overhead: a step of autograd takes about a millisecond, what is here about a twentieth of it. The weights
lie in one flat array, which torch's parameters share, so that the trace and the step are a few passes over it and a policy that is saved is the one that
has learned.

The step of `Streamed.learn` is overshooting-bounded gradient descent (ObGD; Elsayed, Vasan and Mahmood 2024, arXiv:2410.14606):

    z ← γλ z + ∇,    θ ← θ + min(α, 1 / (κ δ̄ ‖z‖₁)) δ z,    δ̄ = max(|δ|, 1)

Where values are linear, |∇| <= 1 in every entry and κ >= 1 + γ, such a step cannot carry the prediction beyond its target; κ = 0 takes the bound away
and leaves semi-gradient descent with traces.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from telos.core.errors import UsageError
from telos.models.networks import Normaliser, perceptron
from telos.models.observations import Reader, batched
from telos.models.policies import describe_space, read_space

_sum = np.add.reduce  # half the time of the method


def sparse_(network: nn.Sequential, sparsity: float, generator: np.random.Generator) -> None:
    """Draws weights uniformly from ±1/√inputs (LeCun), and sets that share of each unit's weights to zero, and all biases.

    A unit keeps one weight at least: the paper rounds up, which would leave none where there are nine inputs or fewer.
    """
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, nn.Linear):
                bound = 1 / math.sqrt(layer.in_features)
                weight = generator.uniform(-bound, bound, (layer.out_features, layer.in_features))
                zeros = min(math.ceil(sparsity * layer.in_features), layer.in_features - 1)
                np.put_along_axis(weight, generator.random(weight.shape).argsort(1)[:, :zeros], 0.0, 1)
                layer.weight.copy_(torch.from_numpy(weight))
                layer.bias.zero_()


class Streamed:
    """A perceptron of linear layers and LeakyReLU, with or without normalisation before them that has no weights of its own, and its trace.

    `rate` α > 0, `kappa` κ >= 0 (0: no bound), `decay` γλ in [0, 1). The network's parameters come to lie in `weights` [P] and follow it; they must be
    on the CPU. Raises `TypeError` for other layers.
    """

    def __init__(self, network: nn.Sequential, rate: float, kappa: float, decay: float) -> None:
        self.rate, self.kappa, self.decay = rate, kappa, decay
        linear = [layer for layer in network if isinstance(layer, nn.Linear)]
        others = [layer for layer in network if not isinstance(layer, nn.Linear)]
        if any(not isinstance(layer, (nn.LeakyReLU, nn.LayerNorm)) or list(layer.parameters()) for layer in others):
            raise TypeError(f"streaming learns perceptrons with LeakyReLU and normalisation without weights; got {network}")
        self._epsilon = next((layer.eps for layer in others if isinstance(layer, nn.LayerNorm)), None)
        first = linear[0].weight.detach().numpy()
        self._slope = first.dtype.type(next((layer.negative_slope for layer in others if isinstance(layer, nn.LeakyReLU)), 1.0))
        self._one = first.dtype.type(1)
        self.weights, self.gradient = (np.empty(sum(p.numel() for p in network.parameters()), first.dtype) for _ in range(2))
        self.trace = np.zeros_like(self.weights)
        self._room = np.empty_like(self.weights)
        self._layers: list[tuple[np.ndarray, np.ndarray]] = []
        self._gradients: list[tuple[np.ndarray, np.ndarray]] = []
        start = 0
        for layer in linear:
            size = layer.weight.numel()
            places = slice(start, start + size), slice(start + size, start + size + layer.out_features)
            start = places[1].stop
            shape = (layer.out_features, layer.in_features)
            weight, bias = self.weights[places[0]].reshape(shape), self.weights[places[1]]
            weight[...], bias[...] = layer.weight.detach().numpy(), layer.bias.detach().numpy()
            layer.weight.data, layer.bias.data = torch.from_numpy(weight), torch.from_numpy(bias)
            self._layers.append((weight, bias))
            self._gradients.append((self.gradient[places[0]].reshape(shape), self.gradient[places[1]]))
        self._seen: list[
            tuple[np.ndarray, np.ndarray, np.ndarray, float]
        ] = []  # of the last forward: each layer's input, then of what came before it

    def __call__(self, x: np.ndarray, keep: bool = True) -> np.ndarray:
        """The outputs [out] for one input [in]. With `keep` they are `out` from now on, and `back` gives their gradient.

        Raises `FloatingPointError` for outputs that are not finite.
        """
        seen = []
        normed = slope = x
        inverse = 1.0
        for i, (weight, bias) in enumerate(self._layers):
            if i:
                if self._epsilon is not None:
                    centred = x - _sum(x) / len(x)
                    inverse = 1 / math.sqrt(centred @ centred / len(x) + self._epsilon)
                    x = normed = centred * x.dtype.type(inverse)
                slope = np.where(x > 0, self._one, self._slope)
                x = x * slope
            seen.append((x, normed, slope, inverse))
            x = weight @ x + bias
        if not math.isfinite(_sum(x)):
            raise FloatingPointError("the network's outputs are not finite")
        if keep:
            self._seen, self.out = seen, x
        return x

    def back(self, direction: np.ndarray) -> np.ndarray:
        """The gradient [P] of direction · outputs at the input that was kept last. The array is the same one at every call."""
        g = direction
        for i in reversed(range(len(self._layers))):
            x, normed, slope, inverse = self._seen[i]
            into, into_bias = self._gradients[i]
            np.multiply(g[:, None], x, out=into)
            into_bias[...] = g
            if i:
                g = (g @ self._layers[i][0]) * slope
                if self._epsilon is not None:
                    n = len(g)
                    g = (g - _sum(g) / n - normed * ((g @ normed) / n)) * g.dtype.type(inverse)
        return self.gradient

    def learn(self, gradient: np.ndarray, error: float) -> float:
        """Takes the gradient [P] into the trace and makes one step; returns how much of α the step kept, in (0, 1].

        Raises `FloatingPointError` before a number that is not finite touches a weight.
        """
        trace, room = self.trace, self._room
        trace *= self.decay
        trace += gradient
        norm = float(_sum(np.abs(trace, out=room)))
        if not math.isfinite(norm * error):
            raise FloatingPointError(f"the error is {error} and the trace's norm {norm}")
        excess = self.rate * self.kappa * max(abs(error), 1.0) * norm
        kept = 1 / excess if excess > 1 else 1.0
        np.multiply(trace, trace.dtype.type(self.rate * kept * error), out=room)
        self.weights += room
        return kept

    def forget(self) -> None:
        """Ends the trace: what was seen before gets no share in what follows."""
        self.trace[...] = 0

    def state(self) -> dict[str, np.ndarray]:
        return {"weights": self.weights, "trace": self.trace}

    def load(self, state: dict[str, Any]) -> None:
        self.weights[...], self.trace[...] = np.asarray(state["weights"]), np.asarray(state["trace"])


class Moments:
    """Running mean and variance of rows [size], one at a time (Welford 1962), in the units of `networks.Normaliser`: deviations from the mean over the
    deviation (1 where nothing varies yet), within ±10."""

    def __init__(self, size: int) -> None:
        self.count, self.mean, self.m2 = 0, np.zeros(size), np.zeros(size)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Takes a row in and returns it in the units that it has changed, float32."""
        self.count += 1
        before = x - self.mean
        self.mean += before / self.count
        after = x - self.mean
        self.m2 += before * after
        deviation = np.sqrt(self.m2 / self.count)
        deviation[deviation <= 1e-6] = 1.0
        return np.minimum(np.maximum(after / deviation, -10.0), 10.0).astype(np.float32)

    def tell(self, normaliser: Normaliser) -> None:
        """Brings a normaliser to these statistics."""
        normaliser.count.fill_(self.count)
        normaliser.mean.copy_(torch.from_numpy(self.mean))
        normaliser.m2.copy_(torch.from_numpy(self.m2))

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.m2 = int(state["count"]), np.array(state["mean"]), np.array(state["m2"])


class RewardScale:
    """Rewards over the running deviation of the discounted return of the episode under way; their mean is left as it is.

    The authors' code carries the last reward of an episode over into the next one's return; here a return begins with its episode."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self.count, self.mean, self.m2, self.gone = 0, 0.0, 0.0, 0.0  # gone: Σ γ^age r of the episode under way

    def __call__(self, reward: float, ended: bool) -> float:
        self.gone = self.gamma * self.gone + reward
        self.count += 1
        before = self.gone - self.mean
        self.mean += before / self.count
        self.m2 += before * (self.gone - self.mean)
        if ended:
            self.gone = 0.0
        return reward / self.deviation

    @property
    def deviation(self) -> float:
        """That of a sample; 1 before two returns were seen."""
        return math.sqrt(self.m2 / (self.count - 1) + 1e-8) if self.count > 1 else 1.0

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "m2": self.m2, "gone": self.gone}

    def load(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.m2, self.gone = int(state["count"]), float(state["mean"]), float(state["m2"]), float(state["gone"])


class ValueFunction(nn.Module):
    """Values of raw observations, in the environment's own unit: normalisation and the scale of rewards are inside and are saved with it.

    A folder holds `value.safetensors` and `value.json`. Nothing is pickled.
    """

    scale: Tensor

    def __init__(self, observation_space: gymnasium.Space, hidden: tuple[int, ...], layer_norm: bool, normalise: bool) -> None:
        super().__init__()
        self.observation_space, self.reader = observation_space, Reader(observation_space)
        if self.reader.picture:
            raise UsageError("streaming methods read numbers; the environment's observations are pictures")
        self.shape = {"hidden": hidden, "layer_norm": layer_norm, "normalise": normalise}
        self.normaliser = Normaliser(self.reader.size) if normalise else None
        self.body = perceptron((self.reader.size, *hidden, 1), "leaky_relu", layer_norm="plain" if layer_norm else False)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))  # of rewards: what a learned value of 1 stands for

    def forward(self, observation: Tensor) -> Tensor:
        """[B, size] as the `Reader` gives them, to values [B]."""
        features = observation if self.normaliser is None else self.normaliser(observation)
        return self.body(features)[:, 0] * self.scale.to(features.dtype)

    def predict(self, observation: Any) -> Any:
        """The value of a raw observation, or the values [N] of a batch of them."""
        given, single = batched(self.observation_space, observation)
        with torch.no_grad():
            values = self(torch.from_numpy(self.reader(given))).numpy()
        return float(values[0]) if single else values

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "value.safetensors")
        described = {"format": 1, "shape": self.shape, "observation_space": describe_space(self.observation_space)}
        (folder / "value.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> ValueFunction:
        """Raises `UsageError` for a folder that holds no whole value function."""
        folder = Path(folder)
        try:
            described = json.loads((folder / "value.json").read_text(encoding="utf-8"))
            if described["format"] != 1:
                raise ValueError(f"it is of format {described['format']}, which a later version of Telos writes")
            shape = described["shape"] | {"hidden": tuple(described["shape"]["hidden"])}
            found = cls(read_space(described["observation_space"]), **shape)
            found.load_state_dict(load_file(folder / "value.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"{folder} holds no whole value function: {error}") from error
        return found.requires_grad_(False)
