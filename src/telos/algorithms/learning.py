"""What takes optimiser steps, in every family: the options, the learning rate's course, and the role that holds weights with their optimiser."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from telos.core.config import RunConfig, require
from telos.core.errors import UsageError
from telos.core.loop import NotFinite
from telos.dataflow import Role, transfer
from telos.functional.reduction import Denominators, Losses, MetricSums, total
from telos.models.optimisers import Adan


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig(RunConfig):
    """Options of the optimiser."""

    micro_batch_size: ClassVar[int] = 0  # where losses are sums over rows it is an option; those of control may look at a whole batch
    optimiser: Literal["adamw", "adan"] = "adamw"  # adan: adaptive Nesterov momentum (Xie et al. 2022)
    learning_rate: float = 1e-5  # its highest value in the run
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"  # after the warm-up, down to zero at the last step
    warmup_steps: int = 0  # steps over which the learning rate rises from zero
    weight_decay: float = 0.0  # share of a weight that each step takes away, over the learning rate; >= 0
    adam_beta1: float = 0.9  # decay of the gradient's mean
    adam_beta2: float = 0.999  # decay of the gradient's square
    adam_epsilon: float = 1e-8  # added to the root of the gradient's square, > 0
    adan_betas: tuple[float, float, float] = (0.98, 0.92, 0.99)  # decays of Adan's three moments, each in [0, 1)
    adan_restart: float = 0.0  # how far weights may move until Adan forgets its momentum, >= 0; 0 = any distance
    max_grad_norm: float = 1.0  # gradients are scaled down to this global norm; 0 = never

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
        require(self, ">= 0 and < 1", "adam_beta1", "adam_beta2")
        require(self, "> 0", "adam_epsilon")
        require(self, ">= 0", "adan_restart")
        if not all(0 <= beta < 1 for beta in self.adan_betas):
            raise UsageError(f"--adan_betas {self.adan_betas} must be >= 0 and < 1 each")
        others = ("adan_betas", "adan_restart") if self.optimiser == "adamw" else ("adam_beta1", "adam_beta2")
        for name in others:
            if getattr(self, name) != OptimiserConfig.__dataclass_fields__[name].default:
                raise UsageError(f"--{name} has no effect with --optimiser {self.optimiser}")


def learning_rate_at(config: OptimiserConfig, step: int, steps: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of `steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate


def micro_batches(size: int, batch: Any, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
    """Contiguous parts of `size` rows (0: all at once) of a batch and of tensors with the same rows."""
    count = len(batch)
    step = size or count
    for start in range(0, count, step):
        yield (batch[start : start + step], *(row[start : start + step] for row in rows))


def optimiser_of(config: OptimiserConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"lr": config.learning_rate, "eps": config.adam_epsilon, "weight_decay": config.weight_decay}
    if config.optimiser == "adan":
        return Adan(parameters, betas=config.adan_betas, restart=config.adan_restart, **common)
    return torch.optim.AdamW(parameters, betas=(config.adam_beta1, config.adam_beta2), fused=True, **common)


class Learner(Role):
    """Weights with an optimiser. Gradients of micro-batches and of replicas add up to the gradient of the whole batch (`functional.reduction`)."""

    def __init__(self, model: nn.Module, config: OptimiserConfig, optimiser_steps: int) -> None:
        self.model = model
        self.config = config
        self.optimiser_steps = optimiser_steps
        self.applied = 0
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in self._named]
        if not self._named:
            raise UsageError(
                f"no parameter of {getattr(model, 'source', 'the model')} is trainable: nothing would be learned; check the adapter's folder or use --lora_rank"
            )
        self.optimiser = optimiser_of(config, self._parameters)

    def parameters_to_reduce(self) -> list[nn.Parameter]:
        return [p for _, p in self._named]

    def _training(self) -> contextlib.AbstractContextManager[None]:
        """What is switched on while gradients are taken."""
        return contextlib.nullcontext()

    @transfer(split="rows", collect="sum")
    def accumulate(
        self, batch: Any, *rows: Tensor, losses: Callable[..., Losses], denominators: Denominators, told: bool = True
    ) -> dict[str, Any]:
        """Adds the gradient of `losses(model, part of batch, parts of rows …)` over micro-batches; returns the loss and the metrics' totals, nothing
        unless `told`. Only this role's own weights get a gradient, whatever else the loss was computed through."""
        loss, sums = 0.0, MetricSums()
        with self._training():
            for part in micro_batches(self.config.micro_batch_size, batch, *rows):
                value = losses(self.model, *part)
                scalar = total(value, denominators)
                scalar.backward(inputs=self._parameters)
                if not told:
                    continue
                loss += scalar.item()
                for term in (value, *value.extra):
                    sums.add(term.metrics)
        return {"loss": loss, "metrics": sums.totals()}

    @transfer(split="rows", collect="sum")
    def assess(self, batch: Any, *rows: Tensor, losses: Callable[..., Losses], denominators: Denominators) -> dict[str, Any]:
        """As `accumulate`, without gradients: loss and metrics on held-out rows."""
        loss, sums = 0.0, MetricSums()
        with torch.no_grad():
            for part in micro_batches(self.config.micro_batch_size, batch, *rows):
                value = losses(self.model, *part)
                loss += total(value, denominators).item()
                for term in (value, *value.extra):
                    sums.add(term.metrics)
        return {"loss": loss, "metrics": sums.totals()}

    @transfer(split="broadcast", collect="first", sum_gradients=True)
    def apply(self, batch: Mapping[str, Any] | None = None) -> dict[str, float]:
        """One optimiser step with the gradients that have added up. Raises `NotFinite` (with `batch`) before a bad gradient touches a weight."""
        rate = learning_rate_at(self.config, self.applied, self.optimiser_steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        limit = self.config.max_grad_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_([p for _, p in self._named], limit))
        if not math.isfinite(norm):
            self.optimiser.zero_grad(set_to_none=True)
            raise NotFinite(f"optimiser step {self.applied + 1}: the gradient's norm is {norm}", batch or {})
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.applied += 1
        return {"grad_norm": norm, "learning_rate": rate}

    @transfer(split="broadcast", collect="first")
    def weights(self) -> dict[str, Tensor]:
        """A copy of the trained weights."""
        return {name: p.detach().clone() for name, p in self._named}

    @transfer(split="broadcast", collect="first")
    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replaces the trained weights; the optimiser's moments stay."""
        with torch.no_grad():
            for name, p in self._named:
                p.copy_(weights[name])

    @transfer(split="broadcast", collect="first")
    def restart(self, weights: Mapping[str, Tensor]) -> None:
        """Replaces the trained weights and forgets the optimiser's moments; the schedule of the learning rate goes on."""
        self.set_weights(weights)
        self.optimiser.state.clear()

    def state(self) -> dict[str, Any]:
        """Trained weights, optimiser and counter; frozen weights are read again from their folder."""
        return {
            "weights": {name: p.detach() for name, p in self._named},
            "optimiser": self.optimiser.state_dict()["state"],
            "applied": self.applied,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        weights = state["weights"]
        if weights.keys() != {name for name, _ in self._named}:
            raise UsageError("the checkpoint holds other parameters than this model trains: the model or its adapter options have changed")
        with torch.no_grad():
            for name, p in self._named:
                p.copy_(weights[name])
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": state["optimiser"], "param_groups": groups})
        self.applied = state["applied"]
