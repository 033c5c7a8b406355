"""`telos leash`: two models' answers to the same problems, compared; the same model against itself must have moved nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_fixtures import write_jsonl
from telos.algorithms.language import repeated_answers as ra
from telos.algorithms.run import train
from telos.cli import leash as command
from telos.cli.main import _Parser, _watched
from telos.core.errors import UsageError
from telos.environments.text.base import load_testbed
from telos.evaluation.leash import Leash, Sampled
from telos.models.language import LanguageModel

TINY = ("--data", "arith", "--level", "1", "--prompts", "12", "--samples", "4", "--quiet", "--threads", "1")


def leash(*words: object) -> int:
    """The command with its own parser, as `telos` calls it."""
    parser = _Parser(prog="telos leash")
    command.add_options(parser)
    _watched(parser, seed=True)
    return command.leash(parser.parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tinylm` with slightly noisy weights, as a run's folder whose model lies under `model`."""
    run = tmp_path_factory.mktemp("leash") / "run"
    model = LanguageModel.load("tinylm", device="cpu")
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * p.std() * torch.randn(p.shape, generator=noise) if p.dim() > 1 else 0.0)
    model.save(run / "model")
    (run / "run.json").write_text(json.dumps({"method": "sft", "status": "finished"}))
    return run


@pytest.fixture(scope="module")
def written(changed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of `tinylm` against itself and against the changed copy."""
    root = tmp_path_factory.mktemp("reports")
    for name, trained in (("itself", "tinylm"), ("copy", changed)):
        assert leash("tinylm", trained, *TINY, "--out", root / name) == 0
    return {name: root / name for name in ("itself", "copy")}


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "leash.json").read_text())


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


# End to end ------------------------------------------------------------------------------------------------------------------------------


def test_a_model_against_itself_has_neither_gained_nor_lost_anything(written):
    figures = record_of(written["itself"])["figures"]
    for unit in figures["support"].values():
        assert (unit["expanded"], unit["shrunk"]) == (0, 0)
        assert unit["change"]["estimate"] == 0
    assert figures["support"]["problems"]["preserved"] > 0
    assert {row["difference"]["estimate"] for row in figures["measures"].values()} == {0}
    for row in rows_of(written["itself"]):
        assert row["base"] == row["trained"]


def test_a_slightly_changed_copy_differs_and_stays_near(written):
    copy, itself = rows_of(written["copy"]), rows_of(written["itself"])
    assert [row["base"] for row in copy] == [row["base"] for row in itself]  # the same seed: the base model writes the same again
    same = np.mean([a == b for row in copy for a, b in zip(row["base"]["completions"], row["trained"]["completions"], strict=True)])
    assert 0.05 < same < 1  # common random numbers keep some answers the same
    support = record_of(written["copy"])["figures"]["support"]["problems"]
    assert support["preserved"] + support["expanded"] + support["shrunk"] + support["outside"] == 12


def test_the_figures_follow_from_the_samples_that_were_written(written):
    rows, figures = rows_of(written["copy"]), record_of(written["copy"])["figures"]
    testbed: Any = load_testbed("arith")
    items = {item.prompt: item for item in testbed.level_items(1, 12, 0)}
    assert [row["prompt"] for row in rows] == list(items)
    for name in ("base", "trained"):
        right = np.array([[testbed.gold(items[row["prompt"]], text) == 1 for text in row[name]["completions"]] for row in rows])
        assert right.tolist() == [row[name]["right"] for row in rows]
        assert figures["pass_at_k"][name]["1"]["estimate"] == pytest.approx(right.mean())
        assert figures["pass_at_k"][name]["4"]["estimate"] == pytest.approx(right.any(1).mean())
        # The final answer of an arith text is what follows "Answer:".
        for row in rows:
            for text, answer in zip(row[name]["completions"], row[name]["answers"], strict=True):
                assert answer == (re.split(r"Answer:\s*", text, maxsplit=1)[1].split()[0] if re.search(r"Answer:\s*\S", text) else None)
        tokens, entropy = (np.array([row[name][key] for row in rows]) for key in ("tokens", "entropy"))
        measured = figures["measures"]["entropy of tokens [nats]"][name]["estimate"]
        assert measured == pytest.approx((tokens * entropy).sum() / tokens.sum(), abs=1e-5)


def test_the_report_stands_in_one_file_with_its_pictures(written):
    folder = written["copy"]
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert page.count("data:image/png") == 4
    assert sorted(path.name for path in (folder / "report").iterdir()) == ["entropies.png", "maj-k.png", "pass-k.png", "support.png"]
    for words in (
        "Has the set of solved problems changed?",
        "Retention",
        "Entropy of answers",
        "pass@4",
    ):
        assert words in text
    settings = record_of(folder)["settings"]
    assert (settings["reward"], settings["level"], settings["samples"], settings["seed"]) == ("gold:arith", 1, 4, 0)


def test_the_entropy_of_tokens_is_that_of_the_models_whole_distribution(written):
    row = rows_of(written["itself"])[0]
    model = LanguageModel.load("tinylm", device="cpu")
    tokenizer: Any = model.tokenizer
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    place = row["base"]["ended"].index(True)
    answer = [*tokenizer(row["base"]["completions"][place], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert len(answer) == row["base"]["tokens"][place], (
        "its text is encoded otherwise than it was written: take another answer for this test"
    )
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = model.base(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    p = logits[-len(answer) - 1 : -1].double().log_softmax(-1)
    assert row["base"]["entropy"][place] == pytest.approx(float(-(p.exp() * p).sum(-1).mean()), abs=1e-4)


def test_a_folder_that_holds_something_is_not_written_into(written, changed):
    with pytest.raises(UsageError, match=r"holds leash\.json already"):
        leash("tinylm", "tinylm", *TINY, "--out", written["copy"])
    with pytest.raises(UsageError, match="is a run's folder"):
        leash("tinylm", "tinylm", *TINY, "--out", changed)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["tinylm", "tinylm", "--sample", "4"], "unknown option --sample (did you mean '--samples'?)"),
        (["tinylm", "tinylm", "--samples", "1"], "--samples 1: at least two"),
        (["tinylm", "tinylm", "--temperature", "0"], "every sample of a problem would be the same"),
        (["tinylm", "tinylm", "--top-p", "0"], "--top_p 0"),
        (["tinylm", "tinylm", "--support_threshold", "1"], "found at all"),
        (["tinylm", "tinylm", "--level", "9"], "arith has no level 9"),
        (["tinylm", "tinylm", "--data", "review", "--level", "1"], "--level is for --data arith, not review"),
        (["tinylm", "tinylm", "--data", "arth"], "did you mean 'arith'?"),
        (["tinylm", "tinylm", "--answer", "("], "is no regular expression"),
        (["tinylm", "tinyml", "--prompts", "2"], "did you mean 'tinylm'?"),
        (["tinylm", "./nowhere", "--prompts", "2"], "./nowhere: no such folder"),
        (["tinylm", "tinylm", "--max_new_tokens", "100000", "--prompts", "2"], "leaves no room for a prompt"),
    ],
)
def test_wrong_arguments_are_refused_with_what_to_do(words, problem, tmp_path):
    with pytest.raises(UsageError) as caught:
        leash(*words, "--quiet", "--threads", "1", "--out", tmp_path / "out")
    assert problem in str(caught.value)
    assert not (tmp_path / "out").exists()


# Models ----------------------------------------------------------------------------------------------------------------------------------


def test_models_are_found_by_folder_and_by_run_and_a_reward_model_is_none(world, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(world.model, run / "model")
    (run / "run.json").write_text(json.dumps({"method": "sft", "status": "finished"}))
    assert Path(ra.open_policy(str(run)).source) == run / "model"
    assert ra.open_policy(world.model).source == world.model
    with pytest.raises(UsageError, match="has no checkpoint of step 7; it has none"):
        ra.open_policy(f"{run}:7")
    with pytest.raises(UsageError, match="is a reward model"):
        ra.open_policy(world.reward_model)
    with pytest.raises(UsageError, match="neither a model nor a run; name one of its runs: run"):
        ra.open_policy(str(tmp_path))
    (run / "model").rename(run / "elsewhere")
    with pytest.raises(UsageError, match="is the run finished"):
        ra.open_policy(str(run))


def test_a_runs_checkpoint_is_opened_by_its_step(world, tmp_path):
    options = world.options("supervised", out=str(tmp_path / "run"), checkpoint_every=1)
    run = train("sft", options)
    before, last = (ra.open_policy(source) for source in (f"{run.path}:2", str(run.path)))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), last.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ra.open_policy(f"{run.path}:3").parameters(), last.parameters(), strict=True))


# Problems --------------------------------------------------------------------------------------------------------------------------------


def test_rows_made_from_a_testbed_are_judged_by_its_gold_judge(tmp_path):
    items = load_testbed("arith").items("train", 30, 1)
    rows = [{"prompt": item.prompt, "facts": json.dumps(item.facts), "testbed": "arith", "reference": item.reference} for item in items]
    file = write_jsonl(tmp_path / "problems.jsonl", rows)
    found = ra.load_problems(str(file), 10, seed=3)
    assert (found.reward, len(found.prompts), found.max_new_tokens) == ("gold:arith", 10, 96)
    places = [[row["prompt"] for row in rows].index(prompt) for prompt in found.prompts]
    assert places == sorted(places) != list(range(10))  # a random choice in the file's order
    assert found.answer_in(" 3 + 4 = 7. Answer:  7\n") == "7"
    assert found.answer_in(" 3 + 4") is None


def test_a_prompts_file_needs_a_reward_and_its_whole_text_is_the_answer(tmp_path):
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    with pytest.raises(UsageError, match="--reward is missing"):
        ra.load_problems(str(file), 2)
    found = ra.load_problems(str(file), 5, reward="rewards.py:f", max_new_tokens=7)
    assert (found.max_new_tokens, found.answer_in(" x \n"), len(found.prompts)) == (7, "x", 2)
    assert ra.load_problems(str(file), 2, reward="rewards.py:f", answer=r"#+ \d+").answer_in("so ## 12 it is") == "## 12"


def test_answers_of_a_prompts_file_are_right_from_the_threshold_on_and_those_without_reward_are_wrong_and_told(world, tmp_path):
    file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"The {word}", "key": i} for i, word in enumerate(("sky", "grass", "answer"))])
    (tmp_path / "r.py").write_text(
        "def f(prompts, completions, key, **rest):\n    return [None if k == 2 else k + 0.25 * (len(c) > 3) for k, c in zip(key, completions)]\n"
    )
    problems = ra.load_problems(str(file), 3, reward=f"{tmp_path / 'r.py'}:f", threshold=1.0, max_new_tokens=6)
    found, notes = ra.answer_repeatedly(ra.open_policy(world.model), problems, 5, name="tiny")
    assert found.right.tolist() == [[0] * 5, [1] * 5, [0] * 5]
    assert np.isnan(found.scores[2]).all()
    assert notes == ["tiny: the reward did not apply to 5 answers, which count as wrong"]
    assert ((found.tokens >= 1) & (found.tokens <= 6)).all()
    assert (found.ended[found.tokens < 6] == 1).all()


# The comparison --------------------------------------------------------------------------------------------------------------------------


def sampled(name: str, right: list[list[int]], texts: list[list[str]] | None = None) -> Sampled:
    values = np.array(right, dtype=np.float64)
    texts = texts or [["yes" if x else "no" for x in row] for row in right]
    one = np.ones_like(values)
    return Sampled(name, texts, [list(row) for row in texts], values, values, 2 * one, one, 0.5 * one)


def test_a_model_that_is_surer_and_narrower_is_told_as_such(tmp_path):
    # Forty problems that the base model solves at times; the trained one always solves the first twenty and never the rest.
    base = sampled("a", [[1, 0, 0, 0]] * 40, [["x", "u", "v", "w"]] * 40)
    trained = sampled("b", [[1, 1, 1, 1]] * 20 + [[0, 0, 0, 0]] * 20, [["x"] * 4] * 20 + [["u"] * 4] * 20)
    found = Leash(base, trained, [f"p{i}" for i in range(40)], {"seed": 0})
    rows = {row.name: row for row in found.rows}
    assert rows["pass@1"].difference.estimate == pytest.approx(0.25)
    assert rows["pass@4"].difference.estimate == pytest.approx(-0.5)
    assert rows["entropy of answers [nats]"].difference.estimate == pytest.approx(-np.log(4))
    assert rows["entropy of tokens [nats]"].difference.estimate == 0
    support = found.support["problems"]
    assert (support.preserved, support.expanded, support.shrunk, support.outside) == (20, 0, 20, 0)
    assert support.change.high < 0
    text = found.report().markdown()
    assert re.search(r"Is one answer right more often\?\*\* yes", text)
    assert re.search(r"Has the set of solved problems changed\?\*\* it shrank", text)
    assert "Problem 21, found by the base model alone" in text
    # By chance alone: one right answer among 4 + 4 is as likely either model's; of five, each model must have drawn one.
    assert [found.chance[name] for name in ("expanded", "shrunk")] == pytest.approx([10, 10])


def test_models_that_answered_different_problems_are_not_compared():
    with pytest.raises(UsageError, match="the same problems"):
        Leash(sampled("a", [[1, 0]] * 3), sampled("b", [[1, 0]] * 4), ["p"] * 3, {})


def test_without_any_right_answer_the_report_is_written_all_the_same(tmp_path):
    never = sampled("a", [[0, 0]] * 5)
    found = Leash(never, never, ["p"] * 5, {})
    found.write(tmp_path / "out")
    figures = record_of(tmp_path / "out")["figures"]
    assert figures["support"]["problems"]["outside"] == 5
    assert figures["support"]["problems"]["change"]["estimate"] is None
    assert figures["pass_at_k"]["base"]["2"]["high"] > 0
