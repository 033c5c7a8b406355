"""Methods that label the steps of sampled answers by what comes of them, and change no weight. A step works on one batch of prompts.

The policy answers each prompt, the answers are cut into steps, and completions are sampled from the prompt and from after each step (see `step_labels`), by the
policy or, under `ProverConfig`, by a prover. A method's `estimate(config, successes)` takes an answer's `step_labels.Successes` and returns the labels
of the prompt and of its S steps, [S + 1] in [0, 1].

`stepwise.jsonl` in the run's folder gets a row for each answer: prompt, completions (its steps), labels, prompt_label, advantages, success (of the answer as
it stands), `step_separator` '' (the steps hold their own separators), and the data's other columns. `telos train process-reward --data` reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telos.algorithms.language._loop_rollouts import score
from telos.algorithms.language._loop_sampling import Program as SamplingProgram
from telos.algorithms.language._loop_sampling import SamplingConfig
from telos.algorithms.language._sampling import Writer
from telos.algorithms.language._steps import CutConfig, cut_of, require_decoder
from telos.algorithms.language.step_labels import estimate_successes
from telos.core.config import require
from telos.core.errors import Failure, UsageError
from telos.core.method import Method
from telos.core.run import JsonLines, Run
from telos.core.seeds import derive
from telos.data.batches import Rollouts
from telos.dataflow import make_backend
from telos.models.generation import Sampling
from telos.models.language import LanguageModel
from telos.objectives.process_reward import step_ends, token_texts
from telos.objectives.rewards import require_some


@dataclass(frozen=True, kw_only=True)
class StepsConfig(SamplingConfig, CutConfig):
    """Options of labelling steps."""

    n: int = 4  # answers to each prompt whose steps are labelled
    completions: int = 8  # m: completions from the prompt and from after each step
    success_above: float = 0.5  # an answer succeeds when its reward is greater than this

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "completions")


@dataclass(frozen=True, kw_only=True)
class ProverConfig(StepsConfig):
    """Options of labelling steps by the success of another policy."""

    prover: str | None = None  # model that completes; default: the policy itself
    prover_best_of: int = 1  # K: success is that of the best of K completions, 1 … completions

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "prover_best_of")
        if self.prover_best_of > self.completions:
            raise UsageError(f"--prover_best_of {self.prover_best_of} needs at least as many --completions, not {self.completions}")


class Program(SamplingProgram):
    config: StepsConfig

    def __init__(self, method: Method, config: StepsConfig, run: Run) -> None:
        super().__init__(method, config, run)
        require_decoder(self.model)
        self.lines = JsonLines(run.path / "stepwise.jsonl")
        self.completer = self.writer
        if isinstance(config, ProverConfig) and config.prover is not None:
            prover = require_decoder(LanguageModel.load(config.prover, precision=config.precision, device=config.device), "--prover")
            if prover.tokenizer.get_vocab() != self.model.tokenizer.get_vocab():
                raise UsageError(f"--prover {config.prover} has another vocabulary than {config.model}, so it cannot go on from its tokens")
            self.completer = make_backend(config.backend).place(lambda: Writer(prover, config.engine))

    def plan(self) -> dict[str, Any]:
        return super().plan() | {"completions of a prefix": self.config.completions}

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        rows = [(index * c.batch_size + i) % len(self.table) for i in range(min(c.batch_size, len(self.table)))]
        prompts = self.table.batch(rows).to(self.model.device)
        sampling = Sampling(temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, max_new_tokens=c.max_completion_length)
        answers, texts = self.writer.call("write", prompts, sampling=sampling, n=c.n, seed=derive(c.seed, "sampling", index))
        outcomes = self._judge(answers, texts)
        tokens = [ids[:n] for ids, n in zip(answers.completion_ids.tolist(), answers.completion_length.tolist(), strict=True)]
        cut = cut_of(c)
        ends = [step_ends(self.model.tokenizer, ids, cut) for ids in tokens]
        options: dict[str, Any] = {"completions": c.completions, "sampling": sampling, "seed": derive(c.seed, "labels", index)}
        found, spent = estimate_successes(answers, ends, outcomes, self.completer, self.model, self._judge, **options)
        assert self.method.estimate is not None
        lines, labels = [], []
        for i, successes in enumerate(found):
            label = self.method.estimate(c, successes)
            if texts[i].strip() and not bool(label.isnan().any()):
                labels.append(label)
                lines.append(self._row(int(answers.row[i]), tokens[i], ends[i], label, float(outcomes[i])))
        if not lines:
            raise Failure(
                f"step {index + 1}: none of {len(found)} answers has text and rewards for all its steps, so there is nothing to label"
            )
        self.lines.append(lines)
        of_steps = torch.cat([label[1:] for label in labels])
        return {
            "success": float(outcomes[~outcomes.isnan()].mean()),
            "labels/mean": float(of_steps.mean()),
            "labels/none": float((of_steps == 0).double().mean()),
            "labels/all": float((of_steps == 1).double().mean()),
            "labels/prompt": float(torch.stack([label[0] for label in labels]).mean()),
            "steps/number": len(of_steps) / len(labels),
            "unusable_answers": float(len(found) - len(labels)),
            "tokens/generated": float(spent + answers.completion_length.sum()),
            "completions/mean_length": float(answers.completion_length.float().mean()),
            "completions/clipped_ratio": float((~answers.ended).float().mean()),
        }

    def _judge(self, answers: Rollouts, texts: list[str]) -> Tensor:
        """[N]: 1 success, 0 failure, NaN without a reward."""
        scores, _ = score(self.reward, self.table, answers, texts)
        require_some(scores, self.reward.name)
        return torch.where(scores.valid, (scores.values > self.config.success_above).float(), torch.nan)

    def _row(self, row: int, tokens: list[int], ends: list[int], labels: Tensor, success: float) -> dict[str, Any]:
        texts, starts = token_texts(self.model.tokenizer, tokens), [0, *(end + 1 for end in ends)]
        steps = ["".join(texts[a : b + 1]) for a, b in zip(starts, ends)]
        return {name: values[row] for name, values in self.table.extra.items()} | {
            "prompt": self.table.prompts[row],
            "completions": steps,
            "labels": [round(float(label), 6) for label in labels[1:]],
            "prompt_label": round(float(labels[0]), 6),
            "advantages": [round(float(gain), 6) for gain in labels.diff()],
            "success": success,
            "step_separator": "",
        }
