"""Reward models against `transformers` alone: scores, saved folders, pad tokens, adapters; and reward models as sources of rewards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from telos.core.errors import Failure, UsageError
from telos.models.language import LanguageModel, Lora, add_lora
from telos.models.packing import Answers
from telos.objectives.reward_model import ModelReward, RewardModel, same_ids
from telos.objectives.rewards import load_reward

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '<eos>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_tokenizer(special: tuple[str, ...] = ("<eos>",), **options: Any) -> PreTrainedTokenizerFast:
    """One token a byte behind the special tokens; `<eos>` is id 0."""
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *ALPHABET])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", **options)


def llama_config(vocabulary: int, **options: Any) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **(sizes | ids | options))


def write_model(folder: Path, kind: str = "llama", tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> str:
    """A random causal model whose configuration says pad = end, with a tokenizer that pads on the left (without a pad token by default)."""
    tokenizer = tokenizer or byte_tokenizer(padding_side="left")
    torch.manual_seed(1)
    if kind == "llama":
        model: Any = LlamaForCausalLM(llama_config(len(tokenizer), **options))
    else:
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, **ids))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("causal"))


@pytest.fixture
def fresh(causal: str) -> RewardModel:
    return RewardModel.load(causal, fresh=True, device="cpu")


def batch(end: int = 0) -> Answers:
    """Three prompts with five answers of different lengths; all but the second answer end with the end token."""
    draw = torch.Generator().manual_seed(2)
    prompt_ids = torch.randint(3, 200, (3, 7), generator=draw)
    ids = torch.randint(3, 200, (5, 6), generator=draw)
    length = torch.tensor([6, 2, 1, 4, 6])
    for row in (0, 2, 3, 4):
        ids[row, length[row] - 1] = end
    return Answers(prompt_ids, torch.tensor([7, 1, 4]), ids, length, torch.tensor([0, 0, 1, 2, 2]))


def rows_of(answers: Answers) -> list[list[int]]:
    prompts = [ids[:n].tolist() for ids, n in zip(answers.prompt_ids, answers.prompt_length)]
    return [prompts[o] + ids[:n].tolist() for o, ids, n in zip(answers.owner.tolist(), answers.ids, answers.length)]


def scores_by_transformers(folder: Path | str, answers: Answers) -> Tensor:
    """What the saved folder says when only `transformers` opens it, pads with the folder's tokenizer and runs it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.pad({"input_ids": rows_of(answers)}, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[:, 0]


def randomise(model: RewardModel, seed: int = 3) -> None:
    """Gives adapters and head values that matter, as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in model.trainable():
            p.add_(torch.randn(p.shape, generator=draw) * 0.2)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-5, atol=2e-6)


# Scores -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_padded_and_saved_scores_are_those_of_transformers(kind, tmp_path):
    model = RewardModel.load(write_model(tmp_path / "lm", kind), fresh=True, device="cpu")
    answers = batch()
    packed = model.scores(answers, packed=True)
    assert packed.shape == (5,)
    assert packed.dtype == torch.float32
    assert packed.std() > 0.01
    close(model.scores(answers, packed=False), packed)
    model.save(tmp_path / "rm")
    close(scores_by_transformers(tmp_path / "rm", answers), packed)


def test_the_end_token_counts_although_the_model_came_with_pad_equal_to_end(fresh):
    answers = batch()
    ended = fresh.scores(answers)
    answers.ids[4, 5] = 77  # the last answer no longer ends
    assert not torch.isclose(fresh.scores(answers)[4], ended[4], atol=1e-4)
    close(fresh.scores(answers)[:4], ended[:4])


def test_tokens_behind_an_answer_change_nothing(fresh):
    answers = batch()
    before = fresh.scores(answers)
    for row, length in enumerate(answers.length.tolist()):
        answers.ids[row, length:] = 99
    answers.prompt_ids[1, 1:] = 99
    close(fresh.scores(answers), before)
    close(fresh.scores(answers, packed=False), before)


def test_packed_and_padded_gradients_agree(fresh):
    answers = batch()
    weight = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0])
    grads = []
    for packed in (True, False):
        fresh.zero_grad()
        (fresh.scores(answers, packed=packed) * weight).sum().backward()
        grads.append({name: p.grad.clone() for name, p in fresh.trainable() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        close(grads[0][name], grads[1][name])


def test_the_end_tokens_embedding_is_trained(fresh):
    # An embedding gives no gradient to its padding index, which in this folder's configuration is the end token.
    answers = batch()
    answers.prompt_ids[0, 2] = 0
    fresh.scores(answers).sum().backward()
    grad = fresh.model.get_input_embeddings().weight.grad
    assert grad[0].abs().max() > 0


# Heads and pad tokens ---------------------------------------------------------------------------------------------------------------------


def test_a_fresh_head_has_the_stated_scale_and_is_fixed_by_its_seed(tmp_path):
    source = write_model(tmp_path, hidden_size=256, num_attention_heads=4)
    heads = [RewardModel.load(source, fresh=True, head_seed=seed, device="cpu").model.score.weight for seed in (0, 0, 1)]
    assert heads[0].equal(heads[1])
    assert not heads[0].equal(heads[2])
    variance = heads[0].square().mean().item()
    assert variance * 257 == pytest.approx(1.0, abs=5 * math.sqrt(2 / 256))  # five standard errors of a chi-square


def test_without_a_spare_token_a_new_pad_token_is_added(fresh, causal, tmp_path):
    tokenizer = byte_tokenizer()
    assert (fresh.tokenizer.pad_token, fresh.tokenizer.pad_token_id) == ("<|pad|>", len(tokenizer))
    assert fresh.config.pad_token_id == len(tokenizer)
    assert fresh.model.get_input_embeddings().weight[-1].abs().max() == 0
    fresh.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pad_token_id"] == len(tokenizer)
    assert config["vocab_size"] == len(tokenizer) + 1
    assert config["eos_token_id"] == 0
    again = RewardModel.load(str(tmp_path), device="cpu")
    close(again.scores(batch()), fresh.scores(batch()))


@pytest.mark.parametrize("reserved", ["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>", "<unused0>"])
def test_a_reserved_token_becomes_the_pad_token(reserved, tmp_path):
    tokenizer = byte_tokenizer(("<eos>", "<bos>", reserved), bos_token="<bos>", additional_special_tokens=[reserved])
    model = RewardModel.load(write_model(tmp_path, tokenizer=tokenizer), fresh=True, device="cpu")
    assert model.tokenizer.pad_token == reserved
    assert model.config.pad_token_id == 2
    assert model.config.vocab_size == len(tokenizer)


def test_a_pad_token_of_its_own_is_kept(tmp_path):
    tokenizer = byte_tokenizer(("<eos>", "<pad>"), pad_token="<pad>")
    # The configuration says pad = end, as many do; the tokenizer knows better.
    model = RewardModel.load(write_model(tmp_path / "lm", tokenizer=tokenizer), fresh=True, device="cpu")
    assert model.config.pad_token_id == model.tokenizer.pad_token_id == 1
    model.save(tmp_path / "rm")
    close(scores_by_transformers(tmp_path / "rm", batch()), model.scores(batch()))


def test_a_foreign_model_with_pad_equal_to_end_is_read_as_transformers_reads_it(tmp_path):
    tokenizer = byte_tokenizer(pad_token="<eos>")
    torch.manual_seed(4)
    LlamaForSequenceClassification(llama_config(len(tokenizer), num_labels=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel.load(str(tmp_path), device="cpu")
    answers = batch()  # row 2 is only an end token, so that the state read is its prompt's last
    expected = scores_by_transformers(tmp_path, answers)
    close(model.scores(answers, packed=True), expected)
    close(model.scores(answers, packed=False), expected)


def test_a_trained_model_without_pad_token_gets_one_and_keeps_its_scores(tmp_path):
    torch.manual_seed(4)
    LlamaForSequenceClassification(llama_config(len(ALPHABET) + 1, num_labels=1, pad_token_id=None)).save_pretrained(tmp_path / "a")
    byte_tokenizer().save_pretrained(tmp_path / "a")
    answers = batch()
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")  # refuses batches of more than one row
    with torch.no_grad():
        expected = torch.cat([alone(input_ids=torch.tensor([row])).logits[0] for row in rows_of(answers)])
    model = RewardModel.load(str(tmp_path / "a"), device="cpu")
    close(model.scores(answers), expected)
    model.save(tmp_path / "b")
    close(scores_by_transformers(tmp_path / "b", answers), expected)


def test_a_trained_head_is_kept_even_when_a_fresh_one_is_allowed(fresh, tmp_path):
    randomise(fresh)
    fresh.save(tmp_path)
    close(RewardModel.load(str(tmp_path), fresh=True, head_seed=9, device="cpu").scores(batch()), fresh.scores(batch()))


# Adapters ---------------------------------------------------------------------------------------------------------------------------------


def test_adapters_train_with_the_head_and_are_merged_when_saved(causal, fresh, tmp_path):
    model = RewardModel.load(causal, fresh=True, lora=Lora(4, 8.0), device="cpu")
    names = [name for name, _ in model.trainable()]
    assert all("lora_" in name or "score" in name for name in names)
    assert any("score" in name for name in names)
    close(model.scores(batch()), fresh.scores(batch()))  # adapters begin at zero, the head is the same
    randomise(model)
    expected = model.scores(batch())
    assert (expected - fresh.scores(batch())).abs().min() > 1e-3
    model.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    torch.testing.assert_close(scores_by_transformers(tmp_path, batch()), expected.detach(), rtol=1e-4, atol=1e-5)
    close(model.scores(batch()), expected)  # saving leaves the adapters as they were


def test_a_causal_models_adapter_is_merged_under_a_fresh_head(causal, fresh, tmp_path):
    policy = LanguageModel.load(causal, lora=Lora(4, 8.0), device="cpu")
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(torch.randn(p.shape, generator=draw) * 0.2)
    policy.save(tmp_path / "adapter")
    merged = policy.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    by_adapter = RewardModel.load(str(tmp_path / "adapter"), fresh=True, device="cpu")
    by_weights = RewardModel.load(str(tmp_path / "merged"), fresh=True, device="cpu")
    torch.testing.assert_close(by_adapter.scores(batch()), by_weights.scores(batch()), rtol=1e-4, atol=1e-5)
    assert (by_adapter.scores(batch()) - fresh.scores(batch())).abs().max() > 1e-3
    with pytest.raises(UsageError, match="no trained one-label head"):
        RewardModel.load(str(tmp_path / "adapter"), device="cpu")


def test_a_reward_models_adapter_brings_its_head(causal, tmp_path):
    # As PEFT itself writes it: adapters and head, no weights of the base.
    base = AutoModelForSequenceClassification.from_pretrained(causal, num_labels=1)
    adapted = add_lora(base, Lora(4, 8.0))
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw) * 0.2)
    adapted.save_pretrained(tmp_path)
    byte_tokenizer(pad_token="<eos>").save_pretrained(tmp_path)
    inputs = AutoTokenizer.from_pretrained(tmp_path).pad({"input_ids": rows_of(batch())}, return_tensors="pt")
    with torch.no_grad():
        expected = adapted(**inputs).logits[:, 0]
    found = RewardModel.load(str(tmp_path), device="cpu").scores(batch())
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)


# Folders that cannot be used --------------------------------------------------------------------------------------------------------------


def test_unusable_folders_are_refused_with_what_to_do(causal, tmp_path):
    with pytest.raises(UsageError, match=r"--model .*LlamaForCausalLM has no trained one-label head.*telos train reward-model --model"):
        RewardModel.load(causal, device="cpu")
    with pytest.raises(UsageError, match=r"^--reward .*no trained one-label head"):
        load_reward(causal, device="cpu")

    LlamaForSequenceClassification(llama_config(257, num_labels=3)).save_pretrained(tmp_path / "three")
    byte_tokenizer().save_pretrained(tmp_path / "three")
    with pytest.raises(UsageError, match="3 labels; a reward model has one"):
        RewardModel.load(str(tmp_path / "three"), fresh=True, device="cpu")

    LlamaForSequenceClassification(llama_config(257, num_labels=1)).save_pretrained(tmp_path / "mute")
    with pytest.raises(UsageError, match=r"no tokenizer.*--tokenizer"):
        RewardModel.load(str(tmp_path / "mute"), device="cpu")
    with pytest.raises(UsageError, match=r"no tokenizer.*beside the weights"):
        load_reward(str(tmp_path / "mute"), device="cpu")

    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="this folder holds no model"):
        load_reward(tmp_path / "empty")


def test_weights_that_lack_a_layer_are_refused(fresh, tmp_path):
    from safetensors.torch import load_file, save_file

    fresh.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"the weights lack model.layers.1.mlp.up_proj.weight"):
        RewardModel.load(str(tmp_path), device="cpu")


# As a source of rewards -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(causal: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = RewardModel.load(causal, fresh=True, device="cpu")
    randomise(model)
    folder = tmp_path_factory.mktemp("run") / "model"
    model.tokenizer.chat_template = TEMPLATE
    model.save(folder)
    return folder


def byte_ids(text: str, end: bool, first: int = 1) -> list[int]:
    """Ids by hand: the rank of each byte's symbol, behind `first` special tokens."""
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [first + ALPHABET.index(symbol) for word, _ in symbols for symbol in word] + ([0] if end else [])


def score_row(folder: Path, ids: list[int]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.item()


def test_sampled_ids_are_scored_as_they_are(trained):
    policy = byte_tokenizer()
    source = load_reward(str(trained), policy_tokenizer=policy, device="cpu")
    assert isinstance(source, ModelReward)
    assert source.uses_ids
    assert source.name == trained.parent.name
    # The ids are not what the text would be encoded to: the ids win. One answer was cut and has no end token.
    ids = [[5, 6, 0], [7, 8]]
    scores = source.score(["ab", "ab"], ["x", "y"], ids, {})
    expected = [score_row(trained, byte_ids("ab", False) + row) for row in ids]
    assert scores.values.tolist() == pytest.approx(expected, abs=1e-5)
    assert scores.counts()["valid"] == 2
    given = source.score(["ab", "ab"], ["x", "y"], ids, {"prompt_ids": [[9, 9], [9, 9]]})
    assert given.values.tolist() == pytest.approx([score_row(trained, [9, 9, *row]) for row in ids], abs=1e-5)


def test_another_tokenizers_answers_are_encoded_anew(trained):
    policy = byte_tokenizer(("<x>", "<eos>"))  # every id is shifted by one; the end token is 1
    source = load_reward(str(trained), policy_tokenizer=policy, device="cpu")
    assert not source.uses_ids
    scores = source.score(["ab", "ab"], ["x y", "z"], [[200, 1], [201]], {})
    expected = [score_row(trained, byte_ids("ab", False) + byte_ids("x y", True)), score_row(trained, byte_ids("abz", False))]
    assert scores.values.tolist() == pytest.approx(expected, abs=1e-5)


def test_texts_without_a_policy_tokenizer_end_with_one_end_token(trained):
    source = load_reward(str(trained), device="cpu")
    scores = source.score(["ab", "ab", ""], ["x", "x<eos>", "x"], [[]] * 3, {})
    whole = score_row(trained, byte_ids("ab", False) + byte_ids("x", True))
    empty_prompt = score_row(trained, [0, *byte_ids("x", True)])  # one token must stand before the answer
    assert scores.values.tolist() == pytest.approx([whole, whole, empty_prompt], abs=1e-5)


def test_the_beginning_token_is_the_reward_models_own(tmp_path):
    tokenizer = byte_tokenizer(("<eos>", "<bos>", "<pad>"), bos_token="<bos>", pad_token="<pad>")
    post = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.backend_tokenizer.post_processor = post
    model = RewardModel.load(write_model(tmp_path / "lm", tokenizer=tokenizer), fresh=True, device="cpu")
    model.save(tmp_path / "rm")
    scores = ModelReward(model).score(["ab", "<bos>ab"], ["x", "x"], [[], []], {})
    expected = score_row(tmp_path / "rm", [1, *byte_ids("ab", False, 3), *byte_ids("x", True, 3)])
    assert scores.values.tolist() == pytest.approx([expected, expected], abs=1e-5)


def test_conversations_are_rendered_by_the_reward_models_template(trained, tmp_path):
    prompt = [{"role": "user", "content": "hi"}]
    opening = byte_ids("[user]hi", True) + byte_ids("\n[assistant]", False)
    answer = byte_ids("yo", True)
    ours = load_reward(str(trained), device="cpu")
    expected = score_row(trained, opening + answer)
    for completion in ("yo", [{"role": "assistant", "content": "yo"}]):
        assert ours.score([prompt], [completion], [[1]], {}).values.item() == pytest.approx(expected, abs=1e-5)
    # Others train on all that the template writes, here with the line break after the end token.
    foreign = RewardModel.load(str(trained), device="cpu")
    del foreign.config.telos_reward_model
    found = ModelReward(foreign).score([prompt], ["yo"], [[1]], {}).values.item()
    assert found == pytest.approx(score_row(trained, opening + answer + byte_ids("\n", False)), abs=1e-5)


def test_batches_and_shared_prompts_change_no_score(trained):
    prompts = ["a"] * 3 + ["bcd"] * 2 + ["a"]
    completions = ["one", "two two", "3", "four", "five", "one"]
    found = [
        load_reward(str(trained), batch_size=size, device="cpu").score(prompts, completions, [[]] * 6, {}).values for size in (1, 2, 4, 32)
    ]
    for other in found[1:]:
        close(other, found[0])
    assert found[0][0] == pytest.approx(found[0][5].item(), abs=1e-6)


def test_rows_that_cannot_be_scored_are_errors_and_not_cut(trained):
    source = load_reward(str(trained), policy_tokenizer=byte_tokenizer(), on_error="invalid", device="cpu")
    ids = [[5] * 60 + [0], [5, 0], [], [5] * 61 + [0]]
    scores = source.score(["abc"] * 4, ["long", "fine", "", "longer"], ids, {})
    assert scores.status.tolist() == [0, 0, 2, 2]  # the first row has exactly the 64 tokens of the context
    assert "empty answer" in scores.problem
    stops = load_reward(str(trained), policy_tokenizer=byte_tokenizer(), device="cpu")
    with pytest.raises(Failure, match=r"65 tokens, more than its context of 64.*row 1"):
        stops.score(["abc"] * 2, ["fine", "longer"], [[5, 0], ids[3]], {})


def test_a_model_that_overflows_gives_errors(trained):
    model = RewardModel.load(str(trained), device="cpu")
    with torch.no_grad():
        model.model.score.weight.fill_(math.inf)
    scores = ModelReward(model, name="broken", on_error="invalid").score(["a"], ["b"], [[]], {})
    assert scores.counts()["error"] == 1


def test_scoring_keeps_no_graph_and_an_empty_batch_has_no_scores(trained):
    source = load_reward(str(trained), device="cpu")
    assert not source.score(["a"], ["b"], [[]], {}).values.requires_grad
    assert len(source.score([], [], [], {})) == 0


def test_ids_agree_only_when_every_token_of_the_policy_does():
    plain = byte_tokenizer()
    padded = byte_tokenizer()
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    assert same_ids(plain, plain)
    assert same_ids(plain, padded)
    assert not same_ids(padded, plain)
    assert not same_ids(plain, byte_tokenizer(("<x>", "<eos>")))


def test_an_encoder_scores_texts_as_transformers_does_and_is_not_trained(tmp_path):
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    names = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=names, **special).save_pretrained(tmp_path)
    torch.manual_seed(7)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"max_position_embeddings": 16, "initializer_range": 0.5}
    encoder = BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=1, **sizes)).eval()
    encoder.save_pretrained(tmp_path)
    source = load_reward(str(tmp_path), device="cpu", batch_size=2, on_error="invalid")
    scores = source.score(["a b", "c", "a"], ["d", "a b c", "b " * 20], [[]] * 3, {})
    assert scores.status.tolist() == [0, 0, 2]
    ids = [[1, 4, 5, 2, 7, 2], [1, 6, 2, 4, 5, 6, 2]]
    kinds = [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    with torch.no_grad():
        expected = [encoder(torch.tensor([i]), token_type_ids=torch.tensor([k])).logits.item() for i, k in zip(ids, kinds)]
    assert scores.values[:2].tolist() == pytest.approx(expected, abs=1e-5)
    assert expected[0] != pytest.approx(expected[1], abs=1e-4)
    with pytest.raises(UsageError, match="does not read an answer's last token"):
        RewardModel.load(str(tmp_path), device="cpu").scores(batch())
