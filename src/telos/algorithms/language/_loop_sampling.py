"""Methods that choose among sampled answers and change no weight. A step answers one batch of prompts.

A method's `select(config, rewards)` takes rewards [P, n] (−inf where invalid) and returns the kept index of each prompt. Every answer with
its reward, and which was kept, is appended to `samples.jsonl` in the run's folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from telos.algorithms.language._loop_rollouts import score
from telos.algorithms.language._options import LanguageConfig, load_policy
from telos.algorithms.language._rows import prompts_table
from telos.algorithms.language._sampling import Writer, open_rewards
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import JsonLines, Run
from telos.core.seeds import derive
from telos.dataflow import make_backend
from telos.models.generation import Sampling
from telos.objectives.rewards import require_some


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(LanguageConfig):
    """Options of choosing among samples."""

    steps: int = 10  # batches of prompts
    batch_size: int = 32  # prompts a step
    n: int = 8  # answers to each prompt
    temperature: float = 1.0  # of sampling; > 0
    top_p: float = 1.0  # nucleus, (0, 1]
    top_k: int = 0  # most probable tokens kept; 0 = all
    max_completion_length: int = 64  # tokens an answer may have
    reward: tuple[
        str, ...
    ] = ()  # one or several, added up: file.py:function, module:function, a reward model's folder or hub id, gold:TESTBED
    reward_weights: tuple[float, ...] = ()  # of several rewards, in their order; default: 1 each
    reward_timeout: float = 60.0  # seconds a batch may take in a reward function before it is ended
    reward_on_error: Literal["stop", "invalid"] = "stop"  # a failing reward function stops the run, or its answers are left out and counted
    engine: Literal["native", "vllm"] = "native"  # what generates

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "batch_size", "n")
        require(self, ">= 0", "top_k")
        require(self, "> 0", "temperature", "reward_timeout")
        require(self, "> 0 and <= 1", "top_p")


class Program:
    def __init__(self, method: Method, config: SamplingConfig, run: Run) -> None:
        self.method, self.config, self.run = method, config, run
        self.last_batch: Mapping[str, Any] = {}
        if not config.reward:
            raise UsageError(
                "--reward is missing: give file.py:function, module:function, a reward model's folder or hub id, or gold:TESTBED"
            )
        self.model = load_policy(config)
        self.table = prompts_table(config, config.data, "--data", self.model, run)
        self.reward = open_rewards(
            config.reward, config.reward_weights, timeout=config.reward_timeout, on_error=config.reward_on_error, policy=self.model
        )
        self.writer = make_backend(config.backend).place(lambda: Writer(self.model, config.engine))
        self.lines = JsonLines(run.path / "samples.jsonl")

    def plan(self) -> dict[str, Any]:
        c = self.config
        return {"prompts": len(self.table), "prompts a step": c.batch_size, "answers a prompt": c.n, "steps": c.steps}

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        rows = [(index * c.batch_size + i) % len(self.table) for i in range(min(c.batch_size, len(self.table)))]
        prompts = self.table.batch(rows).to(self.model.device)
        sampling = Sampling(temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, max_new_tokens=c.max_completion_length)
        rollouts, texts = self.writer.call("write", prompts, sampling=sampling, n=c.n, seed=derive(c.seed, "sampling", index))
        scores, metrics = score(self.reward, self.table, rollouts, texts)
        require_some(scores, self.reward.name)
        rewards = np.where(scores.valid.numpy(), scores.values.numpy(), -np.inf).reshape(len(rows), c.n)
        assert self.method.select is not None
        kept = self.method.select(c, rewards)
        self._write(rows, texts, rewards, kept)
        usable = np.isfinite(rewards).all(1)
        best = rewards[np.arange(len(rows)), kept]
        return metrics | {
            "reward/mean": float(rewards[usable].mean()) if usable.any() else 0.0,
            "reward/kept": float(best[np.isfinite(best)].mean()),
            "rewards/unusable_prompts": float((~usable).sum()),
            "tokens/generated": float(rollouts.completion_length.sum()),
            "completions/mean_length": float(rollouts.completion_length.float().mean()),
            "completions/clipped_ratio": float((~rollouts.ended).float().mean()),
        }

    def _write(self, rows: list[int], texts: list[str], rewards: np.ndarray, kept: np.ndarray) -> None:
        lines = []
        for i, row in enumerate(rows):
            answers = texts[i * self.config.n : (i + 1) * self.config.n]
            best = answers[kept[i]] if np.isfinite(rewards[i]).any() else None  # nobody said that the first is better
            values = [float(r) if np.isfinite(r) else None for r in rewards[i]]
            lines.append({"prompt": self.table.prompts[row], "completion": best, "completions": answers, "scores": values})
        self.lines.append(lines)

    def state(self) -> dict[str, Any]:
        return {"written": self.lines.written}

    def load(self, state: Mapping[str, Any]) -> None:
        self.lines.written = state["written"]

    def finish(self, run: Run) -> None:
        self.reward.close()
