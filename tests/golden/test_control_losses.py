"""Losses of control and their gradients, against the papers' formulae computed anew; what is bootstrapped from; what a trust region guarantees."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from scipy.optimize import minimize_scalar
from torch import Tensor, distributions, nn
from torch.nn.functional import mse_loss, smooth_l1_loss

from support import World, program_of
from telos.algorithms.actor_critic import Agent, Improver
from telos.algorithms.learning import Learner
from telos.algorithms.offline import awac, bc, cql, iql, td3_bc, xql
from telos.algorithms.offline._loop_offline import Table, shape_of
from telos.algorithms.online import a2c, ddpg, dqn, ppo, sac, td3, trpo
from telos.algorithms.online._loop_on_policy import ActorCritic
from telos.core import discovery
from telos.core.config import options_of
from telos.data.steps import Steps
from telos.data.transitions import Transitions
from telos.dataflow import make_backend
from telos.functional.distributions import Categorical, Distribution, Gaussian
from telos.functional.natural import conjugate_gradient, line_search
from telos.functional.reduction import Denominators, Losses, total
from telos.functional.segments import Estimate, Segment, StepView
from telos.functional.values import expectile, gumbel
from telos.models.policies import Policy, Shape

SEES, MOVES, CHOOSES = Box(-5.0, 5.0, (3,), np.float32), Box(-1.0, 1.0, (2,), np.float32), Discrete(4)
ROWS = 12


def close(one: Any, two: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(two), rtol=tolerance, atol=tolerance, check_dtype=False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_of(losses: Losses, rows: int = ROWS) -> Tensor:
    return total(losses, Denominators(rows, rows))


def gradient(loss: Tensor, of: Any) -> Tensor:
    parameters = list(of.parameters()) if isinstance(of, nn.Module) else list(of)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, found)])


def agree(losses: Losses, expected: Tensor, of: Any) -> None:
    """The same loss and the same gradient, which is not zero."""
    ours = mean_of(losses)
    close(ours, expected)
    close(gradient(ours, of), gradient(expected, of))
    assert gradient(expected, of).abs().max() > 1e-3


def batch_of(discrete: bool = False, seed: int = 1, weight: Tensor | None = None) -> Transitions:
    """Rows whose fourth terminated and whose others go on, with γ of one to three steps."""
    discount = 0.9 ** (1 + torch.arange(ROWS) % 3).float()
    discount[3] = 0
    action = torch.arange(ROWS) % 4 if discrete else torch.tanh(drawn(ROWS, 2, seed=seed + 1))
    return Transitions(
        observation=drawn(ROWS, 3, seed=seed + 2),
        action=action,
        reward=drawn(ROWS, seed=seed + 3),
        next_observation=drawn(ROWS, 3, seed=seed + 4),
        discount=discount,
        weight=torch.ones(ROWS) if weight is None else weight,
        index=torch.arange(ROWS),
        batch_size=[ROWS],
    )


def agent_of(method: Any, actions: Any, **options: Any) -> tuple[Any, Agent]:
    """An agent of small networks whose slow copies differ from them."""
    config = method.Config(hidden=(8,), **options)
    torch.manual_seed(0)
    agent = method.METHOD.build(config, SEES, actions)
    with torch.no_grad():
        for i, parameter in enumerate(agent.targets.parameters()):
            parameter.add_(0.3 * drawn(*parameter.shape, seed=50 + i))
        for parameter in agent.parameters():
            parameter.mul_(1.5)
    return config, agent


def generator(seed: int = 9) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- PPO, A2C ---------------------------------------------------------------------------------------------------------------------------------------


def leaves(seed: int = 0, continuous: bool = False) -> dict[str, Tensor]:
    """What the networks of actor and critic gave, as leaves with a gradient."""
    found = {"outputs": drawn(ROWS, 2 if continuous else 4, seed=seed), "value": drawn(ROWS, seed=seed + 1)}
    if continuous:
        found["log_std"] = torch.tensor([-0.3, 0.2])
    return {name: value.requires_grad_() for name, value in found.items()}


def view_of(now: dict[str, Tensor], continuous: bool = False) -> StepView:
    spread = 0.5
    outputs = now["outputs"].detach() + spread * drawn(*now["outputs"].shape, seed=5)
    action = drawn(ROWS, 2, seed=6) if continuous else torch.arange(ROWS) % 4

    def of(out: Tensor, log_std: Tensor | None) -> Distribution:
        return Categorical(out) if log_std is None else Gaussian(out, log_std)

    distribution = of(now["outputs"], now.get("log_std"))
    old = of(outputs, None if "log_std" not in now else now["log_std"].detach() + 0.1)
    old_value = now["value"].detach() + drawn(ROWS, seed=7) * 0.5
    return StepView(
        distribution,
        distribution.log_prob(action),
        now["value"],
        action,
        old,
        old.log_prob(action),
        old_value,
        drawn(ROWS, seed=8),
        drawn(ROWS, seed=10),
    )


def reference_of(now: dict[str, Tensor]) -> distributions.Distribution:
    if "log_std" in now:
        return distributions.Independent(distributions.Normal(now["outputs"], now["log_std"].exp().expand(ROWS, 2)), 1)
    return distributions.Categorical(logits=now["outputs"])


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("normalize", ["minibatch", "iteration", "none"])
@pytest.mark.parametrize("options", [{}, {"clip_range_vf": 0.2}, {"entropy_coef": 0.05, "value_coef": 1.0, "clip_range": 0.3}])
def test_ppo_is_the_clipped_surrogate_with_squared_values_and_entropy(continuous: bool, normalize: Any, options: dict[str, Any]) -> None:
    config = ppo.Config(normalize_advantage=normalize, **options)
    now = leaves(continuous=continuous)
    view = view_of(now, continuous)
    theirs = reference_of(now)
    advantage = view.advantage
    if normalize == "minibatch":
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = torch.exp(theirs.log_prob(view.action) - view.old_logprob)
    clipped = ratio.clamp(1 - config.clip_range, 1 + config.clip_range)
    value = now["value"]
    if config.clip_range_vf:
        value = view.old_value + torch.clamp(value - view.old_value, -config.clip_range_vf, config.clip_range_vf)
    expected = (
        -torch.min(advantage * ratio, advantage * clipped).mean()
        + config.value_coef * mse_loss(view.returns, value)
        - config.entropy_coef * theirs.entropy().mean()
    )
    found = ppo.loss(config, view)
    agree(found, expected, now.values())
    bound = ((ratio < 1 - config.clip_range) & (advantage < 0)) | ((ratio > 1 + config.clip_range) & (advantage > 0))
    assert 0 < bound.sum() < ROWS
    close(found.metrics["clip_ratio"], bound.float())
    close(found.metrics["policy/approx_kl"], (ratio - 1 - ratio.log()).detach())


def segment_of(seed: int = 0) -> Segment:
    shape = (6, 3)
    reward, value, following = drawn(3, *shape, seed=seed).unbind(0)
    terminated = torch.zeros(shape, dtype=torch.bool)
    terminated[2, 0] = terminated[5, 1] = True
    truncated = torch.zeros(shape, dtype=torch.bool)
    truncated[3, 2] = True
    following = torch.where(terminated, 0.0, following)
    return Segment(drawn(*shape, 3), torch.zeros(shape, dtype=torch.int64), drawn(*shape), reward, value, following, terminated, truncated)


def advantages_of(segment: Segment, gamma: float, lam: float) -> np.ndarray:
    found, running = np.zeros((6, 3)), np.zeros(3)
    for t in reversed(range(6)):
        running = np.where((segment.terminated | segment.truncated)[t].numpy(), 0, running)
        delta = segment.reward[t] + gamma * segment.next_value[t] - segment.value[t]
        running = delta.numpy() + gamma * lam * running
        found[t] = running
    return found


@pytest.mark.parametrize(
    ("method", "options", "standardised"),
    [
        (ppo, {"normalize_advantage": "iteration"}, True),
        (ppo, {"normalize_advantage": "minibatch"}, False),
        (ppo, {"normalize_advantage": "none"}, False),
        (a2c, {}, False),
        (a2c, {"normalize_advantage": True}, True),
        (trpo, {}, True),
        (trpo, {"normalize_advantage": False}, False),
    ],
)
def test_estimates_are_gae_standardised_where_the_options_say(method: Any, options: dict[str, Any], standardised: bool) -> None:
    config, segment = method.Config(gamma=0.9, gae_lambda=0.8, **options), segment_of()
    plain = advantages_of(segment, 0.9, 0.8)
    found = method.estimate(config, segment, {"kept": 1.0})
    close(found.returns, torch.from_numpy(plain) + segment.value)
    close(found.advantages, torch.from_numpy((plain - plain.mean()) / (plain.std(ddof=1) + 1e-8) if standardised else plain))
    assert found.state == {"kept": 1.0}


@pytest.mark.parametrize("continuous", [False, True])
def test_a2c_is_the_policy_gradient_with_squared_values_and_entropy(continuous: bool) -> None:
    config = a2c.Config(entropy_coef=0.02, value_coef=0.4)
    now = leaves(1, continuous)
    view = view_of(now, continuous)
    theirs = reference_of(now)
    expected = (
        -(view.advantage * theirs.log_prob(view.action)).mean()
        + 0.4 * mse_loss(now["value"], view.returns)
        - 0.02 * theirs.entropy().mean()
    )
    agree(a2c.loss(config, view), expected, now.values())


def test_a2cs_gradient_by_hand() -> None:
    """Two actions of equal probability, advantage 2 of the first: −2 (1 − ½, −½) on the logits, and 2 · ½ (V − R) on the value."""
    now = {"outputs": torch.zeros(1, 2, requires_grad=True), "value": torch.tensor([3.0], requires_grad=True)}
    found = Categorical(now["outputs"])
    action = torch.tensor([0])
    view = StepView(
        found,
        found.log_prob(action),
        now["value"],
        action,
        found.fixed(),
        torch.zeros(1),
        torch.zeros(1),
        torch.tensor([2.0]),
        torch.tensor([1.0]),
    )
    loss = mean_of(a2c.loss(a2c.Config(), view), 1)
    assert float(loss.detach()) == pytest.approx(2 * math.log(2) + 0.5 * 4)
    assert gradient(loss, now.values()).tolist() == pytest.approx([-1.0, 1.0, 2.0])


def test_the_first_ratio_of_an_iteration_is_one(world: World, tmp_path: Path) -> None:
    """With a learning rate of zero no pass may see a policy other than the one that acted; also where observations are normalised by running statistics."""
    for i, normalise in enumerate((False, True)):
        options = world.options(discovery.load("ppo"), learning_rate=0.0, normalize_observations=normalise)
        program = program_of("ppo", options, tmp_path / f"{i}")
        for index in range(2):
            found = program.step(index)
            assert found["policy/approx_kl"] < 1e-9, normalise
            assert found["clip_ratio"] == 0


# -- TRPO -------------------------------------------------------------------------------------------------------------------------------------------


def trust(continuous: bool, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[ActorCritic, Segment, Estimate]:
    torch.manual_seed(seed)
    space = Box(-1.0, 1.0, (2,), np.float32) if continuous else Discrete(3)
    policy = Policy(SEES, space, Shape("stochastic", (4,), orthogonal=False, log_std_init=-0.4))
    agent = ActorCritic(policy, (4,), "tanh").to(dtype)
    observation = drawn(10, 3, 3, seed=1).to(dtype)
    action = drawn(10, 3, 2, seed=2).to(dtype) if continuous else torch.arange(30).view(10, 3) % 3
    empty = torch.zeros(10, 3, dtype=dtype)
    segment = Segment(observation, action, empty, empty, empty, empty, empty.bool(), empty.bool())
    return agent, segment, Estimate(drawn(10, 3, seed=3).to(dtype), empty)


def weights(policy: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in policy.parameters()])


def fisher(policy: Policy, observation: Tensor) -> Tensor:
    """E_s E_a [∇ log π ∇ log πᵀ], from the scores of every action, or from the Jacobian of mean and deviation."""
    parameters = list(policy.parameters())
    size = sum(p.numel() for p in parameters)
    found = torch.zeros(size, size, dtype=observation.dtype)
    for one in observation:
        out = policy(one[None])[0]
        if isinstance(policy.action_space, Discrete):
            logs = torch.log_softmax(out, -1)
            for i in range(3):
                score = gradient(logs[i], parameters)
                found += logs[i].exp().detach() * torch.outer(score, score)
        else:
            precision = torch.exp(-2 * policy.log_std.detach())
            for i in range(2):
                score = gradient(out[i], parameters)
                found += precision[i] * torch.outer(score, score)
                score = gradient(policy.log_std[i], parameters)
                found += 2 * torch.outer(score, score)
    return found / len(observation)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("damping", [0.1, 1e-3])
def test_trpos_step_solves_the_explicit_fisher_matrix(continuous: bool, damping: float) -> None:
    agent, segment, estimate = trust(continuous)
    policy, observation = agent.policy, segment.observation.flatten(0, 1)
    delta = 1e-5
    config = trpo.Config(max_kl=delta, damping=damping, cg_iterations=200)
    logprob = policy.distribution(observation).log_prob(segment.action.flatten(0, 1))
    slope = gradient((logprob * estimate.advantages.flatten()).mean(), policy)  # the ratio's slope where it is 1
    matrix = fisher(policy, observation) + damping * torch.eye(len(slope), dtype=slope.dtype)
    direction = torch.linalg.solve(matrix, slope)
    expected = math.sqrt(2 * delta / float(direction @ matrix @ direction)) * direction
    before = weights(policy)
    found = trpo.update(config, agent, segment, estimate)
    # The third order of the divergence may shorten the step once.
    assert found["policy/step"] in (1.0, 0.8)
    expected = found["policy/step"] * expected
    torch.testing.assert_close(weights(policy) - before, expected, rtol=2e-3, atol=1e-3 * float(expected.abs().max()))
    assert 0 < found["policy/kl"] <= delta
    assert found["policy/gain"] == pytest.approx(float(slope @ expected), rel=0.1)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("delta", [1e-3, 0.01, 0.3])
def test_trpo_raises_the_surrogate_and_keeps_the_bound(continuous: bool, delta: float) -> None:
    agent, segment, estimate = trust(continuous, torch.float32)
    observation, action = segment.observation.flatten(0, 1), segment.action.flatten(0, 1)

    def now() -> distributions.Distribution:
        with torch.no_grad():
            out = agent.policy(observation)
            if continuous:
                return distributions.Independent(distributions.Normal(out, agent.policy.log_std.exp().clone().expand(30, 2)), 1)
            return distributions.Categorical(logits=out)

    critic = weights(agent.critic)
    for _ in range(5):
        old = now()
        found = trpo.update(trpo.Config(max_kl=delta), agent, segment, estimate)
        new = now()
        ratio = (new.log_prob(action) - old.log_prob(action)).exp()
        kl = float(distributions.kl_divergence(old, new).mean())
        assert found["policy/step"] > 0
        assert kl <= delta * (1 + 1e-4)
        assert kl > 0.1 * delta
        close(found["policy/kl"], kl, 1e-4)
        gain = float(((ratio - 1) * estimate.advantages.flatten()).mean())
        assert gain > 0
        close(found["policy/gain"], gain, 1e-4)
    assert torch.equal(weights(agent.critic), critic)


def test_trpo_stays_where_there_is_no_advantage() -> None:
    agent, segment, estimate = trust(False, torch.float32)
    before = weights(agent)
    found = trpo.update(trpo.Config(), agent, segment, dataclasses.replace(estimate, advantages=torch.zeros(10, 3)))
    assert found["policy/step"] == 0.0
    assert torch.equal(weights(agent), before)


@pytest.mark.parametrize("report", [(-1.0, 0.0), (0.0, 0.0), (1.0, 0.02), (math.nan, 0.0), (1.0, math.nan)])
def test_parameters_are_what_they_were_where_no_step_helps(report: tuple[float, float]) -> None:
    """The surrogate falls, stays, the bound breaks, or a number is none: not one bit moves."""
    parameters = [drawn(20, 3).requires_grad_(), drawn(7, seed=1).requires_grad_()]
    before = [p.detach().clone() for p in parameters]
    reports = iter([(0.0, 0.0), *[report] * 10])
    found = line_search(parameters, drawn(67, seed=2) * 0.37, lambda: next(reports), 0.01)
    assert found.share == 0.0
    assert all(torch.equal(p, q) for p, q in zip(parameters, before))


def test_a_step_is_shortened_until_it_helps() -> None:
    """f(x) = −x² from −1 with the step 4: at 3 and 2.2 it is lower than at the start, at 1.56 too, at 1.048 too; 0.6384 is the first that is better."""
    x = torch.tensor([-1.0], requires_grad=True)
    found = line_search([x], torch.tensor([4.0]), lambda: (-(float(x.detach()) ** 2), 0.0), 1.0)
    assert found.share == pytest.approx(0.8**4)
    assert float(x.detach()) == pytest.approx(-1 + 4 * 0.8**4, abs=1e-6)
    assert found.gain == pytest.approx(1 - (-1 + 4 * 0.8**4) ** 2, abs=1e-6)


def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_numbers() -> None:
    root = np.random.default_rng(0).normal(size=(8, 8))
    matrix, target = root @ root.T + np.eye(8), np.random.default_rng(1).normal(size=8)
    product = torch.from_numpy(matrix)
    found = conjugate_gradient(lambda v: product @ v, torch.from_numpy(target), 8, 1e-30)
    np.testing.assert_allclose(found.numpy(), np.linalg.solve(matrix, target), rtol=1e-8)
    assert (conjugate_gradient(lambda v: product @ v, torch.zeros(8, dtype=torch.float64)) == 0).all()


def test_trpos_loss_is_the_critics_alone() -> None:
    now = leaves()
    view = view_of(now)
    loss = mean_of(trpo.loss(trpo.Config(), view))
    close(loss, mse_loss(now["value"], view.returns))
    close(gradient(loss, [now["value"]]), 2 * (now["value"].detach() - view.returns) / ROWS)
    assert (gradient(loss, [now["outputs"]]) == 0).all()


def test_the_critics_steps_leave_trpos_policy_where_the_trust_region_put_it() -> None:
    """For pictures, too, whose convolutions actor and critic might share."""
    for space in (SEES, Box(0, 255, (16, 16, 1), np.uint8)):
        torch.manual_seed(0)
        policy = Policy(space, Discrete(3), Shape("stochastic", (8,)))
        agent = ActorCritic(policy, (8,), "tanh")
        config = trpo.Config(learning_rate=0.01, weight_decay=0.1)
        learner = Learner(agent, config, 1)
        observation = torch.from_numpy(policy.reader(np.stack([space.sample() for _ in range(6)])))
        before = policy.distribution(observation).fixed()

        def losses(model: ActorCritic, rows: Tensor) -> Losses:
            found, value = model(rows)
            zeros = torch.zeros(len(rows))
            return trpo.loss(config, StepView(found, zeros, value, zeros, found.fixed(), zeros, zeros, zeros, zeros + 5))  # noqa: B023

        learner.accumulate(observation, losses=losses, denominators=Denominators(6, 6))
        learner.apply()
        assert float(before.kl(policy.distribution(observation).fixed()).max()) < 1e-9, space  # type: ignore[arg-type]


# -- DQN --------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_dqn_is_the_huber_loss_to_the_slow_copys_values(double: bool, dueling: bool) -> None:
    weight = torch.rand(ROWS, generator=generator())
    config, agent = agent_of(dqn, CHOOSES, double=double, dueling=dueling)
    batch = batch_of(discrete=True, weight=weight)
    with torch.no_grad():
        slow, fast = agent.target("policy")(batch.next_observation), agent.policy(batch.next_observation)
        following = slow[range(ROWS), fast.argmax(1)] if double else slow.max(1).values
        assert not torch.equal(slow[range(ROWS), fast.argmax(1)], slow.max(1).values)
        # Rewards for which some errors lie beyond 1, where the loss is a line, and some do not.
        batch.reward[:] = (
            agent.policy(batch.observation)[range(ROWS), batch.action] - batch.discount * following + torch.linspace(-2.1, 1.9, ROWS)
        )
        target = batch.reward + batch.discount * following
    values = agent.policy(batch.observation)[range(ROWS), batch.action]
    expected = (weight * smooth_l1_loss(values, target, reduction="none")).mean()
    found = dqn.loss(config, agent, batch, generator())
    agree(found, expected, agent.policy)
    close(found.metrics["priority"], (values - target).abs().detach())
    assert 0 < (found.metrics["priority"] > 1).sum() < ROWS  # type: ignore[operator]
    assert not any(p.requires_grad for p in agent.targets.parameters())


def test_dqns_target_by_hand() -> None:
    """Linear values of two actions. Fast: (1, 2), slow: (5, 3). r = 1, γ = 0.5: double 1 + 0.5 · 3, else 1 + 0.5 · 5; a terminated step 1."""
    values = {}
    for double in (True, False):
        config = dqn.Config(hidden=(), double=double)
        agent = dqn.build(config, Box(-1, 1, (1,), np.float32), Discrete(2))
        with torch.no_grad():
            for policy, bias in ((agent.policy, (1.0, 2.0)), (agent.target("policy"), (5.0, 3.0))):
                policy.body[0].weight.zero_()  # type: ignore[operator]
                policy.body[0].bias.copy_(torch.tensor(bias))  # type: ignore[operator]
        batch = Transitions(
            observation=torch.zeros(2, 1),
            action=torch.tensor([0, 1]),
            reward=torch.ones(2),
            next_observation=torch.zeros(2, 1),
            discount=torch.tensor([0.5, 0.0]),
            weight=torch.ones(2),
            index=torch.arange(2),
            batch_size=[2],
        )
        found = dqn.loss(config, agent, batch, generator())
        values[double] = found.metrics["priority"].tolist()  # type: ignore[union-attr]
        close(found.values, torch.tensor([(2.5 if double else 3.5) - 1 - 0.5, 0.5]))
    assert values == {True: [1.5, 1.0], False: [2.5, 1.0]}


def test_dqns_slow_copy_is_renewed_whole_at_every_few_improvements() -> None:
    config, agent = agent_of(dqn, CHOOSES, target_every=3, learning_rate=0.01)
    improver = Improver(dqn.METHOD, config, agent, 9, make_backend("inline"))
    for i in range(9):
        before = weights(agent.target("policy"))
        improver.improve(batch_of(discrete=True, seed=i), generator(i))
        if i % 3 == 2:
            assert torch.equal(weights(agent.target("policy")), weights(agent.policy))
        else:
            assert torch.equal(weights(agent.target("policy")), before)


def test_dqn_explores_with_a_share_that_falls_linearly() -> None:
    config, agent = agent_of(dqn, CHOOSES, epsilon_start=0.8, epsilon_end=0.2, epsilon_steps=100)
    read = drawn(40_000, 3).numpy()
    greedy = agent.policy.choose(read)
    for steps, share in ((0, 0.8), (50, 0.5), (100, 0.2), (10_000, 0.2)):
        action = dqn.explore(config, agent.policy, read, steps, generator())
        other = float((action != greedy).mean())
        assert abs(other - 0.75 * share) < 4 * math.sqrt(0.25 / 40_000), steps


# -- DDPG, TD3 --------------------------------------------------------------------------------------------------------------------------------------


def test_ddpg_follows_the_value_of_the_slow_policys_action() -> None:
    config, agent = agent_of(ddpg, MOVES)
    batch = batch_of(weight=torch.rand(ROWS, generator=generator()))
    with torch.no_grad():
        following = agent.target("critic")(batch.next_observation, torch.tanh(agent.target("policy")(batch.next_observation)))
        assert following.shape == (1, ROWS)
        target = batch.reward + batch.discount * following[0]
    values = agent["critic"](batch.observation, batch.action)[0]
    critic, actor = ddpg.METHOD.updates(config)  # type: ignore[misc]
    assert (critic.of, actor.of, actor.every) == (("critic",), ("policy",), 1)
    found = critic.loss(config, agent, batch, generator())
    agree(found, (batch.weight * (values - target) ** 2).mean(), agent["critic"])
    close(found.metrics["priority"], (values - target).abs().detach())
    own = torch.tanh(agent.policy(batch.observation))
    agree(actor.loss(config, agent, batch, generator()), -agent["critic"](batch.observation, own)[0].mean(), agent.policy)


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.6])
def test_td3_takes_the_smaller_value_of_the_slow_policys_noisy_action(noise: float) -> None:
    config, agent = agent_of(td3, MOVES, target_noise=noise)
    batch = batch_of(weight=torch.rand(ROWS, generator=generator()))
    with torch.no_grad():
        action = torch.tanh(agent.target("policy")(batch.next_observation))
        if noise:
            drawn_noise = (torch.randn(ROWS, 2, generator=generator()) * noise).clamp(-0.5, 0.5)
            action = (action + drawn_noise).clamp(-1, 1)
            assert noise < 0.5 or (drawn_noise.abs() == 0.5).any()
        first, second = agent.target("critic")(batch.next_observation, action)
        assert 0 < (first < second).sum() < ROWS
        target = batch.reward + batch.discount * torch.min(first, second)
    values = agent["critic"](batch.observation, batch.action)
    expected = (batch.weight * ((values[0] - target) ** 2 + (values[1] - target) ** 2)).mean()
    found = td3.critic_loss(config, agent, batch, generator())
    agree(found, expected, agent["critic"])
    close(found.metrics["priority"], torch.max((values[0] - target).abs(), (values[1] - target).abs()).detach())
    own = torch.tanh(agent.policy(batch.observation))
    agree(td3.actor_loss(config, agent, batch, generator()), -agent["critic"](batch.observation, own)[0].mean(), agent.policy)


@pytest.mark.parametrize("method", [td3, td3_bc])
@pytest.mark.parametrize("delay", [1, 2, 3])
def test_policy_and_slow_copies_move_only_at_every_few_improvements(method: Any, delay: int) -> None:
    config, agent = agent_of(
        method, MOVES, policy_delay=delay, tau=0.1, learning_rate=0.01, **({} if method is td3 else {"normalize_observations": False})
    )
    improver = Improver(method.METHOD, config, agent, 12, make_backend("inline"))
    moved = []
    for i in range(12):
        policy, critic = weights(agent.policy), weights(agent["critic"])
        slow = {name: weights(agent.target(name)) for name in ("policy", "critic")}
        improver.improve(batch_of(seed=i), generator(i))
        assert not torch.equal(weights(agent["critic"]), critic)
        moved.append(not torch.equal(weights(agent.policy), policy))
        for name, before in slow.items():
            expected = before + 0.1 * (weights(agent[name]) - before) if moved[-1] else before
            torch.testing.assert_close(weights(agent.target(name)), expected, rtol=1e-6, atol=1e-7)
    assert sum(moved) == 12 // delay
    places = [i for i, yes in enumerate(moved) if yes]
    assert {b - a for a, b in itertools.pairwise(places)} == {delay}


def test_td3_explores_with_gaussian_noise_inside_the_bounds() -> None:
    config, agent = agent_of(td3, MOVES, exploration_noise=0.05)
    read = drawn(20_000, 3).numpy() * 0.1
    noise = td3.explore(config, agent.policy, read, 0, generator()) - agent.policy.choose(read)
    inside = np.abs(agent.policy.choose(read)).max(1) < 0.7
    assert inside.sum() > 1000
    np.testing.assert_allclose(noise[inside].std(0), 0.05, rtol=0.05)
    loud = dataclasses.replace(config, exploration_noise=5.0)
    assert np.abs(td3.explore(loud, agent.policy, read, 0, generator())).max() == 1.0


# -- SAC --------------------------------------------------------------------------------------------------------------------------------------------


def squashed(agent: Agent, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """tanh(μ + σ ε) and log N(μ + σ ε; μ, σ) − log(1 − tanh²), the latter as −2 log cosh in float64."""
    mean, raw = agent.policy(observation).chunk(2, -1)
    deviation = torch.exp(-5 + 0.5 * 7 * (torch.tanh(raw) + 1))
    before = mean + deviation * noise
    normal = distributions.Normal(mean.double(), deviation.double()).log_prob(before.double())
    return torch.tanh(before), (normal + 2 * torch.log(torch.cosh(before.double()))).sum(-1).float()


@pytest.mark.parametrize("critics", [1, 2, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_sacs_critics_aim_at_the_smallest_slow_value_plus_entropy(alpha: float, critics: int) -> None:
    config, agent = agent_of(sac, MOVES, temperature=alpha, critics=critics, **({} if alpha else {"temperature_init": 0.7}))
    with torch.no_grad():
        if not alpha:
            agent["temperature"].value.fill_(math.log(0.6))
    batch = batch_of(weight=torch.rand(ROWS, generator=generator()))
    with torch.no_grad():
        action, logprob = squashed(agent, batch.next_observation, torch.randn(ROWS, 2, generator=generator()))
        smallest = agent.target("critic")(batch.next_observation, action).min(0).values
        target = batch.reward + batch.discount * (smallest - (alpha or 0.6) * logprob)
    values = agent["critic"](batch.observation, batch.action)
    found = sac.critic_loss(config, agent, batch, generator())
    agree(found, (batch.weight * ((values - target) ** 2).sum(0)).mean(), agent["critic"])
    assert values.shape == (critics, ROWS)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("aim", [None, -0.5])
def test_sacs_policy_and_temperature(alpha: float, aim: float | None) -> None:
    config, agent = agent_of(sac, MOVES, temperature=alpha, target_entropy=aim)
    batch = batch_of()
    noise = torch.randn(ROWS, 2, generator=generator())
    action, logprob = squashed(agent, batch.observation, noise)
    scale = alpha or float(agent["temperature"]().detach().exp())
    first, second = agent["critic"](batch.observation, action)
    expected = (scale * logprob - torch.min(first, second)).mean()
    found = sac.actor_loss(config, agent, batch, generator())
    if alpha:
        assert "temperature" not in agent.networks
        agree(found, expected, agent.policy)
        assert sac.updates(config)[1].of == ("policy",)
        return
    log_alpha = agent["temperature"].value
    goal = -2.0 if aim is None else aim
    learned = -(log_alpha * (logprob.detach() + goal)).mean()
    agree(found, expected + learned, agent.policy)
    close(gradient(mean_of(found), [log_alpha]), -(logprob.detach() + goal).mean()[None])
    assert sac.updates(config)[1].of == ("policy", "temperature")


def test_the_temperature_rises_where_entropy_is_below_its_aim_and_falls_above() -> None:
    for aim, sign in ((50.0, 1), (-50.0, -1)):
        config, agent = agent_of(sac, MOVES, target_entropy=aim)
        before = float(agent["temperature"]().detach())
        improver = Improver(sac.METHOD, config, agent, 3, make_backend("inline"))
        for i in range(3):
            improver.improve(batch_of(seed=i), generator(i))
        assert sign * (float(agent["temperature"]().detach()) - before) > 0


def test_slow_critics_follow_at_every_improvement() -> None:
    for method in (sac, iql, xql, awac, cql):
        options = {} if method is sac else {"normalize_observations": False}
        config, agent = agent_of(method, MOVES, tau=0.2, learning_rate=0.01, **options)
        improver = Improver(method.METHOD, config, agent, 3, make_backend("inline"))
        for i in range(3):
            slow = weights(agent.target("critic"))
            improver.improve(batch_of(seed=i), generator(i))
            expected = slow + 0.2 * (weights(agent["critic"]) - slow)
            torch.testing.assert_close(weights(agent.target("critic")), expected, rtol=1e-6, atol=1e-7)


# -- offline ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [2.5, 0.7, 0.0])
def test_td3_bc_weighs_the_value_by_its_size_against_the_datas_actions(alpha: float) -> None:
    config, agent = agent_of(td3_bc, MOVES, alpha=alpha, normalize_observations=False)
    batch = batch_of()
    own = torch.tanh(agent.policy(batch.observation))
    value = agent["critic"](batch.observation, own)[0]
    expected = -alpha / value.detach().abs().mean() * value.mean() + mse_loss(own, batch.action)
    agree(td3_bc.actor_loss(config, agent, batch, generator()), expected, agent.policy)
    with torch.no_grad():
        action = torch.tanh(agent.target("policy")(batch.next_observation))
        action = (action + (torch.randn(ROWS, 2, generator=generator()) * 0.2).clamp(-0.5, 0.5)).clamp(-1, 1)
        target = batch.reward + batch.discount * agent.target("critic")(batch.next_observation, action).min(0).values
    first, second = agent["critic"](batch.observation, batch.action)
    agree(td3_bc.critic_loss(config, agent, batch, generator()), mse_loss(first, target) + mse_loss(second, target), agent["critic"])


@pytest.mark.parametrize("discrete", [True, False])
def test_cloning_is_the_negative_log_likelihood(discrete: bool) -> None:
    config, agent = agent_of(bc, CHOOSES if discrete else MOVES)
    batch = batch_of(discrete)
    out = agent.policy(batch.observation)
    if discrete:
        expected = nn.functional.cross_entropy(out, batch.action)
    else:
        log_std = agent.policy.log_std
        expected = -distributions.Normal(out, log_std.exp().expand(ROWS, 2)).log_prob(batch.action).sum(-1).mean()
    agree(bc.loss(config, agent, batch, generator()), expected, agent.policy)


def centred(agent: Agent, batch: Transitions, shift: float = 0.0) -> Tensor:
    """The smaller slow values [B], after the state's values were moved among them (or `shift` below), so that errors have both signs."""
    with torch.no_grad():
        best = agent.target("critic")(batch.observation, batch.action).min(0).values
        agent["value"].body[-1].bias.add_((best - agent["value"](batch.observation)).mean() - shift)
    return best


@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_iql_regresses_values_to_expectiles_critics_to_values_and_the_policy_to_weighted_actions(share: float) -> None:
    config, agent = agent_of(iql, MOVES, expectile=share, beta=3.0, max_weight=4.0, normalize_observations=False)
    batch = batch_of()
    best = centred(agent, batch)
    value = agent["value"](batch.observation)
    error = best - value
    assert 0 < (error < 0).sum() < ROWS
    expected = ((share - (error < 0).float()).abs() * error**2).mean()
    agree(iql.value_loss(config, agent, batch, generator()), expected, agent["value"])

    target = (batch.reward + batch.discount * agent["value"](batch.next_observation)).detach()
    first, second = agent["critic"](batch.observation, batch.action)
    found = iql.critic_loss(config, agent, batch, generator())
    agree(found, mse_loss(first, target) + mse_loss(second, target), agent["critic"])

    weight = torch.exp(3.0 * error.detach()).clamp(max=4.0)
    assert 0 < (weight == 4).sum() < ROWS
    logprob = (
        distributions.Normal(agent.policy(batch.observation), agent.policy.log_std.exp().expand(ROWS, 2)).log_prob(batch.action).sum(-1)
    )
    agree(iql.actor_loss(config, agent, batch, generator()), -(weight * logprob).mean(), agent.policy)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_least_expectile_loss_is_at_the_expectile(share: float) -> None:
    """Σ_i τ_i (q_i − m) = 0 with τ_i = τ above m and 1 − τ below."""
    q = drawn(30).double()
    found = minimize_scalar(lambda m: float(expectile(q - m, share).sum()), bounds=(-3, 3), method="bounded", options={"xatol": 1e-10})
    above = float((q - found.x).clamp(min=0).sum())
    below = float((found.x - q).clamp(min=0).sum())
    assert share * above == pytest.approx((1 - share) * below, rel=1e-5)


def test_xqls_value_and_policy() -> None:
    beta = 0.8
    config, agent = agent_of(xql, MOVES, beta=beta, max_exponent=0.5, max_weight=1.5, normalize_observations=False)
    batch = batch_of()
    best = centred(agent, batch)
    value = agent["value"](batch.observation)
    z = torch.clamp((best - value) / beta, max=0.5)
    largest = z.detach().max()
    assert 0 < (z == 0.5).sum() < ROWS
    expected = (torch.exp(z - largest) - z * torch.exp(-largest) - torch.exp(-largest)).mean()
    agree(xql.value_loss(config, agent, batch, generator()), expected, agent["value"])
    weight = torch.exp((best - value.detach()) / beta).clamp(max=1.5)
    logprob = (
        distributions.Normal(agent.policy(batch.observation), agent.policy.log_std.exp().expand(ROWS, 2)).log_prob(batch.action).sum(-1)
    )
    agree(xql.actor_loss(config, agent, batch, generator()), -(weight * logprob).mean(), agent.policy)


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("shift", [0.0, 40.0])
def test_the_least_gumbel_loss_is_at_the_soft_maximum(beta: float, shift: float) -> None:
    """β log mean exp(Q / β), also for numbers whose exponentials overflow: the plain gradient Σ (1 − e^z) is zero there."""
    q = drawn(20).double() + shift
    expected = beta * float(torch.logsumexp(q / beta, 0) - math.log(20))
    v = torch.tensor(expected, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(gumbel((q - v) / beta, 1e9).mean(), v)
    assert abs(float(slope)) < 1e-12
    for apart, sign in ((0.01, 1), (-0.01, -1), (1.0, 1), (-1.0, -1)):
        v = torch.tensor(expected + apart, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(gumbel((q - v) / beta, 1e9).mean(), v)
        assert sign * float(slope) > 0
    assert gumbel(torch.tensor([5000.0, 1.0]), 1e9).isfinite().all()


def test_awac_repeats_actions_in_proportion_to_their_advantage() -> None:
    config, agent = agent_of(awac, MOVES, temperature=0.5, normalize_observations=False)
    batch = batch_of()
    noise = torch.randn(ROWS, 2, generator=generator())
    deviation = agent.policy.log_std.exp()
    with torch.no_grad():
        own = agent.policy(batch.observation) + noise * deviation
        advantage = agent["critic"](batch.observation, batch.action).min(0).values - agent["critic"](batch.observation, own).min(0).values
        weight = torch.exp(advantage / 0.5)
        weight = weight / weight.mean()
        following = agent.policy(batch.next_observation) + noise * deviation
        target = batch.reward + batch.discount * agent.target("critic")(batch.next_observation, following).min(0).values
    logprob = distributions.Normal(agent.policy(batch.observation), deviation.expand(ROWS, 2)).log_prob(batch.action).sum(-1)
    agree(awac.actor_loss(config, agent, batch, generator()), -(weight * logprob).mean(), agent.policy)
    first, second = agent["critic"](batch.observation, batch.action)
    agree(awac.critic_loss(config, agent, batch, generator()), mse_loss(first, target) + mse_loss(second, target), agent["critic"])


class Slope(nn.Module):
    """Q_i(s, a) = c_i + k_i Σ a, whatever the state."""

    def __init__(self, constant: tuple[float, ...], slope: tuple[float, ...]) -> None:
        super().__init__()
        self.constant, self.slope = nn.Parameter(torch.tensor(constant)), nn.Parameter(torch.tensor(slope))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.constant[:, None] + self.slope[:, None] * action.sum(-1)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("slope", [0.0, 1.5])
def test_cqls_soft_maximum_is_the_integral_over_actions(size: int, slope: float) -> None:
    """log ∫ exp(c + k Σ a) da over [−1, 1]^D = c + D log(2 sinh(k) / k): c + D log 2 where k is 0. The gap to the data is what is reported."""
    config = cql.Config(hidden=(8,), samples=4000)
    torch.manual_seed(0)
    space = Box(-1.0, 1.0, (size,), np.float32)
    agent = cql.build(config, SEES, space)
    with torch.no_grad():
        agent.policy.body[-1].weight.mul_(0.1)  # type: ignore[union-attr,operator]
        agent.policy.body[-1].bias.copy_(torch.tensor([0.0] * size + [0.8] * size))  # type: ignore[union-attr,operator] # wide: its density vanishes nowhere
    agent.networks["critic"] = Slope((2.0, -1.0), (slope, slope))
    agent.targets["critic"] = Slope((2.0, -1.0), (slope, slope))
    batch = batch_of()
    batch.action = torch.zeros(ROWS, size)
    found = cql.critic_loss(config, agent, batch, generator())
    exact = size * math.log(2 * math.sinh(slope) / slope if slope else 2.0)
    gap = found.metrics["critic/gap"]
    assert isinstance(gap, Tensor)
    close(gap.mean(), exact, 0.06)
    # The pull of the term on c_i is that on the soft maximum and on the data's value: none in sum.
    plain = cql.critic_loss(dataclasses.replace(config, conservative=0.0), agent, batch, generator())
    apart = mean_of(found) - mean_of(plain)
    close(apart, 5.0 * 2 * gap.mean(), 1e-3)
    assert gradient(apart, [agent["critic"].constant]).abs().max() < 1e-4


def test_cqls_losses_from_its_samples() -> None:
    n = 5
    config, agent = agent_of(cql, MOVES, samples=n, conservative=2.0, normalize_observations=False)
    batch = batch_of()
    source = generator()
    with torch.no_grad():
        repeated = [x.repeat_interleave(n, 0) for x in (batch.observation, batch.next_observation)]
        own, own_log = squashed(agent, repeated[0], torch.randn(ROWS * n, 2, generator=source))
        following, following_log = squashed(agent, repeated[1], torch.randn(ROWS * n, 2, generator=source))
        uniform = torch.rand(ROWS * n, 2, generator=source) * 2 - 1
        one_each = following.view(ROWS, n, 2)[:, 0]
        target = batch.reward + batch.discount * agent.target("critic")(batch.next_observation, one_each).min(0).values
    expected = torch.zeros(())
    for i in range(2):
        value = agent["critic"](batch.observation, batch.action)[i]
        terms = [
            agent["critic"](repeated[0], action)[i].view(ROWS, n) - log.view(ROWS, n)
            for action, log in ((uniform, torch.full((ROWS * n,), math.log(0.25))), (own, own_log), (following, following_log))
        ]
        soft = torch.logsumexp(torch.cat(terms, 1), 1) - math.log(3 * n)
        expected = expected + mse_loss(value, target) + 2.0 * (soft - value).mean()
    agree(cql.critic_loss(config, agent, batch, generator()), expected, agent["critic"])

    action, logprob = squashed(agent, batch.observation, torch.randn(ROWS, 2, generator=generator()))
    log_alpha = agent["temperature"].value
    value = agent["critic"](batch.observation, action).min(0).values
    found = cql.actor_loss(config, agent, batch, generator())
    agree(found, (log_alpha.detach().exp() * logprob - value).mean() - (log_alpha * (logprob.detach() - 2)).mean(), agent.policy)
    close(gradient(mean_of(found), [log_alpha]), (2 - logprob.detach()).mean()[None])


# -- what loops hand to losses ----------------------------------------------------------------------------------------------------------------------


def steps_of(actions: np.ndarray | None = None) -> Steps:
    """Three episodes of two steps: one terminates, one is cut, one is cut where the data end."""
    observation = np.arange(18, dtype=np.float32).reshape(6, 3)
    return Steps.of(
        observation,
        np.linspace(-0.5, 0.5, 12).reshape(6, 2).astype(np.float32) if actions is None else actions,
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        observation + 100,
        [False, True, False, False, False, False],
        [False, True, False, True, False, True],
        observation_space=SEES,
        action_space=MOVES,
    )


def test_data_bootstrap_where_they_were_cut_and_not_where_they_terminated() -> None:
    config, agent = agent_of(iql, MOVES, gamma=0.9, reward_shift=-1.0, reward_scale=2.0)
    table = Table(steps_of(), agent.policy, config)
    batch = table.batch(np.arange(6))
    close(batch.discount, torch.tensor([0.9, 0.0, 0.9, 0.9, 0.9, 0.9]))
    close(batch.reward, torch.tensor([0.0, 2.0, 4.0, 6.0, 8.0, 10.0]))
    close(batch.next_observation, batch.observation + 100)


def test_actions_of_data_are_brought_into_the_policys_units() -> None:
    space = Box(np.array([0.0, -4.0], np.float32), np.array([2.0, 4.0], np.float32))
    config = td3_bc.Config(hidden=(4,))
    agent = td3_bc.build(config, SEES, space)
    given = np.array([[0.0, -4.0], [2.0, 4.0], [1.0, 0.0], [0.5, 2.0], [1.5, -2.0], [1.0, 4.0]], np.float32)
    steps = dataclasses.replace(steps_of(), action=given, action_space=space, keys=None)
    close(Table(steps, agent.policy, config).action, torch.tensor([[-1.0, -1], [1, 1], [0, 0], [-0.5, 0.5], [0.5, -0.5], [0, 1]]))


class Recorded:
    """Keeps what a driver's steps led to."""

    def __init__(self, driver: Any) -> None:
        self.outcomes: list[Any] = []
        self._step, driver.step = driver.step, self.step

    def step(self, actions: np.ndarray) -> Any:
        found = self._step(actions)
        self.outcomes.append(found[0])
        return found


def test_segments_bootstrap_from_where_an_episode_was_cut(world: World, tmp_path: Path) -> None:
    program = program_of("ppo", world.options(discovery.load("ppo"), rollout_steps=40), tmp_path)
    recorded = Recorded(program.driver)
    segment, _, _ = program._collect(0)
    assert segment.terminated.any()
    assert segment.truncated.any()
    with torch.no_grad():
        for t, outcome in enumerate(recorded.outcomes):
            led_to = program.model.values(torch.from_numpy(outcome.observation))
            close(segment.next_value[t], torch.where(torch.from_numpy(outcome.terminated), 0.0, led_to), 1e-4)
            close(segment.reward[t], torch.from_numpy(outcome.reward).float())
            if t:
                same = ~segment.ended[t - 1]
                close(segment.observation[t][same], torch.from_numpy(recorded.outcomes[t - 1].observation)[same])
        close(segment.value, program.model.values(segment.observation.flatten(0, 1)).view(40, 2), 1e-4)
        found = program.policy.distribution(segment.observation.flatten(0, 1))
        close(segment.logprob.flatten(), found.log_prob(segment.action.flatten(0, 1)), 1e-4)


def test_replayed_steps_bootstrap_from_where_an_episode_was_cut(world: World, tmp_path: Path) -> None:
    options = world.options(discovery.load("sac"), total_steps=80, iteration_steps=80, start_steps=1000, replay_size=1000, gamma=0.9)
    program = program_of("sac", options, tmp_path)
    recorded = Recorded(program.driver)
    program.step(0)
    batch = program.replay.take(np.arange(80), gamma=0.9)
    led_to = np.concatenate([outcome.observation for outcome in recorded.outcomes])
    terminated = np.concatenate([outcome.terminated for outcome in recorded.outcomes])
    truncated = np.concatenate([outcome.truncated for outcome in recorded.outcomes])
    assert terminated.any()
    assert truncated.any()
    assert np.array_equal(batch.next_observation.numpy(), led_to)
    close(batch.discount, torch.from_numpy(np.where(terminated, 0.0, 0.9)).float())
    going = ~(terminated | truncated)[:-2]
    assert np.array_equal(batch.observation.numpy()[2:][going], led_to[:-2][going])
    assert not np.array_equal(batch.observation.numpy()[2:][~going], led_to[:-2][~going])


def test_rewards_are_divided_by_the_deviation_of_all_discounted_returns_so_far(world: World, tmp_path: Path) -> None:
    options = world.options(discovery.load("ppo"), normalize_rewards=True, clip_reward=1.5, gamma=0.9, rollout_steps=20)
    program = program_of("ppo", options, tmp_path)
    recorded = Recorded(program.driver)
    segment, _, _ = program._collect(0)
    seen, running, expected = [], np.zeros(2), []
    for outcome in recorded.outcomes:
        running = 0.9 * running + outcome.reward
        seen.append(running.copy())
        expected.append(np.clip(outcome.reward / np.sqrt(np.var(seen) + 1e-8), -1.5, 1.5))
        running[outcome.terminated | outcome.truncated] = 0
    close(segment.reward, torch.from_numpy(np.array(expected)).float(), 1e-4)
    assert 0 < (segment.reward.abs() == 1.5).sum() < 40


@pytest.mark.parametrize("activation", ["tanh", "gelu"])  # gradients that are written out, and torch's
def test_each_pass_sees_every_step_once(world: World, tmp_path: Path, activation: str) -> None:
    options = world.options(discovery.load("ppo"), rollout_steps=15, minibatch_size=8, epochs=3, activation=activation)
    program = program_of("ppo", options, tmp_path)
    call, seen = program.learner.call, []

    def watched(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "accumulate":
            seen.append([arguments[0], arguments[4]])
        if name == "descend":
            rows, size, _ = arguments
            whole = [torch.from_numpy(rows[part]) for part in ("observation", "old_value")]
            seen.extend(zip(*(part.split(size) for part in whole), strict=True))
        return call(name, *arguments, **options)

    program.learner.call = watched
    found = program.step(0)
    assert [len(part) for part, _ in seen] == [8, 8, 8, 6] * 3
    assert found["optimiser_steps"] == 12
    orders = [torch.cat([torch.cat([x, v[:, None]], 1) for x, v in seen[4 * i : 4 * i + 4]]) for i in range(3)]
    for one, two in itertools.pairwise(orders):
        assert not torch.equal(one, two)
        assert sorted(one.tolist()) == sorted(two.tolist())
    assert len({tuple(row) for row in orders[0].tolist()}) == 30


def test_replayed_steps_are_drawn_and_weighed_by_their_errors(world: World, tmp_path: Path) -> None:
    """Priorities are those of the newest steps alone: |error| + 10⁻⁶ to the power α, of new steps the largest so far; weights are (N p)^−β over their
    largest."""
    alpha, beta, n = 0.6, 0.4, 2
    options = world.options(discovery.load("dqn"), prioritized=alpha, replay_size=30, total_steps=120, iteration_steps=120, train_every=2)
    program = program_of("dqn", options, tmp_path)
    expected: dict[int, float] = {}
    largest = [1.0]
    draw, improve, add = program.priorities.draw, program.improver.improve, program.replay.add
    told: dict[str, Any] = {}

    def added(**values: np.ndarray) -> None:
        for i in range(n):
            expected[program.replay.written * n + i] = largest[0]
        add(**values)

    def drawn_by(count: int, chance: np.random.Generator) -> Any:
        kept = {place: value for place, value in expected.items() if place // n >= program.replay.written - 15}
        told["slots"], told["probability"] = draw(count, chance)
        told["kept"] = kept
        assert program.priorities.total == pytest.approx(sum(kept.values()))
        return told["slots"], told["probability"]

    def improved(batch: Transitions, *rest: Any) -> Any:
        kept, total_priority = told["kept"], sum(told["kept"].values())
        places = batch.index.tolist()
        assert set(places) <= set(kept)
        probability = np.array([kept[place] for place in places]) / total_priority
        np.testing.assert_allclose(told["probability"], probability, rtol=1e-9)
        share = beta + (1 - beta) * program.driver.steps / 120
        weight = (len(kept) * probability) ** -share
        close(batch.weight, torch.from_numpy(weight / weight.max()).float(), 1e-4)
        metrics, errors = improve(batch, *rest)
        for place, error in zip(places, errors.tolist()):
            expected[place] = (abs(error) + 1e-6) ** alpha
            largest[0] = max(largest[0], expected[place])
        told["improved"] = told.get("improved", 0) + 1
        return metrics, errors

    program.replay.add, program.priorities.draw, program.improver.improve = added, drawn_by, improved
    program.step(0)
    assert told["improved"] > 40
    assert program.replay.written == 60


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_passes_end_with_the_first_whose_divergence_is_beyond_the_bound(world: World, tmp_path: Path, activation: str) -> None:
    """The divergence of a pass is that of the policy as it then is: passes before, which had moved less, do not soften it."""

    def passes(folder: str, target_kl: float) -> list[float]:
        """The mean estimated divergence of each pass of the first iteration."""
        options = world.options(
            discovery.load("ppo"),
            rollout_steps=16,
            minibatch_size=8,
            epochs=8,
            learning_rate=0.02,
            target_kl=target_kl,
            activation=activation,
        )
        program = program_of("ppo", options, tmp_path / folder)
        call, seen = program.learner.call, []

        def watched(name: str, *arguments: Any, **given: Any) -> Any:
            found = call(name, *arguments, **given)
            if name == "accumulate":
                seen.append(found["metrics"]["policy/approx_kl"][0] / 8)
            if name == "descend":
                seen.extend([found["metrics"]["policy/approx_kl"][0] / 32] * 4)
            return found

        program.learner.call = watched
        program.step(0)
        return [float(np.mean(seen[i : i + 4])) for i in range(0, len(seen), 4)]

    every = passes("whole", 0.0)
    assert len(every) == 8
    # The first pass that is beyond all before it, and a bound which the mean over the passes so far does not reach there.
    last = next(i for i in range(1, 8) if every[i] > max(every[:i]))
    limit = 0.25 * max(every[:last]) + 0.75 * every[last]
    assert last < 7
    assert np.mean(every[: last + 1]) < limit < every[last]
    assert len(passes("bounded", limit)) == last + 1


@pytest.mark.parametrize(
    ("recorded", "met"),
    [
        (Discrete(3), Discrete(4)),
        (Discrete(3), Discrete(3, start=1)),
        (MultiDiscrete([2, 3]), MultiDiscrete([5, 5])),
        (Box(-1, 1, (2,)), Box(-1, 1, (3,))),
        (Dict({"a": Discrete(2)}), Dict({"b": Discrete(2)})),
        (Dict({"a": Discrete(2)}), Dict({"a": Discrete(3)})),
    ],
)
def test_data_of_other_choices_than_the_environments_are_told_apart(recorded: Any, met: Any) -> None:
    assert shape_of(recorded) != shape_of(met)
    assert shape_of(recorded) == shape_of(copy.deepcopy(recorded))


@pytest.mark.parametrize("key", ["td3-bc", "iql", "xql", "awac", "cql"])
def test_slow_copies_begin_equal_to_their_networks_in_the_datas_units(world: World, tmp_path: Path, key: str) -> None:
    program = program_of(key, world.options(discovery.load(key), normalize_observations=True), tmp_path)
    batch = program.table.batch(np.arange(10))
    agent = program.agent
    with torch.no_grad():
        close(agent.target("critic")(batch.observation, batch.action), agent["critic"](batch.observation, batch.action))
        if key == "td3-bc":
            close(agent.target("policy")(batch.observation), agent.policy(batch.observation))


@pytest.mark.parametrize("method", [ppo, a2c, bc, iql, xql, td3_bc, awac, dqn])
def test_batches_of_control_are_never_cut(method: Any) -> None:
    """Some losses look at the whole batch (advantages are standardised in it), so that there is no option that cuts one."""
    assert "micro_batch_size" not in {option.name for option in options_of(method.Config)}


@pytest.mark.parametrize(
    "options",
    [
        {"total_steps": 16, "iteration_steps": 16, "start_steps": 6, "train_every": 4, "improvements": 4, "num_envs": 1},
        {"total_steps": 60, "iteration_steps": 30, "start_steps": 9, "train_every": 4, "improvements": 1, "num_envs": 3},
        {"total_steps": 48, "iteration_steps": 24, "start_steps": 0, "train_every": 1, "improvements": 2, "num_envs": 2},
    ],
)
def test_the_learning_rate_falls_to_zero_over_the_improvements_that_are_made(world: World, tmp_path: Path, options: dict[str, int]) -> None:
    """As many as were announced, or the rate ends early or turns negative."""
    program = program_of("dqn", world.options(discovery.load("dqn"), lr_schedule="linear", **options), tmp_path)
    for index in range(program.config.program_steps):
        program.step(index)
    assert program.improver.done == program.config.all_improvements
