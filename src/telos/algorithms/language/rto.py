"""RTO: PPO with rewards for every token, which a policy aligned by DPO supplies.

    r_t = β₁ log π_dpo(y_t)/π_ref(y_t) − β₂ log π(y_t)/π_ref(y_t) + 1[t = T] r(x, y)                    (Zhong et al. 2024, eq. 4.4 and Algorithm 1)

DPO's implicit reward is a sum over tokens, hence it says where in an answer a preference was earned. `teacher` is the policy that DPO trained, from the same
reference. Advantages, critic and loss are those of `ppo-max`, and so are its switches; the score r is normalised as there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from telos.algorithms.language import ppo_max
from telos.core.config import require
from telos.core.method import Method
from telos.functional.policy import Estimates, Scored


@dataclass(frozen=True, kw_only=True)
class Config(ppo_max.Config):
    """Options of RTO."""

    teacher: str = ""  # folder or hub id of the policy that DPO trained
    token_coef: float = 0.05  # β₁: weight of log π_dpo/π_ref at each token, >= 0 (paper: 0.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "token_coef")


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    assert scored.teacher is not None
    assert scored.reference is not None
    tokens = (config.token_coef * (scored.teacher - scored.reference)).masked_fill(~scored.mask, 0.0)
    dense = tokens if scored.dense is None else scored.dense + tokens
    found = ppo_max.estimate(config, dataclasses.replace(scored, dense=dense), state)
    valid = scored.valid
    total = float(tokens.sum(1)[valid].mean()) if bool(valid.any()) else 0.0
    return dataclasses.replace(found, metrics={**found.metrics, "reward/tokens": total})


METHOD = Method(
    key="rto",
    title="Reinforced Token Optimization",
    family="language",
    loop="rollouts",
    changes="PPO with a reward for every token: the log-ratio of a policy that DPO trained",
    paper="Zhong et al. 2024, DPO Meets PPO: Reinforced Token Optimization for RLHF, arXiv:2404.18922",
    config=Config,
    loss=ppo_max.loss,
    estimate=estimate,
    critic_loss=ppo_max.critic_loss,
    needs=frozenset({"reference", "reward", "critic", "teacher"}),
    system=122,
    aliases=("reinforced-token-optimization",),
)
