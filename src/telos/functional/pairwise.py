"""What losses on answers share: the views that loops hand to them, summed and length-normalised log-probabilities, and the usual diagnostics."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from telos.functional.reduction import masked_mean


@dataclass(frozen=True)
class AnswerLogps:
    """Log-probabilities of one answer a row: `tokens` [B, T] with `mask` [B, T] true at the answer's tokens."""

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
    """A batch of pairs as a pairwise loss sees it. What a method does not declare among its `needs` is None."""

    chosen: AnswerLogps
    rejected: AnswerLogps
    reference_chosen: AnswerLogps | None  # needs "reference"
    reference_rejected: AnswerLogps | None
    margin: Tensor  # [B] the annotated strength of the preference; 0 where the data have none
    chosen_score: Tensor | None = None  # [B] what a reward or an oracle says of the answers; needs "scores"
    rejected_score: Tensor | None = None
    anchor_chosen: AnswerLogps | None = None  # under the policy that wrote the answers (iterative loops)
    anchor_rejected: AnswerLogps | None = None
    samples: SampleLogps | None = None  # needs "samples": answers drawn for the pairs' prompts
    revisions: tuple[PairLogps, PairLogps] | None = None  # needs "revisions": the pair after [prompt, chosen] and after [prompt, rejected]

    @property
    def chosen_ratio(self) -> Tensor:
        """log π(y_w|x) / π_ref(y_w|x), [B]."""
        assert self.reference_chosen is not None
        return self.chosen.sum - self.reference_chosen.sum

    @property
    def rejected_ratio(self) -> Tensor:
        """log π(y_l|x) / π_ref(y_l|x), [B]."""
        assert self.reference_rejected is not None
        return self.rejected.sum - self.reference_rejected.sum


@dataclass(frozen=True)
class SampleLogps:
    """n sampled answers to each of B prompts: token log-probabilities [B, n, T] now (with gradient) and under the reference."""

    tokens: Tensor
    reference: Tensor | None
    mask: Tensor  # [B, n, T] bool

    @property
    def sum(self) -> Tensor:
        """log π(y|x), [B, n]."""
        return self.tokens.masked_fill(~self.mask, 0.0).sum(-1)

    @property
    def ratio(self) -> Tensor:
        """log π(y|x) / π_ref(y|x), [B, n]."""
        assert self.reference is not None
        return (self.tokens - self.reference).masked_fill(~self.mask, 0.0).sum(-1)


@dataclass(frozen=True)
class LabelledLogps:
    """A batch of single answers as an unpaired loss sees it. What a method does not declare among its `needs` is None."""

    answer: AnswerLogps
    reference: AnswerLogps | None  # needs "reference"
    label: Tensor | None  # [B] bool, desirable or not; needs "labels"
    score: Tensor | None = None  # [B] reward of the answer; needs "scores"
    advantage: Tensor | None = None  # [B] score minus the reference policy's value of the prompt; needs "advantages"
    kl: Tensor | None = None  # [B] the same estimate of KL(π‖π_ref) >= 0 in every row of a batch, without gradient; needs "kl"

    @property
    def ratio(self) -> Tensor:
        """log π(y|x) / π_ref(y|x), [B]."""
        assert self.reference is not None
        return self.answer.sum - self.reference.sum


@dataclass(frozen=True)
class RankedLogps:
    """K answers to each of B prompts: log-probabilities [B, K, T], `mask` [B, K, T] all false where a prompt has fewer answers, and `quality`
    [B, K], higher is better (−inf where there is no answer)."""

    tokens: Tensor
    mask: Tensor
    quality: Tensor

    @property
    def sum(self) -> Tensor:
        """log π(y|x), [B, K]."""
        return self.tokens.masked_fill(~self.mask, 0.0).sum(-1)

    @property
    def mean(self) -> Tensor:
        """log π(y|x) / |y|, [B, K]."""
        return self.sum / self.mask.sum(-1).clamp(min=1)

    @property
    def present(self) -> Tensor:
        """[B, K] bool: there is an answer."""
        return self.mask.any(-1)


def answer_nll(answer: AnswerLogps, per_token: bool) -> Tensor:
    """−log π(y|x) of each answer in nats, or that over |y|, [B]."""
    return -(answer.mean if per_token else answer.sum)


def smoothed_logistic(logits: Tensor, label_smoothing: float) -> Tensor:
    """−(1 − ε) log σ(z) − ε log σ(−z): the loss of a preference whose label is wrong with probability ε. Any shape."""
    if not label_smoothing:
        return -logsigmoid(logits)
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)


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
