"""Methods of control reach what is known exactly: optimal values and returns of small processes, frequencies of data, fixed points of offline learning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from scipy.optimize import brentq
from torch import Tensor, nn

import telos
from telos.algorithms.actor_critic import Agent, Improver
from telos.algorithms.offline import iql, xql
from telos.data.minari_folders import write_minari
from telos.data.steps import Steps
from telos.data.transitions import Transitions
from telos.dataflow import make_backend
from telos.environments.tabular import Tabular, garnet, lock
from telos.models.policies import Policy, Shape

COMMON: dict[str, Any] = {"device": "cpu", "threads": 1, "checkpoint_every": 0, "eval_episodes": 1, "hidden": [], "num_envs": 8, "seed": 1}


def rows(process: Tabular) -> np.ndarray:
    return np.eye(process.states, dtype=np.float32)


# -- action values ----------------------------------------------------------------------------------------------------------------------------------


def dqn_values(out: Path, env: str, options: list[str], states: int, **changes: Any) -> np.ndarray:
    """[S, A] of linear values of one-hot states, learned from random play."""
    settings = {
        "total_steps": 2400,
        "iteration_steps": 800,
        "random_steps": 2400,
        "start_steps": 400,
        "train_every": 8,
        "improvements": 4,
        "learning_rate": 0.1,
        "lr_schedule": "linear",
        "target_every": 30,
        "batch_size": 64,
    }
    run = telos.train("dqn", env=env, env_options=options, out=str(out), **COMMON, **(settings | changes))
    return telos.load(run.path).outputs(np.eye(states, dtype=np.float32))


@pytest.mark.parametrize("changes", [{}, {"double": False, "prioritized": 0.6}])
def test_dqn_reaches_the_optimal_values_of_a_discounted_process(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Certain moves, and episodes that are cut every seven steps: a value that was lost at a cut would be missed by far more than 0.02."""
    exact = garnet(5, 2, 1, 3, discount=0.8).optimal().action
    found = dqn_values(
        tmp_path / "run",
        "telos/Garnet-v0",
        ["states=5", "actions=2", "branches=1", "seed=3", "max_episode_steps=7"],
        5,
        gamma=0.8,
        **changes,
    )
    np.testing.assert_allclose(found, exact, atol=0.02)
    assert np.ptp(exact) > 1


def test_dqn_reaches_the_optimal_values_where_episodes_terminate(tmp_path: Path) -> None:
    """A lock of three positions: the right actions are worth 0.81, 0.9 and 1, a lure 0.1 and nothing afterwards."""
    process = lock(3, 2, 4, discount=0.9)
    optimum = process.optimal().action  # [H, S, A]
    exact = np.concatenate([optimum[h, 3 * h : 3 * h + 3] for h in range(3)])
    assert sorted({round(x, 6) for x in exact.reshape(-1)}) == [0.0, 0.1, 0.81, 0.9, 1.0]
    found = dqn_values(tmp_path / "run", "telos/Lock-v0", ["length=3", "actions=2", "seed=4", "discount=0.9"], process.states, gamma=0.9)
    reached = [0, 1, 3, 4, 5, 6, 7, 8]  # no episode starts in the bad state of the first position
    np.testing.assert_allclose(found[reached], exact[reached], atol=0.02)


# -- returns ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("ppo", {"total_steps": 8192, "rollout_steps": 64, "minibatch_size": 128, "epochs": 5, "learning_rate": 0.03}),
        ("a2c", {"total_steps": 16_000, "rollout_steps": 10, "gae_lambda": 0.95, "learning_rate": 0.1}),
        ("trpo", {"total_steps": 8192, "rollout_steps": 64, "minibatch_size": 256, "epochs": 5, "learning_rate": 0.1, "max_kl": 0.05}),
    ],
)
def test_policies_earn_nearly_the_optimal_return(tmp_path: Path, key: str, options: dict[str, Any]) -> None:
    """Expected discounted returns, computed exactly for the policy's own probabilities: at least 95 % of the optimum, of which random play has little."""
    process = garnet(6, 3, 2, 5, discount=0.9)
    best, random = process.performance(process.optimal().policy), process.performance(process.uniform)
    assert random < 0.5 * best
    env_options = ["states=6", "actions=3", "branches=2", "seed=5", "max_episode_steps=30"]
    run = telos.train(key, env="telos/Garnet-v0", env_options=env_options, gamma=0.9, out=str(tmp_path / "run"), **(COMMON | options))
    policy = telos.load(run.path)
    logits = policy.outputs(rows(process)).astype(np.float64)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    assert process.performance(probabilities) >= 0.95 * best


# -- data -------------------------------------------------------------------------------------------------------------------------------------------


def test_cloned_probabilities_are_the_frequencies_of_the_data(tmp_path: Path) -> None:
    counts = np.array([[40, 10, 50], [5, 90, 5], [30, 30, 40], [98, 1, 1]])
    state, action = (x.reshape(-1) for x in np.indices(counts.shape))
    states, actions = np.repeat(state, counts.reshape(-1)), np.repeat(action, counts.reshape(-1))
    order = np.random.default_rng(0).permutation(len(states))
    states, actions = states[order], actions[order]
    ended = np.arange(len(states)) == len(states) - 1
    following = np.append(states[1:], 0)
    steps = Steps.of(
        states,
        actions,
        np.zeros(len(states)),
        following,
        np.zeros(len(states), bool),
        ended,
        observation_space=Discrete(4),
        action_space=Discrete(3),
    )
    folder = write_minari(tmp_path / "data", steps)
    options = {name: value for name, value in COMMON.items() if name != "num_envs"}
    run = telos.train(
        "bc", data=str(folder), out=str(tmp_path / "run"), updates=1500, iteration_updates=500, batch_size=400, learning_rate=0.03,
        lr_schedule="linear", **options,
    )  # fmt: skip
    logits = telos.load(run.path).outputs(np.eye(4, dtype=np.float32))
    found = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found, counts / counts.sum(1, keepdims=True), atol=0.01)


class TableCritic(nn.Module):
    """Two independent tables of values [2, S, 3] of the actions −1, 0 and 1."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, states, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.table[:, observation.argmax(1), (action[:, 0].round() + 1).long()]


class TableValue(nn.Module):
    """Values [S]."""

    def __init__(self, states: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(states, generator=torch.Generator().manual_seed(1)))

    def forward(self, observation: Tensor) -> Tensor:
        return self.table[observation.argmax(1)]


def dataset(states: int = 4, count: int = 90) -> dict[str, np.ndarray]:
    """Random steps in which every action occurs in every state, some of them terminations."""
    draws = np.random.default_rng(7)
    every = np.stack(np.meshgrid(np.arange(states), np.arange(3), indexing="ij"), -1).reshape(-1, 2)
    pairs = np.concatenate([every, np.stack([draws.integers(0, states, count), draws.choice(3, count, p=[0.6, 0.3, 0.1])], 1)])
    n = len(pairs)
    terminated = draws.random(n) < 0.15
    return {
        "state": pairs[:, 0],
        "action": pairs[:, 1],
        "reward": draws.normal(pairs[:, 1] - 1, 0.5, n),
        "following": draws.integers(0, states, n),
        "discount": np.where(terminated, 0.0, 0.8),
    }


def fixed_point(data: dict[str, np.ndarray], summary: Callable[[np.ndarray], float], states: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """(Q [S, 3], V [S]): Q the mean of r + γ V(s′) over the data's steps, V the summary of Q over the data's actions. By repetition."""
    value, q = np.zeros(states), np.zeros((states, 3))
    for _ in range(120):
        target = data["reward"] + data["discount"] * value[data["following"]]
        for s in range(states):
            for a in range(3):
                q[s, a] = target[(data["state"] == s) & (data["action"] == a)].mean()
        value = np.array([summary(q[s, data["action"][data["state"] == s]]) for s in range(states)])
    return q, value


def expectile_of(share: float) -> Callable[[np.ndarray], float]:
    def found(q: np.ndarray) -> float:
        def slope(m: float) -> float:
            return float((np.where(q < m, 1 - share, share) * (q - m)).sum())

        return q[0] if np.ptp(q) < 1e-12 else brentq(slope, q.min() - 1e-9, q.max() + 1e-9)  # type: ignore[return-value]

    return found


def soft_maximum_of(beta: float) -> Callable[[np.ndarray], float]:
    return lambda q: float(beta * (np.log(np.mean(np.exp((q - q.max()) / beta))) + q.max() / beta))


@pytest.mark.parametrize(
    ("method", "options", "summary"),
    [
        (iql, {"expectile": 0.5}, expectile_of(0.5)),
        (iql, {"expectile": 0.9}, expectile_of(0.9)),
        (xql, {"beta": 1.0}, soft_maximum_of(1.0)),
        (xql, {"beta": 3.0}, soft_maximum_of(3.0)),
    ],
)
def test_values_from_data_are_the_fixed_point(method: Any, options: dict[str, float], summary: Callable[[np.ndarray], float]) -> None:
    data = dataset()
    q, value = fixed_point(data, summary)
    improvements = 1200
    config = method.Config(hidden=(), learning_rate=0.06, lr_schedule="linear", tau=0.2, normalize_observations=False, **options)
    policy = Policy(Discrete(4), Box(-1.0, 1.0, (1,), np.float32), Shape("stochastic", ()))
    agent = Agent(policy, {"critic": TableCritic(4), "value": TableValue(4)}, targets=("critic",))
    improver = Improver(method.METHOD, config, agent, improvements, make_backend("inline"))
    eye = torch.eye(4)
    batch = Transitions(
        observation=eye[data["state"]],
        action=torch.from_numpy(data["action"] - 1.0).float()[:, None],
        reward=torch.from_numpy(data["reward"]).float(),
        next_observation=eye[data["following"]],
        discount=torch.from_numpy(data["discount"]).float(),
        weight=torch.ones(len(data["state"])),
        index=torch.arange(len(data["state"])),
        batch_size=[len(data["state"])],
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(improvements):
        improver.improve(batch, generator, told=False)
    np.testing.assert_allclose(agent["value"].table.detach().numpy(), value, atol=0.01)
    for member in agent["critic"].table.detach().numpy():
        np.testing.assert_allclose(member, q, atol=0.01)
