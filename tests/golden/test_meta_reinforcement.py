"""MRT's bonus and the regret that it lowers, by hand; and the loop's progress of forced answers, counted again from what a scripted writer wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import STEP_ENDS, World, program_of
from telos.algorithms.language import grpo, mrt
from telos.algorithms.language._forced import Forcing, closing_tokens, progress_of_steps
from telos.algorithms.language._sampling import Writer
from telos.algorithms.language.forced_answers import Budgeted, answer_within
from telos.algorithms.language.repeated_answers import load_problems, open_policy
from telos.core.errors import UsageError
from telos.data.batches import Prompts, Rollouts
from telos.dataflow import make_backend
from telos.evaluation.reasoning import accuracy_at_budgets, cumulative_regret
from telos.functional.policy import Scored
from telos.models.generation import Sampling
from telos.objectives.process_reward import Cut, step_ends

PLAIN = {"kl_coef": 0.0}


def scored(outcomes: list[float], progress: list[list[float]], places: list[list[int]], length: list[int], alpha: float = 1.0) -> Scored:
    """One group of answers; `progress` of the steps that end at `places`."""
    n, width = len(outcomes), max(length)
    dense, steps = torch.zeros(n, width), torch.zeros(n, width, dtype=torch.bool)
    for i, (values, ends) in enumerate(zip(progress, places, strict=True)):
        dense[i, ends], steps[i, ends] = alpha * torch.tensor(values), True
    mask = torch.arange(width) < torch.tensor(length)[:, None]
    zeros = torch.zeros(n, width)
    return Scored(mask, zeros, None, None, torch.tensor(outcomes), mask.any(1), torch.zeros(n, dtype=torch.int64), dense, steps)


# The bonus -----------------------------------------------------------------------------------------------------------------------------------


def test_a_block_is_credited_with_the_outcome_and_its_own_progress_alone() -> None:
    """Two answers, blocks of 2 and 3 tokens and an end token, and of 1 and 2. α = 0.5, so a block's total is r + 0.5 progress:
    1 + 0.1, 1 + 0.4, and 0 - 0.3, 0 + 0.0; their mean is 0.55."""
    given = scored([1.0, 0.0], [[0.2, 0.8], [-0.6, 0.0]], [[1, 4], [0, 2]], [6, 3], alpha=0.5)
    found = mrt.advantages(mrt.Config(scale_rewards="none", process_coef=0.5, **PLAIN), given)
    expected = torch.tensor([[0.55, 0.55, 0.85, 0.85, 0.85, 0.85], [-0.85, -0.55, -0.55, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, expected)
    totals = torch.tensor([1.1, 1.4, -0.3, 0.0], dtype=torch.float64)
    normal = ((totals - totals.mean()) / (totals.std() + 1e-4)).float()
    by_group = mrt.advantages(mrt.Config(process_coef=0.5, **PLAIN), given)
    torch.testing.assert_close(by_group[:, :3], torch.stack([normal[[0, 0, 1]], normal[[2, 3, 3]]]))


def test_rewards_to_go_of_progress_would_not_tell_blocks_apart_and_own_progress_does() -> None:
    """Three blocks; the middle one undoes what the first had won and the last wins it again. The sum of progress from a block on is r − J before it; what
    distinguishes the blocks is their own progress."""
    given = scored([1.0, 1.0], [[0.5, -0.5, 0.5], [0.5, 0.0, 0.0]], [[0, 1, 2], [0, 1, 2]], [3, 3])
    first, second, third = mrt.advantages(mrt.Config(scale_rewards="none", **PLAIN), given)[0].tolist()
    assert first == pytest.approx(third)
    assert second == pytest.approx(first - 1.0)


def test_without_weight_the_bonus_is_gone_and_equal_blocks_give_grpo() -> None:
    """With α = 0 and as many blocks in each answer every token has its answer's advantage, GRPO's but for the number of terms in the deviation."""
    given = scored([1.0, 0.0, 0.0], [[0.3, 0.1], [0.2, -0.2], [0.0, 0.0]], [[1, 3], [0, 3], [2, 3]], [4, 4, 4], alpha=0.0)
    ours = mrt.advantages(mrt.Config(scale_rewards="none", process_coef=0.0, **PLAIN), given)
    theirs = grpo.estimate(grpo.Config(scale_rewards="none", **PLAIN), replace(given, dense=None, steps=None), {}).advantages
    torch.testing.assert_close(ours, theirs)


def test_answers_without_a_reward_take_no_part() -> None:
    whole = scored([1.0, 0.0, 1.0], [[0.5], [0.1], [0.9]], [[1], [1], [1]], [2, 2, 2])
    masked = replace(whole, mask=whole.mask & torch.tensor([True, True, False])[:, None])
    config = mrt.Config(scale_rewards="none", **PLAIN)
    found = mrt.advantages(config, masked)
    torch.testing.assert_close(found[:2], mrt.advantages(config, whole[torch.arange(2)]))
    assert found[2].abs().sum() == 0


def test_mrt_needs_a_measure_of_progress() -> None:
    with pytest.raises(UsageError, match="process_reward"):
        mrt.Config(process_reward=None)
    for spec in ("forced:0", "forced:", "forced:2,x", "forced:1,2,3"):
        with pytest.raises(UsageError, match="forced:ANSWERS"):
            Forcing.read(spec)
    assert Forcing.read("forced:3,5") == Forcing(3, 5)
    assert Forcing.read("value:somewhere") is None


# Progress in the loop ------------------------------------------------------------------------------------------------------------------------


def test_progress_is_the_change_of_the_share_of_right_forced_answers(world: World, tmp_path: Path) -> None:
    """Every forced text is judged by a rule on the text alone; the same prefixes are forced again here, one by one, and counted by hand."""
    program = program_of("mrt", world.options(mrt.METHOD, process_reward="forced:4,3", step_separators=STEP_ENDS), tmp_path)
    cut, model, forcing = Cut(tuple(STEP_ENDS), "Answer:"), program.model, Forcing(4, 3)
    prompts: Prompts = program.table.batch([0, 3]).to(model.device)
    sampling = Sampling(max_new_tokens=8)
    writer = make_backend("inline").place(lambda: Writer(model))
    rollouts, _ = writer.call("write", prompts, sampling=sampling, n=8, seed=1)
    rollouts.reward = torch.tensor([1.0, 0.0] * 8)
    asked: dict[tuple[int, str], list[float]] = {}
    mark = f" {cut.answer}"

    def judge(answers: Rollouts, texts: list[str]) -> Tensor:
        right = [float(len(text) % 2) for text in texts]
        for row, text, value in zip(answers.row.tolist(), texts, right, strict=True):
            asked.setdefault((row, text.split(mark)[0]), []).append(value)
        return torch.tensor(right)

    scores, steps, spent = progress_of_steps(rollouts, writer, model, judge, forcing, cut=cut, sampling=sampling, seed=5)
    assert all(len(values) % 4 == 0 for values in asked.values())
    assert spent >= 4
    several = 0
    for i in range(16):
        ids = rollouts.completion_ids[i, : int(rollouts.completion_length[i])].tolist()
        ends = step_ends(model.tokenizer, ids, cut)
        assert steps[i].nonzero()[:, 0].tolist() == ends
        several += len(ends) > 1
        before = [model.tokenizer.decode(ids[: end + 1], skip_special_tokens=True) for end in ends[:-1]]
        chances = [np.mean(asked[int(rollouts.row[i]), text]) for text in ("", *before)]
        torch.testing.assert_close(scores[i, ends], torch.tensor(np.diff([*chances, float(rollouts.reward[i])]), dtype=torch.float32))
    assert several  # or nothing was tested
    assert scores[~steps].abs().sum() == 0


def test_forced_answers_need_a_mark_and_scale_no_implicit_reward(world: World, tmp_path: Path) -> None:
    program = program_of("mrt", world.options(mrt.METHOD), tmp_path / "a")
    assert model_text(program.model, closing_tokens(program.model, Cut())) == " Answer:"
    with pytest.raises(UsageError, match="answer_mark"):
        closing_tokens(program.model, Cut(answer=""))
    with pytest.raises(UsageError, match="process_beta"):
        program_of("mrt", world.options(mrt.METHOD, process_beta=0.1), tmp_path / "b")


def test_a_search_that_is_cut_has_to_answer_and_one_that_fits_does_not(world: World, tmp_path: Path) -> None:
    """The reward looks for the mark that only forced answers have: so accuracy at a budget is the share of answers that are longer than it."""
    (tmp_path / "marked.py").write_text("def marked(completions, **_):\n    return [float('Answer:' in text) for text in completions]\n")
    problems = load_problems(world.data["prompt-only"], 5, reward=f"{tmp_path / 'marked.py'}:marked", max_new_tokens=8)
    cut = Cut(tuple(STEP_ENDS))
    found = answer_within(open_policy(world.model), problems, 6, (0, 2, 4, 8), forcing=Forcing(1, 2), cut=cut, seed=3)
    assert found.right.sum() == 0
    assert 1 < len(np.unique(found.tokens)) <= 8
    expected = [(found.tokens > budget).mean(1) for budget in (0, 2, 4, 8)]
    np.testing.assert_allclose(found.accuracy, np.stack(expected, 1))
    found.save(tmp_path / "kept" / "budgets.json")
    np.testing.assert_array_equal(Budgeted.open(tmp_path / "kept" / "budgets.json").accuracy, found.accuracy)


def model_text(model: Any, ids: list[int]) -> str:
    return model.tokenizer.decode(ids)


# Regret --------------------------------------------------------------------------------------------------------------------------------------


def test_regret_is_what_is_lost_on_the_way_and_progress_lowers_it() -> None:
    """Two models that end at the same success: the one that gets there sooner has less regret, by the area between their curves."""
    early, late = [0.2, 0.8, 0.8, 0.8], [0.2, 0.2, 0.2, 0.8]
    assert cumulative_regret(early).tolist() == pytest.approx([0.8, 1.0, 1.2, 1.4])
    assert cumulative_regret(late)[-1] - cumulative_regret(early)[-1] == pytest.approx(1.2)
    tokens = [10.0, 5.0, 5.0, 20.0]
    assert cumulative_regret(late, widths=tokens)[-1] - cumulative_regret(early, widths=tokens)[-1] == pytest.approx(0.6 * (5 + 5))


def test_a_budgets_accuracy_takes_whole_answers_that_fit_and_forced_ones_else() -> None:
    right, tokens = np.array([[1.0, 0.0]]), np.array([[4.0, 9.0]])
    forced = np.array([[[0.25, 0.5, 0.0], [0.0, 0.75, 0.5]]])
    found = accuracy_at_budgets(right, tokens, np.array([2.0, 5.0, 9.0]), forced)
    assert found.tolist() == [[pytest.approx(0.125), pytest.approx((1 + 0.75) / 2), pytest.approx(0.5)]]
