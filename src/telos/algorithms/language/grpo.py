"""GRPO: PPO's clipped surrogate without a critic; an answer's advantage is its reward in the group of answers to the same prompt.

    A_i = (r_i − mean(r_1 … r_G)) / std(r_1 … r_G)
    L = − 1/G Σ_i 1/|y_i| Σ_t { min(ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε) A_i) − β k3_t }                    (Shao et al. 2024, eqs. 3 and 4)

With rewards of steps it is the paper's process supervision (section 4.1.3). The known corrections are options, and have names of their own: `dr-grpo` drops the
division by the deviation and by the length, `dapo` clips higher above, averages over tokens and passes over prompts whose answers are all alike;
`--ratio sequence` is GSPO. Departures: the deviation is that of the sample (divisor G − 1), with 10⁻⁴ added, as in TRL; the reference is the policy at the
start, where the paper sets it anew now and then (`--reference_share` moves it).
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language._group_relative import GroupConfig, estimate
from telos.algorithms.language._policy_gradient import loss
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig):
    """Options of GRPO."""


METHOD = Method(
    key="grpo",
    title="Group Relative Policy Optimization",
    family="language",
    loop="rollouts",
    changes="no critic: an answer's advantage is its reward in its group, normalised",
    paper="Shao et al. 2024, DeepSeekMath, arXiv:2402.03300",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward"}),
    aliases=("group-relative-policy-optimization", "gspo", "rlvr"),
)
