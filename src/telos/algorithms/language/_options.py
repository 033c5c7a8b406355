"""Options that all loops over language models share, and what they are turned into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from telos.algorithms.learning import OptimiserConfig
from telos.core.config import StepsConfig, require
from telos.core.errors import UsageError
from telos.models.language import LanguageModel, Lora, Precision


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(StepsConfig):
    """Model, data and precision: the same names in every method of this family."""

    model: str = "tinylm"  # Hugging Face folder or hub id, a PEFT adapter's folder, or the bundled 'tinylm'
    tokenizer: str | None = None  # folder or hub id, where the model has none of its own
    chat_template: str | None = None  # file with a Jinja chat template, for conversational data and a tokenizer without one
    data: str = ""  # JSONL, JSON, CSV or Parquet file, dataset folder, hub id (with :split), or a bundled testbed's name
    on_bad_row: Literal["error", "drop"] = "error"  # a bad row stops the run and is named, or is dropped and counted
    max_prompt_length: int = 512  # tokens; longer prompts lose their beginning and are counted
    max_completion_length: int = 256  # tokens; longer answers lose their end and are counted
    overlong: Literal["truncate", "drop", "error"] = "truncate"  # what happens to longer rows
    precision: Precision = "auto"  # of the arithmetic; weights stay float32; auto = bfloat16 on a GPU that has it, float32 elsewhere

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "max_prompt_length", "max_completion_length")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(OptimiserConfig, LanguageConfig):
    """Options of everything that takes optimiser steps."""

    batch_size: int = 16  # rows of the data in one optimiser step, over all micro-batches and workers
    micro_batch_size: int = 0  # rows in one forward–backward pass; 0 = the whole batch at once; changes memory, not gradients
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, about a third more time
    lora_rank: int = 0  # 0 trains all weights; above 0, low-rank adapters of this rank (Hu et al. 2021)
    lora_alpha: float = 16.0  # scale of the adapters, over the rank
    lora_dropout: float = 0.0  # dropout on the adapters' input while gradients are taken, 0 … 1
    lora_targets: tuple[str, ...] = ()  # module names that get adapters; empty = every linear layer

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "lora_rank")
        require(self, ">= 0 and < 1", "lora_dropout")
        if self.lora_rank == 0:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                if getattr(self, name) != TrainingConfig.__dataclass_fields__[name].default:
                    raise UsageError(f"--{name} has no effect while --lora_rank is 0; give a rank")
        require(self, ">= 1", "batch_size")
        require(self, ">= 0", "micro_batch_size")


def lora_of(config: TrainingConfig) -> Lora | None:
    if config.lora_rank == 0:
        return None
    return Lora(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets)


def load_policy(config: LanguageConfig) -> LanguageModel:
    """The model to be trained or sampled from, as the options describe it."""
    return LanguageModel.load(
        config.model,
        tokenizer=config.tokenizer,
        chat_template=config.chat_template,
        lora=lora_of(config) if isinstance(config, TrainingConfig) else None,
        precision=config.precision,
        device=config.device,
    )
