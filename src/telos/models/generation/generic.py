"""Decoding of any Hugging Face model through its own forward: causal decoders with whatever cache they keep, and encoder–decoders.

Prompts of different lengths share a batch, padded on the right with explicit positions, where the model packs (full attention behind the attention interface);
every other causal model gets prompts of one length at a time, because windows and recurrent states count padding. A model that returns no cache is run over
the whole sequence each step: slow, but right.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from telos.models.language import LanguageModel

_CACHES = ("past_key_values", "cache_params")


class GenericDecoder:
    """Decodes one batch of prompts."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.base, self.device = model, model.base, model.device
        self.accepts = set(inspect.signature(self.base.forward).parameters)

    @staticmethod
    def mixes_lengths(model: LanguageModel) -> bool:
        """Whether prompts of different lengths may stand in one batch."""
        if model.is_encoder_decoder:
            return True
        takes_positions = "position_ids" in inspect.signature(model.base.forward).parameters
        return model.packs and takes_positions and not getattr(model.base, "_is_stateful", False)

    def _forward(self, **arguments: Any) -> Any:
        with self.model.compute():
            return self.base(**{name: value for name, value in arguments.items() if name in self.accepts}, use_cache=True, return_dict=True)

    def start(self, prompts: list[list[int]], n: int, steps: int) -> Tensor:
        """Computes every prompt once and returns the first logits of n rows each, [P n, V] float32."""
        width = max(map(len, prompts))
        ids = torch.tensor([[*prompt, *([0] * (width - len(prompt)))] for prompt in prompts], device=self.device)
        length = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        place = torch.arange(width, device=self.device)
        mask = (place < length[:, None]).long()
        rows = torch.arange(len(prompts), device=self.device)
        if self.model.is_encoder_decoder:
            with self.model.compute():
                self.encoded = self.base.get_encoder()(input_ids=ids, attention_mask=mask, return_dict=True)
            begin = torch.full((len(prompts), 1), self.model.config.decoder_start_token_id, device=self.device)
            self.tokens = begin
            self.mask = mask
            out = self._forward(encoder_outputs=self.encoded, attention_mask=mask, decoder_input_ids=begin)
            logits = out.logits[:, -1]
        else:
            # Recurrent models take no mask with a single token, and only padding needs one.
            self.padded = not bool(mask.all())
            ends, slot = torch.unique(length - 1, return_inverse=True)
            out = self._forward(
                input_ids=ids,
                attention_mask=mask if self.padded else None,
                position_ids=place.expand(len(prompts), -1),
                logits_to_keep=ends,
            )
            logits = out.logits[rows, slot if "logits_to_keep" in self.accepts else length - 1]
            self.tokens = ids
            self.mask = torch.nn.functional.pad(mask, (0, steps), value=1)
            self.position = length
        self.column = width
        self.cache_name, self.cache = next(
            ((name, cache) for name in _CACHES if name in self.accepts and hasattr(cache := getattr(out, name, None), "reorder_cache")),
            (None, None),
        )
        if n > 1:
            self._select(rows.repeat_interleave(n))
            logits = logits.repeat_interleave(n, 0)
        return logits.float()

    def step(self, token: Tensor) -> Tensor:
        """Feeds one token to every row; returns the next logits [m, V] float32."""
        token = token[:, None]
        if self.cache is None:
            self.tokens = token = torch.cat([self.tokens, token], 1)
        if self.model.is_encoder_decoder:
            out = self._forward(encoder_outputs=self.encoded, attention_mask=self.mask, decoder_input_ids=token, past_key_values=self.cache)
        else:
            self.column += 1
            place = self.position[:, None]
            if self.cache is None:
                place = (self.mask[:, : self.column].cumsum(1) - 1).clamp(min=0)
            mask = self.mask[:, : self.column] if self.padded else None
            memory = {} if self.cache_name is None else {self.cache_name: self.cache}
            out = self._forward(input_ids=token, attention_mask=mask, position_ids=place, logits_to_keep=1, **memory)
            # Rows that wait to be dropped may stand at the model's last position already.
            self.position = (self.position + 1).clamp_(max=self.model.context - 1)
        return out.logits[:, -1].float()

    def compact(self, holes: Tensor, movers: Tensor, order: Tensor) -> None:
        """Keeps the rows `order`."""
        self._select(order)

    def _select(self, index: Tensor) -> None:
        if self.cache is not None:
            self.cache.reorder_cache(index)
        self.tokens = self.tokens[index]
        self.mask = self.mask[index]
        if self.model.is_encoder_decoder:
            self.encoded.last_hidden_state = self.encoded.last_hidden_state[index]
        else:
            self.position = self.position[index]
