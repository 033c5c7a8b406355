"""Process rewards: numbers for the steps of an answer, read off the tokens that a policy has sampled, never off text that is encoded again.

Steps are found by `step_ends`. Three kinds of model score them, all named by one specification (`load_process_reward`):

    FOLDER                        p_t = σ(z_t), the chance that step t is right (Lightman et al. 2023, arXiv:2305.20050)
    value:FOLDER                  V_t − V_{t−1}, V_t = σ(z_t): the same kind of model, trained on chances of success after step t; the progress of a step
                                  is the advantage of it under the policy whose success was measured (Setlur et al. 2024, arXiv:2410.08146, section 3)
    implicit:POLICY[,REFERENCE]   q_t − q_{t−1}, q_t = β log π(y_1 … y_t | x) / π_ref(y_1 … y_t | x): what a language model that was trained on outcomes
                                  says of each step without having seen a step's label (Yuan et al. 2024, arXiv:2412.01981, proposition 3.1)

z_t is a `ProcessRewardModel`'s number at the step's last token.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from telos.core.errors import UsageError
from telos.data.batches import Rollouts, join, mask, pad_1d
from telos.functional.process import progress
from telos.models import packing
from telos.models.language import LanguageModel
from telos.models.packing import Answers
from telos.objectives.reward_model import RewardModel, _names, same_ids

_VALUES_PROMPTS = "telos_values_prompts"  # in config.json: the head was trained at prompts' last tokens, too


# Steps on tokens ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """Where answers are cut into steps. A step ends with a separator; from `answer` on the text is one last step, whatever stands in it. What is blank
    makes no step. `answer` may be empty: then separators alone cut."""

    separators: tuple[str, ...] = (";", ".", "\n")
    answer: str = "Answer:"

    def __post_init__(self) -> None:
        if not self.separators or not all(self.separators):
            raise UsageError("steps need at least one separator, and none of them may be empty")

    def pieces(self, text: str) -> Iterator[tuple[int, bool]]:
        """(index of its last character, whether a separator closes it) of every step. Without a separator it is the last that is not blank."""
        work, start = text.partition(self.answer)[0] if self.answer else text, 0
        for separator in re.finditer("|".join(re.escape(s) for s in sorted(self.separators, key=len, reverse=True)), work):
            if work[start : separator.start()].strip():
                yield separator.end() - 1, True
            start = separator.end()
        if work[start:].strip():
            yield len(work.rstrip()) - 1, False
        if len(work) < len(text):
            yield len(text) - 1, False


DEFAULT_CUT = Cut()


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text that each token adds; special tokens add none. A character of several tokens is added by the last of them. Joined they are what the
    tokenizer decodes."""

    def decode(part: Sequence[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[return-value]

    whole = decode(ids)
    alone = [decode([token]) for token in ids]
    if "".join(alone) == whole:
        return alone
    # Some tokens say something else beside others (parts of a character, spaces that are written or not): each is read behind the last whole one.
    found = [""] * len(ids)
    behind = read = 0
    before = ""
    for i in range(len(ids)):
        text = decode(ids[behind : i + 1])
        if len(text) > len(before) and not text.endswith("�"):
            found[i] = text[len(before) :]
            behind, read = read, i + 1
            before = decode(ids[behind:read])
    if ids:
        found[-1] += decode(ids[behind:])[len(before) :]
    return found


def step_ends(tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[int], cut: Cut = DEFAULT_CUT) -> list[int]:
    """The index of the last token of every step of an answer, rising, at least one.

    A step's last token is the one in which its separator ends; steps that end in the same token are one. The last step ends at the last token that has
    text, and an end token belongs to no step. An answer without any text is one step that ends at its last token.
    """
    texts = token_texts(tokenizer, completion_ids)
    after = [0]
    for text in texts:
        after.append(after[-1] + len(text))
    ends = sorted({bisect.bisect_right(after, place) - 1 for place, _ in cut.pieces("".join(texts))})
    if not ends:
        return [len(texts) - 1]
    return [*ends[:-1], max(i for i, text in enumerate(texts) if text)]


# Models ------------------------------------------------------------------------------------------------------------------------------------------


class ProcessRewardModel(RewardModel):
    """A reward model whose head is read at every step's last token. Its folder is that of any sequence-classification model with one label."""

    @property
    def values_prompts(self) -> bool:
        """Whether the head has learned at prompts' last tokens, so that it can say how likely success is before the first step."""
        return bool(getattr(self.config, _VALUES_PROMPTS, False))

    @values_prompts.setter
    def values_prompts(self, value: bool) -> None:
        setattr(self.config, _VALUES_PROMPTS, value)

    def steps(self, answers: Answers, step_ends: Tensor, *, packed: bool | None = None) -> Tensor:
        """The head's number at `step_ends` [N, S] int64, places in the answers, [N, S] float32: its sigmoid is the probability that the step is right.
        −1 reads at the prompt's last token. `packed` forces or forbids the packed layout. Raises `UsageError` for a model that is no decoder."""
        if not self.reads_last_token:
            raise UsageError(
                f"{self.source}: a {type(self.body.base).__name__} does not read single tokens; a process reward model is a decoder"
            )
        column = answers.prompt_length[answers.owner][:, None] + step_ends
        row = torch.arange(len(column), device=column.device)[:, None]
        with self.body.compute():
            if self.body.packs if packed is None else packed:
                tree = packing.pack(answers)
                states = self.body.packed_hidden(tree)[tree.row_index[row, column]]
            else:
                rows = join(answers.prompt_ids[answers.owner], answers.prompt_length[answers.owner], answers.ids, answers.length)
                attended = mask(rows.length, rows.ids.shape[1]).long()
                states = self.body.decoder()(input_ids=rows.ids, attention_mask=attended, use_cache=False).last_hidden_state[row, column]
        with torch.autocast(self.device.type, enabled=False):
            return self.body.base.score(states.float())[..., 0]


# As a source of rewards --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepScores:
    """Scores of N answers' steps: `values` [N, S] float32 at the tokens `ends` [N, S] int64, true steps where `mask` [N, S]; 0 elsewhere."""

    values: Tensor
    ends: Tensor
    mask: Tensor
    width: int  # tokens of the longest answer as padded

    def dense(self) -> tuple[Tensor, Tensor]:
        """(scores [N, T], 0 everywhere but at steps' last tokens; bool [N, T], true there)."""
        place = torch.where(self.mask, self.ends, self.width)
        scores = self.values.new_zeros(len(self.values), self.width + 1).scatter(1, place, self.values)
        at_end = torch.zeros_like(scores, dtype=torch.bool).scatter(1, place, True)
        return scores[:, :-1], at_end[:, :-1]


@runtime_checkable
class ProcessReward(Protocol):
    """Anything that scores the steps of answers."""

    name: str

    def score(self, answers: Answers) -> StepScores:
        """The scores of the steps of answers, given as the policy's token ids. Without gradient."""
        ...

    def score_rollouts(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """(scores [N, T], 0 everywhere but at steps' last tokens; bool [N, T], true there), T the width of `rollouts.completion_ids`."""
        ...


class _Scored:
    """What the three kinds share: the steps are found, and answers are scored `batch_size` at a time."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, cut: Cut, batch_size: int) -> None:
        self.name, self.tokenizer, self.cut, self.batch_size = name, tokenizer, cut, batch_size

    def score(self, answers: Answers) -> StepScores:
        rows = zip(answers.ids.tolist(), answers.length.tolist(), strict=True)
        found = [step_ends(self.tokenizer, ids[:length], self.cut) for ids, length in rows]
        ends, count = (values.to(answers.ids.device) for values in pad_1d(found))
        steps = mask(count, ends.shape[1])
        with torch.no_grad():
            parts = [self._values(part, ends[rows], steps[rows]) for part, rows in _parts(answers, self.batch_size)]
        return StepScores(torch.where(steps, torch.cat(parts), 0.0), ends, steps, answers.ids.shape[1])

    def score_rollouts(self, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        _, owner, counts = torch.unique_consecutive(rollouts.group, return_inverse=True, return_counts=True)
        first = counts.cumsum(0) - counts
        answers = Answers(
            rollouts.prompt_ids[first], rollouts.prompt_length[first], rollouts.completion_ids, rollouts.completion_length, owner
        )
        return self.score(answers).dense()

    def _values(self, answers: Answers, ends: Tensor, steps: Tensor) -> Tensor:
        """[N, S]; what stands where `steps` is false does not matter."""
        raise NotImplementedError


class StepProbabilities(_Scored):
    """σ of a process reward model at each step: the chance that the step is right."""

    def __init__(self, model: ProcessRewardModel, *, name: str = "process", cut: Cut = DEFAULT_CUT, batch_size: int = 32) -> None:
        super().__init__(name, model.tokenizer, cut, batch_size)
        self.model = model

    def _values(self, answers: Answers, ends: Tensor, steps: Tensor) -> Tensor:
        return self.model.steps(answers, ends).sigmoid()


class StepProgress(StepProbabilities):
    """V_t − V_{t−1} of a model that was trained on chances of success. V_0 is read at the prompt where the model has learned it, else it is 0: a constant of
    the prompt, which changes no comparison of two answers to it."""

    def _values(self, answers: Answers, ends: Tensor, steps: Tensor) -> Tensor:
        if not self.model.values_prompts:
            return progress(super()._values(answers, ends, steps), steps)
        values = super()._values(answers, torch.cat([torch.full_like(ends[:, :1], -1), ends], 1), steps)
        return progress(values[:, 1:], steps, values[:, 0])


class StepLogRatios(_Scored):
    """β log π/π_ref summed over the tokens of each step: differences of the implicit value q between prefixes. An end token counts with the last step, so
    that an answer's scores add up to β log π(y|x) / π_ref(y|x)."""

    def __init__(
        self,
        model: LanguageModel,
        reference: LanguageModel,
        *,
        beta: float = 0.05,
        name: str = "implicit",
        cut: Cut = DEFAULT_CUT,
        batch_size: int = 32,
    ) -> None:
        super().__init__(name, model.tokenizer, cut, batch_size)
        self.model, self.reference, self.beta = model, reference, beta

    def _values(self, answers: Answers, ends: Tensor, steps: Tensor) -> Tensor:
        gain = self.beta * (self.model.logprobs(answers).logprobs - self.reference.logprobs(answers).logprobs)
        last = steps.cumsum(1) == steps.sum(1, keepdim=True)
        until = torch.where(last, answers.length[:, None] - 1, ends)
        # Sums in float64: a step's share is the small difference of two long sums.
        return progress(gain.double().cumsum(1).gather(1, until), steps).float()


def _parts(answers: Answers, size: int) -> Iterator[tuple[Answers, slice]]:
    """At most `size` answers at a time, with their rows."""
    for start in range(0, len(answers.ids), size):
        rows = slice(start, start + size)
        owners, owner = torch.unique_consecutive(answers.owner[rows], return_inverse=True)
        part = Answers(answers.prompt_ids[owners], answers.prompt_length[owners], answers.ids[rows], answers.length[rows], owner)
        yield part, rows


# From a specification to a source ----------------------------------------------------------------------------------------------------------------

ACCEPTED = (
    "a process reward is the folder or hub id of a sequence-classification model with one label (probabilities that steps are right), value:FOLDER (progress "
    "of a value model), or implicit:POLICY[,REFERENCE] (log-ratios of two language models)"
)


def load_process_reward(
    spec: Any,
    policy: LanguageModel,
    *,
    beta: float | None = None,
    cut: Cut = DEFAULT_CUT,
    batch_size: int = 32,
    option: str = "--process_reward",
) -> ProcessReward:
    """The process reward that `spec` names, for the tokens of `policy`; a `ProcessReward` is returned as it is.

    `beta` scales implicit rewards (default 0.05, as in the paper) and applies to nothing else. Their REFERENCE, when it is not named, is the policy as it is
    now. `batch_size`: answers in one pass. Raises `UsageError`, naming `option`, for anything else, and for a model whose tokens have other ids than
    the policy's.
    """
    if not isinstance(spec, (str, Path)):
        if isinstance(spec, ProcessReward):
            return spec
        raise UsageError(f"{option}: a {type(spec).__name__} scores no steps; {ACCEPTED}")
    kind, _, rest = str(spec).partition(":")
    if kind not in ("implicit", "value") or Path(str(spec)).is_dir():
        kind, rest = "", str(spec)
    names = [name.strip() for name in rest.split(",")] if kind == "implicit" else [rest.strip()]
    if not all(names) or len(names) > 2:
        raise UsageError(f"{option} {spec!r} is incomplete: {ACCEPTED}")
    if beta is not None and kind != "implicit":
        raise UsageError(f"{option} {spec}: a beta scales implicit rewards alone; it has no effect on this one")
    if beta is not None and not beta > 0:
        raise UsageError(f"{option} {spec}: beta must be > 0, not {beta}")
    shared: dict[str, Any] = {"cut": cut, "batch_size": batch_size}
    if kind == "implicit":
        found = [_of_policy(LanguageModel.load, name, policy, option) for name in names]
        reference = found[1] if len(found) > 1 else policy.frozen_copy()
        return StepLogRatios(found[0], reference, beta=0.05 if beta is None else beta, **shared)
    model = _of_policy(lambda *a, **k: ProcessRewardModel.load(*a, option=option, **k), names[0], policy, option)
    return StepProgress(model, name="progress", **shared) if kind == "value" else StepProbabilities(model, **shared)


def _of_policy(load: Callable[..., Any], source: str, policy: LanguageModel, option: str) -> Any:
    """A frozen model that reads the policy's tokens."""
    with _names(option):
        model = load(source, precision=policy.precision, device=str(policy.device))
    if not same_ids(policy.tokenizer, model.tokenizer):
        raise UsageError(f"{option} {source} has another vocabulary than {policy.source}, so it cannot read the tokens that were sampled")
    model.requires_grad_(False)
    return model
