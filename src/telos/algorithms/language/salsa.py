"""SALSA: PPO whose reference is a soup, the mean of the weights of several fine-tuned models.

The mean of models fine-tuned from one start lies in a region of higher reward than each of them (Chegini et al. 2024), so a policy that is held near it can go
further: the KL penalty of `ppo-max` is measured from `--reference soup:A,B,…`, while the policy starts from one of the models. Every method with a reference
takes such a soup; this one is the paper's composition, and refuses another reference.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language import ppo_max
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(ppo_max.Config):
    """Options of SALSA."""


METHOD = Method(
    key="salsa",
    title="SALSA",
    family="language",
    loop="rollouts",
    changes="PPO whose reference is the mean of the weights of several fine-tuned models",
    paper="Chegini et al. 2024, SALSA: Soup-based Alignment Learning for Stronger Adaptation in RLHF, arXiv:2411.01798",
    config=Config,
    loss=ppo_max.loss,
    estimate=ppo_max.estimate,
    critic_loss=ppo_max.critic_loss,
    needs=frozenset({"reference", "reward", "critic", "soup"}),
    system=53,
    aliases=("model-soup", "soup-reference"),
)
