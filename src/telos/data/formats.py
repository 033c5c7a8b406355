"""Which format a table of rows is in, and every row checked and brought to one shape.

Formats are those of TRL: language modelling (`text` or `messages`), prompt-only, prompt-completion, preference (`chosen`, `rejected`, and
`prompt` or the beginning that both share), unpaired preference (`label`), stepwise supervision. Two importers lead into them: verl rows
(`data_source`, `prompt`, `reward_model`, `extra_info`) become prompt-only, ranked completions become preference pairs, or stay lists where
a method learns from lists. Text is a string, a conversation is a list of messages with `role` and `content`.

A bad row ends the command with its file and line, or is dropped and counted: `Counts` holds the choice and the figures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any, Literal, NoReturn

from telos.core.errors import DataError, UsageError, did_you_mean
from telos.data.readers import Record, Rows

Format = Literal["language-modeling", "prompt-only", "prompt-completion", "preference", "unpaired", "ranked", "stepwise"]
Pairing = Literal["all", "adjacent", "best-worst"]
OnBadRow = Literal["error", "drop"]
Message = dict[str, Any]


class BadRow(Exception):
    """A row that cannot be used. `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, problem: str, remedy: str = "") -> None:
        self.reason, self.problem, self.remedy = reason, problem, remedy
        super().__init__(problem)


@dataclass
class Counts:
    """What became of the rows: how many were read and kept, and how many were dropped or changed for which reason, with the first place."""

    source: str
    on_bad_row: OnBadRow = "error"
    read: int = 0  # rows of the source
    kept: int = 0  # examples that remain; ranked rows give several each
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)  # reason -> place of its first row
    extra_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("error", "drop"):
            raise UsageError(f"on_bad_row is 'error' or 'drop', not {self.on_bad_row!r}")

    def bad(self, place: str, row: BadRow) -> None:
        """Count a bad row, or raise `DataError` under the policy 'error'."""
        if self.on_bad_row == "error":
            remedy = (row.remedy + ". " if row.remedy else "") + "Mend the row, or drop such rows with --on-bad-row drop"
            raise DataError(place, row.problem, remedy)
        self.drop(place, row.reason)

    def drop(self, place: str, reason: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first.setdefault(reason, place)

    def change(self, place: str, reason: str) -> None:
        """Count something done to a row that stays, for example a truncated prompt."""
        self.changed[reason] = self.changed.get(reason, 0) + 1
        self.first.setdefault(reason, place)

    def require_some(self) -> None:
        """Raise `UsageError` when nothing is left."""
        if self.kept == 0:
            raise UsageError(f"{self.source}: no usable row is left of {self.read}. {self._listed(self.dropped)}")

    def _listed(self, reasons: dict[str, int]) -> str:
        return ", ".join(f"{reason} {count} (first: {self.first[reason]})" for reason, count in reasons.items())

    def lines(self) -> list[str]:
        """The figures for the user, one line per kind; only what happened."""
        found = [f"{self.source}: {self.read} rows read, {self.kept} examples kept"]
        found += [f"dropped: {self._listed(self.dropped)}"] if self.dropped else []
        found += [f"changed: {self._listed(self.changed)}"] if self.changed else []
        return found + ([f"extra columns kept for reward functions: {', '.join(self.extra_columns)}"] if self.extra_columns else [])

    def as_dict(self) -> dict[str, Any]:
        """The figures, JSON-able, for the record of a run."""
        names = ("source", "read", "kept", "dropped", "changed", "first")
        return {name: getattr(self, name) for name in names} | {"extra_columns": list(self.extra_columns)}


@dataclass(frozen=True)
class Layout:
    """A set of columns that is recognised, and the format it becomes."""

    name: str
    format: Format
    needs: tuple[tuple[str, ...], ...]  # one of each inner tuple must be there
    reads: tuple[str, ...]  # columns that are read, beside `tools`; all others are kept as extra columns

    def missing(self, columns: Iterable[str]) -> list[tuple[str, ...]]:
        return [choice for choice in self.needs if not set(choice) & set(columns)]

    def described(self) -> str:
        return f"{self.name} ({', '.join('|'.join(choice) for choice in self.needs)})"


# The most specific comes first: detection takes the first whose columns are all there.
LAYOUTS = (
    Layout("verl", "prompt-only", (("data_source",), ("prompt",), ("reward_model",)), ("prompt",)),
    Layout("stepwise", "stepwise", (("prompt",), ("completions",), ("labels",)), ("prompt", "completions", "labels")),
    Layout("ranked", "preference", (("prompt",), ("completions",), ("ranks", "scores")), ("prompt", "completions", "ranks", "scores")),
    Layout("ranked list", "ranked", (("prompt",), ("completions",), ("ranks", "scores")), ("prompt", "completions", "ranks", "scores")),
    Layout("preference", "preference", (("prompt",), ("chosen",), ("rejected",)), ("prompt", "chosen", "rejected", "margin")),
    Layout("preference without prompt", "preference", (("chosen",), ("rejected",)), ("chosen", "rejected", "margin")),
    Layout("unpaired", "unpaired", (("prompt",), ("completion",), ("label",)), ("prompt", "completion", "label")),
    Layout("prompt-completion", "prompt-completion", (("prompt",), ("completion",)), ("prompt", "completion")),
    Layout("language-modeling", "language-modeling", (("messages", "text"),), ("messages", "text")),
    Layout("prompt-only", "prompt-only", (("prompt",),), ("prompt",)),
)


def detect(columns: Sequence[str], wanted: Sequence[Format] | None = None, source: str = "data") -> Layout:
    """The layout of `columns`: the first of the `wanted` formats that they can give, or the most specific layout when none is wanted.

    Raises `DataError` naming the columns found, the formats wanted and the missing column nearest to one that is there.
    """
    fitting = [layout for layout in LAYOUTS if not layout.missing(columns)]
    if wanted is None and fitting:
        return fitting[0]
    for name in wanted or ():
        for layout in fitting:
            if layout.format == name:
                return layout
    candidates = [layout for layout in LAYOUTS if wanted is None or layout.format in wanted]
    nearest = min(candidates, key=lambda layout: (len(layout.missing(columns)), -len(layout.needs)))
    lacking = [f"no column {'|'.join(choice)!r}{_nearest(choice, columns)}" for choice in nearest.missing(columns)]
    problem = f"{', '.join(lacking)}; columns found: {', '.join(columns)}"
    if fitting:
        problem += f"; the rows look like {fitting[0].name}"
    raise DataError(source, problem, f"Wanted: {' or '.join(layout.described() for layout in candidates)}. Rename or add the columns")


def _nearest(choice: tuple[str, ...], columns: Sequence[str]) -> str:
    return next((hint for name in choice if (hint := did_you_mean(name, columns))), "")


@dataclass(frozen=True)
class Examples:
    """Checked rows of one format, all text or all conversations.

    records[i] holds, by format: `text` | `messages`; `prompt`; `prompt`, `completion`; `prompt`, `chosen`, `rejected`, `margin` (float);
    `prompt`, `completion`, `label` (bool); `prompt`, `completions`, `quality` (lists; higher is better); `prompt`, `completions` (list of str),
    `labels` (list of float); and `tools` where a row has them. extra[name][i] is the value of a column that the format does not use (None
    where the row has none); places[i] is file:line.
    """

    format: Format
    conversational: bool
    records: list[Record]
    extra: dict[str, list[Any]]
    places: list[str]
    counts: Counts

    def __len__(self) -> int:
        return len(self.records)


def read_examples(
    rows: Rows, wanted: Sequence[Format] | None = None, *, on_bad_row: OnBadRow = "error", pairing: Pairing = "all"
) -> Examples:
    """Detect the format of `rows` and check every row.

    wanted: formats that the caller can use, the preferred first; a table that can give one of them is read as that (the prompts of a
    preference table, for instance). pairing: which pairs a row of ranked completions gives.
    Raises `DataError` for missing columns and, under on_bad_row="error", for the first bad row; `UsageError` when no row is left.
    """
    columns = rows.columns
    layout = detect(columns, wanted, rows.source)
    if pairing not in ("all", "adjacent", "best-worst"):
        raise UsageError(f"unknown pairing {pairing!r}{did_you_mean(pairing, ('all', 'adjacent', 'best-worst'))}")
    counts = Counts(rows.source, on_bad_row, read=len(rows))
    read = _READERS[layout.name]
    records: list[Record] = []
    places: list[str] = []
    kept: list[Record] = []  # the source row of each record
    conversational: bool | None = None
    used = dict.fromkeys(name for name in layout.reads if name in columns)
    for row, place in zip(rows.records, rows.places, strict=True):
        try:
            # A column of the table that this row lacks is there as None, which a reader refuses where it needs a value.
            found = read(used | row, lambda reason, place=place: counts.change(place, reason))
            for record in _pairs_of(found, pairing) if layout.name == "ranked" else [found]:
                conversational = _same_kind(record, conversational)
                records.append(record)
                places.append(place)
                kept.append(row)
        except BadRow as bad:
            counts.bad(place, bad)
    counts.kept = len(records)
    counts.require_some()
    # Tools are written by the chat template; text has none, so there they are a column like any other.
    taken = (*layout.reads, "tools") if conversational else layout.reads
    counts.extra_columns = tuple(name for name in columns if name not in taken)
    extra = {name: [row.get(name) for row in kept] for name in counts.extra_columns} | _derived_columns(layout, records, kept)
    return Examples(layout.format, bool(conversational), records, extra, places, counts)


def _same_kind(record: Record, conversational: bool | None) -> bool:
    here = "messages" in record or isinstance(record.get("prompt"), list)
    if conversational is not None and here != conversational:
        kinds = ("text", "messages")
        raise BadRow("mixed-kinds", f"the row holds {kinds[here]} where the rows before hold {kinds[conversational]}", "Keep them apart")
    return here


def _derived_columns(layout: Layout, records: list[Record], rows: list[Record]) -> dict[str, list[Any]]:
    """Extra columns that an importer makes: verl's ground truth, and what the completions of a pair were ranked by."""
    if layout.name == "verl":
        models = [row.get("reward_model") for row in rows]
        return {"ground_truth": [model.get("ground_truth") if isinstance(model, dict) else None for model in models]}
    if layout.name == "ranked":
        return {name: [record.pop(name) for record in records] for name in ("chosen_quality", "rejected_quality")}
    return {}


# One reader per layout. Each takes a row and a function that counts a change by its reason, and returns the checked record ----------------

Note = Callable[[str], None]


def _read_language(row: Record, note: Note) -> Record:
    if row.get("messages") is None:
        return {"text": _filled(_value(row, "text"), "text")}
    messages = _messages(row["messages"], "messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRow("no-answer", "'messages' has no assistant message, so there is nothing to learn")
    return {"messages": messages} | _tools(row)


def _read_prompt(row: Record, note: Note) -> Record:
    prompt = _text_or_messages(row, "prompt")
    _check_prompt(prompt)
    return {"prompt": prompt} | _tools(row)


def _read_completion(row: Record, note: Note) -> Record:
    answers = {"completion": _text_or_messages(row, "completion")}
    prompt, (completion,) = _prompt_and_answers(_text_or_messages(row, "prompt"), answers, note)
    return {"prompt": prompt, "completion": completion} | _tools(row)


def _read_unpaired(row: Record, note: Note) -> Record:
    return _read_completion(row, note) | {"label": _label(_value(row, "label"), "label")}


def _read_preference(row: Record, note: Note) -> Record:
    return _pair(row, _text_or_messages(row, "prompt"), {name: _text_or_messages(row, name) for name in ("chosen", "rejected")}, note)


def _read_implicit(row: Record, note: Note) -> Record:
    chosen, rejected = _text_or_messages(row, "chosen"), _text_or_messages(row, "rejected")
    prompt, (chosen, rejected) = shared_beginning(chosen, rejected)
    return _pair(row, prompt, {"chosen": chosen, "rejected": rejected}, note)


def _pair(row: Record, prompt: Any, answers: dict[str, Any], note: Note) -> Record:
    prompt, (chosen, rejected) = _prompt_and_answers(prompt, answers, note)
    if chosen == rejected:
        note("chosen-equals-rejected")
    margin = _number(_value(row, "margin"), "margin") if "margin" in row else 0.0
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "margin": margin} | _tools(row)


def _read_stepwise(row: Record, note: Note) -> Record:
    prompt = _text_or_messages(row, "prompt")
    _check_prompt(prompt)
    steps, labels = _list(row, "completions"), _list(row, "labels")
    if len(steps) != len(labels):
        raise BadRow("wrong-count", f"{len(steps)} completions but {len(labels)} labels", "Give one label per step")
    steps = [_filled(step, f"completions[{i}]") for i, step in enumerate(steps)]
    values = [_number(label, f"labels[{i}]") for i, label in enumerate(labels)]
    if not all(0.0 <= value <= 1.0 for value in values):
        raise BadRow("bad-label", f"labels of steps must be true, false or a number in [0, 1], got {labels}")
    return {"prompt": prompt, "completions": steps, "labels": values} | _tools(row)


def _read_ranked(row: Record, note: Note) -> Record:
    """The completions with one quality each, higher is better: scores as they are, ranks (1 is best) negated."""
    by = "ranks" if row.get("ranks") is not None else "scores"
    answers, given = _list(row, "completions"), _list(row, by)
    if len(answers) != len(given):
        raise BadRow("wrong-count", f"{len(answers)} completions but {len(given)} {by}", f"Give one of the {by} per completion")
    sign = -1.0 if by == "ranks" else 1.0
    quality = [sign * _number(value, by) for value in given]
    named = {(name := f"completions[{i}]"): _content(answer, name) for i, answer in enumerate(answers)}
    prompt, completions = _prompt_and_answers(_text_or_messages(row, "prompt"), named, note)
    if len(set(quality)) < 2:
        raise BadRow("no-preference", f"all {by} are equal, so no completion is preferred")
    return {"prompt": prompt, "completions": completions, "quality": quality} | _tools(row)


_READERS: dict[str, Callable[[Record, Note], Record]] = {
    "verl": _read_prompt,
    "stepwise": _read_stepwise,
    "ranked": _read_ranked,
    "ranked list": _read_ranked,
    "preference": _read_preference,
    "preference without prompt": _read_implicit,
    "unpaired": _read_unpaired,
    "prompt-completion": _read_completion,
    "language-modeling": _read_language,
    "prompt-only": _read_prompt,
}


def _pairs_of(ranked: Record, pairing: Pairing) -> list[Record]:
    """Pairs (better, worse) of one ranked row; completions of equal quality make no pair. The margin stays 0: it is the user's to set."""
    best_first = sorted(zip(ranked["completions"], ranked["quality"], strict=True), key=lambda item: -item[1])
    ends = [(best_first[0], best_first[-1])]
    chosen = {"all": combinations(best_first, 2), "adjacent": pairwise(best_first), "best-worst": ends}[pairing]
    shared = {name: ranked[name] for name in ("prompt", "tools") if name in ranked}
    return [
        shared | {"chosen": better, "rejected": worse, "margin": 0.0, "chosen_quality": high, "rejected_quality": low}
        for (better, high), (worse, low) in chosen
        if high > low
    ]


# Prompts and answers ---------------------------------------------------------------------------------------------------------------------


def shared_beginning(chosen: str | list[Message], rejected: str | list[Message]) -> tuple[Any, tuple[Any, Any]]:
    """(prompt, (rest of chosen, rest of rejected)) for answers that repeat the prompt.

    Messages: those that both begin with. Text: the longest beginning that both share, taken back to the start of the word in which they
    part and to before a space, so that answers begin as the tokenizer sees words. Both rests keep at least a character or a message.
    Raises `BadRow` when an answer is empty or nothing is shared.
    """
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, str):
            _filled(value, name)
    if type(chosen) is not type(rejected):
        raise BadRow("mixed-kinds", "one of chosen and rejected is text, the other a list of messages")
    cut = _shared_length(chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _back_to_word(chosen, rejected, cut)
    if cut == 0:
        raise BadRow("no-prompt", "chosen and rejected share no beginning, so the row has no prompt", "Add a column 'prompt'")
    return chosen[:cut], (chosen[cut:], rejected[cut:])


def _shared_length(first: str | list[Message], second: str | list[Message]) -> int:
    longest = min(len(first), len(second)) - 1  # at least one character or message is left to each answer
    return next((i for i in range(longest) if first[i] != second[i]), max(longest, 0))


def _back_to_word(chosen: str, rejected: str, cut: int) -> int:
    def inside_a_word(at: int) -> bool:
        before = chosen[at - 1]
        return before.isascii() and before.isalnum() and any(rest[at].isascii() and rest[at].isalnum() for rest in (chosen, rejected))

    while cut > 0 and inside_a_word(cut):
        cut -= 1
    return cut - 1 if cut > 0 and chosen[cut - 1] == " " else cut


def _prompt_and_answers(prompt: Any, answers: dict[str, Any], note: Note) -> tuple[Any, list[Any]]:
    """Prompt and answers brought to one kind and checked.

    Public datasets mix kinds. A text prompt beside conversations becomes a user message, or is replaced by the messages that all answers
    begin with when these repeat it; a text answer to a conversation becomes an assistant message.
    """
    values = list(answers.values())
    if len({type(value) for value in values}) > 1:
        raise BadRow("mixed-kinds", f"some of {', '.join(answers)} are text, others lists of messages")
    if isinstance(prompt, list) and isinstance(values[0], str):
        values = [_one_message("assistant", value) for value in values]
    elif isinstance(prompt, str) and isinstance(values[0], list):
        note("text-prompt-made-message")
        prompt, values = _repeated_prompt(prompt, values)
    _check_prompt(prompt)
    for name, value in zip(answers, values, strict=True):
        _check_answer(name, value)
    return prompt, values


def _one_message(role: str, text: str) -> list[Message]:
    return [{"role": role, "content": text}]


def _repeated_prompt(prompt: str, answers: list[list[Message]]) -> tuple[list[Message], list[list[Message]]]:
    turns = [next((i for i, message in enumerate(answer) if message["role"] == "assistant"), 0) for answer in answers]
    heads = [answer[:turn] for answer, turn in zip(answers, turns, strict=True)]
    repeats = heads[0] and all(head == heads[0] for head in heads) and heads[0][-1].get("content") == prompt
    if not repeats:
        return _one_message("user", prompt), answers
    return heads[0], [answer[turn:] for answer, turn in zip(answers, turns, strict=True)]


def _check_prompt(prompt: str | list[Message]) -> None:
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        remedy = "End the prompt with the message to be answered"
        raise BadRow("prompt-ends-with-answer", "the last message of 'prompt' is the assistant's", remedy)


def _check_answer(name: str, answer: str | list[Message]) -> None:
    if isinstance(answer, str):
        if not answer.strip():
            raise BadRow("empty-answer", f"{name!r} is empty")
        return
    if answer[0]["role"] != "assistant":
        raise BadRow("answer-not-assistant", f"{name!r} begins with a message of {answer[0]['role']!r}, not of 'assistant'")
    for message in answer:
        if message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise BadRow("empty-answer", f"{name!r} holds an empty assistant message")


# Single values ---------------------------------------------------------------------------------------------------------------------------


def _value(row: Record, name: str) -> Any:
    value = row.get(name)
    if value is None:
        present = [str(column) for column, held in row.items() if held is not None]
        raise BadRow("missing-value", f"the row has no {name!r}{did_you_mean(name, present)}; it has {', '.join(present) or 'no values'}")
    return value


def _wrong_type(name: str, value: object, wanted: str) -> NoReturn:
    raise BadRow("wrong-type", f"{name!r} is {type(value).__name__}, wanted {wanted}")


def _filled(value: Any, name: str) -> str:
    """A text with something other than white space in it."""
    if not isinstance(value, str):
        _wrong_type(name, value, "text")
    _check_unicode(value, name)
    if not value.strip():
        raise BadRow("empty-answer", f"{name!r} is empty")
    return value


def _check_unicode(value: str, name: str) -> None:
    if value.isascii():
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("not-unicode", f"{name!r} holds half a character (a lone surrogate) at position {error.start}") from None


def _text_or_messages(row: Record, name: str) -> str | list[Message]:
    return _content(_value(row, name), name)


def _content(value: Any, name: str) -> str | list[Message]:
    if isinstance(value, str):
        _check_unicode(value, name)
        return value
    if not isinstance(value, list):
        _wrong_type(name, value, "text or a list of messages")
    return _messages(value, name)


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        _wrong_type(name, value, "a list of messages with role and content")
    if not value:
        raise BadRow("empty-messages", f"{name!r} is an empty list")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _message(message: Message, name: str) -> Message:
    """A message without None values and with text content. A call of tools may come without content."""
    found = {key: value for key, value in message.items() if value is not None}
    if not isinstance(found.get("role"), str) or ("content" not in found and not found.get("tool_calls")):
        raise BadRow("bad-message", f"{name} needs 'role' and 'content'; it has {', '.join(map(str, found)) or 'nothing'}")
    found["content"] = _content_text(found.get("content", ""), name)
    _check_unicode(found["content"], name)
    return found


def _content_text(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise BadRow("bad-message", f"the content of {name} is not text (nor a list of text parts)")
    return "".join(part["text"] for part in content)


def _list(row: Record, name: str) -> list[Any]:
    value = _value(row, name)
    if not isinstance(value, list) or not value:
        _wrong_type(name, value, "a list that is not empty")
    return value


def _number(value: Any, name: str) -> float:
    """A finite number; cells of a CSV file hold it as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        _wrong_type(name, value, "a number")
    if not math.isfinite(number):
        raise BadRow("not-finite", f"{name!r} is {number}", "Give a finite number")
    return number


def _label(value: Any, name: str) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    if value in (0, 1):
        return bool(value)
    raise BadRow("bad-label", f"{name!r} is {value!r}, wanted true or false")


def _tools(row: Record) -> Record:
    """{'tools': list of JSON schemas} where the row has tools; they may be written as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise BadRow("bad-tools", "'tools' is text but not JSON") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRow("bad-tools", "'tools' must be a list of JSON schemas")
    return {"tools": tools} if tools else {}
