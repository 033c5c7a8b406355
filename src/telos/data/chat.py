"""Conversations to token ids by the tokenizer's own chat template, with the boundary between prompt and answer checked on tokens.

A prompt is rendered with the opening of the assistant's turn (`add_generation_prompt`), as it will be when the model answers; an answer is
what the rendering of the whole conversation adds to it. Where a template renders the earlier turns differently once an answer follows,
no such boundary exists, and the row is refused instead of being learnt wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from telos.core.errors import DataError, UsageError
from telos.data.formats import BadRow, Message

Ids = np.ndarray  # [n] int32 token ids
Tools = list[dict[str, Any]] | None
Rendered = tuple[str, Ids]  # a text and its tokens
T = TypeVar("T")

_GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError)
_CHUNK = 1024  # texts per call of the tokenizer: its lists of Python integers never pile up


@dataclass(frozen=True)
class Answered:
    """A prompt and the answers to it as token ids; `notes` are the counted peculiarities of the row."""

    prompt: Ids
    answers: list[Ids]
    notes: tuple[str, ...] = ()


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Token ids of each text alone: no special tokens added, no padding, no truncation. Equal texts share one array."""
    distinct = list(dict.fromkeys(texts))  # prompts often come with many answers
    found: dict[str, Ids] = {}
    for start in range(0, len(distinct), _CHUNK):
        chunk = distinct[start : start + _CHUNK]
        encoded = tokenizer(chunk, add_special_tokens=False, padding=False, truncation=False, return_attention_mask=False, verbose=False)
        found.update((text, np.asarray(row, dtype=np.int32)) for text, row in zip(chunk, encoded["input_ids"], strict=True))
    return [found[text] for text in texts]


def require_template(tokenizer: Any) -> None:
    """Raise `UsageError` when the tokenizer cannot render conversations."""
    if not getattr(tokenizer, "chat_template", None):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise UsageError(
            f"the data are conversations, but the tokenizer {name!r} has no chat template: "
            "give one with --chat-template file.jinja, or give the data as text"
        )


def use_template(tokenizer: Any, path: str | Path) -> None:
    """Set the tokenizer's chat template from a Jinja file. Raises `DataError` when it cannot be read or is not Jinja."""
    try:
        template = Path(path).read_text(encoding="utf-8")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"the chat template cannot be read: {error}", "Check the path") from None
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"{path}:{error.lineno}", f"the chat template is not valid Jinja: {error.message}", "Mend the template") from None
    tokenizer.chat_template = template


def render(tokenizer: Any, messages: list[Message], tools: Tools = None, *, answer_next: bool = False) -> str:
    """The text of a conversation; with `answer_next` it ends where the assistant's answer begins. Raises `BadRow` if it cannot be."""
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=answer_next)
    except _TEMPLATE_ERRORS as error:
        raise _refused(error) from None


def _refused(error: Exception) -> BadRow:
    return BadRow("template-refused", f"the chat template cannot render the messages: {error}", "Check roles and their order")


def _render_each(
    tokenizer: Any, conversations: Sequence[list[Message]], tools: Sequence[Tools], *, answer_next: bool
) -> list[Rendered | BadRow]:
    texts: list[str | BadRow] = []
    for messages, tool in zip(conversations, tools, strict=True):
        try:
            texts.append(render(tokenizer, messages, tool, answer_next=answer_next))
        except BadRow as bad:
            texts.append(bad)
    encoded = iter(encode_texts(tokenizer, [text for text in texts if isinstance(text, str)]))
    return [(text, next(encoded)) if isinstance(text, str) else text for text in texts]


def _good(found: T | BadRow) -> T:
    if isinstance(found, BadRow):
        raise found
    return found


def encode_prompts(tokenizer: Any, prompts: Sequence[list[Message]], tools: Sequence[Tools]) -> list[Ids | BadRow]:
    """Each prompt up to where the assistant's answer begins."""
    return [found if isinstance(found, BadRow) else found[1] for found in _render_each(tokenizer, prompts, tools, answer_next=True)]


# Answers to a prompt -----------------------------------------------------------------------------------------------------------------


def encode_answers(
    tokenizer: Any, prompts: Sequence[list[Message]], answers: Sequence[Sequence[list[Message]]], tools: Sequence[Tools]
) -> list[Answered | BadRow]:
    """Each prompt with its answers (one for completions, two for pairs): what the whole conversation adds to the tokens of the prompt.

    Nothing after the end token of the last turn stays (templates put a line break there, which no model gets to write).
    """
    encoded_prompts = _render_each(tokenizer, prompts, tools, answer_next=True)
    wholes = [prompt + answer for prompt, row in zip(prompts, answers, strict=True) for answer in row]
    whole_tools = [tool for tool, row in zip(tools, answers, strict=True) for _ in row]
    encoded = iter(_render_each(tokenizer, wholes, whole_tools, answer_next=False))
    found: list[Answered | BadRow] = []
    for prompt, row in zip(encoded_prompts, answers, strict=True):
        parts = [next(encoded) for _ in row]
        try:
            found.append(_answered(tokenizer, prompt, parts, row))
        except BadRow as bad:
            found.append(bad)
    return found


def _answered(tokenizer: Any, prompt: Rendered | BadRow, wholes: list[Rendered | BadRow], answers: Sequence[list[Message]]) -> Answered:
    other_turns = any(message["role"] != "assistant" for answer in answers for message in answer)
    notes = ["answer-has-other-turns"] if other_turns else []
    prompt_text, prompt_ids = _good(prompt)
    found = []
    for text, ids in map(_good, wholes):
        if starts_with(ids, prompt_ids):
            answer = ids[len(prompt_ids) :]
        elif text.startswith(prompt_text):
            # The tokenizer merges across the boundary. The prompt keeps the tokens a model is prompted with, the answer is encoded alone.
            (answer,) = encode_texts(tokenizer, [text[len(prompt_text) :]])
            notes.append("boundary-encoded-apart")
        else:
            raise _no_boundary()
        answer = until_end_token(tokenizer, answer)
        if not len(answer):
            raise BadRow("empty-answer", "the chat template writes nothing for the answer", "Check the template and the roles")
        if answer[-1] != tokenizer.eos_token_id:
            notes.append("template-writes-no-end-token")
        found.append(answer)
    return Answered(prompt_ids, found, tuple(dict.fromkeys(notes)))


def _no_boundary() -> BadRow:
    return BadRow(
        "no-boundary",
        "the chat template renders the earlier turns differently once the assistant's answer follows, so the answer has no clear beginning",
        "Use a template that does not rewrite earlier turns, or for 'messages' one with {% generation %} markers (--chat-template)",
    )


def starts_with(ids: Ids, beginning: Ids) -> bool:
    """Whether `ids` begins with all of `beginning`."""
    return len(ids) >= len(beginning) and bool(np.array_equal(ids[: len(beginning)], beginning))


def until_end_token(tokenizer: Any, ids: Ids) -> Ids:
    """`ids` up to its last end-of-sequence token, when only white space follows that; else `ids`."""
    ends = np.flatnonzero(ids == tokenizer.eos_token_id)
    if len(ends) == 0 or ends[-1] == len(ids) - 1:
        return ids
    tail = tokenizer.decode(ids[ends[-1] + 1 :].tolist())
    return ids if tail.strip() else ids[: ends[-1] + 1]


# Whole conversations with a mask of what the assistant wrote -------------------------------------------------------------------------


def encode_conversations(
    tokenizer: Any, conversations: Sequence[list[Message]], tools: Sequence[Tools]
) -> list[tuple[Ids, np.ndarray] | BadRow]:
    """(ids [n] int32, mask [n] bool: tokens written by the assistant, with the end of its turns) of each conversation.

    From the template's {% generation %} markers where it has them; else from the tokens that each assistant turn adds to those before.
    """
    found: list[tuple[Ids, np.ndarray] | BadRow] = []
    for start in range(0, len(conversations), _CHUNK):
        part = slice(start, start + _CHUNK)
        marked = tokenizer.is_fast and bool(_GENERATION.search(tokenizer.get_chat_template(None, tools[start])))
        encode = _encode_marked if marked else _encode_by_turns
        found += [_with_something_to_learn(row) for row in encode(tokenizer, conversations[part], tools[part])]
    return found


def _with_something_to_learn(row: tuple[Ids, np.ndarray] | BadRow) -> tuple[Ids, np.ndarray] | BadRow:
    if isinstance(row, BadRow) or row[1].any():
        return row
    return BadRow("no-answer", "the chat template marks no token as the assistant's", "Check the {% generation %} markers and the roles")


def _encode_marked(
    tokenizer: Any, conversations: Sequence[list[Message]], tools: Sequence[Tools]
) -> Iterator[tuple[Ids, np.ndarray] | BadRow]:
    try:
        if all(tool == tools[0] for tool in tools):
            yield from _marked(tokenizer, conversations, tools[0])
            return
    except _TEMPLATE_ERRORS:
        pass  # one by one, to find the row
    for messages, tool in zip(conversations, tools, strict=True):
        try:
            yield from _marked(tokenizer, [messages], tool)
        except _TEMPLATE_ERRORS as error:
            yield _refused(error)


def _marked(tokenizer: Any, conversations: Sequence[list[Message]], tools: Tools) -> list[tuple[Ids, np.ndarray]]:
    found = tokenizer.apply_chat_template(list(conversations), tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    pairs = zip(found["input_ids"], found["assistant_masks"], strict=True)
    return [(np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool)) for ids, mask in pairs]


def _encode_by_turns(
    tokenizer: Any, conversations: Sequence[list[Message]], tools: Sequence[Tools]
) -> Iterator[tuple[Ids, np.ndarray] | BadRow]:
    """Encodes, for every assistant turn, the conversation up to its opening and up to its close, and for every conversation the whole."""
    plans: list[list[str] | BadRow] = []
    for messages, tool in zip(conversations, tools, strict=True):
        try:
            plans.append(_renderings(tokenizer, messages, tool))
        except BadRow as bad:
            plans.append(bad)
    encoded = iter(encode_texts(tokenizer, [text for plan in plans if not isinstance(plan, BadRow) for text in plan]))
    for plan in plans:
        yield plan if isinstance(plan, BadRow) else _mask_of_turns(tokenizer, [next(encoded) for _ in plan])


def _renderings(tokenizer: Any, messages: list[Message], tools: Tools) -> list[str]:
    """The whole conversation, then (opening, close) of each assistant turn."""
    if messages[0]["role"] == "assistant":
        remedy = "Begin with the user, or use a template with {% generation %} markers (--chat-template file.jinja)"
        raise BadRow("begins-with-answer", "the conversation begins with the assistant, so its turn has no opening to start from", remedy)
    whole = render(tokenizer, messages, tools)
    texts = [whole]
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            texts.append(render(tokenizer, messages[:i], tools, answer_next=True))
            texts.append(whole if i == len(messages) - 1 else render(tokenizer, messages[: i + 1], tools))
    return texts


def _mask_of_turns(tokenizer: Any, encoded: list[Ids]) -> tuple[Ids, np.ndarray] | BadRow:
    whole, *turns = encoded
    mask = np.zeros(len(whole), dtype=bool)
    for opening, close in zip(turns[::2], turns[1::2], strict=True):
        if not (starts_with(close, opening) and starts_with(whole, close)):
            return _no_boundary()
        turn = until_end_token(tokenizer, close[len(opening) :])
        mask[len(opening) : len(opening) + len(turn)] = True
    return whole, mask
