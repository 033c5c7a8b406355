"""Drawing answers: the role that generates, and what turns a `--reward` into scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from telos.core.errors import UsageError
from telos.data.batches import REWARD_VALID, Prompts, Rollouts, pad_1d
from telos.dataflow import Role, transfer
from telos.environments.text.base import Item, load_testbed
from telos.models.generation import Generated, Sampling, make_engine
from telos.models.generation.native import Mixture, NativeEngine, Nucleus
from telos.models.language import LanguageModel
from telos.objectives.rewards import Combined, RewardSource, load_reward, require_some


class Writer(Role):
    """Generates answers with a model's current weights. `under` gives the context in which it writes: without its adapter, for a reference. With
    a `partner` it writes with two models at once, which the bundled engine alone can do."""

    def __init__(
        self,
        model: LanguageModel,
        engine: str = "native",
        under: Callable[[], AbstractContextManager[Any]] = nullcontext,
        partner: Mixture | Nucleus | None = None,
    ) -> None:
        if partner is not None and engine != "native":
            raise UsageError(f"--engine {engine} cannot ask two models for each token; use --engine native")
        self.model, self.under = model, under
        self.engine = make_engine(model, engine) if partner is None else NativeEngine(model, partner=partner)

    @transfer(split="rows", collect="rows")
    def write(
        self, prompts: Prompts, begun: list[list[int]] | None = None, *, sampling: Sampling, n: int = 1, seed: int = 0
    ) -> tuple[Rollouts, list[str]]:
        """`n` answers to each prompt, those of a prompt together, and their texts without end tokens.

        With `begun` the answers to a prompt go on from these tokens, which belong to them but not to the policy's actions; `sampling.max_new_tokens`
        bounds the whole answer. Raises `UsageError` for an encoder–decoder, whose answers begin in another place than its prompts.
        """
        ids = [row[:length] for row, length in zip(prompts.prompt_ids.tolist(), prompts.prompt_length.tolist(), strict=True)]
        if begun is not None:
            if self.model.is_encoder_decoder:
                raise UsageError(f"{self.model.source}: an encoder–decoder cannot go on from the beginning of an answer")
            ids = [prompt + start for prompt, start in zip(ids, begun, strict=True)]
        most = sampling.max_new_tokens
        room = most if begun is None else max(1, most - min(map(len, begun)))
        with self.under():
            drawn = self.engine.generate(ids, replace(sampling, max_new_tokens=room), n=n, seed=seed)
        started = torch.zeros_like(drawn.length)
        if begun is not None:
            drawn, started = _with_beginnings(drawn, begun, n, most)
        count, width = drawn.ids.shape
        rows = prompts.row.repeat_interleave(n)
        positions = torch.arange(width, device=drawn.ids.device)
        rollouts = Rollouts(
            prompt_ids=prompts.prompt_ids.repeat_interleave(n, 0),
            prompt_length=prompts.prompt_length.repeat_interleave(n),
            completion_ids=drawn.ids,
            completion_length=drawn.length,
            action_mask=(positions >= started[:, None]) & (positions < drawn.length[:, None]),
            logprobs=drawn.logprobs,
            ended=drawn.ended,
            group=rows,
            reward=drawn.logprobs.new_zeros(count),
            reward_status=torch.full((count,), REWARD_VALID, dtype=torch.int8, device=drawn.ids.device),
            temperature=drawn.logprobs.new_full((count,), sampling.temperature),
            weight_version=torch.full((count,), drawn.weight_version, dtype=torch.int64, device=drawn.ids.device),
            row=rows,
            support=drawn.support,
            batch_size=[count],
        )
        return rollouts, texts_of(self.model, drawn.ids, drawn.length)


def _with_beginnings(drawn: Generated, begun: list[list[int]], n: int, most: int) -> tuple[Generated, torch.Tensor]:
    """The answers with the tokens from which they went on, cut to `most` tokens, and how many of these each has, [N]."""
    device = drawn.ids.device
    starts = [start for start in begun for _ in range(n)]
    lengths = drawn.length.tolist()
    ids, length = pad_1d([(start + row[:k])[:most] for start, row, k in zip(starts, drawn.ids.tolist(), lengths, strict=True)])
    logprobs, _ = pad_1d(
        [([0.0] * len(start) + row[:k])[:most] for start, row, k in zip(starts, drawn.logprobs.tolist(), lengths, strict=True)],
        torch.float32,
    )
    whole = torch.tensor([len(start) + k <= most for start, k in zip(starts, lengths, strict=True)], device=device)
    started = torch.tensor([min(len(start), most) for start in starts], device=device)
    support = None
    if drawn.support is not None:
        # Where a token was given, it is all that was allowed.
        support = torch.full((*ids.shape, drawn.support.shape[2]), -1, dtype=torch.int64)
        support[:, :, 0] = ids
        for row, (start, k) in enumerate(zip(starts, lengths, strict=True)):
            room = max(0, min(k, most - len(start)))
            support[row, len(start) : len(start) + room] = drawn.support[row, :room].cpu()
        support = support.to(device)
    ended = drawn.ended & whole
    return Generated(ids.to(device), length.to(device), ended, logprobs.to(device), support, drawn.weight_version), started


def texts_of(model: LanguageModel, ids: torch.Tensor, length: torch.Tensor) -> list[str]:
    """The text of each answer; special tokens, the end token among them, are left out."""
    rows = [row[:n] for row, n in zip(ids.tolist(), length.tolist(), strict=True)]
    return model.tokenizer.batch_decode(rows, skip_special_tokens=True)  # type: ignore[return-value]


def sample_texts(
    model: LanguageModel, prompts: Sequence[str], sampling: Sampling, *, n: int = 1, seed: int = 0, batch: int = 128
) -> list[list[str]]:
    """`n` answers to each prompt given as text. Prompts are encoded as training encodes them."""
    from telos.data.formats import read_examples
    from telos.data.readers import read_rows
    from telos.data.tokenize import Limits, tokenize

    examples = read_examples(read_rows([{"prompt": prompt} for prompt in prompts]), ("prompt-only",))
    table = tokenize(examples, model.tokenizer, Limits(max_prompt_length=model.context - sampling.max_new_tokens))
    writer = Writer(model)
    out: list[list[str]] = []
    for start in range(0, len(table), batch):
        rows = range(start, min(start + batch, len(table)))
        _, texts = writer.write(table.batch(rows).to(model.device), sampling=sampling, n=n, seed=seed + start)  # type: ignore[arg-type]
        out += [texts[i : i + n] for i in range(0, len(texts), n)]
    return out


def scorer(
    reward: RewardSource, model: LanguageModel, batch: int = 64
) -> Callable[[list[Any], list[str], dict[str, list[Any]]], list[float]]:
    """A reward as a function of prompts, answers and the data's columns; NaN where it gives none."""

    def score(prompts: list[Any], answers: list[str], columns: dict[str, list[Any]]) -> list[float]:
        found: list[float] = []
        tokenizer: Any = model.tokenizer
        for start in range(0, len(answers), batch):
            rows = slice(start, start + batch)
            ids = tokenizer(answers[rows], add_special_tokens=False)["input_ids"]
            part = {name: values[rows] for name, values in columns.items()}
            scores = reward.score(prompts[rows], answers[rows], ids, part)
            require_some(scores, reward.name)
            found += scores.values.tolist()
        return found

    return score


def open_reward(spec: str | Callable[..., Any], *, timeout: float, on_error: Any, policy: LanguageModel | None = None) -> RewardSource:
    """A reward by its name; `gold:TESTBED` is a testbed's own judge, for problems whose reward may be seen (verifiable ones)."""
    if isinstance(spec, str) and spec.startswith("gold:"):
        return load_reward(gold_function(spec.removeprefix("gold:")), timeout=timeout, on_error=on_error)
    where = {} if policy is None else {"device": str(policy.device), "policy_tokenizer": policy.tokenizer, "precision": policy.precision}
    return load_reward(spec, timeout=timeout, on_error=on_error, **where)


def open_rewards(
    specs: Sequence[str | Callable[..., Any]],
    weights: Sequence[float],
    *,
    timeout: float,
    on_error: Any,
    policy: LanguageModel | None = None,
) -> RewardSource:
    """The weighted sum of several rewards; one without a weight as it is. Raises `UsageError` for weights that fit no rewards."""
    found = [open_reward(spec, timeout=timeout, on_error=on_error, policy=policy) for spec in specs]
    return Combined(found, weights or None) if len(found) > 1 or weights else found[0]


def gold_function(name: str) -> Callable[..., list[float]]:
    """A testbed's gold judge as a reward function. Its rows need the column `facts`, which `telos data make` writes."""
    testbed = load_testbed(name)

    def gold(prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float]:
        if "facts" not in columns:
            raise UsageError(f"gold:{name} needs the column 'facts'; make the data with `telos data make {name}`, or give --data {name}")
        items = [Item(prompt, "", json.loads(facts)) for prompt, facts in zip(prompts, columns["facts"], strict=True)]
        return [testbed.gold(item, completion) for item, completion in zip(items, completions, strict=True)]

    gold.__name__ = f"gold:{name}"
    return gold
