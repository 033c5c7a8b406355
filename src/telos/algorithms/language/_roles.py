"""The roles of language-model programs: who holds which weights, and how batches travel to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from telos.algorithms import learning
from telos.algorithms.language._options import TrainingConfig
from telos.algorithms.learning import micro_batches
from telos.core.errors import UsageError
from telos.dataflow import Role, transfer
from telos.models.language import LanguageModel
from telos.models.packing import Answers


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


class Learner(learning.Learner):
    """A language model that learns: activations are recomputed and adapters drop out while gradients are taken, where the options say so."""

    def __init__(self, model: nn.Module, config: TrainingConfig, optimiser_steps: int) -> None:
        super().__init__(model, config, optimiser_steps)
        if config.gradient_checkpointing:
            recompute_activations(model.model)
        self._modes = [module for name, module in model.named_modules() if _trains(name, module)]

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
        other.tokenizer = policy.tokenizer  # the same words; of models that look at images, also the same images
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
