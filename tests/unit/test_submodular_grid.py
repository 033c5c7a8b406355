"""Grids whose reward is what a cell adds to the cells that were visited: motion, rewards, observations, continuing, and walks by greedy planning."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import telos
from environment_checks import assert_continues
from telos.algorithms.online import subpo
from telos.algorithms.online._loop_policy_gradient import StepsView
from telos.core.errors import UsageError
from telos.environments.base import Driver
from telos.environments.registry import make_environments
from telos.environments.submodular import MOVES, SubmodularGrid, greedy_walk, landscape
from telos.functional.distributions import Categorical
from telos.functional.recursions import Track

ENV = "telos/SubmodularGrid-v0"
UP, RIGHT, DOWN, LEFT, STAY = range(5)


def made(count: int = 1, **options: Any) -> SubmodularGrid:
    grid = make_environments(ENV, count, options={"size": 4, "horizon": 6} | options)
    assert isinstance(grid, SubmodularGrid)
    return grid


@pytest.mark.parametrize("objective", ["coverage", "information", "design", "diversity"])
def test_rewards_are_marginal_gains_and_add_up_to_the_walk(objective: Any) -> None:
    grid = made(5, objective=objective)
    function, everything = landscape(objective, 4, 0), landscape(objective, 4, 0).value(range(16))
    driver, draws = Driver(grid, 3), np.random.default_rng(1)
    walks = [[10] for _ in range(5)]  # row 2, column 2 is the middle
    for _ in range(6):
        actions = draws.integers(5, size=5)
        outcome, ended = driver.step(actions)
        for i, walk in enumerate(walks):
            row, column = (np.array(divmod(walk[-1], 4)) + MOVES[actions[i]]).clip(0, 3)
            before = function.value(walk)
            walk.append(int(row * 4 + column))
            assert outcome.reward[i] == pytest.approx((function.value(walk) - before) / everything, abs=1e-12)
            assert outcome.info["objective"][i] == pytest.approx(function.value(walk) / everything)
    assert [episode.length for episode in ended] == [6] * 5
    assert all(episode.terminated for episode in ended)
    assert ended[0].total == pytest.approx((function.value(walks[0]) - function.value([10])) / everything)


def test_modular_rewards_count_a_cell_at_every_visit() -> None:
    grid, function = made(reward="modular"), landscape("coverage", 4, 0)
    driver = Driver(grid, 0)
    rewards = [driver.step(np.array([action]))[0].reward[0] for action in (STAY, RIGHT, STAY, RIGHT)]
    alone = [function.value([cell]) / function.value(range(16)) for cell in (10, 11, 11, 11)]
    assert rewards == pytest.approx(alone)


def test_what_is_seen_is_place_and_step_and_on_request_what_was_visited() -> None:
    driver = Driver(made(history=True), 0)
    for action in (UP, LEFT):
        driver.step(np.array([action]))
    seen: Any = driver.observation
    assert (seen["place"].tolist(), seen["step"].tolist()) == ([5], [2])
    assert np.flatnonzero(seen["visited"][0]).tolist() == [5, 6, 10]
    plain: Any = Driver(made(), 0).observation
    assert set(plain) == {"place", "step"}
    for _ in range(4):
        driver.step(np.array([STAY]))
    begun: Any = driver.observation
    assert (begun["place"].tolist(), begun["step"].tolist(), np.flatnonzero(begun["visited"][0]).tolist()) == ([10], [0], [10])


def test_a_slip_takes_every_direction_alike() -> None:
    grid = made(4000, slip=0.5, horizon=1)
    grid.begin(range(4000), range(4000))
    grid.step(np.full(4000, STAY))
    share = np.array([(grid._place == cell).mean() for cell in (6, 11, 14, 9, 10)])
    np.testing.assert_allclose(share, [0.1, 0.1, 0.1, 0.1, 0.6], atol=0.03)


@pytest.mark.parametrize("objective", ["coverage", "information"])
def test_grids_continue_from_a_saved_state(objective: Any) -> None:
    assert_continues(lambda: made(3, objective=objective, slip=0.3))


@pytest.mark.parametrize(
    ("option", "message"),
    [({"slip": 2}, "slip"), ({"size": 1}, "size"), ({"objective": "x"}, "one of coverage"), ({"reward": "x"}, "reward")],
)
def test_options_outside_their_range_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        made(**option)


@pytest.mark.parametrize("objective", ["coverage", "information", "design", "diversity"])
def test_a_greedy_walk_is_a_walk_and_near_the_best_of_all(objective: Any) -> None:
    function = landscape(objective, 3, 5)
    walk, value = greedy_walk(function, 3, 4, 5)
    cells = np.stack(np.divmod(walk, 3), 1)
    assert len(walk) == 6
    assert (np.abs(np.diff(cells, axis=0)).sum(1) <= 1).all()
    assert value == pytest.approx(function.value(walk))
    most = 0.0
    for moves in itertools.product(range(4), repeat=5):
        place, visited = np.array([1, 1]), [4]
        for move in moves:
            place = (place + MOVES[move]).clip(0, 2)
            visited.append(int(place[0] * 3 + place[1]))
        most = max(most, function.value(visited))
    assert 0.85 * most <= value <= most + 1e-9


def test_steps_are_those_of_adam() -> None:
    config = subpo.Config(env="-", step_size=0.05, adam_epsilon=1e-3)
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    adam, track = torch.optim.Adam([parameter], lr=0.05, eps=1e-3, maximize=True), Track.start(parameter.detach().clone())
    for t in range(5):
        gradient = torch.tensor([0.3 * t - 0.5, 1.0 / (t + 1)], dtype=torch.float64)
        parameter.grad = gradient
        adam.step()
        track = subpo.advance(config, track, (gradient,), t)
    torch.testing.assert_close(track.parameters, parameter.detach(), atol=1e-12, rtol=0)


def test_the_entropy_bonus_falls_with_the_steps() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    found = Categorical(logits)
    logprob, weight = found.log_prob(torch.tensor([0, 1])), torch.tensor([0.5, -1.0])
    law = torch.softmax(logits, 1)
    entropy = -(law * law.log()).sum(1)
    for index, share in ((0, 0.6), (2, 0.2)):
        values = subpo.loss(subpo.Config(env="-", entropy_coef=0.6), StepsView(found, logprob, weight, index)).values
        torch.testing.assert_close(values, -weight * logprob - share * entropy)


def test_subpo_leaves_the_best_cell_where_a_modular_reward_keeps_it(tmp_path: Path) -> None:
    worth = {}
    for reward in ("marginal", "modular"):
        world = ["size=4", "horizon=6", "objective=diversity", f"reward={reward}"]
        options: dict[str, Any] = {"env": ENV, "env_options": world, "hidden": [], "step_size": 0.1, "batch_episodes": 32, "num_envs": 32}
        run = telos.train(
            "subpo", **options, total_episodes=32 * 60, eval_episodes=1, device="cpu", checkpoint_every=0, out=str(tmp_path / reward)
        )
        driver = Driver(made(objective="diversity"), 0)
        policy = telos.load(run.path)
        for _ in range(6):
            _, ended = driver.step(policy.predict(driver.observation)[0])
        worth[reward] = ended[0].info["objective"]
    function = landscape("diversity", 4, 0)
    assert worth["marginal"] > worth["modular"] + 0.1
    assert worth["marginal"] > 0.9 * greedy_walk(function, 4, 10, 6)[1] / function.value(range(16))
