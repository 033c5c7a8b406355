"""Steps found on tokens, models that score them, and training such a model from labelled steps."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from data_fixtures import tiny_tokenizer, write_jsonl
from support import World, make_model, program_of
from telos.algorithms.language._loop_process import layout
from telos.algorithms.run import train
from telos.core.errors import DataError, UsageError
from telos.data.batches import Rollouts
from telos.environments.text.arith import TESTBED, split_steps
from telos.models.language import LanguageModel, load_tokenizer
from telos.models.packing import Answers
from telos.objectives.process_reward import (
    Cut,
    ProcessReward,
    ProcessRewardModel,
    StepLogRatios,
    StepProbabilities,
    StepProgress,
    load_process_reward,
    step_ends,
    token_texts,
)

TINYLM = load_tokenizer("tinylm")
WORDS = tiny_tokenizer()


def pieces(tokenizer: Any, ids: list[int], cut: Cut = Cut()) -> list[str]:  # noqa: B008
    """The texts of an answer's steps, as their tokens cut it."""
    texts, start, found = token_texts(tokenizer, ids), 0, []
    for end in step_ends(tokenizer, ids, cut):
        found.append("".join(texts[start : end + 1]))
        start = end + 1
    return found


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# Steps -------------------------------------------------------------------------------------------------------------------------------------


def check_against_arith(text: str) -> None:
    """The steps before the answer are arith's, and the answer is one more."""
    found = pieces(TINYLM, encode(TINYLM, text))
    wanted = [span.text for span in split_steps(text)]
    assert "".join(found) == text
    work = found[:-1] if "Answer:" in text else found
    assert [piece.strip(" ;.\n") for piece in work] == [piece.strip(" ") for piece in wanted]
    if "Answer:" in text:
        assert found[-1].lstrip().startswith("Answer:")


def test_steps_on_tokens_are_ariths_steps_and_its_answer() -> None:
    for item in TESTBED.items("train", 60, 0):
        check_against_arith(item.reference)
    for document in TESTBED.corpus(60, 1):
        check_against_arith(document.partition("Steps:")[2] or " Answer: 1")


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(["1 + 2 = 3", " 14 * 3 = 42", "so", ";", "; ", ".", "\n", " ", " Answer:", " 7"]), min_size=1, max_size=12))
def test_steps_on_tokens_are_ariths_steps_in_texts_of_any_shape(parts: list[str]) -> None:
    text = "".join(parts)
    if not split_steps(text) and "Answer:" not in text:
        return
    found = pieces(WORDS, encode(WORDS, text))  # a token a byte, so that no token holds two steps
    work = found[:-1] if "Answer:" in text else found
    assert [piece.strip(" ;.\n") for piece in work] == [span.text for span in split_steps(text)]


def test_a_separator_belongs_to_the_step_that_it_ends_and_blanks_to_the_next_one() -> None:
    assert pieces(WORDS, encode(WORDS, " a; b ;; c.\n Answer: 1. 2; 3 ")) == [" a;", " b ;", "; c.", "\n Answer: 1. 2; 3 "]
    assert pieces(WORDS, encode(WORDS, "a; b; \n")) == ["a;", " b; \n"], "what is blank at the end belongs to the last step"
    assert pieces(WORDS, encode(WORDS, "a. b Answer: c"), Cut(answer="")) == ["a.", " b Answer: c"]
    assert pieces(WORDS, encode(WORDS, "a\nb\n\nc d"), Cut(("\n\n",), "")) == ["a\nb\n\n", "c d"]


def test_an_end_token_belongs_to_no_step_and_an_answer_without_text_is_one_step() -> None:
    end = WORDS.eos_token_id
    ids = encode(WORDS, "a;b")
    assert step_ends(WORDS, [*ids, end]) == step_ends(WORDS, ids) == [1, 2]
    assert step_ends(WORDS, [end]) == [0]
    assert step_ends(WORDS, [*encode(WORDS, " \n "), end]) == [3]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.integers(0, 3))
def test_the_texts_of_tokens_are_what_the_tokenizer_decodes(text: str, cut: int) -> None:
    """Also where a character is several tokens, and where the last one lacks some of them."""
    for tokenizer in (WORDS, TINYLM):
        ids = encode(tokenizer, text)
        ids = [*ids[: len(ids) - cut], tokenizer.eos_token_id]
        assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_a_character_of_several_tokens_is_added_by_the_last() -> None:
    ids = encode(WORDS, "a→b")
    assert len(ids) > 3
    assert token_texts(WORDS, ids) == ["a", *[""] * (len(ids) - 3), "→", "b"]


@pytest.mark.parametrize("separators", [(), ("",), (";", "")])
def test_separators_that_cannot_cut_are_refused(separators: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="at least one separator"):
        Cut(separators)


# Models ------------------------------------------------------------------------------------------------------------------------------------

TEXTS = [(" a; bc. Answer: d", True), (" no step", True), ("; x;", False), (" e.f.", True), ("", True)]


def batch(prompts: tuple[str, ...] = ("The sky is", "hello")) -> Answers:
    """Five answers to two prompts; all but the third end."""
    rows = [torch.tensor([*encode(WORDS, text), *([WORDS.eos_token_id] if ended else [])]) for text, ended in TEXTS]
    asked = [torch.tensor(encode(WORDS, prompt)) for prompt in prompts]
    return Answers(
        torch.nn.utils.rnn.pad_sequence(asked, batch_first=True),
        torch.tensor([len(ids) for ids in asked]),
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=99),
        torch.tensor([len(ids) for ids in rows]),
        torch.tensor([0, 0, 0, 1, 1]),
    )


def rollouts(answers: Answers) -> Rollouts:
    n, width = answers.ids.shape
    zeros = torch.zeros(n)
    return Rollouts(
        prompt_ids=answers.prompt_ids[answers.owner],
        prompt_length=answers.prompt_length[answers.owner],
        completion_ids=answers.ids,
        completion_length=answers.length,
        action_mask=answers.mask,
        logprobs=torch.zeros(n, width),
        ended=torch.ones(n, dtype=torch.bool),
        group=answers.owner,
        reward=zeros,
        reward_status=torch.zeros(n, dtype=torch.int8),
        temperature=zeros + 1,
        weight_version=torch.zeros(n, dtype=torch.int64),
        row=answers.owner,
        batch_size=[n],
    )


def whole_rows(answers: Answers) -> list[list[int]]:
    prompts = [ids[:n].tolist() for ids, n in zip(answers.prompt_ids, answers.prompt_length)]
    return [prompts[o] + ids[:n].tolist() for o, ids, n in zip(answers.owner.tolist(), answers.ids, answers.length)]


@pytest.fixture(scope="module")
def judge(world: World) -> ProcessRewardModel:
    model = ProcessRewardModel.load(world.reward_model, device="cpu")
    assert isinstance(model, ProcessRewardModel)
    return model


@pytest.fixture(scope="module")
def policy(world: World) -> LanguageModel:
    return LanguageModel.load(world.model, device="cpu")


def by_transformers(folder: str, answers: Answers, places: list[list[int]]) -> list[list[float]]:
    """The head's numbers at places in the answers, row by row, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    found = []
    for ids, own, at in zip(whole_rows(answers), answers.prompt_length[answers.owner].tolist(), places, strict=True):
        with torch.no_grad():
            states = model.model(torch.tensor([ids])).last_hidden_state[0]
            found.append([float(model.score(states[own + place])) for place in at])
    return found


def ends_of(answers: Answers) -> list[list[int]]:
    return [step_ends(WORDS, ids[:n].tolist()) for ids, n in zip(answers.ids, answers.length)]


def listed(values: Tensor, places: list[list[int]]) -> list[list[float]]:
    return [row[at].tolist() for row, at in zip(values, places, strict=True)]


def flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([value for row in rows for value in row])


def test_steps_are_read_at_their_last_tokens_as_transformers_reads_them(world: World, judge: ProcessRewardModel, tmp_path: Path) -> None:
    answers = batch()
    places = torch.tensor([[-1, 0, 3], [-1, 1, 2], [0, 1, 2], [-1, 2, 4], [-1, 0, 0]])
    packed, padded = (judge.steps(answers, places, packed=way) for way in (True, False))
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-5)
    judge.save(tmp_path / "saved")
    for folder in (world.reward_model, str(tmp_path / "saved")):
        torch.testing.assert_close(packed.flatten().detach(), flat(by_transformers(folder, answers, places.tolist())), rtol=1e-4, atol=1e-5)


def test_probabilities_stand_at_steps_last_tokens_and_nowhere_else(world: World, judge: ProcessRewardModel) -> None:
    answers, places = batch(), ends_of(batch())
    scores, at_end = StepProbabilities(judge).score_rollouts(rollouts(answers))
    assert scores.shape == at_end.shape == answers.ids.shape
    wanted = torch.zeros_like(at_end)
    for i, at in enumerate(places):
        wanted[i, at] = True
    assert torch.equal(at_end, wanted)
    assert (scores[~at_end] == 0).all()
    expected = flat(by_transformers(world.reward_model, answers, places)).sigmoid()
    torch.testing.assert_close(flat(listed(scores, places)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("knows_prompts", [False, True])
def test_progress_is_the_change_of_the_chance_from_the_prompt_on_where_the_model_knows_prompts(
    world: World, knows_prompts: bool, tmp_path: Path
) -> None:
    model: Any = ProcessRewardModel.load(world.reward_model, device="cpu")
    model.values_prompts = knows_prompts
    model.save(tmp_path / "model")
    again: Any = ProcessRewardModel.load(str(tmp_path / "model"), device="cpu")
    assert again.values_prompts == knows_prompts, "the folder remembers"
    answers, places = batch(), ends_of(batch())
    scores, _ = StepProgress(again).score(answers).dense()
    values = by_transformers(world.reward_model, answers, [[-1, *at] for at in places])
    for row, at, (first, *rest) in zip(scores, places, values, strict=True):
        chances = torch.tensor([first if knows_prompts else -100.0, *rest]).sigmoid()
        torch.testing.assert_close(row[at], chances.diff(), rtol=1e-3, atol=1e-5)
        assert float(row.sum()) == pytest.approx(float(chances[-1] - chances[0]), abs=1e-5)


def token_logprobs(folder: str, answers: Answers) -> list[Tensor]:
    """log π of each answer's tokens by transformers alone."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder), []
    for ids, own in zip(whole_rows(answers), answers.prompt_length[answers.owner].tolist(), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(logprobs[torch.arange(own - 1, len(ids) - 1), torch.tensor(ids[own:])])
    return found


def test_implicit_rewards_are_the_log_ratios_of_steps_and_add_up_to_that_of_the_answer(world: World, policy: LanguageModel) -> None:
    answers, places = batch(), ends_of(batch())
    guide: Any = load_process_reward(f"implicit:{world.other_model},{world.model}", policy, beta=0.3)
    assert isinstance(guide, StepLogRatios)
    scores, _ = guide.score(answers).dense()
    both = zip(token_logprobs(world.other_model, answers), token_logprobs(world.model, answers), strict=True)
    for row, at, (mine, theirs) in zip(scores, places, both, strict=True):
        gain = 0.3 * (mine - theirs)
        starts = [0, *(end + 1 for end in at[:-1]), len(gain)]
        wanted = torch.stack([gain[a:b].sum() for a, b in itertools.pairwise(starts)])
        torch.testing.assert_close(row[at], wanted, rtol=1e-3, atol=1e-4)
        assert float(row.sum()) == pytest.approx(float(gain.sum()), abs=1e-3), "the end token counts with the last step"


def test_the_reference_that_is_not_named_is_the_policy_as_it_is_now(world: World) -> None:
    policy = LanguageModel.load(world.model, device="cpu")
    guide: Any = load_process_reward(f"implicit:{world.other_model}", policy)
    named: Any = load_process_reward(f"implicit:{world.other_model},{world.model}", policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(guide.score(batch()).values, named.score(batch()).values)
    assert guide.beta == 0.05


@pytest.mark.parametrize("kind", ["", "value:", "implicit:"])
def test_batches_of_answers_and_what_stands_behind_them_change_no_score(world: World, policy: LanguageModel, kind: str) -> None:
    spec = kind + (world.other_model if kind == "implicit:" else world.reward_model)
    found = []
    for size, rubbish in ((32, 99), (2, 7), (1, 0)):
        answers = batch()
        for row, length in enumerate(answers.length.tolist()):
            answers.ids[row, length:] = rubbish
        guide = load_process_reward(spec, policy, batch_size=size)
        assert isinstance(guide, ProcessReward)
        scores = guide.score(answers)
        assert not scores.values.requires_grad
        found.append(scores)
    for other in found[1:]:
        torch.testing.assert_close(other.values, found[0].values, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.mask, found[0].mask)


def test_tokens_that_the_tokenizer_would_never_write_are_scored_as_they_are(world: World, judge: ProcessRewardModel) -> None:
    """Two ways to write one text: what was sampled is what is read."""
    answers = batch()
    other = encode(WORDS, "good")
    assert len(other) < 4
    split = [token for letter in "good" for token in encode(WORDS, letter)]
    found = []
    for ids in (other, split):
        one = Answers(answers.prompt_ids[:1], answers.prompt_length[:1], torch.tensor([ids]), torch.tensor([len(ids)]), torch.tensor([0]))
        (wanted,) = by_transformers(world.reward_model, one, [[len(ids) - 1]])
        found.append(float(StepProbabilities(judge).score(one).values[0, 0]))
        assert found[-1] == pytest.approx(float(torch.tensor(wanted).sigmoid()[0]), abs=1e-5)
    assert found[0] != found[1]


# From a specification ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("implicit:", "is incomplete"),
        ("implicit:a,", "is incomplete"),
        ("implicit:a,b,c", "is incomplete"),
        ("value:", "is incomplete"),
        ("", "is incomplete"),
        (3, "a int scores no steps"),
        ("value:/nowhere/at/all", "loaded from ./nowhere/at/all"),
        ("implicit:/nowhere/at/all", "loaded from ./nowhere/at/all"),
    ],
)
def test_what_names_no_process_reward_is_refused(policy: LanguageModel, spec: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_process_reward(spec, policy)


def test_a_beta_without_effect_a_causal_model_and_another_vocabulary_are_refused(
    world: World, policy: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="beta scales implicit rewards alone"):
        load_process_reward(world.reward_model, policy, beta=0.1)
    with pytest.raises(UsageError, match="beta must be > 0"):
        load_process_reward(f"implicit:{world.model}", policy, beta=0.0)
    with pytest.raises(UsageError, match="has no trained one-label head"):
        load_process_reward(f"value:{world.model}", policy)
    with pytest.raises(UsageError, match="another vocabulary"):
        load_process_reward("implicit:tinylm", policy)


def test_a_process_reward_is_returned_as_it_is(judge: ProcessRewardModel, policy: LanguageModel) -> None:
    guide = StepProbabilities(judge)
    assert load_process_reward(guide, policy) is guide


# Training ----------------------------------------------------------------------------------------------------------------------------------


def steps_file(folder: Path, rows: list[dict[str, Any]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(write_jsonl(folder / "steps.jsonl", [{"prompt": "What is good?"} | row for row in rows]))


def columns(world: World, folder: Path, rows: list[dict[str, Any]], **options: Any) -> dict[str, list[list[float]]]:
    """The labels and the texts of the steps that a program learns from."""
    program = program_of(
        "process-reward",
        {"model": world.model, "device": "cpu", "data": steps_file(folder, rows), "batch_size": len(rows), **options},
        folder / "run",
    )
    table, texts = program.table, []
    for ids, ends in zip(table.columns["completion_ids"], table.columns["step_ends"], strict=True):
        starts = [0, *(int(end) + 1 for end in ends)]
        texts.append([WORDS.decode(ids[a : int(b) + 1]) for a, b in zip(starts, ends)])
    return {
        "labels": [list(map(float, row)) for row in table.columns["step_labels"]],
        "texts": texts,
        "ends": [list(e) for e in table.columns["step_ends"]],
    }


ROW = {"completions": ["a;", "b", "c"], "labels": [0.75, 0.25, 0.5]}


def test_steps_are_closed_by_the_option_by_the_rows_or_by_a_new_line(world: World, tmp_path: Path) -> None:
    assert columns(world, tmp_path / "1", [ROW])["texts"] == [["a;\n", "b\n", "c\n"]]
    assert columns(world, tmp_path / "2", [ROW | {"step_separator": ""}])["texts"] == [["a;", "b", "c"]]
    assert columns(world, tmp_path / "3", [ROW | {"step_separator": ""}], step_separator=";")["texts"] == [["a;", "b;", "c;"]]
    with pytest.raises(UsageError, match="different step_separator"):
        columns(world, tmp_path / "4", [ROW, ROW | {"step_separator": ""}])


def test_labels_may_be_hardened_and_steps_behind_a_mistake_left_out(world: World, tmp_path: Path) -> None:
    rows = [ROW, {"completions": ["a", "b", "c"], "labels": [1, 0, 1]}]
    assert columns(world, tmp_path / "1", rows)["labels"] == [[0.75, 0.25, 0.5], [1, 0, 1]]
    assert columns(world, tmp_path / "2", rows, hard_labels=True)["labels"] == [[1, 1, 1], [1, 0, 1]]
    assert columns(world, tmp_path / "3", rows, until_mistake=True)["labels"] == [[0.75, 0.25], [1, 0]]
    assert columns(world, tmp_path / "4", rows, until_mistake=True, hard_labels=True)["labels"] == [[1, 1, 1], [1, 0]]


def test_a_prompts_label_is_learned_at_its_last_token_and_the_folder_says_so(world: World, tmp_path: Path) -> None:
    found = columns(world, tmp_path / "1", [ROW | {"prompt_label": 0.4}])
    assert found["labels"] == [[0.4, 0.75, 0.25, 0.5]]
    assert found["ends"][0][0] == -1
    for bad in (None, True, 1.5, "x"):
        with pytest.raises((UsageError, DataError), match="prompt_label must be a number"):
            columns(world, tmp_path / f"bad {bad}", [ROW | {"prompt_label": 0.4}, ROW | {"prompt_label": bad}])
    for i, rows in enumerate(([ROW], [ROW | {"prompt_label": 0.4}])):
        options = {"model": world.model, "device": "cpu", "data": steps_file(tmp_path / f"d{i}", rows), "batch_size": 1, "steps": 1}
        run = train("process-reward", options | {"out": str(tmp_path / f"run{i}")})
        assert json.loads((run.path / "model" / "config.json").read_text()).get("telos_values_prompts", False) == bool(i)


def test_a_prompts_label_counts_in_the_loss_and_in_no_metric_of_steps(world: World, tmp_path: Path) -> None:
    options = {"model": world.model, "device": "cpu", "batch_size": 1, "data": steps_file(tmp_path, [ROW | {"prompt_label": 0.0}])}
    program = program_of("process-reward", options, tmp_path / "run")
    part = program.batch(program.table, [0])
    assert program.denominators(part).tokens == 4
    losses = program.losses(program.model, part)
    _, judged = losses.metrics["steps/accuracy"]
    assert judged.tolist() == [[False, True, True, True]]
    assert losses.mask is not None
    assert losses.mask.all()
    logits = program.model.steps(layout(part), part.step_ends)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([[0.0, 0.75, 0.25, 0.5]]), reduction="none")
    torch.testing.assert_close(losses.values, wanted)


def test_steps_that_can_be_told_apart_are_learned(world: World, tmp_path: Path) -> None:
    rows = [
        {"completions": steps, "labels": [float("good" in step) for step in steps]}
        for steps in (["good", "bad", "good x"], ["bad", "good"])
    ]
    data = steps_file(tmp_path, [{"prompt": prompt} | row for prompt in ("hello", "a") for row in rows])
    options = {"model": world.model, "device": "cpu", "data": data, "eval_data": data, "batch_size": 4, "steps": 25, "learning_rate": 1e-2}
    run = train("process-reward", options | {"out": str(tmp_path / "run"), "checkpoint_every": 0})
    first, last = run.metrics()[0], run.metrics()[-1]
    assert last["eval/steps/accuracy"] == last["eval/steps/auc"] == last["eval/steps/order"] == 1.0
    assert last["eval/loss"] < 0.3 * first["loss"]
    assert last["eval/steps/calibration_error"] == pytest.approx(1 - last["eval/steps/right"], abs=0.1)
    policy = LanguageModel.load(str(make_model(tmp_path / "again")), device="cpu")
    guide = load_process_reward(str(run.path / "model"), policy, cut=Cut(("\n",), ""))
    ids = torch.tensor([encode(WORDS, "good\nbad\n")])
    answers = Answers(
        torch.tensor([encode(WORDS, "hello")]),
        torch.tensor([len(encode(WORDS, "hello"))]),
        ids,
        torch.tensor([ids.shape[1]]),
        torch.tensor([0]),
    )
    right, wrong = guide.score(answers).values[0].tolist()
    assert right > 0.5 > wrong
