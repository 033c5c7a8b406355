"""Methods that learn online and from offline data: HNPG's critic and step against exact values, and Hy-Q against DQN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import telos
from support import program_of, written_weights
from telos.algorithms.online import dqn, hnpg, hy_q
from telos.algorithms.run import train
from telos.core.errors import UsageError
from telos.environments.tabular import Tabular, garnet
from telos.functional.segments import Estimate, Segment

ENV = ["states=4", "actions=2", "branches=2", "seed=3"]
COMMON: dict[str, Any] = {
    "env": "telos/Garnet-v0",
    "env_options": ENV,
    "gamma": 0.8,
    "device": "cpu",
    "threads": 1,
    "checkpoint_every": 0,
    "seed": 1,
}


def process() -> Tabular:
    return garnet(4, 2, 2, 3, discount=0.8)


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Steps of random play from every state, in D4RL's layout."""
    draws, truth, n = np.random.default_rng(0), process(), 20000
    state, action = draws.integers(4, size=n), draws.integers(2, size=n)
    following = (draws.random(n)[:, None] >= truth.transitions[state, action].cumsum(-1)).sum(-1)
    never = np.zeros(n, bool)
    arrays = {"observations": state, "actions": action, "rewards": truth.rewards[state, action], "next_observations": following}
    np.savez(tmp_path / "data.npz", **arrays, terminals=never, timeouts=~never)  # type: ignore[arg-type]
    return str(tmp_path / "data.npz")


def hybrid(data: str, out: Path, **options: Any) -> Any:
    common = {"num_envs": 4, "rollout_steps": 50, "total_steps": 200, "data": data, "hidden": [], "batch_size": 2000}
    return program_of("hnpg", {**COMMON, **common, **options}, out)


def segment_of(state: np.ndarray, action: np.ndarray) -> Segment:
    one = torch.zeros(len(state), 1)
    never = one.bool()
    observation = torch.eye(4)[torch.from_numpy(state)][:, None]
    return Segment(observation, torch.from_numpy(action)[:, None], one, one, one, one, never, never)


def test_the_critic_of_offline_data_alone_is_the_policys_value(data: str, tmp_path: Path) -> None:
    program = hybrid(data, tmp_path / "run", online_weight=0.0, rounds=25, round_steps=15, critic_learning_rate=0.1)
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, -1.0], [0.5, 0.0]])
    with torch.no_grad():
        program.policy.body[0].weight.copy_(logits.T)
    state = np.zeros(10, dtype=np.int64)
    found = hnpg.fit(program.config, program.model, segment_of(state, state), torch.full((10, 1), 99.0), torch.Generator().manual_seed(0))
    values = program.model.action_values(torch.eye(4)).detach().numpy()
    assert values == pytest.approx(process().evaluate(logits.softmax(1).double().numpy()).action, abs=0.12)
    assert found["loss/offline"] < 1.5


def test_on_policy_returns_outweigh_the_data_where_they_are_given_weight(data: str, tmp_path: Path) -> None:
    """In state 0, action 1 the returns say 7; elsewhere there are none."""
    program = hybrid(data, tmp_path / "run", online_weight=1000.0, rounds=2, round_steps=60, critic_learning_rate=0.3)
    state, action = np.zeros(10, dtype=np.int64), np.ones(10, dtype=np.int64)
    hnpg.fit(program.config, program.model, segment_of(state, action), torch.full((10, 1), 7.0), torch.Generator().manual_seed(0))
    values = program.model.action_values(torch.eye(4)).detach().numpy()
    assert values[0, 1] == pytest.approx(7.0, abs=0.1)


def test_the_step_is_softmax_policy_iteration_in_the_states_of_both_data(data: str, tmp_path: Path) -> None:
    """For a policy with a parameter for each state and action the natural gradient is the advantage itself (Kakade 2001): log π′ − log π = η f̄ + const, with
    one η for all states, also for those that the policy has not met."""
    options = {"damping": 1e-8, "cg_iterations": 50, "max_kl": 1e-3, "batch_size": 500, "rounds": 1, "round_steps": 1}
    program = hybrid(data, tmp_path / "run", **options)
    with torch.no_grad():
        program.policy.body[0].weight.copy_(torch.tensor([[0.0, 0.3], [0.2, 0.0], [0.0, -0.5], [0.4, 0.0]]).T)
    before = program.policy.distribution(torch.eye(4)).log_probs.detach()
    state = np.array([0, 0, 1, 1, 1] * 20)  # states 2 and 3 are in the data alone
    segment = segment_of(state, state % 2)
    found = hnpg.update(program.config, program.model, segment, Estimate(torch.zeros(100, 1), torch.zeros(100, 1), {"iteration": 1.0}))
    assert found["policy/step"] == 1.0
    assert found["policy/kl"] == pytest.approx(1e-3, rel=0.05)
    moved = program.policy.distribution(torch.eye(4)).log_probs.detach() - before
    values = program.model.action_values(torch.eye(4)).detach()
    ratio = (moved[:, 0] - moved[:, 1]) / (values[:, 0] - values[:, 1])
    assert ratio.numpy() == pytest.approx(float(ratio[0]), rel=0.02)
    assert float(ratio[0]) > 0


def test_data_that_are_missing_or_of_another_shape_and_continuous_actions_are_refused(data: str, tmp_path: Path) -> None:
    for method in ("hnpg", "hy-q"):
        with pytest.raises(UsageError, match="--data is missing"):
            train(method, {**COMMON, "out": str(tmp_path / "run")})
        with pytest.raises(UsageError, match="observations of another shape"):
            train(method, {**COMMON, "env_options": ["states=5"], "data": data, "out": str(tmp_path / "run")})
    with pytest.raises(UsageError, match="discrete"):
        train("hnpg", {"env": "Pendulum-v1", "data": data, "out": str(tmp_path / "run")})


SHORT = {
    "num_envs": 2,
    "total_steps": 300,
    "iteration_steps": 100,
    "start_steps": 100,
    "random_steps": 100,
    "hidden": [8],
    "batch_size": 16,
}


def test_hy_q_without_weight_on_the_data_is_dqn(data: str, tmp_path: Path) -> None:
    weights = []
    for method, own in (("dqn", {}), ("hy-q", {"data": data, "offline_weight": 0.0}), ("hy-q", {"data": data})):
        run = train(method, {**COMMON, **SHORT, **own, "out": str(tmp_path / str(len(weights)))})
        weights.append({name: value for name, value in written_weights(run.path).items() if "policy.safetensors" in name})
    plain, none, half = weights
    assert plain.keys() == none.keys()
    assert all(torch.equal(plain[name], none[name]) for name in plain)
    assert not all(torch.equal(plain[name], half[name]) for name in plain)


def test_hy_qs_loss_is_the_weighted_mean_of_dqns_over_both_batches(data: str, tmp_path: Path) -> None:
    program = program_of("hy-q", {**COMMON, **SHORT, "data": data, "offline_weight": 0.3}, tmp_path / "run")
    agent, config = program.agent, program.config
    batch = agent.data.draw(6, torch.Generator().manual_seed(1))
    found = hy_q.loss(config, agent, batch, torch.Generator().manual_seed(2))
    other = agent.data.draw(6, torch.Generator().manual_seed(2))
    mean = float((found.values.mean() + found.extra[0].values.mean()).detach())
    exact = [float(dqn.loss(config, agent, one, torch.Generator()).values.mean().detach()) for one in (batch, other)]
    assert mean == pytest.approx(0.7 * exact[0] + 0.3 * exact[1], rel=1e-6)
    assert batch.discount.tolist() == pytest.approx([0.8] * 6)


def test_hy_q_reaches_the_optimum_from_the_data_alone(data: str, tmp_path: Path) -> None:
    options = {
        **SHORT,
        "data": data,
        "offline_weight": 1.0,
        "hidden": [],
        "learning_rate": 0.05,
        "lr_schedule": "linear",
        "target_every": 20,
    }
    options |= {"train_every": 2, "improvements": 10, "total_steps": 300, "batch_size": 128}
    run = train("hy-q", {**COMMON, **options, "out": str(tmp_path / "run")})
    assert telos.load(run.path).outputs(np.eye(4, dtype=np.float32)) == pytest.approx(process().optimal().action, abs=0.15)
