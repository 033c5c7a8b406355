"""Offline data that are made here: what each kind holds, and where it says that it comes from."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from telos.catalogue.step_data import TASKS, choose, described, is_name, make_data, parse
from telos.core.errors import UsageError
from telos.core.run import Run
from telos.data.step_readers import read_run, read_steps
from telos.environments.maze import PointMaze
from telos.environments.registry import make_environments

STEPS = 900  # enough for the best of many evaluations to be better than chance


@pytest.fixture(scope="module")
def replay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data("cartpole-medium-replay", tmp_path_factory.mktemp("made") / "replay", steps=STEPS)


@pytest.mark.parametrize(
    ("returns", "random", "expected"),
    [
        ([10, 30, 45, 100, 90], 10, (2, 3)),  # the bar is 40
        ([10, 40, 40.1, 100], 10, (2, 3)),  # at the bar is not above it
        ([100, 20, 100], 10, (0, 2)),  # of equals the later is the expert
        ([-5, -90, -4], -100, (0, 2)),
    ],
)
def test_medium_is_the_first_above_a_third_of_the_way_to_the_expert(returns: list[float], random: float, expected: tuple[int, int]):
    assert choose(returns, random) == expected


def test_a_run_that_learned_nothing_has_no_medium_policy():
    with pytest.raises(
        UsageError, match=r"did not learn: its best evaluation has the return 9, and random actions have 10; give it more --steps"
    ):
        choose([5, 9], 10)


def test_names_are_a_task_and_a_kind():
    assert parse("hopper-medium") == (TASKS["hopper"], "medium")
    assert parse("halfcheetah-medium-replay")[1] == "medium-replay"
    assert parse("pendulum-medium-expert")[1] == "medium-expert"
    assert parse("MountainCar-v0-random")[0].env == "MountainCar-v0"
    assert parse("pointmaze-large-stitched")[0].env == "telos/PointMazeLarge-v0"
    assert is_name("hopper-play")
    assert not is_name("review")
    for wrong, message in {
        "hopper": "names no data: write TASK-KIND",
        "hoper-medium": r"no task 'hoper' \(did you mean 'hopper'\?\)",
        "hopper-play": "kinds of hopper are random, expert, medium",
        "pointmaze-medium": "kinds of pointmaze are play, stitched",
    }.items():
        with pytest.raises(UsageError, match=message):
            parse(wrong)


def test_random_data_need_no_run_and_have_uniform_actions(tmp_path: Path):
    steps = read_steps(make_data("pendulum-random", tmp_path / "a", size=1000, seed=3))
    assert len(steps) == 1000
    assert not (tmp_path / "a" / "behaviour").exists()
    actions = steps.action[:, 0]
    assert np.abs(np.quantile(actions, [0.25, 0.5, 0.75]) - [-1, 0, 1]).max() < 0.2
    assert (steps.env, steps.provenance["seed"], steps.provenance["name"]) == ("Pendulum-v1", 3, "pendulum-random")
    assert {"command", "commit"} <= set(steps.provenance)
    # Eight copies: each one's last episode is cut after 125 steps, and the task itself never terminates.
    assert steps.lengths.tolist() == [125] * 8
    assert not steps.terminated.any()
    again = read_steps(make_data("pendulum-random", tmp_path / "b", size=1000, seed=3))
    np.testing.assert_array_equal(again.observation, steps.observation)
    other = read_steps(make_data("pendulum-random", tmp_path / "c", size=1000, seed=4))
    assert not np.array_equal(other.action, steps.action)


def test_a_medium_replay_is_what_the_run_saw_until_its_medium_policy(replay: Path):
    steps = read_steps(replay)
    told = steps.provenance
    reached = told["behaviour"]["medium"]["environment_steps"]
    assert len(steps) == reached
    whole = read_run(replay / "behaviour")
    assert len(whole) == STEPS
    np.testing.assert_array_equal(steps.observation, np.asarray(whole.observation)[:reached])
    rows = Run.open(replay / "behaviour").metrics()
    values = {int(row["environment_steps"]): row["evaluation/return"] for row in rows if "evaluation/return" in row}
    bar = told["ref_min_score"] + (told["ref_max_score"] - told["ref_min_score"]) / 3
    assert values[reached] > bar
    assert all(value <= bar for when, value in values.items() if when < reached)
    assert told["ref_max_score"] >= max(values.values())
    assert told["algorithm_name"] == "dqn"
    assert ["environment", "CartPole-v1"] in described(replay)


def test_kinds_share_a_run_and_medium_expert_is_half_and_half(replay: Path, tmp_path: Path):
    shared = {"behaviour": replay / "behaviour", "size": 160}
    medium, expert, both = (
        read_steps(make_data(f"cartpole-{kind}", tmp_path / kind, **shared)) for kind in ("medium", "expert", "medium-expert")
    )
    assert [len(steps) for steps in (medium, expert, both)] == [160, 160, 160]
    # The halves are the beginnings of the same copies' data.
    np.testing.assert_array_equal(np.asarray(both.observation)[:10], np.asarray(medium.observation)[:10])
    np.testing.assert_array_equal(np.asarray(both.observation)[80:90], np.asarray(expert.observation)[:10])
    assert set(both.provenance["behaviour"]) >= {"medium", "expert", "run", "reproduce"}
    full = read_steps(make_data("cartpole-full-replay", tmp_path / "full", behaviour=replay / "behaviour"))
    assert len(full) == STEPS


def test_an_expert_acts_better_than_chance(replay: Path, tmp_path: Path):
    expert = read_steps(make_data("cartpole-expert", tmp_path / "expert", behaviour=replay / "behaviour", size=2000))
    random = read_steps(make_data("cartpole-random", tmp_path / "random", size=2000))
    assert expert.returns.mean() > 1.3 * random.returns.mean()


def test_options_without_effect_and_other_runs_are_refused(replay: Path, tmp_path: Path):
    for name, options, message in (
        ("cartpole-random", {"steps": 10}, "--steps has no effect on random"),
        ("cartpole-medium-replay", {"size": 10}, "--size has no effect on medium-replay"),
        ("cartpole-medium", {"behaviour": replay / "behaviour", "steps": 10}, "--steps has no effect with --behaviour"),
        ("pendulum-medium", {"behaviour": replay / "behaviour"}, "holds a run with --env CartPole-v1, and --env Pendulum-v1 is asked for"),
        ("pointmaze-play", {"steps": 10}, "--steps has no effect on play"),
        ("cartpole-medium", {"size": 0}, "--size 0 must be at least 1"),
    ):
        with pytest.raises(UsageError, match=message):
            make_data(name, tmp_path / "x", **options)
    with pytest.raises(UsageError, match="holds data already"):
        make_data("cartpole-random", replay)
    assert not (tmp_path / "x" / "data").exists()


def test_a_run_that_is_in_the_folder_already_is_taken_if_it_is_the_one_asked_for(replay: Path, tmp_path: Path):
    shutil.copytree(replay / "behaviour", tmp_path / "behaviour")
    with pytest.raises(UsageError, match=f"holds a run with --total_steps {STEPS}, and --total_steps 5 is asked for"):
        make_data("cartpole-full-replay", tmp_path, steps=5)
    before = (tmp_path / "behaviour" / "metrics.jsonl").stat().st_mtime_ns
    assert len(read_steps(make_data("cartpole-full-replay", tmp_path, steps=STEPS))) == STEPS
    assert (tmp_path / "behaviour" / "metrics.jsonl").stat().st_mtime_ns == before, "nothing was learned anew"


@pytest.mark.parametrize(("kind", "longest"), [("play", 150), ("stitched", 50)])
def test_mazes_are_driven_to_places_of_the_drivers_own(tmp_path: Path, kind: str, longest: int):
    steps = read_steps(make_data(f"pointmaze-u-{kind}", tmp_path / kind, size=8 * 300))
    assert steps.lengths.max() == longest
    assert steps.env == "telos/PointMazeU-v0"
    assert isinstance(steps.observation, dict)
    maze = make_environments("telos/PointMazeU-v0", 1)
    assert isinstance(maze, PointMaze)
    cells = maze.layout.cells(steps.observation["achieved_goal"])
    visited = [len(set(cells[rows])) for rows in steps.episodes]
    assert len(set(cells)) == len(maze.layout.free), "all cells are visited"
    assert max(visited) <= 6 if kind == "stitched" else max(visited) >= 6
    # The rewards are those of the goals in the observations, so that they can be made anew for others.
    following = steps.next_observation
    assert isinstance(following, dict)
    np.testing.assert_allclose(steps.reward, maze.compute_reward(following["achieved_goal"], following["desired_goal"]))
