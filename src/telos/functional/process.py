"""Arithmetic of process rewards: numbers at the steps of answers.

Scores and their mask have any shape whose last dimension runs along an answer: over its steps [N, S], or over its tokens [N, T] with the mask true at
each step's last token. In both layouts the true entries of a row are its steps in order; where the mask is false, results are 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Aggregate = Literal["last", "min", "product", "sum", "mean"]


def refine(scores: Tensor, mask: Tensor, clip: float | None = None, delta: bool = False) -> Tensor:
    """Clip and Delta, which keep the sum of process rewards bounded (Gao et al. 2024, arXiv:2410.15115, section 4). For r_1 … r_K:

        Clip    r_k ← min(r_k − η, 0)                                          η = `clip`; None leaves the scores as they are
        Delta   r_k ← r_k − r_{k+1} for k < K − 1,   r_{K−1} for k = K − 1,   0 for k = K

    Both together are Clip first. Summed rewards of a scorer that is bounded above still grow with the number of steps, so that a policy gains by
    repeating right ones. After Clip no sum is above 0. After Delta the sum from step k on is r_k itself, whatever follows, and that of the whole
    answer is r_1. The last step is the success reward's business: Delta takes it out, which leaves nothing of an answer with a single step.
    """
    if clip is not None:
        scores = (scores - clip).clamp(max=0.0)
    if delta:
        place, count = mask.cumsum(-1), mask.sum(-1, keepdim=True)
        following = torch.where(place < count - 1, _following(scores, mask), torch.zeros_like(scores))
        mask = mask & (place < count)
        scores = scores - following
    return torch.where(mask, scores, torch.zeros_like(scores))


def progress(values: Tensor, mask: Tensor, first: Tensor | float = 0.0) -> Tensor:
    """V_t − V_{t−1}: by how much each step changed the chance of success; V_0 = `first`, a number or one a row. The sum is V_last − V_0."""
    if isinstance(first, Tensor):
        first = first[..., None]
    flipped = _following(values.flip(-1), mask.flip(-1)).flip(-1)
    before = torch.where(mask.cumsum(-1) == 1, first, flipped)
    return torch.where(mask, values - before, torch.zeros_like(values))


def aggregate(scores: Tensor, mask: Tensor, how: Aggregate) -> Tensor:
    """One number a row from those of its steps: the last, the least, their product, sum or mean. A row without steps gives 0."""
    some = mask.any(-1)
    if how == "last":
        found = torch.where(mask.cumsum(-1) == mask.sum(-1, keepdim=True), scores, 0.0).masked_fill(~mask, 0.0).sum(-1)
    elif how == "min":
        found = scores.masked_fill(~mask, torch.inf).amin(-1)
    elif how == "product":
        found = scores.masked_fill(~mask, 1.0).prod(-1)
    else:
        found = scores.masked_fill(~mask, 0.0).sum(-1)
        found = found / mask.sum(-1).clamp(min=1) if how == "mean" else found
    return torch.where(some, found, torch.zeros_like(found))


def success_of_best(successes: Tensor, trials: Tensor, k: int) -> Tensor:
    """The chance that at least one of `k` draws succeeds, from `successes` among `trials` >= k draws, float64 of their shape:

        1 − C(n − c, k) / C(n, k)

    the mean over all subsets of k of the n draws, hence without bias for 1 − (1 − q)^k (Chen et al. 2021, arXiv:2107.03374, eq. 1). k = 1 is the
    success rate c / n. NaN where there are fewer than k trials.
    """
    n, failures = trials.double(), (trials - successes).double()
    none = torch.ones_like(n)
    for i in range(k):
        none = none * (failures - i).clamp(min=0) / (n - i)
    return torch.where(n >= k, 1 - none, torch.full_like(n, torch.nan))


def step_metrics(logits: Tensor, labels: Tensor, mask: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """Metrics of step classifiers from logits [B, S] and labels [B, S] in [0, 1], above 1/2 = right; none depends on how a batch is cut up.

    `steps/accuracy`; `steps/right` and `steps/wrong`, the mean probability of right and of wrong steps; `steps/order`, among the pairs of a right and a
    wrong step of one answer the share in which the right one scores higher (ties count one half); `steps/brier`, the squared error of the probability;
    `steps/bias`, probability minus label, which is 0 in the mean for a calibrated model.
    """
    right, chance = labels > 0.5, logits.sigmoid()
    one, other = logits[:, :, None], logits[:, None, :]
    pairs = (mask & right)[:, :, None] & (mask & ~right)[:, None, :]
    return {
        "steps/accuracy": (((logits > 0) == right).float(), mask),
        "steps/right": (chance, mask & right),
        "steps/wrong": (chance, mask & ~right),
        "steps/order": ((one > other).float() + 0.5 * (one == other).float(), pairs),
        "steps/brier": ((chance - labels) ** 2, mask),
        "steps/bias": (chance - labels, mask),
    }


def auc(scores: Tensor, right: Tensor) -> float:
    """The area under the ROC curve of scores [M] for labels [M] bool: the chance that a right one scores higher than a wrong one, ties counting one half.
    NaN without both kinds."""
    good, bad = scores[right], scores[~right].sort().values
    if not len(good) or not len(bad):
        return float("nan")
    below = torch.searchsorted(bad, good, right=False) + torch.searchsorted(bad, good, right=True)
    return float(below.double().mean() / (2 * len(bad)))


def calibration_error(chance: Tensor, labels: Tensor, bins: int = 10) -> float:
    """The expected calibration error of probabilities [M] for labels [M] in [0, 1]: the mean over `bins` equal intervals, weighted by how many fall into
    each, of |mean probability − mean label| (Guo et al. 2017, arXiv:1706.04599, eq. 5)."""
    place = (chance * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64, device=chance.device).index_add_(0, place, (chance - labels).double())
    return float(gaps.abs().sum() / len(chance))


def _following(scores: Tensor, mask: Tensor) -> Tensor:
    """At each step the score of the next one; 0 at the last."""
    width = mask.shape[-1]
    place = mask.cumsum(-1)  # of each step among its row's steps, from 1
    packed = torch.zeros_like(pad(scores, (0, 2))).scatter(-1, torch.where(mask, place, 0), scores)
    return torch.where(mask, packed.gather(-1, (place + 1).clamp(max=width + 1)), torch.zeros_like(scores))
