"""Rewards from behaviour and from preferences in finite processes whose dynamics are known, and the policies that are best for them. Exact, in float64.

An episode has `horizon` steps; `transitions` [S, A, S] and `start` [S] are probabilities; a reward [S, A] is the same at every step. Where an action appends
a token to a text, the dynamics are known by themselves. Policies are regularised towards a reference [S, A] > 0, the cloned policy, say:

    π_r = argmax E_π[Σ_t r(s_t, a_t)] − τ Σ_t KL(π(·|s_t) ‖ π_ref(·|s_t)),    V_r its value                          (`soft_optimum`)

In deterministic processes π_r gives an episode the probability π_ref(episode) exp(Σ_t r_t / τ) / Z, with which RLHF is stated. Two ways to find r:

    inverse RL    min_r  E_{s∼start} V_r(s) − Σ_{s,a} μ_E(s, a) r(s, a) + λ/2 ‖r‖²        (`maximum_entropy_reward`; Ziebart et al. 2010, here with a reference)
    preferences   min_r  mean_i −log σ(Δ_i · r) + λ/2 ‖r‖²                                (`bradley_terry_reward`)

μ_E are the expert's expected visits in an episode, Δ_i those of the chosen episode less those of the rejected one. The gradient of the first is the learner's
visits under π_r less the expert's, plus λ r: it is descended by meeting the learner's own episodes, and for τ = 1 it is the mean negative log-likelihood of
the expert's episodes, up to a constant, if the process is deterministic. Both problems are convex.

Wrong shapes raise `ValueError`, wrong values `UsageError`, a solver that does not come to rest `Failure`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logsumexp

from telos.core.errors import Failure, UsageError

Floats = NDArray[np.float64]
_GRADIENT = 1e-6  # largest entry at which a minimum counts as found


class SoftOptimum(NamedTuple):
    policy: Floats  # [H, S, A]
    value: Floats  # [S], of the first step, the penalty included


def soft_optimum(reward: Floats, transitions: Floats, reference: Floats, horizon: int, temperature: float = 1.0) -> SoftOptimum:
    """The policy that is best for `reward` [S, A] less `temperature` > 0 times its divergence from `reference` [S, A], by backward recursion."""
    shape = reference.shape
    if reward.shape != shape or transitions.shape != (*shape, shape[0]):
        raise ValueError(
            f"expected reward and reference [S, A] and transitions [S, A, S]; got {reward.shape}, {shape}, {transitions.shape}"
        )
    if not (reference > 0).all():
        raise UsageError("the reference must give every action some probability")
    if not temperature > 0 or horizon < 1:
        raise UsageError(f"the temperature must be > 0 and the horizon at least 1; got {temperature} and {horizon}")
    policy, value, prior = np.empty((horizon, *shape)), np.zeros(shape[0]), np.log(reference)
    for t in reversed(range(horizon)):
        scores = prior + (reward + transitions @ value) / temperature
        total = np.asarray(logsumexp(scores, axis=-1))
        policy[t], value = np.exp(scores - total[:, None]), temperature * total
    return SoftOptimum(policy, value)


def visits(transitions: Floats, start: Floats, policy: Floats) -> Floats:
    """How often an episode of a policy [H, S, A] is expected to take each action in each state, [S, A]; the sum is H."""
    found, now = np.zeros(policy.shape[1:]), start
    for step in policy:
        taken = now[:, None] * step
        found += taken
        now = np.einsum("sa,sap->p", taken, transitions)
    return found


def maximum_entropy_reward(
    expert: Floats, transitions: Floats, start: Floats, reference: Floats, horizon: int, *, temperature: float = 1.0, ridge: float
) -> Floats:
    """The reward [S, A] under which the regularised learner visits what the expert visits (`expert` [S, A], an episode's sum), but for `ridge` times the
    reward itself; `ridge` > 0."""

    def objective(reward: Floats) -> tuple[float, Floats]:
        found = soft_optimum(reward, transitions, reference, horizon, temperature)
        return float(start @ found.value - (reward * expert).sum()), visits(transitions, start, found.policy) - expert

    return _least(objective, reference.shape, ridge)


def bradley_terry_reward(difference: Floats, ridge: float) -> Floats:
    """The weights [...] that explain N preferences by differences of features, chosen less rejected, [N, ...]; `ridge` > 0."""
    rows = difference.reshape(len(difference), -1)

    def objective(weights: Floats) -> tuple[float, Floats]:
        margin = rows @ weights.ravel()
        return float(np.logaddexp(0, -margin).mean()), (-expit(-margin) @ rows / len(rows)).reshape(weights.shape)

    return _least(objective, difference.shape[1:], ridge)


def _least(objective: Callable[[Floats], tuple[float, Floats]], shape: tuple[int, ...], ridge: float) -> Floats:
    """Where objective + ridge/2 ‖x‖² is least; the objective gives value and gradient."""
    if not ridge > 0:
        raise UsageError(f"the ridge must be > 0, or rewards may grow without end; got {ridge}")

    def regularised(flat: Floats) -> tuple[float, Floats]:
        value, gradient = objective(flat.reshape(shape))
        return value + ridge / 2 * float(flat @ flat), gradient.ravel() + ridge * flat

    found = minimize(
        regularised, np.zeros(int(np.prod(shape))), jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 0.0, "gtol": _GRADIENT}
    )
    if (left := float(np.abs(regularised(found.x)[1]).max())) > 100 * _GRADIENT:
        raise Failure(f"the reward was not found: a gradient of {left:.1e} is left")
    return found.x.reshape(shape)
