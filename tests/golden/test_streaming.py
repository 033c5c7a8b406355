"""Streaming methods: gradients against torch's, traces and bounded steps by hand, values against exact ones, and what is saved and continued."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch import nn

import telos
from support import numbers, program_of, written_weights
from telos.algorithms.online import stream_ac, stream_q
from telos.algorithms.online._loop_streaming import Agent, Sight, Step
from telos.algorithms.run import resume, train
from telos.core import discovery
from telos.core.errors import Failure, UsageError
from telos.core.loop import Interrupted
from telos.environments.tabular import chain
from telos.models.networks import Normaliser, perceptron
from telos.models.policies import Policy
from telos.models.streaming import Moments, RewardScale, Streamed, ValueFunction, sparse_

# A network that nothing holds back and nothing normalises: the classic streaming methods.
CLASSIC: dict[str, Any] = {"kappa": 0.0, "sparsity": 0.0, "layer_norm": False, "normalize_observations": False, "normalize_rewards": False}
SPACES = (Box(-5.0, 5.0, (3,), np.float32), Discrete(4))


def network_of(sizes: tuple[int, ...], norm: bool, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return perceptron(sizes, "leaky_relu", layer_norm="plain" if norm else False).double()


def linear(features: int, rate: float, kappa: float, decay: float = 0.0) -> tuple[nn.Linear, Streamed]:
    """Values that are linear in their inputs, with weights of zero."""
    layer = nn.Linear(features, 1).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    return layer, Streamed(nn.Sequential(layer), rate, kappa, decay)


# -- networks -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("sizes", [(5, 3), (5, 16, 3), (5, 16, 8, 3)])
def test_outputs_and_gradients_are_those_of_autograd(sizes: tuple[int, ...], norm: bool) -> None:
    network = network_of(sizes, norm)
    streamed = Streamed(network, 1.0, 2.0, 0.0)
    draws = np.random.default_rng(1)
    for _ in range(4):
        x, direction = draws.normal(size=5), draws.normal(size=3)
        network.zero_grad()
        out = network(torch.from_numpy(x)[None])[0]
        (out @ torch.from_numpy(direction)).backward()
        np.testing.assert_allclose(streamed(x), out.detach().numpy(), rtol=0, atol=1e-12)
        streamed(draws.normal(size=5), keep=False)  # a look in between changes nothing
        wanted = torch.cat([p.grad.reshape(-1) for p in network.parameters() if p.grad is not None]).numpy()
        np.testing.assert_allclose(streamed.back(direction), wanted, rtol=0, atol=1e-6)


def test_what_is_learned_is_what_torch_sees() -> None:
    network = network_of((3, 6, 1), norm=True)
    streamed = Streamed(network, 0.5, 0.0, 0.0)
    x = np.array([0.3, -1.0, 2.0])
    streamed(x)
    streamed.learn(streamed.back(np.ones(1)), 0.7)
    with torch.no_grad():
        np.testing.assert_allclose(streamed(x), network(torch.from_numpy(x)[None])[0].numpy(), atol=1e-12)


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.LayerNorm(4)])
def test_other_layers_are_refused(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match="LeakyReLU"):
        Streamed(nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 1)), 1.0, 2.0, 0.0)


@pytest.mark.parametrize(("inputs", "zeros"), [(100, 90), (17, 16), (4, 3), (1, 0)])
def test_initial_weights_are_sparse_within_their_bound_and_leave_no_unit_blind(inputs: int, zeros: int) -> None:
    layer = nn.Linear(inputs, 64)
    sparse_(nn.Sequential(layer), 0.9, np.random.default_rng(0))
    weight = layer.weight.detach().numpy()
    assert ((weight == 0).sum(1) == zeros).all()
    assert abs(weight).max() <= 1 / math.sqrt(inputs)
    assert abs(weight).max() > 0.8 / math.sqrt(inputs)
    assert (layer.bias == 0).all()
    assert len({tuple(row) for row in (weight == 0).tolist()}) > 1 or inputs == 1  # each unit has zeros of its own


def test_observations_are_in_the_units_that_the_normaliser_would_give_after_the_same_rows() -> None:
    draws = np.random.default_rng(2)
    rows = draws.normal(3.0, 5.0, size=(40, 3)).astype(np.float32)
    rows[:, 2] = 7.0  # never varies
    moments, normaliser, told = Moments(3), Normaliser(3), Normaliser(3)
    for row in rows:
        found = moments(row)
        normaliser.update(row[None])
        np.testing.assert_allclose(found, normaliser.of_array(row[None])[0], atol=1e-5)
    moments.tell(told)
    np.testing.assert_allclose(told.of_array(rows), normaliser.of_array(rows), atol=1e-6)


def test_rewards_are_divided_by_the_deviation_of_the_returns_so_far() -> None:
    rewards, ends = [1.0, -2.0, 3.0, 0.5, 4.0], [False, False, True, False, False]
    scale = RewardScale(0.9)
    returns: list[float] = []
    for i, (reward, ended) in enumerate(zip(rewards, ends, strict=True)):
        fresh = i == 0 or ends[i - 1]
        returns.append(reward + (0.0 if fresh else 0.9 * returns[-1]))
        deviation = np.std(returns, ddof=1) if i else 1.0
        assert scale(reward, ended) == pytest.approx(reward / deviation, rel=1e-6)


# -- traces and steps ---------------------------------------------------------------------------------------------------------------------------


def test_traces_and_bounded_steps_on_a_problem_of_two_steps_by_hand() -> None:
    """Values are linear in x with a bias; γλ = 0.5, α = 1, κ = 2.

    First step: x = (1, 0), δ = 3. z = (1, 0, 1), ‖z‖₁ = 2, the bound 1 / (2 · 3 · 2) = 1/12 < α: the weights become 3/12 · z = (0.25, 0, 0.25).
    Second: x = (0, -2), δ = -0.5. z = (0.5, -2, 1.5), ‖z‖₁ = 4, δ̄ = 1, the bound 1/8: they change by -1/16 · z = (-1/32, 1/8, -3/32).
    """
    layer, streamed = linear(2, rate=1.0, kappa=2.0, decay=0.5)
    streamed(np.array([1.0, 0.0]))
    assert streamed.learn(streamed.back(np.ones(1)), 3.0) == pytest.approx(1 / 12)
    np.testing.assert_allclose(streamed.weights, [0.25, 0, 0.25])
    streamed(np.array([0.0, -2.0]))
    assert streamed.learn(streamed.back(np.ones(1)), -0.5) == pytest.approx(1 / 8)
    np.testing.assert_allclose(streamed.trace, [0.5, -2.0, 1.5])
    np.testing.assert_allclose(streamed.weights, [0.25 - 1 / 32, 1 / 8, 0.25 - 3 / 32])
    assert layer.bias.item() == pytest.approx(0.25 - 3 / 32)
    streamed.forget()
    assert not streamed.trace.any()


def test_a_small_rate_is_used_whole() -> None:
    _, streamed = linear(2, rate=0.01, kappa=2.0)
    streamed(np.array([1.0, 0.0]))
    assert streamed.learn(streamed.back(np.ones(1)), 3.0) == 1.0
    np.testing.assert_allclose(streamed.weights, [0.03, 0, 0.03])


@pytest.mark.parametrize(("kappa", "overshoots"), [(2.0, False), (0.0, True)])
def test_a_bounded_step_never_carries_linear_values_beyond_their_target_where_plain_descent_does(kappa: float, overshoots: bool) -> None:
    """With entries of x within ±1 and κ >= 1 + γ the TD error of the sample that was learned keeps its sign, whatever the trace holds."""
    draws = np.random.default_rng(3)
    gamma, turned = 0.99, 0
    for _ in range(60):
        _, streamed = linear(4, rate=1.0, kappa=kappa, decay=0.8 * gamma)
        streamed.weights[...] = draws.normal(size=5)
        for _ in range(6):
            x, following, reward = draws.uniform(-1, 1, 4), draws.uniform(-1, 1, 4), draws.normal() * 5

            def error() -> float:
                return float(reward + gamma * streamed(following, keep=False)[0] - streamed(x)[0])  # noqa: B023

            before = error()
            streamed.learn(streamed.back(np.ones(1)), before)
            turned += error() * before < 0
    assert (turned > 0) == overshoots


def test_without_traces_and_bound_each_step_is_semi_gradient_td_of_one_step() -> None:
    """Against torch: θ ← θ − α/2 ∇ (r + γ V̄(s′) − V(s))², where V̄ has no gradient. With λ = 0 TD(λ), in every form, is this."""
    program = program_for("stream-td", total_steps=40, iteration_steps=40, trace_lambda=0.0, learning_rate=0.05, hidden=[8], **CLASSIC)
    network = program.model["value"].body
    rival = network_of((4, 8, 1), norm=False).float()
    rival.load_state_dict(network.state_dict())
    seen: list[Step] = []
    learn = program.method.update

    def noted(config: Any, agent: Agent, step: Step) -> dict[str, float]:
        seen.append(step)
        return learn(config, agent, step)

    object.__setattr__(program.method, "update", noted)
    try:
        program.step(0)
    finally:
        object.__setattr__(program.method, "update", learn)
    optimiser = torch.optim.SGD(rival.parameters(), lr=0.05)
    for step in seen:
        with torch.no_grad():
            target = step.reward + program.config.gamma * (not step.terminated) * rival(torch.from_numpy(step.next_x))
        optimiser.zero_grad()
        (0.5 * (target - rival(torch.from_numpy(step.x))) ** 2).sum().backward()
        optimiser.step()
    for mine, wanted in zip(network.parameters(), rival.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


# -- values of a chain --------------------------------------------------------------------------------------------------------------------------


def program_for(key: str, **options: Any) -> Any:
    """A program on a short chain whose episodes are cut after six steps."""
    import tempfile

    common = {"env": "telos/Chain-v0", "env_options": ["length=4", "slip=0.0", "small=1.0", "large=3.0", "max_episode_steps=6"]}
    return program_of(key, common | {"gamma": 0.8, "seed": 5} | options, Path(tempfile.mkdtemp()) / "run")


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_td_reaches_the_exact_values_of_a_policy_though_its_episodes_are_cut(decay: float) -> None:
    """Where all is deterministic there is no noise to average over. A cut that counted as an end would pull the values down."""
    settings = CLASSIC | {"hidden": [], "learning_rate": 0.2, "trace_lambda": decay, "deterministic": True}
    program = program_for("stream-td", total_steps=3000, iteration_steps=3000, **settings)
    program.step(0)
    process = chain(4, 0.0, 1.0, 3.0, discount=0.8)
    wanted = process.evaluate(np.eye(2)[np.zeros(4, dtype=int)]).state
    np.testing.assert_allclose(program.model["value"].predict(np.arange(4)), wanted, atol=1e-2)


def test_td_of_random_play_agrees_with_the_exact_values_on_average() -> None:
    """With a constant rate the weights go on trembling around the solution, and their mean over time is what must agree."""
    settings = CLASSIC | {"hidden": [], "learning_rate": 0.05, "env_options": ["length=2", "slip=0.1", "small=1.0", "large=3.0"]}
    program = program_for("stream-td", total_steps=4000, iteration_steps=100, trace_lambda=0.5, **settings)
    found = []
    for index in range(40):
        program.step(index)
        found.append(program.model["value"].predict(np.arange(2)))
    process = chain(2, 0.1, 1.0, 3.0, discount=0.8)
    wanted = process.evaluate(process.uniform).state
    np.testing.assert_allclose(np.mean(found[10:], 0), wanted, atol=0.3)
    assert wanted[1] - wanted[0] > 1


def test_q_finds_the_best_policy_of_a_chain_and_its_values() -> None:
    """Exact at α small; the greedy policy goes on to the end although each step back is paid at once."""
    options = {"env_options": ["length=4", "slip=0.0", "small=0.2", "large=3.0", "max_episode_steps=8"], "epsilon_end": 0.3}
    program = program_for(
        "stream-q", total_steps=6000, iteration_steps=6000, epsilon_steps=3000, hidden=[], learning_rate=0.2, **CLASSIC, **options
    )
    program.step(0)
    wanted = chain(4, 0.0, 0.2, 3.0, discount=0.8).optimal().action
    found = program.policy.outputs(np.eye(4, dtype=np.float32))
    np.testing.assert_allclose(found, wanted, atol=0.05 * wanted.max())


def test_a_step_too_large_diverges_without_the_bound_and_is_borne_with_it() -> None:
    options = {"hidden": [16], "total_steps": 300, "iteration_steps": 300, "learning_rate": 3.0}
    with pytest.raises(Failure, match=r"environment step \d+: the (network's outputs are not finite|error is)"):
        program_for("stream-td", **options, **CLASSIC).step(0)
    found = program_for("stream-td", **options, **CLASSIC | {"kappa": 2.0}).step(0)
    assert found["loss"] < 10


# -- methods ------------------------------------------------------------------------------------------------------------------------------------


def agent_of(method: Any, config: Any, actions: gymnasium.Space) -> Agent:
    torch.manual_seed(0)
    return method.build(config, SPACES[0], actions)


def test_traces_end_before_an_action_that_is_not_greedy() -> None:
    config = stream_q.Config(epsilon_start=1.0, epsilon_end=1.0)
    agent = agent_of(stream_q, config, SPACES[1])
    chance, x = np.random.default_rng(4), np.array([0.3, -0.2, 1.0], np.float32)
    greedy = int(agent.networks["values"](x).argmax())
    chosen = [stream_q.explore(config, agent, Sight(x[None], x), 0, chance) for _ in range(40)]
    assert {bool(one.cut) for one in chosen} == {True, False}
    assert all(one.cut == (one.action[0] != greedy) for one in chosen)
    assert all(one.action.shape == (1,) for one in chosen)


def test_exploration_falls_linearly_and_then_stays() -> None:
    config = stream_q.Config(epsilon_start=1.0, epsilon_end=0.0, epsilon_steps=100)
    agent = agent_of(stream_q, config, SPACES[1])
    x = np.ones(3, np.float32)
    for steps, share in ((0, 0.75), (50, 0.375), (100, 0.0), (500, 0.0)):  # of four actions one is the greedy one
        chance = np.random.default_rng(5)
        cuts = [stream_q.explore(config, agent, Sight(x[None], x), steps, chance).cut for _ in range(1500)]
        assert np.mean(cuts) == pytest.approx(share, abs=0.05)


def test_the_target_of_a_terminated_step_is_its_reward_and_that_of_another_has_the_largest_value_that_follows() -> None:
    config = stream_q.Config(gamma=0.9)
    x, following = np.array([0.1, 0.2, 0.3], np.float32), np.array([-1.0, 0.5, 2.0], np.float32)
    for terminated in (True, False):
        agent = agent_of(stream_q, config, SPACES[1])
        with torch.no_grad():
            now, then = (agent.policy.body(torch.from_numpy(row)[None])[0].numpy() for row in (x, following))
        agent.networks["values"](x)
        found = stream_q.update(config, agent, Step(x, np.array([2]), 1.5, following, terminated))
        error = 1.5 + (0.0 if terminated else 0.9 * then.max()) - now[2]
        assert found["loss"] == pytest.approx(error**2, rel=1e-4)


def test_the_actors_gradients_are_those_of_torchs_distributions() -> None:
    draws = np.random.default_rng(6)
    out, action = draws.normal(size=6), draws.normal(size=3)
    leaf = torch.from_numpy(out).requires_grad_()
    normal = torch.distributions.Normal(leaf[:3], nn.functional.softplus(leaf[3:]))
    choice_leaf = torch.from_numpy(out).requires_grad_()
    choice = torch.distributions.Categorical(logits=choice_leaf)
    for found, (where, logprob, entropy) in (
        (stream_ac.gaussian(out, action), (leaf, normal.log_prob(torch.from_numpy(action)).sum(), normal.entropy().sum())),
        (stream_ac.categorical(out, 4), (choice_leaf, choice.log_prob(torch.tensor(4)), choice.entropy())),
    ):
        np.testing.assert_allclose(found[0], torch.autograd.grad(logprob, where, retain_graph=True)[0].numpy(), atol=1e-10)
        np.testing.assert_allclose(found[1], torch.autograd.grad(entropy, where)[0].numpy(), atol=1e-10)
        assert found[2] == pytest.approx(entropy.item())


@pytest.mark.parametrize("actions", [Box(-1.0, 1.0, (2,), np.float32), Discrete(4)])
@pytest.mark.parametrize("reward", [2.0, -2.0])
def test_the_actor_moves_towards_what_was_better_than_expected_and_always_towards_entropy(actions: gymnasium.Space, reward: float) -> None:
    """The change of weights, against torch: step · (δ ∇log π + |δ| τ ∇H)."""
    config = stream_ac.Config(entropy_coef=0.5, kappa_policy=0.0, learning_rate=1e-3)
    agent = agent_of(stream_ac, config, actions)
    x = np.array([0.5, -1.0, 2.0], np.float32)
    action = np.array([[0.4, -0.9]], np.float32) if isinstance(actions, Box) else np.array([2])
    found = agent.policy.distribution_of(agent.policy.body(torch.from_numpy(x)[None]))
    parameters = list(agent.policy.body.parameters())
    before = agent.networks["policy"].weights.copy()
    grads = [
        torch.autograd.grad(v.sum(), parameters, retain_graph=True) for v in (found.log_prob(torch.from_numpy(action)), found.entropy())
    ]
    value = float(agent.networks["critic"](x, keep=False)[0])
    error = reward - value
    wanted = 1e-3 * torch.cat([(error * a + abs(error) * 0.5 * b).reshape(-1) for a, b in zip(*grads, strict=True)]).numpy()
    agent.networks["policy"](x)
    stream_ac.update(config, agent, Step(x, action, reward, x, True))
    np.testing.assert_allclose(agent.networks["policy"].weights - before, wanted, atol=2e-6)


def test_continuous_actions_have_the_policys_mean_and_deviation() -> None:
    config = stream_ac.Config()
    agent = agent_of(stream_ac, config, Box(-1.0, 1.0, (2,), np.float32))
    x, chance = np.array([0.5, -1.0, 2.0], np.float32), np.random.default_rng(7)
    drawn = np.concatenate([stream_ac.explore(config, agent, Sight(x[None], x), 0, chance).action for _ in range(4000)])
    with torch.no_grad():
        mean, before = agent.policy.body(torch.from_numpy(x)[None])[0].chunk(2)
    np.testing.assert_allclose(drawn.mean(0), mean.numpy(), atol=0.05)
    np.testing.assert_allclose(drawn.std(0), nn.functional.softplus(before).numpy(), atol=0.05)


def test_choices_are_drawn_with_the_policys_chances() -> None:
    config = stream_ac.Config(sparsity=0.0)
    agent = agent_of(stream_ac, config, Discrete(3))
    x, chance = np.array([0.5, -1.0, 2.0], np.float32), np.random.default_rng(8)
    drawn = [int(stream_ac.explore(config, agent, Sight(x[None], x), 0, chance).action[0]) for _ in range(4000)]
    with torch.no_grad():
        wanted = agent.policy.body(torch.from_numpy(x)[None])[0].softmax(0).numpy()
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 4000, wanted, atol=0.03)


# -- runs ---------------------------------------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "stream-q": {"env": "CartPole-v1", "epsilon_steps": 60},
    "stream-ac": {"env": "Pendulum-v1"},
    "stream-td": {"env": "CartPole-v1"},
}
SHORT: dict[str, Any] = {"total_steps": 240, "iteration_steps": 40, "hidden": [8, 8], "eval_episodes": 2, "eval_every": 2}


@pytest.mark.parametrize("key", list(RUNS))
def test_a_run_that_was_stopped_continues_bit_for_bit(key: str, tmp_path: Path) -> None:
    class Stop:
        def started(self, run: Any, program: Any, first: int, total: int) -> None: ...

        def stepped(self, step: int, metrics: Any) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)

        def ended(self, status: str) -> None: ...

    options = SHORT | RUNS[key]
    whole = train(key, options | {"out": str(tmp_path / "whole")})
    with pytest.raises(Interrupted):
        train(key, options | {"out": str(tmp_path / "stopped")}, callbacks=[Stop()])
    resumed = resume(tmp_path / "stopped")
    assert numbers(resumed) == numbers(whole)
    weights = [{name: tensor.tolist() for name, tensor in written_weights(run.path).items()} for run in (resumed, whole)]
    last = "checkpoints/step-00000006"
    assert any(name.startswith(last) for name in weights[0])
    for found in weights:
        for name in [name for name in found if name.startswith("checkpoints") and not name.startswith(last)]:
            del found[name]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("key", ["stream-q", "stream-ac"])
def test_the_saved_policy_reads_raw_observations_in_the_units_that_were_learned(key: str, tmp_path: Path) -> None:
    program = program_of(key, SHORT | RUNS[key], tmp_path / "run")
    for index in range(6):
        program.step(index)
    program.finish(program.run)
    policy = telos.load(program.run.path)
    assert isinstance(policy, Policy)
    name = "values" if key == "stream-q" else "policy"
    wanted = program.built.networks[name](program.sight.x)
    np.testing.assert_allclose(policy.outputs(program.sight.raw)[0], wanted, atol=1e-4)
    action, _ = policy.predict(program.sight.raw[0])
    assert np.allclose(action, policy.to_environment(np.array([wanted.argmax()]) if name == "values" else wanted[None, :1])[0], atol=1e-4)


def test_values_are_saved_in_the_environments_own_unit(tmp_path: Path) -> None:
    program = program_of("stream-td", SHORT | RUNS["stream-td"], tmp_path / "run")
    for index in range(6):
        program.step(index)
    program.finish(program.run)
    values = ValueFunction.load(tmp_path / "run" / "value")
    wanted = program.built.networks["values"](program.sight.x)[0] * program.scale.deviation
    assert values.predict(program.sight.raw[0]) == pytest.approx(wanted, rel=1e-4)
    assert values.predict(program.sight.raw).shape == (1,)
    (tmp_path / "run" / "value" / "value.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no whole value function"):
        ValueFunction.load(tmp_path / "run" / "value")


def test_the_policy_that_is_valued_is_the_one_that_was_given_and_stays_as_it_was(tmp_path: Path) -> None:
    train("stream-q", SHORT | RUNS["stream-q"] | {"out": str(tmp_path / "q")})
    run = train("stream-td", SHORT | RUNS["stream-td"] | {"policy": str(tmp_path / "q"), "out": str(tmp_path / "td")})
    weights = [
        {name.split(":")[1]: t.tolist() for name, t in written_weights(path).items()}
        for path in (tmp_path / "q/policy", run.path / "policy")
    ]
    assert weights[0] == weights[1]
    with pytest.raises(UsageError, match="the environment has"):
        train("stream-td", SHORT | {"env": "Acrobot-v1", "policy": str(tmp_path / "q"), "out": str(tmp_path / "other")})


def test_each_switch_can_be_thrown_alone() -> None:
    """With one stabiliser off the rest still learns: the numbers are finite and another network comes out."""
    found = {}
    for name, value in [("none", None), *CLASSIC.items(), ("gamma", 0.7)]:
        options = {} if value is None else {name: value, **({"learning_rate": 0.01} if name == "kappa" else {})}
        program = program_for("stream-q", **{"hidden": [8], "total_steps": 60, "iteration_steps": 60, **options})
        assert all(math.isfinite(number) for number in program.step(0).values())
        found[name] = program.built.networks["values"].weights.tobytes()
    assert len(set(found.values())) == len(found)


def test_what_cannot_be_streamed_is_refused() -> None:
    with pytest.raises(UsageError, match="on the CPU"):
        stream_q.Config(device="cuda")
    with pytest.raises(UsageError, match="Box and Discrete"):
        stream_ac.build(stream_ac.Config(), SPACES[0], MultiDiscrete([2, 3]))
    with pytest.raises(UsageError, match="discrete spaces"):
        stream_q.build(stream_q.Config(), SPACES[0], Box(-1.0, 1.0, (1,), np.float32))
    with pytest.raises(UsageError, match="pictures"):
        ValueFunction(Box(0, 255, (32, 32, 3), np.uint8), (4,), True, True)
    with pytest.raises(UsageError, match="--kappa -1"):
        stream_q.Config(kappa=-1.0)


def test_the_paper_is_found_by_its_name() -> None:
    assert discovery.find("stream-x").key == "stream-q"
