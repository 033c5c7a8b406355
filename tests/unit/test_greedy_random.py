"""Greedy over random play: what is collected, what GORP and SQIRL make of it, and how such runs continue and are read."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import telos
from support import program_of
from telos.algorithms.run import resume
from telos.algorithms.run import train as start
from telos.core.errors import Failure, UsageError
from telos.core.loop import Interrupted
from telos.environments.tabular import chain, random_mdp
from telos.evaluation.effective_horizon import shallow_values
from telos.models.staged import StagedPolicy

COMMON: dict[str, Any] = {"device": "cpu", "threads": 1, "checkpoint_every": 0, "eval_episodes": 4, "seed": 1}
COUNTER = '''
import gymnasium
import numpy as np


class Counter(gymnasium.Env):
    """Sees how many steps are done and earns 10 to that power, times what it did; copies end after 3 steps, or after 2 when the first action was 1."""

    observation_space, action_space = gymnasium.spaces.Box(0, 9, (1,), np.float32), gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.done, self.end = 0, 3
        return np.zeros(1, np.float32), {}

    def step(self, action):
        if self.done == 0 and action == 1:
            self.end = 2
        reward = 10.0**self.done * int(action)
        self.done += 1
        return np.full(1, self.done, np.float32), reward, self.done >= self.end, False, {}
'''


@pytest.fixture
def counter(tmp_path: Path) -> str:
    path = tmp_path / "counter.py"
    path.write_text(COUNTER, encoding="utf-8")
    return f"{path}:Counter"


def collected(program: Any, index: int) -> Any:
    found: list[Any] = []
    method = program.method

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(method, name)

        def estimate(self, config: Any, policy: Any, rollouts: Any, generator: Any) -> Any:
            found.append(rollouts)
            return method.estimate(config, policy, rollouts, generator)

    program.method = Spy()
    for i in range(index + 1):
        program.step(i)
    program.method = method
    return found[index]


def test_rollouts_hold_what_the_episodes_met_and_prescribed_actions_are_taken(counter: str, tmp_path: Path) -> None:
    options = {**COMMON, "env": counter, "num_envs": 3, "horizon": 3, "lookahead": 2, "gamma": 0.5, "episodes": 4}
    rollouts = collected(program_of("gorp", options, tmp_path / "run"), 0)
    sequences = list(itertools.chain.from_iterable([pair] * 4 for pair in itertools.product((0, 1), repeat=2)))
    assert rollouts.action.tolist() == [list(pair) for pair in sequences]
    assert rollouts.observation[..., 0].tolist() == [[0, 1]] * 16
    assert np.array_equal(rollouts.reward, rollouts.action * [1, 10])
    third = (rollouts.rest - rollouts.reward[:, 1]) / 0.5  # what came after the two
    assert set(third[:8]) <= {0.0, 100.0}
    assert len(set(third[:8])) == 2
    assert set(third[8:]) == {0.0}  # over after two steps
    assert np.allclose(rollouts.returns, rollouts.reward[:, 0] + 0.5 * rollouts.reward[:, 1] + 0.25 * third)


def test_later_iterations_begin_with_the_greedy_actions_and_steps_after_the_end_are_marked(counter: str, tmp_path: Path) -> None:
    options = {**COMMON, "env": counter, "num_envs": 3, "horizon": 3, "lookahead": 2, "episodes": 8}
    program = program_of("gorp", options, tmp_path / "run")
    rollouts = collected(program, 2)
    # 1 at once forgoes 100: the greedy first action is 0, the second one 1.
    assert program.policy.outputs(np.zeros((1, 1), np.float32), 0).argmax() == 0
    assert rollouts.observation[:, 0, 0].tolist() == [2] * 32
    assert rollouts.alive.tolist() == [[True, False]] * 32
    assert rollouts.reward[:, 0].tolist() == [0] * 16 + [100] * 16
    assert program.policy.outputs(np.zeros((1, 1), np.float32), 2).tolist() == [[0, 100]]


def test_when_all_episodes_are_over_nothing_more_is_played(counter: str, tmp_path: Path) -> None:
    program = program_of("sqirl", {**COMMON, "env": counter, "horizon": 6, "episodes": 16, "regressor": "least-squares"}, tmp_path / "run")
    steps = [program.step(index)["environment_steps"] for index in range(6)]
    assert steps[2] < steps[3] == steps[4] == steps[5]  # the fourth iteration meets no episode of that length


def test_gorp_that_looks_to_the_end_finds_the_optimum_of_a_deterministic_chain(tmp_path: Path) -> None:
    """Three steps of nothing until 10 is earned, against 2 in each step."""
    options = {"env": "telos/Chain-v0", "env_options": ["slip=0", "length=4", "horizon=5"], "horizon": 5, "lookahead": 5, "episodes": 1}
    run = start("gorp", {**COMMON, **options, "out": str(tmp_path / "run")})
    process = chain(4, 0.0, horizon=5, discount=1.0)
    assert run.facts["evaluation"]["evaluation/return"] == process.optimal().state[0, 0] == 20.0
    short = start("gorp", {**COMMON, **options, "lookahead": 1, "episodes": 400, "out": str(tmp_path / "short")})
    once = shallow_values(process, 1)  # greedy over random play, by the exact values
    state = total = 0
    for t in range(5):
        action = once[t, state].argmax()
        state, total = (min(state + 1, 3), total + 10 * (state == 3)) if action == 0 else (0, total + 2)
    assert short.facts["evaluation"]["evaluation/return"] == total


@pytest.mark.parametrize("lookahead", [1, 2, 3])
def test_sqirls_first_values_are_those_of_shallow_iteration(tmp_path: Path, lookahead: int) -> None:
    env = {"env": "telos/Random-v0", "env_options": ["states=3", "actions=2", "seed=5", "horizon=3", "discount=1.0"]}
    options = {**env, "horizon": 3, "lookahead": lookahead, "episodes": 6000, "num_envs": 1000, "regressor": "least-squares"}
    program = program_of("sqirl", {**COMMON, **options}, tmp_path / "run")
    program.step(0)
    exact = shallow_values(random_mdp(3, 2, 5, horizon=3, discount=1.0), lookahead)[0]
    # Means of about 1000 returns whose deviation is below 0.6.
    assert program.policy.outputs(np.eye(3, dtype=np.float32)) == pytest.approx(exact, abs=4 * 0.6 / np.sqrt(1000))


def test_the_network_learns_a_function_in_units_far_from_its_own(tmp_path: Path) -> None:
    from telos.algorithms.online.sqirl import trained

    options = {**COMMON, "env": "CartPole-v1", "hidden": [32], "regression_steps": 400, "learning_rate": 1e-2}
    program = program_of("sqirl", options, tmp_path / "run")
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=draws) * torch.tensor([100.0, 1e-2, 1.0, 1.0]) + 50
    action = torch.randint(2, (500,), generator=draws)
    y = 1000 + 30 * (2 * action - 1) * (x[:, 0] - 50) / 100
    network = trained(program.config, program.policy, x, action, y, draws)
    found = network(x).gather(1, action[:, None])[:, 0].detach()
    assert float(((found - y) ** 2).mean()) < 0.02 * float(y.var())


def test_least_squares_is_the_mean_for_numbered_states_and_zero_for_actions_never_taken(tmp_path: Path) -> None:
    from telos.algorithms.online.sqirl import least_squares

    env = {"env": "telos/Random-v0", "env_options": ["states=2", "actions=3"]}
    policy = program_of("sqirl", {**COMMON, **env, "regressor": "least-squares"}, tmp_path / "run").policy
    x = torch.eye(2)[[0, 0, 1, 1, 0]]
    layer = least_squares(policy, x, torch.tensor([0, 0, 0, 1, 1]), torch.tensor([1.0, 3.0, 7.0, 5.0, 4.0]))
    assert layer(torch.eye(2)).detach().numpy() == pytest.approx(np.array([[2, 4, 0], [7, 5, 0]]), abs=1e-4)


@pytest.mark.parametrize("key", ["gorp", "sqirl"])
def test_a_run_that_was_stopped_continues_bit_for_bit(key: str, tmp_path: Path) -> None:
    class Stop:
        def started(self, *_: Any) -> None: ...

        def stepped(self, step: int, metrics: Any) -> None:
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        def ended(self, status: str) -> None: ...

    options = {**COMMON, "env": "CartPole-v1", "horizon": 4, "episodes": 6, "lookahead": 2, "eval_every": 1}
    options |= {"hidden": [8], "regression_steps": 5} if key == "sqirl" else {}
    whole = start(key, options | {"out": str(tmp_path / "whole")})
    with pytest.raises(Interrupted):
        start(key, options | {"out": str(tmp_path / "stopped")}, callbacks=[Stop()])
    again = resume(tmp_path / "stopped")
    untimed = [[{k: v for k, v in row.items() if not k.startswith("time")} for row in run.metrics()] for run in (whole, again)]
    assert untimed[0] == untimed[1]
    one, other = (StagedPolicy.load(run.path / "policy").state_dict() for run in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_saved_policy_acts_by_the_step_that_it_is_handed(tmp_path: Path) -> None:
    options = {**COMMON, "env": "CartPole-v1", "horizon": 3, "episodes": 16, "hidden": [8], "regression_steps": 20}
    program = program_of("sqirl", options, tmp_path / "run")
    for index in range(3):
        program.step(index)
    program.finish(program.run)
    policy = StagedPolicy.load(program.run.path / "policy")
    looked = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    state = None
    for step in range(5):
        action, state = policy.predict(looked, state)
        assert state == step + 1
        assert np.array_equal(action, program.policy.outputs(looked, min(step, 2)).argmax(1))
    each, states = policy.predict(looked, np.arange(6))
    assert each.tolist() == [policy.predict(looked[i], i)[0] for i in range(6)]
    assert states.tolist() == [1, 2, 3, 4, 5, 6]


def test_options_without_effect_and_actions_that_are_not_discrete_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--hidden has no effect with --regressor least-squares"):
        telos.train("sqirl", env="CartPole-v1", regressor="least-squares", hidden=[8])
    with pytest.raises(UsageError, match="discrete"):
        telos.train("sqirl", env="Pendulum-v1", out=str(tmp_path / "run"))


def test_values_that_are_not_numbers_end_the_run(tmp_path: Path) -> None:
    class Poison:
        def started(self, run: Any, program: Any, first: int, total: int) -> None:
            with torch.no_grad():
                next(program.policy.parameters()).fill_(torch.nan)

        def stepped(self, step: int, metrics: Any) -> None: ...

        def ended(self, status: str) -> None: ...

    with pytest.raises(Failure, match="not finite"):
        start("gorp", {**COMMON, "env": "CartPole-v1", "out": str(tmp_path / "run")}, callbacks=[Poison()])
