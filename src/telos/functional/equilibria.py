"""Exact optima and equilibria of finite problems: what an alignment method should reach, computed without any learning.

Contexts are the leading dimensions: rewards and policies are [..., A] (probabilities, not logarithms), preferences [..., A, A] with
preference[a, b] the probability that a is preferred to b, so that P + Pᵀ = 1. Numpy arrays in float64 go out; arrays, lists and CPU tensors
without gradient come in. Wrong shapes raise `ValueError`, wrong values `UsageError`, a solver that misses its tolerance `Failure`.

Sources: Rafailov et al. 2023 (arXiv 2305.18290), equation 4, for the KL optimum; Wang et al. 2023 (arXiv 2309.16240), theorem 1 and its
KKT conditions, for the f optimum; Munos et al. 2023 (arXiv 2312.00886) for the regularised preference game and its Nash equilibrium.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.special import rel_entr, softmax

from telos.core.errors import Failure, UsageError
from telos.functional.divergences import FDivergence, by_name

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Equilibrium:
    """`policy` [..., A]; `residual` [...]: the largest |π(a) − (ref exp(Pπ/τ)/Z)(a)| that is left, in probability."""

    policy: Floats
    residual: Floats


def kl_optimum(reward: Any, ref: Any, beta: float) -> Floats:
    """argmax over π of E_π[r] − β KL(π‖ref), which is ref·exp(r/β)/Z; [..., A]. `reward` [..., A], `ref` [..., A], β > 0."""
    r, base = _numbers(reward, "reward"), _distribution(ref, "ref")
    _same_shape(r, base)
    _positive(beta, "beta")
    return softmax(_log(base) + r / beta, axis=-1)


def f_optimum(reward: Any, ref: Any, beta: float, divergence: str | FDivergence) -> Floats:
    """argmax over π on the support of ref of E_π[r] − β D_f(π‖ref); [..., A]. `reward` [..., A], `ref` [..., A], β > 0.

    The optimum is ref·u with u = (f′)⁻¹((r − λ)/β), 0 where (r − λ)/β ≤ f′(0): with a finite f′(0) (chi-squared, alpha below 0) poor
    responses get no mass at all. λ makes it sum to one, is found by bisection, and lies between two known numbers: the best response a has
    u between 1 and 1/ref(a). Where f′(∞) is finite, mass outside ref's support would be cheap or free (forward KL); it is ruled out, as in
    the paper, where ref > 0.
    """
    r, base = _numbers(reward, "reward"), _distribution(ref, "ref")
    _same_shape(r, base)
    _positive(beta, "beta")
    chosen = divergence if isinstance(divergence, FDivergence) else by_name(divergence)
    if chosen.f_prime_inverse is None:
        raise UsageError(f"{chosen.name} has no invertible derivative and so no optimum of this form; choose another divergence")
    log_ref = torch.from_numpy(_log(base))
    rewards = torch.from_numpy(np.where(base > 0, r, -np.inf))
    best, index = rewards.max(-1, keepdim=True)
    # Measured from the best response, so that a large constant in the rewards costs no digits.
    lost = torch.where(log_ref > -torch.inf, (rewards - best) / beta, 0.0)
    log_ref_best = log_ref.gather(-1, index)
    # s = (max r − λ)/β is the best response's f′(u). At `low` every u ≤ 1; at `high` the best response alone has all the mass.
    low, high = chosen.f_prime(torch.zeros_like(log_ref_best)), chosen.f_prime(-log_ref_best)
    middle = (low + high) / 2
    while bool(((middle > low) & (middle < high)).any()):
        over = torch.logsumexp(log_ref + chosen.f_prime_inverse(lost + middle), -1, keepdim=True) > 0
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        middle = (low + high) / 2
    policy = torch.exp(log_ref + chosen.f_prime_inverse(lost + low)).numpy()
    mass = policy.sum(-1, keepdims=True)
    if not np.all(np.abs(mass - 1) < 1e-6):
        worst = float(np.abs(mass - 1).max())
        raise Failure(f"float64 is too coarse for this {chosen.name} optimum: its mass misses 1 by {worst:.1e}; use a larger beta")
    return policy / mass


def best_response(policy: Any, preference: Any) -> Floats:
    """A policy that wins most often against `policy` [..., A]: all mass on argmax Pπ, the lowest index among equals; [..., A]."""
    wins = _wins(*_game(policy, preference))
    return np.eye(wins.shape[-1])[wins.argmax(-1)]


def regularised_best_response(policy: Any, preference: Any, ref: Any, tau: float) -> Floats:
    """argmax over π′ of P(π′ ≻ π) − τ KL(π′‖ref), which is ref·exp(Pπ/τ)/Z; [..., A]."""
    return kl_optimum(_wins(*_game(policy, preference)), ref, tau)


def exploitability(policy: Any, preference: Any) -> Floats:
    """The duality gap max P(π′ ≻ π) − min P(π ≻ π′) of `policy` [..., A], in [0, 1] per context [...]; 0 exactly at a Nash equilibrium."""
    pi, p = _game(policy, preference)
    return _wins(pi, p).max(-1) - np.einsum("...a,...ab->...b", pi, p).min(-1)


def regularised_gap(policy: Any, preference: Any, ref: Any, tau: float) -> Floats:
    """The duality gap of the game P(π ≻ π′) − τ KL(π‖ref) + τ KL(π′‖ref) at (π, π), per context [...]; infinite off ref's support.

    By the symmetry of the game it is 2τ KL(π‖π*) with π* the regularised best response to π, and is computed so: it is never below 0.
    """
    response = regularised_best_response(policy, preference, ref, tau)
    # rel_entr(0, ·) is 0 and rel_entr(p, 0) is infinite; adding p* − p (which sums to 0) keeps every term non-negative in floating point.
    pi = _distribution(policy, "policy")
    return 2 * tau * np.maximum(rel_entr(pi, response) + response - pi, 0).sum(-1)


def nash(preference: Any) -> Floats:
    """A Nash equilibrium (von Neumann winner) of the symmetric game P(π ≻ π′): maximises min over b of Σ_a π(a) P[a, b]; [..., A].

    One linear program per context (HiGHS). The value is ½. Where the equilibrium is not unique, one vertex of the set is returned.
    """
    p = _preference(preference)
    size = p.shape[-1]
    policies = np.empty(p.shape[:-1])
    for place in np.ndindex(*p.shape[:-2]):
        game = p[place] - 0.5
        # Variables: π(0) … π(A−1) and the value v. Maximise v subject to v − Σ_a π(a) game[a, b] ≤ 0 for every b.
        found = linprog(
            c=np.append(np.zeros(size), -1.0),
            A_ub=np.hstack([-game.T, np.ones((size, 1))]),
            b_ub=np.zeros(size),
            A_eq=np.append(np.ones(size), 0.0)[None],
            b_eq=[1.0],
            bounds=[(0, None)] * size + [(None, None)],
            method="highs",
            options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
        )
        if found.x is None:
            raise Failure(f"the linear program of context {place} was not solved: {found.message}")
        weights = np.maximum(found.x[:size], 0)
        policies[place] = weights / weights.sum()
    gap = exploitability(policies, p)
    if not np.all(gap < 1e-8):
        raise Failure(f"the Nash equilibrium was found to a duality gap of {gap.max():.1e} only, above 1e-8")
    return policies


def regularised_nash(preference: Any, ref: Any, tau: float, tolerance: float = 1e-10) -> Equilibrium:
    """The one π with π = ref·exp(Pπ/τ)/Z: the Nash equilibrium of P(π ≻ π′) − τ KL(π‖ref) + τ KL(π′‖ref). τ > 0.

    Newton's method with step halving on y = (P − ½)π/τ, where π ∝ ref·exp(y). Its Jacobian is I − S M/τ, with S = P − ½ skew-symmetric and
    M = diag π − ππᵀ positive semidefinite; the eigenvalues of S M are imaginary, so it is never singular and a step exists for every τ.
    Raises `Failure` when the residual stays above `tolerance`, which rounding causes from about τ < 1e-6.
    """
    p, base = _preference(preference), _distribution(ref, "ref")
    _same_shape(p[..., 0], base)
    _positive(tau, "tau")
    skew = (p - np.swapaxes(p, -1, -2)) / 2
    log_ref = _log(base)
    y = np.zeros_like(base)
    # From y = 0 Newton's method stalls when τ is far below 1e-3. Lowering τ in stages starts each run near its solution.
    for temperature in _descending(tau, float(np.abs(skew).max())):
        y = _newton(y, skew / temperature, log_ref)
    policy = softmax(log_ref + y, axis=-1)
    residual = np.abs(policy - kl_optimum(_wins(policy, p), base, tau)).max(-1)
    if not np.all(residual <= tolerance):
        raise Failure(
            f"the regularised equilibrium at tau={tau:g} was found to {np.max(residual):.1e} only, above {tolerance:g}; use a larger tau"
        )
    return Equilibrium(policy, residual)


def _descending(tau: float, start: float) -> list[float]:
    """Temperatures from about `start` (where the solution is near ref) down to `tau`, each a tenth of the one before."""
    count = int(np.ceil(np.log10(start / tau))) if start > tau else 0
    return [tau * 10.0**k for k in range(count, -1, -1)]


def _newton(y: Floats, game: Floats, log_ref: Floats) -> Floats:
    """Solves y = game·softmax(log_ref + y) from the start `y` [..., A], until no step makes the error smaller."""

    def error_at(point: Floats) -> tuple[Floats, Floats]:
        policy = softmax(log_ref + point, axis=-1)
        return point - np.einsum("...ab,...b->...a", game, policy), policy

    identity = np.eye(y.shape[-1])
    error, policy = error_at(y)
    norm = np.linalg.norm(error, axis=-1)
    for _ in range(200):
        slope = policy[..., :, None] * identity - policy[..., :, None] * policy[..., None, :]
        step = np.linalg.solve(identity - game @ slope, -error[..., None])[..., 0]
        moved = np.zeros(norm.shape, dtype=bool)
        length = np.ones_like(norm)
        for _ in range(30):
            candidate = y + np.where(moved, 0.0, length)[..., None] * step
            new_error, new_policy = error_at(candidate)
            new_norm = np.linalg.norm(new_error, axis=-1)
            better = ~moved & (new_norm < norm)
            y = np.where(better[..., None], candidate, y)
            error = np.where(better[..., None], new_error, error)
            policy = np.where(better[..., None], new_policy, policy)
            norm = np.where(better, new_norm, norm)
            moved |= better
            length = length / 2
            if moved.all():
                break
        if not moved.any():
            break
    return y


def _log(probabilities: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


def _wins(policy: Floats, preference: Floats) -> Floats:
    """(Pπ)(a) = P(a ≻ π), [..., A]."""
    return np.einsum("...ab,...b->...a", preference, policy)


def _game(policy: Any, preference: Any) -> tuple[Floats, Floats]:
    pi, p = _distribution(policy, "policy"), _preference(preference)
    _same_shape(p[..., 0], pi)
    return pi, p


def _numbers(values: Any, name: str) -> Floats:
    out = np.asarray(values, dtype=np.float64)
    if out.ndim == 0:
        raise ValueError(f"{name} must be [..., A]; got a single number")
    if not np.isfinite(out).all():
        raise UsageError(f"{name} holds NaN or infinite values")
    return out


def _distribution(values: Any, name: str) -> Floats:
    out = _numbers(values, name)
    if (out < 0).any() or not np.allclose(out.sum(-1), 1, rtol=0, atol=1e-6):
        raise UsageError(f"{name} must hold probabilities that sum to 1 along the last dimension (probabilities, not logarithms)")
    return out / out.sum(-1, keepdims=True)


def _preference(values: Any) -> Floats:
    out = _numbers(values, "preference")
    if out.ndim < 2 or out.shape[-1] != out.shape[-2]:
        raise ValueError(f"preference must be [..., A, A]; got {out.shape}")
    if (out < 0).any() or (out > 1).any() or not np.allclose(out + np.swapaxes(out, -1, -2), 1, rtol=0, atol=1e-6):
        raise UsageError("preference[a, b] is the probability that a is preferred to b: it must lie in [0, 1], with P[a, b] + P[b, a] = 1")
    return 0.5 + (out - np.swapaxes(out, -1, -2)) / 2


def _same_shape(a: Floats, b: Floats) -> None:
    if a.shape != b.shape:
        raise ValueError(f"contexts and responses differ: {a.shape} and {b.shape}")


def _positive(value: float, name: str) -> None:
    if not (np.isfinite(value) and value > 0):
        raise UsageError(f"{name} is {value}; it must be a positive number")
