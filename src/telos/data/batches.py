"""Typed batches of token sequences, and the operations that loops need on them: pad, mask, join, concatenate, trim.

Every ragged field is padded on the right and has an explicit length beside it. No mask is ever read off a pad id, so a tokenizer whose
pad token is its end token, or that pads on the left, changes nothing. The batch dimension [B] comes first in every field: slicing,
`split`, `chunk` and indexing of `tensordict.TensorClass` give batches of the same type.

Shapes: B rows, L sequence, P prompt, C completion, S steps. Padded positions hold 0 (False, 0.0), a valid index of every embedding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from tensordict import TensorClass
from torch import Tensor


class Sequences(TensorClass):
    """Whole sequences. ids [B, L] int64; length [B] int64; loss_mask [B, L] bool: the tokens that are learnt as targets.

    `loss_mask[:, 0]` is always False, because nothing precedes the first token.
    """

    ragged: ClassVar[dict[str, tuple[str, ...]]] = {"length": ("ids", "loss_mask")}
    ids: Tensor
    length: Tensor
    loss_mask: Tensor


class Prompts(TensorClass):
    """Prompts to be answered. prompt_ids [B, P] int64; prompt_length [B] int64; row [B] int64: index into the table the batch came from.

    Where a method asks for it: answer_ids [B, A] int64 with answer_length [B], the answer that the data have.
    """

    ragged: ClassVar[dict[str, tuple[str, ...]]] = {"prompt_length": ("prompt_ids",), "answer_length": ("answer_ids",)}
    prompt_ids: Tensor
    prompt_length: Tensor
    row: Tensor
    answer_ids: Tensor | None = None
    answer_length: Tensor | None = None


class Pairs(TensorClass):
    """Preference pairs. prompt_ids [B, P], chosen_ids [B, C], rejected_ids [B, R] int64 with lengths [B] int64; margin [B] float32
    (0 when the data have none); row [B] int64: index into the table.

    Where a method asks for them: chosen_score, rejected_score [B] float32; revise_chosen_ids, revise_rejected_ids [B, Q] int64 with lengths:
    the prompt that shows one of the answers and asks for a better one; sample_ids [B, n, S] int64 with sample_length [B, n]: further answers
    to the prompt; version_ids [B, V] int64 with version_length [B]: versions of both answers that lack more and more of their content, one after
    another, version_ends [B, 2 K] int64 with version_count [B]: where each ends, and degree [B, 2] int64: which of them is looked at.
    """

    ragged: ClassVar[dict[str, tuple[str, ...]]] = {
        "prompt_length": ("prompt_ids",),
        "chosen_length": ("chosen_ids",),
        "rejected_length": ("rejected_ids",),
        "revise_chosen_length": ("revise_chosen_ids",),
        "revise_rejected_length": ("revise_rejected_ids",),
        "version_length": ("version_ids",),
        "version_count": ("version_ends",),
    }
    prompt_ids: Tensor
    prompt_length: Tensor
    chosen_ids: Tensor
    chosen_length: Tensor
    rejected_ids: Tensor
    rejected_length: Tensor
    margin: Tensor
    row: Tensor
    chosen_score: Tensor | None = None
    rejected_score: Tensor | None = None
    revise_chosen_ids: Tensor | None = None
    revise_chosen_length: Tensor | None = None
    revise_rejected_ids: Tensor | None = None
    revise_rejected_length: Tensor | None = None
    sample_ids: Tensor | None = None
    sample_length: Tensor | None = None
    version_ids: Tensor | None = None
    version_length: Tensor | None = None
    version_ends: Tensor | None = None
    version_count: Tensor | None = None
    degree: Tensor | None = None


class Labelled(TensorClass):
    """Single answers. prompt_ids [B, P], completion_ids [B, C] int64 with lengths [B] int64; label [B] bool: True is desirable; row [B] int64.

    Where a method asks for them: score, advantage [B] float32; other_ids [B, D] int64 with other_length [B]: an answer to another prompt.
    """

    ragged: ClassVar[dict[str, tuple[str, ...]]] = {
        "prompt_length": ("prompt_ids",),
        "completion_length": ("completion_ids",),
        "other_length": ("other_ids",),
    }
    prompt_ids: Tensor
    prompt_length: Tensor
    completion_ids: Tensor
    completion_length: Tensor
    label: Tensor
    row: Tensor
    score: Tensor | None = None
    advantage: Tensor | None = None
    other_ids: Tensor | None = None
    other_length: Tensor | None = None


class Ranked(TensorClass):
    """Several answers to each prompt, from best to worst. prompt_ids [B, P] int64 with prompt_length [B]; completion_ids [B, K, C] int64 with
    completion_length [B, K], 0 where a prompt has fewer than K answers; quality [B, K] float32, higher is better; row [B] int64."""

    ragged: ClassVar[dict[str, tuple[str, ...]]] = {"prompt_length": ("prompt_ids",)}
    prompt_ids: Tensor
    prompt_length: Tensor
    completion_ids: Tensor
    completion_length: Tensor
    quality: Tensor
    row: Tensor


class Stepwise(TensorClass):
    """Answers whose steps are judged one by one. prompt_ids [B, P], completion_ids [B, C] int64 with lengths [B]; step_ends [B, S] int64:
    index in the completion of each step's last token; step_labels [B, S] float32 in [0, 1]; step_count [B] int64; row [B]."""

    ragged: ClassVar[dict[str, tuple[str, ...]]] = {
        "prompt_length": ("prompt_ids",),
        "completion_length": ("completion_ids",),
        "step_count": ("step_ends", "step_labels"),
    }
    prompt_ids: Tensor
    prompt_length: Tensor
    completion_ids: Tensor
    completion_length: Tensor
    step_ends: Tensor
    step_labels: Tensor
    step_count: Tensor
    row: Tensor


class Rollouts(TensorClass):
    """What a policy wrote, exactly as it was sampled; nothing here is ever tokenised again.

    prompt_ids [B, P], completion_ids [B, C] int64 with lengths [B]; action_mask [B, C] bool: tokens that the policy produced (with several
    turns some completion tokens come from the environment); logprobs [B, C] float32 as sampled, at `temperature` [B] float32;
    ended [B] bool: the end token was produced, else the completion was truncated; group [B] int64: rows with the same prompt share it;
    reward [B] float32; reward_status [B] int8 (`REWARD_VALID`, `REWARD_NOT_APPLICABLE`, `REWARD_ERROR`); weight_version [B] int64: version
    of the weights that sampled the row; row [B] int64: index into the table of prompts; support [B, C, K] int64: the tokens that sampling
    was limited to at each place (-1 pads), or None when it was not limited. Where a method asks for it: greedy_reward [B] float32 of the greedy
    answer to the same prompt.
    """

    ragged: ClassVar[dict[str, tuple[str, ...]]] = {
        "prompt_length": ("prompt_ids",),
        "completion_length": ("completion_ids", "action_mask", "logprobs", "support"),
    }
    prompt_ids: Tensor
    prompt_length: Tensor
    completion_ids: Tensor
    completion_length: Tensor
    action_mask: Tensor
    logprobs: Tensor
    ended: Tensor
    group: Tensor
    reward: Tensor
    reward_status: Tensor
    temperature: Tensor
    weight_version: Tensor
    row: Tensor
    support: Tensor | None = None
    greedy_reward: Tensor | None = None


REWARD_VALID, REWARD_NOT_APPLICABLE, REWARD_ERROR = 0, 1, 2

Batch = Sequences | Prompts | Pairs | Labelled | Ranked | Stepwise | Rollouts
B = TypeVar("B", Sequences, Prompts, Pairs, Labelled, Ranked, Stepwise, Rollouts)


def field_names(kind: type[Batch]) -> list[str]:
    """Names of the tensors of a batch class, in the order of its declaration."""
    return [field.name for field in dataclasses.fields(cast(Any, kind))]


def mask(length: Tensor, width: int) -> Tensor:
    """[B, width] bool, True at the first `length[b]` positions of row b. `length` [B] is an integer tensor."""
    return torch.arange(width, device=length.device)[None, :] < length[:, None]


def pad_1d(rows: Sequence[Sequence[float] | np.ndarray], dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Rows of different lengths -> (values [B, W] of `dtype`, padded on the right with 0; lengths [B] int64).

    W is the longest row, and at least 1, so that no operation downstream meets an axis of width 0.
    """
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    width = max(1, int(lengths.max(initial=0)))
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    values = np.zeros((len(rows), width), dtype=kind)
    if lengths.sum():
        values[np.arange(width) < lengths[:, None]] = np.concatenate([np.asarray(row, dtype=kind) for row in rows])
    return torch.from_numpy(values), torch.from_numpy(lengths)


def join(prompt_ids: Tensor, prompt_length: Tensor, completion_ids: Tensor, completion_length: Tensor) -> Sequences:
    """Prompts [B, P] and completions [B, C] -> sequences [B, L] without a gap between them, L = longest sum of the two lengths.

    `loss_mask` is True on completion tokens (and False on the first token of a row, which nothing precedes).
    """
    length = prompt_length + completion_length
    width = max(1, int(length.max())) if len(length) else 1
    position = torch.arange(width, device=prompt_ids.device).expand(len(length), width)
    offset = position - prompt_length[:, None]
    from_prompt = prompt_ids.gather(1, position.clamp(max=prompt_ids.shape[1] - 1))
    from_completion = completion_ids.gather(1, offset.clamp(0, completion_ids.shape[1] - 1))
    inside = mask(length, width)
    ids = torch.where(offset < 0, from_prompt, from_completion) * inside
    return Sequences(ids=ids, length=length, loss_mask=(offset >= 0) & inside & (position > 0), batch_size=[len(length)])


def trim(batch: B) -> B:
    """The same rows without columns in which every row is padded. Widths are at least 1."""
    narrow = {}
    for length, fields in batch.ragged.items():
        lengths = getattr(batch, length)
        if lengths is None:
            continue
        width = max(1, int(lengths.max())) if len(lengths) else 1
        present = {field: getattr(batch, field) for field in fields if getattr(batch, field) is not None}
        narrow.update({field: values[:, :width] for field, values in present.items()})
    return batch.replace(**narrow)


def concatenate(batches: Sequence[B]) -> B:
    """Rows of several batches of one type, in order, padded again to the widest. Group numbers are kept as they are.

    Raises ValueError for no batch at all, or when only some of them have an optional field, and TypeError for batches of different types.
    """
    if not batches:
        raise ValueError("concatenate needs at least one batch")
    kind = type(batches[0])
    if any(type(batch) is not kind for batch in batches):
        raise TypeError(f"concatenate needs batches of one type, got {sorted({type(batch).__name__ for batch in batches})}")
    joined: dict[str, Any] = {name: _stack([getattr(batch, name) for batch in batches], name) for name in field_names(kind)}
    return kind(**joined, batch_size=[sum(len(batch) for batch in batches)])


def _stack(parts: Sequence[Tensor | None], name: str) -> Tensor | None:
    """The parts below each other, every dimension after the first padded to the widest part."""
    given = [part for part in parts if part is not None]
    if not given:
        return None
    if len(given) < len(parts):
        raise ValueError(f"{name} is there in some of the batches and missing in others")
    widest = [max(part.shape[d] for part in given) for d in range(1, given[0].dim())]
    padding = -1 if name == "support" else 0  # 0 is a token, and a token that was not in the support must not enter it
    return torch.cat([_widened(part, widest, padding) for part in given])


def _widened(part: Tensor, widths: Sequence[int], value: int) -> Tensor:
    lacking = [want - have for want, have in zip(widths, part.shape[1:], strict=True)]
    # torch takes (before, after) of each dimension, the last one first
    return torch.nn.functional.pad(part, [n for lack in reversed(lacking) for n in (0, lack)], value=value) if any(lacking) else part
