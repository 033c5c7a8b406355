"""New words for a language model: tokens added to its tokenizer, with rows in its embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from telos.models.language import LanguageModel


def add_special_tokens(tokenizer: Any, tokens: list[str]) -> None:
    """Adds tokens that no text is split into, that merge with nothing around them, and that are left out when text is decoded without special
    tokens. Those that are there already stay as they are."""
    from transformers import AddedToken

    tokenizer.add_tokens(
        [AddedToken(token, lstrip=False, rstrip=False, normalized=False, special=True) for token in tokens], special_tokens=True
    )


def grow(model: LanguageModel, tokens: Mapping[str, str]) -> bool:
    """Adds special tokens; the embeddings of each begin as the mean over the tokens of a text that says what it means. Tokens that the model knows
    already keep theirs. With a frozen model (under an adapter) they stay as they begin. Returns whether there were new ones."""
    words, known = model.tokenizer, model.tokenizer.get_vocab()
    new = {token: meaning for token, meaning in tokens.items() if token not in known}
    if not new:
        return False
    meant = {token: words(meaning, add_special_tokens=False)["input_ids"] for token, meaning in new.items()}
    add_special_tokens(words, list(new))
    trains = model.base.get_input_embeddings().weight.requires_grad
    if len(words) > model.base.get_input_embeddings().weight.shape[0]:
        model.base.resize_token_embeddings(len(words), mean_resizing=False)
    with torch.no_grad():
        layers = [model.base.get_input_embeddings(), model.base.get_output_embeddings()]
        for part in (values for layer in layers for values in (layer.weight, getattr(layer, "bias", None)) if values is not None):
            part.requires_grad_(trains)
            for token, meaning in meant.items():
                part[words.convert_tokens_to_ids(token)] = part[torch.tensor(meaning, device=part.device)].mean(0)
    return True
