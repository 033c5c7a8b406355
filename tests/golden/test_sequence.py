"""Fused token log-probabilities against torch's own log-softmax on full logits: values, gradients, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from telos.functional import sequence
from telos.functional.sequence import linear_logprobs

N, D, V = 23, 8, 37


def inputs(seed: int = 0, n: int = N, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, D, generator=g).mul(scale).to(dtype)
    weight = torch.randn(V, D, generator=g).to(dtype)
    bias = torch.randn(V, generator=g).to(dtype)
    return hidden, weight, bias, torch.randint(V, (n,), generator=g)


def full(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor | float = 1.0, support: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same from [n, V] logits in float64: log softmax at the targets and −Σ p log p."""
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    logits = logits / (temperature.double()[:, None] if isinstance(temperature, Tensor) else temperature)
    if support is not None:
        allowed = torch.zeros_like(logits, dtype=torch.bool)
        for i, row in enumerate(support.tolist()):
            allowed[i, [token for token in row if token >= 0]] = True
        logits = logits.masked_fill(~allowed, -torch.inf)
    logp = torch.log_softmax(logits, -1)
    p = logp.exp()
    return logp[torch.arange(len(targets)), targets], -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)


def support_for(targets: Tensor, width: int = 6, seed: int = 1) -> Tensor:
    """Rows of distinct tokens, the target somewhere among them, cut to different lengths with −1 on the right."""
    g = torch.Generator().manual_seed(seed)
    out = torch.full((len(targets), width), -1)
    for i, target in enumerate(targets.tolist()):
        length = int(torch.randint(1, width + 1, (1,), generator=g))
        others = [token for token in torch.randperm(V, generator=g).tolist() if token != target][: length - 1]
        row = [*others, target]
        out[i, : len(row)] = torch.tensor(row)[torch.randperm(len(row), generator=g)]
    return out


def assert_equal_to_full(
    temperature: Tensor | float = 1.0,
    support: Tensor | None = None,
    with_bias: bool = True,
    seed: int = 0,
    entropy_weight: float = 0.7,
    n: int = N,
) -> None:
    """Values to 1e-5, gradients of a random combination of log-probabilities and entropies to 1e-5 of their size."""
    hidden, weight, bias, targets = inputs(seed, n)
    g = torch.Generator().manual_seed(9)
    a, b = torch.randn(n, generator=g), torch.randn(n, generator=g) * entropy_weight
    gradients: list[list[Tensor]] = []
    outputs: list[tuple[Tensor, Tensor]] = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        h, w, c = leaves[0], leaves[1], leaves[2] if with_bias else None
        if ours:
            logp, entropy = linear_logprobs(h, w, targets, bias=c, temperature=temperature, support=support, want_entropy=True)
            assert entropy is not None
            assert logp.dtype == entropy.dtype == torch.float32
        else:
            logp, entropy = full(h, w, c, targets, temperature, support)
        ((logp * a).sum() + (entropy * b).sum()).backward()
        outputs.append((logp.detach(), entropy.detach()))
        gradients.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    for mine, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5)
    assert len(gradients[0]) == len(gradients[1]) == 2 + with_bias
    for mine, theirs in zip(*gradients, strict=True):
        assert float((mine.double() - theirs.double()).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("slice_elements", [1, V, 5 * V, 1 << 22])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kept_elements", [0, 1 << 24])
def test_values_and_gradients_are_those_of_full_logits_whatever_the_slices(
    monkeypatch: pytest.MonkeyPatch, slice_elements: int, with_bias: bool, kept_elements: int
) -> None:
    monkeypatch.setattr(sequence, "_SLICE_ELEMENTS", slice_elements)
    monkeypatch.setattr(sequence, "_KEPT_ELEMENTS", kept_elements)
    assert_equal_to_full(with_bias=with_bias)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2, 1.7, torch.linspace(0.3, 2.5, N)])
def test_temperature_divides_the_logits_one_number_or_one_a_row(monkeypatch: pytest.MonkeyPatch, temperature: Any) -> None:
    monkeypatch.setattr(sequence, "_SLICE_ELEMENTS", 4 * V)
    assert_equal_to_full(temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.8, torch.linspace(0.3, 2.5, N)])
@pytest.mark.parametrize("kept_elements", [0, 1 << 24])
def test_a_support_renormalises_over_its_tokens(monkeypatch: pytest.MonkeyPatch, temperature: Any, kept_elements: int) -> None:
    monkeypatch.setattr(sequence, "_SLICE_ELEMENTS", 4 * V)
    monkeypatch.setattr(sequence, "_KEPT_ELEMENTS", kept_elements)
    _, _, _, targets = inputs()
    assert_equal_to_full(temperature, support_for(targets))


def test_a_support_of_all_tokens_is_none_and_of_one_token_is_certain() -> None:
    hidden, weight, bias, targets = inputs()
    everything = torch.arange(V).expand(N, V)
    one, entropy = linear_logprobs(hidden, weight, targets, bias=bias, support=everything, want_entropy=True)
    other, wanted = linear_logprobs(hidden, weight, targets, bias=bias, want_entropy=True)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(entropy, wanted)
    leaf = hidden.clone().requires_grad_()
    certain, none = linear_logprobs(leaf, weight, targets, support=targets[:, None], want_entropy=True)
    assert none is not None
    (certain.sum() + none.sum()).backward()
    assert certain.abs().max() < 1e-6
    assert none.abs().max() < 1e-6
    assert leaf.grad is not None
    assert leaf.grad.abs().max() < 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000), st.booleans(), st.floats(0.5, 3.0))
def test_any_number_of_rows_agrees(n: int, seed: int, with_bias: bool, temperature: float) -> None:
    assert_equal_to_full(temperature, None, with_bias, seed, n=n)


def test_gradients_pass_the_numerical_check() -> None:
    """Independent of autograd: central differences in every direction of the hidden states (in float32, so to three digits)."""
    hidden, weight, _, targets = inputs(n=3)

    def loss(x: Tensor) -> float:
        logp, entropy = linear_logprobs(x, weight, targets, temperature=1.3, want_entropy=True)
        assert entropy is not None
        return float(logp.double().sum() + 0.5 * entropy.double().sum())

    leaf = hidden.clone().requires_grad_()
    logp, entropy = linear_logprobs(leaf, weight, targets, temperature=1.3, want_entropy=True)
    assert entropy is not None
    (logp.sum() + 0.5 * entropy.sum()).backward()
    assert leaf.grad is not None
    h = 1e-2
    for i in range(3):
        for j in range(D):
            step = torch.zeros_like(hidden)
            step[i, j] = h
            assert leaf.grad[i, j].item() == pytest.approx((loss(hidden + step) - loss(hidden - step)) / (2 * h), rel=1e-2, abs=2e-3)


@pytest.mark.parametrize("slice_elements", [3 * V, 1 << 22])
def test_bfloat16_is_as_close_as_its_rounding_allows(monkeypatch: pytest.MonkeyPatch, slice_elements: int) -> None:
    monkeypatch.setattr(sequence, "_SLICE_ELEMENTS", slice_elements)
    hidden, weight, bias, targets = inputs(dtype=torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    logp, entropy = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2], want_entropy=True)
    assert entropy is not None
    assert logp.dtype == torch.float32
    (logp.sum() + entropy.sum()).backward()
    exact = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    wanted, wanted_entropy = full(exact[0], exact[1], exact[2], targets)
    (wanted.sum() + wanted_entropy.sum()).backward()
    # bfloat16 has 8 bits: logits of size 8 are known to about 0.03.
    assert float((logp.detach().double() - wanted.detach()).abs().max()) < 0.06
    assert float((entropy.detach().double() - wanted_entropy.detach()).abs().max()) < 0.06
    for mine, theirs in zip(leaves, exact, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == torch.bfloat16
        assert theirs.grad is not None
        assert float((mine.grad.double() - theirs.grad).norm()) < 0.02 * float(theirs.grad.norm())


def test_no_row_of_many_logits_is_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "_KEPT_ELEMENTS", 200 * V - 1)
    hidden, weight, bias, targets = inputs(n=200)
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logp, entropy = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2], want_entropy=True)
    assert entropy is not None
    (logp.sum() + entropy.sum()).backward()
    allowed = {(200, D), (V, D), (V,), (200,)}
    assert set(kept) <= allowed, "hidden states, weights and one number a row are all that is needed"


def test_the_largest_tensor_is_one_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setattr(sequence, "_SLICE_ELEMENTS", 4 * V)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, Tensor):
                    sizes.append(tensor.numel())
            return out

    hidden, weight, _, targets = inputs(n=400)
    leaf = hidden.requires_grad_()
    with Watch():
        logp, entropy = linear_logprobs(leaf, weight, targets, want_entropy=True)
        assert entropy is not None
        (logp.sum() + entropy.sum()).backward()
    assert max(sizes) <= max(4 * V, 400 * D), f"{max(sizes)} numbers at once; all logits would be {400 * V}"


def test_large_logits_neither_overflow_nor_vanish() -> None:
    hidden, weight, _, targets = inputs(scale=1000.0)
    leaf = hidden.requires_grad_()
    logp, entropy = linear_logprobs(leaf, weight, targets, want_entropy=True)
    assert entropy is not None
    (logp.sum() + entropy.sum()).backward()
    wanted, _ = full(hidden.detach(), weight, None, targets)
    torch.testing.assert_close(logp.double(), wanted, rtol=1e-5, atol=1e-2)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert (entropy >= -1e-3).all()


def test_nothing_is_computed_for_what_needs_no_gradient() -> None:
    hidden, weight, bias, targets = inputs()
    leaf = bias.requires_grad_()
    linear_logprobs(hidden, weight, targets, bias=leaf)[0].sum().backward()
    assert leaf.grad is not None
    assert hidden.grad is None
    assert linear_logprobs(hidden, weight, targets)[1] is None
    assert linear_logprobs(hidden[:0], weight, targets[:0], want_entropy=True)[0].shape == (0,)


def test_shapes_that_do_not_fit_are_refused() -> None:
    hidden, weight, _, targets = inputs()
    for bad in ((hidden[:, :-1], weight, targets), (hidden, weight, targets[:-1]), (hidden[None], weight, targets)):
        with pytest.raises(ValueError, match=r"expected hidden \[n, d\]"):
            linear_logprobs(*bad)
