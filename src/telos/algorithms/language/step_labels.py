"""Labels of steps without people: how often does an answer come out right that goes on from here?

From the prompt and from after each step of an answer, m completions are sampled and judged. With c_t successes among them (Wang et al. 2023, Math-Shepherd;
Setlur et al. 2024, PAV):

    soft label   Q_t = c_t / m                    hard label   1 if c_t > 0, else 0
    best of K    1 − (1 − Q_t)^K, estimated from the same m by 1 − C(m − c_t, K) / C(m, K)
    advantage    A_t = Q_t − Q_{t−1},   Q_0 that of the prompt

After the last step nothing is sampled: the answer is judged as it is. Completions go on from the tokens that were sampled, never from text encoded again, and
may make answers no longer than the answers themselves could be. Prefixes that several answers to a prompt share are completed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from telos.algorithms.language._sampling import Writer
from telos.core.seeds import derive
from telos.data.batches import Prompts, Rollouts, pad_1d
from telos.dataflow import Group
from telos.functional.process import success_of_best
from telos.models.generation import Sampling
from telos.models.language import LanguageModel

Labelling = Literal["soft", "hard"]
Judge = Callable[[Rollouts, list[str]], Tensor]  # answers and their texts -> [N] float: 1 success, 0 failure, NaN where nobody can say


@dataclass(frozen=True)
class Successes:
    """What came of completions: `successes` of `trials`, both [S + 1] int64, from the prompt and from after each of S steps. The answer itself counts as
    many trials as there were completions, all of one outcome."""

    successes: Tensor
    trials: Tensor

    def values(self, best_of: int = 1) -> Tensor:
        """Q_0 … Q_S, [S + 1] float64: the chance of success, or of the best of `best_of` completions (NaN where there were fewer)."""
        return success_of_best(self.successes, self.trials, best_of)

    def labels(self, how: Labelling = "soft", best_of: int = 1) -> Tensor:
        """Labels of the prompt and of the steps, [S + 1] float64; NaN where nothing is known."""
        values = self.values(best_of)
        return torch.where(self.successes > 0, 1.0, 0.0).double().masked_fill(values.isnan(), torch.nan) if how == "hard" else values

    def advantages(self, best_of: int = 1) -> Tensor:
        """A_1 … A_S, [S] float64."""
        return self.values(best_of).diff()


def estimate_successes(
    answers: Rollouts,
    ends: Sequence[Sequence[int]],
    outcomes: Tensor,
    completer: Group[Writer],
    model: LanguageModel,
    judge: Judge,
    *,
    completions: int,
    sampling: Sampling,
    seed: int,
    batch: int = 512,
    closing: Sequence[int] = (),
    room: int | None = None,
) -> tuple[list[Successes], int]:
    """`Successes` of each of N answers, and how many tokens were generated for them.

    `ends[i]`: the last tokens of answer i's steps; `outcomes` [N]: what `judge` says of the answers. `completer` writes `completions` answers from each
    prefix; an answer with all that stands before it has at most `sampling.max_new_tokens` tokens. `model` decodes. `batch`: completions in one call.
    `closing`: tokens that are written after each prefix before the completer goes on. `room`: how many tokens it may then write (as many more as a prefix is
    shorter than the longest in its call), instead of the bound on the whole answer.
    """
    prompts, tokens = _rows(answers.prompt_ids, answers.prompt_length), _rows(answers.completion_ids, answers.completion_length)
    prompt_of = dict(zip(answers.row.tolist(), prompts, strict=True))
    keys = [
        [(row, tuple(ids[:length])) for length in (0, *(end + 1 for end in cuts[:-1]))]
        for row, ids, cuts in zip(answers.row.tolist(), tokens, ends, strict=True)
    ]
    asked_of = {key for row in keys for key in row}
    # What is written behind a prefix may fill the context, and then nothing is known; what was sampled has always left room.
    full = {key for key in asked_of if closing and len(prompt_of[key[0]]) + len(key[1]) + len(closing) >= model.context}
    # Like lengths in one call: they have about the same room left.
    order = sorted(asked_of - full, key=lambda key: (len(key[1]), key))
    size, spent, found = max(1, batch // completions), 0, dict.fromkeys(full, torch.zeros(2, dtype=torch.int64))
    for start in range(0, len(order), size):
        asked = order[start : start + size]
        ids, length = pad_1d([prompt_of[row] for row, _ in asked])
        where = Prompts(prompt_ids=ids, prompt_length=length, row=torch.tensor([row for row, _ in asked]), batch_size=[len(asked)])
        begun = [[*prefix, *closing] for _, prefix in asked]
        limit = sampling if room is None else replace(sampling, max_new_tokens=max(map(len, begun)) + room)
        options = {"sampling": limit, "n": completions, "seed": derive(seed, "completions", start)}
        whole, texts = completer.call("write", where.to(answers.prompt_ids.device), begun, **options)
        spent += int(whole.action_mask.sum())
        said = judge(whole, texts).view(len(asked), completions)
        counted = torch.stack([(said > 0.5).sum(1), (~said.isnan()).sum(1)], 1)
        found |= dict(zip(asked, counted.cpu(), strict=True))
    out = []
    for i, row_keys in enumerate(keys):
        own = torch.tensor([int(outcomes[i] > 0.5), int(not outcomes[i].isnan())]) * completions
        counts = torch.stack([*(found[key] for key in row_keys), own])
        out.append(Successes(counts[:, 0], counts[:, 1]))
    return out, spent


def _rows(ids: Tensor, length: Tensor) -> list[list[int]]:
    return [row[:n] for row, n in zip(ids.tolist(), length.tolist(), strict=True)]
