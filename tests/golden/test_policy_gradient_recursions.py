"""Estimates from whole episodes are unbiased for exact gradients and Hessians, recursions are what their papers say, and runs continue where they were."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Discrete
from torch import Tensor

import telos
from support import program_of
from telos.algorithms.online import harpg, n_pg_igt, policy_gradient
from telos.algorithms.online._loop_policy_gradient import Episodes, Estimator, collect, reward_to_go
from telos.catalogue._tabular_gradients import Processes, course, exponent, with_gaps
from telos.core.errors import UsageError
from telos.core.seeds import numpy_generator
from telos.environments.base import Driver
from telos.environments.registry import make_environments
from telos.environments.tabular import Tabular, random_mdp
from telos.functional.recursions import Track
from telos.models.policies import Policy, Shape

GAMMA, HORIZON, STATES, ACTIONS = 0.9, 2, 2, 2
PROCESS = with_gaps(1, STATES, ACTIONS, HORIZON, numpy_generator(3, "process"))[0]


PROCESS = dataclasses.replace(PROCESS, discount=GAMMA)


def tabular_policy(seed: int = 0) -> Policy:
    policy = Policy(Discrete(STATES), Discrete(ACTIONS), Shape(hidden=())).double()
    torch.manual_seed(seed)
    torch.nn.utils.vector_to_parameters(torch.randn(STATES * ACTIONS + ACTIONS, dtype=torch.float64), policy.parameters())
    return policy


def exact_return(vector: Tensor) -> Tensor:
    """The expected return by forward recursion of the states' probabilities, for logits of weights [A, S] and biases [A]."""
    logits = vector[: STATES * ACTIONS].view(ACTIONS, STATES).T + vector[STATES * ACTIONS :]
    policy = torch.softmax(logits, 1)
    here, found = torch.from_numpy(PROCESS.start), torch.zeros((), dtype=torch.float64)
    for h in range(HORIZON):
        taken = here[:, None] * policy
        found = found + GAMMA**h * (taken * torch.from_numpy(PROCESS.rewards)).sum()
        here = torch.einsum("sa,sap->p", taken, torch.from_numpy(PROCESS.transitions))
    return found


def every_episode(policy: Policy) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(states [E, H], actions [E, H], probabilities [E]) of all episodes that there can be."""
    with torch.no_grad():
        law = torch.softmax(policy(torch.eye(STATES, dtype=torch.float64)), 1).numpy()
    states, actions, chances = [], [], []
    for path in itertools.product(*[range(STATES), range(ACTIONS)] * HORIZON):
        s, a = path[::2], path[1::2]
        chance = PROCESS.start[s[0]] * np.prod(law[list(s), list(a)])
        for h in range(HORIZON - 1):
            chance *= PROCESS.transitions[s[h], a[h], s[h + 1]]
        states.append(s)
        actions.append(a)
        chances.append(chance)
    return np.array(states), np.array(actions), np.array(chances)


def batch(states: np.ndarray, actions: np.ndarray) -> Episodes:
    observation = torch.eye(STATES, dtype=torch.float64)[torch.from_numpy(states)]
    reward = torch.from_numpy(PROCESS.rewards[states, actions])
    return Episodes(observation, torch.from_numpy(actions), reward, torch.ones(states.shape, dtype=torch.bool))


def expected(policy: Policy, episodes: int, along: Tensor | None = None) -> Tensor:
    """The estimate from a batch of so many episodes, in exact expectation over all batches."""
    estimator, baseline = Estimator(policy), "none" if episodes == 1 else "others"
    states, actions, chances = every_episode(policy)
    assert chances.sum() == pytest.approx(1)
    total = torch.zeros(STATES * ACTIONS + ACTIONS, dtype=torch.float64)
    config: Any = None
    for drawn in itertools.product(range(len(chances)), repeat=episodes):
        rows = batch(states[list(drawn)], actions[list(drawn)])
        given = (rows.observation, rows.action, reward_to_go(rows, GAMMA, baseline), rows.mask)
        if along is None:
            told = estimator.gradient(*given, loss=lambda view: policy_gradient.loss(config, view), index=0, count=episodes)
            found = told["gradient"]
        else:
            found = estimator.product(*given, along=along, count=episodes)
        total += chances[list(drawn)].prod() * found
    return total


def test_the_exact_return_is_that_of_the_tabular_process() -> None:
    policy = tabular_policy()
    law = torch.softmax(policy(torch.eye(STATES, dtype=torch.float64)), 1).detach().numpy()
    vector = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    assert float(exact_return(vector)) == pytest.approx(PROCESS.performance(law), abs=1e-12)


@pytest.mark.parametrize("episodes", [1, 2])
def test_the_gradient_estimate_is_unbiased_with_and_without_a_baseline(episodes: int) -> None:
    policy = tabular_policy()
    vector = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().requires_grad_()
    (exact,) = torch.autograd.grad(exact_return(vector), vector)
    assert exact.norm() > 0.01
    torch.testing.assert_close(expected(policy, episodes), exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("episodes", [1, 2])
def test_the_hessian_vector_product_is_unbiased_with_and_without_a_baseline(episodes: int) -> None:
    policy = tabular_policy(1)
    vector = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    along = torch.randn(len(vector), dtype=torch.float64)
    hessian: Any = torch.autograd.functional.hessian(exact_return, vector)
    assert (hessian @ along).norm() > 0.01
    torch.testing.assert_close(expected(policy, episodes, along), hessian @ along, atol=1e-12, rtol=0)


def test_a_product_of_the_gaussian_policy_is_that_of_its_closed_form() -> None:
    """One step, mean θ and deviation e^λ: with z = (a − θ)/e^λ, ∇log π = (z/e^λ, z² − 1) and ∇² log π = −(1/e^2λ, 2z/e^λ; 2z/e^λ, 2z²)."""
    from gymnasium.spaces import Box

    policy = Policy(Box(-1, 1, (1,)), Box(-9, 9, (1,)), Shape(hidden=())).double()
    estimator = Estimator(policy)
    assert [tuple(p.shape) for p in policy.parameters()] == [(1,), (1, 1), (1,)]  # λ, weight, bias
    estimator.place(torch.tensor([0.3, 0.0, 0.5], dtype=torch.float64))
    action, reward, scale = 1.2, 2.0, np.exp(0.3)
    z = (action - 0.5) / scale
    score = np.array([z**2 - 1, z / scale])  # of λ and the bias; the observation is 0
    curvature = -np.array([[2 * z**2, 2 * z / scale], [2 * z / scale, 1 / scale**2]])
    along = np.array([0.7, -0.4])
    wanted = reward * (score * (score @ along) + curvature @ along)
    given = (torch.zeros(1, 1, 1), torch.full((1, 1, 1), action, dtype=torch.float64), torch.full((1, 1), reward))
    observation, taken, weight = (part.double() for part in given)
    found = estimator.product(
        observation, taken, weight, torch.ones(1, 1, dtype=torch.bool), along=torch.tensor([0.7, 9.0, -0.4]).double(), count=1
    )
    np.testing.assert_allclose(found[[0, 2]], wanted, atol=1e-12)
    assert found[1] == 0


def test_the_baseline_is_the_mean_of_the_other_episodes() -> None:
    reward = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]])
    episodes = Episodes(reward, reward, reward, torch.tensor([[True] * 3, [True, False, False]]))
    own = torch.tensor([[1 + 1 + 1, 1 + 1, 1.0], [3.0, 0.0, 0.0]])
    torch.testing.assert_close(reward_to_go(episodes, 0.5, "none"), own)
    torch.testing.assert_close(reward_to_go(episodes, 0.5, "others"), own - own.flip(0))


# -- recursions -------------------------------------------------------------------------------------------------------------------------------------

CURVATURE = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)


def slope(point: Tensor) -> Tensor:
    """Of the concave quadratic with its maximum at (1, −1)."""
    return -CURVATURE @ (point - torch.tensor([1.0, -1.0], dtype=torch.float64))


def followed(module: Any, steps: int = 6, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """(points, directions) of a method that is told exact gradients and products."""
    config = module.Config(env="-", **options)
    track = Track.start(torch.tensor([0.2, 0.4], dtype=torch.float64))
    points, directions = [], []
    for t in range(steps):
        chance = torch.tensor([0.3], dtype=torch.float64)
        queries = module.propose(config, track, chance, t)
        found = tuple(slope(q.parameters) if q.along is None else -CURVATURE @ q.along for q in queries)
        points.append(track.parameters)
        track = module.advance(config, track, found, t)
        directions.append(track.direction)
    return points, directions


@pytest.mark.parametrize(("module", "options"), [(n_pg_igt, {}), (harpg, {}), (harpg, {"normalize": False, "step_power": 0.5})])
def test_on_a_quadratic_both_corrections_keep_the_running_mean_at_the_gradient_of_the_point(module: Any, options: dict[str, Any]) -> None:
    points, directions = followed(module, **options)
    for point, direction in zip(points, directions, strict=True):
        torch.testing.assert_close(direction, slope(point), atol=1e-12, rtol=0)
    lagging, behind = followed(n_pg_igt, transport=False)
    assert (behind[-1] - slope(lagging[-1])).norm() > 0.01


def test_igt_by_hand_on_a_line() -> None:
    """Gradients of −θ²/2, γ_0 = 0.3: lengths of steps are 0.3, 0.2, 0.15, and the point asked at is 1 − 0.3 − (3/2)^0.8 · 0.3 + 0.3 after one."""
    config = n_pg_igt.Config(env="-", step_size=0.3)
    track = Track.start(torch.ones(1, dtype=torch.float64))
    chance, at = torch.zeros(1), []
    for t in range(3):
        (query,) = n_pg_igt.propose(config, track, chance, t)
        at.append(float(query.parameters))
        track = n_pg_igt.advance(config, track, (-query.parameters,), t)
    assert at[:2] == pytest.approx([1.0, 0.7 - (1.5**0.8 - 1) * 0.3])
    assert at[2] == pytest.approx(0.5 - (2**0.8 - 1) * 0.2)
    assert float(track.parameters) == pytest.approx(1 - 0.3 - 0.2 - 0.15)


def test_harpg_by_hand_asks_between_the_last_two_points() -> None:
    config = harpg.Config(env="-", step_size=0.5, normalize=False, step_power=0.5)
    track = Track(*(torch.tensor([x], dtype=torch.float64) for x in (3.0, 1.0, 10.0, 0.0)))
    here, between = harpg.propose(config, track, torch.tensor([0.25], dtype=torch.float64), 6)
    assert (here.parameters.item(), here.along) == (3.0, None)
    assert between.parameters.item() == 0.25 * 3 + 0.75 * 1
    assert between.along is not None
    assert between.along.item() == 2.0
    after = harpg.advance(config, track, (torch.tensor([8.0]).double(), torch.tensor([-4.0]).double()), 6)
    assert after.direction.item() == pytest.approx(0.75 * (10 - 4) + 0.25 * 8)  # η_6 = 1/4
    assert after.parameters.item() == pytest.approx(3 + 0.5 * 0.5 * 6.5)
    assert after.previous.item() == 3.0


def test_the_plain_step_is_the_gradient_times_the_step_size_and_normalised_of_that_length() -> None:
    track, gradient = Track.start(torch.zeros(2)), torch.tensor([3.0, 4.0])
    plain = policy_gradient.Config(env="-", step_size=0.5)
    moved = policy_gradient.advance(plain, track, (gradient,), 14)
    torch.testing.assert_close(moved.parameters, gradient * 0.5 * 0.25)  # (2/16)^(2/3) = 1/4
    normalised = policy_gradient.Config(env="-", step_size=0.5, normalize=True, step_power=0.0)
    torch.testing.assert_close(policy_gradient.advance(normalised, track, (gradient,), 14).parameters, gradient / 10)
    still = policy_gradient.advance(normalised, track, (torch.zeros(2),), 0)
    assert torch.equal(still.parameters, torch.zeros(2))


# -- many processes side by side ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy_class", "actions"), [("gaussian", 2), ("softmax", 3)])
def test_estimates_on_many_processes_are_unbiased_for_differences_of_exact_returns(policy_class: Any, actions: int) -> None:
    """One process 100,000 times: means against central differences of the exact return, within five standard errors."""
    runs, rng = 100_000, numpy_generator(5, "draws")
    one = with_gaps(1, 2, actions, 2, numpy_generator(4, "process"))
    single, many = Processes(one, policy_class), Processes(one * runs, policy_class)
    theta, along = rng.normal(size=single.size), rng.normal(size=single.size)

    def value(point: np.ndarray) -> float:
        return -float(single.suboptimality(point[None])[0])

    def gradient(point: np.ndarray) -> np.ndarray:
        return np.array([(value(point + e) - value(point - e)) / 2e-4 for e in 1e-4 * np.eye(single.size)])

    product = (gradient(theta + 1e-2 * along) - gradient(theta - 1e-2 * along)) / 2e-2
    for exact, direction in ((gradient(theta), None), (product, np.tile(along, (runs, 1)))):
        found = many.estimate(np.tile(theta, (runs, 1)), rng, direction)
        error = found.std(0) / np.sqrt(runs)
        assert np.abs(exact).max() > 8 * error.max()
        assert (np.abs(found.mean(0) - exact) < 5 * error + 1e-3).all()


def test_suboptimality_is_that_of_the_tabular_process_and_zero_for_its_optimal_policy() -> None:
    each = with_gaps(3, 2, 3, 2, numpy_generator(1, "processes"))
    processes = Processes(each, "softmax")
    theta = np.random.default_rng(0).normal(size=(3, processes.size))
    law = processes.probabilities(theta)
    wanted = [p.performance(p.optimal().policy) - p.performance(law[i]) for i, p in enumerate(each)]
    np.testing.assert_allclose(processes.suboptimality(theta), wanted, atol=1e-12)
    best = np.stack([40 * p.optimal().policy for p in each]).reshape(3, -1)
    np.testing.assert_allclose(processes.suboptimality(best), 0, atol=1e-12)
    with pytest.raises(ValueError, match="two actions"):
        Processes(each, "gaussian")
    with pytest.raises(ValueError, match="one shape"):
        Processes([each[0], Tabular(each[0].transitions, each[0].rewards, each[0].start, None, 3)], "softmax")


def test_an_exponent_is_read_off_a_power_law() -> None:
    n = np.array([10, 100, 1000])
    assert exponent(n, 3 * n**-0.4) == pytest.approx(2.5)
    assert exponent(n, np.array([1.0, 1.1, 1.2])) == 100.0


@pytest.mark.parametrize("key", ["policy-gradient", "n-pg-igt", "harpg"])
def test_every_method_comes_nearer_to_the_optimum(key: str) -> None:
    processes = Processes(with_gaps(32, 2, 2, 2, numpy_generator(2, "processes")), "softmax")
    first, last = course(processes, key, {"step_size": 0.5}, 2000, (0, 2000), numpy_generator(2, "draws")).mean(1)
    assert last < 0.6 * first


# -- the loop ----------------------------------------------------------------------------------------------------------------------------------------


def options(**changes: Any) -> dict[str, Any]:
    common = {"env": "CartPole-v1", "device": "cpu", "threads": 1, "hidden": [8], "num_envs": 3, "batch_episodes": 5, "checkpoint_every": 0}
    return common | {"total_episodes": 50, "eval_episodes": 2} | changes


def test_played_episodes_are_whole_and_each_is_counted_once() -> None:
    environments = make_environments("CartPole-v1", 3)
    policy = Policy(environments.observation_space, environments.action_space, Shape(hidden=(8,)))
    episodes, ended = collect(policy, Driver(environments, 0, "step", 0), 7, torch.Generator().manual_seed(1))
    lengths = episodes.mask.sum(1)
    assert len(ended) == len(episodes.mask) == 7
    assert sorted(lengths.tolist()) == sorted(episode.length for episode in ended)
    assert len(set(lengths.tolist())) > 2
    assert torch.equal(episodes.reward, episodes.mask.float())  # CartPole's reward is 1 a step
    assert torch.equal(episodes.mask, torch.arange(episodes.mask.shape[1]) < lengths[:, None])
    assert (episodes.observation[:, 0].abs() <= 0.05).all()  # where its episodes start
    assert not torch.equal(*episodes.observation[:2, 0])


@pytest.mark.parametrize("key", ["policy-gradient", "n-pg-igt", "harpg"])
def test_a_loaded_state_continues_bit_for_bit(key: str, tmp_path: Path) -> None:
    whole = program_of(key, options(), tmp_path / "whole")
    numbers = [whole.step(index) for index in range(whole.config.program_steps)]
    assert len(numbers) == (5 if key == "harpg" else 10)
    first = program_of(key, options(), tmp_path / "first")
    for index in range(3):
        first.step(index)
    state = copy.deepcopy(first.state())
    second = program_of(key, options(seed=9), tmp_path / "second")
    second.config = second.settings = first.config
    second.load(state)
    assert [second.step(index) for index in range(3, len(numbers))] == numbers[3:]
    assert all(torch.equal(a, b) for a, b in zip(second.policy.parameters(), whole.policy.parameters(), strict=True))


@pytest.mark.parametrize(
    ("key", "changes"), [("policy-gradient", {"step_size": 2.0}), ("n-pg-igt", {"step_size": 0.5}), ("harpg", {"step_size": 0.5})]
)
def test_a_tabular_policy_learns_by_the_loop(key: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """No hidden layer on numbered states is a softmax policy with a logit for each state and action."""
    process = random_mdp(3, 3, 1, horizon=3, discount=1.0)
    best, random = process.performance(process.optimal().policy), process.performance(process.uniform)
    settings = {"env": "telos/Random-v0", "env_options": ["states=3", "actions=3", "seed=1", "horizon=3"], "hidden": [], "gamma": 1.0}
    run = telos.train(key, **options(**settings, num_envs=16, batch_episodes=16, total_episodes=2400, **changes), out=str(tmp_path / "run"))
    logits = telos.load(run.path).outputs(np.eye(3, dtype=np.float32)).astype(np.float64)
    law = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert process.performance(law) > random + 0.6 * (best - random)


def test_a_baseline_of_the_others_needs_others_and_copies_need_episodes() -> None:
    with pytest.raises(UsageError, match="--baseline others needs --batch_episodes 2"):
        policy_gradient.Config(env="-", batch_episodes=1, num_envs=1)
    with pytest.raises(UsageError, match="--num_envs 4 copies"):
        policy_gradient.Config(env="-", batch_episodes=2, num_envs=4)
