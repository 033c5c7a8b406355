"""Batches of prompts with several answers, laid out as one row of real tokens.

A batch of pairs (or a group of samples per prompt) is a set of trees: a prompt, and branches that follow it. All token-wise work
(embedding, projections, MLP) runs once per token of the tree, so a prompt shared by both answers of a pair, or by a group of sixteen, is
computed once, and padding is never computed at all. Only attention needs rows: there each branch is gathered as prompt + answer, right-
padded among rows of about its length, and plain causal attention is exact because padding stands behind every real query.

The layout works for every Hugging Face decoder that goes through the attention interface with full causal attention; `LanguageModel` falls
back to padded rows for the others. Property tests hold that both give the same numbers and gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "telos_tree"
_BLOCK_ROWS = 8  # rows that are padded to one width on the CPU; a GPU takes all rows at once, because each launch costs more than padding


@dataclass(frozen=True)
class Answers:
    """Answers to prompts: right-padded ids with lengths. `owner[n]` is the prompt of answer n; every prompt has at least one answer, and
    the answers of a prompt stand together, in the prompts' order."""

    prompt_ids: Tensor  # [P, Lp] int64
    prompt_length: Tensor  # [P] >= 1
    ids: Tensor  # [N, La] int64
    length: Tensor  # [N] >= 1
    owner: Tensor  # [N] int64, non-decreasing

    @property
    def mask(self) -> Tensor:
        """[N, La], true at the answers' tokens."""
        return torch.arange(self.ids.shape[1], device=self.ids.device) < self.length[:, None]

    @staticmethod
    def repeat(prompt_ids: Tensor, prompt_length: Tensor, *answers: tuple[Tensor, Tensor]) -> Answers:
        """The same prompts with one answer of each kind: `repeat(p, n, (chosen, length), (rejected, length))` interleaves the kinds per prompt."""
        width = max(ids.shape[1] for ids, _ in answers)
        padded = [torch.nn.functional.pad(ids, (0, width - ids.shape[1])) for ids, _ in answers]
        count = prompt_ids.shape[0]
        return Answers(
            prompt_ids,
            prompt_length,
            torch.stack(padded, 1).reshape(count * len(answers), width),
            torch.stack([length for _, length in answers], 1).reshape(-1),
            torch.arange(count, device=prompt_ids.device).repeat_interleave(len(answers)),
        )


@dataclass(frozen=True)
class Tree:
    """Index tensors of one packed batch; T flat tokens, N rows of width L, M predicted tokens."""

    ids: Tensor  # [T]
    position: Tensor  # [T]
    row_index: Tensor  # [N, L] flat token of each place of a row; 0 where padded
    blocks: tuple[tuple[int, int], ...]  # (rows, width) of the blocks in which attention runs, shortest rows first
    block_index: Tensor  # [sum rows * width] flat token of each place of the blocks; 0 where padded
    home: Tensor  # [T] place in the blocks from which the token's attention output is read
    predict: Tensor  # [M] flat token whose hidden state predicts a target
    target: Tensor  # [M] the answer tokens
    cell: Tensor  # [M] place n * La + j of the target in the padded answers
    last: Tensor  # [N] flat token of each answer's last token
    shape: tuple[int, int]  # (N, La)

    def unpack(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[M] values of the targets as padded [N, La]."""
        out = torch.full((self.shape[0] * self.shape[1],), fill, dtype=values.dtype, device=values.device)
        return out.index_put((self.cell,), values).view(self.shape)


def _ranges(length: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(row, column) of every real token of right-padded rows, row by row."""
    mask = torch.arange(width, device=length.device) < length[:, None]
    row, column = mask.nonzero(as_tuple=True)
    return row, column


def pack(answers: Answers) -> Tree:
    """Builds the layout. Raises `ValueError` for an empty prompt or answer, or a prompt without an answer."""
    prompts, count = answers.prompt_ids.shape[0], answers.ids.shape[0]
    if bool((answers.prompt_length < 1).any()) or bool((answers.length < 1).any()):
        raise ValueError("every prompt and every answer needs at least one token")
    if int(answers.prompt_length.max()) > answers.prompt_ids.shape[1] or int(answers.length.max()) > answers.ids.shape[1]:
        raise ValueError("a length is larger than the width of its ids")
    if torch.bincount(answers.owner, minlength=prompts).min() < 1 or bool((answers.owner.diff() < 0).any()):
        raise ValueError("answers must stand in the order of their prompts, at least one for each")
    device = answers.ids.device
    p_row, p_column = _ranges(answers.prompt_length, answers.prompt_ids.shape[1])
    a_row, a_column = _ranges(answers.length, answers.ids.shape[1])
    p_start = answers.prompt_length.cumsum(0) - answers.prompt_length  # flat place of each prompt's first token
    a_start = p_row.numel() + answers.length.cumsum(0) - answers.length
    own_length = answers.prompt_length[answers.owner]
    width = int((own_length + answers.length).max())
    column = torch.arange(width, device=device)[None]
    in_prompt = column < own_length[:, None]
    in_row = column < (own_length + answers.length)[:, None]
    row_index = torch.where(in_prompt, p_start[answers.owner][:, None] + column, a_start[:, None] + column - own_length[:, None])
    row_index = torch.where(in_row, row_index, torch.zeros_like(row_index))
    first_answer = torch.searchsorted(answers.owner, torch.arange(prompts, device=device))
    blocks, block_index, row_start = _blocks(row_index, own_length + answers.length)
    home = torch.cat([row_start[first_answer[p_row]] + p_column, row_start[a_row] + own_length[a_row] + a_column])
    answer_place = a_start[a_row] + a_column
    prompt_end = (p_start + answers.prompt_length - 1)[answers.owner][a_row]
    return Tree(
        ids=torch.cat([answers.prompt_ids[p_row, p_column], answers.ids[a_row, a_column]]),
        position=torch.cat([p_column, own_length[a_row] + a_column]),
        row_index=row_index,
        blocks=blocks,
        block_index=block_index,
        home=home,
        predict=torch.where(a_column == 0, prompt_end, answer_place - 1),
        target=answers.ids[a_row, a_column],
        cell=a_row * answers.ids.shape[1] + a_column,
        last=a_start + answers.length - 1,
        shape=(count, answers.ids.shape[1]),
    )


def _blocks(row_index: Tensor, length: Tensor) -> tuple[tuple[tuple[int, int], ...], Tensor, Tensor]:
    """Rows [N, L] of tokens with their lengths [N], cut into blocks of similar length: (rows, width) of each, all their places one after
    another, and the place where each row begins."""
    count = len(length)
    order = length.argsort()
    start = torch.empty_like(length)
    blocks, index, place = [], [], 0
    for rows in order.split(_BLOCK_ROWS if length.device.type == "cpu" else count):
        width = int(length[rows[-1]])
        index.append(row_index[rows, :width].reshape(-1))
        start[rows] = place + width * torch.arange(len(rows), device=length.device)
        blocks.append((len(rows), width))
        place += len(rows) * width
    return tuple(blocks), torch.cat(index), start


def _tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed tree; without a tree, the library's own scaled dot-product attention.

    query [1, H, T, D], key and value [1, H_kv, T, D]; returns [1, T, H, D].
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[return-value]
    sizes = [rows * width for rows, width in tree.blocks]
    parts = (x[0].transpose(0, 1).index_select(0, tree.block_index).split(sizes) for x in (query, key, value))
    outs = []
    for (rows, width), *heads in zip(tree.blocks, *parts, strict=True):
        q, k, v = (x.view(rows, width, *x.shape[1:]).transpose(1, 2) for x in heads)
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            dropout_p=kwargs.get("dropout", 0.0),
            scale=kwargs.get("scaling"),
            is_causal=True,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outs.append(out.transpose(1, 2).reshape(rows * width, *out.shape[1::2]))
    return torch.cat(outs).index_select(0, tree.home)[None], None


AttentionInterface.register(ATTENTION, _tree_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
