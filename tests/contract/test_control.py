"""What every method of control must keep, whatever its paper says. A new file under `algorithms/online` and its neighbours is tested by being there."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import telos
from support import World, changed, last_state, numbers, program_of, read_json, snapshot, written_weights
from telos.algorithms.learning import Learner
from telos.algorithms.run import resume, train
from telos.core import config as configs
from telos.core import discovery
from telos.core.errors import Failure, UsageError
from telos.core.loop import Interrupted
from telos.core.method import Method
from telos.core.run import Run
from telos.models.policies import Policy

METHODS = [card.key for card in discovery.cards() if card.file is not None and card.family != "language"]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return discovery.load(request.param)


def learners_of(program: Any) -> list[Learner]:
    if hasattr(program, "improver"):
        return [learner.workers[0] for learner in program.improver.learners]
    return [program.learner.workers[0]] if hasattr(program, "learner") else []


def parameters_of(program: Any) -> list[torch.nn.Parameter]:
    """Those that learn, by gradients or otherwise."""
    if hasattr(program, "learned"):
        return program.learned
    return [p for learner in learners_of(program) for p in learner.parameters_to_reduce()]


def network_of(program: Any) -> torch.nn.Module:
    return program.agent if hasattr(program, "agent") else program.model


def outcome(run: Run) -> dict[str, Any]:
    weights = {name: tensor.tolist() for name, tensor in written_weights(run.path).items() if not name.startswith("checkpoints")}
    return {"metrics": numbers(run), "weights": weights, "evaluation": run.facts["evaluation"]}


class StopAt:
    """Ends a run at a step, by Ctrl-C or as a kill does."""

    def __init__(self, step: int, how: Any) -> None:
        self.step, self.how = step, how

    def started(self, *_: Any) -> None: ...

    def stepped(self, step: int, metrics: Any) -> None:
        if step == self.step:
            self.how()

    def ended(self, status: str) -> None: ...


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


def every_state(method: Method) -> dict[str, Any]:
    """Options under which a run has every kind of state that it can have."""
    names = {option.name for option in configs.options_of(method.config)}
    wanted = {
        "normalize_observations": True,
        "normalize_rewards": True,
        "lr_schedule": "cosine",
        "warmup_steps": 2,
        "prioritized": 0.6,
        "n_step": 3,
        "eval_every": 2,
    }
    return {name: value for name, value in wanted.items() if name in names}


def test_a_step_gives_finite_numbers_and_moves_what_learns_and_nothing_else(method: Method, world: World, tmp_path: Path) -> None:
    program = program_of(method.key, world.options(method), tmp_path)
    before = snapshot(network_of(program))
    learned = {id(p) for p in parameters_of(program)}
    found: dict[str, float] = {}
    for index in range(program.config.program_steps):
        found = program.step(index)
        assert all(math.isfinite(value) for value in found.values()), found
    assert any(name.startswith("loss") for name in found) or method.loop == "tabular"
    moved = changed(before, snapshot(network_of(program)))
    declared = {name for name, p in network_of(program).named_parameters() if id(p) in learned}
    slow = {name for name in before if name.startswith("targets.")}
    assert declared <= moved <= declared | slow
    assert program.plan()


def test_the_same_seed_gives_the_same_result_bit_for_bit_and_another_seed_another(method: Method, world: World, tmp_path: Path) -> None:
    first, again, other = (
        outcome(train(method.key, world.options(method, seed=seed, out=str(tmp_path / f"{i}")))) for i, seed in enumerate((3, 3, 4))
    )
    assert first == again
    assert first["weights"] != other["weights"]


@pytest.mark.parametrize("on_disk", [True, False])
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(method: Method, world: World, tmp_path: Path, on_disk: bool) -> None:
    """The tiny environment cannot save its state: its episodes are repeated."""
    if not on_disk and "replay_on_disk" not in {option.name for option in configs.options_of(method.config)}:
        return
    lengths = {"offline": {"updates": 24}, "greedy-random": {"horizon": 6}, "tabular": {"episodes": 18}}
    lengths["policy-gradient"] = {"total_episodes": 48 if method.key == "harpg" else 24}
    length = lengths.get(method.loop, {"total_steps": 144})
    options = world.options(method, **length, **every_state(method), **({} if on_disk else {"replay_on_disk": False}))
    whole = train(method.key, options | {"out": str(tmp_path / "whole")})
    interrupted = tmp_path / "interrupted"
    with pytest.raises(Interrupted, match="stopped after step 3 of 6"):
        train(method.key, options | {"out": str(interrupted)}, callbacks=[StopAt(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        train(method.key, options | {"out": str(killed), "checkpoint_every": 2}, callbacks=[StopAt(3, kill)])
    for folder in (interrupted, killed):
        resumed = resume(folder)
        assert outcome(resumed) == outcome(whole)
        assert last_state(resumed) == last_state(whole)


def test_the_saved_policy_acts_on_raw_observations_as_the_trained_one_does(method: Method, world: World, tmp_path: Path) -> None:
    options = world.options(method, **{name: value for name, value in every_state(method).items() if name == "normalize_observations"})
    program = program_of(method.key, options, tmp_path)
    program.step(0)
    program.finish(program.run)
    policy = telos.load(program.run.path)
    assert isinstance(policy, Policy)
    looked = np.arange(5) if method.loop == "tabular" else np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    many, state = policy.predict(looked)
    assert state == (1 if method.loop == "greedy-random" else None)  # such policies count the steps of an episode
    one, _ = policy.predict(looked[0])
    assert many.shape == (5, *policy.action_space.shape)
    assert np.array_equal(one, many[0]) or np.allclose(one, many[0], atol=1e-6)
    assert policy.action_space.contains(one if one.ndim else int(one))
    trained = program.policy.to_environment(program.policy.choose(program.policy.reader(looked)))
    assert np.array_equal(trained, many)
    drawn = [policy.predict(looked, deterministic=False, seed=seed)[0] for seed in (1, 1)]
    assert np.array_equal(*drawn)


def test_the_network_gives_torch_and_numpy_the_same_numbers(method: Method, world: World, tmp_path: Path) -> None:
    program = program_of(method.key, world.options(method), tmp_path)
    program.step(0)
    policy = program.policy
    read = np.random.default_rng(1).normal(size=(7, *policy.reader.shape)).astype(np.float32)
    seen = policy.looked(read) if method.loop == "greedy-random" else torch.from_numpy(read)
    with torch.no_grad():
        assert np.allclose(policy(seen).numpy(), policy.outputs(read), atol=1e-5)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("reward", r"Reach: the reward is nan \(copy 0, step 3 of its episode 0\)"),
        ("observation", r"Reach: entry \[0\] of the observation is nan after a step \(copy 0, step 2"),
        ("raises", r"Reach: step of copy 0 raised RuntimeError: the motor is hot"),
    ],
)
def test_an_environment_that_breaks_is_named_with_the_place(method: Method, world: World, tmp_path: Path, bad: str, message: str) -> None:
    if method.loop == "offline" or (method.loop == "tabular" and bad == "observation"):
        return  # the environment is met in evaluations alone; whole numbers are finite
    options = world.options(method)
    options["env_options"] = [*options["env_options"], f"bad={bad}"]
    with pytest.raises(Failure, match=message):
        train(method.key, options | {"out": str(tmp_path / "run")})
    assert read_json(tmp_path / "run" / "run.json")["status"] == "failed"


def test_an_unknown_option_and_an_unknown_environment_are_refused_with_a_suggestion(method: Method, world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown option 'eval_episode' \(did you mean 'eval_episodes'\?\)"):
        train(method.key, world.options(method, eval_episode=3, out=str(tmp_path / "run")))
    with pytest.raises(UsageError, match=r"Gymnasium knows no such environment \(did you mean 'CartPole-v1'\?\)"):
        train(method.key, world.options(method, env="CartPol-v1", env_options=[], out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_numbers_end_the_run_before_they_spread(method: Method, world: World, tmp_path: Path) -> None:
    class Poison(StopAt):
        def started(self, run: Any, program: Any, first: int, total: int) -> None:
            if method.loop == "tabular":
                for name in ("moves", "rewards", "low", "high", "models"):
                    if (table := getattr(program.seen, name)) is not None:
                        table[...] = math.nan
                return
            with torch.no_grad():
                next(network_of(program).parameters()).fill_(math.nan)

    with pytest.raises(Failure, match=r"nan|not finite"):
        train(method.key, world.options(method, out=str(tmp_path / "run")), callbacks=[Poison(-1, kill)])
    assert not (tmp_path / "run" / "policy").exists()
