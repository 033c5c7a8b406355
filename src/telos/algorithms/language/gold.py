"""GOLD: demonstrations are learned as an off-policy policy gradient, which trusts the tokens that the policy itself finds likely.

    ∇J = Σ_t max(u, π̃(y_t|s_t)) Q(s_t, y_t) ∇ log π(y_t|s_t),   Q(s_t, y_t) = Σ_k γ^k r_{t+k}                    (algorithm 1)

π̃ is the policy without gradient, in the place of the importance weight of the token (the demonstrator's own probability is unknown and taken as
constant). Where maximum likelihood must cover every token of the data, GOLD leaves out those that it finds unlikely. The rewards r_t come from p_MLE,
a model of the demonstrations trained by maximum likelihood. That model is the reference here, so the policy at the start unless `--reference` names
another: fine-tune on the demonstrations first.

    p      r_t = max(log p_MLE(y_t|s_t) − b, c): every token must be likely
    s      r_t = max(p_MLE(y_t|s_t), c): a few unlikely tokens are forgiven
    delta  r_t = 1 at the last token, 0 elsewhere: all demonstrations are equally good; Q is 1 without discount

For p and s the return covers this token and `horizon` more; beyond the answer's end p_MLE counts as 1, so that an answer's last tokens are not worth
less than its first. Both are as in the authors' code, where b is subtracted from every reward and c bounds every reward from below.

Departures: π̃ is the current policy, where the paper copies it every few thousand steps; no label smoothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from telos.algorithms.language._loop_unpaired import UnpairedConfig
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.pairwise import AnswerLogps, LabelledLogps
from telos.functional.reduction import Losses

_UNUSED = {"p": (), "s": ("baseline",), "delta": ("baseline", "reward_floor", "horizon")}


@dataclass(frozen=True, kw_only=True)
class Config(UnpairedConfig):
    """Options of GOLD."""

    variant: Literal["p", "s", "delta"] = "p"  # what a token is worth: log p_MLE, p_MLE, or the same for every demonstration
    weight_floor: float = 0.1  # u: least weight of a token, 0 … 1 (paper: 0.1 to 0.2)
    reward_floor: float = 0.1  # c: least reward of a token, for p and s (authors' code: 1 for p, 0.1 for s)
    baseline: float = -10.0  # b: subtracted from log p_MLE, for p (authors' code: -10)
    horizon: int = 5  # tokens after this one whose rewards count in its return, >= 0, for p and s (authors' code: 5)
    gamma: float = 1.0  # discount a token, 0 … 1 (paper: 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and <= 1", "weight_floor", "gamma")
        require(self, ">= 0", "reward_floor", "horizon")
        for name in _UNUSED[self.variant]:
            if getattr(self, name) != getattr(Config, name):
                raise UsageError(f"--{name} has no effect with --variant {self.variant}")

    @property
    def spares(self) -> frozenset[str]:
        """Rewards that are the same for all demonstrations need no model of them; one that was named still gives the KL."""
        named = self.reference is not None or self.reference_cache is not None
        return frozenset({"reference"}) if self.variant == "delta" and not named else frozenset()


def reward_to_go(config: Config, answer: AnswerLogps, mle: AnswerLogps | None) -> Tensor:
    """Q(s_t, y_t), [B, T]; what it holds beyond an answer's end means nothing."""
    width = answer.mask.shape[1]
    if config.variant == "delta":
        remaining = answer.length[:, None] - 1 - torch.arange(width, device=answer.mask.device)
        return config.gamma ** remaining.clamp(min=0).to(answer.tokens)
    assert mle is not None
    logps = mle.tokens.masked_fill(~mle.mask, 0.0)
    rewards = (logps - config.baseline if config.variant == "p" else logps.exp()).clamp(min=config.reward_floor)
    end = (-config.baseline if config.variant == "p" else 1.0, config.reward_floor)
    padded = torch.nn.functional.pad(rewards, (0, config.horizon), value=max(end))
    return sum((config.gamma**k * padded[:, k : k + width] for k in range(config.horizon + 1)), torch.zeros_like(rewards))


def loss(config: Config, batch: LabelledLogps) -> Losses:
    mask = batch.answer.mask
    tokens = batch.answer.tokens.masked_fill(~mask, 0.0)
    weight = tokens.detach().exp().clamp(min=config.weight_floor)
    returns = reward_to_go(config, batch.answer, batch.reference)
    metrics = {"weight": (weight, mask), "return": (returns, mask), "logps/token": (tokens, mask), "logps/chosen": batch.answer.sum}
    return Losses(-weight * returns * tokens, mask, metrics)


METHOD = Method(
    key="gold",
    title="GOLD",
    family="language",
    loop="unpaired",
    changes="weighs each token of a demonstration by the policy's own probability and by the return that a likelihood model gives it",
    paper="Pang and He 2021, Text Generation by Learning from Demonstrations, arXiv:2009.07839",
    config=Config,
    loss=loss,
    needs=frozenset({"reference"}),
    aliases=("generation-by-off-policy-learning-from-demonstrations",),
)
