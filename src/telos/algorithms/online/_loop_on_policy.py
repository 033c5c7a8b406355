"""On-policy control: act for a while, estimate, improve, and forget what was seen.

One iteration steps `num_envs` copies `rollout_steps` times with the current policy, hands the `functional.segments.Segment` to the method's
`estimate(config, segment, state)`, and then improves actor and critic over `epochs` passes of minibatches with the method's `loss(config, view)`. A method
with `update(config, agent, segment, estimate)` improves the actor itself, once and from the whole segment (natural gradients); `loss` is then the critic's.

The critic's value of the state that a step led to is taken of that very state, also where the episode was cut there and the next row begins another one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from telos.algorithms.control import ControlConfig, ControlProgram, describe_episodes, open_environments
from telos.algorithms.learning import Learner, OptimiserConfig
from telos.core.config import require
from telos.core.errors import Failure, UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import numpy_generator, torch_generator
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

    def look(self, read: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the policy's outputs, values [N]) for observations as the reader gave them, without gradient."""
        critic, actor = self._fast.of(self.critic), self.policy.fast
        if self.pixels is not None or critic is None or actor is None:
            with torch.no_grad():
                observation = torch.from_numpy(read).to(next(self.parameters()).device)
                return self.policy(observation).cpu().numpy(), self.values(observation).cpu().numpy()
        if self.policy.normaliser is not None:
            read = self.policy.normaliser.of_array(read)
        return actor(read), critic(read)[:, 0]

    def value(self, read: np.ndarray) -> np.ndarray:
        return self.look(read)[1]


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
        self.model = ActorCritic(self.policy, config.hidden, config.activation).to(self.device)
        self.driver = Driver(environments, config.seed)
        size = config.minibatch_size or config.steps_an_iteration
        updates = config.program_steps * config.epochs * math.ceil(config.steps_an_iteration / size)
        self.learner = make_backend(config.backend).place(lambda: Learner(self.model, config, updates))
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
        generator = torch_generator(c.seed, "actions", index)
        observation = np.empty((c.rollout_steps, n, *reader.shape), dtype=reader.dtype)
        outputs: list[np.ndarray] = []
        actions: list[np.ndarray] = []
        reward, value, next_value = (np.zeros((c.rollout_steps, n), dtype=np.float32) for _ in range(3))
        terminated, truncated = (np.zeros((c.rollout_steps, n), dtype=bool) for _ in range(2))
        episodes: list[Episode] = []
        log_std = policy.log_std.detach().cpu() if hasattr(policy, "log_std") else None
        for t in range(c.rollout_steps):
            read = reader(driver.observation)
            observation[t] = read
            out, value[t] = self.model.look(read)
            action = _behaviour(policy, torch.from_numpy(out), log_std).sample(generator).numpy()
            outcome, ended = driver.step(policy.to_environment(action))
            outputs.append(out)
            actions.append(action)
            reward[t] = outcome.reward
            terminated[t], truncated[t] = outcome.terminated, outcome.truncated
            if truncated[t].any():
                rows = np.flatnonzero(truncated[t])
                next_value[t, rows] = self.model.value(reader(take(outcome.observation, rows)))
            if c.normalize_rewards:
                reward[t] = self._scaled(outcome.reward, terminated[t] | truncated[t])
            episodes += ended
        last = self.model.value(reader(driver.observation))
        over = terminated | truncated
        following = np.concatenate([value[1:], last[None]])
        next_value = np.where(over, next_value, following)
        action_tensor = torch.from_numpy(np.stack(actions))
        out_tensor = torch.from_numpy(np.stack(outputs))
        logprob = _behaviour(policy, flat(out_tensor), log_std).log_prob(flat(action_tensor)).unflatten(0, action_tensor.shape[:2])
        arrays = [torch.from_numpy(x) for x in (reward, value, next_value, terminated, truncated)]
        segment = Segment(torch.from_numpy(observation), action_tensor, logprob, *arrays)
        return _moved(segment, self.device), out_tensor.to(self.device), episodes

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
        parts = [segment.observation, segment.action, outputs, segment.logprob, segment.value, estimate.advantages, estimate.returns]
        entries = [flat(part) for part in parts]
        old_log_std = self.policy.log_std.detach().clone() if hasattr(self.policy, "log_std") else None

        progress = index / c.program_steps
        self._unchecked = self.method.update is None  # else the policy has moved already

        def losses(model: ActorCritic, *rows: Tensor) -> Losses:
            observation, action, out, logprob, value, advantage, returns = rows
            distribution, now = model(observation)
            new = distribution.log_prob(action)
            if self._unchecked:
                self._check_first_ratio(new, logprob)
            old = _behaviour(model.policy, out, old_log_std)
            assert self.method.loss is not None
            seen = StepView(distribution, new, now, action, old, logprob, value, advantage, returns, progress)
            return self.method.loss(c, seen)

        n = c.steps_an_iteration
        size = c.minibatch_size or n
        sums: dict[str, tuple[float, float]] = {}
        loss, updates, told = 0.0, 0, {}
        for epoch in range(c.epochs):
            order = torch.from_numpy(numpy_generator(c.seed, "minibatches", index, epoch).permutation(n)).to(self.device)
            of_pass: dict[str, tuple[float, float]] = {}
            for start in range(0, n, size):
                rows = order[start : start + size]
                result = self.learner.call(
                    "accumulate", *(entry[rows] for entry in entries), losses=losses, denominators=Denominators(len(rows), len(rows))
                )
                told = self.learner.call("apply", self.last_batch)
                loss += result["loss"]
                _add(of_pass, result["metrics"])
                updates += 1
            _add(sums, of_pass)
            if isinstance(c, PassesConfig) and c.target_kl and means(of_pass).get("policy/approx_kl", 0.0) > c.target_kl:
                break
        return {"loss": loss / updates, **means(sums), **told, "optimiser_steps": float(updates)}

    def _check_first_ratio(self, new: Tensor, old: Tensor) -> None:
        """Before an iteration's first update, what is trained must be what has acted."""
        self._unchecked = False
        gap = float((new.detach() - old).abs().mean())
        if gap > 1e-3:
            raise Failure(
                f"the trained policy's log-probabilities differ from those it acted with by {gap:.3g} nats before any update: "
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


def _behaviour(policy: Policy, out: Tensor, log_std: Tensor | None) -> Distribution:
    """The distribution that outputs [B, …] stood for when the deviation was `log_std`."""
    return policy.distribution_of(out) if log_std is None else Gaussian(out, log_std)


def _moved(segment: Segment, device: torch.device) -> Segment:
    if device.type == "cpu":
        return segment
    return Segment(**{f.name: getattr(segment, f.name).to(device) for f in dataclasses.fields(segment)})
