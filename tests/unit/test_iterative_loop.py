"""The iterative loop on a tiny model: who writes, what the oracle sees and says, what is arranged, learned from and continued."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare

from support import PROMPTS, World, plain, snapshot
from telos.algorithms.language import apo, dno, dpa, nash_md, online_dpo, rejection_sampling_sft
from telos.algorithms.language._arrange import Arranged, best_answers, draw_answers, draw_pairs, labelled_pairs, ranked_pairs
from telos.algorithms.language._loop_iterative import PairedConfig
from telos.algorithms.language._loop_rollouts import layout
from telos.algorithms.run import build, prepare
from telos.core import checkpoint
from telos.core import config as configs
from telos.core.errors import Failure, UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import numpy_generator
from telos.data.batches import REWARD_VALID
from telos.data.formats import read_examples
from telos.data.readers import read_rows
from telos.functional.pairwise import PairLogps
from telos.models.packing import Answers
from telos.objectives.judges import HumanQueue, Judged, bradley_terry, compare_all, open_judge
from telos.objectives.rewards import FunctionReward, Scores

NAN = math.nan


def make(method: Method, world: World, out: Path, **options: Any) -> Any:
    """A program of a method that need not be listed."""
    given = world.options("iterative", **options) | {"out": str(out)}
    config: Any = configs.from_mapping(method.config, given)
    run = Run.create(method.key, config)
    prepare(config)
    return build(method, config, run)


def judged(wins: Any = None, scores: Any = None, seed: int = 0, **more: Any) -> Judged:
    if scores is not None:
        scores = np.array(scores, dtype=float)
        scores = scores[..., None] if scores.ndim == 2 else scores
        wins = bradley_terry(scores.sum(-1))
    wins = np.array(wins, dtype=float)
    lengths = np.ones(wins.shape[:2], dtype=np.int64)
    return Judged(wins, scores, lengths, {}, numpy_generator(seed, "test"), **more)


def spying(method: Method, **changes: Any) -> tuple[Method, dict[str, list[Any]]]:
    """The method with what its functions are given."""
    seen: dict[str, list[Any]] = {"judged": [], "views": [], "advanced": []}

    def arrange(config: Any, found: Judged) -> Arranged:
        seen["judged"].append(found)
        assert method.arrange is not None
        return method.arrange(config, found)

    def loss(config: Any, view: Any) -> Any:
        seen["views"].append(view)
        assert method.loss is not None
        return method.loss(config, view)

    return dataclasses.replace(method, arrange=arrange, loss=loss, **changes), seen


def write_function(path: Path, body: str) -> str:
    path.write_text(body, encoding="utf-8")
    return str(path)


# Judged -----------------------------------------------------------------------------------------------------------------------------------


def test_a_win_rate_is_the_mean_over_the_other_answers_that_were_compared() -> None:
    found = judged([[[0.5, 0.9, NAN], [0.1, 0.5, 0.3], [NAN, 0.7, 0.5]], [[0.5, NAN, NAN]] + [[NAN, NAN, NAN]] * 2])
    np.testing.assert_allclose(found.win_rate, [[0.9, 0.2, 0.7], [NAN, NAN, NAN]])
    np.testing.assert_array_equal(found.valid, [[True] * 3, [False] * 3])
    np.testing.assert_allclose(found.reward, found.win_rate)


def test_with_scores_the_reward_is_their_sum_and_an_answer_without_one_of_them_is_not_judged() -> None:
    found = judged(scores=[[[1.0, 2.0], [NAN, 3.0]]])
    np.testing.assert_allclose(found.reward, [[3.0, NAN]])
    np.testing.assert_array_equal(found.valid, [[True, False]])
    assert np.isnan(found.wins[0, 0, 1])


def test_bradley_terry_is_the_logistic_of_the_scaled_difference() -> None:
    wins = bradley_terry(np.array([[2.0, 0.5, NAN]]), scale=3.0)
    assert wins[0, 0, 1] == pytest.approx(1 / (1 + math.exp(-0.5)))
    assert wins[0, 0, 1] + wins[0, 1, 0] == 1
    assert wins[0, 0, 0] == 0.5
    assert np.isnan(wins[0, :, 2]).all()


# Arranging --------------------------------------------------------------------------------------------------------------------------------


def test_pairs_leave_out_answers_that_were_not_judged_and_answers_that_are_the_same() -> None:
    same = np.zeros((2, 3, 3), dtype=bool)
    same[0] = np.eye(3)
    same[0, 0, 2] = same[0, 2, 0] = True
    found = judged(scores=[[1.0, 2.0, 1.0], [1.0, NAN, NAN]], same=same)
    prompt, i, j = draw_pairs(found, 10)
    assert sorted(zip(prompt, i, j, strict=True)) == [(0, 0, 1), (0, 1, 2)]
    for arrange in (labelled_pairs, ranked_pairs):
        assert sorted(arrange(found, 10).prompt) == [0, 0]
        assert len(arrange(judged(scores=[[NAN, NAN]]), 1).prompt) == 0


def test_drawn_pairs_are_uniform_among_those_allowed_and_never_twice_the_same() -> None:
    found = judged(scores=np.zeros((3000, 4)))
    prompt, i, j = draw_pairs(found, 2)
    assert Counter(prompt.tolist()) == dict.fromkeys(range(3000), 2)
    assert len(set(zip(prompt.tolist(), i.tolist(), j.tolist(), strict=True))) == 6000
    counts = Counter(zip(i.tolist(), j.tolist(), strict=True))
    assert chisquare([counts[pair] for pair in itertools.combinations(range(4), 2)]).pvalue > 0.001
    allowed = np.zeros((3000, 4, 4), dtype=bool)
    allowed[:, 1, 2] = True
    assert set(zip(*draw_pairs(found, 3, allowed)[1:], strict=True)) == {(1, 2)}


def test_labels_are_drawn_with_the_oracles_probability() -> None:
    wins = np.broadcast_to(np.array([[0.5, 0.8], [0.2, 0.5]]), (2000, 2, 2))
    arranged = labelled_pairs(judged(wins), 1)
    assert binomtest(int((arranged.first == 0).sum()), 2000, 0.8).pvalue > 0.001
    assert (arranged.first + arranged.second == 1).all()
    certain = labelled_pairs(judged(np.round(wins)), 1)
    assert (certain.first == 0).all()


def test_ranked_pairs_put_the_higher_win_rate_first_and_give_both() -> None:
    arranged = ranked_pairs(judged([[[0.5, 0.2, 0.4], [0.8, 0.5, 0.7], [0.6, 0.3, 0.5]]]), 3)
    assert arranged.first_score is not None
    assert arranged.second_score is not None
    order = {0: 0.3, 1: 0.75, 2: 0.45}
    assert len(arranged.prompt) == 3
    for first, second, high, low in zip(arranged.first, arranged.second, arranged.first_score, arranged.second_score, strict=True):
        assert (high, low) == (pytest.approx(order[first]), pytest.approx(order[second]))
        assert high > low


def test_best_answers_are_the_highest_and_never_those_without_a_value() -> None:
    values = np.array([[1.0, 3.0, NAN, 2.0], [NAN, NAN, -5.0, NAN], [NAN] * 4])
    found = best_answers(values, 2)
    assert list(zip(found.prompt, found.first, strict=True)) == [(0, 1), (0, 3), (1, 2)]
    np.testing.assert_allclose(found.first_score, [3.0, 2.0, -5.0])
    drawn = draw_answers(values, 2, numpy_generator(0, "test"))
    assert sorted(drawn.prompt) == [0, 0, 1]
    assert all(score == values[p, i] for p, i, score in zip(drawn.prompt, drawn.first, drawn.first_score, strict=True))


def test_dno_keeps_pairs_of_the_margin_and_hard_labels_no_ties() -> None:
    wins = [[[0.5, 0.5, 0.9], [0.5, 0.5, 0.9], [0.1, 0.1, 0.5]]]  # win rates 0.7, 0.7, 0.1
    pairs = {}
    for options in ({}, {"min_margin": 0.5}, {"labels": "hard"}):
        arranged = dno.arrange(dno.Config(examples_per_prompt=9, **options), judged(wins))
        pairs[str(options)] = sorted(zip(arranged.first, arranged.second, strict=True))
    assert list(map(len, pairs.values())) == [3, 2, 2]
    assert pairs["{'min_margin': 0.5}"] == pairs["{'labels': 'hard'}"] == [(0, 2), (1, 2)]


def test_nash_md_scores_the_policys_answers_by_their_wins_over_the_opponents() -> None:
    wins = np.full((1, 4, 4), NAN)  # two answers of the policy, then two of the opponent
    wins[0, 0, 2:], wins[0, 1, 2:] = [0.6, 1.0], [0.3, NAN]
    arranged = nash_md.arrange(nash_md.Config(samples_per_prompt=2, examples_per_prompt=2), judged(wins))
    assert {int(i): float(s) for i, s in zip(arranged.first, arranged.first_score, strict=True)} == {
        0: pytest.approx(0.8),
        1: pytest.approx(0.3),
    }


def test_apo_extrapolates_along_the_change_of_what_was_learned() -> None:
    found = apo.advance(apo.Config(alpha=0.5), {"w": torch.tensor([2.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])})
    assert found["w"].tolist() == [2.5, 0.0]


# Judges -----------------------------------------------------------------------------------------------------------------------------------


class Longer:
    """Prefers longer texts with certainty; remembers what it was asked."""

    name = "longer"

    def __init__(self) -> None:
        self.asked: list[tuple[Any, str, str, list[int], Any]] = []

    def score(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Mapping[str, list[Any]]
    ) -> Scores:
        self.asked += zip(prompts, completions, columns["opponents"], completion_ids, columns["topic"], strict=True)
        values = torch.tensor([float(len(a) > len(b)) for a, b in zip(completions, columns["opponents"], strict=True)])
        return Scores(values, torch.full((len(prompts),), REWARD_VALID, dtype=torch.int8))

    def close(self) -> None: ...


def test_every_two_different_answers_are_compared_once_in_either_order() -> None:
    judge, rounds = Longer(), 60
    answers = [["a", "bbb", "cc", "bbb"]] * rounds
    ids = [[[1], [2], [3], [4]]] * rounds
    wins = compare_all(judge, list(range(rounds)), answers, ids, {"topic": [f"t{i}" for i in range(rounds)]}, numpy_generator(0, "test"))
    for one in wins:
        np.testing.assert_array_equal(one, [[0.5, 0, 0, 0], [1, 0.5, 1, 0.5], [1, 0, 0.5, 0], [1, 0.5, 1, 0.5]])
    assert len(judge.asked) == 5 * rounds
    for prompt, first, second, tokens, topic in judge.asked:
        assert topic == f"t{prompt}"
        assert {first, second} <= {"a", "bbb", "cc"}
        assert tokens[0] in {"a": (1,), "bbb": (2, 4), "cc": (3,)}[first]
    shorter_first = sum(len(first) < len(second) for _, first, second, _, _ in judge.asked)
    assert binomtest(shorter_first, 5 * rounds, 0.5).pvalue > 0.001, "no answer is always shown first"


def test_a_judge_that_gives_no_probability_is_refused_and_one_that_gives_none_leaves_the_pair_open() -> None:
    def judge(values: list[float | None]) -> Any:
        return FunctionReward(lambda completions, opponents: values[: len(completions)], name="judge")

    arguments = (["p"], [["a", "b", "c"]], [[[1], [2], [3]]], {}, numpy_generator(0, "test"))
    with pytest.raises(UsageError, match=r"'judge' gave 1\.5; it must give the probability"):
        compare_all(judge([0.1, 1.5, 0.2]), *arguments)
    wins = compare_all(judge([None, 1.0, 0.5]), *arguments)[0]
    assert np.isnan(wins).sum() == 2
    assert np.isfinite(np.diag(wins)).all()
    with pytest.raises(Failure, match="gave no reward for any of the 3 rows"):
        compare_all(judge([None] * 3), *arguments)


@pytest.mark.parametrize("spec", ["gold:review", "human:", "org/model", "."])
def test_what_compares_nothing_is_no_judge(spec: str) -> None:
    with pytest.raises(UsageError, match=r"--judge .*`opponents`, or human:FOLDER"):
        open_judge(spec, timeout=1, on_error="stop")


def test_a_function_without_opponents_is_no_judge(world: World) -> None:
    (world.root / "alone.py").write_text("def alone(completions):\n    return [0.5] * len(completions)\n")
    with pytest.raises(UsageError, match="has no parameter `opponents`"):
        open_judge(f"{world.root / 'alone.py'}:alone", timeout=20, on_error="stop")


# What is refused --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (online_dpo.METHOD, {"reward": []}, "give one of --reward .* and --judge"),
        (online_dpo.METHOD, {"judge": "human:folder"}, "give one of --reward .* and --judge"),
        (online_dpo.METHOD, {"reward": [], "judge": "human:x", "reward_scale": 2.0}, "--reward_scale has no effect on a judge"),
        (online_dpo.METHOD, {"reward": [], "judge": "human:x", "reward_timeout": 2.0}, "--reward_timeout has no effect on a human"),
        (online_dpo.METHOD, {"samples_per_prompt": 1}, "--samples_per_prompt 1 must be >= 2"),
        (dno.METHOD, {"reference": "tinylm"}, "--reference has no effect on dno"),
        (rejection_sampling_sft.METHOD, {"reward_scale": 2.0}, "--reward_scale has no effect"),
        (dpa.METHOD, {}, "dpa weighs several rewards"),
        (dpa.METHOD, {"reward": [], "judge": "human:x"}, "dpa weighs several rewards"),
        (dpa.METHOD, {"region": "positive", "max_angle": 30.0}, "--max_angle has no effect on --region positive"),
        (nash_md.METHOD, {"opponent": "average", "mixture": 0.5}, "--mixture has no effect on --opponent average"),
        (nash_md.METHOD, {"average_share": 0.5}, "--average_share has no effect on --opponent mixture"),
        (online_dpo.METHOD, {"batch_size": 13}, "--batch_size 13 is larger than the 12 usable prompts"),
    ],
)
def test_options_that_cannot_be_or_have_no_effect_are_refused(
    method: Method, options: dict[str, Any], message: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        make(method, world, tmp_path, **options)


def test_an_iteration_whose_answers_are_all_the_same_ends_with_what_to_do(world: World, tmp_path: Path) -> None:
    program = make(online_dpo.METHOD, world, tmp_path, top_k=1)
    with pytest.raises(Failure, match=r"iteration 1 gave no example to learn from: .*--samples_per_prompt"):
        program.step(0)


# An iteration -----------------------------------------------------------------------------------------------------------------------------


def test_the_plan_says_which_size_is_which(world: World, tmp_path: Path) -> None:
    method = dataclasses.replace(online_dpo.METHOD, writers=lambda config: {"policy": 2, "reference": 1})
    plan = make(method, world, tmp_path, examples_per_prompt=3, minibatch_size=5, epochs=2).plan()
    assert plan["prompts"] == 12
    assert plan["prompts an iteration"] == 4
    assert plan["answers a prompt"] == "2 by the policy, 1 by the reference"
    assert plan["examples an iteration, at most"] == 12
    assert plan["optimiser steps an iteration, at most"] == 2 * 3
    assert plan["iterations"] == 3


def logps_under(model: Any, rollouts: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.logprobs(layout(rollouts)).logprobs


def test_the_answers_to_a_prompt_stand_together_source_after_source_and_are_the_sources_own(world: World, tmp_path: Path) -> None:
    method = dataclasses.replace(
        online_dpo.METHOD, config=nash_md.Config, writers=lambda config: {"average": 1, "policy": 2, "reference": 1}
    )
    program = make(method, world, tmp_path, reference=world.other_model, average_share=0.5, opponent="average")
    with torch.no_grad():  # so that the average is not the policy
        for p in program.model.parameters():
            p.mul_(1.2)
    rollouts, texts = program._write(0)
    assert len(texts) == len(rollouts) == 16
    assert rollouts.row.view(4, 4).unique(dim=1).shape == (4, 1)
    assert texts == program.model.tokenizer.batch_decode(
        [ids[:n] for ids, n in zip(rollouts.completion_ids.tolist(), rollouts.completion_length.tolist(), strict=True)],
        skip_special_tokens=True,
    )
    models = {"average": program.average.workers[0].model, "policy": program.model, "reference": program.reference.workers[0].model}
    for name, place in program.places.items():
        for other, model in models.items():
            gap = (logps_under(model, rollouts) - rollouts.logprobs).abs().view(4, 4, -1)[:, place]
            assert (float(gap.max()) < 1e-4) == (other == name), (name, other)


def test_the_kl_is_that_of_the_policys_own_answers(world: World, tmp_path: Path) -> None:
    method = dataclasses.replace(
        nash_md.METHOD,
        arrange=lambda config, found: best_answers(found.reward, 1),
        writers=lambda config: {"average": 1, "policy": 2},
    )
    program = make(method, world, tmp_path, reference=world.other_model, opponent="average")
    kept = []
    write = program._write
    program._write = lambda index: (found := write(index), kept.append(found[0]))[0]
    metrics = program.step(0)
    gap = (kept[0].logprobs - logps_under(program.reference.workers[0].model, kept[0])) * kept[0].action_mask
    assert metrics["kl"] == pytest.approx(float(gap.sum(1).view(4, 3)[:, 1:].mean()), rel=1e-4)
    assert metrics["completions/mean_length"] == kept[0].completion_length.view(4, 3)[:, 1:].float().mean()


def test_what_is_arranged_reaches_the_loss_answer_by_answer_with_its_scores(world: World, tmp_path: Path) -> None:
    arranged: list[Arranged] = []

    def arrange(config: PairedConfig, found: Judged) -> Arranged:
        arranged.append(ranked_pairs(found, 2))
        return arranged[-1]

    method, seen = spying(dataclasses.replace(online_dpo.METHOD, arrange=arrange))
    program = make(method, world, tmp_path, examples_per_prompt=2, minibatch_size=16)
    kept = []
    write = program._write
    program._write = lambda index: (found := write(index), kept.append(found[0]))[0]
    program.step(0)
    view, found = seen["views"][0], arranged[0]
    lengths = kept[0].completion_length.view(4, 3).numpy()
    wanted = zip(
        found.first_score, found.second_score, lengths[found.prompt, found.first], lengths[found.prompt, found.second], strict=True
    )  # type: ignore[arg-type]
    given = zip(view.chosen_score, view.rejected_score, view.chosen.length, view.rejected.length, strict=True)
    assert sorted(tuple(round(float(x), 5) for x in row) for row in given) == sorted(
        tuple(round(float(x), 5) for x in row) for row in wanted
    )


def test_the_anchor_is_the_policy_at_the_start_of_the_iteration_and_the_reference_that_of_the_run(world: World, tmp_path: Path) -> None:
    method, seen = spying(online_dpo.METHOD, needs=frozenset({"reference", "anchor"}))
    program = make(method, world, tmp_path, examples_per_prompt=2, minibatch_size=4)
    first = program.model.frozen_copy()
    assert program.step(0)["kl"] == pytest.approx(0, abs=1e-4)
    start = program.model.frozen_copy()
    seen["views"].clear()
    assert abs(program.step(1)["kl"]) > 1e-3
    views: list[PairLogps] = seen["views"]
    assert len(views) == 2

    def gap(one: Any, other: Any) -> float:
        return (one.sum - other.sum).abs().max().item()

    assert gap(views[0].chosen, views[0].anchor_chosen) < 1e-4, "before the first update the policy is its own anchor"
    assert gap(views[0].rejected, views[0].anchor_rejected) < 1e-4
    assert gap(views[1].chosen, views[1].anchor_chosen) > 1e-3
    assert gap(views[1].chosen, views[1].reference_chosen) > 1e-3
    batch = program.last_batch
    answers = Answers.repeat(batch["prompt_ids"], batch["prompt_length"], (batch["chosen_ids"], batch["chosen_length"]))
    with torch.no_grad():
        for model, found in ((start, views[1].anchor_chosen), (first, views[1].reference_chosen)):
            torch.testing.assert_close(model.logprobs(answers).logprobs.sum(1), found.sum, rtol=0, atol=1e-4)


def test_an_iteration_takes_the_planned_number_of_updates_and_sees_each_example_once_an_epoch(world: World, tmp_path: Path) -> None:
    method, seen = spying(online_dpo.METHOD)
    program = make(method, world, tmp_path, examples_per_prompt=2, minibatch_size=3, epochs=2)
    assert program.step(0)["examples"] == 8
    assert program.learner.workers[0].applied == 2 * 3
    assert [len(view.margin) for view in seen["views"]] == [3, 3, 2] * 2
    one, two = (sorted(torch.cat([v.reference_chosen.sum for v in part]).tolist()) for part in (seen["views"][:3], seen["views"][3:]))
    assert one == two


def test_with_history_later_iterations_learn_from_earlier_examples_too_but_not_longer(world: World, tmp_path: Path) -> None:
    method, seen = spying(online_dpo.METHOD, needs=frozenset({"reference", "anchor", "history"}))
    program = make(method, world, tmp_path, minibatch_size=2)
    first = set()
    for index in range(3):
        seen["views"].clear()
        program.step(index)
        rows = {round(value, 4) for view in seen["views"] for value in view.anchor_chosen.sum.tolist()}
        first = first or rows
        assert len(seen["views"]) == 2
    assert [len(examples[0]) for examples in program.history] == [4, 4, 4]
    assert rows - first, "the newest examples are among them"
    joined = [round(float(v), 4) for examples in program.history for v in examples[2][:, 0].sum(-1)]
    assert rows <= set(joined), "examples keep the anchor of the iteration that made them"


def test_samples_of_a_pair_reach_the_loss_with_their_reference(world: World, tmp_path: Path) -> None:
    def arrange(config: PairedConfig, found: Judged) -> Arranged:
        count = len(found.wins)
        zero = np.zeros(count, dtype=np.int64)
        return Arranged(np.arange(count), zero, zero + 1, samples=np.tile([2, 0], (count, 1)))

    method, seen = spying(dataclasses.replace(online_dpo.METHOD, arrange=arrange))
    make(method, world, tmp_path, samples_per_prompt=3, minibatch_size=8).step(0)
    view: PairLogps = seen["views"][0]
    assert view.samples is not None
    torch.testing.assert_close(view.samples.sum[:, 1], view.chosen.sum)
    assert float((view.samples.sum[:, 0] - view.chosen.sum).detach().abs().max()) > 1e-2
    assert float(view.samples.ratio.detach().abs().max()) < 1e-4


def test_the_average_moves_by_its_share_each_iteration_and_is_not_trained(world: World, tmp_path: Path) -> None:
    for rank in (0, 2):
        program = make(nash_md.METHOD, world, tmp_path / f"{rank}", opponent="average", average_share=0.25, lora_rank=rank)
        average = program.average.workers[0].model
        before = snapshot(average)
        program.step(0)
        learned, after = snapshot(program.model), snapshot(average)
        moved = 0.0
        for name, value in after.items():
            torch.testing.assert_close(value, before[name].lerp(learned[name], 0.25))
            moved = max(moved, float((value - before[name]).abs().max()))
        assert moved > 0
        assert average is not program.model


def test_the_next_iteration_begins_where_advance_says(world: World, tmp_path: Path) -> None:
    calls = []

    def advance(config: Any, weights: Mapping[str, Any], previous: Mapping[str, Any]) -> dict[str, Any]:
        calls.append(({k: v.clone() for k, v in weights.items()}, {k: v.clone() for k, v in previous.items()}))
        return {name: value + 1 for name, value in weights.items()}

    program = make(dataclasses.replace(apo.METHOD, advance=advance), world, tmp_path)
    start = snapshot(program.model)
    for index in range(2):
        program.step(index)
        for name, value in program.learner.workers[0].weights().items():
            torch.testing.assert_close(value, calls[index][0][name] + 1)
    name = next(iter(calls[0][0]))
    torch.testing.assert_close(calls[0][1][name], start[name])
    torch.testing.assert_close(calls[1][1][name], calls[0][0][name], msg="the weights learned before, not those advanced")


@pytest.mark.parametrize(("share", "rank"), [(0.0, 0), (0.4, 0), (1.0, 0), (0.4, 2)])
def test_the_mixture_writes_with_the_token_wise_geometric_mean_of_policy_and_reference(
    share: float, rank: int, world: World, tmp_path: Path
) -> None:
    program = make(nash_md.METHOD, world, tmp_path, reference=None if rank else world.other_model, mixture=share, lora_rank=rank)
    with torch.no_grad():  # so that a new adapter says something
        for _, p in program.model.trainable():
            p.add_(0.2 * torch.randn_like(p) * rank)
    rollouts, _ = program._write(0)
    theirs = program.reference.workers[0]
    logits = []
    for model, under in ((program.model, contextlib.nullcontext()), (theirs.model, theirs.as_it_scores())):
        with torch.no_grad(), under:
            logits.append((model.states(layout(rollouts)) @ model.base.get_output_embeddings().weight.T).log_softmax(-1))
    assert float((logits[0] - logits[1]).abs().max()) > 0.1
    mixed = ((1 - share) * logits[0] + share * logits[1]).log_softmax(-1)
    expected = mixed.gather(-1, rollouts.completion_ids[..., None]).squeeze(-1)
    gap = ((expected - rollouts.logprobs) * rollouts.action_mask).abs().view(-1, program.n, expected.shape[1])[:, program.places["mixture"]]
    assert float(gap.max()) < 1e-3


# Oracles ----------------------------------------------------------------------------------------------------------------------------------


def test_a_judge_from_a_file_is_asked_with_the_datas_columns_and_decides_the_pairs(world: World, tmp_path: Path) -> None:
    judge = (
        "def longer(prompts, completions, opponents, answer, **_):\n"
        "    assert all(isinstance(a, str) for a in answer)\n"
        "    return [float(len(a) > len(b)) if len(a) != len(b) else 0.5 for a, b in zip(completions, opponents)]\n"
    )
    spec = write_function(tmp_path / "judge.py", judge) + ":longer"
    method, seen = spying(online_dpo.METHOD)
    program = make(method, world, tmp_path / "run", reward=[], judge=spec)
    texts: list[str] = []
    write = program._write
    program._write = lambda index: (found := write(index), texts.extend(found[1]))[0]
    metrics = program.step(0)
    assert "reward" not in metrics
    found = seen["judged"][0]
    assert found.scores is None
    for p, i, j in itertools.product(range(4), range(3), range(3)):
        a, b = len(texts[3 * p + i]), len(texts[3 * p + j])
        assert found.wins[p, i, j] == (0.5 if a == b else float(a > b))
    program.judge.close()


def test_a_human_is_waited_for_and_decides_the_pairs(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "human"
    method, seen = spying(online_dpo.METHOD)
    program = make(method, world, tmp_path / "run", reward=[], judge=f"human:{folder}", samples_per_prompt=2)
    program.judge.poll = 0.01
    told = threading.Event()
    program.judge.tell = lambda text: told.set()

    def human() -> None:
        told.wait()
        queue = HumanQueue(folder)
        for question in queue.waiting():
            queue.answer(question["id"], 1 if len(question["first"]) >= len(question["second"]) else 2)

    thread = threading.Thread(target=human)
    thread.start()
    program.step(0)
    thread.join()
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert {question["prompt"] for question in questions} <= set(PROMPTS)
    assert set(np.unique(seen["judged"][0].wins)) <= {0.0, 0.5, 1.0}
    asked = (seen["judged"][0].wins[:, 0, 1] != 0.5).sum()
    assert asked == len(questions) == 4


def test_several_rewards_are_kept_apart_and_added_up(world: World, tmp_path: Path) -> None:
    functions = "def length(completions, **_):\n    return [float(len(c)) for c in completions]\n\n"
    functions += "def minus(completions, **_):\n    return [-2.0 * len(c) for c in completions]\n"
    file = write_function(tmp_path / "rewards.py", functions)
    method, seen = spying(online_dpo.METHOD)
    program = make(method, world, tmp_path / "run", reward=[f"{file}:length", f"{file}:minus"], reward_scale=4.0)
    metrics = program.step(0)
    found = seen["judged"][0]
    assert found.scores is not None
    assert found.scores.shape == (4, 3, 2)
    np.testing.assert_allclose(found.scores[..., 1], -2 * found.scores[..., 0])
    np.testing.assert_allclose(found.wins, bradley_terry(-found.scores[..., 0] / 4))
    assert metrics["reward/1"] == pytest.approx(found.scores[..., 0].mean())
    assert metrics["reward/2"] == pytest.approx(-2 * metrics["reward/1"])
    assert metrics["reward"] == pytest.approx(-metrics["reward/1"])
    for reward in program.rewards:
        reward.close()


def test_answers_without_a_reward_are_counted_and_in_no_pair(world: World, tmp_path: Path) -> None:
    body = "def some(completions, **_):\n    return [None if i % 3 == 0 else float(len(c)) for i, c in enumerate(completions)]\n"
    arranged: list[Arranged] = []

    def arrange(config: PairedConfig, found: Judged) -> Arranged:
        arranged.append(online_dpo.arrange(config, found))
        return arranged[-1]

    method, reward = dataclasses.replace(online_dpo.METHOD, arrange=arrange), write_function(tmp_path / "some.py", body) + ":some"
    program = make(method, world, tmp_path / "run", reward=[reward], examples_per_prompt=3)
    metrics = program.step(0)
    assert metrics["rewards/unusable"] == 4
    assert math.isfinite(metrics["reward"])
    assert 0 not in {*arranged[0].first, *arranged[0].second}
    program.rewards[0].close()
    body = "def none(completions, **_):\n    return [None] * len(completions)\n"
    program = make(method, world, tmp_path / "none", reward=[write_function(tmp_path / "none.py", body) + ":none"])
    with pytest.raises(Failure, match="'none' gave no reward for any of the 12 rows"):
        program.step(0)
    program.rewards[0].close()


def test_tempered_answers_tell_nothing_of_the_kl(world: World, tmp_path: Path) -> None:
    assert "kl" in make(online_dpo.METHOD, world, tmp_path / "1").step(0)
    assert "kl" not in make(online_dpo.METHOD, world, tmp_path / "2", temperature=0.9).step(0)


# DPA's prompts ----------------------------------------------------------------------------------------------------------------------------


def two_rewards(folder: Path) -> list[str]:
    body = (
        "def length(prompts, completions, direction, **_):\n"
        "    assert not any('Weights' in str(prompt) for prompt in prompts), prompts\n"
        "    assert all(abs(sum(x * x for x in v) - 1) < 1e-9 for v in direction)\n"
        "    return [float(len(c)) for c in completions]\n\n"
        "def spaces(completions, **_):\n    return [float(c.count(' ')) for c in completions]\n"
    )
    file = write_function(folder / "two.py", body)
    return [f"{file}:length", f"{file}:spaces"]


def test_dpa_writes_a_direction_into_each_prompt_and_the_rewards_see_the_prompt_without_it(world: World, tmp_path: Path) -> None:
    program = make(dpa.METHOD, world, tmp_path / "run", reward=two_rewards(tmp_path), directions=2, max_prompt_length=90)
    assert len(program.table) == 24
    assert program.shown.prompts == [prompt for prompt in PROMPTS for _ in range(2)]
    directions = program.table.extra["direction"]
    for prompt, given, v in zip(program.table.prompts, program.shown.prompts, directions, strict=True):
        assert prompt == f"Weights: length {round(100 * v[0])}, spaces {round(100 * v[1])}.\n{given}"
        assert prompt == dpa.directed(given, ["length", "spaces"], v)
    assert len({tuple(v) for v in directions}) == 24
    decoded = program.model.tokenizer.decode(program.table.columns["prompt_ids"][0])
    assert decoded.endswith(program.table.prompts[0][-40:])
    assert math.isfinite(program.step(0)["loss"])
    for reward in program.rewards:
        reward.close()


def test_a_direction_for_a_conversation_is_the_systems_and_any_length_will_do() -> None:
    user = [{"role": "user", "content": "Hi"}]
    asked = dpa.directed(user, ["kind", "brief"], [3.0, -4.0])
    assert asked == [{"role": "system", "content": "Weights: kind 60, brief -80."}, *user]
    assert user == [{"role": "user", "content": "Hi"}]
    system = [{"role": "system", "content": "Be nice."}, *user]
    assert dpa.directed(system, ["kind", "brief"], [1.0, 0.0])[0]["content"] == "Weights: kind 100, brief 0.\nBe nice."


def test_rewards_are_called_by_their_functions_or_folders_and_equal_names_are_told_apart() -> None:
    assert dpa.objective_names(["a/b.py:helpful", "org/brevity-model", "gold:review"]) == ["helpful", "brevity-model", "review"]
    assert dpa.objective_names(["a.py:f", "b.py:f", "c.py:g"]) == ["f 1", "f 2", "g"]


def test_preparing_keeps_columns_and_places_with_their_rows() -> None:
    rows = [{"prompt": f"p{i}", "topic": f"t{i}"} for i in range(3)]
    config = dpa.Config(reward=("x.py:a", "x.py:b", "x.py:c"), directions=3, seed=4)
    found = dpa.prepare(config, read_examples(read_rows(rows), ("prompt-only",)))
    assert len(found) == found.counts.kept == 9
    assert found.extra["topic"] == [f"t{i}" for i in range(3) for _ in range(3)]
    assert [record["prompt"].splitlines()[-1] for record in found.records] == [f"p{i}" for i in range(3) for _ in range(3)]
    assert np.array(found.extra["direction"]).shape == (9, 3)
    again = dpa.prepare(config, read_examples(read_rows(rows), ("prompt-only",)))
    assert again.extra == found.extra
    assert dpa.prepare(dataclasses.replace(config, seed=5), read_examples(read_rows(rows), ("prompt-only",))).extra != found.extra


# Continuing -------------------------------------------------------------------------------------------------------------------------------


def everything() -> Method:
    """Pairs with samples, learned against reference and anchor from the whole history, with an average beside them and an extrapolation after."""

    def arrange(config: Any, found: Judged) -> Arranged:
        arranged = labelled_pairs(found, config.examples_per_prompt)
        return dataclasses.replace(arranged, samples=np.full((len(arranged.prompt), 1), 2))

    def advance(config: Any, weights: Mapping[str, Any], previous: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value + 0.3 * (value - previous[name]) for name, value in weights.items()}

    def loss(config: Any, pair: PairLogps) -> Any:
        assert pair.samples is not None
        assert pair.anchor_chosen is not None
        found = online_dpo.loss(online_dpo.Config(), pair)
        return dataclasses.replace(
            found, values=found.values - 0.01 * (pair.samples.ratio.sum(1) + pair.chosen.sum - pair.anchor_chosen.sum)
        )

    return dataclasses.replace(
        nash_md.METHOD,
        arrange=arrange,
        loss=loss,
        advance=advance,
        writers=lambda config: {"policy": 2, "average": 1},
        needs=frozenset({"reference", "anchor", "history"}),
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_history_average_and_extrapolation_continue_bit_for_bit(rank: int, world: World, tmp_path: Path) -> None:
    options = {"opponent": "average", "average_share": 0.3, "lora_rank": rank, "steps": 4, "lr_schedule": "cosine"}
    whole = make(everything(), world, tmp_path / "whole", **options)
    numbers = [whole.step(index) for index in range(4)]
    assert whole.state().keys() == {"learner", "cursor", "previous", "average", "history"}

    first = make(everything(), world, tmp_path / "first", **options)
    assert [first.step(index) for index in range(2)] == numbers[:2]
    checkpoint.save(tmp_path / "saved", 2, {"program": first.state()}, 1)
    _, state, faults = checkpoint.load(tmp_path / "saved")
    assert not faults
    second = make(everything(), world, tmp_path / "second", **options)
    second.load(state["program"])
    assert [second.step(index) for index in (2, 3)] == numbers[2:]
    assert plain(second.state()) == plain(whole.state())


def test_a_history_of_single_answers_continues(world: World, tmp_path: Path) -> None:
    method = dataclasses.replace(rejection_sampling_sft.METHOD, needs=frozenset({"history"}))
    whole = make(method, world, tmp_path / "whole")
    numbers = [whole.step(index) for index in range(3)]
    first = make(method, world, tmp_path / "first")
    first.step(0)
    second = make(method, world, tmp_path / "second")
    second.load(first.state())
    assert [second.step(index) for index in (1, 2)] == numbers[1:]


def test_micro_batches_change_nothing_but_rounding(world: World, tmp_path: Path) -> None:
    weights: list[Mapping[str, torch.Tensor]] = []
    options = {"opponent": "average", "minibatch_size": 4, "average_share": 0.3, "learning_rate": 1e-3}
    for size in (0, 1, 3):
        program = make(everything(), world, tmp_path / f"{size}", micro_batch_size=size, **options)
        for index in range(2):
            program.step(index)
        weights.append(snapshot(program.model))
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-5)
