"""REINFORCE++: PPO's tricks on REINFORCE without a critic; advantages are normalised over the whole batch, not within a prompt's group.

    A_t = Σ_{s ≥ t} r_s,   r_s = 1[s = T] r(x, y) − β log π(y_s)/π_ref(y_s),   then mean 0 and deviation 1 over all tokens of the iteration

(Hu et al. 2025, section 3: token-level KL penalty, clipped ratio, global advantage normalisation.) `group_baseline` first takes the mean of the answers to the
same prompt off the rewards, the variant for reasoning that the authors call REINFORCE++-baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from telos.algorithms.language._policy_gradient import PolicyGradientConfig, loss, rewards_to_go
from telos.core.config import require
from telos.core.method import Method
from telos.functional.advantages import group_mean
from telos.functional.policy import Estimates, Scored
from telos.functional.reduction import whiten


@dataclass(frozen=True, kw_only=True)
class Config(PolicyGradientConfig):
    """Options of REINFORCE++."""

    epochs: int = 1  # passes over an iteration's answers
    kl_coef: float = 0.01  # β: weight of the divergence from the reference, >= 0 (paper: 0.01); 0 keeps no reference model
    group_baseline: bool = False  # the mean of the answers to the same prompt is taken off first; needs two or more of them

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_baseline:
            require(self, ">= 2", "samples_per_prompt")


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    scores = scored.scores
    if config.group_baseline:
        scores = scores - group_mean(scores, scored.group, scored.valid).to(scores)
    advantages = rewards_to_go(config, dataclasses.replace(scored, scores=scores))
    return Estimates(whiten(advantages, scored.mask), state=state)


METHOD = Method(
    key="reinforce-plus-plus",
    title="REINFORCE++",
    family="language",
    loop="rollouts",
    changes="REINFORCE with token-level KL penalty, clipped ratio and advantages normalised over the whole batch",
    paper="Hu et al. 2025, REINFORCE++: An Efficient RLHF Algorithm with Robustness to Both Prompt and Reward Models, arXiv:2501.03262",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward"}),
    aliases=("reinforce++",),
)
