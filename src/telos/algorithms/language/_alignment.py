"""What offline alignment shares, whatever the shape of its data: the reference, scores from a reward, and what the policy does while it learns.

The reference is a frozen model, the policy without its adapter, a soup of models, or a file of log-probabilities computed once
(`--reference_cache`), with which no second model is in memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from telos.algorithms.language._loop_rollouts import layout as rollouts_layout
from telos.algorithms.language._minibatches import MinibatchConfig, MinibatchProgram
from telos.algorithms.language._options import load_policy
from telos.algorithms.language._roles import Reference
from telos.algorithms.language._rows import fingerprint
from telos.algorithms.language._sampling import Writer, open_reward, scorer
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import derive
from telos.data.batches import Prompts
from telos.data.preferences import Scorer
from telos.data.tokenize import Table
from telos.dataflow import Group, make_backend
from telos.functional.policy import sequence_kl
from telos.functional.reduction import masked_mean
from telos.models.generation import Sampling
from telos.models.language import LanguageModel
from telos.models.packing import Answers
from telos.objectives.rewards import RewardSource


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(MinibatchConfig):
    """Options of offline alignment."""

    learning_rate: float = 1e-6  # peak, AdamW
    reference: str | None = None  # model that regularises, or soup:A,B for the mean of models' weights; default: the policy at the start
    reference_cache: str | None = None  # folder that keeps the reference's log-probabilities of the data, by the hash of its weights
    eval_prompts: int = 16  # prompts that the policy answers at each evaluation, for its KL, entropy and length; 0 = none

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "eval_prompts")


@dataclass(frozen=True, kw_only=True)
class ScoredConfig(AlignmentConfig):
    """Options of what scores answers where the data do not."""

    reward: str = ""  # file.py:function, module:function, a reward model's folder or hub id, or gold:TESTBED
    reward_timeout: float = 60.0  # seconds a batch may take in a reward function before it is ended
    reward_on_error: Literal["stop", "invalid"] = "stop"  # a failing reward function stops the run, or its answers are left out and counted

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "reward_timeout")
        for name in ("reward_timeout", "reward_on_error"):
            if not self.reward and getattr(self, name) != ScoredConfig.__dataclass_fields__[name].default:
                raise UsageError(f"--{name} has no effect without --reward")


class AlignmentProgram(MinibatchProgram):
    """A policy, and the reference and the reward where they are needed."""

    config: AlignmentConfig
    kinds: int  # answers a row that the reference scores

    def __init__(self, method: Method, config: AlignmentConfig, run: Run) -> None:
        needs = method.needs
        if "reference" not in needs and (config.reference is not None or config.reference_cache is not None):
            name = "reference" if config.reference is not None else "reference_cache"
            raise UsageError(f"--{name} has no effect on {method.key}, which uses no reference model")
        if config.reference_cache is not None and needs & {"samples", "kl"}:
            raise UsageError(f"--reference_cache cannot serve {method.key}, whose reference scores answers that are not in the data")
        self.reward: RewardSource | None = None
        super().__init__(method, config, run)
        self.writer = make_backend(config.backend).place(lambda: Writer(self.model))
        self.prepare_tables()
        if isinstance(config, ScoredConfig) and config.reward and self.reward is None:
            raise UsageError(f"--reward has no effect on {method.key} with these data and options: nothing asks for scores")
        self.reference: Group[Reference] | None = None
        self.cached: dict[int, _Cache] = {}
        if "reference" in needs:
            self._open_reference()

    def build_model(self) -> LanguageModel:
        return load_policy(self.config)

    def layout(self, batch: Any) -> Answers:
        """The answers of each row, `kinds` of them."""
        raise NotImplementedError

    def prepare_tables(self) -> None:
        """Further columns and a choice of rows, before the reference is asked for anything."""

    # -- scores -------------------------------------------------------------------------------------------------------------------------------

    @property
    def scorer(self) -> Scorer | None:
        """The reward as a function of texts; None where none was named. It is opened when it is first asked for."""
        c = self.config
        if not isinstance(c, ScoredConfig) or not c.reward:
            return None

        def score(*columns: Any) -> Any:
            if self.reward is None:
                self.reward = open_reward(c.reward, timeout=c.reward_timeout, on_error=c.reward_on_error, policy=self.model)
            return scorer(self.reward, self.model)(*columns)

        return score

    # -- reference ----------------------------------------------------------------------------------------------------------------------------

    def _open_reference(self) -> None:
        c = self.config

        def make() -> Group[Reference]:
            return make_backend(c.backend).place(lambda: Reference(self.model, c.reference))

        if c.reference_cache is None:
            self.reference = make()
            return
        weights = _weights_hash(self.model, c)
        for table in filter(None, (self.table, self.eval_table)):
            path = Path(c.reference_cache) / f"{_key(weights, table, self.kinds, self.model.precision)}.safetensors"
            if not path.is_file():
                self.reference = self.reference or make()
                _write_cache(path, self._reference_rows(table))
            self.cached[id(table)] = _Cache(path)
        self.reference = None  # from here on its numbers serve, and its memory is free

    def reference_writer(self) -> Group[Writer]:
        """Draws answers from the reference."""
        assert self.reference is not None
        theirs = self.reference.workers[0]
        return make_backend(self.config.backend).place(lambda: Writer(theirs.model, under=theirs.as_it_scores))

    def _reference_rows(self, table: Table) -> list[np.ndarray]:
        """The reference's log-probabilities of all answers, row by row, `kinds` arrays a row."""
        found, size = [], self.config.micro_batch_size or self.config.batch_size
        for start in range(0, len(table), size):
            batch = self.batch(table, range(start, min(start + size, len(table))))
            values, lengths = self._ask_reference(batch), self.layout(batch).length.view(len(batch), self.kinds).tolist()
            for row, row_lengths in zip(values.cpu().numpy(), lengths, strict=True):
                found += [answer[:length].copy() for answer, length in zip(row, row_lengths, strict=True)]
        return found

    def _ask_reference(self, batch: Any) -> Tensor:
        assert self.reference is not None
        return self.reference.call("logprobs", batch, layout=self.layout, kinds=self.kinds, micro_batch_size=self.config.micro_batch_size)

    def frozen_rows(self, batch: Any) -> tuple[Tensor, ...]:
        if "reference" not in self.method.needs:
            return ()
        if self.cached:
            table = self.eval_table if self._evaluating else self.table
            width = self.layout(batch).ids.shape[1]
            return (self.cached[id(table)].rows(batch.row.tolist(), self.kinds, width).to(self.model.device),)
        return (self._ask_reference(batch),)

    # -- what the policy does -------------------------------------------------------------------------------------------------------------------

    _evaluating = False

    def evaluate(self) -> dict[str, float]:
        self._evaluating = True
        try:
            found = super().evaluate()
        finally:
            self._evaluating = False
        return found | self._describe_policy()

    def _describe_policy(self) -> dict[str, float]:
        """KL from the reference (estimated from the policy's own answers), entropy and length, on held-out prompts where there are some."""
        c, table = self.config, self.eval_table or self.table
        rows = range(min(c.eval_prompts, len(table)))
        room = self.model.context - max((len(table.columns["prompt_ids"][i]) for i in rows), default=0)
        if not rows or room < 1:
            return {}
        batch: Any = table.batch(rows).to(self.model.device)
        prompts = Prompts(prompt_ids=batch.prompt_ids, prompt_length=batch.prompt_length, row=batch.row, batch_size=[len(rows)])
        sampling = Sampling(max_new_tokens=min(c.max_completion_length, room))
        rollouts, _ = self.writer.call("write", prompts, sampling=sampling, seed=derive(c.seed, "diagnostics"))
        with torch.no_grad():
            scores = self.model.logprobs(rollouts_layout(rollouts), want_entropy=True)
        assert scores.entropy is not None
        found = {
            "entropy": float(masked_mean(scores.entropy, rollouts.action_mask)),
            "completions/mean_length": float(rollouts.completion_length.float().mean()),
            "completions/clipped_ratio": float((~rollouts.ended).float().mean()),
        }
        if self.reference is not None:
            theirs = self.reference.call("logprobs", rollouts, layout=rollouts_layout, kinds=1).squeeze(1)
            found["kl"] = float(sequence_kl(scores.logprobs, theirs, rollouts.action_mask).mean())
        return found

    def finish(self, run: Run) -> None:
        super().finish(run)
        if self.reward is not None:
            self.reward.close()


# The cache: one file of all log-probabilities one after another, and where each answer's end -------------------------------------------------


class _Cache:
    def __init__(self, path: Path) -> None:
        try:
            held = load_file(path)
            self.values, self.ends = held["logprobs"], held["ends"]
        except (SafetensorError, KeyError, OSError) as error:
            raise UsageError(f"--reference_cache: {path} cannot be read ({error}); delete it, and it is computed again") from None

    def rows(self, rows: list[int], kinds: int, width: int) -> Tensor:
        """[B, kinds, width], 0 where padded."""
        out = np.zeros((len(rows), kinds, width), np.float32)
        for i, row in enumerate(rows):
            for kind in range(kinds):
                place = row * kinds + kind
                part = self.values[self.ends[place - 1] if place else 0 : self.ends[place]]
                out[i, kind, : len(part)] = part
        return torch.from_numpy(out)


def _write_cache(path: Path, answers: list[np.ndarray]) -> None:
    ends = np.cumsum([len(answer) for answer in answers])
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logprobs": np.concatenate(answers).astype(np.float32), "ends": ends.astype(np.int64)}, partial)
        partial.replace(path)
    except OSError as error:
        raise UsageError(f"--reference_cache {path.parent}: cannot be written: {error.strerror or error}") from None


def _weights_hash(policy: LanguageModel, config: AlignmentConfig) -> str:
    """The SHA-256 of the reference's weights: of the policy as it is loaded, or of the named model's files."""
    digest = hashlib.sha256((config.reference or "").encode())
    if config.reference is None:
        for name, p in sorted(policy.named_parameters()):
            if name.startswith("model.") and ("lora_" not in name or not policy.has_new_adapter):
                digest.update(name.encode() + p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()
    for name in config.reference.removeprefix("soup:").split(","):
        for file in sorted(Path(name.strip()).glob("*.safetensors")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _key(weights: str, table: Table, kinds: int, precision: str) -> str:
    return hashlib.sha256(f"{weights} {fingerprint(table)} {kinds} {precision}".encode()).hexdigest()[:32]
