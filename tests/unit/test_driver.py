"""The driver strings steps into episodes: their seeds, returns and lengths, and a restart in the middle of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete

from telos.algorithms.control import describe_episodes, evaluate
from telos.core.errors import Failure
from telos.core.seeds import derive
from telos.environments.base import Driver, Environments, Episode, Observation, Outcome
from telos.environments.gym import GymEnvironments
from telos.models.policies import Policy, Shape


class Drift(gymnasium.Env):
    """A random walk that terminates beyond 2 and is cut after `limit` steps. It keeps no state that could be saved."""

    observation_space = Box(-20.0, 20.0, (2,), np.float64)
    action_space = Discrete(2)

    def __init__(self, limit: int = 9, dictionary: bool = False, forgets: bool = True) -> None:
        self.limit, self.dictionary, self.forgets, self.begun = limit, dictionary, forgets, 0
        if dictionary:
            self.observation_space = Dict({"place": Box(-20.0, 20.0, (1,), np.float64), "time": Discrete(100)})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.begun += 1
        self.place, self.time = float(self.np_random.uniform(-1, 1)), 0
        if not self.forgets:
            self.place += 0.125 * self.begun
        return self._seen(), {}

    def _seen(self) -> Any:
        return {"place": np.array([self.place]), "time": self.time} if self.dictionary else np.array([self.place, self.time])

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
        self.time += 1
        self.place += (1 if action else -1) * self.np_random.uniform(0.1, 1.2)
        return self._seen(), self.place, abs(self.place) > 2, self.time >= self.limit, {"success": self.place > 2}


def drifts(count: int, **options: Any) -> GymEnvironments:
    return GymEnvironments("Drift", lambda: Drift(**options), count)


def actions_of(copy: int, steps: int) -> np.ndarray:
    """What copy `copy` does, whoever stands beside it."""
    return np.random.default_rng(100 + copy).integers(0, 2, steps)


def played(count: int, steps: int, seed: int = 3) -> list[list[tuple]]:
    """(first or following observation, reward, terminated, truncated) of every copy."""
    driver = Driver(drifts(count), seed)
    actions = np.stack([actions_of(i, steps) for i in range(count)])
    found: list[list[tuple]] = [[(*driver.observation[i],)] for i in range(count)]  # type: ignore[index]
    for t in range(steps):
        outcome, _ = driver.step(actions[:, t])
        for i in range(count):
            found[i].append(
                (*outcome.observation[i], outcome.reward[i], outcome.terminated[i], outcome.truncated[i], *driver.observation[i])  # type: ignore[index]
            )
    return found


# -- episodes ---------------------------------------------------------------------------------------------------------------------------------------


def test_a_copy_plays_the_same_episodes_whatever_the_number_of_copies() -> None:
    few, many = played(2, 60), played(5, 60)
    assert many[:2] == few
    assert len({episodes[0] for episodes in many}) == 5


def test_another_seed_or_label_plays_other_episodes() -> None:
    assert played(1, 5, seed=3) != played(1, 5, seed=4)
    one, two = Driver(drifts(1), 3), Driver(drifts(1), 3, "evaluation", 0)
    assert not np.array_equal(one.observation, two.observation)  # type: ignore[arg-type]


def test_every_episode_begins_from_the_seed_of_its_number() -> None:
    driver = Driver(drifts(2), 11, "some", 4)
    actions = np.random.default_rng(0)
    for _ in range(50):
        for i in range(2):
            if driver.length[i] == 0:
                alone = Drift()
                first, _ = alone.reset(seed=derive(11, "some", 4, "episode", i, int(driver.number[i])))
                assert np.array_equal(driver.observation[i], first)  # type: ignore[index]
        driver.step(actions.integers(0, 2, 2))
    assert driver.number.min() > 3


def test_returns_and_lengths_are_those_of_each_episode() -> None:
    """The books are kept again by hand, with one environment per copy stepped alone."""
    driver = Driver(drifts(3), 5)
    total, length = np.zeros(3), np.zeros(3, dtype=int)
    kinds = set()
    for t in range(80):
        outcome, episodes = driver.step(np.array([actions_of(i, 80)[t] for i in range(3)]))
        total += outcome.reward
        length += 1
        expected = []
        for i in np.flatnonzero(outcome.terminated | outcome.truncated):
            expected.append((total[i], length[i], bool(outcome.terminated[i]), float(outcome.observation[i][0] > 2)))  # type: ignore[index]
            total[i] = length[i] = 0
        assert [(e.total, e.length, e.terminated, e.info["success"]) for e in episodes] == expected
        kinds |= {e.terminated for e in episodes}
        assert np.array_equal(driver.total, total)
        assert np.array_equal(driver.length, length)
    assert kinds == {True, False}
    assert driver.steps == 240


def test_the_observation_after_the_last_action_is_where_it_led_and_the_next_is_of_a_new_episode() -> None:
    driver = Driver(drifts(1, limit=3), 0)
    before = driver.observation
    for t in range(3):
        outcome, episodes = driver.step(np.array([t % 2]))
        assert outcome.observation[0][1] == t + 1  # type: ignore[index]
    assert len(episodes) == 1
    assert outcome.truncated[0]
    assert driver.observation[0][1] == 0  # type: ignore[index]
    assert not np.array_equal(before, driver.observation)  # type: ignore[arg-type]


def test_a_step_that_terminates_at_the_limit_is_a_termination() -> None:
    class Both(Drift):
        def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
            observation, reward, _, _, info = super().step(action)
            return observation, reward, self.time >= 2, self.time >= 2, info

    driver = Driver(GymEnvironments("Both", Both, 1), 0)
    driver.step(np.array([0]))
    outcome, episodes = driver.step(np.array([0]))
    assert (outcome.terminated[0], outcome.truncated[0]) == (True, False)
    assert episodes[0].terminated


def test_a_termination_at_the_limit_is_one_whoever_implements_the_environments() -> None:
    """`Environments` is open to others; the driver promises that of both marks the termination counts."""

    class Stub(Environments):
        name, count = "Stub", 1
        observation_space, action_space = Box(-1, 1, (1,)), Discrete(2)

        def begin(self, copies: Sequence[int], seeds: Sequence[int]) -> Observation:
            return np.zeros((len(copies), 1), np.float32)

        def step(self, actions: np.ndarray) -> Outcome:
            return Outcome(np.ones((1, 1), np.float32), np.ones(1), np.array([True]), np.array([True]), {})

    outcome, episodes = Driver(Stub(), 0).step(np.array([0]))
    assert episodes[0].terminated
    assert not outcome.truncated[0]


# -- continuing -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dictionary", [False, True])
def test_a_run_continues_at_any_step_by_repeating_actions(dictionary: bool) -> None:
    """After each of 40 steps another driver takes over, on environments that have been used for something else; both then see the same."""
    count, steps = 3, 40
    actions = np.stack([actions_of(i, steps + 25) for i in range(count)], 1)
    for stop in range(steps):
        first = Driver(drifts(count, dictionary=dictionary), 7)
        for t in range(stop):
            first.step(actions[t])
        other = drifts(count, dictionary=dictionary)
        second = Driver(other, 7)
        second.step(np.zeros(count, dtype=np.int64))
        second.load(first.state())
        for t in range(stop, stop + 25):
            (a, ended), (b, again) = first.step(actions[t]), second.step(actions[t])
            for one, two in ((a.observation, b.observation), (first.observation, second.observation)):
                keys = one.keys() if isinstance(one, dict) else [slice(None)]
                assert all(np.array_equal(one[key], two[key]) for key in keys)  # type: ignore[index]
            assert np.array_equal(a.reward, b.reward)
            assert ended == again
        assert (first.steps, first.number.tolist(), first.total.tolist()) == (second.steps, second.number.tolist(), second.total.tolist())


def test_a_state_is_not_changed_by_later_steps() -> None:
    driver = Driver(drifts(2), 7)
    for t in range(5):
        driver.step(np.array([t % 2, 1]))
    state = driver.state()
    kept = [
        state["total"].copy(),
        state["length"].copy(),
        state["observation"].copy(),
        [None if a is None else a.copy() for a in state["actions"]],
    ]
    for t in range(30):
        driver.step(np.array([t % 2, 1]))
    for one, two in zip(kept[:3], (state["total"], state["length"], state["observation"])):
        assert np.array_equal(one, two)
    assert [None if a is None else a.tolist() for a in kept[3]] == [None if a is None else a.tolist() for a in state["actions"]]


def test_an_environment_that_is_not_deterministic_is_refused_at_resume() -> None:
    """It remembers how often it was reset, beyond its seed."""
    first = Driver(drifts(2, forgets=False), 7)
    for _ in range(4):
        first.step(np.array([0, 1]))
    again = drifts(2, forgets=False)
    again.copies[1].reset()  # type: ignore[attr-defined]
    with pytest.raises(Failure, match=r"Drift cannot be continued.*not deterministic given its seed"):
        Driver(again, 7).load(first.state())


def test_an_environment_whose_rewards_alone_are_not_deterministic_is_refused_at_resume() -> None:
    class Paid(Drift):
        draws = np.random.default_rng(0)

        def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
            observation, reward, *rest = super().step(action)
            return observation, reward + float(self.draws.normal()), *rest  # type: ignore[return-value]

    first = Driver(GymEnvironments("Paid", Paid, 1), 0)
    first.step(np.array([0]))
    with pytest.raises(Failure, match="Paid cannot be continued"):
        Driver(GymEnvironments("Paid", Paid, 1), 0).load(first.state())


# -- evaluation -------------------------------------------------------------------------------------------------------------------------------------


class Uneven(gymnasium.Env):
    """Episodes of one step, or of ten, by the seed; the return is the length."""

    observation_space, action_space = Box(0.0, 20.0, (1,), np.float32), Discrete(2)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.left = 10 if self.np_random.random() < 0.5 else 1
        return np.array([self.left], np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.left -= 1
        return np.array([self.left], np.float32), 1.0, self.left == 0, False, {"is_success": self.left == 0}


def policy_for(environments: Environments) -> Policy:
    return Policy(environments.observation_space, environments.action_space, Shape(hidden=(4,)))


@pytest.mark.parametrize(("copies", "episodes"), [(1, 5), (4, 10), (8, 3)])
def test_an_evaluation_has_exactly_the_first_episodes_of_each_copy(copies: int, episodes: int) -> None:
    """With the first episodes to finish, short ones would be counted more often."""
    environments = GymEnvironments("Uneven", Uneven, copies)
    found = evaluate(policy_for(environments), environments, episodes, 5, 2)
    expected = []
    for e in range(episodes):
        first, _ = Uneven().reset(seed=derive(5, "evaluation", 2, "episode", e % copies, e // copies))
        expected.append(int(first[0]))
    assert [episode.length for episode in found] == expected
    assert [episode.total for episode in found] == expected


def test_mean_lengths_of_evaluations_are_not_biased_towards_short_episodes() -> None:
    """The mean length is 5.5; the first 400 episodes to finish among 40 copies would have a mean near 2.5."""
    environments = GymEnvironments("Uneven", Uneven, 40)
    found = describe_episodes(evaluate(policy_for(environments), environments, 400, 0), "evaluation")
    assert abs(found["evaluation/length"] - 5.5) < 4 * 4.5 / 20
    assert found["evaluation/count"] == 400
    assert found["evaluation/is_success"] == 1.0


def test_what_is_said_of_episodes_by_hand() -> None:
    episodes = [
        Episode(1.0, 10, True, {"success": 1.0}),
        Episode(5.0, 30, False, {"success": float("nan")}),
        Episode(3.0, 20, True, {"cost": 2.0}),
    ]
    assert describe_episodes(episodes) == {
        "episode/return": 3.0,
        "episode/return_std": pytest.approx(np.sqrt(8 / 3)),
        "episode/length": 20.0,
        "episode/count": 3.0,
        "episode/success": 1.0,
        "episode/cost": 2.0,
    }
    assert describe_episodes([]) == {}


def test_rewards_that_are_no_numbers_are_named_with_copy_step_and_episode() -> None:
    class Broken(Drift):
        def step(self, action: int) -> tuple[Any, float, bool, bool, dict]:
            observation, _, _, cut, info = super().step(action)
            return observation, float("inf") if self.time == 2 and self.begun == 2 else 0.0, False, cut, info

    driver = Driver(GymEnvironments("Broken", lambda: Broken(limit=3), 1), 0)
    for _ in range(4):
        driver.step(np.array([0]))
    with pytest.raises(Failure, match=r"Broken: the reward is inf \(copy 0, step 2 of its episode 1\)"):
        driver.step(np.array([0]))
