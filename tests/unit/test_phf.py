"""Pretraining with human feedback on text: segments, their scores, control tokens that become tokens of the model, and rows as each objective wants them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_fixtures import assistant, tiny_tokenizer, user, write_jsonl
from support import PROMPTS, World, numbers, outcome, program_of
from telos.algorithms.language import phf
from telos.algorithms.run import resume, train
from telos.core.errors import DataError, TelosWarning, UsageError
from telos.data.segments import By, learned_texts, split, with_learned_texts
from telos.models.language import LanguageModel
from telos.models.vocabulary import grow

WORDS = tiny_tokenizer()
SCORED = ["mean. Nice one! So. ", "nice. ", "mean? mean.", "nice nice"]  # documents; a segment is good if it says nice
TEXTS = [text * 2 for text in SCORED] + ["a nice. B. c mean. d nice! ", "x", "nice.\n\nmean.\nnice", "mean"]


def ids(text: str) -> list[int]:
    return WORDS(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    reward = tmp_path / "nice.py"
    reward.write_text(
        "def nice(prompts, completions, **columns):\n    return [float('nice' in c.lower()) - float('mean' in c) for c in completions]\n"
    )
    rows = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    return {"data": str(rows), "reward": f"{reward}:nice"}


def program(world: World, folder: Path, files: dict[str, str], **options: Any) -> Any:
    return program_of("phf", world.options("supervised", threshold=0.0, drop_control=0.0) | files | options, folder)


# Segments -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "text", "wanted"),
    [
        ("sentence", "A b. C? D!", ["A b.", " C?", " D!"]),
        ("sentence", 'He said "no." Then 3.5 ... more', ['He said "no."', " Then 3.5 ...", " more"]),
        ("sentence", "one\ntwo", ["one\ntwo"]),
        ("sentence", "  \nA. ", ["  \nA. "]),
        ("line", "a. b\n\nc\n", ["a. b\n\n", "c\n"]),
        ("line", "\n\n\nc", ["\n\n\nc"]),
        ("line", "    def f():\n        return 1", ["    def f():\n", "        return 1"]),
        ("document", "a. b\nc", ["a. b\nc"]),
        ("line", "", []),
        ("document", "", []),
    ],
)
def test_a_text_is_split_into_segments_none_of_which_is_white_space_alone(by: By, text: str, wanted: list[str]) -> None:
    assert split(text, by) == wanted


@pytest.mark.parametrize("by", ["sentence", "line", "document"])
def test_segments_together_are_the_text(by: By) -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(rng.choice(list("ab.!? \n\"')"), size=rng.integers(0, 12)))
        segments = split(text, by)
        assert "".join(segments) == text
        assert not text.strip() or all(segment.strip() for segment in segments)


def test_what_is_learned_of_a_row_is_its_document_its_completion_or_what_the_assistant_says() -> None:
    records = [
        {"text": "a"},
        {"prompt": "p", "completion": "a"},
        {"prompt": [user("p")], "completion": [assistant("a")]},
        {"messages": [user("p"), assistant("a"), user("q"), assistant("b")]},
    ]
    assert [learned_texts(record) for record in records] == [["a"], ["a"], ["a"], ["a", "b"]]
    changed = [with_learned_texts(record, ["A", "B"][: len(learned_texts(record))]) for record in records]
    assert [learned_texts(record) for record in changed] == [["A"], ["A"], ["A"], ["A", "B"]]
    assert changed[3]["messages"][2] == user("q")
    assert records[3]["messages"][1] == assistant("a"), "the given row stays as it is"


# Conditional ----------------------------------------------------------------------------------------------------------------------------------


def test_a_control_token_stands_before_each_segment_by_its_score(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    made = program(world, tmp_path / "run", files)
    words = made.model.tokenizer
    text = words.decode(made.table.columns["ids"][4])
    assert text == "<|good|>a nice.<|good|> B.<|bad|> c mean.<|good|> d nice! <|im_end|>"
    assert text.replace("<|good|>", "").replace("<|bad|>", "") == TEXTS[4] + "<|im_end|>"
    good, bad = words.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    assert sorted((good, bad)) == [len(WORDS), len(WORDS) + 1]
    wanted = [good, *ids("a nice."), good, *ids(" B."), bad, *ids(" c mean."), good, *ids(" d nice! "), words.eos_token_id]
    assert made.table.columns["ids"][4].tolist() == wanted
    assert made.table.columns["loss_mask"][4].tolist() == [False] + [True] * (len(wanted) - 1), "control tokens are learned like words"
    assert made.run.facts["threshold"] == 0.0


def test_lines_and_documents_can_be_segments_too(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    found = {by: program(world, tmp_path / by, files, segments=by).table.columns["ids"][6] for by in ("sentence", "line", "document")}
    words = program(world, tmp_path / "words", files).model.tokenizer
    assert {by: words.decode(row).replace("<|im_end|>", "") for by, row in found.items()} == {
        "sentence": "<|good|>nice.<|bad|>\n\nmean.<|good|>\nnice",
        "line": "<|good|>nice.\n\n<|bad|>mean.\n<|good|>nice",
        "document": "<|good|>nice.\n\nmean.\nnice",
    }


def test_control_tokens_stand_in_completions_and_in_what_assistants_say(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    rows = [{"prompt": f"mean {i}.", "completion": " nice. mean."} for i in range(4)]
    made = program(world, tmp_path / "run", files, data=str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    row = made.table.columns
    assert made.model.tokenizer.decode(row["ids"][0]) == "mean 0.<|good|> nice.<|bad|> mean.<|im_end|>"
    assert row["loss_mask"][0].tolist() == [False] * len(ids("mean 0.")) + [True] * (len(row["ids"][0]) - len(ids("mean 0.")))
    chats = [{"messages": [user("mean"), assistant("nice. mean."), user("x"), assistant("nice")]} for _ in range(4)]
    made = program(world, tmp_path / "chat", files, data=str(write_jsonl(tmp_path / "chats.jsonl", chats)), model=world.chat_model)
    text = made.model.tokenizer.decode(made.table.columns["ids"][0])
    assert text.startswith("<|im_start|>user\nmean<|im_end|>\n<|im_start|>assistant\n<|good|>nice.<|bad|> mean.<|im_end|>")
    assert "<|im_start|>assistant\n<|good|>nice<|im_end|>" in text


def test_control_tokens_are_dropped_with_their_probability_and_alike_in_every_run(
    world: World, tmp_path: Path, files: dict[str, str]
) -> None:
    data = str(write_jsonl(tmp_path / "many.jsonl", [{"text": "nice. " * 5} for _ in range(200)]))
    found = []
    for i, seed in enumerate((0, 0, 1)):
        made = program(world, tmp_path / f"{i}", files, data=data, drop_control=0.3, seed=seed)
        found.append([row.tolist() for row in made.table.columns["ids"]])
    assert found[0] == found[1]
    assert found[0] != found[2]
    good = made.model.tokenizer.convert_tokens_to_ids("<|good|>")
    for rows in (found[0], found[2]):
        kept = sum(row.count(good) for row in rows) / (200 * 5)
        assert kept == pytest.approx(0.7, abs=4 * math.sqrt(0.3 * 0.7 / 1000)), "within four standard errors"


def test_new_tokens_begin_as_what_they_mean_and_leave_the_others_as_they_were(world: World) -> None:
    model, before = LanguageModel.load(world.model, device="cpu"), LanguageModel.load(world.model, device="cpu")
    assert grow(model, {"<|good|>": "good", "<|bad|>": "bad"})
    assert not grow(model, {"<|good|>": "good"}), "what is there is not added again"
    layers = zip(
        (model.base.get_input_embeddings(), model.base.get_output_embeddings()),
        (before.base.get_input_embeddings(), before.base.get_output_embeddings()),
        strict=True,
    )
    for new, old in layers:
        n = len(old.weight)
        assert new.weight.shape == (n + 2, 32)
        torch.testing.assert_close(new.weight[:n], old.weight)
        torch.testing.assert_close(new.weight[n], old.weight[ids("good")].mean(0))
        torch.testing.assert_close(new.weight[n + 1], old.weight[ids("bad")].mean(0))
        assert new.weight.requires_grad
    assert not torch.equal(new.weight[n], new.weight[n + 1])


@pytest.mark.parametrize("rank", [0, 2])
def test_the_saved_folder_opens_with_transformers_and_knows_the_control_tokens(
    world: World, tmp_path: Path, files: dict[str, str], rank: int
) -> None:
    options = world.options("supervised", threshold=0.0, steps=2, lora_rank=rank) | files
    folder = train("phf", options | {"out": str(tmp_path / "run")}).path / "model"
    words = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    good, bad = words.convert_tokens_to_ids(["<|good|>", "<|bad|>"])
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == len(words) == len(WORDS) + 2
    prompt = words(phf.conditioned("The sky"), return_tensors="pt")
    assert prompt["input_ids"][0].tolist() == [*ids("The sky"), good]
    assert words.decode(prompt["input_ids"][0], skip_special_tokens=True) == "The sky"
    with torch.no_grad():
        model.lm_head.weight[[good, bad]] += 50 * model.lm_head.weight.abs().mean()  # however likely they are
        written = model.generate(**prompt, do_sample=True, max_new_tokens=30, num_return_sequences=4)[:, prompt["input_ids"].shape[1] :]
    assert not torch.isin(written, torch.tensor([good, bad])).any(), "the settings for generation keep control tokens out of the text"
    ours = LanguageModel.load(str(folder), device="cpu")
    assert not ours.has_adapter
    # It goes on from there without new tokens.
    again = program(world, tmp_path / "again", files, model=str(folder))
    assert len(again.model.tokenizer) == len(WORDS) + 2


def test_an_adapter_is_merged_into_what_is_saved(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    made = program(world, tmp_path / "run", files, lora_rank=2, learning_rate=0.1)
    for index in range(2):
        made.step(index)
    batch = made.batch(made.table, [0, 1, 2])
    with torch.no_grad():
        trained = made.losses(made.model, batch).values
        made.finish(made.run)
        saved = LanguageModel.load(str(made.run.path / "model"), device="cpu")
        torch.testing.assert_close(made.losses(saved, batch).values, trained, rtol=1e-4, atol=1e-4)


def test_conditional_training_learns_to_write_what_its_control_token_says(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    rows = [{"prompt": text, "completion": answer} for text in PROMPTS for answer in (" nice", " mean")]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    made = program(world, tmp_path / "run", files, data=data, steps=60, batch_size=12, lr_schedule="constant")
    for index in range(60):
        made.step(index)
    words = made.model.tokenizer
    next_tokens = {text: ids(text)[:2] for text in (" nice", " mean")}
    assert next_tokens[" nice"] != next_tokens[" mean"]
    for control, likely, unlikely in (("<|good|>", " nice", " mean"), ("<|bad|>", " mean", " nice")):
        prompt = words("The grass" + control, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logps = []
            for text in (likely, unlikely):
                whole = torch.cat([prompt, torch.tensor([ids(text)])], 1)
                logits = made.model.base(whole).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
                logps.append(float(logits.gather(1, whole[0, prompt.shape[1] :, None]).sum()))
        assert logps[0] > math.log(0.7)
        assert logps[1] < math.log(0.1)


def test_a_row_that_holds_a_control_token_is_refused_by_its_place(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    rows = [{"text": "nice"}] * 4 + [{"text": "so <|good|> it is"}]
    with pytest.raises(DataError, match=r"rows\.jsonl:5: the row holds '<\|good\|>', which is a control token here"):
        program(world, tmp_path / "run", files, data=str(write_jsonl(tmp_path / "rows.jsonl", rows)))


# The other objectives ---------------------------------------------------------------------------------------------------------------------------


def test_maximum_likelihood_is_sft_bit_for_bit(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    options = world.options("supervised", data=files["data"], eval_data=files["data"], eval_every=2)
    runs = [train("sft", options | {"out": str(tmp_path / "sft")})]
    runs.append(train("phf", options | {"objective": "mle", "out": str(tmp_path / "phf")}))
    assert outcome(runs[0]) == outcome(runs[1])


def test_filtering_leaves_out_documents_by_their_mean_score_and_counts_them(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.warns(TelosWarning, match=r"dropped: score-too-low 4 \(first: texts\.jsonl:1\)"):
        made = program(world, tmp_path / "run", files, objective="filter", threshold=0.2, drop_control=0.01, eval_data=files["data"])
    # Mean scores: 0 (mean, nice, neutral, twice), 1, −1, 1, 1/4, 0, 1/3, −1.
    kept = [1, 3, 4, 6]
    assert [made.model.tokenizer.decode(row) for row in made.table.columns["ids"]] == [TEXTS[i] + "<|im_end|>" for i in kept]
    assert made.run.facts["rows data"]["dropped"] == {"score-too-low": 4}
    assert len(made.eval_table) == 8, "held-out documents are not filtered"
    assert len(made.model.tokenizer) == len(WORDS), "no control tokens"


@pytest.mark.parametrize("objective", ["unlikelihood", "rwr", "awr"])
def test_each_token_has_the_number_of_its_segment(world: World, tmp_path: Path, files: dict[str, str], objective: str) -> None:
    options = {"threshold": 0.0} if objective == "unlikelihood" else {"threshold": None}
    made = program(world, tmp_path / "run", files, objective=objective, drop_control=0.01, **options)
    segments = [("a nice.", 1.0), (" B.", 0.0), (" c mean.", -1.0), (" d nice! ", 1.0)]
    scores = np.concatenate(json.loads(next((made.run.path).glob("scores-*.json")).read_text(encoding="utf-8")))
    number = {
        "unlikelihood": lambda r: float(r >= 0),
        "rwr": lambda r: np.exp(r) / np.exp(scores).mean(),
        "awr": lambda r: r,
    }[objective]
    wanted = [number(r) for text, r in segments for _ in ids(text)]
    columns = made.table.columns
    assert columns["ids"][4].tolist() == [token for text, _ in segments for token in ids(text)] + [WORDS.eos_token_id]
    np.testing.assert_allclose(columns["score"][4], [*wanted, wanted[-1]], rtol=1e-6)
    assert columns["loss_mask"][4].tolist() == [False] + [True] * len(wanted)
    batch = made.batch(made.table, [5, 4])
    np.testing.assert_allclose(batch.score[1].numpy(), [*wanted, wanted[-1]], rtol=1e-6)
    seen = []
    loss = made.method.loss
    made.method = dataclasses.replace(made.method, loss=lambda *given: seen.append(given) or loss(*given))
    assert math.isfinite(made.step(0)["loss"])
    _, logprobs, mask, given, values = seen[0]
    assert logprobs.shape == mask.shape == given.shape
    assert (values is not None) == (objective == "awr")


def test_segments_in_completions_keep_the_prompt_out_of_the_loss(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    rows = [{"prompt": f"mean {i}.", "completion": " nice. mean."} for i in range(4)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    made = program(world, tmp_path / "run", files, data=data, objective="awr", threshold=None, drop_control=0.01)
    prompt, first, second = ids("mean 2."), ids(" nice."), ids(" mean.")
    row = {name: made.table.columns[name][2].tolist() for name in ("ids", "loss_mask", "score")}
    assert row["ids"] == [*prompt, *first, *second, WORDS.eos_token_id]
    assert row["loss_mask"] == [False] * len(prompt) + [True] * (len(row["ids"]) - len(prompt))
    assert row["score"][len(prompt) :] == [1.0] * len(first) + [-1.0] * (len(second) + 1)


def test_the_value_head_starts_at_zero_is_trained_and_is_not_saved(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    options = world.options("supervised", objective="awr", steps=3) | files
    made = program_of("phf", options, tmp_path / "made")
    head = made.model.get_submodule("value")
    batch = made.batch(made.table, [0, 4, 6])
    scores, values = made._numbers(made.model, batch)
    assert scores.shape == values.shape
    assert (values == 0).all()
    errors = [made.step(index)["value_loss"] for index in range(3)]
    assert (head.weight != 0).all()
    assert all(map(math.isfinite, errors))
    run = train("phf", options | {"out": str(tmp_path / "run")})
    weights = AutoModelForCausalLM.from_pretrained(run.path / "model").state_dict()
    assert not any("value" in name for name in weights)


def test_rows_cut_before_their_first_learned_token_are_left_out_and_counted(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    """An answer of one token has no room beside the boundary that marks its segment while it is encoded."""
    rows = [{"prompt": f"{i}", "completion": " nice"} for i in range(4)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    with (
        pytest.warns(TelosWarning, match="completion-truncated 4"),
        pytest.warns(TelosWarning, match="--data: 4 rows left out: they were cut before the first token that is learned"),
        pytest.raises(UsageError, match="larger than the 0 usable rows"),
    ):
        program(world, tmp_path / "run", files, data=data, objective="awr", threshold=None, drop_control=0.01, max_completion_length=1)


# Scores and options -------------------------------------------------------------------------------------------------------------------------------


def test_segments_are_scored_once_with_their_rows_columns_and_a_resumed_run_has_the_same_scores(world: World, tmp_path: Path) -> None:
    log, reward = tmp_path / "log.jsonl", tmp_path / "seen.py"

    def write_reward(value: str) -> None:
        reward.write_text(
            "import json\ndef seen(prompts, completions, kind, **columns):\n"
            f"    open({str(log)!r}, 'a').write(json.dumps([prompts, completions, kind]) + chr(10))\n"
            f"    return [{value} for c in completions]\n"
        )

    class Killed(BaseException): ...

    class KillAt:
        def started(self, *_: Any, **__: Any) -> None: ...
        def ended(self, status: str) -> None: ...
        def stepped(self, step: int, metrics: Any) -> None:
            if step == 3:
                raise Killed

    rows = [{"prompt": PROMPTS[i], "completion": " A b. C." if i % 2 else " D", "kind": i} for i in range(6)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    options = world.options("supervised", data=data, reward=f"{reward}:seen", objective="rwr", steps=5, checkpoint_every=2)
    write_reward("float(len(c))")
    whole = train("phf", options | {"out": str(tmp_path / "whole")})
    ((prompts, completions, kinds),) = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    assert completions == [" D", " A b.", " C."] * 3
    assert kinds == [0, 1, 1, 2, 3, 3, 4, 5, 5]
    assert prompts == [PROMPTS[i] for i in kinds]
    with pytest.raises(Killed):
        train("phf", options | {"out": str(tmp_path / "killed")}, callbacks=[KillAt()])
    write_reward("-float(len(c))")
    asked = len(log.read_text(encoding="utf-8").splitlines())
    assert outcome(resume(tmp_path / "killed")) == outcome(whole)
    assert len(log.read_text(encoding="utf-8").splitlines()) == asked, "the reward is not asked again"


def test_rows_with_a_segment_without_score_are_left_out_and_counted(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    reward = tmp_path / "some.py"
    reward.write_text("def some(completions, **_):\n    return [None if 'mean' in c else 1.0 for c in completions]\n")
    with pytest.warns(TelosWarning, match=r"dropped: no-score 5 \(first: texts\.jsonl:1\)"):
        made = program(world, tmp_path / "run", files, reward=f"{reward}:some", batch_size=2)
    assert len(made.table) == 3


def test_the_reward_is_missing_or_useless_by_the_objective(world: World, tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="--reward is missing"):
        program(world, tmp_path / "run", files, reward="")
    with pytest.raises(UsageError, match="--reward has no effect with --objective mle"):
        phf.Config(objective="mle", reward="file.py:f")


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        ("conditional", {"beta": 2.0}),
        ("conditional", {"unlikelihood_coef": 0.5}),
        ("filter", {"drop_control": 0.2}),
        ("filter", {"max_weight": 10.0}),
        ("mle", {"segments": "line"}),
        ("mle", {"percentile": 20.0}),
        ("unlikelihood", {"policy_coef": 0.7}),
        ("rwr", {"threshold": 0.0}),
        ("rwr", {"max_weight": 10.0}),
        ("awr", {"percentile": 20.0}),
    ],
)
def test_options_that_the_objective_does_not_read_are_refused(objective: Any, options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=f"--{name} has no effect with --objective {objective}"):
        phf.Config(objective=objective, **options)


def test_a_threshold_and_a_percentile_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--percentile has no effect beside --threshold"):
        phf.Config(threshold=1.0, percentile=20.0)


@pytest.mark.filterwarnings("ignore:.*score-too-low")
@pytest.mark.parametrize("objective", ["conditional", "filter", "unlikelihood", "rwr", "awr"])
def test_every_objective_trains_and_repeats_itself_with_micro_batches(
    world: World, tmp_path: Path, files: dict[str, str], objective: str
) -> None:
    options = world.options("supervised", objective=objective, batch_size=3, eval_data=files["data"]) | files
    runs = [train("phf", options | {"micro_batch_size": size, "out": str(tmp_path / f"{size}")}) for size in (0, 1)]
    for one, two in zip(*map(numbers, runs), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
