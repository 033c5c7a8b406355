"""Sampling 48 new tokens at temperature 1 for 32 prompts of 16 to 48 tokens, against transformers' `generate`.

A step is one call; nothing ends early. Our engine also records each token's log-probability, which `generate` is not asked for. The peer
runs with the faster of its dynamic and static caches, chosen before the first step, in inference mode, and without an end token, so that it
checks for none.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from cases._shared import fastest, our_facts, save_model, versions

PEER, UNIT = "transformers", "token_steps"
ROWS, NEW_TOKENS = 32, 48
UNITS_A_STEP = NEW_TOKENS
STEPS, WARMUP = 5, 2
SETTINGS: dict[str, Any] = {
    "batch": ROWS,
    "new_tokens": NEW_TOKENS,
    "prompt_tokens": [16, 48],
    "temperature": 1.0,
    "seed": 0,
    "model": "Llama, 4.2 M parameters (tinylm's shape, random weights), float32",
}


def prepare(settings: dict[str, Any], gate: Any) -> None:
    save_model(Path(settings["folder"]) / "policy", seed=1)


def prompts(settings: dict[str, Any]) -> list[list[int]]:
    """The same prompts for every side, none of whose tokens is special."""
    generator = random.Random(settings["seed"])
    return [[generator.randrange(5, 4096) for _ in range(generator.randint(*settings["prompt_tokens"]))] for _ in range(ROWS)]


def ours(settings: dict[str, Any], gate: Any) -> None:
    """`make_engine(model).generate`, as the loops call it."""
    import torch

    from telos.models.generation import Sampling, make_engine
    from telos.models.language import LanguageModel

    torch.set_num_threads(settings["threads"])
    gate.facts |= our_facts({"engine": "native", "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "temperature": 1.0})
    asked = prompts(settings)
    gate.begin()
    model = LanguageModel.load(str(Path(settings["folder"]) / "policy"), precision="float32", device="cpu")
    engine = make_engine(model)
    sampling = Sampling(temperature=1.0, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)
    step = 0
    while True:
        out = engine.generate(asked, sampling, n=1, seed=step)
        assert out.ids.shape == (ROWS, NEW_TOKENS)
        step += 1
        gate.step(float(out.logprobs.mean()))


def peer(settings: dict[str, Any], gate: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(settings["threads"])
    asked = prompts(settings)
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in asked])
    gate.begin()
    model = AutoModelForCausalLM.from_pretrained(
        Path(settings["folder"]) / "policy", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    common = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": NEW_TOKENS,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    caches = {"dynamic": {}, "static, not compiled": {"cache_implementation": "static", "disable_compile": True}}

    def sample(extra: dict[str, Any]) -> Any:
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=GenerationConfig(**common, **extra))

    with torch.inference_mode():
        candidates = {name: lambda extra=extra: sample(extra) for name, extra in caches.items()}
        call = fastest(list(candidates.values()), repeats=3)
        cache = next(name for name, candidate in candidates.items() if candidate is call)
        gate.facts |= {"versions": versions("transformers", "torch"), "settings": {**common, "cache": cache, "attn_implementation": "sdpa"}}
        while True:
            assert call().shape == (ROWS, width + NEW_TOKENS)  # type: ignore[attr-defined]
            gate.step()


def limit(settings: dict[str, Any], gate: Any) -> None:
    """The weights' products: the prompts' real tokens, the output layer for each row's last one, then 47 tokens a row.

    They run in the fastest form we know: query, key and value are one product, gate and up another, and a matrix packed before the first
    step is taken where that is faster.
    """
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(settings["threads"])
    config = AutoConfig.from_pretrained(Path(settings["folder"]) / "policy")
    width, middle = config.hidden_size, config.intermediate_size
    tokens = sum(map(len, prompts(settings)))
    shapes = [(width, 3 * width), (width, width), (width, 2 * middle), (middle, width)] * config.num_hidden_layers
    gate.begin()
    with torch.inference_mode():
        weights = [torch.randn(outputs, inputs) for inputs, outputs in shapes]
        head = torch.randn(config.vocab_size, width)
        prefill = [product(weight, tokens) for weight in weights] + [product(head, ROWS)]
        decode = [product(weight, ROWS) for weight in [*weights, head]]
        while True:
            for call in prefill + decode * (NEW_TOKENS - 1):
                call()
            gate.step()


def product(weight: Any, rows: int) -> Any:
    """The fastest way to multiply `rows` inputs by a matrix, as a call without arguments."""
    import torch

    x, out = torch.randn(rows, weight.shape[1]), torch.empty(rows, weight.shape[0])
    turned = weight.T.contiguous()
    candidates = [lambda: torch.mm(x, weight.T, out=out), lambda: torch.mm(x, turned, out=out)]
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        candidates.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    except (AttributeError, RuntimeError):  # a torch build without these kernels
        pass
    return fastest(candidates)


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Nothing: samples differ by design. The engine's tests hold that its distribution is the model's."""
    return {}
