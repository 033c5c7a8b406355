"""What several cases share: the tiny model in a folder, texts of exact length, versions, and the matrix products of a Llama by shape."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_SPECIAL = ("<|pad|>", "<|end|>", "<|unknown|>")


def save_model(folder: Path, seed: int) -> None:
    """The shape of the bundled model with random weights, and a tokenizer with one token a word, so that both sides see the same ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from telos.models.tinylm import VOCABULARY, new_model

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary(VOCABULARY))}, unk_token=_SPECIAL[2]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=_SPECIAL[0], eos_token=_SPECIAL[1], unk_token=_SPECIAL[2], model_max_length=1024
    ).save_pretrained(folder)
    new_model(seed).save_pretrained(folder)


def vocabulary(size: int) -> list[str]:
    return [*_SPECIAL, *(f"w{i}" for i in range(len(_SPECIAL), size))]


def text(generator: random.Random, tokens: int) -> str:
    """`tokens` random words."""
    return " ".join(f"w{generator.randrange(len(_SPECIAL), 4096)}" for _ in range(tokens))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def versions(*packages: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in packages}


def our_facts(settings: dict[str, Any]) -> dict[str, Any]:
    """Versions, machine and commit, with the settings our side ran with."""
    from telos.core.run import commit, hardware

    return {"versions": versions("telos", "torch", "transformers"), "machine": hardware(), "commit": commit(), "settings": settings}


class Products:
    """The matrix products of a Llama's weights with n tokens, into memory that is there: no activation, norm, attention or optimiser.

    Leaving out the attention's own products (about 2 % here) makes the limit harder to reach, not easier.
    """

    def __init__(self, config: Any, most: int) -> None:
        import torch

        self.mm = torch.mm
        width, middle = config.hidden_size, config.intermediate_size
        heads = config.num_key_value_heads * (width // config.num_attention_heads)
        # (inputs, outputs) of each matrix of a layer: query, key, value, output, gate, up, down.
        self.layer = [(width, width), (width, heads), (width, heads), (width, width), (width, middle), (width, middle), (middle, width)]
        self.layers = config.num_hidden_layers
        self.head = (width, config.vocab_size)
        shapes = {*self.layer, self.head}
        self.weight = {shape: torch.randn(shape[1], shape[0]) for shape in shapes}
        self.gradient = {shape: torch.empty(shape[1], shape[0]) for shape in shapes}
        self.inputs = {shape[0]: torch.randn(most, shape[0]) for shape in shapes}
        self.outputs = {shape[1]: torch.randn(most, shape[1]) for shape in shapes}
        self.back = {shape[0]: torch.empty(most, shape[0]) for shape in shapes}

    def forward(self, tokens: int, predicted: int) -> None:
        """`tokens` through all layers and `predicted` of them through the output layer."""
        for shape, n in self._each(tokens, predicted):
            self.mm(self.inputs[shape[0]][:n], self.weight[shape].T, out=self.outputs[shape[1]][:n])

    def backward(self, tokens: int, predicted: int) -> None:
        """The gradients of inputs and of weights."""
        for shape, n in self._each(tokens, predicted):
            self.mm(self.outputs[shape[1]][:n], self.weight[shape], out=self.back[shape[0]][:n])
            self.mm(self.outputs[shape[1]][:n].T, self.inputs[shape[0]][:n], out=self.gradient[shape])

    def _each(self, tokens: int, predicted: int) -> list[tuple[tuple[int, int], int]]:
        return [(shape, tokens) for shape in self.layer * self.layers] + [(self.head, predicted)]


def fastest(candidates: Sequence[Callable[[], object]], repeats: int = 30) -> Callable[[], object]:
    """The candidate whose best time is least."""
    import time

    def best(call: Callable[[], object]) -> float:
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
        return min(times)

    return min(candidates, key=best)
