"""Forced answers inside a loop: the progress that the policy's own steps make, a process reward without a model of steps.

After each step of an answer the mark of the final answer is written (`Cut.answer`, "Answer:"), and the policy goes on from there in a few tokens. The
share of these forced answers that are right, J(z_1 … z_j), is the chance of success of its best guess after j steps: the meta-prover of Qu et al. 2025
(arXiv:2503.07572, section 4), also known as budget forcing. A step's progress is

    J(z_1 … z_j) − J(z_1 … z_{j−1})          and after the last step the answer counts as it stands, instead of J
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telos.algorithms.language._sampling import Writer
from telos.algorithms.language.step_labels import Judge, estimate_successes
from telos.core.errors import UsageError
from telos.data.batches import REWARD_VALID, Rollouts, mask, pad_1d
from telos.dataflow import Group
from telos.models.generation import Sampling
from telos.models.language import LanguageModel
from telos.objectives.process_reward import Cut, StepScores, step_ends


@dataclass(frozen=True)
class Forcing:
    """How answers are forced: `answers` from each place, each of at most `tokens` tokens behind the mark."""

    answers: int = 4
    tokens: int = 16

    @staticmethod
    def read(spec: str, option: str = "--process_reward") -> Forcing | None:
        """`forced:ANSWERS[,TOKENS]`; None for a text that begins otherwise. Raises `UsageError` for numbers that are none."""
        kind, _, rest = spec.partition(":")
        if kind != "forced":
            return None
        numbers = [part.strip() for part in rest.split(",")]
        if len(numbers) > 2 or not all(part.isdecimal() and int(part) > 0 for part in numbers):
            raise UsageError(f"{option} {spec}: give forced:ANSWERS or forced:ANSWERS,TOKENS, both whole numbers of at least 1")
        return Forcing(*map(int, numbers))


DEFAULT_FORCING = Forcing()


def closing_tokens(model: LanguageModel, cut: Cut) -> list[int]:
    """The tokens that force an answer. Raises `UsageError` where the cut has no mark of an answer."""
    if not cut.answer:
        raise UsageError("forced answers need --answer_mark, the text behind which the final answer stands")
    return model.tokenizer(f" {cut.answer}", add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def progress_of_steps(
    rollouts: Rollouts,
    writer: Group[Writer],
    model: LanguageModel,
    judge: Judge,
    forcing: Forcing,
    *,
    cut: Cut,
    sampling: Sampling,
    seed: int,
) -> tuple[Tensor, Tensor, int]:
    """(progress [N, T] at steps' last tokens, bool [N, T] true there, tokens generated) of scored answers. An answer is right when its reward is above 1/2;
    a step beside which nothing is known has no progress."""
    rows = [row[:n] for row, n in zip(rollouts.completion_ids.tolist(), rollouts.completion_length.tolist(), strict=True)]
    ends = [step_ends(model.tokenizer, ids, cut) for ids in rows]
    outcomes = torch.where(rollouts.reward_status == REWARD_VALID, rollouts.reward, torch.nan)
    options: dict[str, Any] = {"completions": forcing.answers, "sampling": sampling, "seed": seed}
    closing = closing_tokens(model, cut)
    found, spent = estimate_successes(rollouts, ends, outcomes, writer, model, judge, closing=closing, room=forcing.tokens, **options)
    device = rollouts.completion_ids.device
    values, _ = pad_1d([successes.advantages().nan_to_num(0.0).tolist() for successes in found], torch.float32)
    places, count = pad_1d(ends)
    steps = mask(count, places.shape[1])
    scores, at_end = StepScores(values * steps, places, steps, rollouts.completion_ids.shape[1]).dense()
    return scores.to(device), at_end.to(device), spent
