"""A learner of small actors and critics on the CPU whose gradients are written out, by NumPy (`functional.closed_form`, `models.backprop`).

It takes the steps that `algorithms.learning.Learner` takes from the method's `loss`, in a small part of the time: a minibatch of 64 steps through networks
of 64 × 64 needs 0.06 ms of matrix products, and torch more than a millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from telos.algorithms.learning import Learner, OptimiserConfig, learning_rate_at
from telos.core.errors import UsageError
from telos.core.loop import NotFinite
from telos.core.method import Method
from telos.dataflow import transfer
from telos.functional.closed_form import StepArrays
from telos.models.backprop import Backprop
from telos.models.policies import Policy

ROWS = ("observation", "coded", "old_logprob", "old_value", "advantage", "returns")


class ArrayLearner(Learner):
    """Weights in one array, with their gradients and AdamW's moments in others like it. `model` has a stochastic `policy` and a `critic`."""

    def __init__(self, method: Method, model: Any, config: OptimiserConfig, optimiser_steps: int) -> None:
        super().__init__(model, config, optimiser_steps)
        assert method.slopes is not None
        self.slopes: Callable[..., Any] = method.slopes
        flat = torch.cat([p.detach().reshape(-1) for p in self._parameters])
        self.flat = flat.numpy()
        self.gradient, self.mean, self.square, self.spare = (np.zeros_like(self.flat) for _ in range(4))
        self.gradients: dict[nn.Parameter, np.ndarray] = {}
        start = 0
        for p in self._parameters:
            here = slice(start, start + p.numel())
            p.data = flat[here].view(p.shape)
            self.gradients[p] = self.gradient[here].reshape(p.shape)
            start = here.stop
        policy: Policy = model.policy
        self.actions = policy.actions()
        self.actor = Backprop(policy.body, self.gradients.__getitem__)
        self.critic = Backprop(model.critic, self.gradients.__getitem__)
        self.log_std = self.gradients[policy.log_std] if hasattr(policy, "log_std") else None

    @staticmethod
    def fits(method: Method, model: Any, config: OptimiserConfig, device: torch.device) -> bool:
        """Whether the method's derivatives, the networks of `model` (its `policy` and its `critic`) and the optimiser are written out."""
        perceptrons = model.policy.pixels is None and Backprop.supports(model.policy.body) and Backprop.supports(model.critic)
        return perceptrons and method.slopes is not None and config.optimiser == "adamw" and device.type == "cpu"

    @transfer(split="broadcast", collect="first")
    def descend(self, rows: Mapping[str, np.ndarray], size: int, batch: Mapping[str, Any]) -> dict[str, Any]:
        """One pass over `rows` (`ROWS`, observations in the networks' units) in their order, an optimiser step for every `size` of them. `gap` is how far the
        first minibatch's log-probabilities were from the old ones. Raises `NotFinite` (with `batch`) before a bad gradient touches a weight."""
        n = len(rows["advantage"])
        metrics: dict[str, np.ndarray] = {}
        losses = np.empty(n, dtype=np.float32)
        gap, told = 0.0, {}
        columns = [rows[name] for name in ROWS]
        for start in range(0, n, size):
            part = slice(start, min(start + size, n))
            count = part.stop - start
            observation, coded, *kept = [column[part] for column in columns]
            outputs, value = self.actor.forward(observation), self.critic.forward(observation)[:, 0]
            logprob, entropy, saved = self.actions.score(outputs, coded)
            found = self.slopes(self.config, StepArrays(logprob, entropy, value, *kept))
            if not start:
                gap = float(np.abs(logprob - kept[0]).mean())
                metrics = {name: np.empty(n, dtype=np.float32) for name in found.metrics}
            for name, values in found.metrics.items():
                metrics[name][part] = values
            losses[part] = found.loss
            of_outputs, of_log_std = self.actions.slope(saved, found.logprob, found.entropy)
            self.actor.backward(of_outputs)
            self.critic.backward(found.value[:, None])
            if self.log_std is not None:
                self.log_std[:] = of_log_std
            told = self._step(count, batch)
        totals = {name: (float(values.sum(dtype=np.float64)), float(n)) for name, values in metrics.items()}
        starts = np.arange(0, n, size)
        loss = float((np.add.reduceat(losses, starts) / np.diff(starts, append=n)).sum())
        return {"loss": loss, "metrics": totals, "gap": gap, "optimiser_steps": len(starts), **told}

    def _step(self, count: int, batch: Mapping[str, Any]) -> dict[str, float]:
        """AdamW's step (Loshchilov and Hutter 2019, Algorithm 2) with the gradient, which was summed over `count` rows, scaled down to the allowed norm. The
        moments are kept without their factors 1 − β, which saves a pass over the weights each."""
        c, gradient, spare = self.config, self.gradient, self.spare
        rate = learning_rate_at(c, self.applied, self.optimiser_steps)
        norm = math.sqrt(float(gradient @ gradient)) / count
        if not math.isfinite(norm):
            raise NotFinite(f"optimiser step {self.applied + 1}: the gradient's norm is {norm}", batch)
        too_long = c.max_grad_norm and norm > c.max_grad_norm
        gradient *= (c.max_grad_norm / (norm + 1e-6) if too_long else 1.0) / count
        self.applied += 1
        self.mean *= c.adam_beta1
        self.mean += gradient
        self.square *= c.adam_beta2
        self.square += np.multiply(gradient, gradient, out=spare)
        of_mean = (1 - c.adam_beta1) / (1 - c.adam_beta1**self.applied)
        of_root = math.sqrt((1 - c.adam_beta2) / (1 - c.adam_beta2**self.applied))
        np.sqrt(self.square, out=spare)
        spare += c.adam_epsilon / of_root
        np.divide(self.mean, spare, out=spare)
        spare *= rate * of_mean / of_root
        if c.weight_decay:
            self.flat *= 1 - rate * c.weight_decay
        self.flat -= spare
        return {"grad_norm": norm, "learning_rate": rate}

    def state(self) -> dict[str, Any]:
        return super().state() | {"optimiser": {"mean": self.mean, "square": self.square}}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load({**state, "optimiser": {}})
        moments = state["optimiser"]
        if moments.keys() != {"mean", "square"}:
            raise UsageError("the checkpoint holds another optimiser's state: options that choose the optimiser or the device have changed")
        self.mean[:], self.square[:] = moments["mean"], moments["square"]
