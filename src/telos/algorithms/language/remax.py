"""ReMax: REINFORCE whose baseline is the reward of the greedy answer to the same prompt; no critic.

    A = R(x, y) − R(x, ȳ),   ȳ = argmax_t π(· | x, ȳ_<t)                                                       (Li et al. 2023, Algorithm 1)

The greedy answer costs one more generation a prompt and no gradient; the critic and its optimiser, about half of PPO's memory, are gone. The KL penalty is part
of the reward of each token, paid from that token on, as in the authors' code; the baseline is the score alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from telos.algorithms.language._policy_gradient import PolicyGradientConfig, loss, rewards_to_go
from telos.core.method import Method
from telos.functional.advantages import on_tokens
from telos.functional.policy import Estimates, Scored


@dataclass(frozen=True, kw_only=True)
class Config(PolicyGradientConfig):
    """Options of ReMax."""

    epochs: int = 1  # passes over an iteration's answers (paper: 1)


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    assert scored.greedy is not None
    advantages = rewards_to_go(config, scored) - on_tokens(scored.greedy, scored.mask)
    found = scored.valid
    return Estimates(advantages, state=state, metrics={"reward/greedy": float(scored.greedy[found].mean()) if bool(found.any()) else 0.0})


METHOD = Method(
    key="remax",
    title="ReMax",
    family="language",
    loop="rollouts",
    changes="REINFORCE whose baseline is the reward of the greedy answer",
    paper="Li et al. 2023, ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large Language Models, arXiv:2310.10505",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward", "greedy"}),
    system=25,
)
