"""Packed batches, padded batches and `transformers` on single unpadded rows give the same numbers and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from support import World, tiny_config
from telos.models import packing
from telos.models.language import LanguageModel
from telos.models.packing import Answers, pack

VOCABULARY = 300


def answers_of(prompts: list[list[int]], answers: list[list[list[int]]], fill: int = 0) -> Answers:
    """Right-padded with `fill`, whatever that is."""

    def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows)) + 2  # wider than the longest
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows]), torch.tensor([len(row) for row in rows])

    flat = [answer for group in answers for answer in group]
    owner = torch.tensor([i for i, group in enumerate(answers) for _ in group])
    return Answers(*pad(prompts), *pad(flat), owner)


def draw(seed: int, prompts: list[int], groups: list[list[int]], fill: int = 0) -> tuple[list[list[int]], list[list[list[int]]], Answers]:
    g = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(VOCABULARY, (n,), generator=g).tolist()

    found = [tokens(n) for n in prompts], [[tokens(n) for n in group] for group in groups]
    return *found, answers_of(*found, fill)


@pytest.fixture(scope="module", params=["plain", "grouped-query", "one key head", "tied"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, world: World) -> tuple[LanguageModel, Any]:
    """(ours, the same weights in plain `transformers` with its own attention)."""
    changes = {
        "plain": {"num_key_value_heads": 4},
        "grouped-query": {"num_key_value_heads": 2},
        "one key head": {"num_key_value_heads": 1},
        "tied": {"tie_word_embeddings": True, "head_dim": 16},
    }[request.param]
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    LlamaForCausalLM(tiny_config(**changes)).save_pretrained(folder)
    ours = LanguageModel.load(str(folder), tokenizer=world.model, device="cpu")
    assert ours.packs
    return ours, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def by_transformers(model: Any, prompts: list[list[int]], answers: list[list[list[int]]]) -> list[Tensor]:
    """log π of each answer's tokens from full logits of one row at a time, without padding."""
    out = []
    for prompt, group in zip(prompts, answers, strict=True):
        for answer in group:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
            logp = torch.log_softmax(logits, -1)
            places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
            out.append(logp[places, torch.tensor(answer)])
    return out


def assert_rows(found: Tensor, wanted: list[Tensor], tolerance: float = 2e-5) -> None:
    for row, values in zip(found, wanted, strict=True):
        torch.testing.assert_close(row[: len(values)].double(), values, rtol=tolerance, atol=tolerance)
        assert (row[len(values) :] == 0).all(), "0 where padded"


shapes = st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=shapes, seed=st.integers(0, 1000), fill=st.integers(0, VOCABULARY - 1))
def test_packed_padded_and_single_rows_agree(models: tuple[LanguageModel, Any], shapes: Any, seed: int, fill: int) -> None:
    ours, theirs = models
    prompts, groups, answers = draw(seed, [p for p, _ in shapes], [g for _, g in shapes], fill)
    with torch.no_grad():
        wanted = by_transformers(theirs, prompts, groups)
        for packed in (True, False):
            assert_rows(ours.logprobs(answers, packed=packed).logprobs, wanted)


def test_gradients_agree_in_every_parameter(models: tuple[LanguageModel, Any]) -> None:
    ours, theirs = models
    prompts, groups, answers = draw(5, [4, 1, 7], [[3, 5], [2], [1, 6, 4, 4]])
    weights = torch.randn(answers.ids.shape, generator=torch.Generator().manual_seed(1))
    theirs.zero_grad()
    loss = sum((values * weights[i, : len(values)].double()).sum() for i, values in enumerate(by_transformers(theirs, prompts, groups)))
    loss.backward()  # type: ignore[union-attr]
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    for packed in (True, False):
        ours.zero_grad()
        (ours.logprobs(answers, packed=packed).logprobs * weights).sum().backward()
        for name, p in ours.model.named_parameters():
            assert p.grad is not None
            assert float((p.grad - wanted[name]).abs().max()) <= 2e-5 * max(1.0, float(wanted[name].abs().max())), name


def test_entropy_temperature_and_support_agree_between_the_layouts(models: tuple[LanguageModel, Any]) -> None:
    ours, _ = models
    _, _, answers = draw(6, [4, 2], [[3, 5], [2, 1]])
    temperature = torch.tensor([0.5, 1.0, 1.5, 2.0])
    support = torch.randint(VOCABULARY, (*answers.ids.shape, 5), generator=torch.Generator().manual_seed(2))
    support[..., 0] = answers.ids  # the sampled token is always allowed
    support[0, :, 3:] = -1
    for options in ({"temperature": temperature}, {"support": support}, {"temperature": temperature, "support": support}):
        packed, padded = (ours.logprobs(answers, packed=p, want_entropy=True, **options) for p in (True, False))
        torch.testing.assert_close(packed.logprobs, padded.logprobs, rtol=2e-5, atol=2e-5)
        assert packed.entropy is not None
        assert padded.entropy is not None
        torch.testing.assert_close(packed.entropy, padded.entropy, rtol=2e-5, atol=2e-5)
        assert (packed.entropy[~answers.mask] == 0).all()


def test_temperature_and_entropy_are_those_of_full_logits(models: tuple[LanguageModel, Any]) -> None:
    ours, theirs = models
    prompts, groups, answers = draw(8, [5], [[4]])
    temperature = 0.7
    logits = theirs(input_ids=torch.tensor([prompts[0] + groups[0][0]])).logits[0, 4:8].double() / temperature
    logp = torch.log_softmax(logits, -1)
    found = ours.logprobs(answers, temperature=temperature, want_entropy=True)
    torch.testing.assert_close(found.logprobs[0, :4].double(), logp[torch.arange(4), torch.tensor(groups[0][0])], rtol=2e-5, atol=2e-5)
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy[0, :4].double(), -(logp.exp() * logp).sum(-1), rtol=2e-5, atol=2e-5)


def test_a_shared_prompt_is_computed_once_and_padding_never(models: tuple[LanguageModel, Any]) -> None:
    _, _, answers = draw(7, [9, 3], [[2, 4, 1], [5]])
    tree = pack(answers)
    assert len(tree.ids) == 9 + 2 + 4 + 1 + 3 + 5
    assert len(tree.target) == 2 + 4 + 1 + 5


def test_the_layout_by_hand() -> None:
    """Two answers to the prompt 10 11, one to 20: every index written out."""
    tree = pack(answers_of([[10, 11], [20]], [[[1], [2, 3]], [[4, 5]]]))
    assert tree.ids.tolist() == [10, 11, 20, 1, 2, 3, 4, 5]
    assert tree.position.tolist() == [0, 1, 0, 2, 2, 3, 1, 2]
    assert tree.row_index.tolist() == [[0, 1, 3, 0], [0, 1, 4, 5], [2, 6, 7, 0]]
    assert tree.predict.tolist() == [1, 1, 4, 2, 6]
    assert tree.target.tolist() == [1, 2, 3, 4, 5]
    assert tree.last.tolist() == [3, 5, 7]
    assert tree.shape == (3, 4)
    assert tree.unpack(torch.tensor([1.0, 2, 3, 4, 5]), fill=9.0).tolist() == [[1, 9, 9, 9], [2, 3, 9, 9], [4, 5, 9, 9]]
    by_row = tree.block_index[tree.home]
    assert by_row.tolist() == list(range(8)), "each token's output is read from a place that holds the token"


def test_interleaving_repeats_no_prompt() -> None:
    prompt, length = torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])
    chosen = torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([3, 1])
    rejected = torch.tensor([[9], [4]]), torch.tensor([1, 1])
    found = Answers.repeat(prompt, length, chosen, rejected)
    assert found.ids.tolist() == [[5, 6, 7], [9, 0, 0], [8, 0, 0], [4, 0, 0]]
    assert found.length.tolist() == [3, 1, 1, 1]
    assert found.owner.tolist() == [0, 0, 1, 1]
    assert found.prompt_ids is prompt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": torch.tensor([0, 2, 2])}, "at least one token"),
        ({"prompt_length": torch.tensor([2, 0])}, "at least one token"),
        ({"owner": torch.tensor([1, 1, 1])}, "order of their prompts"),
        ({"owner": torch.tensor([0, 1, 0])}, "order of their prompts"),
    ],
)
def test_a_batch_that_is_no_forest_is_refused(change: dict[str, Tensor], message: str) -> None:
    import dataclasses

    good = answers_of([[10, 11], [20]], [[[1], [2, 3]], [[4, 5]]])
    with pytest.raises(ValueError, match=message):
        pack(dataclasses.replace(good, **change))


def test_other_rows_change_nothing(models: tuple[LanguageModel, Any]) -> None:
    """An answer's numbers do not depend on its neighbours, to rounding."""
    ours, _ = models
    prompts, groups, together = draw(11, [5, 2, 8], [[3, 4], [6], [2]])
    with torch.no_grad():
        all_rows = ours.logprobs(together).logprobs
        alone = ours.logprobs(answers_of(prompts[1:2], groups[1:2])).logprobs
    torch.testing.assert_close(all_rows[2, :6], alone[0, :6], rtol=2e-5, atol=2e-5)


def test_saved_weights_open_with_transformers_alone_and_give_the_same(models: tuple[LanguageModel, Any], tmp_path: Path) -> None:
    ours, _ = models
    ours.save(tmp_path / "saved")
    config = (tmp_path / "saved" / "config.json").read_text(encoding="utf-8")
    assert packing.ATTENTION not in config
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    prompts, groups, answers = draw(12, [5, 2], [[3], [6]])
    with torch.no_grad():
        assert_rows(ours.logprobs(answers).logprobs, by_transformers(opened, prompts, groups))
    assert ours.config._attn_implementation == packing.ATTENTION, "writing changes nothing in memory"


def test_bfloat16_packs_and_pads_alike(models: tuple[LanguageModel, Any], tmp_path: Path, world: World) -> None:
    ours, _ = models
    ours.save(tmp_path / "saved")
    half = LanguageModel.load(str(tmp_path / "saved"), tokenizer=world.model, precision="bfloat16", device="cpu")
    _, _, answers = draw(13, [5, 2, 4], [[3, 3], [6], [2, 2, 2]])
    with torch.no_grad():
        packed = half.logprobs(answers)  # first use: whether it packs is tried inside the lower precision
        assert half.packs
        exact = ours.logprobs(answers).logprobs
    assert packed.logprobs.dtype == torch.float32
    gap = float((packed.logprobs - exact).abs().max())
    assert 0 < gap < 0.3, "rounded, and not far off"
