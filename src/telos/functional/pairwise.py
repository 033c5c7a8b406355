"""What losses on pairs of answers share: summed and length-normalised log-probabilities, and the usual diagnostics under their usual names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telos.functional.reduction import masked_mean


@dataclass(frozen=True)
class AnswerLogps:
    """Log-probabilities of one side of a batch of pairs: `tokens` [B, T] with `mask` [B, T] true at the answer's tokens."""

    tokens: Tensor
    mask: Tensor

    @property
    def sum(self) -> Tensor:
        """log π(y|x), [B]."""
        return self.tokens.masked_fill(~self.mask, 0.0).sum(1)

    @property
    def mean(self) -> Tensor:
        """log π(y|x) / |y|, [B]."""
        return masked_mean(self.tokens, self.mask, 1)

    @property
    def length(self) -> Tensor:
        """|y| in tokens, [B]."""
        return self.mask.sum(1)


@dataclass(frozen=True)
class PairLogps:
    """A batch of pairs as a pairwise loss sees it. The reference sides are None when the method declares no reference; `margin` [B] is the
    annotated strength of the preference (0 where the data has none)."""

    chosen: AnswerLogps
    rejected: AnswerLogps
    reference_chosen: AnswerLogps | None
    reference_rejected: AnswerLogps | None
    margin: Tensor


def diagnostics(pair: PairLogps, chosen_rewards: Tensor, rejected_rewards: Tensor) -> dict[str, Tensor]:
    """Per-example metrics of a pairwise method, under the names users know."""
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "logps/chosen": pair.chosen.sum,
        "logps/rejected": pair.rejected.sum,
    }
