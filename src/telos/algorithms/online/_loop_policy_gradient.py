"""Policy gradients from whole episodes: play, estimate, take one step of a recursion.

Step t of the run asks the method where it wants to know something: `propose(config, track, chance, t)`, with a number drawn uniformly from [0, 1), gives
`recursions.Query` values (a method without it: the gradient at the current parameters). It plays `batch_episodes` whole episodes with the policy of each
query's parameters, forms the estimate there, and hands the estimates, in the same order, to `advance(config, track, found, t)`, which returns the
`recursions.Track` of step t + 1.

With Ψ_h = Σ_{i ≥ h} γ^i r_i, less a baseline that does not depend on the episode itself, and Φ(θ) = Σ_h Ψ_h log π_θ(a_h | s_h), the estimates are means
over episodes of

    gradient   ∇Φ                                                                            (GPOMDP, Baxter and Bartlett 2001)
    product    B u = ∇Φ · (∇log p(τ)ᵀ u) + ∇²Φ u,   log p(τ) = Σ_h log π(a_h | s_h)          (Shen et al. 2019, Hessian-aided policy gradient)

which are unbiased for the gradient of E[Σ_h γ^h r_h] and for its Hessian's product with u. The gradient is taken of the method's `loss(config, view)`,
values of each step whose sum over an episode is minimised: −Ψ log π, and what a method adds to it. The product is of Φ alone.

Episodes last until the environment ends or cuts them; a cut counts as an end, so that the objective is that of the environment with its limit of steps. Every
step begins new episodes: nothing of the environment has to be saved.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from telos.algorithms.control import ControlProgram, EnvironmentConfig, describe_episodes, open_environments
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.loop import NotFinite
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import numpy_generator, torch_generator
from telos.dataflow import Role, make_backend, transfer
from telos.environments.base import Driver, Episode, Observation, Outcome, play
from telos.functional.distributions import Distribution
from telos.functional.natural import flat
from telos.functional.recursions import Query, Track
from telos.functional.reduction import Denominators, Losses, MetricSums, means, total
from telos.models.networks import Activation
from telos.models.policies import Policy, Shape


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig(EnvironmentConfig):
    """Options of policy gradients from whole episodes."""

    total_episodes: int = 10_000  # episodes of the run
    batch_episodes: int = 16  # episodes of each estimate (papers of sample complexity: 1)
    num_envs: int = 16  # copies that are stepped together, <= batch_episodes
    step_size: float = 0.1  # γ_0: length of the first step, or its factor on the gradient, > 0
    gamma: float = 0.99  # discount a step
    baseline: Literal["none", "others"] = (
        "others"  # what returns are compared with: nothing, or the mean of the batch's other episodes at the same step
    )
    hidden: tuple[int, ...] = (64, 64)  # widths of the hidden layers; none: linear in the observation
    activation: Activation = "tanh"  # between the layers
    log_std_init: float = 0.0  # log of the Gaussian's deviation at the start, for continuous actions

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "total_episodes", "batch_episodes", "num_envs")
        require(self, "> 0", "step_size")
        require(self, ">= 0 and <= 1", "gamma")
        if self.num_envs > self.batch_episodes:
            raise UsageError(
                f"--num_envs {self.num_envs} copies cannot share --batch_episodes {self.batch_episodes}: at most one copy an episode"
            )
        if self.baseline == "others" and self.batch_episodes < 2:
            raise UsageError("--baseline others needs --batch_episodes 2 or more; with one episode there is --baseline none")

    @property
    def queries(self) -> int:
        """Estimates that the method asks for in each step."""
        return 1

    @property
    def program_steps(self) -> int:
        return math.ceil(self.total_episodes / (self.batch_episodes * self.queries))


@dataclass(frozen=True)
class Episodes:
    """N whole episodes of one policy, padded to the longest; T steps."""

    observation: Tensor  # [N, T, …] as networks read them
    action: Tensor  # [N, T] or [N, T, D]
    reward: Tensor  # [N, T], 0 after the end
    mask: Tensor  # [N, T] bool: the step was taken


@dataclass(frozen=True)
class StepsView:
    """What a loss sees of the M steps of a batch's episodes."""

    distribution: Distribution  # of the actions, with gradient
    logprob: Tensor  # [M] with gradient
    weight: Tensor  # [M] Ψ
    index: int  # of the run's step, from 0


def reward_to_go(episodes: Episodes, gamma: float, baseline: str) -> Tensor:
    """Ψ [N, T]: Σ_{i ≥ h} γ^i r_i, with `others` less its mean over the other episodes (0 where one is over). Independent of the episode's own actions, the
    baseline leaves gradient and product unbiased."""
    steps = torch.arange(episodes.reward.shape[1], dtype=episodes.reward.dtype, device=episodes.reward.device)
    weights = (gamma**steps * episodes.reward).flip(1).cumsum(1).flip(1)
    if baseline == "others":
        weights = weights - (weights.sum(0) - weights) / (len(weights) - 1)
    return weights


class Estimator(Role):
    """A policy whose parameters are set as one vector, and the estimates at them."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._parameters = [p for p in policy.parameters() if p.requires_grad]

    def parameters_to_reduce(self) -> list[Any]:
        return self._parameters

    @transfer(split="broadcast", collect="first")
    def parameters(self) -> Tensor:
        """[P] a copy."""
        return flat(self._parameters).detach().clone()

    @transfer(split="broadcast", collect="none")
    def place(self, vector: Tensor) -> None:
        """Sets the parameters to parts of `vector` [P], in their order."""
        torch.nn.utils.vector_to_parameters(vector, self._parameters)

    @transfer(split="rows", collect="sum")
    def gradient(
        self,
        observation: Tensor,
        action: Tensor,
        weight: Tensor,
        mask: Tensor,
        *,
        loss: Callable[[StepsView], Losses],
        index: int,
        count: int,
    ) -> dict[str, Any]:
        """Minus the gradient [P] of the loss, summed over steps and over `count` episodes divided; with loss and metrics' totals."""
        distribution = self.policy.distribution(observation[mask])
        logprob = distribution.log_prob(action[mask])
        found = loss(StepsView(distribution, logprob, weight[mask], index))
        value = total(found, Denominators(count, count))
        sums = MetricSums()
        sums.add(found.metrics)
        ascent = -flat(torch.autograd.grad(value, self._parameters, materialize_grads=True))
        return {"gradient": ascent, "loss": value.item(), "metrics": sums.totals()}

    @transfer(split="rows", collect="sum")
    def product(self, observation: Tensor, action: Tensor, weight: Tensor, mask: Tensor, *, along: Tensor, count: int) -> Tensor:
        """B u [P] for u = `along`, summed over episodes and divided by `count`."""
        logprob = self.policy.distribution(observation[mask]).log_prob(action[mask])
        # The gradient of Σ w log π is linear in w: the derivative of its product with u says how each step's log π changes along u.
        w = torch.ones_like(logprob, requires_grad=True)
        slope = flat(torch.autograd.grad((w * logprob).sum(), self._parameters, create_graph=True, materialize_grads=True))
        (change,) = torch.autograd.grad(slope @ along, w, create_graph=True)
        row = mask.nonzero()[:, 0]
        of_episode = torch.zeros(len(mask), dtype=change.dtype, device=change.device).index_add(0, row, change.detach())
        surrogate = (weight[mask] * (change + of_episode[row] * logprob)).sum() / count
        return flat(torch.autograd.grad(surrogate, self._parameters, materialize_grads=True)).detach()


class Program(ControlProgram):
    """Play where the method asks, estimate, step."""

    def __init__(self, method: Method, config: PolicyGradientConfig, run: Run) -> None:
        super().__init__(method, config, run)
        self.config = config
        self.environments = open_environments(config, config.num_envs)
        shape = Shape(kind="stochastic", hidden=config.hidden, activation=config.activation, log_std_init=config.log_std_init)
        self.policy = Policy(self.environments.observation_space, self.environments.action_space, shape).to(self.device)
        self.model = self.policy
        self.learner = make_backend(config.backend).place(lambda: Estimator(self.policy))
        self.track = Track.start(self.learner.call("parameters"))
        self.steps = 0  # environment steps of all copies

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        c = self.config
        return {
            "environment": c.env,
            "copies": c.num_envs,
            "episodes an estimate": c.batch_episodes,
            "estimates a step": c.queries,
            "steps": c.program_steps,
            "episodes": c.program_steps * c.queries * c.batch_episodes,
            "trained parameters": self.track.parameters.numel(),
        }

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        track = self.track.at(self.learner.call("parameters"))
        chance = torch.from_numpy(numpy_generator(c.seed, "chance", index).random(1)).to(track.parameters)
        queries = (Query(track.parameters),) if self.method.propose is None else self.method.propose(c, track, chance, index)
        found: list[Tensor] = []
        metrics: dict[str, float] = {}
        for number, query in enumerate(queries):
            estimate, told = self._estimate(query, index, number)
            found.append(estimate)
            metrics |= told
        assert self.method.advance is not None
        self.track = self.method.advance(c, track, tuple(found), index)
        moved = float((self.track.parameters - track.parameters).norm())
        if not math.isfinite(moved):
            raise NotFinite(f"step {index + 1}: the policy would move by {moved}", self.last_batch)
        self.learner.call("place", self.track.parameters)
        metrics |= {"environment_steps": float(self.steps), "policy/step": moved, "policy/direction": float(self.track.direction.norm())}
        return metrics | self.evaluate_if_due(index)

    def _estimate(self, query: Query, index: int, number: int) -> tuple[Tensor, dict[str, float]]:
        """One estimate, and the numbers to log of one that is a gradient."""
        c = self.config
        self.learner.call("place", query.parameters)
        driver = Driver(self.environments, c.seed, "step", index, number)
        episodes, ended = collect(self.policy, driver, c.batch_episodes, torch_generator(c.seed, "actions", index, number))
        self.steps += driver.steps
        episodes = Episodes(*(getattr(episodes, f.name).to(self.device) for f in dataclasses.fields(episodes)))
        weight = reward_to_go(episodes, c.gamma, c.baseline)
        rows = (episodes.observation, episodes.action, weight, episodes.mask)
        self.last_batch = {f.name: getattr(episodes, f.name) for f in dataclasses.fields(episodes)}
        if query.along is not None:
            return self.learner.call("product", *rows, along=query.along, count=c.batch_episodes), {}
        assert self.method.loss is not None
        method_loss = self.method.loss
        result = self.learner.call("gradient", *rows, loss=lambda view: method_loss(c, view), index=index, count=c.batch_episodes)
        gradient = result["gradient"]
        norm = float(gradient.norm())
        if not math.isfinite(norm):
            raise NotFinite(f"step {index + 1}: the gradient's norm is {norm}", self.last_batch)
        return gradient, {**describe_episodes(ended), "loss": result["loss"], "grad_norm": norm, **means(result["metrics"])}

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        track = self.track.at(self.learner.call("parameters"))
        return {"track": {f.name: getattr(track, f.name) for f in dataclasses.fields(track)}, "steps": self.steps}

    def load(self, state: Mapping[str, Any]) -> None:
        self.track = Track(**{name: value.to(self.device) for name, value in state["track"].items()})
        self.learner.call("place", self.track.parameters)
        self.steps = int(state["steps"])

    def finish(self, run: Run) -> None:
        super().finish(run)
        self.environments.close()


def collect(policy: Policy, driver: Driver, count: int, generator: torch.Generator) -> tuple[Episodes, list[Episode]]:
    """`count` whole episodes by actions drawn from the policy."""
    kept: list[tuple[np.ndarray, ...]] = []
    read = action = np.zeros(0)

    def act(seen: Observation, done: np.ndarray, episode: np.ndarray) -> np.ndarray:
        nonlocal read, action
        read = policy.reader(seen)
        action = policy.choose(read, deterministic=False, generator=generator)
        return policy.to_environment(action)

    def see(done: np.ndarray, episode: np.ndarray, outcome: Outcome) -> None:
        mine = np.flatnonzero(episode < count)
        kept.append((episode[mine], done[mine], read[mine], action[mine], outcome.reward[mine]))

    ended = play(driver, count, act, see)
    row, place, observation, taken, reward = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    longest = int(place.max()) + 1

    def padded(values: np.ndarray) -> Tensor:
        out = np.zeros((count, longest, *values.shape[1:]), dtype=values.dtype)
        out[row, place] = values
        return torch.from_numpy(out)

    taken_at = padded(np.ones(len(row), dtype=bool))
    return Episodes(padded(observation), padded(taken), padded(reward.astype(np.float32)), taken_at), ended
