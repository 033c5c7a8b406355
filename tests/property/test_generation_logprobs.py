"""What holds of every draw: the kept tokens are the fewest that hold enough, the drawn one is among them, and its log-probability is that of the
renormalised distribution; frequencies are those of the softmax. Reference values are computed by NumPy in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import AutoModelForCausalLM, Qwen2Config

from telos.models import packing
from telos.models.generation import Sampling, sampler
from telos.models.generation.native import NativeEngine
from telos.models.generation.sampler import allowed, pick, uniforms
from telos.models.language import LanguageModel

LARGEST_UNIFORM = 1 - 2.0**-24


def softmax64(logits: torch.Tensor, temperature: float) -> np.ndarray:
    x = logits.double().numpy() / temperature
    p = np.exp(x - x.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


@st.composite
def draws(draw: Any) -> tuple[torch.Tensor, torch.Tensor, Sampling]:
    rows, vocabulary = draw(st.integers(1, 4)), draw(st.sampled_from([2, 7, 65, 600, 1500]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, vocabulary, generator=generator) * draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 30.0]))
    if draw(st.booleans()):
        logits[:, draw(st.integers(0, vocabulary - 1))] = -torch.inf
    u = torch.rand(rows, generator=generator)
    u[0] = draw(st.sampled_from([0.0, 0.5, LARGEST_UNIFORM]))
    sampling = Sampling(
        temperature=draw(st.sampled_from([0.3, 1.0, 2.0])),
        top_p=draw(st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0])),
        top_k=draw(st.sampled_from([0, 1, 5, 64, 5000])),
    )
    return logits, u, sampling


@settings(max_examples=150, deadline=None)
@given(draws())
def test_kept_tokens_are_the_fewest_that_hold_enough(case: tuple[torch.Tensor, torch.Tensor, Sampling]) -> None:
    logits, _, sampling = case
    p = softmax64(logits, sampling.temperature)
    weights, order = allowed(logits / sampling.temperature, sampling) if sampling.restricted else (torch.from_numpy(p), None)
    if order is None:
        return
    for row in range(len(p)):
        kept = order[row][weights[row] > 0].numpy()
        assert len(set(kept.tolist())) == len(kept) >= 1
        candidates = np.sort(p[row])[::-1][: sampling.top_k or None]
        candidates = candidates / candidates.sum()
        mass = p[row][kept] / np.sort(p[row])[::-1][: sampling.top_k or None].sum()
        assert len(kept) <= (sampling.top_k or len(p[row]))
        assert mass.min() >= candidates[: len(kept)].min() * (1 - 1e-4)  # no kept token is less likely than one left out
        if sampling.top_p < 1:
            assert mass.sum() >= sampling.top_p - 1e-5
            assert mass.sum() - mass.min() < sampling.top_p + 1e-5
        else:
            positive = int((candidates > 1e-30).sum())
            assert len(kept) >= min(positive, sampling.top_k)


@settings(max_examples=150, deadline=None)
@given(draws())
def test_drawn_token_is_allowed_and_its_logprob_is_the_renormalised_one(case: tuple[torch.Tensor, torch.Tensor, Sampling]) -> None:
    logits, u, sampling = case
    p = softmax64(logits, sampling.temperature)
    token, logprob, kept = pick(logits.clone(), u, sampling)
    assert (kept is not None) == sampling.restricted
    for row in range(len(p)):
        assert np.isfinite(logits[row, token[row]].item())
        among = np.arange(p.shape[1])
        if kept is not None:
            tokens = kept[row].tolist()
            count = sum(t >= 0 for t in tokens)
            assert tokens[0] >= 0
            assert tokens[count:] == [-1] * (len(tokens) - count)  # padding on the right
            assert int(token[row]) in tokens[:count]
            among = np.array(tokens[:count])
        assert float(logprob[row]) == pytest.approx(np.log(p[row][token[row]] / p[row][among].sum()), abs=2e-5)


@settings(max_examples=100, deadline=None)
@given(draws())
def test_without_restriction_the_token_is_where_the_cumulated_distribution_passes_u(
    case: tuple[torch.Tensor, torch.Tensor, Sampling],
) -> None:
    logits, u, sampling = case
    plain = Sampling(temperature=sampling.temperature)
    cumulated = np.pad(softmax64(logits, plain.temperature).cumsum(1), ((0, 0), (1, 0)))
    token, _, _ = pick(logits.clone(), u, plain)
    for row, chosen in enumerate(token.tolist()):
        assert cumulated[row, chosen] - 2e-6 <= float(u[row]) <= cumulated[row, chosen + 1] + 2e-6


@settings(max_examples=60, deadline=None)
@given(draws())
def test_greedy_takes_the_most_likely_token_and_records_temperature_one(case: tuple[torch.Tensor, torch.Tensor, Sampling]) -> None:
    logits, u, _ = case
    token, logprob, kept = pick(logits.clone(), u, Sampling(temperature=0, top_p=0.5, top_k=3))
    p = softmax64(logits, 1.0)
    assert kept is None
    assert token.tolist() == logits.numpy().argmax(1).tolist()
    np.testing.assert_allclose(logprob.numpy(), np.log(p.max(1)), atol=2e-5)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5), Sampling(top_k=9), Sampling(temperature=2.0, top_p=0.8)])
def test_frequencies_are_those_of_the_distribution(sampling: Sampling) -> None:
    count, vocabulary = 40_000, 40
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)) * 1.5
    u = uniforms(7, np.arange(count), 1)[0]
    token, _, kept = pick(logits.repeat(count, 1), u, sampling)
    p = softmax64(logits[None], sampling.temperature)[0]
    if kept is not None:
        outside = np.setdiff1d(np.arange(vocabulary), kept[0].numpy())
        p[outside] = 0.0
    p /= p.sum()
    seen = np.bincount(token.numpy(), minlength=vocabulary)
    assert seen[p == 0].sum() == 0
    often = p * count >= 5
    expected = np.append(p[often], p[(p > 0) & ~often].sum()) * count
    found = np.append(seen[often], seen[(p > 0) & ~often].sum())
    if expected[-1] < 5:  # too rare to count by itself
        expected, found = np.append(expected[:-2], expected[-2:].sum()), np.append(found[:-2], found[-2:].sum())
    assert stats.chisquare(found, expected).pvalue > 0.01
    # The same test rejects a distribution that is at twice the temperature.
    wrong = softmax64(logits[None], sampling.temperature * 2)[0] * (p > 0)
    wrong = wrong[often] / wrong[often].sum() * seen[often].sum()
    assert stats.chisquare(seen[often], wrong).pvalue < 1e-4


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    u = uniforms(11, np.arange(300), 200).numpy()
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.015  # neighbouring rows
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.015  # neighbouring steps


def test_wide_supports_are_found_however_many_tokens_are_looked_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 900, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1.0], [8.0]])
    sampling, u = Sampling(top_p=0.95), torch.tensor([0.2, 0.7, 0.9])
    expected = pick(logits.clone(), u, sampling)
    for widths in ((1,), (3, 40), (899,), ()):
        monkeypatch.setattr(sampler, "_WIDTHS", widths)
        token, logprob, kept = pick(logits.clone(), u, sampling)
        assert torch.equal(token, expected[0])
        torch.testing.assert_close(logprob, expected[1])
        assert torch.equal(kept, expected[2])  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=40,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=1,
    )
    decoder = AutoModelForCausalLM.from_config(config, attn_implementation=packing.ATTENTION)
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(5 if p.ndim == 2 else 1)
    tokenizer: Any = SimpleNamespace(eos_token_id=1, pad_token_id=1, model_max_length=40)
    return LanguageModel(decoder, tokenizer, "random model", "float32")


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=39), min_size=1, max_size=4),
    n=st.integers(1, 3),
    seed=st.integers(0, 2**62),
    sampling=st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.7, 1.0, 1.8]),
        top_p=st.sampled_from([0.4, 0.95, 1.0]),
        top_k=st.sampled_from([0, 1, 10]),
        max_new_tokens=st.integers(1, 50),
    ),
)
def test_recorded_logprobs_are_the_trainers(model: LanguageModel, prompts: list[list[int]], n: int, seed: int, sampling: Sampling) -> None:
    outs = [NativeEngine(model, path).generate(prompts, sampling, n, seed) for path in ("lean", "generic")]  # type: ignore[arg-type]
    for out in outs:
        answers = out.answers(prompts)
        with torch.no_grad():
            again = model.logprobs(answers, temperature=sampling.temperature or 1.0, support=out.support).logprobs
        torch.testing.assert_close(again, out.logprobs, atol=1e-4, rtol=0)
        assert bool((answers.length + answers.prompt_length[answers.owner] <= model.context).all())
        assert bool(
            (
                out.ended | (out.length == torch.minimum(torch.tensor(sampling.max_new_tokens), 40 - answers.prompt_length[answers.owner]))
            ).all()
        )
