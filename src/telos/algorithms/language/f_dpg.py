"""f-DPG: distributional policy gradients. The policy approaches a target distribution p = P/Z in any f-divergence.

    ∇ D_f(π‖p) = E_π[ f′(π(y)/p(y)) ∇ log π(y) ]                                                        (Go et al. 2023, theorem 1)

so −f′(π Z/P) is the reward of a policy gradient, whichever f. `divergence` forward-kl gives DPG and its reward p/π (Parshakova et al. 2019), reverse-kl that of
KL-regularised RLHF up to a constant, jensen-shannon balances the two. The target of a prompt is

    tilted       P = π_ref exp(r/β)                       the optimum of KL-regularised RLHF
    constraint   P = π_ref 1[r ≥ threshold]               a pointwise constraint (GDC: Khalifa et al. 2021)
    moment       P = π_ref exp(λ r), E_p[r] = moment      a distributional constraint; λ is fitted as the policy goes

Z of a prompt is estimated from the group of its answers, Z ≈ mean P/π; the mean over the group of the other answers' rewards is the baseline. With few answers
to a prompt both are noisy: the paper, mostly without prompts, keeps a running mean of Z over all samples. λ takes half a Newton step an iteration towards the
moment under importance weights P/π. A pointwise constraint has P = 0 at answers that violate it; f′ is then taken at `ratio_bound`, which bounds every ratio.
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
from telos.functional.advantages import group_mean, leave_one_out, on_tokens
from telos.functional.divergences import by_name
from telos.functional.policy import Estimates, PolicyView, Scored, clipped_surrogate
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(RolloutsConfig):
    """Options of f-DPG."""

    samples_per_prompt: int = 16  # answers to each prompt, >= 2: Z and the baseline are estimated from them
    epochs: int = 1  # passes over an iteration's answers
    divergence: Literal["forward-kl", "reverse-kl", "jensen-shannon", "total-variation"] = "jensen-shannon"  # D_f(π‖p) that is lowered
    target: Literal["tilted", "constraint", "moment"] = "tilted"  # what the policy approaches
    beta: float = 0.1  # β of the tilted target, in units of reward, > 0
    threshold: float = 0.5  # reward that the constraint asks for
    moment: float = 0.5  # mean reward that the moment constraint asks for
    ratio_bound: float = 10.0  # largest |log π/p| that is looked at, in nats, > 0
    clip_range: float = 0.2  # ε: how far the ratio of a token to its sampled probability may leave 1 and still carry a gradient

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 2", "samples_per_prompt")
        require(self, "> 0", "beta", "ratio_bound")
        require(self, ">= 0", "clip_range")


def log_target(config: Config, scored: Scored, multiplier: float) -> Tensor:
    """log P/π_ref of each answer [N], −∞ where the constraint is violated."""
    if config.target == "tilted":
        return scored.scores.double() / config.beta
    if config.target == "constraint":
        return torch.where(scored.scores >= config.threshold, 0.0, -torch.inf).double()
    return multiplier * scored.scores.double()


def log_policy_ratio(config: Config, scored: Scored, multiplier: float) -> tuple[Tensor, Tensor]:
    """log π/p and log P/π of each answer [N], float64, p normalised over its group."""
    assert scored.reference is not None
    drift = (scored.logprobs - scored.reference).double().masked_fill(~scored.mask, 0.0).sum(1)
    weight = log_target(config, scored, multiplier) - drift
    top = weight[scored.valid].amax() if bool(scored.valid.any()) else torch.zeros(())
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    log_z = group_mean((weight - top).exp(), scored.group, scored.valid).log() + top
    ratio = torch.where(
        log_z.isfinite(), log_z - weight, torch.zeros_like(weight)
    )  # a group without a permitted answer says nothing of any
    return ratio.clamp(-config.ratio_bound, config.ratio_bound), weight


def estimate(config: Config, scored: Scored, state: Mapping[str, float]) -> Estimates:
    multiplier, state = state.get("multiplier", 0.0), dict(state)
    metrics: dict[str, float] = {}
    ratio, weight = log_policy_ratio(config, scored, multiplier)
    valid = scored.valid
    if config.target == "moment" and bool(valid.any()):
        share = torch.softmax(weight[valid], 0)
        rewards = scored.scores.double()[valid]
        mean = (share * rewards).sum()
        variance = (share * (rewards - mean) ** 2).sum()
        state["multiplier"] = multiplier + float((config.moment - mean) / variance.clamp(min=1e-4)) * 0.5  # damped: the weights are noisy
        metrics |= {"target/multiplier": multiplier, "target/moment": float(mean)}
    reward = -by_name(config.divergence).f_prime(ratio)
    advantages = on_tokens(leave_one_out(reward, scored.group, valid).float(), scored.mask)
    metrics |= {"target/log_ratio": float(ratio[valid].mean()) if bool(valid.any()) else 0.0}
    return Estimates(advantages, state=state, metrics=metrics)


def loss(config: Config, view: PolicyView) -> Losses:
    """The clipped surrogate, summed over an answer's tokens: an answer is one action."""
    values, low, high = clipped_surrogate(view.logprobs - view.old_logprobs, view.advantages, config.clip_range, config.clip_range)
    summed = torch.where(view.mask, values, torch.zeros_like(values)).sum(1)
    metrics = {
        "clip_ratio/low": (low.float(), view.mask),
        "clip_ratio/high": (high.float(), view.mask),
        "entropy": (view.entropy, view.mask),
    }
    return Losses(summed, metrics=metrics)


METHOD = Method(
    key="f-dpg",
    title="f-divergence Distributional Policy Gradient",
    family="language",
    loop="rollouts",
    changes="approaches a target distribution, of tilted rewards or of constraints, in any f-divergence",
    paper="Go et al. 2023, Aligning Language Models with Preferences through f-divergence Minimization, arXiv:2302.08215",
    config=Config,
    loss=loss,
    estimate=estimate,
    needs=frozenset({"reference", "reward"}),
    system=128,
    aliases=("dpg", "gdc", "distributional-policy-gradient"),
)
