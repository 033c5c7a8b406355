"""How rewards are called, read and combined. Faults of reward functions: tests/faults/test_reward_faults.py."""

from __future__ import annotations

import asyncio
import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from telos.core.errors import Failure, UsageError
from telos.objectives.reward_worker import Problem, number
from telos.objectives.rewards import Combined, FunctionReward, RewardSource, Scores, load_reward, require_some, settle


def score(source: RewardSource, completions: list[Any], **columns: list[Any]) -> Scores:
    count = len(completions)
    return source.score([f"prompt {i}" for i in range(count)], completions, [[i, i + 1] for i in range(count)], columns)


class Fixed:
    """A source that gives what it was made with; NaN stands for not applicable, 'error' for an error."""

    def __init__(self, name: str, outcomes: list[Any]) -> None:
        self.name, self.outcomes, self.closed = name, outcomes, False

    def score(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: dict[str, list[Any]]) -> Scores:
        found = [Problem("failed") if outcome == "error" else outcome for outcome in self.outcomes]
        return settle(self.name, found, completions, "invalid")

    def close(self) -> None:
        self.closed = True


# Scores -----------------------------------------------------------------------------------------------------------------------------------


def test_scores_keep_valid_missing_and_wrong_rows_apart():
    scores = settle("r", [0.0, None, Problem("gave NaN"), -2.5], ["a", "b", "c", "d"], "invalid")
    assert scores.values.dtype == torch.float32
    assert scores.status.dtype == torch.int8
    assert scores.status.tolist() == [0, 1, 2, 0]
    assert scores.valid.tolist() == [True, False, False, True]
    assert scores.values[scores.valid].tolist() == [0.0, -2.5]
    assert scores.values[~scores.valid].isnan().all()
    assert scores.counts() == {"valid": 2, "not_applicable": 1, "error": 1}
    assert "row 2" in scores.problem
    assert "'c'" in scores.problem


def test_a_long_completion_is_shortened_in_messages():
    with pytest.raises(Failure) as error:
        settle("r", [Problem("gave NaN")], ["x" * 500], "stop")
    assert len(str(error.value)) < 300


def test_a_batch_without_any_reward_is_refused():
    require_some(settle("r", [None, 0.0], ["a", "b"], "stop"), "r")
    require_some(settle("r", [], [], "stop"), "r")
    with pytest.raises(Failure, match=r"'r' gave no reward for any of the 2 rows .*1 not applicable, 1 errors.*gave NaN"):
        require_some(settle("r", [None, Problem("gave NaN")], ["a", "b"], "invalid"), "r")


# Calling ----------------------------------------------------------------------------------------------------------------------------------


def test_functions_are_called_by_keyword_as_trl_does():
    seen: dict[str, Any] = {}

    def reward(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
        return [1.0, None]

    scores = score(load_reward(reward), ["a", "b"], level=[3, 4])
    assert seen == {
        "prompts": ["prompt 0", "prompt 1"],
        "completions": ["a", "b"],
        "completion_ids": [[0, 1], [1, 2]],
        "columns": {"level": [3, 4]},
    }
    assert scores.status.tolist() == [0, 1]


def test_functions_get_only_the_keywords_they_take():
    assert score(load_reward(lambda completions: [float(len(c)) for c in completions]), ["a", "bb"], level=[1, 2]).values.tolist() == [1, 2]
    assert score(load_reward(lambda *, level, weight=2: [weight * x for x in level]), ["a", "b"], level=[1, 2]).values.tolist() == [2, 4]


def test_a_parameter_that_is_no_column_is_refused():
    source = load_reward(lambda completion: [1.0], name="mine")
    with pytest.raises(UsageError, match=r"'mine' has a parameter 'completion'.*did you mean 'completions'"):
        score(source, ["a"])


def test_a_column_may_not_hide_the_completions():
    with pytest.raises(UsageError, match="column 'completions'"):
        load_reward(lambda **columns: [1.0]).score(["p"], ["a"], [[1]], {"completions": ["b"]})


def test_positional_only_parameters_are_refused():
    def reward(completions, /):
        return [1.0]

    with pytest.raises(UsageError, match="'completions' is positional-only"):
        load_reward(reward)


def test_async_functions_are_awaited_also_inside_a_running_loop():
    async def reward(completions, **columns):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    source = load_reward(reward)

    async def inside() -> Scores:
        return score(source, ["a"])

    assert score(source, ["a", "b"]).values.tolist() == [2.0, 2.0]
    assert asyncio.run(inside()).values.tolist() == [2.0]


@pytest.mark.parametrize(
    "values", [np.array([0.5, 2.0]), torch.tensor([0.5, 2.0]), (0.5, 2), [np.float32(0.5), torch.tensor(2.0)], [Fraction(1, 2), 2]]
)
def test_arrays_tensors_and_scalars_are_numbers(values):
    assert score(load_reward(lambda completions: values), ["a", "b"]).values.tolist() == [0.5, 2.0]


def test_what_is_a_number():
    assert number(True) == 1.0
    assert number(None) is None
    assert number(0) == 0.0
    for bad in ("1.0", math.nan, math.inf, 1e39, [1.0], np.array([1.0, 2.0]), 1j, {"score": 1.0}, 10**400):
        assert isinstance(number(bad), Problem), bad


def test_verl_functions_are_known_by_their_parameters():
    seen = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return {"score": 0.25, "acc": True} if solution_str == "a" else 1.0

    source = load_reward(compute_score)
    columns = {
        "data_source": ["gsm", "math"],
        "extra_info": [{"i": 0}, {"i": 1}],
        "reward_model": [{"ground_truth": "1"}, {"ground_truth": "2"}],
    }
    assert score(source, ["a", "b"], **columns).values.tolist() == [0.25, 1.0]
    assert seen == [("gsm", "a", "1", {"i": 0}), ("math", "b", "2", {"i": 1})]


def test_verl_functions_may_leave_parameters_out_and_be_async():
    async def compute_score(solution_str, ground_truth):
        await asyncio.sleep(0)
        if solution_str == "x":
            raise ValueError("no answer found")
        return float(solution_str == ground_truth)

    source = load_reward(compute_score, on_error="invalid")
    scores = score(source, ["a", "x", "b"], ground_truth=["a", "b", "a"], unused=[1, 2, 3])
    assert scores.status.tolist() == [0, 2, 0]
    assert scores.values[[0, 2]].tolist() == [1.0, 0.0]
    assert "no answer found" in scores.problem


def test_conversations_reach_verl_functions_as_text():
    source = load_reward(lambda solution_str, ground_truth: float(solution_str == ground_truth))
    assert score(source, [[{"role": "assistant", "content": "four"}]], ground_truth=["four"]).values.tolist() == [1.0]


def test_errors_written_for_the_user_pass_through():
    def refuses(completions):
        raise UsageError("the column 'facts' is missing")

    async def refuses_rows(solution_str, ground_truth):
        raise UsageError("the column 'facts' is missing")

    for function in (refuses, refuses_rows):
        with pytest.raises(UsageError, match=r"^the column 'facts' is missing$"):
            score(load_reward(function, on_error="invalid"), ["a"], ground_truth=["b"])


# What a reward may be ---------------------------------------------------------------------------------------------------------------------


def test_names_come_from_the_function():
    def brevity(completions):
        return [1.0]

    class Judge:
        def __call__(self, completions):
            return [3.0]

    assert load_reward(brevity).name == "brevity"
    assert load_reward(functools.partial(brevity)).name == "brevity"
    assert load_reward(brevity, name="short").name == "short"
    assert load_reward(Judge()).name == "Judge"
    assert score(load_reward(Judge()), ["a"]).values.tolist() == [3.0]


def test_a_source_is_taken_as_it_is():
    source = Fixed("r", [1.0])
    assert load_reward(source) is source
    assert isinstance(load_reward(lambda completions: [1.0]), RewardSource)


@pytest.mark.parametrize("spec", ["accuracy", "no/such/folder/here", "a b", 3, None, "mine:not a name", "not a module:f", ""])
def test_anything_else_is_refused_with_what_is_accepted(spec):
    with pytest.raises(UsageError, match="a reward is a Python function"):
        load_reward(spec)


def test_a_file_without_a_function_lists_its_functions(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def brevity(completions):\n    pass\n\nasync def polite(completions):\n    pass\n\ndef _hidden():\n    pass\n"
    )
    with pytest.raises(UsageError, match=r"names no function; write .*mine.py:FUNCTION \(it has brevity, polite\)"):
        load_reward(tmp_path / "mine.py")


def test_a_bare_module_is_refused():
    with pytest.raises(UsageError, match="a Linear is no reward"):
        load_reward(torch.nn.Linear(1, 1))


def test_bad_options_are_refused():
    with pytest.raises(UsageError, match="above 0 seconds"):
        load_reward(lambda completions: [1.0], timeout=0)
    with pytest.raises(UsageError, match="'stop' or 'invalid'"):
        load_reward(lambda completions: [1.0], on_error="ignore")  # type: ignore[arg-type]


# Several rewards --------------------------------------------------------------------------------------------------------------------------


def test_the_sum_is_weighted_over_what_applies():
    combined = Combined([Fixed("a", [1.0, None, 3.0, None]), Fixed("b", [10.0, 20.0, None, None])], [2.0, 0.5])
    scores, metrics = combined.score_parts([""] * 4, [""] * 4, [[1]] * 4, {})
    # By hand: 2·1 + 0.5·10, 0.5·20, 2·3, nothing.
    assert scores.values[:3].tolist() == [7.0, 10.0, 6.0]
    assert scores.status.tolist() == [0, 0, 0, 1]
    assert scores.values[3].isnan()
    assert metrics == {
        "rewards/a/mean": 2.0,
        "rewards/a/std": 1.0,
        "rewards/a/not_applicable": 2,
        "rewards/a/errors": 0,
        "rewards/b/mean": 15.0,
        "rewards/b/std": 5.0,
        "rewards/b/not_applicable": 2,
        "rewards/b/errors": 0,
    }


def test_an_error_in_one_part_makes_the_sum_an_error():
    combined = Combined([Fixed("a", [1.0, 1.0, None]), Fixed("b", ["error", 2.0, "error"])])
    scores, metrics = combined.score_parts([""] * 3, ["x"] * 3, [[1]] * 3, {})
    assert scores.status.tolist() == [2, 0, 2]
    assert scores.values[1] == 3.0
    assert "reward 'b' failed" in scores.problem
    assert metrics["rewards/b/errors"] == 2


def test_a_zero_reward_is_summed_and_counted_as_valid():
    scores = Combined([Fixed("a", [0.0])]).score([""], [""], [[1]], {})
    assert scores.counts()["valid"] == 1
    assert scores.values.tolist() == [0.0]


def test_the_sum_is_clipped_and_the_clipped_are_counted():
    combined = Combined([Fixed("a", [-4.0, 0.5, 3.0, None])], clip=(-1.0, 1.0))
    scores, metrics = combined.score_parts([""] * 4, [""] * 4, [[1]] * 4, {})
    assert scores.values[:3].tolist() == [-1.0, 0.5, 1.0]
    assert scores.values[3].isnan()
    assert metrics["rewards/clipped"] == pytest.approx(2 / 3)
    assert metrics["rewards/a/mean"] == pytest.approx(-0.5 / 3)  # parts are logged as they came


def test_rewards_of_one_name_are_logged_apart():
    combined = Combined([Fixed("a", [1.0]), Fixed("a", [2.0]), Fixed("a_2", [3.0])])
    _, metrics = combined.score_parts([""], [""], [[1]], {})
    assert [metrics[f"rewards/{name}/mean"] for name in combined.labels] == [1.0, 2.0, 3.0]


def test_a_reward_that_applies_nowhere_has_no_mean():
    _, metrics = Combined([Fixed("a", [None]), Fixed("b", [1.0])]).score_parts([""], [""], [[1]], {})
    assert "rewards/a/mean" not in metrics
    assert metrics["rewards/a/not_applicable"] == 1


def test_weights_and_clips_are_checked():
    with pytest.raises(UsageError, match="2 reward weights for 1 rewards"):
        Combined([Fixed("a", [])], [1.0, 2.0])
    with pytest.raises(UsageError, match="finite"):
        Combined([Fixed("a", [])], [math.nan])
    with pytest.raises(UsageError, match="lower one"):
        Combined([Fixed("a", [])], clip=(1.0, -1.0))
    with pytest.raises(UsageError, match="no reward was given"):
        Combined([])


def test_closing_the_sum_closes_its_parts():
    parts = [Fixed("a", []), Fixed("b", [])]
    Combined(parts).close()
    assert all(part.closed for part in parts)


def test_a_combination_is_a_source():
    combined = Combined([FunctionReward(lambda completions: [1.0] * len(completions), name="one"), Fixed("b", [2.0, None])])
    assert isinstance(combined, RewardSource)
    assert score(combined, ["x", "y"]).values.tolist() == [3.0, 1.0]
