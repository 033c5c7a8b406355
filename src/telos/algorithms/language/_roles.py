"""The roles of language-model programs: who holds which weights, and how batches travel to them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from telos.algorithms.language._options import TrainingConfig
from telos.core.errors import UsageError
from telos.core.loop import NotFinite
from telos.dataflow import Role, transfer
from telos.functional.reduction import Denominators, Losses, MetricSums, total
from telos.models.language import LanguageModel
from telos.models.packing import Answers


def learning_rate_at(config: TrainingConfig, step: int, steps: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of `steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.lr_schedule == "linear":
        return config.learning_rate * (1 - progress)
    if config.lr_schedule == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate


def recompute_activations(model: Any) -> None:
    """Switches activation checkpointing on. Raises `UsageError` for a model without it."""
    try:
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable({"use_reentrant": False})
        else:  # the name before transformers 5.20
            model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"--gradient_checkpointing: {error}") from None


def _trains(name: str, module: nn.Module) -> bool:
    """Whether a module acts otherwise in training mode by an option of ours: layers that recompute, adapters' dropout."""
    return bool(getattr(module, "gradient_checkpointing", False)) or ("lora_dropout" in name and isinstance(module, nn.Dropout))


class Learner(Role):
    """Weights with an optimiser. Gradients of micro-batches and of replicas add up to the gradient of the whole batch (`functional.reduction`)."""

    def __init__(self, model: nn.Module, config: TrainingConfig, optimiser_steps: int) -> None:
        self.model = model
        self.config = config
        self.optimiser_steps = optimiser_steps
        self.applied = 0
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not self._named:
            raise UsageError(
                f"no parameter of {getattr(model, 'source', 'the model')} is trainable: nothing would be learned; check the adapter's folder or use --lora_rank"
            )
        if config.gradient_checkpointing:
            recompute_activations(model.model)
        self._modes = [module for name, module in model.named_modules() if _trains(name, module)]
        self.optimiser = torch.optim.AdamW(
            [p for _, p in self._named],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )

    def parameters_to_reduce(self) -> list[nn.Parameter]:
        return [p for _, p in self._named]

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        """Training mode for the modules that were asked to have one; the model's own dropout stays off, so that its probabilities are the sampler's."""
        for module in self._modes:
            module.training = True
        try:
            yield
        finally:
            for module in self._modes:
                module.training = False

    @transfer(split="rows", collect="sum")
    def accumulate(self, batch: Any, *rows: Tensor, losses: Callable[..., Losses], denominators: Denominators) -> dict[str, Any]:
        """Adds the gradient of `losses(model, part of batch, parts of rows …)` over micro-batches; returns the loss and the metrics' totals."""
        loss, sums = 0.0, MetricSums()
        with self._training():
            for part in micro_batches(self.config.micro_batch_size, batch, *rows):
                value = losses(self.model, *part)
                scalar = total(value, denominators)
                scalar.backward()
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


class Scorer(Role):
    """Log-probabilities under the current weights of a model that others train or keep frozen."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def as_it_scores(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which the model is the one that scores."""
        return contextlib.nullcontext()

    @transfer(split="rows", collect="rows")
    def logprobs(self, batch: Any, *, layout: Callable[[Any], Answers], kinds: int, micro_batch_size: int = 0, **options: Any) -> Tensor:
        """[B, kinds, La]: token log-probabilities of the answers that `layout` finds in `batch`, `kinds` a row."""
        parts = []
        with torch.no_grad(), self.as_it_scores():
            for (part,) in micro_batches(micro_batch_size, batch):
                answers = layout(part)
                parts.append(self.model.logprobs(answers, **options).logprobs.view(-1, kinds, answers.ids.shape[1]))
        return torch.cat(parts)

    def weights(self) -> dict[str, Tensor]:
        """A copy of its weights by name."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    @transfer(split="broadcast", collect="first")
    def approach(self, weights: Mapping[str, Tensor], *, share: float) -> None:
        """Moves to (1 − share) of its own weights and `share` of those given."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in weights:
                    p.lerp_(weights[name].to(p), share)


class Reference(Scorer):
    """A frozen model, or the policy with its new adapter switched off: the distribution that regularises."""

    def __init__(self, policy: LanguageModel, source: str | None = None) -> None:
        """`source` names another model with the same tokenizer, or `soup:A,B` the mean of several models' weights (Wortsman et al. 2022); None
        takes the policy as it is now."""
        # Without a new adapter the policy is what it is at the start; without one that was loaded it is something else.
        self.shared = source is None and policy.has_new_adapter
        super().__init__(policy if self.shared else policy.frozen_copy() if source is None else _other_model(policy, source))

    def as_it_scores(self) -> contextlib.AbstractContextManager[Any]:
        return self.model.adapter_off() if self.shared else contextlib.nullcontext()


def _other_model(policy: LanguageModel, source: str) -> LanguageModel:
    names = source.removeprefix("soup:").split(",") if source.startswith("soup:") else [source]
    names = [name.strip() for name in names if name.strip()]
    if source.startswith("soup:") and len(names) < 2:
        raise UsageError(f"--reference {source}: a soup is the mean of at least two models, soup:A,B")
    mean: LanguageModel | None = None
    for name in names:
        other = LanguageModel.load(name, precision=policy.precision, device=str(policy.device))
        if other.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise UsageError(f"--reference {name} has another vocabulary than {policy.source}; log-probabilities could not be compared")
        mean = other if mean is None else _add_weights(mean, other, name)
    assert mean is not None
    with torch.no_grad():
        for parameter in mean.parameters():
            parameter.div_(len(names))
    mean.requires_grad_(False)
    return mean


def _add_weights(total_: LanguageModel, other: LanguageModel, name: str) -> LanguageModel:
    mine, theirs = dict(total_.named_parameters()), dict(other.named_parameters())
    if {key: p.shape for key, p in mine.items()} != {key: p.shape for key, p in theirs.items()}:
        raise UsageError(f"--reference soup: {name} has other weights than {total_.source}; only models of one shape have a mean")
    with torch.no_grad():
        for key, p in mine.items():
            p.add_(theirs[key])
    return total_


def micro_batches(size: int, batch: Any, *rows: Tensor) -> Iterator[tuple[Any, ...]]:
    """Contiguous parts of `size` rows (0: all at once) of a batch and of tensors with the same rows."""
    count = len(batch)
    step = size or count
    for start in range(0, count, step):
        yield (batch[start : start + step], *(row[start : start + step] for row in rows))
