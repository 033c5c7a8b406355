"""Exact values, occupancies and optima of finite processes, against other ways to compute them; and their environments."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import pytest
from scipy.optimize import linprog

from environment_checks import assert_continues
from telos.core.errors import UsageError
from telos.environments.base import Driver
from telos.environments.tabular import (
    ENVIRONMENTS,
    Tabular,
    TabularEnvironments,
    chain,
    cliff,
    four_rooms,
    garnet,
    greedy,
    grid,
    lock,
    random_mdp,
    river_swim,
)

# Two states. In 0, action 0 stays for 1 and action 1 goes on for 0; in 1, whatever is done, one stays for 2.
TWO = {"transitions": [[[1, 0], [0, 1]], [[0, 1], [0, 1]]], "rewards": [[1, 0], [2, 2]], "start": [1, 0]}


def random_policy(process: Tabular, seed: int) -> np.ndarray:
    shape = (process.states, process.actions) if process.horizon is None else (process.horizon, process.states, process.actions)
    return np.random.default_rng(seed).dirichlet(np.ones(process.actions), size=shape[:-1])


def with_terminal(discount: float = 0.9, horizon: int | None = None) -> Tabular:
    """A random process in which state 0 ends the episode; rewards depend on the next state."""
    made = random_mdp(6, 3, seed=4)
    rewards = np.random.default_rng(0).normal(size=made.transitions.shape)
    start = np.array([0.0, 1, 1, 1, 1, 1]) / 5
    return Tabular(made.transitions, rewards, start, np.arange(6) == 0, horizon, discount)


def test_values_by_hand():
    process = Tabular(**TWO, discount=0.5)
    state, action = process.evaluate(np.array([[1.0, 0], [1, 0]]))
    np.testing.assert_allclose(state, [2, 4])
    np.testing.assert_allclose(action, [[2, 2], [4, 4]])
    assert Tabular(**TWO, discount=0.9).optimal().policy[0].tolist() == [0, 1]  # 0.9 * 20 against 10
    assert Tabular(**TWO, discount=0.4).optimal().policy[0].tolist() == [1, 0]  # 0.4 * 10/3 against 5/3
    finite = Tabular(**TWO, horizon=3)
    np.testing.assert_allclose(finite.optimal().state[:, 0], [4, 2, 1, 0])
    np.testing.assert_allclose(
        finite.evaluate(finite.uniform).state[:, 0], [0.5 + 0.5 * (0.5 + 0.5 * 0.5 + 0.5 * 2) + 0.5 * 4, 1.75, 0.5, 0]
    )


@pytest.mark.parametrize(
    "process", [garnet(12, 3, 2, seed=1), with_terminal(), with_terminal(horizon=7), random_mdp(5, 2, seed=3, horizon=9)]
)
def test_values_are_the_sum_over_time(process: Tabular):
    """Against stepping the distribution of states forward."""
    policy = random_policy(process, 2)
    total, occupancy, here = 0.0, np.zeros((process.states, process.actions)), process.start.copy()
    mean = process.rewards if process.rewards.ndim == 2 else (process.transitions * process.rewards).sum(-1)
    for t in range(process.horizon or 600):
        here = np.where(process.ending, 0.0, here)
        taken = here[:, None] * (policy if process.horizon is None else policy[t])
        total += process.discount**t * (taken * mean).sum()
        occupancy += process.discount**t * taken
        here = (taken[:, :, None] * process.transitions).sum((0, 1))
    assert process.performance(policy) == pytest.approx(total, abs=1e-9)
    found = process.occupancy(policy)
    np.testing.assert_allclose(found if process.horizon is None else found.sum(0), occupancy, atol=1e-9)
    assert (found * process.expected_rewards).sum() == pytest.approx(total, abs=1e-9)


def test_an_occupancy_without_terminal_states_is_a_distribution():
    process = garnet(seed=5)
    assert (1 - process.discount) * process.occupancy(process.uniform).sum() == pytest.approx(1)
    assert random_mdp(horizon=7, discount=1.0).occupancy(random_mdp().uniform).sum((1, 2)) == pytest.approx(np.ones(7))


@pytest.mark.parametrize("process", [garnet(15, 3, 4, seed=0), with_terminal(0.97), random_mdp(8, 4, seed=2, discount=0.999), chain()])
def test_the_optimum_solves_the_linear_programme(process: Tabular):
    """min Σ v with v >= r + discount P v for all actions (Puterman 1994, section 6.9)."""
    live = np.where(process.ending[:, None, None], 0.0, process.transitions)
    full = np.broadcast_to(process.rewards if process.rewards.ndim == 3 else process.rewards[:, :, None], live.shape)
    mean = (live * full).sum(-1)
    rows = process.discount * live - np.eye(process.states)[:, None, :]
    solved = linprog(
        np.ones(process.states), A_ub=rows.reshape(-1, process.states), b_ub=-mean.reshape(-1), bounds=(None, None), method="highs"
    )
    optimum = process.optimal()
    np.testing.assert_allclose(optimum.state, solved.x, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(process.evaluate(optimum.policy).state, optimum.state, atol=1e-9)
    np.testing.assert_allclose(optimum.action.max(-1), optimum.state, atol=1e-9)


def test_the_optimum_with_a_horizon_is_the_best_of_all_policies():
    process = random_mdp(2, 2, seed=7, horizon=2, discount=0.9)
    best = max(process.performance(np.eye(2)[np.array(choice).reshape(2, 2)]) for choice in itertools.product(range(2), repeat=4))
    optimum = process.optimal()
    assert process.start @ optimum.state[0] == pytest.approx(best)
    assert process.performance(optimum.policy) == pytest.approx(best)


def test_equally_good_actions_give_the_first():
    assert greedy(np.array([[1.0, 3, 3], [2, 2, 2]])).argmax(-1).tolist() == [1, 0]
    alike = Tabular(np.full((3, 4, 3), 1 / 3), np.ones((3, 4)), np.ones(3) / 3, discount=0.9)
    assert alike.optimal().policy.argmax(-1).tolist() == [0, 0, 0]


def test_the_chain_and_the_river_are_those_of_the_papers():
    made = chain()
    np.testing.assert_allclose(made.transitions[2, 0], [0.2, 0, 0, 0.8, 0])
    np.testing.assert_allclose(made.transitions[4, 1], [0.8, 0, 0, 0, 0.2])
    assert (made.rewards[4, 0, 4], made.rewards[1, 0, 0], made.rewards[1, 0, 2]) == (10, 2, 0)
    assert made.optimal().policy.argmax(-1).tolist() == [0] * 5
    river = river_swim()
    np.testing.assert_allclose(river.transitions[:, 1].sum(-1), 1)
    np.testing.assert_allclose(river.transitions[2, 1], [0, 0.05, 0.6, 0.35, 0, 0])
    np.testing.assert_allclose(river.transitions[5, 1], [0, 0, 0, 0, 0.4, 0.6])
    # Drifting earns 0.005 a step; with twenty steps it pays to swim.
    optimum, drifting = river.optimal(), np.eye(2)[np.zeros(6, dtype=int)]
    assert river.performance(drifting) == pytest.approx(0.1)
    assert optimum.policy[0].argmax(-1).tolist() == [1] * 6
    assert optimum.state[0, 0] > 1


@pytest.mark.parametrize("goal", [(7, 9), (1, 1)])
def test_the_way_through_four_rooms_is_the_shortest(goal: tuple[int, int]):
    rooms = four_rooms(slip=0.0, goal=goal, discount=0.9)
    assert rooms.states == 104
    assert rooms.places is not None
    places = [tuple(place) for place in rooms.places.tolist()]
    distance, wave = {goal: 0}, deque([goal])
    while wave:
        r, c = wave.popleft()
        for near in ((r + 1, c), (r - 1, c), (r, c + 1), (r, c - 1)):
            if near in places and near not in distance:
                distance[near] = distance[(r, c)] + 1
                wave.append(near)
    expected = [0.0 if place == goal else 0.9 ** (distance[place] - 1) for place in places]
    np.testing.assert_allclose(rooms.optimal().state, expected, atol=1e-9)


def test_moves_in_four_rooms_go_astray_one_time_in_three():
    rooms = four_rooms()
    assert rooms.places is not None
    state = next(i for i, place in enumerate(rooms.places.tolist()) if place == [2, 2])
    reached = {tuple(rooms.places[i] - [2, 2]): p for i, p in enumerate(rooms.transitions[state, 0]) if p > 0}
    assert reached == pytest.approx({(-1, 0): 2 / 3, (0, 1): 1 / 9, (1, 0): 1 / 9, (0, -1): 1 / 9})


def test_the_cliff_costs_thirteen_steps_or_a_hundred():
    made = cliff(horizon=50, discount=1.0)
    optimum = made.optimal()
    assert made.start @ optimum.state[0] == -13
    start = int(made.start.argmax())
    assert made.rewards[start, 1] == -100
    assert made.transitions[start, 1, start] == 1


def test_a_lock_opens_to_who_knows_it():
    made = lock(length=4, actions=3, seed=2)
    optimum = made.optimal()
    assert made.start @ optimum.state[0] == pytest.approx(1)
    opened = made.occupancy(made.uniform)[3][[9, 10]].sum() / 3  # in a good state at the last position, with the right action
    assert opened == pytest.approx(3.0**-4)
    assert not np.array_equal(lock(seed=0).transitions, lock(seed=1).transitions)


def test_a_garnet_branches_as_asked():
    made = garnet(10, 2, 4, seed=0)
    assert ((made.transitions > 0).sum(-1) == 4).all()
    assert np.array_equal(made.transitions, garnet(10, 2, 4, seed=0).transitions)


def test_a_grid_with_slip_mixes_the_directions():
    made = grid(["#####", "#S.G#", "#####"], slip=0.3, discount=0.9)
    np.testing.assert_allclose(made.transitions[0, 1], [0.3, 0.7, 0])  # up, down and left stay
    np.testing.assert_allclose(made.rewards[1], [0.1, 0.7, 0.1, 0.1])
    assert made.ending.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"transitions": [[[1, 0], [0, 0.9]], [[0, 1], [0, 1]]]}, UsageError),
        ({"start": [1.5, -0.5]}, UsageError),
        ({"rewards": [[1, np.nan], [2, 2]]}, UsageError),
        ({"terminal": [True, False]}, UsageError),
        ({"discount": 1.0}, UsageError),
        ({"discount": 1.1, "horizon": 3}, UsageError),
        ({"horizon": 0}, UsageError),
        ({"rewards": [1, 2]}, ValueError),
        ({"terminal": [True]}, ValueError),
    ],
)
def test_what_is_no_process_is_refused(change: dict, error: type[Exception]):
    with pytest.raises(error):
        Tabular(**({**TWO, "discount": 0.9} | change))


def test_what_is_no_policy_is_refused():
    process = Tabular(**TWO, discount=0.9)
    with pytest.raises(UsageError):
        process.evaluate(np.ones((2, 2)))
    with pytest.raises(ValueError):
        process.evaluate(np.ones((3, 2, 2)) / 2)


# -- environments -------------------------------------------------------------------------------------------------------------------------------


def test_copies_move_with_the_probabilities_of_the_process():
    process = garnet(5, 2, 3, seed=1)
    copies = TabularEnvironments("garnet", process, 500)
    state = np.asarray(copies.begin(range(500), range(500)))
    assert abs(state.mean() - 2) < 0.3
    counts, draws = np.zeros_like(process.transitions), np.random.default_rng(0)
    for _ in range(80):
        actions = draws.integers(2, size=500)
        outcome = copies.step(actions)
        np.testing.assert_array_equal(outcome.reward, process.rewards[state, actions])
        np.add.at(counts, (state, actions, outcome.observation), 1)
        state = np.asarray(outcome.observation)
    visits = counts.sum(-1, keepdims=True)
    error = np.abs(counts / visits - process.transitions)
    assert (error <= 5 * np.sqrt(process.transitions * (1 - process.transitions) / visits)).all()


def test_average_returns_are_the_performance():
    process = river_swim()
    driver, draws = Driver(ENVIRONMENTS["telos/RiverSwim-v0"](1000), 0), np.random.default_rng(0)
    returns = []
    for _ in range(process.horizon or 0):
        _, ended = driver.step((draws.random(1000) < 0.9).astype(int))
        returns += [episode.total for episode in ended]
    assert len(returns) == 1000
    expected = process.performance(np.tile([0.1, 0.9], (6, 1)))
    assert abs(np.mean(returns) - expected) < 4 * np.std(returns) / np.sqrt(1000)


def test_rewards_of_transitions_come_with_the_state_that_was_reached():
    process = chain()
    copies = TabularEnvironments("chain", process, 50)
    copies.begin(range(50), range(50))
    for _ in range(30):
        outcome = copies.step(np.zeros(50, dtype=int))
        state = np.asarray(outcome.observation)
        assert (outcome.reward[state == 0] == 2).all()
        assert (outcome.reward[(state > 0) & (state < 4)] == 0).all()


def test_goals_and_horizons_terminate_and_limits_truncate():
    goal = TabularEnvironments("g", grid(["S.G"], discount=0.9), 1, max_episode_steps=5)
    goal.begin([0], [0])
    assert [goal.step(np.array([1])).terminated[0] for _ in range(2)] == [False, True]
    goal.begin([0], [0])
    outcomes = [goal.step(np.array([0])) for _ in range(5)]
    assert [bool(x.truncated[0]) for x in outcomes] == [False] * 4 + [True]
    assert not any(x.terminated[0] for x in outcomes)
    river = TabularEnvironments("r", river_swim(horizon=3), 1, max_episode_steps=3)
    river.begin([0], [0])
    last = [river.step(np.array([1])) for _ in range(3)][-1]
    assert (last.terminated[0], last.truncated[0]) == (True, False)


def test_an_episode_depends_on_its_seed_and_actions_alone():
    together, alone = (TabularEnvironments("x", random_mdp(seed=1), n) for n in (4, 1))
    together.begin(range(4), [5, 6, 7, 8])
    assert np.asarray(alone.begin([0], [7]))[0] == together._state[2]
    for step in range(30):
        actions = np.full(4, step % 3)
        if step == 5:
            together.begin([3], [1])
        assert np.asarray(together.step(actions).observation)[2] == np.asarray(alone.step(actions[:1]).observation)[0]


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_every_named_environment_is_made_and_continues(env: str):
    made = ENVIRONMENTS[env](2)
    assert made.name == env
    assert_continues(lambda: ENVIRONMENTS[env](3), steps=30)


def test_options_reach_the_process_and_unknown_ones_are_refused():
    made = ENVIRONMENTS["telos/Lock-v0"](1, length=3, actions=2, seed=4)
    assert isinstance(made, TabularEnvironments)
    assert made.process.states == 10
    with pytest.raises(TypeError, match="slip"):
        ENVIRONMENTS["telos/Lock-v0"](1, slip=0.5)
    with pytest.raises(UsageError, match="no free cell"):
        ENVIRONMENTS["telos/FourRooms-v0"](1, goal=[0, 0])
