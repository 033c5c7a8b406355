"""How far greedy play must look beyond random play: the effective horizon of finite processes with a horizon.

    Q¹ = Q of random play,   Q^{i+1}_t(s, a) = r(s, a) + γ E max_a′ Q^i_{t+1}(s′, a′)              (Laidlaw et al. 2023 and 2024)

A process is solvable with lookahead k when every policy that is greedy for Q^k is optimal: k = 1 is greedy play over random play, k counts one backup less than
itself. The smallest gap Δ_k in Q^k between the best actions and the others says how many samples telling them apart takes. Two effective horizons follow:

    deterministic   min_k k + log_A m_k,   m_k the smallest m for which GORP finds an optimal policy with a probability of at least 1/2
    stochastic      min_k k + log_A Δ_k⁻²,   infinite where the process is not solvable with lookahead k

What we had to choose. Gaps are taken in states that a greedy policy for Q^k can meet, not in all states: no other state is decided in. The papers' returns lie
in [0, 1]; here gaps are divided by the difference of the largest and the smallest value that any policy has anywhere. Where greedy policies have no choice
to get wrong Δ_k is 1. m_k is measured: GORP is simulated many times, and "at least 1/2" is asked of the share of these. Values within 1e-9 of the largest
difference count as equal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from telos.core.errors import UsageError
from telos.core.seeds import numpy_generator
from telos.environments.tabular import Tabular

_TIE = 1e-9


@dataclass(frozen=True)
class Lookahead:
    """What a lookahead costs: `samples` are m_k or Δ_k⁻², infinite where it finds no optimal policy; `horizon` = k + log_A samples."""

    k: int
    samples: float
    horizon: float


def effective_horizon(found: Iterable[Lookahead]) -> Lookahead:
    """The cheapest lookahead, the first of equal ones."""
    return min(found, key=lambda one: one.horizon)


def shallow_values(process: Tabular, k: int) -> np.ndarray:
    """Q^k, [H, S, A]: the values of random play after k - 1 backups. Raises `UsageError` for a process without a horizon."""
    _checked(process, k)
    values = process.evaluate(process.uniform).action
    for _ in range(k - 1):
        following = np.concatenate([values[1:].max(-1), np.zeros((1, process.states))])
        values = np.stack([process.q_values(state) for state in following])
    return values


def gap(process: Tabular, k: int) -> float:
    """Δ_k in (0, 1], or 0 where some policy that is greedy for Q^k is not optimal."""
    values, best = shallow_values(process, k), process.optimal().action
    span = _span(process)
    tolerance = _TIE * max(span, 1e-300)
    chosen = values >= values.max(-1, keepdims=True) - tolerance
    right = best >= best.max(-1, keepdims=True) - tolerance
    met, smallest = process.start > 0, math.inf
    for t in range(len(values)):
        decided = met & ~process.ending
        if (chosen[t] & ~right[t])[decided].any():
            return 0.0
        others = np.where(chosen[t], -np.inf, values[t]).max(-1)
        smallest = min(smallest, float((values[t].max(-1) - others)[decided].min(initial=math.inf)))
        met = _reached(process, decided[:, None] & chosen[t])
    return min(1.0, smallest / span) if math.isfinite(smallest) else 1.0


def stochastic_lookaheads(process: Tabular, most: int | None = None) -> list[Lookahead]:
    """Every lookahead from 1 to `most` (None: the horizon, with which every process is solvable)."""
    found = []
    for k in range(1, (most or _checked(process)) + 1):
        apart = gap(process, k)
        samples = apart**-2 if apart else math.inf
        found.append(Lookahead(k, samples, k + _log(samples, process.actions)))
    return found


def deterministic_lookaheads(
    process: Tabular, most: int | None = None, *, trials: int = 200, limit: int = 1024, seed: int = 0
) -> list[Lookahead]:
    """The same for GORP in a deterministic process. Up to m = `limit` is tried; beyond it m_k counts as infinite."""
    found = []
    for k in range(1, (most or _checked(process)) + 1):
        samples = _fewest(process, k, trials, limit, seed)
        found.append(Lookahead(k, samples, k + _log(samples, process.actions)))
    return found


def gorp_success(process: Tabular, k: int, m: int, *, trials: int = 200, seed: int = 0) -> float:
    """The share of `trials` runs of GORP with m episodes for each sequence of k actions that find an optimal policy.

    Raises `UsageError` for a process that is not deterministic.
    """
    horizon = _checked(process, k)
    if not np.isin(process.transitions, (0.0, 1.0)).all() or process.start.max() < 1:
        raise UsageError("GORP is for deterministic processes with one start: in others its sequences of actions do not lead to one state")
    if m < 1 or trials < 1:
        raise UsageError(f"GORP needs episodes and trials, 1 at least; got {m} and {trials}")
    draws = numpy_generator(seed, "gorp", k, m)
    following, reward = process.transitions.argmax(-1), process.expected_rewards
    sequences = np.array(list(itertools.product(range(process.actions), repeat=k)))
    best = process.optimal()
    tolerance = _TIE * max(_span(process), 1e-300)
    state = np.full(trials, int(process.start.argmax()))
    optimal = np.ones(trials, dtype=bool)
    for i in range(horizon):
        place = np.broadcast_to(state[:, None, None], (trials, len(sequences), m))
        total, weight = np.zeros(place.shape), 1.0
        for t in range(i, horizon):
            action = sequences[:, t - i, None] if t - i < k else draws.integers(process.actions, size=place.shape)
            total += weight * reward[place, action]  # 0 in terminal states
            place = np.where(process.ending[place], place, following[place, action])
            weight *= process.discount
        values = total.mean(-1).reshape(trials, process.actions, -1).max(-1)
        action = values.argmax(-1)
        optimal &= process.ending[state] | (best.action[i][state, action] >= best.state[i][state] - tolerance)
        state = np.where(process.ending[state], state, following[state, action])
    return float(optimal.mean())


def _fewest(process: Tabular, k: int, trials: int, limit: int, seed: int) -> float:
    """The smallest m that succeeds in at least half of the trials: doubled until it does, then halved in between."""
    if not gap(process, k):  # more samples only make the error surer
        return math.inf
    low, high = 0, 1
    while gorp_success(process, k, high, trials=trials, seed=seed) < 0.5:
        low, high = high, 2 * high
        if high > limit:
            return math.inf
    while high - low > 1:
        middle = (low + high) // 2
        if gorp_success(process, k, middle, trials=trials, seed=seed) < 0.5:
            low = middle
        else:
            high = middle
    return float(high)


def _checked(process: Tabular, k: int = 1) -> int:
    """The process's horizon."""
    if process.horizon is None:
        raise UsageError("the effective horizon is that of a process whose episodes end: give it a horizon")
    if k < 1:
        raise UsageError(f"a lookahead is at least 1; got {k}")
    return process.horizon


def _reached(process: Tabular, taken: np.ndarray) -> np.ndarray:
    """[S] states that some of the actions taken [S, A] can lead to."""
    return np.einsum("sap,sa->p", process.onward, taken.astype(np.float64)) > 0


def _span(process: Tabular) -> float:
    """The largest value of any policy in any state that can be met, minus the smallest."""
    best = process.optimal().state
    worst = (
        -Tabular(process.transitions, -process.rewards, process.start, process.terminal, process.horizon, process.discount).optimal().state
    )
    met, high, low = process.start > 0, -math.inf, math.inf
    for t in range(_checked(process)):
        high, low = max(high, float(best[t][met].max())), min(low, float(worst[t][met].min()))
        met = _reached(process, np.broadcast_to(met[:, None], (process.states, process.actions)))
        if not met.any():
            break
    return high - low


def _log(samples: float, actions: int) -> float:
    return math.log(samples) / math.log(actions) if math.isfinite(samples) and actions > 1 else (0.0 if samples == 1 else math.inf)
