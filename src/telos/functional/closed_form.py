"""Losses of on-policy control with their derivatives written out, as arrays.

For networks of control's size nearly all the time of a gradient by automatic differentiation is overhead. A loss that depends on the policy and the critic
through the log-probability of the action, the entropy and the value alone has short derivatives in these three; the rest of the chain, from them to the
networks' outputs, belongs to the distribution and is here, and from the outputs to the weights to the networks (`models.backprop`).

Arrays are float32, B steps long unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

_LOG_2PI = math.log(2 * math.pi)


class StepArrays(NamedTuple):
    """What a loss sees of B steps; the names are those of `functional.segments.StepView`."""

    logprob: np.ndarray  # [B] now
    entropy: np.ndarray  # [B] now, nats
    value: np.ndarray  # [B] now
    old_logprob: np.ndarray  # [B] when the steps were taken
    old_value: np.ndarray  # [B]
    advantage: np.ndarray  # [B]
    returns: np.ndarray  # [B]


class Slopes(NamedTuple):
    """A loss [B] of each step, and its derivatives in the step's log-probability, entropy and value."""

    loss: np.ndarray  # [B]
    logprob: np.ndarray  # [B]
    entropy: np.ndarray | float  # [B], or one number for all
    value: np.ndarray  # [B]
    metrics: Mapping[str, np.ndarray]  # [B] by name


def standardised(values: np.ndarray, epsilon: float = 1e-8) -> np.ndarray:
    """As `functional.segments.standardised`, for an array [B]."""
    if len(values) < 2:
        return values
    centred = values - values.sum() / len(values)
    return centred / (math.sqrt(float(centred @ centred) / (len(values) - 1)) + epsilon)


def clipped_surrogate(
    log_ratio: np.ndarray, advantage: np.ndarray, low: float, high: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(loss, its derivative in the log-ratio, the ratio, where it was clipped), each [B], of `functional.policy.clipped_surrogate`."""
    ratio = np.exp(log_ratio)
    gain = advantage * ratio
    bounded = advantage * np.minimum(np.maximum(ratio, 1 - low), 1 + high)
    clipped = bounded < gain
    return -np.minimum(gain, bounded), gain * (clipped - np.float32(1)), ratio, clipped


class Actions(Protocol):
    """A distribution over actions as a function of a network's outputs [B, outputs]."""

    def coded(self, action: np.ndarray) -> np.ndarray:
        """Actions [B] or [B, D] as `score` reads them, [B, …]."""
        ...

    def noise(self, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        """What `draw` makes actions of, of `shape` […, outputs]; it does not depend on the outputs."""
        ...

    def draw(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Actions [B] or [B, D]."""
        ...

    def score(self, outputs: np.ndarray, coded: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
        """(log-probabilities [B], entropies [B], what `slope` needs)."""
        ...

    def slope(self, saved: Any, logprob: np.ndarray, entropy: np.ndarray | float) -> tuple[np.ndarray, np.ndarray | None]:
        """Derivatives in the outputs [B, outputs], and summed over B in the distribution's own parameters (None without any), from those in log-probability
        and entropy [B]."""
        ...


class CategoricalActions:
    """One choice out of `size`, from logits [B, size]."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ones = np.ones(size, dtype=np.float32)

    def coded(self, action: np.ndarray) -> np.ndarray:
        return np.eye(self.size, dtype=np.float32)[action]

    def noise(self, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        # −log of an exponential variable is Gumbel's, and the argmax of logits with it is a draw.
        drawn = generator.standard_exponential(shape, dtype=np.float32)
        return -np.log(np.maximum(drawn, np.finfo(np.float32).tiny))

    def draw(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return (outputs + noise).argmax(-1)

    def score(self, outputs: np.ndarray, coded: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
        # Choices first: reductions over a short last axis are slow.
        chosen = np.ascontiguousarray(coded.T)
        logs = np.ascontiguousarray(outputs.T)
        logs = logs - np.maximum.reduce(logs, 0)
        probabilities = np.exp(logs)
        total = self._ones @ probabilities
        logs -= np.log(total)
        probabilities /= total
        entropy = -(self._ones @ (probabilities * logs))
        return self._ones @ (chosen * logs), entropy, (logs, probabilities, chosen, entropy)

    def slope(self, saved: Any, logprob: np.ndarray, entropy: np.ndarray | float) -> tuple[np.ndarray, np.ndarray | None]:
        logs, probabilities, chosen, entropies = saved
        found = (chosen - probabilities) * logprob
        if np.ndim(entropy) or entropy:
            found -= entropy * probabilities * (logs + entropies)
        return np.ascontiguousarray(found.T), None


class MultiCategoricalActions:
    """Several independent choices, of `sizes` alternatives each, from logits side by side; actions [B, D]."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        ends = np.cumsum(sizes).tolist()
        self.columns = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.parts = [CategoricalActions(size) for size in sizes]

    def coded(self, action: np.ndarray) -> np.ndarray:
        return np.concatenate([part.coded(action[:, i]) for i, part in enumerate(self.parts)], 1)

    def noise(self, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        return self.parts[0].noise(shape, generator)

    def draw(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return np.stack([part.draw(outputs[..., here], noise[..., here]) for part, here in zip(self.parts, self.columns)], -1)

    def score(self, outputs: np.ndarray, coded: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
        scored = [part.score(outputs[:, here], coded[:, here]) for part, here in zip(self.parts, self.columns)]
        logprob, entropy, saved = zip(*scored, strict=True)
        return np.sum(logprob, 0), np.sum(entropy, 0), saved

    def slope(self, saved: Any, logprob: np.ndarray, entropy: np.ndarray | float) -> tuple[np.ndarray, np.ndarray | None]:
        found = [part.slope(kept, logprob, entropy)[0] for part, kept in zip(self.parts, saved, strict=True)]
        return np.concatenate(found, 1), None


class GaussianActions:
    """Independent Gaussians from means [B, D], with the logarithm of their deviation [D] as a parameter, which is read when it is needed."""

    def __init__(self, log_std: np.ndarray) -> None:
        self.log_std = log_std

    def coded(self, action: np.ndarray) -> np.ndarray:
        return action

    def noise(self, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    def draw(self, outputs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        return outputs + np.exp(self.log_std) * noise

    def score(self, outputs: np.ndarray, coded: np.ndarray) -> tuple[np.ndarray, np.ndarray, Any]:
        narrow = np.exp(-self.log_std)
        apart = (coded - outputs) * narrow
        log_scale = float(self.log_std.sum())
        size = outputs.shape[1]
        logprob = -0.5 * np.einsum("bd,bd->b", apart, apart) - np.float32(log_scale + 0.5 * size * _LOG_2PI)
        entropy = np.full(len(outputs), log_scale + 0.5 * size * (1 + _LOG_2PI), dtype=np.float32)
        return logprob, entropy, (apart, narrow)

    def slope(self, saved: Any, logprob: np.ndarray, entropy: np.ndarray | float) -> tuple[np.ndarray, np.ndarray | None]:
        apart, narrow = saved
        pulled = logprob[:, None] * apart
        of_entropy = float(np.sum(np.broadcast_to(entropy, logprob.shape)))
        return pulled * narrow, np.einsum("bd,bd->d", pulled, apart) - logprob.sum() + np.float32(of_entropy)
