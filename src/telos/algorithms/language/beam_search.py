"""Beam search over steps, guided by a process reward.

Round 1 draws N = beams · expansions first steps. Each round keeps the `beams` best answers under way and draws `expansions` next steps for each of them:

    score(s_1 … s_t) = f(r_1, …, r_t),   f one of last, min, product, sum, mean                       (Snell et al. 2024, section 5.2; Setlur et al. 2024)

f = last suits a value model's chances or a process reward model's probabilities (Snell et al.), min and product the probabilities (Lightman et al. 2023), sum
a guide whose scores are progress (`value:`) or log-ratios (`implicit:`), where it is V_t − V_0 or q_t. With `expansions` 1 nothing is thrown away, and the
search is best-of-n with n = beams.

Departures: finished answers stay among the candidates with their score and are expanded no more, so that beams may all end early; equal candidates are one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from telos.algorithms.language._loop_search import SearchConfig
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(SearchConfig):
    """Options of beam search."""


def select(config: Config, scores: np.ndarray) -> np.ndarray:
    """The indices of the best `beams` of scores [C], the best first; the first of equals."""
    return np.argsort(-scores, kind="stable")[: config.beams]


METHOD = Method(
    key="beam-search",
    title="Step-level beam search",
    family="language",
    loop="search",
    changes="keeps the best beginnings of answers under a process reward and goes on from these",
    paper="Snell et al. 2024, Scaling LLM Test-Time Compute Optimally, arXiv:2408.03314; Setlur et al. 2024, arXiv:2410.08146",
    config=Config,
    select=select,
    needs=frozenset({"process-reward"}),
    aliases=("guided-search", "step-beam-search", "verifier-guided-search"),
)
