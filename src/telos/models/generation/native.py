"""The bundled engine: static batches with a shared prefill, rows leaving as they end.

Every prompt is computed once, whatever n is. Rows that end leave the batch at once: the last rows take their places in the cache, so a step costs what the
living rows cost. Llama-shaped decoders take the lean path, all others their own forward; the two agree to rounding (see `lean` and `generic`).

The draw of a token depends on (seed, row, step) alone, so an answer is the same whatever batch it is computed in, up to rounding of the logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from telos.core.errors import Failure, UsageError
from telos.core.seeds import derive
from telos.models.generation import Generated, Sampling, check_prompts, pad_token, weight_version
from telos.models.generation.generic import GenericDecoder
from telos.models.generation.lean import LeanDecoder, reason_against
from telos.models.generation.sampler import allowed, pick, uniforms
from telos.models.language import LanguageModel

_CACHE_BYTES = 2 << 30  # of keys and values held at once on the CPU; on a GPU half of what is free


class _Decoder(Protocol):
    def start(self, prompts: list[list[int]], n: int, steps: int) -> Tensor: ...
    def step(self, token: Tensor) -> Tensor: ...
    def compact(self, holes: Tensor, movers: Tensor, order: Tensor) -> None: ...


@dataclass
class _Record:
    """What the waves of one call have produced, step by step."""

    length: Tensor
    ended: Tensor
    row: list[Tensor] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    token: list[Tensor] = field(default_factory=list)
    logprob: list[Tensor] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)


@dataclass(frozen=True)
class Mixture:
    """Tokens are drawn in proportion to π(token)^(1 − share) π′(token)^share, where π′ is `model` in the context that `under` gives; share in [0, 1]."""

    model: LanguageModel
    share: float
    under: Callable[[], AbstractContextManager[Any]] = nullcontext
    limits = False

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        return torch.lerp(first.log_softmax(1), second.log_softmax(1), self.share)


@dataclass(frozen=True)
class Nucleus:
    """Tokens are drawn from π among those that another model, in the context that `under` gives, holds in its nucleus: the fewest, most likely first, with at
    least `top_p` of its probability. Recorded log-probabilities are those of π renormalised over them, and `Generated.support` holds them."""

    model: LanguageModel
    top_p: float
    under: Callable[[], AbstractContextManager[Any]] = nullcontext
    limits = True

    def combine(self, first: Tensor, second: Tensor) -> Tensor:
        weights, order = allowed(second, Sampling(top_p=self.top_p))
        kept = torch.zeros_like(first, dtype=torch.bool).scatter(1, order, weights > 0)
        return first.masked_fill(~kept, -torch.inf)


class _JointDecoder:
    """Two decoders side by side on the same tokens, and how their logits become one's."""

    def __init__(self, mine: _Decoder, theirs: _Decoder, partner: Mixture | Nucleus) -> None:
        self.mine, self.theirs, self.partner = mine, theirs, partner

    def start(self, prompts: list[list[int]], n: int, steps: int) -> Tensor:
        first = self.mine.start(prompts, n, steps)
        with self.partner.under():
            return self.partner.combine(first, self.theirs.start(prompts, n, steps))

    def step(self, token: Tensor) -> Tensor:
        first = self.mine.step(token)
        with self.partner.under():
            return self.partner.combine(first, self.theirs.step(token))

    def compact(self, holes: Tensor, movers: Tensor, order: Tensor) -> None:
        for decoder in (self.mine, self.theirs):
            decoder.compact(holes, movers, order)


class NativeEngine:
    """`path` forces the lean or the generic way of decoding; `auto` takes the lean one where it is exact. With `compact` false, rows that have
    ended stay in the batch until all have, for comparison. With a `partner` two models have a say in each token."""

    def __init__(
        self,
        model: LanguageModel,
        path: Literal["auto", "lean", "generic"] = "auto",
        compact: bool = True,
        partner: Mixture | Nucleus | None = None,
    ) -> None:
        if getattr(model, "sees", False):
            raise UsageError(f"{model.source} looks at images; answers that two models write together are made for text alone")
        self.model, self.path, self.compact, self.partner = model, path, compact, partner

    def end_tokens(self) -> list[int]:
        """The ids that end an answer: the tokenizer's end token and those of the model's generation config (chat models end turns with others)."""
        tokenizer: Any = self.model.tokenizer
        more = getattr(getattr(self.model.base, "generation_config", None), "eos_token_id", None)
        ids = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])}
        size = self.model.base.get_output_embeddings().weight.shape[0]
        return sorted(token for token in ids if token is not None and 0 <= token < size)

    def generate(self, prompts: list[list[int]], sampling: Sampling, n: int = 1, seed: int = 0) -> Generated:
        """See `Engine.generate`. Raises `Failure` when the logits are not numbers."""
        model = self.model
        size = model.base.get_input_embeddings().weight.shape[0]
        check_prompts(prompts, n, model.context, size)
        count, version = len(prompts) * n, weight_version(model)
        training = [module for module in model.modules() if module.training]
        record = _Record(
            torch.zeros(count, dtype=torch.int64, device=model.device), torch.zeros(count, dtype=torch.bool, device=model.device)
        )
        model.eval()
        try:
            with torch.inference_mode():
                room = [model.context - (0 if model.is_encoder_decoder else len(prompt)) for prompt in prompts]
                limits = [min(sampling.max_new_tokens, r) for r in room]
                longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
                decoder, mixed = self._decoder(model, longest)
                if self.partner is not None:
                    decoder, both = self._joint_decoder(decoder, self.partner, longest)
                    mixed = mixed and both
                for wave in _waves([len(p) for p in prompts], n, mixed, self._rows_at_once(longest)):
                    self._wave(decoder, [prompts[p] for p in wave], wave, [limits[p] for p in wave], n, sampling, seed, record)
                ids, logprobs, support = self._assemble(record, count)
        finally:
            for module in training:
                module.training = True
        # Clones made outside inference mode may be saved for a backward pass.
        out = Generated(ids.clone(), record.length, record.ended, logprobs.clone(), None if support is None else support.clone(), version)
        if not bool(torch.isfinite(out.logprobs).all()):
            row, step = (int(i) for i in (~torch.isfinite(out.logprobs)).nonzero()[0])
            raise Failure(
                f"answer {row % n} to prompt {row // n}: the model's logits are not finite at token {step}; its weights have diverged"
            )
        return out

    def _decoder(self, model: LanguageModel, longest: int) -> tuple[_Decoder, bool]:
        """What decodes a model, and whether prompts of different lengths may share its batch."""
        reason = "the generic path was asked for" if self.path == "generic" else reason_against(model, longest)
        if reason is None:
            return LeanDecoder(model), True
        if self.path == "lean":
            raise UsageError(f"{model.source}: the lean decoding path cannot be used: {reason}")
        return GenericDecoder(model), GenericDecoder.mixes_lengths(model)

    def _joint_decoder(self, mine: _Decoder, partner: Mixture | Nucleus, longest: int) -> tuple[_Decoder, bool]:
        with partner.under():
            theirs, mixed = self._decoder(partner.model, longest)
        return _JointDecoder(mine, theirs, partner), mixed

    def _rows_at_once(self, longest: int) -> int:
        config = self.model.config
        query_heads = getattr(config, "num_attention_heads", None) or 1
        heads = getattr(config, "num_key_value_heads", None) or query_heads
        width = heads * (getattr(config, "head_dim", None) or self.model.hidden_size // query_heads)
        row = 2 * int(config.num_hidden_layers) * width * longest * (2 if self.model.precision == "bfloat16" else 4)
        budget = _CACHE_BYTES
        if self.model.device.type == "cuda":
            budget = torch.cuda.mem_get_info(self.model.device)[0] // 2
        return max(1, budget // row)

    def _wave(
        self,
        decoder: _Decoder,
        prompts: list[list[int]],
        numbers: list[int],
        limits: list[int],
        n: int,
        sampling: Sampling,
        seed: int,
        record: _Record,
    ) -> None:
        """Generates n answers to prompts that stand in one batch; `numbers` are the prompts' places in the call."""
        device, steps = self.model.device, max(limits)
        own = np.concatenate([np.arange(n) + number * n for number in numbers])
        rows = torch.from_numpy(own).to(device)
        even = min(limits) == steps
        limit = torch.tensor(limits, device=device).repeat_interleave(n)
        # A greedy choice draws nothing.
        noise = torch.zeros(steps, 1).expand(-1, len(own)) if sampling.greedy else uniforms(derive(seed, "generation"), own, steps)
        noise = noise.to(device)
        logits = decoder.start(prompts, n, steps)
        ends = torch.zeros(logits.shape[1], dtype=torch.bool, device=device)
        end_tokens = torch.tensor(self.end_tokens(), dtype=torch.int64, device=device)
        ends[end_tokens] = True
        alive = len(own)
        limited = self.partner is not None and self.partner.limits
        over: Tensor | None = None  # rows of the batch that are finished but still in it
        for step in itertools.count(1):
            if step <= sampling.min_new_tokens:
                logits[:, end_tokens] = -torch.inf
            token, logprob, kept = pick(logits, noise[step - 1], sampling, limited)
            record.row.append(rows if over is None else torch.where(over, -1, rows))
            record.step.append(step - 1)
            record.token.append(token)
            record.logprob.append(logprob)
            record.kept.append(kept)
            ended = ends[token]
            done = ended if even else ended | (limit <= step)
            if step == steps:
                done = torch.ones_like(done)
            if over is not None:
                done = done | over
            left = len(done) - int(done.sum())  # the one synchronisation of a step
            if left < alive:
                fresh = done if over is None else done & ~over
                record.length[rows[fresh]] = step
                record.ended[rows[fresh]] = ended[fresh]
                alive = left
                if alive == 0:
                    return
                if self.compact:
                    holes = done[:alive].nonzero()[:, 0]
                    movers = (~done[alive:]).nonzero()[:, 0] + alive
                    order = torch.arange(alive, device=device).index_copy_(0, holes, movers)
                    decoder.compact(holes, movers, order)
                    rows, token, limit, noise = rows[order], token[order], limit[order], noise[:, order]
                else:
                    over = done
            logits = decoder.step(token)

    def _assemble(self, record: _Record, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """(ids, logprobs, support) of all rows, padded on the right."""
        device, width = self.model.device, max(record.step) + 1
        pad = pad_token(self.model)
        row = torch.cat(record.row)
        sizes = torch.tensor([len(r) for r in record.row], device=device)
        step = torch.tensor(record.step, device=device).repeat_interleave(sizes)
        real = row >= 0
        row, step = row[real], step[real]
        ids = torch.full((count, width), pad, dtype=torch.int64, device=device)
        ids[row, step] = torch.cat(record.token)[real]
        logprobs = torch.zeros(count, width, dtype=torch.float32, device=device)
        logprobs[row, step] = torch.cat(record.logprob)[real]
        kept = [k for k in record.kept if k is not None]
        if not kept:
            return ids, logprobs, None
        most = max(k.shape[1] for k in kept)
        support = torch.full((count, width, most), -1, dtype=torch.int64, device=device)
        support[:, :, 0] = pad  # where there is no token; every row of it starts with a token
        support[row, step] = torch.cat([torch.nn.functional.pad(k, (0, most - k.shape[1]), value=-1) for k in kept])[real]
        return ids, logprobs, support


def _waves(lengths: list[int], n: int, mixed: bool, rows: int) -> list[list[int]]:
    """The prompts' places, cut into batches of at most `rows` rows (one prompt at least); of one length each where lengths may not be mixed."""
    size = max(1, rows // n)
    order = list(range(len(lengths)))
    groups = [order] if mixed else [list(g) for _, g in itertools.groupby(sorted(order, key=lengths.__getitem__), key=lengths.__getitem__)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]
