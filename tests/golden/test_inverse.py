"""Rewards from behaviour and from preferences against enumeration of all episodes, against laws that they must reproduce, and against another solver."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import check_grad

from telos.core.errors import UsageError
from telos.functional.inverse import bradley_terry_reward, maximum_entropy_reward, soft_optimum, visits

STATES, ACTIONS, HORIZON = 4, 3, 5


def instance(seed: int, deterministic: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Transitions, start, reference and reward."""
    draws = np.random.default_rng(seed)
    if deterministic:
        transitions = np.eye(STATES)[draws.integers(STATES, size=(STATES, ACTIONS))]
    else:
        transitions = draws.dirichlet(np.ones(STATES), size=(STATES, ACTIONS))
    start, reference = draws.dirichlet(np.ones(STATES)), draws.dirichlet(np.full(ACTIONS, 3.0), size=STATES)
    return transitions, start, reference, draws.normal(size=(STATES, ACTIONS))


def episodes(transitions: np.ndarray, state: int) -> list[list[tuple[int, int]]]:
    """All ways of a deterministic process from a state."""
    found = []
    for actions in itertools.product(range(ACTIONS), repeat=HORIZON):
        now, way = state, []
        for action in actions:
            way.append((now, action))
            now = int(transitions[now, action].argmax())
        found.append(way)
    return found


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_soft_optimum_tilts_the_references_episodes_by_what_they_earn(temperature: float) -> None:
    transitions, _, reference, reward = instance(0)
    found = soft_optimum(reward, transitions, reference, HORIZON, temperature)
    for state in range(STATES):
        ways = episodes(transitions, state)
        weight = np.array(
            [np.prod([reference[pair] for pair in way]) * np.exp(sum(reward[pair] for pair in way) / temperature) for way in ways]
        )
        chance = np.array([np.prod([found.policy[t][pair] for t, pair in enumerate(way)]) for way in ways])
        np.testing.assert_allclose(chance, weight / weight.sum(), rtol=1e-10)
        np.testing.assert_allclose(found.value[state], temperature * np.log(weight.sum()), rtol=1e-10)


def test_without_a_reward_the_soft_optimum_is_the_reference() -> None:
    transitions, _, reference, reward = instance(1, deterministic=False)
    found = soft_optimum(0 * reward, transitions, reference, HORIZON)
    np.testing.assert_allclose(found.policy, np.broadcast_to(reference, found.policy.shape), rtol=1e-12)
    np.testing.assert_allclose(found.value, 0.0, atol=1e-12)


def test_visits_are_those_of_all_episodes() -> None:
    transitions, start, reference, reward = instance(2)
    policy = soft_optimum(reward, transitions, reference, HORIZON).policy
    wanted = np.zeros((STATES, ACTIONS))
    for state in range(STATES):
        for way in episodes(transitions, state):
            chance = start[state] * np.prod([policy[t][pair] for t, pair in enumerate(way)])
            for pair in way:
                wanted[pair] += chance
    np.testing.assert_allclose(visits(transitions, start, policy), wanted, rtol=1e-10)


@pytest.mark.parametrize("deterministic", [True, False])
def test_the_gradient_of_the_value_in_the_reward_is_the_visits(deterministic: bool) -> None:
    transitions, start, reference, reward = instance(3, deterministic)

    def value(flat: np.ndarray) -> float:
        return float(start @ soft_optimum(flat.reshape(reward.shape), transitions, reference, HORIZON, 0.7).value)

    def gradient(flat: np.ndarray) -> np.ndarray:
        return visits(transitions, start, soft_optimum(flat.reshape(reward.shape), transitions, reference, HORIZON, 0.7).policy).ravel()

    assert check_grad(value, gradient, reward.ravel()) < 1e-5


@pytest.mark.parametrize("deterministic", [True, False])
def test_inverse_rl_visits_what_the_expert_visits(deterministic: bool) -> None:
    """The expert is best for a reward that nobody tells; the learner reproduces its visits, though the reward found may be another."""
    transitions, start, reference, reward = instance(4, deterministic)
    expert = visits(transitions, start, soft_optimum(reward, transitions, reference, HORIZON).policy)
    assert np.abs(expert - visits(transitions, start, soft_optimum(0 * reward, transitions, reference, HORIZON).policy)).max() > 0.1
    found = maximum_entropy_reward(expert, transitions, start, reference, HORIZON, ridge=1e-4)
    learner = visits(transitions, start, soft_optimum(found, transitions, reference, HORIZON).policy)
    np.testing.assert_allclose(learner, expert, atol=1e-3)
    np.testing.assert_allclose(learner - expert, -1e-4 * found, atol=1e-5)  # what is left is the ridge's


def test_inverse_rl_is_maximum_likelihood_of_the_experts_episodes() -> None:
    """No other reward makes a sample of episodes likelier, when the ridge's prior is counted in."""
    transitions, start, reference, _ = instance(5)
    draws = np.random.default_rng(0)
    sample = [ways[draws.integers(len(ways))] for ways in (episodes(transitions, int(draws.choice(STATES, p=start))) for _ in range(20))]
    # The law of the first state is the sample's own, so that the likelihood is that of the actions.
    first = np.bincount([way[0][0] for way in sample], minlength=STATES) / len(sample)
    expert = np.zeros((STATES, ACTIONS))
    for way in sample:
        for pair in way:
            expert[pair] += 1 / len(sample)
    found = maximum_entropy_reward(expert, transitions, first, reference, HORIZON, ridge=0.01)

    def score(of: np.ndarray) -> float:
        policy = soft_optimum(of, transitions, reference, HORIZON).policy
        return float(np.mean([sum(np.log(policy[t][pair]) for t, pair in enumerate(way)) for way in sample])) - 0.005 * float((of**2).sum())

    best = score(found)
    assert best > score(np.zeros_like(found)) + 0.01
    for step in (0.03, 0.3):
        for direction in draws.normal(size=(10, *found.shape)):
            assert score(found + step * direction) < best


def test_preferences_are_explained_as_by_newtons_method() -> None:
    difference, ridge = np.random.default_rng(6).normal(size=(80, 2, 3)), 0.05
    rows, weights = difference.reshape(80, 6), np.zeros(6)
    for _ in range(20):
        wrong = 1 / (1 + np.exp(rows @ weights))
        curvature = (rows * (wrong * (1 - wrong))[:, None]).T @ rows / 80 + ridge * np.eye(6)
        weights += np.linalg.solve(curvature, rows.T @ wrong / 80 - ridge * weights)
    assert np.abs(weights).max() > 0.1
    np.testing.assert_allclose(bradley_terry_reward(difference, ridge).ravel(), weights, atol=1e-5)


def test_the_reward_behind_preferences_is_found_from_many() -> None:
    draws = np.random.default_rng(7)
    reward, features = draws.normal(size=4), draws.normal(size=(20_000, 4))
    sign = np.where(draws.random(20_000) < 1 / (1 + np.exp(-features @ reward)), 1.0, -1.0)
    np.testing.assert_allclose(bradley_terry_reward(sign[:, None] * features, 1e-6), reward, atol=0.08)


def test_wrong_values_are_refused() -> None:
    transitions, _, reference, reward = instance(8)
    with pytest.raises(UsageError, match="every action"):
        soft_optimum(reward, transitions, np.eye(ACTIONS)[[0, 1, 2, 0]], HORIZON)
    with pytest.raises(UsageError, match="temperature"):
        soft_optimum(reward, transitions, reference, HORIZON, 0.0)
    with pytest.raises(UsageError, match="ridge"):
        bradley_terry_reward(np.ones((2, 3)), 0.0)
    with pytest.raises(ValueError, match=r"\[S, A, S\]"):
        soft_optimum(reward, transitions[:, :, :2], reference, HORIZON)
