"""Q-learning in finite processes with a horizon: with an upper confidence bonus, or ε-greedily.

    Q_h(s, a) ← (1 − α_t) Q_h(s, a) + α_t (r + γ V_{h+1}(s′) + b_t),   V_h = min(H, max_a Q_h)
    α_t = (H + 1) / (H + t),   b_t = c √(H³ ι / t),   ι = log(S A T / δ)                                          (Jin et al. 2018, algorithm 1)

t counts the visits of (s, a) at step h. With the bonus, values begin at the largest return that is possible and the policy is greedy. Without (`epsilon`),
they begin at the least and every action is random with probability ε: the usual baseline, at the same learning rate. Departures: H is the range of
returns by `reward_range`, so that rewards need not lie in [0, 1]; c scales the bonus (the paper leaves the constant open); T is the run's steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from telos.algorithms.online._loop_tabular import Plan, Played, RewardedConfig, Seen
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.environments.tabular import greedy


@dataclass(frozen=True, kw_only=True)
class Config(RewardedConfig):
    """Options of Q-learning."""

    exploration: Literal["ucb", "epsilon"] = "ucb"  # a bonus and a greedy policy (paper), or random actions
    bonus_scale: float = 0.05  # c: scale of the bonus, >= 0 (paper: some constant)
    failure: float = 0.05  # δ: chance with which the bonus may fail, (0, 1)
    epsilon: float = 0.1  # share of random actions, [0, 1], with exploration=epsilon

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "bonus_scale")
        require(self, "> 0 and < 1", "failure")
        require(self, ">= 0 and <= 1", "epsilon")
        idle = ("epsilon",) if self.exploration == "ucb" else ("bonus_scale", "failure")
        for name in idle:
            if getattr(self, name) != Config.__dataclass_fields__[name].default:
                raise UsageError(f"--{name} has no effect with --exploration {self.exploration}")


def tables_of(config: Config, seen: Seen) -> tuple[np.ndarray, np.ndarray]:
    """(Q [H, S, A], visits [H, S, A]), those of the start before anything was learned."""
    if "q" in seen.tables:
        return seen.tables["q"], seen.tables["visits"]
    first = seen.high if config.exploration == "ucb" else seen.low
    return np.tile(first[:, None, None], (1, *seen.rewards.shape)), np.zeros(seen.shape)


def plan(config: Config, seen: Seen, chance: np.random.Generator) -> Plan:
    q, _ = tables_of(config, seen)
    policy = greedy(q)
    if config.exploration == "epsilon":
        policy = (1 - config.epsilon) * policy + config.epsilon / q.shape[-1]
    return Plan(policy, q, {}, {})


def bonus(config: Config, seen: Seen, visits: float) -> float:
    """b_t after `visits` >= 1 visits."""
    steps, states, actions = seen.shape
    iota = math.log(states * actions * steps * config.episodes / config.failure)
    scale = float(seen.high[0] - seen.low[0]) / steps  # of a step's reward
    return config.bonus_scale * scale * math.sqrt(steps**3 * iota / visits)


def update(config: Config, seen: Seen, played: Played) -> Mapping[str, np.ndarray]:
    q, visits = (table.copy() for table in tables_of(config, seen))
    steps, states, _ = q.shape
    for h, (s, a, r, after) in enumerate(zip(played.states, played.actions, played.rewards, played.states[1:])):
        visits[h, s, a] += 1
        t = visits[h, s, a]
        nothing = after == states or h + 1 == steps
        following = 0.0 if nothing else min(seen.high[h + 1], q[h + 1, after].max())
        extra = bonus(config, seen, t) if config.exploration == "ucb" else 0.0
        q[h, s, a] += (steps + 1) / (steps + t) * (r + config.gamma * following + extra - q[h, s, a])
    return {"q": q, "visits": visits}


METHOD = Method(
    key="q-learning",
    title="Q-learning with Upper Confidence Bounds",
    family="online",
    loop="tabular",
    changes="learns a table of action values of every step, with a bonus that falls with the visits, or with random actions",
    paper="Jin et al. 2018, Is Q-Learning Provably Efficient?, arXiv:1807.03765",
    config=Config,
    plan=plan,
    update=update,
    aliases=("ucb-h", "tabular-q-learning"),
)
