"""Episodes that begin in a teacher's states: they are those states exactly, some copies' episodes are no other copies' matter, and runs continue."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from support import program_of, written_weights
from telos.algorithms.control import ControlConfig
from telos.algorithms.run import resume, train
from telos.core.errors import UsageError
from telos.core.loop import Interrupted
from telos.environments.base import Driver, Environments, take
from telos.environments.gym import GymEnvironments
from telos.environments.registry import make_environments
from telos.environments.snapshots import SnapshotEnvironments, Snapshots, classify, collect
from telos.models.observations import Reader

ENVS = ("CartPole-v1", "Acrobot-v1", "Pendulum-v1", "telos/PointMazeU-v0", "telos/RiverSwim-v0", "Hopper-v5", "Ant-v5", "Reacher-v5", "gym")


def made(env: str, count: int) -> Environments:
    if env.endswith("-v5"):
        pytest.importorskip("mujoco", reason="MuJoCo's tasks need the package mujoco")
    if env == "gym":  # one that cannot save its state
        return GymEnvironments("Pendulum", functools.partial(gymnasium.make, "Pendulum-v1", disable_env_checker=True), count)
    return make_environments(env, count)


class Script:
    """Random actions, written down."""

    def __init__(self, environments: Environments, seed: int = 0) -> None:
        self.reader, self.space = Reader(environments.observation_space), environments.action_space
        self.draws, self.taken = np.random.default_rng(seed), []

    def choose(self, read: np.ndarray, deterministic: bool = True, generator: Any = None) -> np.ndarray:
        if isinstance(self.space, gymnasium.spaces.Box):
            action = self.draws.uniform(self.space.low, self.space.high, (len(read), *self.space.shape)).astype(self.space.dtype)
        else:
            action = self.draws.integers(int(self.space.n), size=len(read))  # type: ignore[attr-defined]
        self.taken.append(action)
        return action

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        return action


def entries(observation: Any) -> np.ndarray:
    """[N, F] of whatever an observation is."""
    parts = list(observation.values()) if isinstance(observation, dict) else [observation]
    return np.concatenate([np.asarray(part, np.float64).reshape(len(part), -1) for part in parts], 1)


@pytest.mark.parametrize("env", ENVS)
@pytest.mark.parametrize("count", [1, 3])
def test_an_episode_from_a_snapshot_goes_on_as_the_teachers_did_and_other_copies_are_as_without(env: str, count: int) -> None:
    teacher = Script(one := made(env, 1))
    snapshots = collect(one, teacher, 1, 1, seed=5)
    n = len(snapshots)
    assert snapshots.step.tolist() == list(range(n))
    wrapped = SnapshotEnvironments(made(env, count), snapshots, share=0.0, until=10**9, length=0)
    plain, other = made(env, count), Script(one, 7)
    seeds = list(range(count))
    assert np.array_equal(entries(wrapped.begin(range(count), seeds)), entries(plain.begin(range(count), seeds)))
    for _ in range(2):  # so that the copy has another past than the teacher's
        action = other.choose(np.zeros((count, 1)))
        assert np.array_equal(entries(wrapped.step(action).observation), entries(plain.step(action).observation))
    wrapped.share, copy = 1.0, count - 1
    begun = wrapped.begin([copy], [11])
    at = int(wrapped.origin[copy])
    assert np.array_equal(entries(begun), entries(take(snapshots.observation, [at])))
    for t in range(at, min(n - 1, at + 6)):
        action = other.choose(np.zeros((count, 1)))
        action[copy] = teacher.taken[t][0]
        outcome, expected = wrapped.step(action), plain.step(action)
        assert np.array_equal(entries(outcome.observation)[copy], entries(take(snapshots.observation, [t + 1]))[0])
        assert np.array_equal(entries(outcome.observation)[:copy], entries(expected.observation)[:copy])
        assert np.array_equal(outcome.reward[:copy], expected.reward[:copy])
    assert at < n - 1


def episodes_of(*ends: tuple[int, bool]) -> Environments:
    """Episodes of given lengths that terminate or are cut, one after the other; what is seen is the number of the step."""

    class Fixed(gymnasium.Env):
        observation_space, action_space = gymnasium.spaces.Box(0, 99, (1,), np.float32), gymnasium.spaces.Discrete(2)
        begun = -1

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.begun, self.done = self.begun + 1, 0
            return np.zeros(1, np.float32), {}

        def step(self, action: Any) -> Any:
            self.done += 1
            length, over = ends[self.begun % len(ends)]
            return np.full(1, self.done, np.float32), 1.0, over and self.done >= length, not over and self.done >= length, {}

    return GymEnvironments("Fixed", Fixed, 1)


def test_the_last_tenth_of_an_episode_that_terminated_is_left_out_and_of_one_that_was_cut_is_not() -> None:
    environments = episodes_of((20, True), (20, False), (1, True), (5, True))
    found = collect(environments, Script(environments), 4, 1, seed=0)
    assert np.bincount(found.episode, minlength=4).tolist() == [18, 20, 0, 4]
    with pytest.raises(UsageError, match="there is no state to begin in"):
        collect(episodes_of((1, True)), Script(environments), 3, 1, seed=0)


def test_groups_are_the_blobs_and_a_start_is_drawn_from_each_alike() -> None:
    draws = np.random.default_rng(0)
    sizes = (200, 20, 5)
    points = np.concatenate([np.array([10.0 * i, -50.0 * i]) + draws.normal(size=(size, 2)) for i, size in enumerate(sizes)])
    group = classify(points, 3, seed=1)
    parts = np.split(group, np.cumsum(sizes)[:-1])
    assert all(len(set(part)) == 1 for part in parts)
    assert sorted(int(part[0]) for part in parts) == [0, 1, 2]
    snapshots = Snapshots(points, np.zeros(225, int), np.arange(225), group)
    counts = np.bincount(group[[snapshots.draw(draws) for _ in range(3000)]])
    assert np.abs(counts / 3000 - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 3000)
    assert classify(np.zeros((6, 2)), 4, seed=1).tolist() == [0] * 6  # no group is empty


def test_a_share_of_early_episodes_begins_in_snapshots_and_these_alone_are_cut() -> None:
    teacher = Script(one := made("CartPole-v1", 1))
    snapshots = collect(one, teacher, 5, 4, seed=5)
    environments = SnapshotEnvironments(made("CartPole-v1", 4), snapshots, share=0.5, until=4000, length=3)
    driver, script = Driver(environments, 0), Script(one, 3)
    early: list[bool] = []
    while driver.steps < 6000:
        origin, began, steps = environments.origin.copy(), driver.number.copy(), driver.length.copy()
        outcome, _ = driver.step(script.choose(np.zeros((4, 1))))
        cut = (origin >= 0) & (steps + 1 >= 3) & ~outcome.terminated
        assert outcome.truncated.tolist() == cut.tolist()
        for copy in np.flatnonzero(driver.number != began):
            if driver.steps < 4000:
                early.append(bool(environments.origin[copy] >= 0))
            else:
                assert environments.origin[copy] == -1
    assert abs(np.mean(early) - 0.5) < 4 * np.sqrt(0.25 / len(early))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Runs whose policies play: learning is no matter here."""
    root = tmp_path_factory.mktemp("teachers")
    small: dict[str, Any] = {"device": "cpu", "threads": 1, "checkpoint_every": 0, "hidden": [4], "eval_episodes": 1, "num_envs": 1}
    found = {}
    for env in ("Pendulum-v1", "CartPole-v1"):
        found[env] = str(train("ppo", {**small, "env": env, "total_steps": 8, "rollout_steps": 8, "out": str(root / env)}).path)
    return found


SMALL: dict[str, Any] = {"device": "cpu", "threads": 1, "hidden": [8], "eval_episodes": 1, "num_envs": 2, "snapshot_episodes": 1}
OF: dict[str, dict[str, Any]] = {
    "ppo": {"total_steps": 240, "rollout_steps": 30, "minibatch_size": 30, "epochs": 2},
    "sac": {"total_steps": 240, "iteration_steps": 60, "start_steps": 40, "random_steps": 40, "batch_size": 8, "train_every": 8},
    "td3": {"total_steps": 240, "iteration_steps": 60, "start_steps": 40, "random_steps": 40, "batch_size": 8, "train_every": 8},
}


def options_of(method: str, teachers: dict[str, str], **changes: Any) -> dict[str, Any]:
    early = {"snapshots": teachers["Pendulum-v1"], "snapshot_share": 0.8, "snapshot_until": 0.9, "snapshot_length": 9}
    return {"env": "Pendulum-v1", **SMALL, **OF[method], **early, **changes}


@pytest.fixture
def unsaved(tmp_path: Path) -> str:
    """An environment of one's own, which cannot save its state."""
    path = tmp_path / "swing.py"
    path.write_text(
        "import gymnasium\ndef Swing():\n    return gymnasium.make('Pendulum-v1', disable_env_checker=True)\n",
        encoding="utf-8",
    )
    return f"{path}:Swing"


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("method", ["ppo", "sac", "td3"])
def test_a_run_with_snapshots_that_was_stopped_continues_bit_for_bit(
    method: str, repeated: bool, teachers: dict[str, str], unsaved: str, tmp_path: Path
) -> None:
    class Stop:
        def started(self, *_: Any) -> None: ...

        def stepped(self, step: int, metrics: Any) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        def ended(self, status: str) -> None: ...

    options = options_of(method, teachers, **({"env": unsaved} if repeated else {}))
    whole = train(method, options | {"out": str(tmp_path / "whole")})
    with pytest.raises(Interrupted):
        train(method, options | {"out": str(tmp_path / "stopped")}, callbacks=[Stop()])
    again = resume(tmp_path / "stopped")
    untimed = [[{k: v for k, v in row.items() if not k.startswith("time")} for row in run.metrics()] for run in (whole, again)]
    assert untimed[0] == untimed[1]
    assert any(row.get("episode/length", 200) < 200 for row in untimed[0])  # episodes were cut
    weights = [
        {name: value.tolist() for name, value in written_weights(run.path).items() if "policy" in name and "check" not in name}
        for run in (whole, again)
    ]
    assert weights[0] == weights[1] != {}
    assert whole.facts["evaluation"] == again.facts["evaluation"]


def test_snapshots_change_what_is_learned_from_and_never_what_is_evaluated(teachers: dict[str, str], tmp_path: Path) -> None:
    program = program_of("ppo", options_of("ppo", teachers), tmp_path / "run")
    assert isinstance(program.driver.environments, SnapshotEnvironments)
    found = program.evaluate(0)
    assert found["evaluation/length"] == 200
    plain = program_of("ppo", {"env": "Pendulum-v1", **SMALL, **OF["ppo"]} | {"snapshot_episodes": 10}, tmp_path / "plain")
    plain.policy.load_state_dict(program.policy.state_dict())
    assert plain.evaluate(0) == found


def test_options_and_teachers_that_do_not_fit_are_refused(teachers: dict[str, str], tmp_path: Path) -> None:
    for name in ("episodes", "groups", "share", "until", "length"):
        with pytest.raises(UsageError, match=f"--snapshot_{name} has no effect without --snapshots"):
            ControlConfig(**{f"snapshot_{name}": 1})
    with pytest.raises(UsageError, match="with other observations or actions than Pendulum-v1"):
        train("ppo", options_of("ppo", teachers, snapshots=teachers["CartPole-v1"], out=str(tmp_path / "run")))
    with pytest.raises(UsageError, match="no whole policy"):
        train("ppo", options_of("ppo", teachers, snapshots=str(tmp_path), out=str(tmp_path / "run")))


def test_a_state_of_other_snapshots_is_refused() -> None:
    one = made("CartPole-v1", 1)
    first, second = (collect(one, Script(one, seed), 1, 2, seed=seed) for seed in (0, 1))
    state = SnapshotEnvironments(made("CartPole-v1", 2), first, share=1.0, until=9, length=0).state()
    with pytest.raises(UsageError, match="the teacher has changed"):
        SnapshotEnvironments(made("CartPole-v1", 2), second, share=1.0, until=9, length=0).load(state)
