"""The generation engine: its two decoding paths, transformers' own `generate` and a recomputation with the trainer's log-probabilities must agree."""

from __future__ import annotations

import copy
import importlib.util
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from support import make_model
from telos.core.errors import Failure, UsageError
from telos.models import packing
from telos.models.generation import Generated, Sampling, lean, make_engine, native, weight_version
from telos.models.generation.lean import FAMILIES, reason_against
from telos.models.generation.native import Mixture, NativeEngine
from telos.models.generation.sampler import split_mix, uniforms
from telos.models.language import LanguageModel, Lora, add_lora

VOCABULARY, CONTEXT, END = 83, 64, 1
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": END,
    "bos_token_id": None,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE, num_key_value_heads=4, tie_word_embeddings=True),
    "llama, grouped queries, biases": lambda: LlamaConfig(**SHAPE, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama, scaled rotary embedding": lambda: LlamaConfig(
        **SHAPE,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "mistral": lambda: MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=None, head_dim=12),
    "mistral, window longer than any sequence": lambda: MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=CONTEXT),
    "qwen2": lambda: Qwen2Config(**SHAPE, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
}
OTHERS = {
    "mistral, short window": lambda: MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=9),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, eos_token_id=END, bos_token_id=END, pad_token_id=0
    ),
    "mamba": lambda: MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, eos_token_id=END, bos_token_id=END, pad_token_id=0
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        eos_token_id=END,
        pad_token_id=0,
        decoder_start_token_id=0,
    ),
    "bart": lambda: BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=CONTEXT,
        eos_token_id=END,
        bos_token_id=0,
        pad_token_id=0,
        decoder_start_token_id=END,
        forced_eos_token_id=None,
    ),
}
SAMPLINGS = {
    "greedy": Sampling(temperature=0, max_new_tokens=20),
    "plain": Sampling(max_new_tokens=24),
    "temperature": Sampling(temperature=0.6, max_new_tokens=20),
    "top-p": Sampling(temperature=1.3, top_p=0.8, max_new_tokens=20),
    "top-k and top-p": Sampling(top_k=12, top_p=0.7, max_new_tokens=20),
}


def language_model(config: Any, attention: str | None = packing.ATTENTION, pad: int = 0, precision: Any = "float32") -> LanguageModel:
    """A random model whose distributions are far from uniform, and whose biases and norms are not what they are initialised to."""
    torch.manual_seed(0)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    extra = {} if attention is None else {"attn_implementation": attention}
    model = kind.from_config(config, **extra)
    scale = {"mamba": 1.5, "t5": 1.5}.get(config.model_type, 6.0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(scale)
            elif config.model_type in FAMILIES:
                p.add_(0.3 * torch.randn_like(p))
    tokenizer: Any = SimpleNamespace(eos_token_id=END, pad_token_id=pad, model_max_length=CONTEXT)
    return LanguageModel(model, tokenizer, "random model", precision)


def some_prompts(count: int, longest: int = 20, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCABULARY) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def recomputed(model: LanguageModel, prompts: list[list[int]], out: Generated, sampling: Sampling) -> torch.Tensor:
    with torch.no_grad():
        return model.logprobs(out.answers(prompts), temperature=sampling.temperature or 1.0, support=out.support).logprobs


def assert_same(a: Generated, b: Generated) -> None:
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.length, b.length)
    assert torch.equal(a.ended, b.ended)
    torch.testing.assert_close(a.logprobs, b.logprobs, atol=1e-4, rtol=0)


# -- agreement ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_lean_generic_and_recomputed_logprobs_agree(name: str) -> None:
    model, prompts = language_model(CONFIGS[name]()), some_prompts(4)
    assert reason_against(model, CONTEXT) is None
    for label, sampling in SAMPLINGS.items():
        lean = NativeEngine(model, "lean").generate(prompts, sampling, n=3, seed=5)
        generic = NativeEngine(model, "generic").generate(prompts, sampling, n=3, seed=5)
        assert_same(lean, generic)
        torch.testing.assert_close(
            recomputed(model, prompts, lean, sampling), lean.logprobs, atol=1e-4, rtol=0, msg=lambda m, x=label: f"{x}: {m}"
        )
        assert (lean.support is not None) == ("top" in label)
        if sampling.temperature:
            assert len({tuple(row) for row in lean.ids.tolist()}) > 4  # samples of one prompt differ


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_agree_with_recomputed_logprobs(name: str) -> None:
    config = OTHERS[name]()
    model = language_model(config, None if name == "mamba" else packing.ATTENTION if config.model_type in ("mistral", "gpt2") else "sdpa")
    prompts = some_prompts(4)
    assert reason_against(model, CONTEXT) is not None
    for sampling in SAMPLINGS.values():
        out = make_engine(model).generate(prompts, sampling, n=2, seed=5)
        packed = False if name == "mamba" else None
        with torch.no_grad():
            again = model.logprobs(
                out.answers(prompts), temperature=sampling.temperature or 1.0, support=out.support, packed=packed
            ).logprobs
        torch.testing.assert_close(again, out.logprobs, atol=1e-4, rtol=0)
        assert len({tuple(row) for row in out.ids.tolist()}) > 2


@pytest.mark.parametrize("name", ["llama", "t5", "mamba"])
def test_a_model_without_a_cache_gives_the_same_answers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, prompts, sampling = {**CONFIGS, **OTHERS}[name](), some_prompts(3), SAMPLINGS["top-p"]
    model = language_model(config, packing.ATTENTION if name == "llama" else None)
    cached = NativeEngine(model, "generic").generate(prompts, sampling, n=2)
    monkeypatch.setattr("telos.models.generation.generic._CACHES", ())
    assert_same(NativeEngine(model, "generic").generate(prompts, sampling, n=2), cached)


def test_unpacked_attention_gives_the_same_answers() -> None:
    config, prompts, sampling = CONFIGS["qwen2"](), some_prompts(5), SAMPLINGS["plain"]
    one = NativeEngine(language_model(config), "generic").generate(prompts, sampling, n=2)
    other = NativeEngine(language_model(config, "eager"), "generic").generate(prompts, sampling, n=2)
    assert_same(one, other)


@pytest.mark.parametrize(
    "name", ["llama, grouped queries, biases", "qwen2", "qwen3", "mistral, short window", "gpt2", "mamba", "t5", "bart"]
)
def test_greedy_is_what_transformers_generates(name: str) -> None:
    config = {**CONFIGS, **OTHERS}[name]()
    model = language_model(config, None if name == "mamba" else "sdpa")
    prompts = some_prompts(4)
    out = make_engine(model).generate(prompts, Sampling(temperature=0, max_new_tokens=16))
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        full = model.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=0)[0]
        answer = full[1:] if model.is_encoder_decoder else full[len(prompt) :]
        assert out.ids[row, : out.length[row]].tolist() == answer.tolist()


def test_adapters_are_part_of_the_sampled_distribution() -> None:
    base = language_model(CONFIGS["qwen2"]())
    model = LanguageModel(add_lora(base.model, Lora(rank=4, alpha=16.0)), base.tokenizer, "adapter", "float32")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    prompts, sampling = some_prompts(4), SAMPLINGS["plain"]
    assert reason_against(model, CONTEXT) is None
    lean = NativeEngine(model, "lean").generate(prompts, sampling, n=2)
    assert_same(lean, NativeEngine(model, "generic").generate(prompts, sampling, n=2))
    torch.testing.assert_close(recomputed(model, prompts, lean, sampling), lean.logprobs, atol=1e-4, rtol=0)
    with model.adapter_off():
        off = NativeEngine(model, "lean").generate(prompts, sampling, n=2)
        torch.testing.assert_close(recomputed(model, prompts, off, sampling), off.logprobs, atol=1e-4, rtol=0)
    assert not torch.equal(off.ids, lean.ids)


def test_bfloat16_sampling_agrees_with_bfloat16_recomputation() -> None:
    model = language_model(CONFIGS["qwen3"](), precision="bfloat16")
    prompts, sampling = some_prompts(6), SAMPLINGS["temperature"]
    for path in ("lean", "generic"):
        out = NativeEngine(model, path).generate(prompts, sampling, n=2)  # type: ignore[arg-type]
        error = (recomputed(model, prompts, out, sampling) - out.logprobs).abs()
        assert float(error.mean()) < 0.05  # bfloat16 has 8 bits of mantissa; these logits reach 10
        assert float(error.mean()) > 0  # float32 would not


# -- rows and batches -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_rows_that_leave_change_no_other_row(path: Any) -> None:
    model, prompts = language_model(CONFIGS["llama"]()), some_prompts(8)
    sampling = Sampling(max_new_tokens=40, top_k=40)
    shrinking = NativeEngine(model, path, compact=True).generate(prompts, sampling, n=3, seed=2)
    staying = NativeEngine(model, path, compact=False).generate(prompts, sampling, n=3, seed=2)
    assert int(shrinking.ended.sum()) >= 3  # some leave early, at different steps
    assert len(set(shrinking.length.tolist())) > 3
    assert_same(shrinking, staying)
    assert torch.equal(shrinking.support, staying.support)  # type: ignore[arg-type]


def test_an_answer_depends_on_its_row_and_not_on_the_batch() -> None:
    model, prompts, sampling = language_model(CONFIGS["qwen2"]()), some_prompts(6), SAMPLINGS["plain"]
    engine = make_engine(model)
    whole = engine.generate(prompts, sampling, n=2, seed=9)
    part = engine.generate(prompts[:2], sampling, n=2, seed=9)
    for row in range(4):
        length = int(part.length[row])
        assert length == whole.length[row]
        assert torch.equal(part.ids[row, :length], whole.ids[row, :length])
    assert not torch.equal(engine.generate(prompts, sampling, n=2, seed=10).ids, whole.ids)
    shorter = engine.generate(prompts, Sampling(max_new_tokens=7), n=2, seed=9)
    assert torch.equal(shorter.ids, whole.ids[:, :7])


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5", "mamba"])
def test_a_shared_prompt_gives_what_separate_prompts_give(name: str) -> None:
    config = {**CONFIGS, **OTHERS}[name]()
    model, prompts = language_model(config, None if name == "mamba" else packing.ATTENTION if name in CONFIGS else "sdpa"), some_prompts(3)
    shared = make_engine(model).generate(prompts, SAMPLINGS["top-p"], n=4, seed=3)
    separate = make_engine(model).generate([p for p in prompts for _ in range(4)], SAMPLINGS["top-p"], n=1, seed=3)
    assert_same(shared, separate)


def test_batching_under_a_memory_limit_changes_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, sampling = language_model(CONFIGS["llama"]()), some_prompts(7), SAMPLINGS["top-k and top-p"]
    whole = make_engine(model).generate(prompts, sampling, n=2, seed=4)
    monkeypatch.setattr(native, "_CACHE_BYTES", 3 * 2 * 3 * 32 * 4 * 40)  # room for about three rows
    monkeypatch.setattr("telos.models.generation.lean._PREFILL_TOKENS", 9)
    starts = []
    original = native.LeanDecoder.start
    monkeypatch.setattr(native.LeanDecoder, "start", lambda self, p, n, s: starts.append(len(p)) or original(self, p, n, s))
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN, which must not reach any answer
    try:
        for n in (1, 2):
            parts = make_engine(model).generate(prompts, sampling, n=n, seed=4)
            torch.testing.assert_close(recomputed(model, prompts, parts, sampling), parts.logprobs, atol=1e-4, rtol=0)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(parts, whole)
    assert len(starts) > 3


@pytest.mark.parametrize(("name", "n"), [("llama", 1), ("llama", 3), ("llama, grouped queries, biases", 1), ("qwen3", 2)])
def test_a_cache_that_grows_changes_no_answer(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts, sampling = language_model(CONFIGS[name]()), some_prompts(6), Sampling(max_new_tokens=44)
    at_once = NativeEngine(model, "lean").generate(prompts, sampling, n=n, seed=2)
    grown = []
    original = lean._Cache.grown
    monkeypatch.setattr(lean, "_GROWTH", 1)
    monkeypatch.setattr(
        lean._Cache, "grown", lambda self, rows, used, columns: grown.append(columns) or original(self, rows, used, columns)
    )
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN, which must not reach any answer
    try:
        assert_same(NativeEngine(model, "lean").generate(prompts, sampling, n=n, seed=2), at_once)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(set(grown)) >= 2
    torch.testing.assert_close(recomputed(model, prompts, at_once, sampling), at_once.logprobs, atol=1e-4, rtol=0)


def test_prompts_are_computed_once_whatever_n_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = language_model(CONFIGS["llama"]()), some_prompts(3)
    seen: list[int] = []
    original = native.LeanDecoder._prefill
    monkeypatch.setattr(native.LeanDecoder, "_prefill", lambda self, p, *rest: seen.append(sum(map(len, p))) or original(self, p, *rest))
    make_engine(model).generate(prompts, Sampling(max_new_tokens=2), n=5)
    assert sum(seen) == sum(map(len, prompts))


# -- ends and limits --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [0, END])
@pytest.mark.parametrize("path", ["lean", "generic"])
def test_end_token_is_part_of_the_answer_even_where_it_pads(pad: int, path: Any) -> None:
    model = language_model(CONFIGS["llama"](), pad=pad)
    sampling = Sampling(temperature=1.5, max_new_tokens=30)
    out = NativeEngine(model, path).generate(some_prompts(10), sampling, n=3)
    assert 5 < int(out.ended.sum()) < 30
    for ids, length, ended, logprobs in zip(out.ids.tolist(), out.length.tolist(), out.ended.tolist(), out.logprobs.tolist(), strict=True):
        assert END not in ids[: length - 1]
        assert (ids[length - 1] == END) == ended
        assert length == 30 or ended
        assert ids[length:] == [pad] * (len(ids) - length)
        assert logprobs[length:] == [0.0] * (len(ids) - length)
        assert all(value < 0 for value in logprobs[:length])


def test_every_end_token_of_the_generation_config_ends_an_answer() -> None:
    model = language_model(CONFIGS["llama"]())
    free = make_engine(model).generate(some_prompts(6), Sampling(max_new_tokens=20), seed=1)
    other = int(free.ids[int(free.length.argmax()), 3])
    model.base.generation_config.eos_token_id = [END, other]
    out = make_engine(model).generate(some_prompts(6), Sampling(max_new_tokens=20), seed=1)
    row = int(free.length.argmax())
    assert bool(out.ended[row])
    assert int(out.length[row]) <= 4
    assert int(out.ids[row, int(out.length[row]) - 1]) == other


def test_cut_off_answers_have_not_ended() -> None:
    model = language_model(CONFIGS["llama"]())
    out = make_engine(model).generate(some_prompts(10), Sampling(max_new_tokens=2), n=3, seed=1)
    cut = ~out.ended
    assert int(cut.sum()) > 10
    assert out.length[cut].tolist() == [2] * int(cut.sum())


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_prompt_at_the_limit_of_the_context_gets_one_token(path: Any) -> None:
    model = language_model(CONFIGS["llama"]())
    prompts = [[5] * (CONTEXT - 1), [7, 8], [9] * (CONTEXT - 4)]
    sampling = Sampling(max_new_tokens=200, top_k=VOCABULARY - 1)
    out = NativeEngine(model, path).generate(prompts, sampling, n=2, seed=1)
    rooms = [1, 1, CONTEXT - 2, CONTEXT - 2, 4, 4]
    for length, ended, room in zip(out.length.tolist(), out.ended.tolist(), rooms, strict=True):
        assert length == room or (ended and length < room)
    assert out.length[:2].tolist() == [1, 1]
    torch.testing.assert_close(recomputed(model, prompts, out, sampling), out.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([[5, 6], [7] * CONTEXT], "prompt 1 has 64 tokens"),
        ([[5], [6], []], "prompt 2 is empty"),
        ([[5, VOCABULARY]], "prompt 0 holds a token id outside 0 … 82"),
        ([], "no prompts"),
    ],
)
def test_prompts_that_cannot_be_answered_are_named(prompts: list[list[int]], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_engine(language_model(CONFIGS["llama"]())).generate(prompts, Sampling())


@pytest.mark.parametrize("path", ["lean", "generic"])
@pytest.mark.parametrize(
    "sampling", [Sampling(min_new_tokens=6, max_new_tokens=12, top_k=60), Sampling(temperature=0, min_new_tokens=6, max_new_tokens=12)]
)
def test_end_token_cannot_come_before_min_new_tokens(path: Any, sampling: Sampling) -> None:
    model, prompts = language_model(CONFIGS["llama"]()), some_prompts(10)
    with torch.no_grad():
        # All embeddings are tied to the output; make the end token likely everywhere.
        model.base.model.embed_tokens.weight[END] = 1.2 * model.base.model.embed_tokens.weight[2:].mean(0) + model.base.model.norm.weight
    out = NativeEngine(model, path).generate(prompts, sampling, n=2)
    assert int(out.length.min()) >= 7 or (int(out.length.min()) >= 6 and bool((out.ids[:, :6] != END).all()))
    if out.support is not None:
        assert not bool((out.support[:, :6] == END).any())
        torch.testing.assert_close(recomputed(model, prompts, out, sampling), out.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 65}, "min_new_tokens"),
    ],
)
def test_sampling_out_of_range_names_the_option(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=rf"^{named} = "):
        Sampling(**options)


# -- weights ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_version_changes_with_every_way_of_changing_weights(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(3, 1)).to(dtype)  # odd sizes too
    versions = [weight_version(layers)]
    for p in layers.parameters():
        p.grad = torch.ones_like(p)
    for optimiser in (
        torch.optim.AdamW(layers.parameters(), lr=1e-1, fused=True),  # leaves torch's own counters as they were
        torch.optim.AdamW(layers.parameters(), lr=1e-1, foreach=True),
        torch.optim.SGD(layers.parameters(), lr=1e-1, foreach=False),
    ):
        optimiser.step()
        versions.append(weight_version(layers))
    layers[2].bias.data.add_(1.0)
    versions.append(weight_version(layers))
    layers[0].weight = nn.Parameter(layers[0].weight.detach() * 2)
    versions.append(weight_version(layers))
    with torch.no_grad():
        layers[1].weight[2, 3] = -layers[1].weight[2, 3]
    versions.append(weight_version(layers))
    with torch.no_grad():
        layers[0].weight[:, 1].neg_()  # an even number of signs, in the same half of a word
    versions.append(weight_version(layers))
    assert len(set(versions)) == len(versions)
    assert all(0 <= version < 2**61 for version in versions)
    assert weight_version(copy.deepcopy(layers)) == versions[-1]  # equal weights, equal version


def test_sampling_is_not_training() -> None:
    model = language_model(CONFIGS["llama"]())
    version = weight_version(model)
    assert make_engine(model).generate([[3, 4]], Sampling(max_new_tokens=3)).weight_version == version == weight_version(model)


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_an_engine_samples_from_the_weights_as_they_are_now(path: Any) -> None:
    model, prompts, sampling = language_model(CONFIGS["llama"]()), some_prompts(4), SAMPLINGS["plain"]
    engine = NativeEngine(model, path)
    before = engine.generate(prompts, sampling)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(1.0)
    after = engine.generate(prompts, sampling)
    assert after.weight_version != before.weight_version
    assert not torch.equal(before.ids, after.ids)
    torch.testing.assert_close(recomputed(model, prompts, after, sampling), after.logprobs, atol=1e-4, rtol=0)


def test_diverged_weights_are_reported() -> None:
    model = language_model(CONFIGS["llama"]())
    with torch.no_grad():
        model.base.model.norm.weight[0] = torch.nan
    for sampling in SAMPLINGS.values():
        with pytest.raises(Failure, match="not finite at token 0"):
            make_engine(model).generate([[3, 4], [5]], sampling)


def test_answers_can_stand_in_a_loss() -> None:
    model, prompts = language_model(CONFIGS["llama"]()), some_prompts(3)
    out = make_engine(model).generate(prompts, SAMPLINGS["top-p"])
    now = model.logprobs(out.answers(prompts), temperature=1.3, support=out.support).logprobs
    ratio = (now - out.logprobs).exp()
    (ratio * out.logprobs).sum().backward()
    assert model.base.model.norm.weight.grad.abs().sum() > 0
    torch.testing.assert_close(ratio.detach(), torch.ones_like(ratio), atol=1e-4, rtol=0)


def test_dropout_is_off_while_sampling_and_training_mode_is_kept() -> None:
    config = LlamaConfig(**SHAPE, num_key_value_heads=4, attention_dropout=0.5)
    model, prompts = language_model(config), some_prompts(3)
    expected = NativeEngine(model, "generic").generate(prompts, SAMPLINGS["plain"])
    model.train()
    assert_same(NativeEngine(model, "generic").generate(prompts, SAMPLINGS["plain"]), expected)
    assert model.training


# -- choice of path and engine ---------------------------------------------------------------------------------------------------------------


def test_lean_path_says_why_it_cannot_be_used() -> None:
    model = language_model(OTHERS["mistral, short window"]())
    with pytest.raises(UsageError, match="longer than its attention window of 9"):
        NativeEngine(model, "lean").generate([[5] * 8], Sampling(max_new_tokens=4))
    assert NativeEngine(model, "lean").generate([[5] * 5], Sampling(max_new_tokens=4)).ids.shape == (1, 4)


def test_unknown_engine_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"native, vllm \(did you mean 'native'\?\)"):
        make_engine(language_model(CONFIGS["llama"]()), "natve")


def test_missing_vllm_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UsageError, match=r"pip install telos\[vllm\]"):
        make_engine(language_model(CONFIGS["llama"]()), "vllm")


class _FakeVllm:
    """Stands for the module `vllm`: every answer is 4 tokens or ends with the third, and every step allows three tokens."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.settings: list[Any] = []
        outer = self

        class LLM:
            def __init__(self, **options: Any) -> None:
                outer.calls.append("load")
                outer.options = options

            def collective_rpc(self, name: str) -> None:
                outer.calls.append(name)

            def generate(self, prompts: list[Any], settings: list[Any], use_tqdm: bool) -> list[Any]:
                outer.settings = settings
                return [SimpleNamespace(outputs=[outer.answer(prompt["prompt_token_ids"], j) for j in (1, 0)]) for prompt in prompts]

        self.LLM, self.SamplingParams = LLM, lambda **options: SimpleNamespace(**options)

    @staticmethod
    def answer(prompt: list[int], j: int) -> Any:
        tokens = [prompt[0], 10 + j, END] if j else [prompt[0], 10, 11, 12]
        values = [0.5, 0.3, 0.2]
        steps = [{t: SimpleNamespace(logprob=float(np.log(v))) for t, v in zip((token, 70, 71), values, strict=True)} for token in tokens]
        for step in steps:
            step[72] = SimpleNamespace(logprob=float("-inf"))
        return SimpleNamespace(index=j, token_ids=tokens, logprobs=steps, finish_reason="stop" if j else "length")


def test_vllm_adapter_maps_settings_and_reloads_changed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = _FakeVllm()
    monkeypatch.setitem(sys.modules, "vllm", fake)  # type: ignore[arg-type]
    model: Any = language_model(CONFIGS["llama"]())
    model.tokenizer.save_pretrained = lambda folder: None
    engine = make_engine(model, "vllm")
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.9, max_new_tokens=4)
    out = engine.generate([[5, 6], [7]], sampling, n=2)
    assert fake.options["logprobs_mode"] == "processed_logprobs"
    assert (fake.settings[0].n, fake.settings[0].top_k, fake.settings[0].logprobs, fake.settings[0].temperature) == (2, 4, 4, 0.7)
    assert fake.settings[0].seed != fake.settings[1].seed
    assert out.ids.tolist() == [[5, 10, 11, 12], [5, 11, END, 0], [7, 10, 11, 12], [7, 11, END, 0]]
    assert out.length.tolist() == [4, 3, 4, 3]
    assert out.ended.tolist() == [False, True, False, True]
    torch.testing.assert_close(out.logprobs[1], torch.tensor([np.log(0.5)] * 3 + [0.0], dtype=torch.float32))
    assert out.support is not None
    assert out.support[1].tolist() == [[5, 70, 71], [11, 70, 71], [END, 70, 71], [0, -1, -1]]
    engine.generate([[5, 6], [7]], sampling, n=2)
    assert fake.calls == ["load"]
    with torch.no_grad():
        model.base.model.norm.weight.add_(1.0)
    assert engine.generate([[5, 6], [7]], sampling, n=2).weight_version != out.weight_version
    assert fake.calls == ["load", "reload_weights"]
    with pytest.raises(UsageError, match="give top_k too"):
        engine.generate([[5]], Sampling(top_p=0.9))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None or not torch.cuda.is_available(), reason="vLLM and a GPU are needed")
def test_vllm_keeps_the_engine_contract() -> None:
    from telos.models.language import TINYLM

    model = LanguageModel.load(str(TINYLM), precision="float32")
    prompts, sampling = [[7, 8, 9], [10, 11]], Sampling(temperature=0.8, top_k=20, top_p=0.9, max_new_tokens=16)
    engine = make_engine(model, "vllm")
    out = engine.generate(prompts, sampling, n=3)
    torch.testing.assert_close(recomputed(model, prompts, out, sampling), out.logprobs, atol=0.02, rtol=0)
    with torch.no_grad():
        model.base.model.norm.weight.mul_(1.5)
    after = engine.generate(prompts, sampling, n=3)
    assert after.weight_version != out.weight_version
    torch.testing.assert_close(recomputed(model, prompts, after, sampling), after.logprobs, atol=0.02, rtol=0)


# -- random numbers -----------------------------------------------------------------------------------------------------------------------------


def test_split_mix_gives_its_published_outputs() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert split_mix(1234567, np.arange(5, dtype=np.uint64)).tolist() == published


def test_uniforms_depend_on_seed_row_and_step_alone() -> None:
    wide, narrow = uniforms(3, np.array([0, 1, 2, 500]), 9), uniforms(3, np.array([500, 1]), 4)
    assert torch.equal(narrow, wide[:4, [3, 1]])
    assert not torch.equal(uniforms(4, np.array([500, 1]), 4), narrow)
    assert float(wide.min()) >= 0
    assert float(wide.max()) < 1


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_a_mixture_draws_from_the_normalised_product_of_both_distributions(path: Any, tmp_path: Path) -> None:
    mine, theirs = (LanguageModel.load(str(make_model(tmp_path / f"{seed}", seed)), device="cpu") for seed in (0, 7))
    prompts, sampling = [[5, 9, 11], [20, 4], [7]], Sampling(max_new_tokens=5)
    for share in (0.0, 0.3, 1.0):
        drawn = NativeEngine(mine, path=path, partner=Mixture(theirs, share)).generate(prompts, sampling, n=2, seed=3)
        rows = [prompt for prompt in prompts for _ in range(2)]
        for row, prompt in enumerate(rows):
            ids = prompt + drawn.ids[row, : drawn.length[row]].tolist()
            with torch.no_grad():
                logs = [model.base(torch.tensor([ids])).logits[0].log_softmax(-1) for model in (mine, theirs)]
            mixed = ((1 - share) * logs[0] + share * logs[1]).log_softmax(-1)
            for place in range(len(prompt), len(ids)):
                expected = float(mixed[place - 1, ids[place]])
                assert float(drawn.logprobs[row, place - len(prompt)]) == pytest.approx(expected, abs=1e-4)
