"""Tiny tokenizers and files for the tests of the data room. Nothing is downloaded; a tokenizer takes some milliseconds to make."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END, START, PAD, BOS = "<|im_end|>", "<|im_start|>", "<|pad|>", "<|bos|>"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Hides what the assistant said in all turns but the last, as templates of reasoning models do.
REWRITING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' and not loop.last %}...{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = "{% if tools %}tools {{ tools | map(attribute='name') | join(' ') }}\n{% endif %}" + CHATML
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('the first message must be of the user') }}{% endif %}" + CHATML

_CORPUS = ["The sky is blue. The grass is green. What colour is the sky? user assistant system hello good bad answer " * 4]


@cache
def _backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=[END, START, PAD, BOS], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    *, chat: str | None = None, pad_is_eos: bool = False, padding_side: str = "right", adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 tokens with the end token `END`; `chat` is its template, `adds_bos` puts `BOS` before text."""
    backend = Tokenizer.from_str(_backend())
    special: dict[str, str] = {"eos_token": END, "pad_token": END if pad_is_eos else PAD}
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))])
        special["bos_token"] = BOS
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=padding_side, **special)
    tokenizer.chat_template = chat
    return tokenizer


def ids_of(text: str) -> list[int]:
    """Token ids of `text` straight from the `tokenizers` library: the independent figure in the tests."""
    return Tokenizer.from_str(_backend()).encode(text, add_special_tokens=False).ids


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}
