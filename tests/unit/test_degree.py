"""The preference-degree loss: key phrases, versions that lack them, the head that reads degrees, and that nothing of it exists where it was not asked for."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from data_fixtures import assistant, tiny_tokenizer, user, write_jsonl
from support import World, config_of, last_state, outcome, program_of, written_weights
from telos.algorithms.language import _degree
from telos.algorithms.run import resume, train
from telos.core.errors import UsageError
from telos.data.batches import Pairs
from telos.models.language import LanguageModel

SUBJECTS = ["blue sky", "green grass", "red apple", "old house", "cold water", "long road", "white cloud", "dark forest"]


def answer(first: int, count: int) -> str:
    """An answer with `count` key phrases, all of one score."""
    return " " + " and ".join(SUBJECTS[(first + k) % len(SUBJECTS)] for k in range(count)) + "."


@pytest.fixture
def rich(tmp_path: Path) -> str:
    """Pairs whose answers have three to five key phrases each."""
    rows = [{"prompt": f"Say {i}:", "chosen": answer(i, 3 + i % 3), "rejected": answer(2 * i + 1, 4 - i % 2) + " bad"} for i in range(12)]
    return str(write_jsonl(tmp_path / "rich.jsonl", rows))


def names(text: str) -> list[str]:
    return [" ".join(phrase.words) for phrase in _degree.key_phrases(text)]


# Key phrases ------------------------------------------------------------------------------------------------------------------------------


def test_key_phrases_are_runs_of_words_between_stop_words_and_punctuation_the_longest_first() -> None:
    """The opening of RAKE's own example; scores by hand: a word in phrases of length 2 alone scores 2, so the phrase 4."""
    found = _degree.key_phrases("Compatibility of systems of linear constraints over the set of natural numbers.")
    assert [(" ".join(phrase.words), phrase.score) for phrase in found] == [
        ("linear constraints", 4.0),
        ("natural numbers", 4.0),
        ("compatibility", 1.0),
        ("systems", 1.0),
        ("set", 1.0),
    ]


def test_a_words_score_is_the_mean_length_of_the_phrases_it_stands_in() -> None:
    """apples: phrases of 2, 2 and 1 words, 5/3; red and green: 2."""
    found = {" ".join(phrase.words): phrase for phrase in _degree.key_phrases("Red apples and green apples. Apples!")}
    assert {name: phrase.score for name, phrase in found.items()} == pytest.approx(
        {"red apples": 2 + 5 / 3, "green apples": 2 + 5 / 3, "apples": 5 / 3}
    )


def test_phrases_are_counted_at_every_place_and_written_as_they_stand() -> None:
    text = "Blue sky, then BLUE sky"
    (phrase,) = _degree.key_phrases(text)
    assert [text[start:end] for start, end in phrase.places] == ["Blue sky", "BLUE sky"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", []),
        ("it is what it is", []),
        ("I don't, we’ll, they've", []),
        ("the cat's paw", ["cat's paw"]),
        ("state-of-the-art method", ["state-of-the-art method"]),
        ("grey\nwall", ["grey", "wall"]),
        ("snake_case name_2 = 41", ["snake_case name_2", "41"]),
        ("Straße und Öl", ["straße und öl"]),
    ],
)
def test_contractions_are_stop_words_and_line_ends_divide(text: str, found: list[str]) -> None:
    assert names(text) == found


# Versions ---------------------------------------------------------------------------------------------------------------------------------


def test_a_version_lacks_its_share_of_the_best_phrases_and_the_blanks_before_them_and_nothing_else() -> None:
    text = "Linear constraints:  the set of\tnatural numbers,\n    indented  twice."
    assert names(text) == ["linear constraints", "natural numbers", "indented twice", "set"]
    assert [_degree.degraded(text, d, 4) for d in range(4)] == [
        text,
        ":  the set of\tnatural numbers,\n    indented  twice.",
        ":  the set of,\n    indented  twice.",
        ":  the set of,\n.",
    ]


def is_subsequence(short: str, long: str) -> bool:
    letters = iter(long)
    return all(letter in letters for letter in short)


def test_each_version_is_what_is_left_of_the_one_before() -> None:
    rng = random.Random(0)
    words = ["the", "of", "and", "blue", "sky", "tree", "it", "green", ".", ",", "\n", "is", "river", "Sky", "don't", "9"]
    for _ in range(200):
        text, levels = " ".join(rng.choices(words, k=rng.randint(0, 30))), rng.randint(2, 7)
        total = len(_degree.key_phrases(text))
        found = [_degree.degraded(text, d, levels) for d in range(levels)]
        assert found[0] == text
        for d in range(1, levels):
            assert is_subsequence(found[d], found[d - 1])
            assert (found[d] == found[d - 1]) == (d * total // levels == (d - 1) * total // levels), "it shrinks where the share grows"
        assert _degree.key_phrases(found[-1]) or not total, "something is left in the last one"


def test_a_degree_that_takes_no_more_away_has_no_version() -> None:
    assert _degree.versions(" blue sky and green grass.", 4) == [" blue sky and green grass.", None, " and green grass.", None]
    assert _degree.versions("Yes.", 3) == ["Yes.", None, None]
    assert None not in _degree.versions(answer(0, 4), 4)


def test_of_a_conversation_the_assistants_words_go_and_the_users_stay() -> None:
    talk = [assistant("blue sky and green grass"), user("blue sky?"), assistant("red apple and old house")]
    found = _degree.versions(talk, 2)
    assert found[0] is talk
    assert found[1] == [assistant(" and green grass"), user("blue sky?"), assistant(" and old house")]
    assert talk[0] == assistant("blue sky and green grass"), "the given messages are left as they are"


def drawn(program: Any, batch: Pairs) -> list[tuple[int, int, int, str]]:
    """(row, side, degree, text) of each version that the batch shows to the head."""
    answers = _degree.drawn_versions(batch)
    assert batch.degree is not None
    texts = program.model.tokenizer.batch_decode([ids[:n] for ids, n in zip(answers.ids.tolist(), answers.length.tolist(), strict=True)])
    return [(row, side, int(batch.degree[i, side]), texts[2 * i + side]) for i, row in enumerate(batch.row.tolist()) for side in (0, 1)]


@pytest.mark.parametrize("conversational", [False, True])
def test_what_the_head_is_shown_is_the_version_of_the_drawn_degree_with_its_end_token(
    world: World, rich: str, tmp_path: Path, conversational: bool
) -> None:
    rows = [json.loads(line) for line in Path(rich).read_text(encoding="utf-8").splitlines()]
    data, model = rich, world.model
    if conversational:
        talks = [{"prompt": [user(r["prompt"])], **{s: [assistant(r[s].strip())] for s in _degree.SIDES}} for r in rows]
        data, model = str(write_jsonl(tmp_path / "talks.jsonl", talks)), world.chat_model
    program = program_of("spo-degree", world.options("pairs", data=data, model=model, loss_degree_levels=5), tmp_path / "run")
    seen = set()
    for step in range(10):
        program._step = step
        for row, side, degree, text in drawn(program, program.batch(program.table, range(12))):
            given = rows[row][_degree.SIDES[side]]
            assert text == _degree.degraded(given.strip() if conversational else given, degree, 5) + "<|im_end|>"
            seen.add((row, side, degree))
    assert len({degree for *_, degree in seen}) == 5
    assert len(seen) > 60


def test_degrees_are_drawn_alike_from_those_that_have_a_version_and_by_the_labels_alone() -> None:
    count = 3000
    ends = torch.tensor([[4, 4, 6, 6, 9, 10, 11, 12]]).expand(count, -1)  # chosen: degrees 0 and 2; rejected: all four
    empty = torch.zeros(count, 1, dtype=torch.int64)
    ids: dict[str, Any] = {
        f"{side}_{kind}": empty if kind == "ids" else empty[:, 0] for side in ("prompt", *_degree.SIDES) for kind in ("ids", "length")
    }
    batch = Pairs(**ids, margin=torch.zeros(count), row=empty[:, 0], version_ends=ends, batch_size=[count])

    def degrees(seed: int, *labels: str | int) -> Tensor:
        found = _degree.draw(batch, seed, *labels).degree
        assert found is not None
        return found

    degree = degrees(7, "step", 0)
    chosen, rejected = (torch.bincount(degree[:, side], minlength=4) / count for side in (0, 1))
    np.testing.assert_allclose(chosen, [0.5, 0, 0.5, 0], atol=0.04)
    np.testing.assert_allclose(rejected, [0.25] * 4, atol=0.04)
    assert torch.equal(degree, degrees(7, "step", 0))
    assert not torch.equal(degree, degrees(7, "step", 1))
    assert not torch.equal(degree, degrees(8, "step", 0))


@pytest.mark.filterwarnings("ignore::telos.core.errors.TelosWarning")
def test_cut_answers_keep_within_the_models_context(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * n, "chosen": answer(0, 8) * 3, "rejected": answer(3, 4)} for n in (1, 30, 90, 3)]
    data = str(write_jsonl(tmp_path / "long.jsonl", rows))
    program = program_of("spo-degree", world.options("pairs", data=data, on_bad_row="error"), tmp_path / "run")
    for step in range(3):
        assert np.isfinite(program.step(step)["degree/loss"])
    batch = program.batch(program.table, range(4))
    answers = _degree.drawn_versions(batch)
    assert int((answers.prompt_length[answers.owner] + answers.length).max()) <= program.model.context


# The head and its loss --------------------------------------------------------------------------------------------------------------------


def seq2seq(folder: Path) -> str:
    """A folder with a random encoder–decoder on the tests' tokenizer."""
    torch.manual_seed(0)
    words: Any = tiny_tokenizer()
    config = T5Config(
        vocab_size=len(words),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    config.decoder_start_token_id = words.pad_token_id
    T5ForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def last_state_of(model: LanguageModel, prompt: list[int], tokens: list[int]) -> Tensor:
    """The hidden state that predicts the last of `tokens`, of this answer alone, by the library's own forward pass."""
    if model.is_encoder_decoder:
        start = [model.config.decoder_start_token_id, *tokens[:-1]]
        out = model.model(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([start]), output_hidden_states=True)
        return out.decoder_hidden_states[-1][0, -1]
    return model.model(input_ids=torch.tensor([prompt + tokens[:-1]]), output_hidden_states=True).hidden_states[-1][0, -1]


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
def test_the_loss_is_the_cross_entropy_of_the_state_at_each_versions_end(world: World, rich: str, tmp_path: Path, kind: str) -> None:
    model = world.model if kind == "decoder" else seq2seq(tmp_path / "t5")
    program = program_of("spo-degree", world.options("pairs", data=rich, model=model, loss_degree=0.7), tmp_path / "run")
    batch = program.batch(program.table, range(5))
    found = _degree.losses(program.model, batch, 0.7)
    answers, head = _degree.drawn_versions(batch), program.model.get_submodule("degree")
    entropy = []
    for i in range(10):
        prompt = batch.prompt_ids[i // 2, : batch.prompt_length[i // 2]].tolist()
        logits = head(last_state_of(program.model, prompt, answers.ids[i, : answers.length[i]].tolist()))
        entropy.append((logits.logsumexp(0) - logits[batch.degree.flatten()[i]]).item())
    wanted = np.array(entropy).reshape(5, 2).mean(1)
    np.testing.assert_allclose(found.values.detach().numpy(), 0.7 * wanted, rtol=2e-4)
    np.testing.assert_allclose(found.metrics["degree/loss"].detach().numpy(), wanted, rtol=2e-4)  # type: ignore[union-attr]
    found.values.sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in head.parameters())
    inner = [p.grad for name, p in program.model.named_parameters() if not name.startswith("degree.")]
    assert any(grad is not None and bool((grad != 0).any()) for grad in inner), "the model itself is taught"
    program.step(0)


def test_the_head_learns_to_tell_degrees(world: World, rich: str, tmp_path: Path) -> None:
    settings = {"steps": 40, "batch_size": 12, "learning_rate": 5e-3, "lr_schedule": "constant"}
    program = program_of("spo-degree", world.options("pairs", data=rich, loss_degree=1.0, loss_degree_levels=3, **settings), tmp_path)
    rows = [program.step(i) for i in range(40)]
    first, last = ({name: np.mean([row[name] for row in part]) for name in rows[0]} for part in (rows[:8], rows[-8:]))
    assert abs(first["degree/accuracy"] - 1 / 3) < 0.15, "three degrees, guessed"
    assert last["degree/accuracy"] > 0.8
    assert last["degree/loss"] < 0.5 * np.log(3)


def test_the_heads_start_depends_on_the_seed_alone(world: World, rich: str, tmp_path: Path) -> None:
    heads = []
    for i, changes in enumerate(({"seed": 1}, {"seed": 1, "lora_rank": 2}, {"seed": 2})):
        program = program_of("spo-degree", world.options("pairs", data=rich, **changes), tmp_path / f"{i}")
        heads.append(program.model.get_submodule("degree").weight.detach().clone())
    assert heads[0].shape == (4, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_with_adapters_the_adapters_and_the_head_are_trained(world: World, rich: str, tmp_path: Path) -> None:
    program = program_of("spo-degree", world.options("pairs", data=rich, lora_rank=2), tmp_path)
    before = {name: p.detach().clone() for name, p in program.model.named_parameters()}
    for i in range(2):
        program.step(i)
    moved = {name for name, p in program.model.named_parameters() if not torch.equal(p, before[name])}
    assert {"degree.weight", "degree.bias"} < moved
    assert all("lora_" in name for name in moved - {"degree.weight", "degree.bias"})


def test_held_out_rows_are_always_shown_at_the_same_degrees(world: World, rich: str, tmp_path: Path) -> None:
    program = program_of("spo-degree", world.options("pairs", data=rich, eval_data=rich, learning_rate=0.0), tmp_path)
    found = []
    for step in range(3):
        program.step(step)
        found.append(program.evaluate()["eval/degree/loss"])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_that_was_killed_continues_bit_for_bit_with_its_head(world: World, rich: str, tmp_path: Path, rank: int) -> None:
    class Killed(BaseException):
        pass

    class Kill:
        def started(self, run: Any, program: Any, first: int, total: int) -> None: ...

        def stepped(self, step: int, metrics: Any) -> None:
            if step == 3:
                raise Killed

        def ended(self, status: str) -> None: ...

    options = world.options("pairs", data=rich, eval_data=rich, eval_every=2, steps=5, loss_degree=0.3, checkpoint_every=2, lora_rank=rank)
    whole = train("simpo", options | {"out": str(tmp_path / "whole")})
    with pytest.raises(BaseException):  # noqa: B017
        train("simpo", options | {"out": str(tmp_path / "killed")}, callbacks=[Kill()])
    resumed = resume(tmp_path / "killed")
    assert outcome(resumed) == outcome(whole)
    assert last_state(resumed) == last_state(whole)
    assert "degree.weight" in last_state(whole)[1]["program"]["learner"]["weights"]


def test_the_model_is_written_without_the_head(world: World, rich: str, tmp_path: Path) -> None:
    plain = train("dpo", world.options("pairs", data=rich, steps=1, out=str(tmp_path / "plain")))
    taught = train("dpo", world.options("pairs", data=rich, steps=1, loss_degree=0.3, out=str(tmp_path / "taught")))
    with_head, without = (set(written_weights(run.path / "model")) for run in (taught, plain))
    assert with_head == without
    LanguageModel.load(str(taught.path / "model"))


# An option of every pairwise method ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["dpo", "simpo", "ipo", "hypo", "srpo"])
def test_it_is_added_to_any_pairwise_loss(world: World, rich: str, tmp_path: Path, key: str) -> None:
    first = []
    for weight in (0.0, 0.3):
        first.append(program_of(key, world.options("pairs", data=rich, loss_degree=weight), tmp_path / f"{weight}").step(0))
    assert first[1]["loss"] == pytest.approx(first[0]["loss"] + 0.3 * first[1]["degree/loss"], rel=1e-6)
    assert first[1].keys() - first[0].keys() == {"degree/loss", "degree/accuracy"}


def test_spo_degree_is_dpo_with_it(world: World, rich: str, tmp_path: Path) -> None:
    ours = train("spo-degree", world.options("pairs", data=rich, loss_degree=0.2, out=str(tmp_path / "ours")))
    theirs = train("dpo", world.options("pairs", data=rich, loss_degree=0.2, out=str(tmp_path / "theirs")))
    assert outcome(ours) == outcome(theirs)


def test_it_composes_with_reward_augmented_pairs(world: World, tmp_path: Path) -> None:
    options = world.options("pairs", loss_degree=0.2, data_reward_augmented=True)
    program = program_of("dpo", options, tmp_path)
    assert len(program.table) == 24
    assert np.isfinite(program.step(0)["degree/loss"])


def test_the_cache_of_the_reference_moves_no_draw(world: World, rich: str, tmp_path: Path) -> None:
    """The reference's log-probabilities are asked for before the first step; the degrees of the steps stay the same."""
    found = []
    for cache in ({}, {"reference_cache": str(tmp_path / "cache")}):
        program = program_of("dpo", world.options("pairs", data=rich, loss_degree=0.2, **cache), tmp_path / f"{len(found)}")
        found.append([program.step(i)["degree/loss"] for i in range(2)])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_without_it_nothing_of_it_exists(world: World, rich: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("the degree loss was not asked for")

    for name in ("versions", "with_versions", "draw", "add_head", "losses"):
        monkeypatch.setattr(_degree, name, forbidden)
    program = program_of("dpo", world.options("pairs", data=rich), tmp_path)
    program.step(0)
    assert [name for name, _ in program.model.named_children()] == ["model"]
    assert not [name for name in program.table.columns if name.startswith("version")]
    assert program.batch(program.table, [0]).degree is None


@pytest.mark.parametrize(
    ("key", "options", "message"),
    [
        ("dpo", {"loss_degree_levels": 3}, "--loss_degree_levels has no effect while --loss_degree is 0"),
        ("dpo", {"loss_degree": -0.1}, "--loss_degree -0.1 must be >= 0"),
        ("simpo", {"loss_degree": 0.1, "loss_degree_levels": 1}, "--loss_degree_levels 1 must be >= 2"),
        ("spo-degree", {"loss_degree": 0.0}, "plain dpo"),
        ("spo-degree", {"loss_degree": 0.0, "loss_degree_levels": 3}, "plain dpo"),
    ],
)
def test_options_that_say_nothing_are_refused(world: World, key: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        config_of(key, world.options("pairs", **options))
