"""P3O: Pairwise Proximal Policy Optimization. The gradient compares two answers to one prompt; shifts of a prompt's rewards change nothing.

    −½ E (R(y₁) − R(y₂)) ∇ [ log π(y₁) − log π(y₂) ],   R = r − β log π/π_ref of the answer               (Wu et al. 2023, section 4)

over all pairs of the answers to a prompt; on the answers just sampled this is the gradient of RLOO. Further steps on the same answers weigh it with
the answers' ratios ρ_i = π(y_i)/π_old(y_i) and bound it, in one of the paper's two ways:

- `separate` (P3O-V1): each answer has a clipped surrogate of its own, as in PPO, with the half difference of the rewards as its advantage;
- `joint` (P3O-V2): the pair has one, and carries no gradient once ρ₁/ρ₂ has left [1 − ε, 1 + ε] on the side to which the rewards push it.

The difference of rewards is taken in one subtraction before anything else, so updates are equal bit for bit when a prompt's rewards are shifted by a
number with which they remain exact. Where the paper's text leaves room we chose: ratios are those of the whole answer, and the joint form weighs
with ρ₁ρ₂, the importance weight of the pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from telos.algorithms.language._loop_rollouts import RolloutsConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.policy import Estimates, PolicyView, Scored, clipped_surrogate, token_rewards
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(RolloutsConfig):
    """Options of P3O."""

    samples_per_prompt: int = 2  # answers to each prompt, >= 2; all their pairs are compared (paper: 2)
    kl_coef: float = 0.05  # β: weight of log π − log π_ref in an answer's reward, >= 0; 0 keeps no reference model
    clip_range: float = 0.2  # ε: how far the ratios may leave 1 and still carry a gradient, >= 0 (paper: 0.2)
    clip: Literal["separate", "joint"] = "separate"  # bound on each answer's ratio (V1), or on the ratio of the two (V2)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 2", "samples_per_prompt")
        require(self, ">= 0", "kl_coef", "clip_range")


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    penalty = token_rewards(scored, kl_coef=config.kl_coef, scores=torch.zeros_like(scored.scores)).sum(1)
    none = torch.zeros_like(scored.logprobs)
    return Estimates(none, state=state, extra={"score": scored.scores, "penalty": penalty})


def loss(config: Config, view: PolicyView) -> Losses:
    """Per answer the mean over its pairs, so that their sum counts each pair twice and the whole is the mean over answers."""
    assert view.group is not None
    valid = view.mask.any(1)
    pairs = (view.group[:, None] == view.group[None, :]) & valid[:, None] & valid[None, :]
    first, second = pairs.fill_diagonal_(False).nonzero(as_tuple=True)
    log_ratio = torch.where(view.mask, view.logprobs - view.old_logprobs, torch.zeros_like(view.logprobs)).sum(1)
    score, penalty = view.extra["score"], view.extra["penalty"]
    gap = (score[first] - score[second]) + (penalty[first] - penalty[second])
    one, two = log_ratio[first], log_ratio[second]
    if config.clip == "separate":
        ours, low, high = clipped_surrogate(one, gap / 2, config.clip_range, config.clip_range)
        theirs, _, _ = clipped_surrogate(two, -gap / 2, config.clip_range, config.clip_range)
        values = ours + theirs
    else:
        ratio, weight = (one - two).detach().exp(), (one + two).detach().exp()
        low, high = (ratio < 1 - config.clip_range) & (gap < 0), (ratio > 1 + config.clip_range) & (gap > 0)
        values = torch.where(low | high, 0.0, -weight * gap / 2) * (one - two)
    count = pairs.sum(1).clamp(min=1)
    mean = torch.zeros_like(log_ratio).index_add(0, first, values) / count
    metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {
        "clip_ratio/pairs": (low | high).float(),
        "pairs/reward_gap": gap.abs(),
        "entropy": (view.entropy, view.mask),
    }
    return Losses(mean, metrics=metrics)


METHOD = Method(
    key="p3o",
    title="Pairwise Proximal Policy Optimization",
    family="language",
    loop="rollouts",
    changes="compares the answers to a prompt in pairs, so that shifts of a prompt's rewards change nothing",
    paper="Wu et al. 2023, Pairwise Proximal Policy Optimization: Harnessing Relative Feedback for LLM Alignment, arXiv:2310.00212",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward", "groups"}),
    system=3,
    aliases=("pairwise-ppo",),
)
