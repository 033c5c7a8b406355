"""Shallow Q-iteration via reinforcement learning: random play, a few steps of fitted Q-iteration over it, and then greedy actions, step by step.

For i = 1 … T, from m episodes that follow π_1 … π_{i−1} and are random from step i on                                (Laidlaw et al. 2024, algorithm 1):

    Q̂_{i+k−1} ← regression of Σ_{t ≥ i+k−1} r_t on (s, a)_{i+k−1}
    Q̂_t ← regression of r_t + max_a Q̂_{t+1}(s_{t+1}, a) on (s, a)_t,   t = i + k − 2 … i
    π_i(s) = argmax_a Q̂_i(s, a)

Any regression that generalises within its distribution will do. Here it is least squares, linear in the observation for each action (for numbered states: the
mean of each state and action), or a perceptron that is trained anew for every regression, on inputs and targets in units of their mean and deviation. The
authors' code keeps training one network from step to step. Values where an episode is over are 0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from telos.algorithms.learning import Learner, OptimiserConfig
from telos.algorithms.online._loop_greedy_random import GreedyRandomConfig, Rollouts, constant
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.reduction import Denominators, Losses
from telos.models.networks import Activation, perceptron
from telos.models.staged import StagedPolicy

_RIDGE = 1e-6  # of the features' mean square: makes least squares unique where features vary together, and moves a mean by no more than this share


@dataclass(frozen=True, kw_only=True)
class Config(GreedyRandomConfig, OptimiserConfig):
    """Options of SQIRL."""

    episodes: int = 500  # m: episodes from which each step is learned, >= 1
    regressor: Literal["network", "least-squares"] = "network"  # least-squares: exact, linear in observations, means for numbered states
    regression_steps: int = 200  # optimiser steps of each of the k regressions of a step
    batch_size: int = 256  # steps in one of them
    learning_rate: float = 3e-3  # at the start of each regression
    hidden: tuple[int, ...] = (64, 64)  # widths of the network's hidden layers
    activation: Activation = "relu"  # between the layers

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "episodes", "regression_steps", "batch_size")
        if self.regressor == "least-squares":
            theirs = {field.name for field in fields(OptimiserConfig)} - {field.name for field in fields(GreedyRandomConfig)}
            for name in sorted(theirs | {"regression_steps", "batch_size", "hidden", "activation"}):
                if getattr(self, name) != Config.__dataclass_fields__[name].default:
                    raise UsageError(f"--{name} has no effect with --regressor least-squares")


def build(config: Config, observation_space: gymnasium.Space, action_space: gymnasium.Space) -> StagedPolicy:
    hidden = config.hidden if config.regressor == "network" else ()
    return StagedPolicy(observation_space, action_space, config.horizon, hidden, config.activation)


def sample(config: Config, actions: int) -> np.ndarray:
    """Nothing is prescribed: all actions from the step on are random."""
    return np.zeros((config.episodes, 0), dtype=np.int64)


def estimate(config: Config, policy: StagedPolicy, rollouts: Rollouts, generator: torch.Generator) -> tuple[nn.Module, dict[str, float]]:
    """k regressions, from the last step to the first."""
    k = config.lookahead
    target, loss = rollouts.rest, 0.0
    network: nn.Module = constant(policy, np.zeros(policy.choices))
    for j in reversed(range(k)):
        rows = rollouts.alive[:, j]
        if j < k - 1:
            with torch.no_grad():
                following = network(policy.looked(rollouts.observation[:, j + 1])).max(1).values.cpu().numpy()
            target = rollouts.reward[:, j] + config.gamma * np.where(rollouts.alive[:, j + 1], following, 0.0)
        if rows.any():  # not when all episodes are over by then
            x = policy.looked(rollouts.observation[rows, j])
            y = torch.from_numpy(target[rows].astype(np.float32)).to(x.device)
            network, loss = regress(config, policy, x, torch.from_numpy(rollouts.action[rows, j]).to(x.device), y, generator)
    values = network(policy.looked(rollouts.observation[rollouts.alive[:, 0], 0])).detach()
    return network, {"loss": loss, "value": float(values.max(1).values.mean())}


def regress(
    config: Config, policy: StagedPolicy, x: Tensor, action: Tensor, y: Tensor, generator: torch.Generator
) -> tuple[nn.Module, float]:
    """(a network whose output `action` [n] at inputs x [n, F] fits y [n], its mean squared error)."""
    if config.regressor == "least-squares":
        network: nn.Module = least_squares(policy, x, action, y)
    else:
        network = trained(config, policy, x, action, y, generator)
    with torch.no_grad():
        return network, float(((network(x).gather(1, action[:, None])[:, 0] - y) ** 2).mean())


def least_squares(policy: StagedPolicy, x: Tensor, action: Tensor, y: Tensor) -> nn.Linear:
    """For each action the linear function of x with the least squared error, and among equal ones that of the smallest weights; 0 for actions never taken."""
    layer = constant(policy, np.zeros(policy.choices))
    features = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()
    with torch.no_grad():
        for a in range(policy.choices):
            taken, target = features[action == a], y[action == a].double()
            if len(taken):
                gram = taken.T @ taken
                ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
                weights = torch.linalg.solve(gram + ridge, taken.T @ target)
                layer.weight[a], layer.bias[a] = weights[:-1], weights[-1]
    return layer


def trained(config: Config, policy: StagedPolicy, x: Tensor, action: Tensor, y: Tensor, generator: torch.Generator) -> nn.Module:
    """A perceptron after `regression_steps` steps; the units in which it learns are folded into its first and its last layer."""
    network = perceptron((policy.inputs, *config.hidden, policy.choices), config.activation)
    linear = [layer for layer in network if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer in linear:  # torch's own initialisation draws from the global generator
            for weight in (layer.weight, layer.bias):
                edge = layer.in_features**-0.5
                weight.copy_(torch.rand(weight.shape, generator=generator, device=x.device) * 2 * edge - edge)
    network.to(x.device)
    (x_mean, x_scale), (y_mean, y_scale) = (_units(values) for values in (x, y[:, None]))
    inputs, targets = (x - x_mean) / x_scale, (y - y_mean) / y_scale
    learner = Learner(network, config, config.regression_steps)
    size = min(config.batch_size, len(x))

    def losses(model: nn.Module, rows: Tensor) -> Losses:
        return Losses((model(inputs[rows]).gather(1, action[rows, None])[:, 0] - targets[rows]) ** 2)

    for _ in range(config.regression_steps):
        rows = torch.randint(len(x), (size,), generator=generator, device=x.device)
        learner.accumulate(rows, losses=losses, denominators=Denominators(size, size), told=False)
        learner.apply({"observation": x, "action": action, "target": y})
    with torch.no_grad():
        linear[0].weight.div_(x_scale)
        linear[0].bias.sub_(linear[0].weight @ x_mean)
        linear[-1].weight.mul_(y_scale)
        linear[-1].bias.mul_(y_scale).add_(y_mean)
    return network


def _units(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation [F] of values [n, F], 1 where they do not vary."""
    scale = values.std(0, correction=0)
    return values.mean(0), torch.where(scale > 1e-6, scale, torch.ones_like(scale))


METHOD = Method(
    key="sqirl",
    title="Shallow Q-Iteration via Reinforcement Learning",
    family="online",
    loop="greedy-random",
    changes="learns an episode's steps one after the other by a few steps of fitted Q-iteration over random play",
    paper="Laidlaw et al. 2024, The Effective Horizon Explains Deep RL Performance in Stochastic Environments, arXiv:2312.08369",
    config=Config,
    system=15,
    build=build,
    sample=sample,
    estimate=estimate,
    aliases=("shallow-q-iteration",),
)
