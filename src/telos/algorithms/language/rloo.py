"""RLOO: REINFORCE whose baseline for an answer is the mean of the other answers to the same prompt.

    A_i = R_i − 1/(k − 1) Σ_{j ≠ i} R_j,   R = r(x, y) − β log π(y|x)/π_ref(y|x)

An answer is one action, so all its tokens share its advantage, and the KL penalty is part of the return (Ahmadian et al. 2024, eqs. 6 to 8). The baseline is
independent of the answer that it judges, hence the gradient is unbiased. TRL divides advantages by their deviation on request; here `normalize_advantage`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from telos.algorithms.language._policy_gradient import PolicyGradientConfig, answer_rewards, loss
from telos.core.config import require
from telos.core.method import Method
from telos.functional.advantages import leave_one_out, on_tokens
from telos.functional.policy import Estimates, Scored
from telos.functional.reduction import whiten


@dataclass(frozen=True, kw_only=True)
class Config(PolicyGradientConfig):
    """Options of RLOO."""

    samples_per_prompt: int = 4  # k: answers to each prompt, >= 2 (paper: 2 and 4)
    epochs: int = 1  # passes over an iteration's answers
    normalize_advantage: bool = False  # mean 0, deviation 1 over the iteration's tokens (paper: off)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 2", "samples_per_prompt")


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    found = leave_one_out(answer_rewards(config, scored), scored.group, scored.valid)
    advantages = on_tokens(found, scored.mask)
    if config.normalize_advantage:
        advantages = whiten(advantages, scored.mask)
    return Estimates(advantages, state=state)


METHOD = Method(
    key="rloo",
    title="REINFORCE Leave-One-Out",
    family="language",
    loop="rollouts",
    changes="compares an answer with the mean of the other answers to its prompt",
    paper="Ahmadian et al. 2024, Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs, arXiv:2402.14740",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward"}),
    aliases=("reinforce-leave-one-out",),
)
