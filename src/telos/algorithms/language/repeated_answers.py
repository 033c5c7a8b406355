"""Many answers of a model to the same problems, each judged right or wrong: what reports of pass@k, votes and support are made from.

Problems are a bundled testbed's, or the rows of a prompts file with a reward. Two models that are asked for the same problems with the same seed draw
with the same random numbers, so that their differences are paired.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from telos.algorithms.language._sampling import Writer, open_reward
from telos.algorithms.language.assess import checkpoint_steps, load_checkpoint
from telos.algorithms.results import load_result
from telos.core.errors import TelosError, UsageError, did_you_mean
from telos.core.run import Run
from telos.core.seeds import derive, numpy_generator
from telos.data.formats import Examples, read_examples
from telos.data.readers import Rows, read_rows
from telos.data.tokenize import Limits, tokenize
from telos.environments.text.base import TESTBEDS, load_testbed
from telos.evaluation.leash import Sampled
from telos.models.generation import Sampling
from telos.models.language import LanguageModel
from telos.models.packing import Answers
from telos.objectives.rewards import require_some

_ROWS = 256  # answers written at once
_MOST_TOKENS = 256  # of an answer where no testbed says how many it needs
_ANSWERS = {"arith": r"Answer:\s*(\S+)"}  # where a testbed's final answer stands


@dataclass(frozen=True)
class Problems:
    """What is asked and what makes an answer right: one whose `reward` is `threshold` or more."""

    examples: Examples  # prompts, with the columns that the reward needs
    reward: str
    threshold: float
    max_new_tokens: int
    answer: re.Pattern[str] | None  # finds the final answer in a text; None: the whole text is the answer

    @property
    def prompts(self) -> list[Any]:
        return [record["prompt"] for record in self.examples.records]

    def answer_in(self, text: str) -> str | None:
        """The final answer: the first group of the first match (all of it where there is no group), or the text; white space around it does not count."""
        if self.answer is None:
            return text.strip()
        match = self.answer.search(text)
        return None if match is None else (match.group(1 if self.answer.groups else 0) or "").strip()


def load_problems(
    data: str,
    n: int,
    *,
    seed: int = 0,
    level: int | None = None,
    reward: str | None = None,
    threshold: float = 0.5,
    max_new_tokens: int | None = None,
    answer: str | None = None,
) -> Problems:
    """`n` problems of a testbed's test split, or `n` rows of a file or data set, chosen by `seed` (fewer where there are fewer).

    `level`: of `arith` alone. `reward`: as `--reward` everywhere; by default the gold judge of the testbed from which the rows come. `answer`: a regular
    expression. Raises `UsageError` for options that do not fit the data.
    """
    try:
        pattern = None if answer is None else re.compile(answer)
    except re.error as error:
        raise UsageError(f"--answer {answer!r} is no regular expression: {error}") from None
    testbed_name = data if data in TESTBEDS and not Path(data).exists() else None
    if level is not None and testbed_name != "arith":
        raise UsageError(f"--level is for --data arith, not {data}")
    if testbed_name is not None:
        rows = _testbed_problems(testbed_name, n, seed, level)
    else:
        try:
            rows = _chosen(read_rows(data), n, seed)
        except UsageError as error:
            raise UsageError(f"--data {error}{did_you_mean(data, TESTBEDS)}") from None
        origins = {row.get("testbed") for row in rows.records}
        testbed_name = origins.pop() if len(origins) == 1 and origins <= set(TESTBEDS) else None
    if reward is None:
        if testbed_name is None:
            raise UsageError(
                f"--reward is missing: what makes an answer to {data} right? Give file.py:function, a reward model, or gold:TESTBED"
            )
        reward = f"gold:{testbed_name}"
    default = _ANSWERS.get(testbed_name or "")
    return Problems(
        read_examples(rows, ("prompt-only",)),
        reward,
        threshold,
        max_new_tokens or (load_testbed(testbed_name).max_new_tokens if testbed_name else _MOST_TOKENS),
        pattern or (re.compile(default) if default else None),
    )


def _testbed_problems(name: str, n: int, seed: int, level: int | None) -> Rows:
    testbed: Any = load_testbed(name)
    items = testbed.items("test", n, seed) if level is None else testbed.level_items(level, n, seed, "test")
    return read_rows(
        [{"prompt": item.prompt, "facts": json.dumps(item.facts), "reference": item.reference, "testbed": name} for item in items]
    )


def _chosen(rows: Rows, n: int, seed: int) -> Rows:
    """`n` rows in the file's order; a random choice, because files are often sorted."""
    if len(rows) <= n:
        return rows
    kept = sorted(numpy_generator(seed, "problems").permutation(len(rows))[:n].tolist())
    return Rows(rows.source, [rows.records[i] for i in kept], [rows.places[i] for i in kept])


def open_policy(source: str) -> LanguageModel:
    """The model called `source`: `tinylm`, a model's folder, a hub id, a run's folder, or RUN:STEP for a checkpoint of a run.

    Raises `UsageError`, with a suggestion where something is near, when there is none, or when it is a reward model.
    """
    folder, _, step = source.rpartition(":")
    if folder and step.isdigit() and (Path(folder) / "run.json").is_file():
        run = Run.open(folder)
        if int(step) not in (known := checkpoint_steps(run)):
            raise UsageError(f"{source}: the run has no checkpoint of step {step}; it has {', '.join(map(str, known)) or 'none'}")
        model = _policy(load_result(run.path), source)
        load_checkpoint(model, run, int(step))
        return model
    path = Path(source)
    if (path / "run.json").is_file() or (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return _policy(load_result(path), source)
    if path.is_dir():
        runs = sorted(file.parent.name for file in path.glob("*/run.json"))
        raise UsageError(f"{source} holds neither a model nor a run" + (f"; name one of its runs: {', '.join(runs)}" if runs else ""))
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    near = did_you_mean(path.name, ["tinylm", *siblings])
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UsageError(f"{source}: no such folder{near}")
    try:
        return LanguageModel.load(source)
    except TelosError as error:
        if source == "tinylm":
            raise
        reason = str(error).partition("; name one with --tokenizer")[0]  # an option that is not offered here
        raise UsageError(
            f"{source} is no folder, and no model of that name can be loaded{near}; give a model's folder, a run's folder, a hub id or 'tinylm' ({reason})"
        ) from None


def _policy(found: Any, source: str) -> LanguageModel:
    if not isinstance(found, LanguageModel):
        raise UsageError(f"{source} is a reward model; it writes no answers. Name a language model or a run that trained one")
    return found


def answer_repeatedly(
    model: LanguageModel,
    problems: Problems,
    samples: int,
    *,
    name: str,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Sampled, list[str]]:
    """`samples` answers to each problem, judged, and what a reader must know of them. `on_progress` is told how many problems are done.

    The entropy of tokens is that of the model's whole distribution at `temperature`, before `top_p` cuts it. A reward that does not apply to an answer
    (None) makes it wrong, and is counted in the notes.
    """
    if problems.max_new_tokens >= model.context:
        raise UsageError(
            f"--max_new_tokens {problems.max_new_tokens} leaves no room for a prompt: {name} takes {model.context} tokens in all"
        )
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=problems.max_new_tokens)
    table: Any = tokenize(problems.examples, model.tokenizer, Limits(max_prompt_length=model.context - problems.max_new_tokens))
    if len(table) != len(problems.examples):
        raise UsageError(f"{name}: only {len(table)} of {len(problems.examples)} prompts can be encoded; mend or remove the others")
    reward = open_reward(problems.reward, timeout=300.0, on_error="stop", policy=model)
    writer, found = Writer(model), _Found()
    step = max(1, _ROWS // samples)
    try:
        for start in range(0, len(table), step):
            rows = range(start, min(start + step, len(table)))
            prompts = table.batch(rows).to(model.device)
            rollouts, texts = writer.write(prompts, sampling=sampling, n=samples, seed=derive(seed, "repeated answers", start))
            owner = torch.arange(len(rows), device=model.device).repeat_interleave(samples)
            answers = Answers(prompts.prompt_ids, prompts.prompt_length, rollouts.completion_ids, rollouts.completion_length, owner)
            with torch.no_grad():
                entropy = model.logprobs(answers, temperature=temperature, want_entropy=True).entropy
            assert entropy is not None
            length = rollouts.completion_length
            ids = [row[:n] for row, n in zip(rollouts.completion_ids.tolist(), length.tolist(), strict=True)]
            columns = {column: [values[i] for i in rows for _ in range(samples)] for column, values in table.extra.items()}
            scores = reward.score([table.prompts[i] for i in rows for _ in range(samples)], texts, ids, columns)
            require_some(scores, reward.name)
            found.texts += texts
            found.scores += scores.values.tolist()
            found.tokens += length.tolist()
            found.ended += rollouts.ended.tolist()
            found.entropy += (entropy.sum(1) / length).tolist()
            if on_progress is not None:
                on_progress(rows.stop)
    finally:
        reward.close()
    sampled = found.sampled(name, problems, samples)
    notes = [f"{name}: {count} prompts: {reason}" for reason, count in table.counts.changed.items()]
    if without := int(np.isnan(sampled.scores).sum()):
        notes.append(f"{name}: the reward did not apply to {without} answers, which count as wrong")
    return sampled, notes


class _Found:
    """Answers as they come, flat."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.scores: list[float] = []
        self.tokens: list[int] = []
        self.ended: list[bool] = []
        self.entropy: list[float] = []

    def sampled(self, name: str, problems: Problems, samples: int) -> Sampled:
        def table(values: list[Any]) -> Any:
            return np.array(values, dtype=np.float64).reshape(-1, samples)

        texts = [self.texts[i : i + samples] for i in range(0, len(self.texts), samples)]
        scores = table(self.scores)
        return Sampled(
            name=name,
            texts=texts,
            answers=[[problems.answer_in(text) for text in row] for row in texts],
            scores=scores,
            right=(np.nan_to_num(scores, nan=-np.inf) >= problems.threshold).astype(np.float64),
            tokens=table(self.tokens),
            ended=table(self.ended),
            entropy=table(self.entropy),
        )
