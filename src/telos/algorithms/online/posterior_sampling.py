"""Posterior sampling: each policy is optimal in a process drawn from the posterior.

    P(·|s, a) ~ Dirichlet(prior + counts),   r(s, a) ~ N((m₀ + Σ r) / (n + 1), σ² / (n + 1))                          (Osband et al. 2013, algorithm 1)

m₀ is the middle of `reward_range`, and counts as one reward. The paper leaves the prior open. That an episode is over counts as one more place to come to.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from telos.algorithms.online._loop_tabular import Plan, RewardedConfig, Seen, backward, by_values
from telos.core.config import require
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(RewardedConfig):
    """Options of posterior sampling."""

    prior: float = 0.1  # of each place in the Dirichlet prior, > 0: small says that actions lead to few places
    reward_deviation: float = 0.3  # σ: deviation of a reward and of the prior mean, >= 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "prior")
        require(self, ">= 0", "reward_deviation")


def plan(config: Config, seen: Seen, chance: np.random.Generator) -> Plan:
    weights = chance.standard_gamma(config.prior + seen.moves) + 1e-300  # gammas over their sum are a Dirichlet
    p = weights / weights.sum(-1, keepdims=True)
    counts = seen.counts + 1
    mean = (sum(config.reward_range) / 2 + seen.rewards) / counts
    reward = mean + config.reward_deviation / np.sqrt(counts) * chance.standard_normal(mean.shape)
    state, q = backward(seen, lambda h, following: reward + config.gamma * (p @ following))
    return by_values(q, {"plan/value": float(seen.start @ state[0, :-1])})


METHOD = Method(
    key="posterior-sampling",
    title="Posterior Sampling for Reinforcement Learning",
    family="online",
    loop="tabular",
    changes="plans in a process that is drawn from the posterior anew for each policy",
    paper="Osband et al. 2013, (More) Efficient Reinforcement Learning via Posterior Sampling, arXiv:1306.0940",
    config=Config,
    plan=plan,
    aliases=("psrl",),
)
