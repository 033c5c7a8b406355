"""Log-probabilities of chosen tokens, computed without ever holding [tokens, vocabulary] for the whole batch.

`linear_logprobs` fuses the output projection with log-softmax in slices of rows: forward keeps only log-sum-exp and, when asked, the
entropy; backward recomputes each slice's logits. Peak memory is one slice (`_SLICE_ELEMENTS` numbers) whatever the batch, against tokens x
vocabulary for `cross_entropy(hidden @ W.T)`. A batch of few logits (`_KEPT_ELEMENTS`) keeps them, which saves a product. Gradients are exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SLICE_ELEMENTS = 1 << 22  # numbers in one slice of logits: 16 MiB in fp32, inside the cache hierarchy's reach and cheap to allocate
_KEPT_ELEMENTS = 1 << 24  # up to so many (64 MiB in fp32) they are kept for the backward pass, which saves one of four products


def _slices(rows: int, vocabulary: int) -> list[slice]:
    height = max(1, _SLICE_ELEMENTS // vocabulary)
    return [slice(i, min(i + height, rows)) for i in range(0, rows, height)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor | float, support: Tensor | None) -> Tensor:
    """[n, V] float32 logits, divided by the temperature; tokens outside a row's support are −inf."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if not isinstance(temperature, float) or temperature != 1.0:
        logits = logits / temperature
    if support is not None:
        limited = torch.full_like(logits, -torch.inf)
        inside = support >= 0
        index = support.clamp(min=0)
        # Padding entries of a row point at its first kept token, whose value they repeat.
        index = torch.where(inside, index, index[:, :1])
        logits = limited.scatter(1, index, logits.gather(1, index))
    return logits


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | float,
        support: Tensor | None,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = hidden.shape[0]
        logprobs = hidden.new_empty(rows, dtype=torch.float32)
        entropy = hidden.new_zeros(rows if want_entropy else 0, dtype=torch.float32)
        normaliser = hidden.new_empty(rows, dtype=torch.float32)
        trains = any(ctx.needs_input_grad[:3])
        keeps = trains and rows * weight.shape[0] <= _KEPT_ELEMENTS
        recomputes = trains and not keeps
        kept: list[Tensor] = []
        for part in _slices(rows, weight.shape[0]):
            logits = _logits(hidden[part], weight, bias, _rows(temperature, part), None if support is None else support[part])
            top = logits.amax(1) if recomputes else None
            logp = torch.log_softmax(logits, 1, out=logits)  # in place: a second slice would cost more than the arithmetic
            logprobs[part] = logp.gather(1, targets[part, None])[:, 0]
            if top is not None:
                normaliser[part] = top - logp.amax(1)
            if want_entropy:
                p = logp.exp()
                entropy[part] = -(p * logp.masked_fill(p == 0, 0.0)).sum(1)
            if keeps:
                kept.append(logp)
        rows_temperature = temperature if isinstance(temperature, Tensor) else None
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, support, entropy, rows_temperature, *kept)
        ctx.temperature = temperature
        ctx.want_entropy = want_entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, normaliser, support, entropy, temperature_rows, *kept = ctx.saved_tensors
        temperature = ctx.temperature if temperature_rows is None else temperature_rows
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
        # Without an entropy term its gradient is all zeros; skipping it saves two passes over the logits.
        use_entropy = ctx.want_entropy and bool(grad_entropy.any())
        for index, part in enumerate(_slices(hidden.shape[0], weight.shape[0])):
            t = _rows(temperature, part)
            if kept:
                logp = kept[index]
            else:
                logits = _logits(hidden[part], weight, bias, t, None if support is None else support[part])
                logp = logits.sub_(normaliser[part, None])
            # d logp(target)/d logits = onehot − p;  d H/d logits = −p (log p + H).
            if use_entropy:
                p = logp.exp()
                grad = p * (-grad_logprobs[part, None])
                grad -= grad_entropy[part, None] * p * (logp.masked_fill(p == 0, 0.0) + entropy[part, None])
            else:  # kept values may be needed for another backward pass, recomputed ones are ours to overwrite
                grad = (logp.exp() if kept else logp.exp_()).mul_(-grad_logprobs[part, None])
            grad.scatter_add_(1, targets[part, None], grad_logprobs[part, None].to(grad.dtype))
            if not isinstance(t, float) or t != 1.0:
                grad /= t
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                if grad_weight.dtype == grad.dtype:
                    grad_weight.addmm_(grad.T, hidden[part])
                else:
                    grad_weight += grad.T @ hidden[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _rows(temperature: Tensor | float, part: slice) -> Tensor | float:
    return temperature[part, None] if isinstance(temperature, Tensor) else temperature


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    support: Tensor | None = None,
    want_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(hidden @ weight.T / temperature)[targets] and, when asked, the entropy in nats; both float32 [n].

    hidden [n, d]; weight [V, d]; targets [n] int64 in [0, V); temperature > 0, one number or [n]; support [n, k] int64, the tokens that were
    allowed in each row (−1 pads on the right; the first entry is always a token): the distribution is renormalised over them, as the sampler did.
    """
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1] or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"expected hidden [n, d], weight [V, d], targets [n]; got {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    temperature = temperature if isinstance(temperature, Tensor) else float(temperature)
    logprobs, entropy = _LinearLogprobs.apply(hidden, weight, bias, targets, temperature, support, want_entropy)  # type: ignore[misc]
    return logprobs, entropy if want_entropy else None
