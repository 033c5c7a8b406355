"""Supervised training on text: every learned token has a weight, the loss is per token.

A method's `loss(config, logprobs, mask)` takes token log-probabilities [B, T] and the mask of learned tokens [B, T], and returns `Losses`. Data:
`text`/`messages`, or `prompt` + `completion`.

A method that needs "scores" learns from segments (sentences, lines) of the learned text, each of which `--reward` scores by itself; its options are a
`ScoredSupervisedConfig`. `prepare(config, scores, facts)` takes the scores of each row's segments, and None or, for held-out rows, the facts that it found
on the training rows; it returns a `Prepared`. Its loss has two further arguments: the numbers of `Prepared.scores` for each token, and the values
that a head on the model gives to what stands before each token, both [B, T] or None where the options do not ask for them. Segments are encoded
apart: no token lies in two of them. While rows are encoded a boundary token stands before each segment that will have a number, so a row that is too
long loses one token more for each of its segments.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import numpy as np
from torch import Tensor, nn

from telos.algorithms.language._minibatches import MinibatchConfig, MinibatchProgram
from telos.algorithms.language._options import load_policy
from telos.algorithms.language._rows import _table, supervised_table
from telos.algorithms.language._sampling import open_reward, scorer
from telos.core.config import require
from telos.core.errors import DataError, UsageError
from telos.core.method import Method
from telos.core.run import Run, write_atomically
from telos.data.batches import Sequences
from telos.data.formats import Examples
from telos.data.segments import By, learned_texts, split, with_learned_texts
from telos.data.tokenize import Table
from telos.functional.reduction import Denominators, Losses
from telos.models.language import LanguageModel
from telos.models.packing import Answers
from telos.models.vocabulary import add_special_tokens, grow
from telos.objectives.rewards import RewardSource

_BOUNDARY = "<|telos segment|>"  # stands before each segment while rows are encoded, and nowhere afterwards
_NUMBERS = "numbers of the segments"


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(MinibatchConfig):
    """Options of supervised training."""

    learning_rate: float = 2e-5  # peak, AdamW


@dataclass(frozen=True, kw_only=True)
class ScoredSupervisedConfig(SupervisedConfig):
    """Options of supervised training on text whose segments are scored."""

    reward: str = (
        ""  # file.py:function, module:function, a reward model's folder or hub id, or gold:TESTBED; called with segments as answers
    )
    reward_timeout: float = 60.0  # seconds a batch may take in a reward function before it is ended
    reward_on_error: Literal["stop", "invalid"] = "stop"  # a failing reward function stops the run, or its rows are left out and counted
    segments: By = "sentence"  # what is scored by itself: each sentence, each line, or each document, completion or message as a whole

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "reward_timeout")

    @property
    def uses_scores(self) -> bool:
        """Whether these options ask for scores at all."""
        return True

    @property
    def control_tokens(self) -> Mapping[str, str]:
        """Tokens that `Prepared.controls` may hold, and what each means; they become tokens of the model."""
        return {}

    @property
    def value_head(self) -> bool:
        """Whether the loss asks for values."""
        return False


@dataclass(frozen=True)
class Prepared:
    """What a method makes of rows whose segments have scores. Lists are by row, and in each row by segment."""

    kept: Sequence[int] | None = None  # rows that stay; None = all
    controls: Sequence[Sequence[str]] | None = None  # the control token that is written before each segment, or ''
    scores: Sequence[Sequence[float]] | None = None  # the number that the loss gets for each token of a segment
    facts: Mapping[str, float] = field(default_factory=dict)  # what was found on the training rows and holds for held-out ones; recorded


class ScoredSequences(Sequences):
    """`Sequences` with score [B, L] float32: a number for each token."""

    ragged: ClassVar[dict[str, tuple[str, ...]]] = {"length": ("ids", "loss_mask", "score")}
    score: Tensor


def layout(batch: Sequences) -> Answers:
    """Each sequence as a prompt of one token and an answer of the rest: every token after the first can be scored."""
    import torch

    return Answers(
        batch.ids[:, :1],
        torch.ones_like(batch.length),
        batch.ids[:, 1:],
        batch.length - 1,
        torch.arange(len(batch), device=batch.ids.device),
    )


class Program(MinibatchProgram):
    config: SupervisedConfig

    def __init__(self, method: Method, config: SupervisedConfig, run: Run) -> None:
        self.reward: RewardSource | None = None
        self.facts: Mapping[str, float] | None = None
        self.has_new_tokens = False
        super().__init__(method, config, run)
        if self.reward is not None:
            self.reward.close()
            self.reward = None  # all segments are scored, and its memory is free

    def build_model(self) -> LanguageModel:
        model, c = load_policy(self.config), self.config
        if isinstance(c, ScoredSupervisedConfig):
            self.has_new_tokens = grow(model, c.control_tokens)
            if c.control_tokens:  # a model that was asked for good text must not go on to ask itself for bad text
                model.base.generation_config.suppress_tokens = [model.tokenizer.convert_tokens_to_ids(token) for token in c.control_tokens]
            if c.value_head:
                head = nn.Linear(model.hidden_size, 1)
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
                model.add_module("value", head.to(model.device))  # trained with the model, not saved with it
        return model

    def read_table(self, source: str, option: str) -> Table:
        c = self.config
        if isinstance(c, ScoredSupervisedConfig) and c.uses_scores:
            return self._scored_table(c, source, option)
        return supervised_table(c, source, option, self.model, self.run)

    def denominators(self, batch: Sequences) -> Denominators:
        return Denominators(len(batch), int(batch.loss_mask.sum()))

    def losses(self, model: Any, part: Sequences, *rows: Tensor) -> Losses:
        scores = model.logprobs(layout(part), want_entropy=False)
        assert self.method.loss is not None
        more = self._numbers(model, part) if "scores" in self.method.needs else ()
        return self.method.loss(self.config, scores.logprobs, part.loss_mask[:, 1:], *more)

    def finish(self, run: Run) -> None:
        if self.has_new_tokens and self.model.has_adapter:
            # An adapter alone does not hold the new tokens' embeddings, and its base model does not know them.
            whole = LanguageModel(
                self.model.model.merge_and_unload(), self.model.tokenizer, self.model.source, self.model.precision, str(self.model.device)
            )
            whole.save(run.path / "model")
            return
        super().finish(run)

    # -- segments -------------------------------------------------------------------------------------------------------------------------------

    def _numbers(self, model: Any, part: Sequences) -> tuple[Tensor | None, Tensor | None]:
        """The numbers of each token after the first, and the values of what stands before it."""
        assert isinstance(self.config, ScoredSupervisedConfig)
        score = part.score[:, 1:] if isinstance(part, ScoredSequences) else None
        return score, model.get_submodule("value")(model.states(layout(part))).squeeze(-1) if self.config.value_head else None

    def _scored_table(self, config: ScoredSupervisedConfig, source: str, option: str) -> Table:
        words = copy.deepcopy(self.model.tokenizer)
        add_special_tokens(words, [_BOUNDARY])

        def change(examples: Examples) -> Examples:
            return self._prepare(config, examples, option)

        view = SimpleNamespace(tokenizer=words, context=self.model.context)
        table = _table(config, source, option, view, self.run, ("prompt-completion", "language-modeling"), change)
        return self._without_boundaries(table, words.convert_tokens_to_ids(_BOUNDARY), option) if _NUMBERS in table.extra else table

    def _prepare(self, config: ScoredSupervisedConfig, examples: Examples, option: str) -> Examples:
        """The rows as the method wants them: some left out, control tokens and boundaries before their segments."""
        for record, place in zip(examples.records, examples.places, strict=True):
            text = json.dumps(record)
            found = next((token for token in (*config.control_tokens, _BOUNDARY) if token in text), None)
            if found is not None:
                raise DataError(place, f"the row holds {found!r}, which is a control token here", "Take it out of the text")
        cut = [[split(text, config.segments) for text in learned_texts(record)] for record in examples.records]
        scores = self._scores(config, examples, [[segment for text in row for segment in text] for row in cut])
        usable = [i for i, row in enumerate(scores) if row and all(map(math.isfinite, row))]
        examples, cut, scores = _select(examples, usable, "no-score"), [cut[i] for i in usable], [scores[i] for i in usable]
        assert self.method.prepare is not None
        made: Prepared = self.method.prepare(config, scores, self.facts)
        if self.facts is None:
            self.facts = made.facts
            self.run.describe(**made.facts)
        records = []
        for i, record in enumerate(examples.records):
            controls = iter(made.controls[i] if made.controls is not None else [""] * len(scores[i]))
            before = _BOUNDARY if made.scores is not None else ""
            records.append(with_learned_texts(record, ["".join(before + next(controls) + segment for segment in text) for text in cut[i]]))
        extra = examples.extra | ({_NUMBERS: [list(row) for row in made.scores]} if made.scores is not None else {})
        examples = dataclasses.replace(examples, records=records, extra=extra)
        return examples if made.kept is None else _select(examples, made.kept, "score-too-low")

    def _scores(self, config: ScoredSupervisedConfig, examples: Examples, rows: list[list[str]]) -> list[list[float]]:
        """The reward's score of each segment: computed once and kept in the run's folder, so that a resumed run has the same."""
        path = self.run.path / f"scores-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]}.json"
        if not path.exists():
            if not config.reward:
                raise UsageError(
                    "--reward is missing: file.py:function, module:function, or a reward model's folder or hub id to score segments"
                )
            if self.reward is None:
                self.reward = open_reward(config.reward, timeout=config.reward_timeout, on_error=config.reward_on_error, policy=self.model)
            at = [i for i, row in enumerate(rows) for _ in row]
            columns = {name: [values[i] for i in at] for name, values in examples.extra.items()}
            prompts = [examples.records[i].get("prompt", "") for i in at]
            found = iter(scorer(self.reward, self.model)(prompts, [segment for row in rows for segment in row], columns))
            write_atomically(path, json.dumps([[next(found) for _ in row] for row in rows]))
        return json.loads(path.read_text(encoding="utf-8"))

    def _without_boundaries(self, table: Table, boundary: int, option: str) -> Table:
        """The rows without the tokens that stand before segments, and with each segment's number at its tokens."""
        columns: dict[str, list[Any]] = {"ids": [], "loss_mask": [], "score": []}
        numbers = table.extra.pop(_NUMBERS)
        for ids, loss_mask, row in zip(table.columns["ids"], table.columns["loss_mask"], numbers, strict=True):
            at = ids == boundary
            segment = (at.cumsum() - 1).clip(0)
            loss_mask = loss_mask[~at].copy()
            loss_mask[:1] = False  # nothing precedes the first token
            columns["ids"].append(ids[~at])
            columns["loss_mask"].append(loss_mask)
            columns["score"].append(np.asarray(row, np.float32)[segment[~at]])
        left = [i for i, loss_mask in enumerate(columns["loss_mask"]) if loss_mask.any()]
        if len(left) < len(table):
            self.run.warn(f"{option}: {len(table) - len(left)} rows left out: they were cut before the first token that is learned")
        return dataclasses.replace(table, kind=ScoredSequences, columns=columns).select(left)


def _select(examples: Examples, rows: Sequence[int], reason: str) -> Examples:
    """The examples `rows`; the others are counted as dropped for `reason`."""
    stay = set(rows)
    for i in range(len(examples)):
        if i not in stay:
            examples.counts.drop(examples.places[i], reason)
    examples.counts.kept = len(rows)
    examples.counts.require_some()
    return dataclasses.replace(
        examples,
        records=[examples.records[i] for i in rows],
        places=[examples.places[i] for i in rows],
        extra={name: [values[i] for i in rows] for name, values in examples.extra.items()},
    )
