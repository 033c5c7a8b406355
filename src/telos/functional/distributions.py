"""Distributions over actions: what a policy's outputs mean. Batches of B actions; log-probabilities and entropies are in nats, [B].

They are small on purpose: no argument is checked at run time and nothing is broadcast, which is most of the time that `torch.distributions` takes at the
sizes of control.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

_LOG_2PI = math.log(2 * math.pi)


class Distribution(Protocol):
    """What a policy returns for a batch of states."""

    def log_prob(self, action: Tensor) -> Tensor:
        """[B] of actions [B] or [B, D]."""
        ...

    def entropy(self) -> Tensor: ...

    def sample(self, generator: torch.Generator | None = None) -> Tensor: ...

    def mode(self) -> Tensor:
        """The most probable action; for a squashed Gaussian the squashed mean."""
        ...

    def kl(self, other: Distribution) -> Tensor:
        """KL(self ‖ other), [B]."""
        ...

    def fixed(self) -> Distribution:
        """As it is now: without gradient, and out of reach of later changes of weights."""
        ...


@dataclass(frozen=True)
class Categorical:
    """One of A actions; logits [B, A], of any scale."""

    logits: Tensor

    @property
    def log_probs(self) -> Tensor:
        return log_softmax(self.logits, -1)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.log_probs.gather(-1, action.long()[..., None])[..., 0]

    def entropy(self) -> Tensor:
        logs = self.log_probs
        return -(logs.exp() * logs).sum(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.rand(self.logits.shape, generator=generator, device=self.logits.device, dtype=self.logits.dtype)
        return (self.logits - torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))).argmax(-1)

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)

    def kl(self, other: Distribution) -> Tensor:
        assert isinstance(other, Categorical)
        logs = self.log_probs
        return (logs.exp() * (logs - other.log_probs)).sum(-1)

    def fixed(self) -> Categorical:
        return Categorical(self.logits.detach().clone())


@dataclass(frozen=True)
class MultiCategorical:
    """Several independent choices; logits of all of them side by side [B, Σ sizes]; actions [B, len(sizes)]."""

    logits: Tensor
    sizes: tuple[int, ...]

    @property
    def parts(self) -> list[Categorical]:
        return [Categorical(part) for part in self.logits.split(list(self.sizes), -1)]

    def log_prob(self, action: Tensor) -> Tensor:
        return torch.stack([part.log_prob(action[..., i]) for i, part in enumerate(self.parts)]).sum(0)

    def entropy(self) -> Tensor:
        return torch.stack([part.entropy() for part in self.parts]).sum(0)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.stack([part.sample(generator) for part in self.parts], -1)

    def mode(self) -> Tensor:
        return torch.stack([part.mode() for part in self.parts], -1)

    def kl(self, other: Distribution) -> Tensor:
        assert isinstance(other, MultiCategorical)
        return torch.stack([one.kl(two) for one, two in zip(self.parts, other.parts, strict=True)]).sum(0)

    def fixed(self) -> MultiCategorical:
        return MultiCategorical(self.logits.detach().clone(), self.sizes)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal entries; mean [B, D], log_std [B, D] or [D]. The density is that of the sample, before an environment clips it to its bounds."""

    mean: Tensor
    log_std: Tensor

    def log_prob(self, action: Tensor) -> Tensor:
        normal = (action - self.mean) * torch.exp(-self.log_std)
        return -(0.5 * normal**2 + self.log_std + 0.5 * _LOG_2PI).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 * (1 + _LOG_2PI)).expand_as(self.mean).sum(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + noise * self.log_std.exp()

    def mode(self) -> Tensor:
        return self.mean

    def kl(self, other: Distribution) -> Tensor:
        assert isinstance(other, Gaussian)
        ratio = torch.exp(2 * (self.log_std - other.log_std))
        apart = (self.mean - other.mean) * torch.exp(-other.log_std)
        return (0.5 * (ratio + apart**2 - 1) + other.log_std - self.log_std).expand_as(self.mean).sum(-1)

    def fixed(self) -> Gaussian:
        return Gaussian(self.mean.detach().clone(), self.log_std.detach().clone())


@dataclass(frozen=True)
class TanhGaussian:
    """tanh of a normal variable, in (−1, 1): mean, log_std [B, D] before squashing (Haarnoja et al. 2018, arXiv:1801.01290, appendix C)."""

    mean: Tensor
    log_std: Tensor

    def rsample(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(action [B, D], its log-probability [B]), both with gradient to mean and deviation."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        before = self.mean + noise * self.log_std.exp()
        normal = -(0.5 * noise**2 + self.log_std + 0.5 * _LOG_2PI)
        return torch.tanh(before), (normal - log_tanh_slope(before)).sum(-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.rsample(generator)[0]

    def log_prob(self, action: Tensor) -> Tensor:
        """Of actions in (−1, 1); those at the edge count as the nearest float inside."""
        inside = action.clamp(-1 + 1e-6, 1 - 1e-6)
        before = torch.atanh(inside)
        normal = (before - self.mean) * torch.exp(-self.log_std)
        return -(0.5 * normal**2 + self.log_std + 0.5 * _LOG_2PI + log_tanh_slope(before)).sum(-1)

    def entropy(self) -> Tensor:
        raise NotImplementedError("the entropy of a squashed Gaussian has no closed form; use −log π of a sample")

    def mode(self) -> Tensor:
        return torch.tanh(self.mean)

    def kl(self, other: Distribution) -> Tensor:
        assert isinstance(other, TanhGaussian)  # a bijection leaves KL as it is
        return Gaussian(self.mean, self.log_std).kl(Gaussian(other.mean, other.log_std))

    def fixed(self) -> TanhGaussian:
        return TanhGaussian(self.mean.detach().clone(), self.log_std.detach().clone())


def log_tanh_slope(x: Tensor) -> Tensor:
    """log(1 − tanh²x) = 2 (log 2 − x − softplus(−2x)), stable for any x."""
    return 2 * (math.log(2.0) - x - softplus(-2 * x))
