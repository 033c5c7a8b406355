"""Greedy over the random policy, for deterministic environments: try every sequence of k actions and then play at random; keep the best first action.

    Q̂_i(a_i … a_{i+k−1}) = mean over m episodes of Σ_{t≥i} γ^{t−i} r_t,   a_t random for t ≥ i + k                    (Laidlaw et al. 2023, algorithm 1)
    π_i = argmax_{a_i} max_{a_{i+1} … a_{i+k−1}} Q̂_i

Actions before step i are those found already: in a deterministic environment they lead to the same state every time, so that the policy need not look at
observations. It takes A^k m episodes for each of T steps; the smallest k + log_A m that finds the optimum is the effective horizon
(`evaluation.effective_horizon`). The number "deterministic" in the metrics is 1 while all episodes of an iteration met the same observation at step i; in
other environments use SQIRL.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import gymnasium
import numpy as np
import torch
from torch import nn

from telos.algorithms.online._loop_greedy_random import GreedyRandomConfig, Rollouts, constant
from telos.core.config import require
from telos.core.method import Method
from telos.models.staged import StagedPolicy


@dataclass(frozen=True, kw_only=True)
class Config(GreedyRandomConfig):
    """Options of GORP."""

    episodes: int = 10  # m: episodes for each sequence of `lookahead` actions, >= 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "episodes")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> StagedPolicy:
    return StagedPolicy(observation_space, action_space, config.horizon, blind=True)


def sample(config: Config, actions: int) -> np.ndarray:
    """Every sequence [A^k, k], m times, in order."""
    return np.repeat(np.array(list(itertools.product(range(actions), repeat=config.lookahead))), config.episodes, axis=0)


def estimate(config: Config, policy: StagedPolicy, rollouts: Rollouts, generator: torch.Generator) -> tuple[nn.Module, dict[str, float]]:
    """Values of the first action: the mean return of the best sequence that begins with it."""
    returns = rollouts.returns.reshape(-1, config.episodes)  # [A^k, m]
    values = returns.mean(1).reshape(policy.choices, -1).max(1)
    met = rollouts.observation[rollouts.alive[:, 0], 0]
    deterministic = float((met == met[:1]).all())
    return constant(policy, values), {
        "loss": float(returns.var(1).mean()),
        "value": float(values.max()),
        "deterministic": deterministic,
    }


METHOD = Method(
    key="gorp",
    title="Greedy Over Random Policy",
    family="online",
    loop="greedy-random",
    changes="acts greedily on the values of random play after every sequence of a few actions",
    paper="Laidlaw et al. 2023, Bridging RL Theory and Practice with the Effective Horizon, arXiv:2304.09853",
    config=Config,
    build=build,
    sample=sample,
    estimate=estimate,
    aliases=("greedy-over-random-policy",),
)
