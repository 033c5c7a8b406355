"""Drawing one token per row from logits, by inverting the cumulative distribution at a given uniform number.

One uniform per token is all that is drawn; Gumbel noise over a vocabulary of 4096 takes twenty times as long as the whole draw. The uniforms
are counter-based: that of (seed, row, step) is the same whatever else is in the batch, so an answer depends on no other row and on no batching
decision. They are outputs of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators"), read at position
2^32 row + step of the stream that starts at the seed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from telos.models.generation import Sampling

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_LARGEST = 1 - 2.0**-24  # the largest uniform number
_BLOCK = 64  # weights that are summed before a place among them is drawn
_WIDTHS = (64, 512)  # tokens looked at for top-p before all are sorted


def split_mix(state: int, position: np.ndarray) -> np.ndarray:
    """uint64 outputs of SplitMix64 started at `state`; `position` (uint64) counts from 0. Arithmetic is modulo 2^64."""
    z = np.uint64(state) + (position + np.uint64(1)) * _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def uniforms(state: int, rows: np.ndarray, steps: int) -> Tensor:
    """[steps, N] float32 uniforms in [0, 1), multiples of 2^-24; `rows` [N] are the rows' own numbers, at most 2^31."""
    position = (rows.astype(np.uint64) << np.uint64(32))[None] + np.arange(steps, dtype=np.uint64)[:, None]
    return torch.from_numpy(((split_mix(state, position) >> np.uint64(40)).astype(np.float32)) * np.float32(2.0**-24))


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(index, its share of the total, what is left of u) [m, 1] each, of draws at u [m, 1] from rows of non-negative weights [m, k].

    The largest u, 1 − 2^-24, times the total is below the total in float32, so the first place where the cumulated weight exceeds it exists and has weight.
    What is left of u is how far into that weight it reaches, again a uniform number of [0, 1 − 2^-24].
    """
    cumulated = weights.cumsum(1)
    total = cumulated[:, -1:]
    target = u * total
    # The clamp is for rows that are not numbers, which the caller reports; others never reach it.
    index = torch.searchsorted(cumulated, target, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, index)
    left = (target - cumulated.gather(1, index)).div_(weight).add_(1)
    return index, weight / total, left.clamp_(0, _LARGEST)


def _draw(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """(index [m, 1], its share of the total [m, 1]) of draws from rows of any number of weights [m, k].

    A block of weights is drawn by its sum, then a place in it: a cumulated sum is serial, and this one is short. For 32 rows of 4096 weights it takes
    50 µs and the sum over all 140.
    """
    blocks = F.pad(weights, (0, -weights.shape[1] % _BLOCK)) if weights.shape[1] % _BLOCK else weights
    blocks = blocks.unflatten(1, (-1, _BLOCK))
    block, share, left = _invert(blocks.sum(2), u[:, None])
    place, part, _ = _invert(blocks.take_along_dim(block[:, :, None], 1)[:, 0], left)
    # Again the clamp is for rows that are not numbers.
    return (block * _BLOCK + place).clamp_(max=weights.shape[1] - 1), share * part


def pick(logits: Tensor, u: Tensor, sampling: Sampling, limited: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """(token [m], its log-probability [m], the allowed tokens [m, k] or None) from float32 logits [m, V], which may be overwritten, and uniforms [m].

    `limited`: logits of −∞ say which tokens are not allowed, and the others are to be told.
    """
    if sampling.greedy:
        token = logits.argmax(1, keepdim=True)
        return token[:, 0], torch.softmax(logits, 1).gather(1, token)[:, 0].log(), None
    if sampling.temperature != 1:
        logits = logits.div_(sampling.temperature)
    if not sampling.restricted and not limited:
        token, share = _draw(torch.softmax(logits, 1), u)
        return token[:, 0], share[:, 0].log(), None
    weights, order = allowed(logits, sampling)
    if limited:
        width = max(1, int((weights > 0).sum(1).max()))  # rows that are not numbers keep none; the caller reports them
        weights, order = weights[:, :width], order[:, :width]
    place, share, _ = _invert(weights, u[:, None])
    kept = torch.where(weights > 0, order, -1)
    return order.gather(1, place)[:, 0], share[:, 0].log(), kept


def allowed(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(weights, tokens), both [m, k], of the tokens that top-k and top-p leave, most likely first; weight 0 marks those that a row does not keep."""
    vocabulary = logits.shape[1]
    if sampling.top_k > 0:
        values, order = logits.topk(min(sampling.top_k, vocabulary))
        p = torch.softmax(values, 1)
    else:
        everything = torch.softmax(logits, 1)
        for width in _WIDTHS:
            if width < vocabulary:
                p, order = everything.topk(width)
                if not bool((p.sum(1) < sampling.top_p).any()):
                    break
        else:
            p, order = everything.sort(1, descending=True)
    if sampling.top_p < 1:
        # A token stays while the more likely ones hold less than top_p.
        count = (p.cumsum(1) < sampling.top_p).sum(1, keepdim=True) + 1
        p = p[:, : int(count.max())]
        p = p.masked_fill(torch.arange(p.shape[1], device=p.device) >= count, 0.0)
    return p, order[:, : p.shape[1]]
