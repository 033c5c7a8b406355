"""Labels of steps from sampled completions: against a scripted completer, against exact chances, and as the files that runs write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_fixtures import tiny_tokenizer
from support import World, make_model, program_of
from telos.algorithms.language import math_shepherd, pav
from telos.algorithms.language._sampling import Writer
from telos.algorithms.language.step_labels import Successes, estimate_successes
from telos.algorithms.run import train
from telos.core.errors import Failure, UsageError
from telos.data.batches import Prompts, Rollouts, pad_1d
from telos.dataflow import Group, Role, transfer
from telos.models.generation import Sampling
from telos.models.language import LanguageModel
from telos.objectives.process_reward import Cut, step_ends

WORDS = tiny_tokenizer()


def rollouts(parts: list[tuple[list[int], list[int]]], rows: list[int], ended: list[bool] | None = None) -> Rollouts:
    prompt_ids, prompt_length = pad_1d([prompt for prompt, _ in parts])
    ids, length = pad_1d([answer for _, answer in parts])
    n = len(parts)
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_length=prompt_length,
        completion_ids=ids,
        completion_length=length,
        action_mask=torch.arange(ids.shape[1]) < length[:, None],
        logprobs=-torch.arange(1.0, ids.shape[1] + 1).repeat(n, 1),
        ended=torch.tensor(ended or [True] * n),
        group=torch.tensor(rows),
        reward=torch.zeros(n),
        reward_status=torch.zeros(n, dtype=torch.int8),
        temperature=torch.ones(n),
        weight_version=torch.zeros(n, dtype=torch.int64),
        row=torch.tensor(rows),
        batch_size=[n],
    )


def listed(ids: Tensor, length: Tensor) -> list[list[int]]:
    return [row[:n] for row, n in zip(ids.tolist(), length.tolist(), strict=True)]


class Scripted(Role):
    """The j-th completion of every prefix is 200 + j, once for each token that there is room for, at most three times."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], int]] = []

    @transfer(split="rows", collect="rows")
    def write(self, prompts: Prompts, begun: list[list[int]], *, sampling: Sampling, n: int, seed: int) -> tuple[Rollouts, list[str]]:
        most = sampling.max_new_tokens
        own = listed(prompts.prompt_ids, prompts.prompt_length)
        self.asked.append(([prompt + start for prompt, start in zip(own, begun, strict=True)], most))
        rows = [row for row in prompts.row.tolist() for _ in range(n)]
        starts = [start for start in begun for _ in range(n)]
        drawn = [
            (prompt, start + [200 + j] * min(3, most - len(start))) for prompt, start in zip(own, begun, strict=True) for j in range(n)
        ]
        out = rollouts(drawn, rows, [len(start) + 3 <= most for start in starts])
        out.action_mask = out.action_mask & (torch.arange(out.action_mask.shape[1]) >= torch.tensor([len(s) for s in starts])[:, None])
        return out, [""] * len(drawn)


PROMPTS = {0: [5, 6], 3: [7]}
ANSWERS = [(0, [10, 11, 12, 13]), (0, [10, 11, 14]), (3, [10, 11, 20, 21, 22])]
ENDS = [[1, 2, 3], [1, 2], [0, 4]]


def ask(judge: Any, outcomes: list[float], m: int = 4, most: int = 6, batch: int = 512) -> tuple[list[Successes], int, Scripted]:
    completer = Scripted()
    answers = rollouts([(PROMPTS[row], ids) for row, ids in ANSWERS], [row for row, _ in ANSWERS])
    model: Any = type("Model", (), {"tokenizer": WORDS})()
    options: dict[str, Any] = {"completions": m, "sampling": Sampling(max_new_tokens=most), "seed": 0, "batch": batch}
    found, spent = estimate_successes(answers, ENDS, torch.tensor(outcomes), Group([completer]), model, judge, **options)
    return found, spent, completer


def by_last_token(answers: Rollouts, texts: list[str]) -> Tensor:
    """Success where the number of tokens before the completion plus its number j is at least 4."""
    own = listed(answers.completion_ids, answers.completion_length)
    found = []
    for row, ids in zip(answers.row.tolist(), own, strict=True):
        before = [token for token in ids if token < 200]
        assert before == next(answer[: len(before)] for r, answer in ANSWERS if r == row and answer[: len(before)] == before)
        found.append(float(len(before) + ids[-1] - 200 >= 4))
    return torch.tensor(found)


def test_successes_are_counted_from_the_prompt_and_after_each_step_but_the_last() -> None:
    """Of j = 0 … 3 succeed those with length of prefix + j >= 4."""
    found, _, _ = ask(by_last_token, [1.0, 0.0, 1.0])
    for successes, ends, outcome in zip(found, ENDS, (4, 0, 4), strict=True):
        lengths = [0, *(end + 1 for end in ends[:-1])]
        assert successes.successes.tolist() == [*(min(4, length) for length in lengths), outcome]
        assert successes.trials.tolist() == [4] * (len(ends) + 1)


@pytest.mark.parametrize("batch", [4, 9, 512])
def test_every_prefix_is_completed_once_from_its_tokens_in_as_few_calls_as_the_batch_allows(batch: int) -> None:
    found, spent, completer = ask(by_last_token, [1.0, 0.0, 1.0], batch=batch)
    prefixes = [prompt for asked, _ in completer.asked for prompt in asked]
    wanted = [[5, 6], [7], [7, 10], [5, 6, 10, 11], [5, 6, 10, 11, 12]]
    assert sorted(prefixes) == sorted(wanted), "the prompt and the first step of two answers are shared"
    assert len(completer.asked) == math.ceil(5 / max(1, batch // 4))
    assert spent == 5 * 4 * 3
    assert [some.successes.tolist() for some in found] == [some.successes.tolist() for some in ask(by_last_token, [1.0, 0.0, 1.0])[0]]


def test_completions_make_answers_no_longer_than_answers_may_be() -> None:
    found: list[tuple[int, int, bool]] = []

    def judge(answers: Rollouts, texts: list[str]) -> Tensor:
        before = (answers.completion_ids < 200).long().mul(answers.completion_ids > 0).sum(1).tolist()
        found.extend(zip(before, answers.completion_length.tolist(), answers.ended.tolist(), strict=True))
        return torch.zeros(len(answers))

    _, _, completer = ask(judge, [0.0] * 3, most=4)
    assert set(found) == {(0, 3, True), (1, 4, True), (2, 4, False), (3, 4, False)}, "three tokens each, cut where there is no room"
    assert completer.asked[0][1] == 4


def test_rewards_that_nobody_gave_are_no_trials() -> None:
    def judge(answers: Rollouts, texts: list[str]) -> Tensor:
        return torch.where(answers.completion_ids.amax(1) == 200, torch.nan, by_last_token(answers, texts))

    found, _, _ = ask(judge, [1.0, math.nan, 0.0])
    assert [some.trials.tolist() for some in found] == [[3, 3, 3, 4], [3, 3, 0], [3, 3, 4]]
    assert found[1].labels("hard").isnan().tolist() == found[1].values().isnan().tolist() == [False, False, True]


def test_labels_are_soft_hard_or_those_of_the_best_of_k_and_advantages_their_differences() -> None:
    successes = Successes(torch.tensor([1, 0, 4, 4]), torch.tensor([4, 4, 4, 4]))
    assert successes.labels().tolist() == [0.25, 0, 1, 1]
    assert successes.labels("hard").tolist() == [1, 0, 1, 1]
    assert successes.values(2).tolist() == [0.5, 0, 1, 1], "two of four draws: the one success is among them half of the time"
    assert successes.advantages(2).tolist() == [-0.5, 1, 0]
    assert math_shepherd.estimate(math_shepherd.Config(), successes).tolist() == [1, 0, 1, 1]
    assert math_shepherd.estimate(math_shepherd.Config(labels="soft"), successes).tolist() == [0.25, 0, 1, 1]
    assert pav.estimate(pav.Config(prover_best_of=2), successes).tolist() == [0.5, 0, 1, 1]
    assert successes.values(5).isnan().all()


def test_success_rates_are_the_policys_chances(world: World) -> None:
    """One token may still come, and success is that it is one of the likelier half: the exact chance is known."""
    policy = LanguageModel.load(world.model, device="cpu")
    prompt, answer = [5, 6, 7], [70, 71, 72]
    with torch.no_grad():
        chances = policy.model(torch.tensor([[*prompt, *answer[:2]]])).logits[0, -1].softmax(-1)
    good = torch.arange(len(chances)) % 3 == 0
    exact, m = float(chances[good].sum()), 4000

    def judge(answers: Rollouts, texts: list[str]) -> Tensor:
        assert (answers.completion_ids[:, :2] == torch.tensor(answer[:2])).all() or answers.completion_length.max() <= 3
        return good[answers.completion_ids[torch.arange(len(answers)), answers.completion_length - 1]].float()

    options: dict[str, Any] = {"completions": m, "sampling": Sampling(max_new_tokens=3), "seed": 3, "batch": m}
    (found,), _ = estimate_successes(
        rollouts([(prompt, answer)], [0]), [[1, 2]], torch.ones(1), Group([Writer(policy)]), policy, judge, **options
    )
    assert 0.05 < exact < 0.95
    assert float(found.values()[1]) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / m))


# Runs --------------------------------------------------------------------------------------------------------------------------------------

OFTEN = [" ", ".", "e", "a", "o", "l", "s", "t", "n", "g"]


def parity(folder: Path) -> str:
    """A reward of 1 for texts of an even number of characters."""
    (folder / "parity.py").write_text("def parity(completions, **_):\n    return [float(len(text) % 2 == 0) for text in completions]\n")
    return f"{folder / 'parity.py'}:parity"


def options(world: World, folder: Path, **changes: Any) -> dict[str, Any]:
    found = {"model": world.model, "device": "cpu", "threads": 1, "data": world.data["prompt-only"], "reward": parity(folder.parent)}
    found |= {"steps": 2, "batch_size": 4, "n": 3, "completions": 4, "max_completion_length": 10, "step_separators": OFTEN}
    found |= {"checkpoint_every": 0, "out": str(folder)}
    return found | changes


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "stepwise.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("key", ["math-shepherd", "pav"])
def test_a_row_holds_an_answers_steps_and_their_labels(world: World, tmp_path: Path, key: str) -> None:
    run = train(key, options(world, tmp_path / "run", **({"labels": "soft"} if key == "math-shepherd" else {"prover_best_of": 2})))
    rows = rows_of(run.path)
    metrics = run.metrics()
    assert len(rows) + sum(row["unusable_answers"] for row in metrics) == 2 * 4 * 3
    for row in rows:
        text = "".join(row["completions"])
        assert len(row["completions"]) == len(row["labels"]) == len(row["advantages"])
        assert len(step_ends(WORDS, WORDS(text, add_special_tokens=False)["input_ids"], Cut(tuple(OFTEN)))) >= 1
        assert all(0 <= label <= 1 for label in (row["prompt_label"], *row["labels"]))
        assert row["labels"][-1] == row["success"] == float(len(text) % 2 == 0)
        assert sum(row["advantages"]) == pytest.approx(row["labels"][-1] - row["prompt_label"], abs=1e-5)
        assert row["answer"], "the data's other columns stay"
    assert any(len(row["labels"]) > 2 for row in rows)
    assert len({label for row in rows for label in row["labels"][:-1]}) > 2, "the labels differ"
    first = 12 - int(metrics[0]["unusable_answers"])
    for part, shown in zip((rows[:first], rows[first:]), metrics, strict=True):
        labels = [label for row in part for label in row["labels"]]
        assert shown["labels/mean"] == pytest.approx(sum(labels) / len(labels), abs=1e-5)
        assert shown["steps/number"] == pytest.approx(len(labels) / len(part))


def test_answers_to_a_prompt_share_its_label(world: World, tmp_path: Path) -> None:
    train("math-shepherd", options(world, tmp_path / "run", steps=1, labels="soft"))
    labels: dict[str, set[float]] = {}
    for row in rows_of(tmp_path / "run"):
        labels.setdefault(row["prompt"], set()).add(row["prompt_label"])
    assert len(labels) == 4
    assert all(len(found) == 1 for found in labels.values())


def test_a_process_reward_model_reads_what_was_written(world: World, tmp_path: Path) -> None:
    train("math-shepherd", options(world, tmp_path / "labels"))
    data = str(tmp_path / "labels" / "stepwise.jsonl")
    program = program_of("process-reward", {"model": world.model, "device": "cpu", "data": data, "batch_size": 4}, tmp_path / "prm")
    assert program.model.values_prompts
    for row, ends, ids in zip(rows_of(tmp_path / "labels"), program.table.columns["step_ends"], program.table.columns["completion_ids"]):
        assert WORDS.decode(ids, skip_special_tokens=True) == "".join(row["completions"]), "nothing is put between the steps"
        assert len(ends) == len(row["labels"]) + 1
    assert math.isfinite(program.step(0)["loss"])


def test_a_prover_completes_in_the_policys_place(world: World, tmp_path: Path) -> None:
    own, other = (
        train("pav", options(world, tmp_path / name, **more)) for name, more in (("own", {}), ("other", {"prover": world.other_model}))
    )
    mine, theirs = rows_of(own.path), rows_of(other.path)
    assert [row["completions"] for row in mine] == [row["completions"] for row in theirs], "the policy writes the answers"
    assert [row["labels"] for row in mine] != [row["labels"] for row in theirs]
    same = train("pav", options(world, tmp_path / "same", prover=world.model))
    assert rows_of(same.path) == mine


def test_what_cannot_go_on_from_the_policys_tokens_and_too_few_completions_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prover tinylm has another vocabulary"):
        train("pav", options(world, tmp_path / "1", prover="tinylm"))
    with pytest.raises(UsageError, match="--prover_best_of 5 needs at least as many --completions"):
        train("pav", options(world, tmp_path / "2", prover_best_of=5))
    for changes in ({"model": world.encoder_decoder}, {"prover": world.encoder_decoder}):
        with pytest.raises(UsageError, match=f"--{next(iter(changes))} .* answers are continued by decoders alone"):
            train("pav", options(world, tmp_path / "4", reward=parity(tmp_path), **changes))
    with pytest.raises(UsageError, match="at least one separator"):
        train("pav", options(world, tmp_path / "3", step_separators=[]))


def test_answers_without_text_are_left_out_and_a_step_without_any_other_stops_the_run(world: World, tmp_path: Path) -> None:
    silent = make_model(tmp_path / "silent")
    model: Any = LanguageModel.load(str(silent), device="cpu")
    with torch.no_grad():
        model.model.lm_head.weight[model.tokenizer.eos_token_id] *= 50
    model.save(silent)
    with pytest.raises(Failure, match="has text and rewards for all its steps"):
        train("math-shepherd", options(world, tmp_path / "run", model=str(silent)))
