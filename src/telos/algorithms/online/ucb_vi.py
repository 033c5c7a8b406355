"""UCBVI: value iteration in the most likely model, with a bonus that falls with the visits.

    Q_h(s, a) = min(Q_h of the last plan, H, r̂(s, a) + γ Σ P̂(s′|s, a) V_{h+1}(s′) + c b_h(s, a)),   H where N = 0     (Azar et al. 2017, algorithm 2)
    Hoeffding  b = 7 H L / √N                                                                                              (algorithm 3)
    Bernstein  b = √(8 L Var_P̂(V_{h+1}) / N) + 14 H L / (3 N) + √(8 Σ P̂(s′) min(100² H³ S² A L² / N_{h+1}(s′), H²) / N)      (algorithm 4)
    L = ln(5 S A T / δ)

N counts (s, a) in all steps, N_{h+1}(s′) the state s′ at step h + 1 (here never less than 1). Departures: rewards are unknown and their means are
estimated, as the bonus covers them too; H is the range of returns by `reward_range`; c scales the bonus, because with the paper's constants (c = 1) it stays
above the largest return for tens of thousands of episodes; T is the run's steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from telos.algorithms.online._loop_tabular import Plan, RewardedConfig, Seen, backward, by_values
from telos.core.config import require
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(RewardedConfig):
    """Options of UCBVI."""

    bonus: Literal["hoeffding", "bernstein"] = "bernstein"  # from the range of values, or from their variance
    bonus_scale: float = 0.01  # c: scale of the bonus, >= 0 (paper: 1)
    failure: float = 0.05  # δ: chance with which the bonus may fail, (0, 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "bonus_scale")
        require(self, "> 0 and < 1", "failure")


def bonus(config: Config, seen: Seen, h: int, following: np.ndarray) -> np.ndarray:
    """b_h [S, A], before its scale, for values `following` [S + 1] of what comes next."""
    steps, states, actions = seen.shape
    log = math.log(5 * states * actions * steps * config.episodes / config.failure)
    n, largest = np.maximum(seen.counts, 1), float(seen.high[0] - seen.low[0])
    if config.bonus == "hoeffding":
        return 7 * largest * log / np.sqrt(n)
    p = seen.frequencies
    variance = np.maximum(p @ following**2 - (p @ following) ** 2, 0)
    met = np.maximum(np.append(seen.arrivals[h + 1], 1.0) if h + 1 < steps else np.full(states + 1, np.inf), 1)
    unit = largest / steps  # of rewards: the paper's is 1
    unsure = np.minimum((unit * 100) ** 2 * steps**3 * states**2 * actions * log**2 / met, largest**2)
    unsure[-1] = 0.0  # that nothing follows is known
    return np.sqrt(8 * log * variance / n) + 14 * largest * log / (3 * n) + np.sqrt(8 * (p @ unsure) / n)


def plan(config: Config, seen: Seen, chance: np.random.Generator) -> Plan:
    reward, p, tried = seen.mean_rewards(0.0), seen.frequencies, seen.counts > 0
    last = seen.tables.get("q", np.full(seen.shape, np.inf))

    def back(h: int, following: np.ndarray) -> np.ndarray:
        found = reward + config.gamma * (p @ following) + config.bonus_scale * bonus(config, seen, h, following)
        return np.minimum(last[h], np.where(tried, np.minimum(found, seen.high[h]), seen.high[h]))

    state, q = backward(seen, back)
    return by_values(q, {"plan/value": float(seen.start @ state[0, :-1])}, {"q": q})


METHOD = Method(
    key="ucb-vi",
    title="Upper Confidence Bound Value Iteration",
    family="online",
    loop="tabular",
    changes="plans in the most likely model with a bonus on actions that were tried seldom",
    paper="Azar et al. 2017, Minimax Regret Bounds for Reinforcement Learning, arXiv:1703.05449",
    config=Config,
    plan=plan,
    aliases=("ucbvi", "ucbvi-ch", "ucbvi-bf"),
)
