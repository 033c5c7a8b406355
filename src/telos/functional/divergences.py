"""Divergences between policies: the f-divergence family on categorical distributions, and the KL divergence estimated from samples.

Conventions. π is the policy, ref the reference, u = π/ref, and D_f(π‖ref) = E_ref[f(u)]. Everything is in nats.

Sources: Wang et al. 2023, "Beyond Reverse KL" (arXiv 2309.16240), table 1, for f and f′ with the same constants, so that a β means
the same here and there; Csiszár and Shields 2004 for 0·f(p/0) = p·lim f(u)/u; Schulman 2020, "Approximating KL divergence", for k1, k2, k3;
Tang and Munos 2025, "On a few pitfalls in KL divergence gradient estimation for RL" (arXiv 2506.09477), for what their gradients estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from telos.core.errors import UsageError, did_you_mean

Estimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class FDivergence:
    """One member of the family. The functions take log u, not u: the ratio of two sequence probabilities overflows where its log does not.

    They work elementwise on any shape, and at log u = −inf too.
    """

    name: str
    f: Callable[[Tensor], Tensor]  # log u -> f(u); convex, f(1) = 0
    f_prime: Callable[[Tensor], Tensor]  # log u -> f′(u); increasing
    f_prime_inverse: Callable[[Tensor], Tensor] | None  # y -> log u with f′(u) = y; −inf below f′(0), +inf above f′(∞)
    slope_at_infinity: float  # lim f(u)/u = lim f′(u) for u → ∞: what a unit of mass outside the reference's support costs


def _times(u: Tensor, x: Tensor) -> Tensor:
    """u·x with 0·x = 0, in the gradient too."""
    return u * x.masked_fill(u == 0, 0.0)


def _expm1_over(rate: float, x: Tensor) -> Tensor:
    """(exp(rate·x) − 1)/rate, which is x at rate 0."""
    return x if rate == 0 else torch.expm1(rate * x) / rate


# KL(π‖ref), with f(u) = u log u.
REVERSE_KL = FDivergence(
    name="reverse-kl",
    f=lambda log_u: _times(log_u.exp(), log_u),
    f_prime=lambda log_u: log_u + 1,
    f_prime_inverse=lambda y: y - 1,
    slope_at_infinity=math.inf,
)

# KL(ref‖π), with f(u) = −log u.
FORWARD_KL = FDivergence(
    name="forward-kl",
    f=lambda log_u: -log_u,
    f_prime=lambda log_u: -torch.exp(-log_u),
    f_prime_inverse=lambda y: -torch.log((-y).clamp(min=0)),
    slope_at_infinity=0.0,
)


def _jensen_shannon_inverse(y: Tensor) -> Tensor:
    below = y < math.log(2)
    inner = torch.where(below, y, torch.zeros_like(y)) - math.log(2)
    return torch.where(below, inner - torch.log1p(-inner.exp()), torch.full_like(y, torch.inf))


# KL(π‖m) + KL(ref‖m) with m = (π + ref)/2, and f(u) = u log u − (1+u) log((1+u)/2).
# This is TWICE the Jensen-Shannon divergence that log 2 bounds.
JENSEN_SHANNON = FDivergence(
    name="jensen-shannon",
    f=lambda log_u: _times(log_u.exp(), math.log(2) + logsigmoid(log_u)) + math.log(2) + logsigmoid(-log_u),
    f_prime=lambda log_u: math.log(2) + logsigmoid(log_u),
    f_prime_inverse=_jensen_shannon_inverse,
    slope_at_infinity=math.log(2),
)

# E_ref[(u − 1)²], with f′(0) = −2 finite: an optimum regularised by it can give a response exactly zero probability.
CHI_SQUARED = FDivergence(
    name="chi-squared",
    f=lambda log_u: torch.expm1(log_u) ** 2,
    f_prime=lambda log_u: 2 * torch.expm1(log_u),
    f_prime_inverse=lambda y: torch.log1p((y / 2).clamp(min=-1)),
    slope_at_infinity=math.inf,
)

# ½ Σ |π − ref|. Its derivative takes two values and has no inverse, so it serves as a measure and defines no implicit reward.
TOTAL_VARIATION = FDivergence(
    name="total-variation",
    f=lambda log_u: torch.expm1(log_u).abs() / 2,
    f_prime=lambda log_u: torch.sign(log_u) / 2,
    f_prime_inverse=None,
    slope_at_infinity=0.5,
)


def alpha(a: float) -> FDivergence:
    """The α-divergence: f(u) = (u^(1−a) − (1−a)u − a) / (a(a−1)), f′(u) = (1 − u^−a)/a. Any finite `a`; the paper uses 0 < a < 1.

    a = 0 is the reverse KL and a = 1 the forward KL (as limits, with a multiple of u − 1 added to f, which changes no divergence and no
    optimum); a = ½ is four times the squared Hellinger distance 1 − Σ√(π ref); a = −1 is half of chi-squared. With a < 0 optima can be
    sparse.
    """
    if not math.isfinite(a):
        raise UsageError(f"alpha is {a}; give a finite number, such as 0.5")

    def f(log_u: Tensor) -> Tensor:
        u = log_u.exp()
        if abs(a) < 0.5:  # two forms of one formula: each is free of 0/0 on its half
            return (_times(u, -_expm1_over(-a, log_u)) + u - 1) / (a - 1)
        return (u - 1 - _expm1_over(1 - a, log_u)) / a

    return FDivergence(
        name=f"alpha({a:g})",
        f=f,
        f_prime=lambda log_u: _expm1_over(-a, log_u),
        f_prime_inverse=lambda y: y if a == 0 else -torch.log1p((-a * y).clamp(min=-1)) / a,
        slope_at_infinity=1 / a if a > 0 else math.inf,
    )


DIVERGENCES: dict[str, FDivergence] = {d.name: d for d in (REVERSE_KL, FORWARD_KL, JENSEN_SHANNON, CHI_SQUARED, TOTAL_VARIATION)}


def by_name(name: str, a: float = 0.5) -> FDivergence:
    """The divergence called `name`: one of `DIVERGENCES`, or "alpha" with its parameter `a`. Raises `UsageError` for another word."""
    if name == "alpha":
        return alpha(a)
    if name not in DIVERGENCES:
        known = [*DIVERGENCES, "alpha"]
        raise UsageError(f"unknown divergence {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}")
    return DIVERGENCES[name]


def _check(log_p: Tensor, log_q: Tensor, rank: int | None = None) -> None:
    if not (log_p.is_floating_point() and log_q.is_floating_point()):
        raise TypeError(f"log-probabilities are floating point; got {log_p.dtype} and {log_q.dtype}")
    if log_p.shape != log_q.shape:
        raise ValueError(f"shapes differ: {tuple(log_p.shape)} and {tuple(log_q.shape)}")
    if log_p.ndim == 0 or (rank is not None and log_p.ndim != rank):
        raise ValueError(f"expected {'[..., A]' if rank is None else '[B, T]'}; got shape {tuple(log_p.shape)}")


def divergence(name: str | FDivergence, log_p: Tensor, log_q: Tensor) -> Tensor:
    """D_f(p‖q) of categorical distributions given as log-probabilities [..., A] (−inf for zero), exact where a support is missing; [...].

    Computed in float64, because u = p/q leaves the range of float32 long before p and q do; returned in the dtype of `log_p`.
    Raises `UsageError` for an unknown name, `ValueError` and `TypeError` for shapes that differ and numbers that are not floating point.
    """
    _check(log_p, log_q)
    chosen = name if isinstance(name, FDivergence) else by_name(name)
    p, q = log_p.double().exp(), log_q.double().exp()
    inside = q > 0
    log_u = torch.where(inside, log_p.double() - torch.where(inside, log_q.double(), 0.0), 0.0)
    if math.isfinite(chosen.slope_at_infinity):
        outside = p * chosen.slope_at_infinity
    else:  # a constant, because 0·inf would make every gradient NaN
        outside = torch.where(p > 0, math.inf, 0.0).double()
    return torch.where(inside, q * chosen.f(log_u), outside).sum(-1).to(log_p.dtype)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p‖q) in nats of categorical distributions given as log-probabilities [..., A]; [...]. Infinite where p has mass that q lacks."""
    _check(log_p, log_q)
    empty = log_p == -torch.inf
    return (log_p.exp() * (log_p.masked_fill(empty, 0.0) - log_q.masked_fill(empty, 0.0))).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    """−Σ p log p in nats of categorical distributions given as log-probabilities [..., A]; [...], between 0 and log A."""
    _check(log_p, log_p)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)


# Values of KL(π‖ref) from samples of π. Each takes the log-probabilities of the sampled tokens and gives one number per token. Because a
# token's expectation is taken over prefixes that π drew, the sum over a sequence of an unbiased value is unbiased for the KL divergence of
# whole sequences.


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π − log ref, [B, T]. An unbiased value, of either sign, with the highest variance. Do not differentiate it: see `kl_loss`."""
    _check(logprobs, ref_logprobs, rank=2)
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log π − log ref)²/2, [B, T]. A biased value (third order in the log-ratio), never negative, with low variance."""
    _check(logprobs, ref_logprobs, rank=2)
    return (logprobs - ref_logprobs) ** 2 / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """r − 1 − log r with r = ref/π, [B, T]. An unbiased value where ref's support lies in π's, never negative, with low variance near ref.

    Its variance is infinite when r has no second moment under π, and exp overflows in float32 when log r > 88.
    Do not differentiate it: see `kl_loss`.
    """
    _check(logprobs, ref_logprobs, rank=2)
    log_r = ref_logprobs - logprobs
    return torch.expm1(log_r) - log_r


def kl_loss(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None = None, *, estimator: Estimator = "k1") -> Tensor:
    """A loss on sampled sequences whose gradient is, in expectation, the gradient of the sequence-level KL(π‖ref).

    `logprobs` [B, T], those of the current π for tokens that this very π sampled (on-policy: no importance weights are applied here);
    `ref_logprobs` [B, T], never differentiated; `mask` [B, T], true at the sampled tokens, one sequence in each row. Returns [B, T], zero
    outside the mask: sum over tokens, average over sequences. The number itself is the estimator's value and can be logged.

    Why the values alone are the wrong loss. The samples themselves depend on π: ∇E_π[k] = E_π[k ∇log π] + E_π[∇k], and autograd sees the
    second term only, the pathwise one. In expectation, for one token,
      k1: E[∇log π] = 0. It is pure noise and regularises nothing.
      k3: E[(1 − r) ∇log π] = ∇KL(ref‖π), the gradient of the FORWARD divergence.
      k2: E[(log π − log ref) ∇log π] = ∇KL(π‖ref), which is right, although the value of k2 is biased.
    With more than one token, per-token values lose one thing more, for all three: what a token does to the divergence of later tokens.

    Here, `estimator` is
      "k1": value unbiased, gradient unbiased. The score-function term weighs ∇log π of a token by k1 summed from there to the end;
            the pathwise term, of mean zero, is left out.
      "k2": value biased, gradient unbiased. Plain autograd of ½(Σ_t log π/ref)² over the WHOLE sequence, spread over its tokens.
            It is k1's gradient plus terms of mean zero from the tokens before, so it is usually noisier.
      "k3": value unbiased, gradient unbiased. The score-function term with k3 summed to the end, plus the pathwise term. Near ref the sum
            is of second order in the log-ratios, so there is less noise than with k1; far from ref r is heavy-tailed and there is more.
    """
    _check(logprobs, ref_logprobs, rank=2)
    if mask is not None and (mask.shape != logprobs.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(logprobs.shape)}; got {mask.dtype} {tuple(mask.shape)}")
    outside = torch.zeros_like(logprobs, dtype=torch.bool) if mask is None else ~mask
    logp = logprobs.masked_fill(outside, 0.0)
    ref = ref_logprobs.detach().masked_fill(outside, 0.0)
    if estimator == "k1":
        values = kl_k1(logp.detach(), ref)
    elif estimator == "k2":
        log_u = kl_k1(logp, ref)
        return log_u * log_u.sum(1, keepdim=True) / 2
    elif estimator == "k3":
        values = kl_k3(logp, ref)
    else:
        raise UsageError(f"unknown KL estimator {estimator!r}; known: k1, k2, k3")
    to_go = values.detach().flip(1).cumsum(1).flip(1)
    return values + to_go * (logp - logp.detach())
