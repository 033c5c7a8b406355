"""Dr. GRPO: GRPO without its two biases.

    A_i = r_i − mean(r_1 … r_G),   L = − 1/G Σ_i 1/T Σ_t min(ρ_t A_i, clip(ρ_t) A_i)                       (Liu et al. 2025, section 3.2)

Division by the group's deviation gives too easy and too hard prompts more weight; division by an answer's own length lets long wrong answers off. Here neither
is done, and T is the largest length that was allowed, a constant. Up to the factor (G − 1)/G of the baseline this is RLOO's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from telos.algorithms.language._group_relative import GroupConfig, estimate
from telos.algorithms.language._policy_gradient import loss
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(GroupConfig):
    """Options of Dr. GRPO."""

    loss_mean: Literal["token", "answer", "constant"] = "constant"  # over all tokens alike, over each answer first, or over a fixed length
    scale_rewards: Literal["group", "batch", "none"] = "none"  # advantages are divided by the group's deviation, the batch's, or not


METHOD = Method(
    key="dr-grpo",
    title="Dr. GRPO",
    family="language",
    loop="rollouts",
    changes="GRPO without division by the group's deviation and by the answer's length",
    paper="Liu et al. 2025, Understanding R1-Zero-Like Training: A Critical Perspective, arXiv:2503.20783",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward"}),
    aliases=("grpo-done-right",),
)
