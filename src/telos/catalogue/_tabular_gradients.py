"""Policy-gradient methods on many small processes side by side, where the expected return is known exactly: what claims about rates are measured with.

R random processes with a horizon are stacked; a policy has parameters of its own for each step h and state s, so that the best policy of the class is the
best of all. Two classes:

- `gaussian`: a real action x ~ N(θ[h, s], 1), which picks the process's second action with probability σ(x), else the first. Its Fisher matrix is the
  diagonal of the states' probabilities at each step: where every state can be reached it never degenerates.
- `softmax`: θ[h, s, a] are logits. Its Fisher matrix degenerates as the policy becomes deterministic.

Estimates are the loop's (`algorithms.online._loop_policy_gradient`) for one episode without a baseline, in closed form; steps are the methods' own functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from telos.core import config as configs
from telos.core import discovery
from telos.environments.tabular import Tabular
from telos.functional.recursions import Query, Track

PolicyClass = Literal["gaussian", "softmax"]
_NODES, _WEIGHTS = hermegauss(40)


@dataclass(frozen=True, eq=False)
class Processes:
    """R processes of one shape, with horizon H, rewards [S, A] and no terminal states."""

    each: Sequence[Tabular]
    policy_class: PolicyClass

    def __post_init__(self) -> None:
        first = self.each[0]
        if any(p.transitions.shape != first.transitions.shape or p.horizon != first.horizon or p.ending.any() for p in self.each):
            raise ValueError("processes are stacked that have one shape, one horizon and no terminal states")
        if self.policy_class == "gaussian" and first.actions != 2:
            raise ValueError("the Gaussian class chooses between two actions")

    @property
    def horizon(self) -> int:
        assert self.each[0].horizon is not None
        return self.each[0].horizon

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameters of one policy."""
        first = self.each[0]
        return (self.horizon, first.states) + ((first.actions,) if self.policy_class == "softmax" else ())

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @cached_property
    def transitions(self) -> np.ndarray:
        return np.stack([p.transitions for p in self.each])

    @cached_property
    def rewards(self) -> np.ndarray:
        return np.stack([p.expected_rewards for p in self.each])

    @cached_property
    def _cumulative(self) -> np.ndarray:
        """[R S A, S − 1]: a uniform number picks the state that follows by how many of these it is not below."""
        total = self.transitions.cumsum(-1)
        return (total / total[..., -1:])[..., :-1].reshape(-1, total.shape[-1] - 1)

    @cached_property
    def _start(self) -> np.ndarray:
        return np.stack([p.start for p in self.each])

    @cached_property
    def _first(self) -> np.ndarray:
        return self._start.cumsum(-1)[:, :-1]

    @cached_property
    def best(self) -> np.ndarray:
        """[R]: the highest expected return."""
        return np.array([p.start @ p.optimal().state[0] for p in self.each])

    def probabilities(self, parameters: np.ndarray) -> np.ndarray:
        """[R, H, S, A] of each action under parameters [R, P]."""
        theta = parameters.reshape(-1, *self.shape)
        if self.policy_class == "gaussian":
            second = (0.5 + 0.5 * np.tanh((theta[..., None] + _NODES) / 2)) @ (_WEIGHTS / _WEIGHTS.sum())
            return np.stack([1 - second, second], -1)
        raised = np.exp(theta - theta.max(-1, keepdims=True))
        return raised / raised.sum(-1, keepdims=True)

    def suboptimality(self, parameters: np.ndarray) -> np.ndarray:
        """[R]: J* − J, exact up to rounding (Gaussian: and to a quadrature of 40 nodes)."""
        policy = self.probabilities(parameters)
        value = np.zeros(self._start.shape)
        for h in reversed(range(self.horizon)):
            value = (policy[:, h] * (self.rewards + (self.transitions @ value[:, None, :, None])[..., 0])).sum(-1)
        return self.best - (self._start * value).sum(-1)

    def estimate(self, parameters: np.ndarray, draws: np.random.Generator, along: np.ndarray | None = None) -> np.ndarray:
        """[R, P]: the estimate from one episode of each policy: of the gradient, or of the Hessian's product with `along` [R, P]."""
        runs, states, actions = self.rewards.shape
        gaussian = self.policy_class == "gaussian"
        rows, horizon = np.arange(runs), self.horizon
        wide = 1 if gaussian else actions
        theta = parameters.reshape(-1, wide)  # a row for each run, step and state
        law = None if gaussian else self.probabilities(parameters).reshape(-1, actions)
        draw = draws.random((2 * horizon + 1, runs))
        normal = draws.standard_normal((horizon, runs, 1)) if gaussian else np.zeros((horizon, 0, 1))
        logistic = np.log(draw[:horizon] / (1 - draw[:horizon])) if gaussian else draw
        state = (draw[-1][:, None] >= self._first).sum(-1)
        places, scores, rewards = [], [], []
        for h in range(horizon):
            place = (rows * horizon + h) * states + state
            if law is None:  # a logistic number is below x with probability σ(x)
                action = (logistic[h] < theta[place, 0] + normal[h, :, 0]).astype(np.int64)
                scores.append(normal[h])
            else:
                here = law[place]
                action = (draw[h][:, None] >= here.cumsum(-1)[:, :-1]).sum(-1)
                score = -here
                score[rows, action] += 1
                scores.append(score)
            taken = (rows * states + state) * actions + action
            places.append(place)
            rewards.append(self.rewards.reshape(-1)[taken])
            state = (draw[horizon + h][:, None] >= self._cumulative[taken]).sum(-1)
        weights = np.cumsum(rewards[::-1], 0)[::-1, :, None]
        found = np.zeros_like(theta)
        if along is None:
            for place, weight, score in zip(places, weights, scores, strict=True):
                found[place] = weight * score
            return found.reshape(runs, -1)
        there = [along.reshape(-1, wide)[place] for place in places]
        change = np.sum([(score * part).sum(-1, keepdims=True) for score, part in zip(scores, there, strict=True)], 0)
        for place, weight, score, part in zip(places, weights, scores, there, strict=True):
            if law is None:
                curvature = -part  # the second derivative of log N(x; θ, 1) is −1
            else:
                here = law[place]
                curvature = -here * (part - (here * part).sum(-1, keepdims=True))
            found[place] = weight * (change * score + curvature)
        return found.reshape(runs, -1)


def with_gaps(count: int, states: int, actions: int, horizon: int, draws: np.random.Generator) -> list[Tabular]:
    """Random processes: transitions and start uniform on the simplex; in each state one action, drawn alike, has a reward uniform on [1/2, 1] and the others
    minus one of that kind, so that no choice is next to indifferent and rates show before there are very many episodes."""
    found = []
    for _ in range(count):
        rewards = -draws.uniform(0.5, 1.0, (states, actions))
        good = draws.integers(actions, size=states)
        rewards[np.arange(states), good] *= -1
        moves = draws.dirichlet(np.ones(states), (states, actions))
        found.append(Tabular(moves, rewards, draws.dirichlet(np.ones(states)), None, horizon, 1.0))
    return found


def course(
    processes: Processes, method: str, options: dict[str, Any], episodes: int, looked_at: Sequence[int], draws: np.random.Generator
) -> np.ndarray:
    """[len(looked_at), R]: J* − J of a method's runs, one episode an estimate, when so many episodes have been played. `looked_at` rises."""
    found = discovery.load(method)
    config = configs.from_mapping(found.config, {"env": "-", "batch_episodes": 1, "num_envs": 1, "baseline": "none"} | options)
    assert found.advance is not None
    track = Track.start(torch.zeros(len(processes.each), processes.size, dtype=torch.float64))
    out: list[np.ndarray] = []
    for index in range(episodes // config.queries):
        while len(out) < len(looked_at) and index * config.queries >= looked_at[len(out)]:
            out.append(processes.suboptimality(track.parameters.numpy()))
        chance = torch.from_numpy(draws.random((len(processes.each), 1)))
        queries = (Query(track.parameters),) if found.propose is None else found.propose(config, track, chance, index)
        track = found.advance(config, track, tuple(_answer(processes, query, draws) for query in queries), index)
    while len(out) < len(looked_at):
        out.append(processes.suboptimality(track.parameters.numpy()))
    return np.stack(out)


def _answer(processes: Processes, query: Query, draws: np.random.Generator) -> Tensor:
    along = None if query.along is None else query.along.numpy()
    return torch.from_numpy(processes.estimate(query.parameters.numpy(), draws, along))


def exponent(episodes: np.ndarray, suboptimality: np.ndarray) -> float:
    """p in n ∝ ε^−p: minus one over the slope of log ε over log n, fitted by least squares. What does not fall has an infinite one, bounded here by 100."""
    slope = float(np.polyfit(np.log(episodes), np.log(np.maximum(suboptimality, 1e-12)), 1)[0])
    return min(100.0, -1 / slope) if slope < 0 else 100.0
