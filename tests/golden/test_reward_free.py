"""Reward-free exploration: the weighted regression against its formula, planning against exact planning, and errors that fall with the episodes."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import telos
from telos.algorithms.online import reward_free
from telos.algorithms.online._loop_tabular import Played, Seen
from telos.algorithms.run import resume, train
from telos.core.errors import UsageError
from telos.environments.linear_mixture import LinearMixture, linear_mixture, unit_rewards

ENV: dict[str, Any] = {"env": "telos/LinearMixture-v0", "env_options": ["states=4", "actions=2", "dimension=3", "horizon=6", "seed=2"]}
COMMON: dict[str, Any] = {"device": "cpu", "threads": 1, "checkpoint_every": 0, "eval_episodes": 1, "seed": 5}


def process_of(horizon: int = 6) -> LinearMixture:
    return linear_mixture(4, 2, 3, 2, horizon=horizon)


def seen_of(process: LinearMixture, tables: dict[str, np.ndarray] | None = None) -> Seen:
    assert process.horizon is not None
    s, a = process.states, process.actions
    ones = np.ones(process.horizon)
    return Seen(np.zeros((s, a, s + 1)), np.zeros((s, a)), np.zeros((process.horizon, s)), 0 * ones, ones, tables or {}, process.models)


# -- the process -----------------------------------------------------------------------------------------------------------------------------------


def test_a_mixtures_transitions_are_those_of_its_models_and_an_episode_makes_as_many_moves_whatever_its_length() -> None:
    short, long = process_of(8), process_of(800)
    for process in (short, long):
        by_hand = sum(process.weights[i] * process.models[i] for i in range(3))
        np.testing.assert_allclose(process.transitions, by_hand, atol=1e-12)
        np.testing.assert_allclose(process.models.sum(-1), 1)
    np.testing.assert_allclose((long.transitions - np.eye(4)[:, None]) * 100, short.transitions - np.eye(4)[:, None], atol=1e-9)
    with pytest.raises(UsageError, match="not the mixture of the models"):
        LinearMixture(short.transitions, short.rewards, short.start, None, 8, models=short.models, weights=short.weights[::-1])


def test_no_episode_earns_more_than_one() -> None:
    rewards = unit_rewards(50, 4, 2, 9, np.random.default_rng(0))
    assert rewards.min() == 0
    assert 0.5 < rewards.max() * 9 <= 1
    assert 0.2 < (rewards > 0).mean() < 0.45


# -- planning --------------------------------------------------------------------------------------------------------------------------------------


def test_planning_with_the_true_weights_is_exact_planning() -> None:
    process = process_of()
    rewards = unit_rewards(5, 4, 2, 6, np.random.default_rng(1))
    values, action = reward_free.plan_for(process.models, process.weights, rewards, 6)
    for c in range(5):
        exact = dataclasses.replace(process, rewards=rewards[c]).optimal()
        np.testing.assert_allclose(values[:, c], exact.state, atol=1e-12)
        np.testing.assert_allclose(action[:, c], exact.action, atol=1e-12)


def test_the_pseudo_value_of_a_policy_is_the_sum_of_its_uncertainties() -> None:
    """With widths so small that nothing is cut, backward recursion by loops gives what the plan reports, for the candidate with the largest."""
    process = process_of()
    config = reward_free.Config(env="-", beta=0.01, candidates=3, ridge=2.0)
    draws = np.random.default_rng(4)
    root = draws.normal(size=(3, 3))
    sigma = np.tile(root @ root.T + np.eye(3), (3, 1, 1))
    tables = {"sigma": sigma, "targets": np.einsum("mde,e->md", sigma, process.weights)}
    planned = reward_free.plan(config, seen_of(process, tables), np.random.default_rng(7))
    rewards = unit_rewards(3, 4, 2, 6, np.random.default_rng(7))
    found = []
    for c in range(3):
        value = dataclasses.replace(process, rewards=rewards[c]).optimal().state
        pseudo = np.zeros((7, 4))
        for h in reversed(range(6)):
            for s in range(4):
                options = []
                for a in range(2):
                    phi = np.array([process.models[i, s, a] @ value[h + 1] for i in range(3)])
                    options.append(0.01 * math.sqrt(phi @ np.linalg.solve(sigma[0], phi)) + process.transitions[s, a] @ pseudo[h + 1])
                pseudo[h, s] = max(options)
        found.append((float(pseudo[0].mean()), value))
    assert planned.metrics["plan/uncertainty"] == pytest.approx(max(f[0] for f in found))
    np.testing.assert_allclose(planned.tables["value"], max(found, key=lambda f: f[0])[1], atol=1e-9)


# -- regression ------------------------------------------------------------------------------------------------------------------------------------


def episode_of(process: LinearMixture, seed: int) -> Played:
    draws = np.random.default_rng(seed)
    states, actions = [0], []
    for _ in range(6):
        actions.append(int(draws.integers(2)))
        states.append(int(draws.choice(4, p=process.transitions[states[-1], actions[-1]])))
    return Played(np.array(states), np.array(actions), np.zeros(6))


def test_without_weights_the_estimate_is_ridge_regression_on_all_steps() -> None:
    process = process_of()
    config = reward_free.Config(env="-", weighting="none", ridge=0.7)
    value = np.random.default_rng(0).random((7, 4))
    tables: dict[str, np.ndarray] = {"sigma": 0.7 * np.eye(3)[None], "targets": np.zeros((1, 3)), "value": value}
    rows, reached = [], []
    for k in range(4):
        played = episode_of(process, k)
        tables = {**tables, **reward_free.update(config, seen_of(process, tables), played)}
        for h in range(6):
            rows.append(process.models[:, played.states[h], played.actions[h]] @ value[h + 1])
            reached.append(value[h + 1, played.states[h + 1]])
    x, y = np.vstack([*rows, np.sqrt(0.7) * np.eye(3)]), np.append(reached, np.zeros(3))
    np.testing.assert_allclose(reward_free.estimate(tables)[0], np.linalg.lstsq(x, y, rcond=None)[0], atol=1e-10)


def test_weights_are_the_variances_and_uncertainties_of_the_moments() -> None:
    """Two moments, by loops: the first is weighted by variance and uncertainty, the highest by 1 and its own norm."""
    process = process_of()
    config = reward_free.Config(env="-", moments=2, beta=0.2, episodes=10)
    value = np.random.default_rng(3).random((7, 4))
    draws = np.random.default_rng(8)
    root = draws.normal(size=(2, 3, 3))
    sigma = 30 * (root @ root.transpose(0, 2, 1)) + 20 * np.eye(3)
    theta = np.stack([process.weights, process.weights * 1.1])
    tables = {"sigma": sigma, "targets": np.einsum("mde,me->md", sigma, theta), "value": value}
    played = episode_of(process, 1)
    expected_sigma, expected_targets = sigma.copy(), tables["targets"].copy()
    for h in range(6):
        s, a, after = played.states[h], played.actions[h], played.states[h + 1]
        phi = [process.models[:, s, a] @ value[h + 1] ** power for power in (1, 2)]
        before = [0.2 * math.sqrt(phi[m] @ np.linalg.solve(sigma[m], phi[m])) for m in range(2)]
        variance = min(max(theta[1] @ phi[1], 0), 1) - min(max(theta[0] @ phi[0], 0), 1) ** 2 + min(1, 2 * before[0]) + min(1, before[1])
        noise = [variance, 1.0]
        for m in range(2):
            now = math.sqrt(phi[m] @ np.linalg.solve(expected_sigma[m], phi[m])) / math.sqrt(3)
            square = max(noise[m], now, 1 / 60)
            expected_sigma[m] += np.outer(phi[m], phi[m]) / square
            expected_targets[m] += phi[m] * value[h + 1, after] ** (m + 1) / square
    found = reward_free.update(config, seen_of(process, tables), played)
    np.testing.assert_allclose(found["sigma"], expected_sigma, rtol=1e-10)
    np.testing.assert_allclose(found["targets"], expected_targets, rtol=1e-10)
    assert not np.shares_memory(found["sigma"], sigma)


# -- runs ------------------------------------------------------------------------------------------------------------------------------------------


def errors(out: Path, **options: Any) -> tuple[float, float]:
    """(mean absolute error of planned values, summed error of the weights) after a run."""
    run = telos.train("reward-free", **ENV, **{**COMMON, "out": str(out), **options})
    theta = reward_free.estimate(load_file(run.path / "policy" / "by_step.safetensors"))[0]
    process = process_of()
    rewards = unit_rewards(30, 4, 2, 6, np.random.default_rng(0))
    values, _ = reward_free.plan_for(process.models, theta, rewards, 6)
    exact = [float(dataclasses.replace(process, rewards=r).optimal().state[0, 0]) for r in rewards]
    return float(np.abs(values[0, :, 0] - exact).mean()), float(np.abs(theta - process.weights).sum())


def test_more_exploration_means_better_planning_for_rewards_that_were_never_seen(tmp_path: Path) -> None:
    few, many = errors(tmp_path / "few", episodes=5), errors(tmp_path / "many", episodes=400, batch_episodes=8)
    assert many[0] < few[0] / 3
    assert many[0] < 0.01
    assert many[1] < few[1]


def test_a_killed_exploration_continues_bit_for_bit(tmp_path: Path) -> None:
    class Stop:
        def started(self, run: Any, program: Any, first: int, total: int) -> None: ...

        def stepped(self, step: int, metrics: Any) -> None:
            if step == 5:
                raise KeyboardInterrupt

        def ended(self, status: str) -> None: ...

    options: dict[str, Any] = {**ENV, **COMMON, "episodes": 20, "batch_episodes": 2, "checkpoint_every": 2}
    whole = telos.train("reward-free", **options, out=str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train("reward-free", {**options, "out": str(tmp_path / "cut")}, callbacks=[Stop()])
    cut = resume(tmp_path / "cut")
    tables = [load_file(run.path / "policy" / "by_step.safetensors") for run in (whole, cut)]
    assert tables[0].keys() >= {"sigma", "targets", "policy"}
    assert all(np.array_equal(tables[0][name], tables[1][name]) for name in tables[0])


def test_a_process_whose_models_are_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs the models of a linear mixture"):
        telos.train("reward-free", env="telos/RiverSwim-v0", env_options=["horizon=4"], **COMMON, out=str(tmp_path / "run"))
    with pytest.raises(UsageError, match="--moments has no effect with --weighting none"):
        telos.train("reward-free", **ENV, weighting="none", moments=2, **COMMON, out=str(tmp_path / "other"))
