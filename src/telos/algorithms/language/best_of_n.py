"""Best-of-n sampling: draw n answers, keep the one that the reward prefers; and what that would give for every smaller n.

The expected reward of the best of k out of N draws is estimated without drawing again, as an average over all subsets (Nakano et al. 2021, appendix I):

    E[max of k] ≈ Σ_i C(i, k−1) / C(N, k) · r_(i),   r_(0) ≤ … ≤ r_(N−1)

which is unbiased, unlike the mean of running maxima. The divergence from the sampling policy is at most log k − (k − 1)/k (Beirami et al. 2024 show that this
well-known formula is an upper bound).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from telos.algorithms.language._loop_sampling import SamplingConfig
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(SamplingConfig):
    """Options of best-of-n."""


def subset_weights(total: int, k: int) -> np.ndarray:
    """w_i = C(i, k−1) / C(N, k) for the i-th smallest of N = `total`: the chance that it is the largest of k drawn without replacement."""
    if not 1 <= k <= total:
        raise ValueError(f"k must lie in 1 … {total}, not {k}")
    return np.array([math.comb(i, k - 1) / math.comb(total, k) for i in range(total)])


def expected_best(rewards: np.ndarray, k: int, of: np.ndarray | None = None) -> np.ndarray:
    """Unbiased E[value of the answer with the best reward among k] for each row of rewards [..., N]; `of` [..., N] is what is averaged (a gold score, say),
    by default the reward itself."""
    order = np.argsort(rewards, -1, kind="stable")
    values = np.take_along_axis(rewards if of is None else of, order, -1)
    return values @ subset_weights(rewards.shape[-1], k)


def kl_bound(k: int) -> float:
    """log k − (k − 1)/k nats: an upper bound on KL(best-of-k ‖ sampling policy)."""
    return math.log(k) - (k - 1) / k


def select(config: Config, rewards: np.ndarray) -> np.ndarray:
    """The index of the kept answer in each row of rewards [P, N]; the first of equals; invalid rewards are −inf."""
    return rewards.argmax(-1)


METHOD = Method(
    key="best-of-n",
    title="Best-of-n sampling",
    family="language",
    loop="sampling",
    changes="keeps the best of n sampled answers, no training",
    paper="Nakano et al. 2021, WebGPT, arXiv:2112.09332, appendix I; Stiennon et al. 2020, arXiv:2009.01325",
    config=Config,
    select=select,
    needs=frozenset({"reward"}),
    aliases=("bon", "rejection-sampling"),
)
