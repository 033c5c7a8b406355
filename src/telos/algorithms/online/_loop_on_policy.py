"""On-policy control: act for a while, estimate, improve, and forget what was seen.

One iteration steps `num_envs` copies `rollout_steps` times with the current policy, hands the `functional.segments.Segment` to the method's
`estimate(config, segment, state)`, and then improves actor and critic over `epochs` passes of minibatches with the method's `loss(config, view)`. A method
with `update(config, agent, segment, estimate)` improves the actor itself, once and from the whole segment (natural gradients); `loss` is then the critic's.

The critic's value of the state that a step led to is taken of that very state, also where the episode was cut there and the next row begins another one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from telos.algorithms.control import ControlConfig, ControlProgram, describe_episodes, open_environments
from telos.algorithms.learning import Learner, OptimiserConfig
from telos.algorithms.online._array_learner import ROWS, ArrayLearner
from telos.core.config import require
from telos.core.errors import Failure, UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import numpy_generator
from telos.dataflow import make_backend
from telos.environments.base import Driver, Episode, take
from telos.functional.distributions import Distribution, Gaussian
from telos.functional.reduction import Denominators, Losses, means
from telos.functional.segments import Estimate, Segment, StepView, explained_variance, flat
from telos.models.networks import Activation, Cached, Pixels, perceptron
from telos.models.policies import Policy, Shape


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(ControlConfig, OptimiserConfig):
    """Options of on-policy control."""

    num_envs: int = 8  # copies that are stepped together
    rollout_steps: int = 256  # steps of each copy in one iteration
    epochs: int = 10  # passes over an iteration's steps
    minibatch_size: int = 64  # steps in one optimiser step; 0 = all of an iteration's
    learning_rate: float = 3e-4  # its highest value in the run
    adam_epsilon: float = 1e-5  # added to the root of the gradient's square, > 0
    max_grad_norm: float = 0.5  # gradients are scaled down to this global norm; 0 = never
    gamma: float = 0.99  # discount a step
    gae_lambda: float = 0.95  # λ of GAE
    hidden: tuple[int, ...] = (64, 64)  # widths of the hidden layers, of actor and critic each
    activation: Activation = "tanh"  # between the layers
    log_std_init: float = 0.0  # log of the Gaussian's deviation at the start, for continuous actions
    normalize_observations: bool = False  # running mean and deviation, kept inside the policy
    normalize_rewards: bool = False  # over the running deviation of the discounted return
    clip_reward: float = 10.0  # bound on the normalised reward

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "rollout_steps", "epochs")
        require(self, ">= 0", "minibatch_size")
        require(self, ">= 0 and <= 1", "gamma", "gae_lambda")
        require(self, "> 0", "clip_reward")
        if not self.normalize_rewards and self.clip_reward != OnPolicyConfig.__dataclass_fields__["clip_reward"].default:
            raise UsageError("--clip_reward has no effect without --normalize_rewards")

    @property
    def steps_an_iteration(self) -> int:
        return self.num_envs * self.rollout_steps


@dataclass(frozen=True, kw_only=True)
class PassesConfig(OnPolicyConfig):
    """Options of several passes over the same steps, by losses that say how far the policy has moved (`policy/approx_kl`)."""

    target_kl: float = 0.0  # estimated KL from the iteration's first policy after which its passes end; 0 = never

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "target_kl")


@dataclass(frozen=True, kw_only=True)
class TrustRegionConfig(OnPolicyConfig):
    """Options of one step of the policy along its natural gradient."""

    max_kl: float = 0.01  # δ: nats that an iteration may move, > 0 (TRPO: 0.01)
    damping: float = 0.1  # added to the Fisher matrix's diagonal, >= 0
    cg_iterations: int = 15  # products with the Fisher matrix for a direction (TRPO: 10)
    backtracks: int = 10  # lengths of a step that are tried, each 0.8 of the one before

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "max_kl")
        require(self, ">= 0", "damping")
        require(self, ">= 1", "cg_iterations", "backtracks")

    @property
    def trust_region(self) -> dict[str, Any]:
        """What `functional.natural.trust_region_step` is asked for."""
        return {"max_kl": self.max_kl, "damping": self.damping, "cg_iterations": self.cg_iterations, "backtracks": self.backtracks}


class ActorCritic(nn.Module):
    """A policy and a critic in the same units, with no weight in common: what one learns does not move the other."""

    def __init__(self, policy: Policy, hidden: tuple[int, ...], activation: Activation) -> None:
        super().__init__()
        self.policy = policy
        self.pixels = Pixels(policy.reader.shape) if policy.reader.picture else None
        wide = self.pixels.size if self.pixels is not None else policy.reader.size
        self.critic = perceptron((wide, *hidden, 1), activation, gains=(math.sqrt(2), 1.0))
        self._fast = Cached()

    def forward(self, observation: Tensor) -> tuple[Distribution, Tensor]:
        """(what is acted by, values [B])."""
        if self.pixels is not None:
            return self.policy.distribution(observation), self.values(observation)
        features = self.policy.features(observation)
        return self.policy.distribution_of(self.policy.body(features)), self.critic(features)[:, 0]

    def values(self, observation: Tensor) -> Tensor:
        return self.critic(self.policy.features(observation) if self.pixels is None else self.pixels(observation))[:, 0]

    def value(self, read: np.ndarray) -> np.ndarray:
        """Values [N] of observations as the reader gave them, without gradient."""
        critic = self._fast.of(self.critic)
        if self.pixels is None and critic is not None:
            return critic(read if self.policy.normaliser is None else self.policy.normaliser.of_array(read))[:, 0]
        parts = torch.from_numpy(read).split(1024)  # pictures take memory
        with torch.no_grad():
            return torch.cat([self.values(part.to(next(self.parameters()).device)) for part in parts]).cpu().numpy()


def actor_critic(config: OnPolicyConfig, policy: Policy) -> ActorCritic:
    """What methods without `build(config, policy)` of their own learn with."""
    return ActorCritic(policy, config.hidden, config.activation)


class Program(ControlProgram):
    """Act, estimate, improve."""

    def __init__(self, method: Method, config: OnPolicyConfig, run: Run) -> None:
        super().__init__(method, config, run)
        self.config = config
        environments = open_environments(config, config.num_envs)
        shape = Shape(
            kind="stochastic",
            hidden=config.hidden,
            activation=config.activation,
            normalise=config.normalize_observations,
            log_std_init=config.log_std_init,
        )
        self.policy = Policy(environments.observation_space, environments.action_space, shape)
        self.model: ActorCritic = (method.build or actor_critic)(config, self.policy).to(self.device)
        self.driver = Driver(environments, config.seed)
        size = config.minibatch_size or config.steps_an_iteration
        updates = config.program_steps * config.epochs * math.ceil(config.steps_an_iteration / size)
        self.arrays = ArrayLearner.fits(method, self.model, config, self.device)
        make = (
            (lambda: ArrayLearner(method, self.model, config, updates)) if self.arrays else (lambda: Learner(self.model, config, updates))
        )
        self.learner = make_backend(config.backend).place(make)
        if self.policy.normaliser is not None:
            self.policy.normaliser.update(self.policy.reader(self.driver.observation))
        self.method_state: dict[str, float] = {}
        self._unchecked = True  # whether this iteration's first ratio is still to be checked
        self.returns = np.zeros(config.num_envs)  # discounted, of the episodes under way, for the scale of rewards
        self.scale = {"count": 0.0, "mean": 0.0, "m2": 0.0}

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        c = self.config
        return {
            "environment": c.env,
            "copies": c.num_envs,
            "environment steps an iteration": c.steps_an_iteration,
            "optimiser steps an iteration": c.epochs * math.ceil(c.steps_an_iteration / (c.minibatch_size or c.steps_an_iteration)),
            "iterations": c.program_steps,
            "environment steps": c.program_steps * c.steps_an_iteration,
            "trained parameters": sum(p.numel() for p in self.learner.workers[0].parameters_to_reduce()),
        }

    # -- one iteration --------------------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        segment, old, episodes = self._collect(index)
        self.last_batch = {f.name: getattr(segment, f.name) for f in dataclasses.fields(segment)}
        assert self.method.estimate is not None
        estimate: Estimate = self.method.estimate(c, segment, self.method_state)
        self.method_state = dict(estimate.state)
        metrics = {"environment_steps": float(self.driver.steps), **describe_episodes(episodes), **estimate.metrics}
        metrics["critic/explained_variance"] = explained_variance(segment.value, estimate.returns)
        if self.method.update is not None:
            metrics |= self.method.update(c, self.model, segment, estimate)
        metrics |= self._learn(index, segment, old, estimate)
        if self.policy.normaliser is not None:  # not before: a ratio compares two policies in the same units
            self.policy.normaliser.update(flat(segment.observation).cpu().numpy())
        metrics |= self.evaluate_if_due(index)
        return metrics

    def _collect(self, index: int) -> tuple[Segment, Tensor, list[Episode]]:
        """An iteration's steps, the policy's outputs at each, and the episodes that ended."""
        c, policy, driver = self.config, self.policy, self.driver
        n, reader = c.num_envs, policy.reader
        observation = np.empty((c.rollout_steps, n, *reader.shape), dtype=reader.dtype)
        actions = policy.actions()
        noise = actions.noise((c.rollout_steps, n, policy.size), numpy_generator(c.seed, "actions", index))
        outputs = np.empty((c.rollout_steps, n, policy.size), dtype=np.float32)
        chosen: list[np.ndarray] = []
        reward, next_value = (np.zeros((c.rollout_steps, n), dtype=np.float32) for _ in range(2))
        terminated, truncated = (np.zeros((c.rollout_steps, n), dtype=bool) for _ in range(2))
        episodes: list[Episode] = []
        for t in range(c.rollout_steps):
            observation[t] = reader(driver.observation)
            outputs[t] = policy.outputs(observation[t])
            action = actions.draw(outputs[t], noise[t])
            outcome, ended = driver.step(policy.to_environment(action))
            chosen.append(action)
            reward[t] = outcome.reward
            terminated[t], truncated[t] = outcome.terminated, outcome.truncated
            if ended and truncated[t].any():
                rows = np.flatnonzero(truncated[t])
                next_value[t, rows] = self.model.value(reader(take(outcome.observation, rows)))
            if c.normalize_rewards:
                reward[t] = self._scaled(outcome.reward, terminated[t] | truncated[t])
            episodes += ended
        value = self.model.value(observation.reshape(-1, *reader.shape)).reshape(c.rollout_steps, n)
        following = np.concatenate([value[1:], self.model.value(reader(driver.observation))[None]])
        next_value = np.where(terminated | truncated, next_value, following)
        action = np.stack(chosen)
        coded = actions.coded(action.reshape(-1, *action.shape[2:]))
        logprob = actions.score(outputs.reshape(-1, policy.size), coded)[0].reshape(c.rollout_steps, n)
        arrays = (observation, action, logprob, reward, value, next_value, terminated, truncated)
        segment = Segment(*(torch.from_numpy(x) for x in arrays))
        return _moved(segment, self.device), torch.from_numpy(outputs).to(self.device), episodes

    def _scaled(self, reward: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Rewards over the running deviation of the discounted return, bounded."""
        self.returns = self.config.gamma * self.returns + reward
        new = self.returns
        n, mean = len(new), float(new.mean())
        delta, total = mean - self.scale["mean"], self.scale["count"] + n
        self.scale = {
            "count": total,
            "mean": self.scale["mean"] + delta * n / total,
            "m2": self.scale["m2"] + float(((new - mean) ** 2).sum()) + delta**2 * self.scale["count"] * n / total,
        }
        self.returns = np.where(ended, 0.0, self.returns)
        deviation = math.sqrt(self.scale["m2"] / total + 1e-8)
        return np.clip(reward / deviation, -self.config.clip_reward, self.config.clip_reward)

    def _learn(self, index: int, segment: Segment, outputs: Tensor, estimate: Estimate) -> dict[str, float]:
        c = self.config
        size = c.minibatch_size or c.steps_an_iteration
        sums: dict[str, tuple[float, float]] = {}
        loss, updates, told = 0.0, 0, {}
        self._unchecked = self.method.update is None  # else the policy has moved already
        one_pass = self._array_pass(segment, estimate) if self.arrays else self._tensor_pass(index, segment, outputs, estimate)
        for epoch in range(c.epochs):
            found = one_pass(numpy_generator(c.seed, "minibatches", index, epoch).permutation(c.steps_an_iteration), size)
            loss += found["loss"]
            updates += found["optimiser_steps"]
            told = {name: found[name] for name in ("grad_norm", "learning_rate")}
            _add(sums, found["metrics"])
            if isinstance(c, PassesConfig) and c.target_kl and means(found["metrics"]).get("policy/approx_kl", 0.0) > c.target_kl:
                break
        return {"loss": loss / updates, **means(sums), **told, "optimiser_steps": float(updates)}

    def _array_pass(self, segment: Segment, estimate: Estimate) -> Callable[[np.ndarray, int], dict[str, Any]]:
        """One pass over the steps in a given order, by gradients that are written out."""
        parts = (segment.observation, segment.action, segment.logprob, segment.value, estimate.advantages, estimate.returns)
        entries = {name: flat(part).numpy() for name, part in zip(ROWS, parts, strict=True)}
        entries["coded"] = self.policy.actions().coded(entries["coded"])
        if self.policy.normaliser is not None:
            entries["observation"] = self.policy.normaliser.of_array(entries["observation"])

        def run(order: np.ndarray, size: int) -> dict[str, Any]:
            rows = {name: entry[order] for name, entry in entries.items()}
            found = self.learner.call("descend", rows, size, self.last_batch)
            self._check_first_ratio(found["gap"])
            return found

        return run

    def _tensor_pass(
        self, index: int, segment: Segment, outputs: Tensor, estimate: Estimate
    ) -> Callable[[np.ndarray, int], dict[str, Any]]:
        """One pass over the steps in a given order, by automatic differentiation of the method's loss."""
        c = self.config
        parts = [segment.observation, segment.action, outputs, segment.logprob, segment.value, estimate.advantages, estimate.returns]
        entries = [flat(part) for part in parts]
        old_log_std = self.policy.log_std.detach().clone() if hasattr(self.policy, "log_std") else None
        progress = index / c.program_steps

        def losses(model: ActorCritic, *rows: Tensor) -> Losses:
            observation, action, out, logprob, value, advantage, returns = rows
            distribution, now = model(observation)
            new = distribution.log_prob(action)
            self._check_first_ratio((new.detach() - logprob).abs().mean())
            old = model.policy.distribution_of(out) if old_log_std is None else Gaussian(out, old_log_std)
            assert self.method.loss is not None
            seen = StepView(distribution, new, now, action, old, logprob, value, advantage, returns, progress)
            return self.method.loss(c, seen)

        def run(order: np.ndarray, size: int) -> dict[str, Any]:
            loss, told, sums, starts = 0.0, {}, {}, range(0, len(order), size)
            for start in starts:
                rows = torch.from_numpy(order[start : start + size]).to(self.device)
                result = self.learner.call(
                    "accumulate", *(entry[rows] for entry in entries), losses=losses, denominators=Denominators(len(rows), len(rows))
                )
                told = self.learner.call("apply", self.last_batch)
                loss += result["loss"]
                _add(sums, result["metrics"])
            return {"loss": loss, "metrics": sums, "optimiser_steps": len(starts), **told}

        return run

    def _check_first_ratio(self, gap: Tensor | float) -> None:
        """Before an iteration's first update, what is trained must be what has acted: their log-probabilities are `gap` nats apart."""
        if not self._unchecked:
            return
        self._unchecked = False
        if gap > 1e-3:
            raise Failure(
                f"the trained policy's log-probabilities differ from those it acted with by {float(gap):.3g} nats before any update: "
                "it acted with other weights, units or another distribution"
            )

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "learner": self.learner.workers[0].state(),
            "buffers": dict(self.model.named_buffers()),
            "driver": self.driver.state(),
            "method": self.method_state,
            "returns": self.returns,
            "scale": self.scale,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        for worker in self.learner.workers:
            worker.load(state["learner"])
        for name, value in self.model.named_buffers():
            value.copy_(state["buffers"][name])
        self.driver.load(state["driver"])
        self.method_state = dict(state["method"])
        self.returns, self.scale = np.array(state["returns"]), dict(state["scale"])

    def finish(self, run: Run) -> None:
        super().finish(run)
        self.driver.environments.close()


def _add(totals: dict[str, tuple[float, float]], more: Mapping[str, tuple[float, float]]) -> None:
    for name, (value, count) in more.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = (before[0] + value, before[1] + count)


def _moved(segment: Segment, device: torch.device) -> Segment:
    if device.type == "cpu":
        return segment
    return Segment(**{f.name: getattr(segment, f.name).to(device) for f in dataclasses.fields(segment)})
