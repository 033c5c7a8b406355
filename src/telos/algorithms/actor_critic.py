"""Learning from stored steps: several networks, several losses, and targets that follow. Shared by off-policy, offline and mixed loops of every family.

A method says with `build(config, environment's spaces)` which networks there are (an `Agent`), and with `updates(config)` which losses move which of them.
An improvement draws one batch and takes the updates in their order, each with its own gradient step; then the targets follow their networks.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from telos.algorithms.learning import Learner, OptimiserConfig
from telos.core.config import require
from telos.core.method import Method
from telos.data.transitions import Transitions
from telos.dataflow import Backend
from telos.functional.reduction import Denominators, Losses, means
from telos.models.networks import Activation
from telos.models.policies import Policy


@dataclass(frozen=True, kw_only=True)
class StoredStepsConfig(OptimiserConfig):
    """Options of learning from stored steps."""

    batch_size: int = 256  # steps in one gradient step
    learning_rate: float = 3e-4  # peak, of every network without an option of its own
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # after the warm-up, down to zero at the last gradient step
    max_grad_norm: float = 0.0  # gradients are scaled down to this global norm; 0 = never
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers, of each network
    activation: Activation = "relu"  # between the layers

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "batch_size")


@dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(StoredStepsConfig):
    """Options of learning values from stored steps."""

    gamma: float = 0.99  # discount a step
    tau: float = 0.005  # share of a network that its target takes on, (0, 1]
    layer_norm: bool = False  # in the hidden layers of critics

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and <= 1", "gamma")
        require(self, "> 0 and <= 1", "tau")


class Agent(nn.Module):
    """A policy and the networks that it learns with, by name; `target(name)` is the slow copy of those that have one."""

    def __init__(self, policy: Policy, networks: Mapping[str, nn.Module], targets: Sequence[str] = ()) -> None:
        super().__init__()
        self.policy = policy
        self.networks = nn.ModuleDict(dict(networks))
        # Units are the policy's own, in slow copies too: they are shared, not copied.
        shared = {} if policy.normaliser is None else {id(policy.normaliser): policy.normaliser}
        self.targets = nn.ModuleDict({name: copy.deepcopy(self[name], dict(shared)).requires_grad_(False) for name in targets})
        self.kept: dict[str, tuple[Transitions, Tensor]] = {}  # what losses of one improvement share

    def __getitem__(self, name: str) -> Any:
        return self.policy if name == "policy" else self.networks[name]

    def target(self, name: str) -> Any:
        return self.targets[name]

    def once(self, name: str, batch: Transitions, compute: Callable[[], Tensor]) -> Tensor:
        """What several losses of one improvement need of its batch, computed by the first of them. It must depend on nothing that they move."""
        if name not in self.kept or self.kept[name][0] is not batch:
            self.kept[name] = batch, compute()
        return self.kept[name][1]

    @torch.no_grad()
    def follow(self, share: float, names: Sequence[str] | None = None) -> None:
        """Targets take on `share` of their networks' weights."""
        for name in self.targets if names is None else names:
            slow: Any = list(self.targets[name].parameters())
            fast: Any = list(self[name].parameters())
            if share == 1.0:
                torch._foreach_copy_(slow, fast)  # type: ignore[reportPrivateImportUsage]
            else:
                torch._foreach_lerp_(slow, fast, share)  # type: ignore[reportPrivateImportUsage]


@dataclass(frozen=True)
class Update:
    """One loss of a method: `loss(config, agent, batch, generator)` moves the networks `of`, every `every`-th improvement; the targets `followed` take a
    step after it, in every `follow_every`-th improvement. `learning_rate` None is the option of that name."""

    name: str
    of: tuple[str, ...]
    loss: Callable[..., Losses]
    every: int = 1
    learning_rate: float | None = None
    followed: tuple[str, ...] = ()
    follow_every: int = 1


class Scalar(nn.Module):
    """A number that is learned."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self) -> Tensor:
        return self.value


class Improver:
    """Takes a method's updates, in their order, and counts."""

    def __init__(self, method: Method, config: StoredStepsConfig, agent: Agent, improvements: int, backend: Backend) -> None:
        assert method.updates is not None
        self.config, self.agent = config, agent
        self.updates: tuple[Update, ...] = method.updates(config)
        self.learners = []
        for update in self.updates:
            of = nn.ModuleDict({name: agent[name] for name in update.of})
            own = config if update.learning_rate is None else dataclasses.replace(config, learning_rate=update.learning_rate)
            self.learners.append(backend.place(lambda of=of, own=own, every=update.every: Learner(of, own, -(-improvements // every))))
        self.done = 0
        self.followed = {name for update in self.updates for name in update.followed}

    def improve(self, batch: Transitions, generator: torch.Generator, told: bool = True) -> tuple[dict[str, float], Tensor | None]:
        """One improvement from a batch: (metrics, empty unless `told`; the priorities [B] that a loss gave)."""
        counts = Denominators(len(batch), len(batch))
        self.agent.kept.clear()
        metrics: dict[str, float] = {}
        priorities: list[Tensor] = []

        def losses_of(update: Update) -> Callable[..., Losses]:
            def losses(_: nn.Module, part: Transitions) -> Losses:
                found = update.loss(self.config, self.agent, part, generator)
                if "priority" in found.metrics:
                    priorities.append(found.metrics["priority"].detach())  # type: ignore[union-attr]
                return found

            return losses

        for update, learner in zip(self.updates, self.learners):
            if self.done % update.every:
                continue
            result = learner.call("accumulate", batch, losses=losses_of(update), denominators=counts, told=told)
            applied = learner.call("apply", None)
            if told:
                metrics |= {
                    f"loss/{update.name}": result["loss"],
                    f"grad_norm/{update.name}": applied["grad_norm"],
                    **means(result["metrics"]),
                }
            if update.followed and (self.done + 1) % update.follow_every == 0:
                self._follow(update.followed)
        if rest := [name for name in self.agent.targets if name not in self.followed]:
            self._follow(rest)
        self.done += 1
        metrics.pop("priority", None)
        return metrics, torch.cat(priorities) if priorities else None

    def _follow(self, names: Sequence[str]) -> None:
        assert isinstance(self.config, ActorCriticConfig)
        self.agent.follow(self.config.tau, names)

    def state(self) -> dict[str, Any]:
        return {
            "done": self.done,
            "learners": [learner.workers[0].state() for learner in self.learners],
            "targets": self.agent.targets.state_dict(),
            "buffers": dict(self.agent.named_buffers()),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.done = int(state["done"])
        for learner, one in zip(self.learners, state["learners"], strict=True):
            for worker in learner.workers:
                worker.load(one)
        self.agent.targets.load_state_dict(state["targets"])
        for name, value in self.agent.named_buffers():
            value.copy_(state["buffers"][name])
