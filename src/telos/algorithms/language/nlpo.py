"""NLPO: PPO whose actions are limited to the tokens that a masking policy holds likely.

A copy of the policy, the masking policy, is renewed every `mask_every` iterations; tokens are drawn from the policy among those in the masking
policy's nucleus of mass `mask_top_p` (Ramamurthy et al. 2023, section 4.2 and Algorithm 1). A vocabulary of thousands of actions becomes one of
dozens, and improbable tokens, whose gradients are the noisiest, are never tried. Advantages, critic and loss are those of `ppo-max`.

Departures from the authors' code: the allowed tokens are part of the rollout and log-probabilities are renormalised over them, so that the first ratio
is 1 under the distribution that was sampled (theirs are not renormalised); the renewed mask is the one that sampling uses (theirs keeps the first);
no floor on the number of allowed tokens. The reference of the KL penalty is not masked.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language import ppo_max
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(ppo_max.Config):
    """Options of NLPO."""

    mask_top_p: float = 0.9  # nucleus of the masking policy, (0, 1] (paper: 0.9)
    mask_every: int = 10  # μ: iterations after which the masking policy is renewed (paper: 1 to 50 by task)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0 and <= 1", "mask_top_p")
        require(self, ">= 1", "mask_every")
        if self.engine != "native":
            raise UsageError(f"--engine {self.engine} cannot ask two models for each token; use --engine native")


METHOD = Method(
    key="nlpo",
    title="Natural Language Policy Optimization",
    family="language",
    loop="rollouts",
    changes="PPO whose tokens are drawn from the nucleus of an older copy of the policy",
    paper="Ramamurthy et al. 2023, Is Reinforcement Learning (Not) for Natural Language Processing, arXiv:2210.01241",
    config=Config,
    loss=ppo_max.loss,
    estimate=ppo_max.estimate,
    critic_loss=ppo_max.critic_loss,
    needs=frozenset({"reference", "reward", "critic", "nucleus"}),
    system=9,
    aliases=("rl4lms",),
)
