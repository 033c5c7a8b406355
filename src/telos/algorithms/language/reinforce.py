"""REINFORCE with a baseline: the plain policy gradient on sampled answers.

    A_t = Σ_{s ≥ t} r_s − b,   b = the mean of past answers' returns

What is paid from a token on, its reward-to-go, is compared with what answers have returned so far on average (Williams 1992, section 2 with its section 8's
moving baseline). `baseline` none leaves it out. The ratio and its bound matter only when an iteration takes more than one optimiser step; the gradient of the
first is that of REINFORCE. The baseline is the mean over all valid answers of earlier iterations, each iteration counting `baseline_share` of what it adds, so
that it does not depend on the answers that it judges; in the first iteration it is their own mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from telos.algorithms.language._policy_gradient import PolicyGradientConfig, answer_rewards, loss, rewards_to_go
from telos.core.config import require
from telos.core.method import Method
from telos.functional.policy import Estimates, Scored


@dataclass(frozen=True, kw_only=True)
class Config(PolicyGradientConfig):
    """Options of REINFORCE."""

    epochs: int = 1  # passes over an iteration's answers
    baseline: Literal["mean", "none"] = "mean"  # what returns are compared with: their moving mean, or nothing
    baseline_share: float = 0.1  # share of the last iteration in the moving mean, (0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0 and <= 1", "baseline_share")


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    advantages = rewards_to_go(config, scored)
    if config.baseline == "none" or not bool(scored.valid.any()):
        return Estimates(advantages, state=state)
    mean = float(answer_rewards(config, scored)[scored.valid].mean())
    baseline = state.get("baseline", mean)
    moved = baseline + config.baseline_share * (mean - baseline)
    advantages = (advantages - baseline).masked_fill(~scored.mask, 0.0)
    return Estimates(advantages, state={"baseline": moved}, metrics={"baseline": baseline})


METHOD = Method(
    key="reinforce",
    title="REINFORCE",
    family="language",
    loop="rollouts",
    changes="the plain policy gradient: reward-to-go less a moving mean",
    paper="Williams 1992, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning, doi:10.1007/BF00992696",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward"}),
    aliases=("policy-gradient", "vanilla-policy-gradient"),
)
