"""Maximize to Explore in finite processes: the model that is both likely and good, by one objective without confidence sets.

    P ← argmax_P  V*_P(s_1) + η Σ n(s, a, s′) log P(s′|s, a),   and the next policy is optimal in P            (Liu et al. 2023, algorithm 1)

How it is maximised. The paper's model has transitions of its own for every step. The house's processes have one for all steps, so counts are pooled over the
steps, and each step's transitions P_h bear 1/H of the likelihood; where they agree this is the objective above, so its maximum is never lower. Given
the discounted chance d_h(s) of being in s at step h, and values V_{h+1}, what concerns (h, s) is a choice of an action with a distribution p:

    max_a max_p  r̂(s, a) + γ Σ p(s′) V_{h+1}(s′) − η n(s, a) KL(P̂(·|s, a) ‖ p) / (H d_h(s))

The inner maximum has the form p(s′) = w(s′) / (λ − V_{h+1}(s′)) with w = η n(s, a, s′) / (H γ d_h(s)); λ is found by Newton's method, which rises to the
root of a convex function, and mass that is left goes to the best place never met. A sweep backwards over h solves every (h, s) exactly while d stays, a
pass forwards renews d: the objective never falls. Sweeps begin as if every state were met for sure, which is the most optimistic, and from the last plan's
d; the better end is taken. It may still be a local maximum.

Rewards are their means, and the largest possible one for actions never tried, as the paper takes rewards as known. The larger η, the less is explored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from telos.algorithms.online._loop_tabular import Plan, RewardedConfig, Seen, by_values
from telos.core.config import require
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(RewardedConfig):
    """Options of tabular MEX."""

    eta: float = (
        1.0  # η: weight of the log-likelihood, > 0, in units of the return (theory: falls with the square root of the run's length)
    )
    sweeps: int = 8  # most sweeps from each start

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "eta")
        require(self, ">= 1", "sweeps")


def tilt(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The distributions p [..., N] that maximise Σ p v + Σ w log p, for weights w [..., N] >= 0 and values v [N]."""
    met = weights > 0
    best = values.max()
    price = np.where(met, values + weights, -np.inf).max(-1, keepdims=True)
    price = np.where(np.isfinite(price), price, best)
    for _ in range(50):  # each step is below the root, and ends at it to rounding after a few
        gap = np.where(met, price - values, 1.0)
        share = weights / gap
        short = share.sum(-1, keepdims=True) - 1
        price = price + np.maximum(short, 0) / np.maximum((share / gap).sum(-1, keepdims=True), 1e-300)
        if short.max() < 1e-13:
            break
    price = np.maximum(price, best)
    p = np.where(met, weights / np.where(met, price - values, 1.0), 0.0)
    p[..., int(values.argmax())] += np.maximum(1 - p.sum(-1), 0)
    return p / p.sum(-1, keepdims=True)


class Found(NamedTuple):
    """A model and its policy: the objective, the chance of each state by step [H, S], and penalised action values [H, S, A]."""

    objective: float
    chance: np.ndarray
    values: np.ndarray


def sweep(config: Config, seen: Seen, chance: np.ndarray) -> Found:
    """One sweep backwards with `chance` [H, S], and the pass forwards."""
    steps, states, _ = seen.shape
    reward, counts, likely = seen.mean_rewards(config.reward_range[1]), seen.counts, seen.frequencies
    rows, spent, moves = np.arange(states), 0.0, np.zeros((steps, states, states + 1))
    values, state = np.zeros(seen.shape), np.zeros(states + 1)
    for h in reversed(range(steps)):
        price = config.eta / (steps * np.maximum(chance[h], 1e-9))[:, None]  # of a nat, in the state's own value
        p = tilt(price[..., None] * seen.moves / config.gamma, state)
        apart = counts * (likely * (np.log(np.where(likely > 0, likely, 1.0)) - np.log(np.where(likely > 0, p, 1.0)))).sum(-1)
        value = reward + config.gamma * (p @ state)
        values[h] = value - price * apart
        taken = values[h].argmax(-1)
        state = np.append(value[rows, taken], 0.0)
        moves[h], spent = p[rows, taken], spent + config.eta / steps * apart[rows, taken].sum()
    found = np.zeros((steps, states))
    found[0] = seen.start
    for h in range(steps - 1):
        found[h + 1] = config.gamma * (found[h] @ moves[h])[:-1]
    return Found(float(seen.start @ state[:-1] - spent), found, values)


def maximise(config: Config, seen: Seen) -> Found:
    starts = [np.ones(seen.shape[:2])] + ([seen.tables["chance"]] if "chance" in seen.tables else [])
    best = None
    for chance in starts:
        found = sweep(config, seen, chance)
        for _ in range(config.sweeps - 1):
            after = sweep(config, seen, found.chance)
            if after.objective <= found.objective + 1e-9:
                break
            found = after
        best = found if best is None or found.objective > best.objective else best
    assert best is not None
    return best


def plan(config: Config, seen: Seen, chance: np.random.Generator) -> Plan:
    found = maximise(config, seen)
    return by_values(found.values, {"plan/objective": found.objective}, {"chance": found.chance})


METHOD = Method(
    key="mex-tabular",
    title="Maximize to Explore, tabular",
    family="online",
    loop="tabular",
    changes="plans in the model that maximises its own optimal value plus a weighted log-likelihood of what was seen",
    paper="Liu et al. 2023, Maximize to Explore: One Objective Function Fusing Estimation, Planning, and Exploration, arXiv:2305.18258",
    config=Config,
    plan=plan,
    aliases=("maximize-to-explore-tabular",),
)
