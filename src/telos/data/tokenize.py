"""Checked rows to token ids, once, and batches of them by index.

A prompt is encoded once and its completions apart from it, so the prompt's tokens are the same for both answers of a pair and the same as
when the model is prompted with it. Completions of plain text end with exactly one end-of-sequence token; conversations end as their
template writes them. What does not fit is cut and counted, dropped and counted, or refused; a completion that was cut has no end token, so
nothing teaches the model to stop there.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from telos.core.errors import DataError, UsageError
from telos.data.batches import Batch, Labelled, Pairs, Prompts, Ranked, Sequences, Stepwise, field_names, pad_1d
from telos.data.chat import (
    Answered,
    Ids,
    encode_answers,
    encode_conversations,
    encode_prompts,
    encode_texts,
    require_template,
    use_template,
)
from telos.data.formats import BadRow, Counts, Examples, Format, OnBadRow, Pairing, read_examples
from telos.data.images import shown
from telos.data.readers import read_rows

Overlong = Literal["truncate", "drop", "error"]

_KINDS: dict[Format, type] = {
    "language-modeling": Sequences,
    "prompt-completion": Sequences,
    "prompt-only": Prompts,
    "preference": Pairs,
    "unpaired": Labelled,
    "ranked": Ranked,
    "stepwise": Stepwise,
}
_ANSWERS: dict[Format, tuple[str, ...]] = {
    "prompt-completion": ("completion",),
    "preference": ("chosen", "rejected"),
    "unpaired": ("completion",),
}
_DTYPES = {
    **dict.fromkeys(("loss_mask", "label"), torch.bool),
    **dict.fromkeys(("margin", "step_labels", "score", "chosen_score", "rejected_score", "advantage"), torch.float32),
}


@dataclass(frozen=True)
class Limits:
    """Longest rows in tokens; None is no limit. What is longer is cut (and counted), dropped (and counted), or refused.

    Prompts are cut on the left (a leading beginning-of-sequence token stays), completions and documents on the right. Under `max_length`
    prompt and completion are each sure of half of it, and may use what the other leaves.
    """

    max_prompt_length: int | None = None  # with the beginning-of-sequence token
    max_completion_length: int | None = None  # with the end-of-sequence token
    max_length: int | None = None  # prompt and completion together, or the whole document or conversation
    overlong: Overlong = "truncate"

    def __post_init__(self) -> None:
        for name, least in (("max_prompt_length", 1), ("max_completion_length", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least} token{'s' * (least > 1)}, not {value}")
        if self.overlong not in ("truncate", "drop", "error"):
            raise UsageError(f"overlong is 'truncate', 'drop' or 'error', not {self.overlong!r}")

    def stated(self) -> str:
        """The limits that are set, for messages."""
        named = {name: getattr(self, name) for name in ("max_prompt_length", "max_completion_length", "max_length")}
        return ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)


@dataclass(frozen=True)
class Table:
    """Encoded rows, ready to be batched.

    kind: the batch class. columns[name][i]: token ids (int32 array) or a number. prompts[i]: the prompt as given, text or messages ("" for
    documents), and extra[name][i]: the columns kept for reward functions. places[i]: file:line. counts: what became of the source's rows.
    """

    kind: type
    columns: dict[str, list[Any]]
    prompts: list[Any]
    extra: dict[str, list[Any]]
    places: list[str]
    counts: Counts

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, indices: Iterable[int]) -> Batch:
        """The rows `indices` in that order as one batch on the CPU, padded to the longest of them. `row` holds the indices."""
        rows = [int(i) for i in indices]
        fields: dict[str, Any] = {}
        for length, names in self.kind.ragged.items():
            for name in self.columns.keys() & set(names):
                values = [self.columns[name][i] for i in rows]
                fields[name], fields[length] = pad_1d(values, _DTYPES.get(name, torch.int64))
        if self.kind is Ranked:
            fields |= _ranked_fields([self.columns["completion_ids"][i] for i in rows], [self.columns["quality"][i] for i in rows])
        for name in self.columns.keys() - fields.keys():
            fields[name] = torch.tensor([self.columns[name][i] for i in rows], dtype=_DTYPES[name])
        if "row" in field_names(self.kind):
            fields["row"] = torch.tensor(rows, dtype=torch.int64)
        return self.kind(**fields, batch_size=[len(rows)])

    def with_columns(self, **columns: list[Any]) -> Table:
        """The table with further columns of its batch class, one value a row."""
        return dataclasses.replace(self, columns=self.columns | columns)

    def select(self, rows: Sequence[int]) -> Table:
        """The table of `rows`, in that order."""

        def pick(values: list[Any]) -> list[Any]:
            return [values[i] for i in rows]

        columns, extra = ({name: pick(values) for name, values in group.items()} for group in (self.columns, self.extra))
        return dataclasses.replace(self, columns=columns, extra=extra, prompts=pick(self.prompts), places=pick(self.places))


def _ranked_fields(answers: list[list[np.ndarray]], quality: list[list[float]]) -> dict[str, torch.Tensor]:
    """Lists of different sizes, padded to [B, K, C], [B, K] and [B, K]."""
    most = max(map(len, answers))
    flat, length = pad_1d([ids for row in answers for ids in [*row, *[np.empty(0, np.int32)] * (most - len(row))]])
    values, _ = pad_1d(quality, torch.float32)
    return {
        "completion_ids": flat.view(len(answers), most, -1),
        "completion_length": length.view(len(answers), most),
        "quality": values,
    }


def load_table(
    source: Any,
    tokenizer: Any,
    wanted: Sequence[Format] | None = None,
    *,
    limits: Limits | None = None,
    on_bad_row: OnBadRow = "error",
    pairing: Pairing = "all",
    chat_template: str | Path | None = None,
) -> Table:
    """From what the user named to encoded rows: `read_rows`, `read_examples`, `tokenize`. Raises what these raise."""
    if chat_template is not None:
        use_template(tokenizer, chat_template)
    return tokenize(read_examples(read_rows(source), wanted, on_bad_row=on_bad_row, pairing=pairing), tokenizer, limits)


def tokenize(examples: Examples, tokenizer: Any, limits: Limits | None = None, *, step_separator: str = "\n") -> Table:
    """Encode every row. `step_separator` closes each step of stepwise rows, so that its last token is where the step is judged.

    `Sequences` come from documents (every token is learnt), conversations (the assistant's tokens are) and prompt-completion rows (the
    completion's are); `Prompts` from prompt-only rows, `Pairs` from preferences, `Labelled` from unpaired, `Ranked` from ranked, `Stepwise`
    from stepwise rows.
    Raises `UsageError` for a tokenizer without end token or chat template where one is needed, for limits that do not apply to the
    format, and when no row is left; `DataError` for the first bad row under the policy 'error'.
    """
    limits = limits or Limits()
    _check_limits(examples.format, limits)
    if tokenizer.eos_token_id is None:
        raise UsageError("the tokenizer has no end-of-sequence token, so no model could learn to stop: set eos_token in its configuration")
    if examples.conversational:
        require_template(tokenizer)
    encode = {
        "language-modeling": _encode_documents,
        "prompt-only": _encode_prompt_rows,
        "stepwise": _encode_steps,
        "ranked": _encode_ranked,
    }.get(examples.format, _encode_answer_rows)
    examples, with_images = shown(examples, tokenizer)
    rows = _Rows(examples, tokenizer, limits, step_separator)
    encode(rows)
    return with_images(rows.table())


def _check_limits(format: Format, limits: Limits) -> None:
    useless = {"language-modeling": ("max_prompt_length", "max_completion_length"), "prompt-only": ("max_completion_length",)}
    for name in useless.get(format, ()):
        if getattr(limits, name) is not None:
            raise UsageError(f"{name} does not apply to {format} rows: use max_length")


class _Rows:
    """The rows under way: examples, how to encode them, and the columns that fill."""

    def __init__(self, examples: Examples, tokenizer: Any, limits: Limits, step_separator: str) -> None:
        self.examples, self.tokenizer, self.limits, self.step_separator = examples, tokenizer, limits, step_separator
        self.counts, self.eos = copy.deepcopy(examples.counts), int(tokenizer.eos_token_id)
        self.kept: list[int] = []
        self.columns: dict[str, list[Any]] = {}

    def column(self, name: str) -> list[Any]:
        return [record[name] for record in self.examples.records]

    def tools(self) -> list[Any]:
        return [record.get("tools") for record in self.examples.records]

    def add(self, i: int, **values: Any) -> None:
        self.kept.append(i)
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value)

    def bad(self, i: int, bad: BadRow) -> None:
        self.counts.bad(self.examples.places[i], bad)

    def change(self, i: int, reason: str) -> None:
        self.counts.change(self.examples.places[i], reason)

    def may_cut(self, i: int, parts: list[str], lengths: str) -> bool:
        """Whether row i stays although `parts` of it are too long; counts what is done to it. Raises `DataError` under overlong="error"."""
        place, overlong = self.examples.places[i], self.limits.overlong
        if overlong == "error":
            problem = f"the row is too long: {lengths}; {self.limits.stated()}"
            raise DataError(place, problem, "Raise the limit, or choose --overlong truncate or drop")
        if overlong == "drop":
            self.counts.drop(place, "overlong")
            return False
        for part in parts:
            self.change(i, f"{part}-truncated")
        return True

    def table(self) -> Table:
        self.counts.kept = len(self.kept)
        self.counts.require_some()
        examples = self.examples
        return Table(
            kind=_KINDS[examples.format],
            columns=self.columns,
            prompts=[examples.records[i].get("prompt", "") for i in self.kept],
            extra={name: [values[i] for i in self.kept] for name, values in examples.extra.items()},
            places=[examples.places[i] for i in self.kept],
            counts=self.counts,
        )


# One function per shape of row ------------------------------------------------------------------------------------------------------


def _encode_documents(rows: _Rows) -> None:
    longest = rows.limits.max_length
    for i, found in enumerate(_conversations(rows) if rows.examples.conversational else _texts(rows)):
        if isinstance(found, BadRow):
            rows.bad(i, found)
            continue
        ids, loss_mask = found
        if longest and len(ids) > longest and not rows.may_cut(i, ["document"], f"{len(ids)} tokens"):
            continue
        ids, loss_mask = ids[:longest], loss_mask[:longest].copy()
        loss_mask[0] = False  # nothing precedes the first token
        if loss_mask.any():
            rows.add(i, ids=ids, loss_mask=loss_mask)
        else:
            rows.counts.drop(rows.examples.places[i], "nothing-left-to-learn")


def _conversations(rows: _Rows) -> list[tuple[Ids, np.ndarray] | BadRow]:
    return encode_conversations(rows.tokenizer, rows.column("messages"), rows.tools())


def _texts(rows: _Rows) -> Iterable[tuple[Ids, np.ndarray]]:
    opening = opening_tokens(rows.tokenizer)
    for ids in encode_texts(rows.tokenizer, rows.column("text")):
        whole = with_opening(_ended(ids, rows.eos), opening)
        yield whole, np.ones(len(whole), dtype=bool)


def _encode_prompt_rows(rows: _Rows) -> None:
    for i, found in enumerate(_prompts(rows)):
        if isinstance(found, BadRow):
            rows.bad(i, found)
            continue
        fitted = _fit(rows, i, found, [])
        if fitted is not None:
            rows.add(i, prompt_ids=fitted[0])


def _prompts(rows: _Rows) -> Sequence[Ids | BadRow]:
    if rows.examples.conversational:
        return encode_prompts(rows.tokenizer, rows.column("prompt"), rows.tools())
    opening, spare = opening_tokens(rows.tokenizer), _spare_opening(rows.tokenizer, rows.eos)
    encoded = (with_opening(ids, opening) for ids in encode_texts(rows.tokenizer, rows.column("prompt")))
    return [ids if len(ids) else spare for ids in encoded]


def _encode_answer_rows(rows: _Rows) -> None:
    columns = [rows.column(name) for name in _ANSWERS[rows.examples.format]]
    _encode_answers(rows, list(zip(*columns, strict=True)), _FINISH[rows.examples.format])


def _encode_ranked(rows: _Rows) -> None:
    """Answers from best to worst; equal qualities keep their order."""
    orders = [sorted(range(len(quality)), key=lambda j, quality=quality: -quality[j]) for quality in rows.column("quality")]
    answers = [tuple(row[j] for j in order) for row, order in zip(rows.column("completions"), orders, strict=True)]

    def finish(record: dict[str, Any], prompt: Ids, encoded: list[Ids]) -> dict[str, Any]:
        return {"prompt_ids": prompt, "completion_ids": encoded, "quality": sorted(record["quality"], reverse=True)}

    _encode_answers(rows, answers, finish)


def _encode_answers(rows: _Rows, answers: list[tuple[Any, ...]], finish: Callable[..., dict[str, Any]]) -> None:
    for i, found in enumerate(_answers(rows, answers)):
        if isinstance(found, BadRow):
            rows.bad(i, found)
            continue
        for note in found.notes:
            rows.change(i, note)
        fitted = _fit(rows, i, found.prompt, found.answers)
        if fitted is not None:
            rows.add(i, **finish(rows.examples.records[i], *fitted))


def _answers(rows: _Rows, answers: list[tuple[Any, ...]]) -> Sequence[Answered | BadRow]:
    if rows.examples.conversational:
        return encode_answers(rows.tokenizer, rows.column("prompt"), answers, rows.tools())
    encoded = iter([_ended(ids, rows.eos) for ids in encode_texts(rows.tokenizer, [text for row in answers for text in row])])
    prompts = [prompt for prompt in _prompts(rows) if not isinstance(prompt, BadRow)]
    grouped = [[next(encoded) for _ in row] for row in answers]
    return [Answered(prompt, row, _notes(row, rows.eos)) for prompt, row in zip(prompts, grouped, strict=True)]


def _notes(answers: Sequence[Ids], eos: int) -> tuple[str, ...]:
    return ("end-token-inside-answer",) if any((ids[:-1] == eos).any() for ids in answers) else ()


def _encode_steps(rows: _Rows) -> None:
    separator = rows.step_separator
    steps = [[step if step.endswith(separator) else step + separator for step in row] for row in rows.column("completions")]
    encoded = iter(encode_texts(rows.tokenizer, [step for row in steps for step in row]))
    for i, (prompt, row) in enumerate(zip(_prompts(rows), steps, strict=True)):
        parts = [next(encoded) for _ in row]
        if isinstance(prompt, BadRow):
            rows.bad(i, prompt)
            continue
        fitted = _fit(rows, i, prompt, [_ended(np.concatenate(parts), rows.eos)])
        if fitted is None:
            continue
        prompt_ids, (completion,) = fitted
        ends = np.cumsum([len(part) for part in parts]) - 1
        ends = ends[ends < len(completion)]
        if len(ends):
            labels = rows.examples.records[i]["labels"][: len(ends)]
            rows.add(i, prompt_ids=prompt_ids, completion_ids=completion, step_ends=ends, step_labels=labels)
        else:
            rows.counts.drop(rows.examples.places[i], "nothing-left-to-learn")


def _finish_completion(record: dict[str, Any], prompt: Ids, answers: list[Ids]) -> dict[str, Any]:
    (completion,) = answers
    return {"ids": np.concatenate([prompt, completion]), "loss_mask": np.repeat([False, True], [len(prompt), len(completion)])}


def _finish_pair(record: dict[str, Any], prompt: Ids, answers: list[Ids]) -> dict[str, Any]:
    chosen, rejected = answers
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, "margin": record["margin"]}


def _finish_labelled(record: dict[str, Any], prompt: Ids, answers: list[Ids]) -> dict[str, Any]:
    (completion,) = answers
    return {"prompt_ids": prompt, "completion_ids": completion, "label": record["label"]}


_FINISH: dict[Format, Callable[[dict[str, Any], Ids, list[Ids]], dict[str, Any]]] = {
    "prompt-completion": _finish_completion,
    "preference": _finish_pair,
    "unpaired": _finish_labelled,
}


# Beginnings, ends and lengths -------------------------------------------------------------------------------------------------------


def opening_tokens(tokenizer: Any) -> Ids:
    """The special tokens that the tokenizer itself puts before a text (a beginning-of-sequence token, or none)."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = [i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain]
    return np.asarray(whole[: starts[0]] if starts else [], dtype=np.int32)


def with_opening(ids: Ids, opening: Ids) -> Ids:
    """`ids` after `opening`, which is not repeated when the text already begins with it."""
    if not len(opening) or (len(ids) >= len(opening) and np.array_equal(ids[: len(opening)], opening)):
        return ids
    return np.concatenate([opening, ids])


def _spare_opening(tokenizer: Any, eos: int) -> Ids:
    """What stands for an empty prompt, because a model needs one token to predict the next from."""
    return np.asarray([eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id], dtype=np.int32)


def _ended(ids: Ids, eos: int) -> Ids:
    """`ids` with exactly one end token at its end."""
    length = len(ids)
    while length and ids[length - 1] == eos:
        length -= 1
    return np.concatenate([ids[:length], np.asarray([eos], dtype=np.int32)])


def _fit(rows: _Rows, i: int, prompt: Ids, answers: list[Ids]) -> tuple[Ids, list[Ids]] | None:
    """Prompt and answers within the limits, or None when the row is dropped."""
    prompt_room, answer_room = _rooms(len(prompt), max((len(answer) for answer in answers), default=1), rows.limits)
    over = ["prompt"] if len(prompt) > prompt_room else []
    over += ["completion"] if any(len(answer) > answer_room for answer in answers) else []
    if over:
        lengths = f"{len(prompt)} prompt tokens, {' and '.join(str(len(answer)) for answer in answers) or 'no'} completion tokens"
        if not rows.may_cut(i, over, lengths):
            return None
    return _cut_left(prompt, prompt_room, rows.tokenizer.bos_token_id), [answer[:answer_room] for answer in answers]


def _rooms(prompt: int, answer: int, limits: Limits) -> tuple[int, int]:
    """Tokens allowed for a prompt of `prompt` tokens and its longest answer of `answer`."""
    prompt_room = limits.max_prompt_length or prompt
    answer_room = limits.max_completion_length or answer
    if limits.max_length:
        wanted = min(answer, answer_room)
        prompt_room = min(prompt_room, limits.max_length - min(wanted, limits.max_length // 2))
        answer_room = min(answer_room, limits.max_length - min(prompt, prompt_room))
    return prompt_room, answer_room


def _cut_left(ids: Ids, room: int, bos: int | None) -> Ids:
    if len(ids) <= room:
        return ids
    if room > 1 and ids[0] == bos:
        return np.concatenate([ids[:1], ids[len(ids) - room + 1 :]])
    return ids[len(ids) - room :]
