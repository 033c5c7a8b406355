"""What a policy does on a testbed's held-out prompts: sampled answers with gold score, proxy reward, divergence from a reference and length.

Only reports and claims call this: it is the one place where the gold judge meets a trained policy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from telos.algorithms.language._loop_rollouts import layout
from telos.algorithms.language._sampling import Writer
from telos.core import checkpoint
from telos.core.errors import Failure
from telos.core.run import Run, write_atomically
from telos.data.formats import read_examples
from telos.data.readers import read_rows
from telos.data.tokenize import Limits, tokenize
from telos.environments.text.base import Item, TextTestbed, item_columns
from telos.functional.policy import sequence_kl
from telos.models.generation import Sampling
from telos.models.language import LanguageModel
from telos.objectives.rewards import RewardSource


@dataclass(frozen=True)
class Assessment:
    """One answer to each prompt, in the prompts' order."""

    texts: tuple[str, ...]
    gold: tuple[float, ...]  # the testbed's own score
    proxy: tuple[float, ...]  # the learned reward; empty when none was given
    kl: tuple[float, ...]  # log π(y|x) − log π_ref(y|x) in nats, whose mean estimates the KL divergence; empty without a reference
    length: tuple[int, ...]  # tokens
    ended: tuple[bool, ...]  # the end token was produced

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self)))

    @classmethod
    def open(cls, path: Path) -> Assessment:
        return cls(**{name: tuple(values) for name, values in json.loads(path.read_text(encoding="utf-8")).items()})


def assess(
    model: LanguageModel,
    testbed: TextTestbed,
    items: Sequence[Item],
    *,
    seed: int,
    temperature: float = 1.0,
    reference: LanguageModel | None = None,
    reward: RewardSource | None = None,
    batch: int = 128,
) -> Assessment:
    """Samples an answer to each item's prompt at `temperature` and scores it. `reference` needs temperature 1."""
    examples = read_examples(read_rows([{"prompt": item.prompt, **item_columns(testbed, item)} for item in items]), ("prompt-only",))
    table = tokenize(examples, model.tokenizer, Limits(max_prompt_length=model.context - testbed.max_new_tokens))
    writer = Writer(model)
    sampling = Sampling(temperature=temperature, max_new_tokens=testbed.max_new_tokens)
    found: dict[str, list[Any]] = {"texts": [], "gold": [], "proxy": [], "kl": [], "length": [], "ended": []}
    for start in range(0, len(items), batch):
        rows = range(start, min(start + batch, len(items)))
        rollouts, texts = writer.write(table.batch(rows).to(model.device), sampling=sampling, seed=seed + start)  # type: ignore[arg-type]
        found["texts"] += texts
        found["gold"] += [testbed.gold(items[i], text) for i, text in zip(rows, texts, strict=True)]
        found["length"] += rollouts.completion_length.tolist()
        found["ended"] += rollouts.ended.tolist()
        if reference is not None:
            with torch.no_grad():
                theirs = reference.logprobs(layout(rollouts)).logprobs
            found["kl"] += sequence_kl(rollouts.logprobs, theirs, rollouts.action_mask).tolist()
        if reward is not None:
            ids = [row[:n] for row, n in zip(rollouts.completion_ids.tolist(), rollouts.completion_length.tolist(), strict=True)]
            found["proxy"] += reward.score([items[i].prompt for i in rows], texts, ids, {}).values.tolist()
    return Assessment(**{name: tuple(values) for name, values in found.items()})


def checkpoint_steps(run: Run) -> list[int]:
    """The steps of a run's checkpoints that are still on disk, in order."""
    return sorted(int(path.name.split("-")[1]) for path in run.checkpoints.glob("step-*"))


def load_checkpoint(model: LanguageModel, run: Run, step: int) -> None:
    """Puts the policy weights of one checkpoint of `run` into `model`, which must be the run's own architecture."""
    state: Mapping[str, Any] = checkpoint.load_step(run.checkpoints, step)["program"]
    weights = state["learner"]["weights"]
    own = dict(model.named_parameters())
    if missing := [name for name in weights if name not in own]:
        raise Failure(f"{run.path}: checkpoint {step} has parameters that the model lacks ({missing[0]} …)")
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
