"""Training on single answers and on ranked lists: what rows become, what the losses see, and that advantages and reference points are what they say."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_fixtures import assistant, user, write_jsonl
from support import BAD, GOOD, PROMPTS, World, numbers, outcome, program_of
from telos.algorithms.language._loop_unpaired import another_prompts_row
from telos.algorithms.run import resume, train
from telos.core.errors import TelosWarning, UsageError
from telos.functional.pairwise import LabelledLogps, RankedLogps
from telos.models.language import LanguageModel
from telos.models.packing import Answers


def views(program: Any) -> list[Any]:
    """Every view that the program's loss is given from now on."""
    seen, loss = [], program.method.loss

    def watch(config: Any, view: Any) -> Any:
        seen.append(view)
        return loss(config, view)

    program.method = dataclasses.replace(program.method, loss=watch)
    return seen


def log_likelihood(model: LanguageModel, prompt: list[int], answer: list[int]) -> float:
    """log π(answer|prompt) of one answer by itself, without packing."""
    row = Answers(
        torch.tensor([prompt]), torch.tensor([len(prompt)]), torch.tensor([answer]), torch.tensor([len(answer)]), torch.tensor([0])
    )
    with torch.no_grad():
        return float(model.logprobs(row, packed=False).logprobs.double().sum())


def its_reward(folder: Path, body: str) -> str:
    path = folder / "its_reward.py"
    path.write_text(f"def judge(prompts, completions, **columns):\n    {body}\n", encoding="utf-8")
    return f"{path}:judge"


# Rows ---------------------------------------------------------------------------------------------------------------------------------------


def test_pairs_given_to_kto_become_a_desirable_and_an_undesirable_row_each(world: World, tmp_path: Path) -> None:
    program = program_of("kto", world.options("unpaired", data=world.data["preference"]), tmp_path)
    table, words = program.table, program.model.tokenizer
    assert len(table) == 2 * len(PROMPTS)
    assert table.columns["label"] == [True, False] * len(PROMPTS)
    assert table.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    texts = [words.decode(ids, skip_special_tokens=True) for ids in table.columns["completion_ids"]]
    assert texts == [side[i % 8] for i in range(len(PROMPTS)) for side in (GOOD, BAD)]
    assert program.run.facts["answers data"] == {"desirable": 12, "undesirable": 12}


def test_conversations_become_single_answers(world: World, tmp_path: Path) -> None:
    options = world.options("unpaired", data=world.data["preference-messages"], model=world.chat_model)
    program = program_of("kto", options, tmp_path)
    assert len(program.table) == 2 * len(PROMPTS)
    text = program.model.tokenizer.decode(program.table.columns["completion_ids"][1])
    assert text == BAD[0].strip() + "<|im_end|>"
    assert math.isfinite(program.step(0)["loss"])


@pytest.mark.parametrize(("data", "kept"), [("unpaired", 6), ("preference", 12), ("prompt-completion", 12)])
def test_a_method_that_reads_no_label_imitates_desirable_answers_only(world: World, tmp_path: Path, data: str, kept: int) -> None:
    program = program_of("gold", world.options("unpaired", data=world.data[data]), tmp_path)
    assert len(program.table) == kept
    assert all(program.table.columns["label"])
    assert program.run.facts["answers data"] == {"desirable": kept, "undesirable": {"unpaired": 6, "preference": 12}.get(data, 0)}


def test_data_without_a_desirable_answer_are_no_demonstrations(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": PROMPTS[i], "completion": BAD[i], "label": False} for i in range(8)]
    with pytest.raises(UsageError, match="has no desirable answer, so there is nothing to imitate"):
        program_of("gold", world.options("unpaired", data=str(write_jsonl(tmp_path / "bad.jsonl", rows))), tmp_path / "run")


# KTO's reference point ------------------------------------------------------------------------------------------------------------------------


def test_the_reference_point_is_the_mean_log_ratio_of_answers_to_other_prompts_and_at_least_zero(world: World, tmp_path: Path) -> None:
    program = program_of("kto", world.options("unpaired", reference=world.other_model), tmp_path)
    theirs = LanguageModel.load(world.other_model, device="cpu")
    batches = [program.batch(program.table, rows) for rows in ([0, 3, 5, 7], [9, 2, 4, 11], [1, 6, 8, 10], [4, 9])]
    found, wanted = [], []
    for batch in batches:
        found.append(program.frozen_rows(batch)[-1])
        columns = program.table.columns
        others = [*batch.row.tolist()[1:], int(batch.row[0])]
        pairs = [(columns["prompt_ids"][i].tolist(), columns["completion_ids"][j].tolist()) for i, j in zip(batch.row, others, strict=True)]
        wanted.append(np.mean([log_likelihood(program.model, *pair) - log_likelihood(theirs, *pair) for pair in pairs]))
    assert min(wanted) < 0 < max(wanted), "both sides of the bound are seen"
    for kl, mean in zip(found, wanted, strict=True):
        assert not kl.requires_grad
        np.testing.assert_allclose(kl.numpy(), max(0.0, mean), rtol=1e-4, atol=1e-5)


def test_at_the_reference_ratios_and_reference_point_are_zero_and_every_answer_is_worth_a_half(world: World, tmp_path: Path) -> None:
    program = program_of("kto", world.options("unpaired"), tmp_path)
    seen = views(program)
    assert program.step(0)["loss"] == pytest.approx(0.5, abs=1e-5)
    (view,) = seen
    assert isinstance(view, LabelledLogps)
    assert view.label is not None
    assert view.kl is not None
    assert float(view.ratio.detach().abs().max()) < 1e-4
    assert view.kl.tolist() == [pytest.approx(0.0, abs=1e-5)] * 4


def test_micro_batches_change_neither_the_reference_point_nor_the_loss(world: World, tmp_path: Path) -> None:
    found = []
    for size in (0, 1, 3):
        options = world.options("unpaired", reference=world.other_model, micro_batch_size=size, steps=6, lr_schedule="constant")
        program = program_of("kto", options, tmp_path / f"{size}")
        found.append([program.step(index) for index in range(6)])
    assert max(row["kl/reference_point"] for row in found[0]) > 0.1
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert one == pytest.approx(two, rel=1e-3, abs=1e-5)


def test_the_answers_that_make_the_reference_point_are_to_other_prompts_where_there_are_any(world: World, tmp_path: Path) -> None:
    table = program_of("kto", world.options("unpaired", data=world.data["preference"]), tmp_path).table
    assert another_prompts_row(table, [0, 1, 2, 3]) == [2, 2, 0, 0], "rows 0 and 1 are sides of one pair, as are 2 and 3"
    assert another_prompts_row(table, [6, 7]) == [7, 6], "there is no other"
    assert another_prompts_row(table, [6]) == [8], "a batch of one takes it from the table"
    assert another_prompts_row(table, [23]) == [0]


def test_metrics_of_both_kinds_of_answers_give_the_margin(world: World, tmp_path: Path) -> None:
    options = world.options("unpaired", reference=world.other_model, eval_data=world.data["unpaired"], batch_size=5, steps=1)
    metrics = program_of("kto", options, tmp_path).step(0)
    for prefix in ("", "eval/"):
        margin = metrics[f"{prefix}rewards/chosen"] - metrics[f"{prefix}rewards/rejected"]
        assert metrics[f"{prefix}rewards/margins"] == pytest.approx(margin)
    assert "eval/kl/reference_point" in metrics


# Advantages -----------------------------------------------------------------------------------------------------------------------------------


def test_the_advantage_is_the_score_less_the_mean_score_of_the_references_answers(world: World, tmp_path: Path) -> None:
    """A reward that looks at the prompt alone has the value that it gives."""
    reward = its_reward(tmp_path, "return [float(len(p)) for p in prompts]")
    program = program_of("a-lol", world.options("unpaired", reward=reward), tmp_path / "run")
    wanted = [40.0 + i - len(PROMPTS[i]) for i in range(12)]
    kept = [i for i in range(12) if wanted[i] > 0]
    assert 4 < len(kept) < 12, "some are kept and some are not"
    assert program.table.prompts == [PROMPTS[i] for i in kept]
    np.testing.assert_allclose(program.table.columns["advantage"], [wanted[i] for i in kept])
    assert program.run.facts["rows with a positive advantage"] == len(kept)
    batch = program.batch(program.table, [2, 0])
    np.testing.assert_allclose(batch.advantage.numpy(), [wanted[kept[2]], wanted[kept[0]]])
    np.testing.assert_allclose(batch.score.numpy(), [40.0 + kept[2], 40.0 + kept[0]])


def test_the_references_own_answers_are_scored_as_the_datas_once_a_prompt(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": PROMPTS[i % 3], "completion": GOOD[i % 8], "facts": f"row {i}"} for i in range(9)]
    log = tmp_path / "log.jsonl"
    body = f"open({str(log)!r}, 'a').write(__import__('json').dumps([prompts, completions, columns['facts']]) + chr(10)); "
    reward = its_reward(tmp_path, body + "return [float(len(c)) for c in completions]")
    options = world.options("unpaired", data=str(write_jsonl(tmp_path / "rows.jsonl", rows)), reward=reward, value_samples=5)
    options |= {"value_filter": False, "priority": False}
    program = program_of("a-lol", options, tmp_path / "run")
    of_data, of_reference = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
    assert of_data == [[PROMPTS[i % 3] for i in range(9)], [GOOD[i % 8] for i in range(9)], [f"row {i}" for i in range(9)]]
    assert of_reference[0] == [prompt for prompt in PROMPTS[:3] for _ in range(5)]
    assert of_reference[2] == [f"row {i}" for i in range(3) for _ in range(5)]
    values = np.array([len(text) for text in of_reference[1]]).reshape(3, 5).mean(1)
    wanted = [len(GOOD[i % 8]) - values[i % 3] for i in range(9)]
    np.testing.assert_allclose(program.table.columns["advantage"], wanted, rtol=1e-6)


def test_values_come_from_the_named_reference_not_from_the_policy(world: World, tmp_path: Path) -> None:
    files = []
    for name, options in (("own", {}), ("other", {"reference": world.other_model}), ("same", {"reference": world.model})):
        program_of("a-lol", world.options("unpaired", reward=world.reward, **options), tmp_path / name)
        files.append((tmp_path / name / "values-data.json").read_text(encoding="utf-8"))
    assert files[0] == files[2]
    assert files[0] != files[1]


def test_a_resumed_run_keeps_the_values_with_which_it_was_started(world: World, tmp_path: Path) -> None:
    """The data have scores, so nothing but the values asks for the reward; by the time of resuming it says something else."""

    class Killed(BaseException): ...

    class KillAt:
        def started(self, *_: Any, **__: Any) -> None: ...
        def ended(self, status: str) -> None: ...
        def stepped(self, step: int, metrics: Any) -> None:
            if step == 3:
                raise Killed

    def options(out: str) -> dict[str, Any]:
        reward = its_reward(tmp_path, "return [float(len(c)) for c in completions]")
        return world.options("unpaired", reward=reward, steps=5, checkpoint_every=2, out=str(tmp_path / out))

    whole = train("a-lol", options("whole"))
    with pytest.raises(Killed):
        train("a-lol", options("killed"), callbacks=[KillAt()])
    its_reward(tmp_path, "return [1000.0 for c in completions]")
    assert outcome(resume(tmp_path / "killed")) == outcome(whole)


def test_rows_without_a_value_are_left_out_and_counted(world: World, tmp_path: Path) -> None:
    reward = its_reward(tmp_path, "return [None if p.startswith('The') else 0.0 for p in prompts]")
    with pytest.warns(TelosWarning, match="--data: 3 rows left out: no answer of the reference to their prompts got a score"):
        program = program_of("a-lol", world.options("unpaired", reward=reward), tmp_path / "run")
    assert [prompt for prompt in program.table.prompts if prompt.startswith("The")] == []
    assert len(program.table) == 9


def test_too_few_answers_with_an_advantage_are_refused(world: World, tmp_path: Path) -> None:
    reward = its_reward(tmp_path, "return [48.5 for p in prompts]")
    message = "has only 3 answers that are better than the reference's own, fewer than --batch_size 4"
    with pytest.raises(UsageError, match=message):
        program_of("a-lol", world.options("unpaired", reward=reward), tmp_path / "run")
    options = world.options("unpaired", reward=reward, value_filter=False, priority=False)
    assert len(program_of("a-lol", options, tmp_path / "all").table) == 12


def test_advantages_need_a_reward_and_priority_needs_the_filter(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--reward is missing"):
        program_of("a-lol", world.options("unpaired"), tmp_path)
    with pytest.raises(UsageError, match="it needs --value_filter"):
        program_of("a-lol", world.options("unpaired", reward=world.reward, value_filter=False), tmp_path)


def test_a_reward_model_scores_answers_that_end_at_once(world: World, tmp_path: Path) -> None:
    """One token in six that the tiny model writes is the end token, so some of the reference's answers are empty."""
    program = program_of("a-lol", world.options("unpaired", reward=world.reward_model, value_samples=8), tmp_path)
    assert np.isfinite(program.table.columns["advantage"]).all()


def test_held_out_answers_have_advantages_and_are_not_filtered(world: World, tmp_path: Path) -> None:
    reward = its_reward(tmp_path, "return [47.5 for p in prompts]")
    program = program_of("a-lol", world.options("unpaired", reward=reward, eval_data=world.data["unpaired"]), tmp_path / "run")
    assert program.eval_table.columns["advantage"] == [i - 7.5 for i in range(12)]
    assert len(program.table) == 4


def test_priority_draws_rows_in_proportion_to_their_advantage(world: World, tmp_path: Path) -> None:
    reward = its_reward(tmp_path, "return [43.5 for p in prompts]")
    program = program_of("a-lol", world.options("unpaired", reward=reward), tmp_path / "run")
    advantage = np.array(program.table.columns["advantage"])
    assert advantage.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]
    draws = Counter(int(row) for index in range(3000) for row in program.next_rows(index))
    share = np.array([draws[i] for i in range(8)]) / 12_000
    expected = advantage / advantage.sum()
    assert (np.abs(share - expected) < 4 * np.sqrt(expected / 12_000)).all(), "within four standard errors"
    assert program.next_rows(7).tolist() == program.next_rows(7).tolist(), "a step's rows depend on the seed and the step alone"


def test_without_priority_every_kept_row_is_seen_once_an_epoch(world: World, tmp_path: Path) -> None:
    reward = its_reward(tmp_path, "return [43.5 for p in prompts]")
    program = program_of("a-lol", world.options("unpaired", reward=reward, priority=False), tmp_path / "run")
    assert sorted(int(row) for index in range(2) for row in program.next_rows(index)) == list(range(8))


# The reference --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("key", "variant"), [("a-lol", "ref-free"), ("gold", "delta")])
def test_no_reference_is_in_memory_where_the_variant_reads_none_unless_it_was_named(
    world: World, tmp_path: Path, key: str, variant: str
) -> None:
    options = world.options("unpaired", variant=variant, **({"reward": world.reward} if key == "a-lol" else {}))
    program = program_of(key, options, tmp_path / "none")
    assert program.reference is None
    assert "kl" not in program.step(0)
    named = program_of(key, options | {"reference": world.other_model, "eval_every": 1}, tmp_path / "named")
    assert named.reference is not None
    assert named.step(0)["kl"] > 0


def test_the_reference_cache_serves_a_filtered_table(world: World, tmp_path: Path) -> None:
    """Rows of the table are not rows of the file here: the cache is asked by what is left."""
    options = world.options("unpaired", reward=world.reward, reference=world.other_model, eval_prompts=0, steps=3)
    options["reward"] = its_reward(tmp_path, "return [44.5 - len(p) % 3 for p in prompts]")
    plain = train("a-lol", options | {"out": str(tmp_path / "plain")})
    assert len(json.loads((plain.path / "values-data.json").read_text(encoding="utf-8"))) == 12
    assert plain.facts["rows with a positive advantage"] < 12
    for name in ("writes", "reads"):
        run = train("a-lol", options | {"reference_cache": str(tmp_path / "cache"), "out": str(tmp_path / name)})
        for one, two in zip(numbers(plain), numbers(run), strict=True):
            assert one == pytest.approx(two, rel=1e-4)
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1
    assert program_of("a-lol", options | {"reference_cache": str(tmp_path / "cache")}, tmp_path / "again").reference is None


def test_the_reference_cache_is_refused_where_the_reference_scores_answers_to_other_prompts(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--reference_cache cannot serve kto"):
        program_of("kto", world.options("unpaired", reference_cache=str(tmp_path / "cache")), tmp_path / "run")


# Ranked lists -----------------------------------------------------------------------------------------------------------------------------------


def check_lists(program: Any, rows: list[int]) -> RankedLogps:
    """The view of these rows, in which every answer has its own log-probability and nothing stands where there is none."""
    seen = views(program)
    batch = program.batch(program.table, rows)
    with torch.no_grad():
        program.losses(program.model, batch)
    view = seen[-1]
    columns = program.table.columns
    for i, row in enumerate(rows):
        answers = columns["completion_ids"][row]
        for k in range(view.mask.shape[1]):
            if k < len(answers):
                alone = log_likelihood(program.model, columns["prompt_ids"][row].tolist(), answers[k].tolist())
                assert float(view.sum[i, k]) == pytest.approx(alone, rel=1e-4, abs=1e-4)
                assert int(view.mask[i, k].sum()) == len(answers[k])
                assert float(view.quality[i, k]) == pytest.approx(columns["quality"][row][k])
            else:
                assert not view.mask[i, k].any()
                assert view.quality[i, k] == -math.inf
    return view


@pytest.mark.parametrize("key", ["rrhf", "pro"])
def test_lists_of_different_sizes_are_scored_answer_by_answer_from_best_to_worst(world: World, tmp_path: Path, key: str) -> None:
    program = program_of(key, world.options("ranked"), tmp_path)
    view = check_lists(program, [1, 0, 3, 2])
    assert view.present.sum(1).tolist() == [3, 2, 3, 2]
    assert (view.quality.diff(dim=1)[torch.isfinite(view.quality[:, 1:])] <= 0).all()
    assert view.quality[2].tolist() == [3, 2, 0.5], "row 3 of the file has the scores 2, 0.5 and 3"


def test_lists_of_answers_in_conversations_are_learned_from(world: World, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [user(PROMPTS[i])],
            "completions": [[assistant(text.strip())] for text in (GOOD[i % 8], BAD[i % 8], GOOD[(i + 1) % 8])[: 2 + i % 2]],
            "ranks": [2, 1, 3][: 2 + i % 2],
        }
        for i in range(8)
    ]
    options = world.options("ranked", data=str(write_jsonl(tmp_path / "lists.jsonl", rows)), model=world.chat_model)
    program = program_of("pro", options, tmp_path / "run")
    check_lists(program, [0, 1, 5])
    words = program.model.tokenizer
    texts = [words.decode(ids) for ids in program.table.columns["completion_ids"][1]]
    assert texts == [f"{text.strip()}<|im_end|>" for text in (BAD[1], GOOD[1], GOOD[2])]
    assert program.table.columns["quality"][1] == [-1.0, -2.0, -3.0]
    assert math.isfinite(program.step(0)["loss"])


def test_pairs_are_lists_of_two(world: World, tmp_path: Path) -> None:
    program = program_of("rrhf", world.options("ranked", data=world.data["preference"]), tmp_path)
    view = check_lists(program, [0, 7])
    assert view.quality.tolist() == [[1.0, 0.0]] * 2
    metrics = program.step(0)
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "nll_loss"} <= metrics.keys()


def test_a_reference_has_no_effect_on_ranked_lists_and_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--reference has no effect on rrhf"):
        program_of("rrhf", world.options("ranked", reference=world.other_model), tmp_path)
