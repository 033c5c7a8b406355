"""Offline training on pairs of answers. One forward pass scores both answers of each pair; their prompt is computed once.

A method's `loss(config, pair)` takes a `functional.pairwise.PairLogps` and returns per-pair `Losses`. What it `needs` beside the pair is loaded, sampled or
scored for it, and is in memory for no other method:

- "reference": log-probabilities under the model that regularises;
- "scores": a number for each answer, from the data or from `--reward`;
- "samples": answers drawn for the pairs' prompts at every step, by the policy or by the reference (`SampledConfig`);
- "revisions": the pair under the prompts that show one of the answers and ask for a better one.

With `--data.reward_augmented` any of these methods learns from pairs conditioned on target scores (Zhang et al. 2024), with `--loss.degree` it also
learns to tell how much of an answer's content was taken away (Li et al. 2024, see `_degree`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from telos.algorithms.language import _degree
from telos.algorithms.language._alignment import AlignmentProgram, ScoredConfig
from telos.algorithms.language._rows import pairs_table
from telos.algorithms.language._sampling import Writer
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import derive
from telos.data.batches import Pairs, Prompts
from telos.data.tokenize import Table
from telos.dataflow import Group
from telos.functional.pairwise import AnswerLogps, PairLogps, SampleLogps
from telos.functional.reduction import Denominators, Losses
from telos.models.generation import Sampling
from telos.models.language import LanguageModel
from telos.models.packing import Answers

_WINDOW = 10  # steps whose mean decides whether the chosen answers have become less likely


@dataclass(frozen=True, kw_only=True)
class PairsConfig(ScoredConfig):
    """Options of training on pairs."""

    data_reward_augmented: bool = False  # learn from both sides of each pair, conditioned on their scores (Zhang et al. 2024)
    loss_degree: float = 0.0  # weight of the self-supervised preference-degree loss (Li et al. 2024), >= 0; 0 = none
    loss_degree_levels: int = 4  # degrees that it tells apart, >= 2: version d of an answer lacks d / levels of its key phrases

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "loss_degree")
        require(self, ">= 2", "loss_degree_levels")
        if self.loss_degree == 0 and self.loss_degree_levels != PairsConfig.loss_degree_levels:
            raise UsageError("--loss_degree_levels has no effect while --loss_degree is 0; give a weight")


@dataclass(frozen=True, kw_only=True)
class LogisticConfig(PairsConfig):
    """Options of pairwise methods whose loss is that of a logistic regression (`functional.pairwise.smoothed_logistic`)."""

    label_smoothing: float = 0.0  # probability that a label is wrong, 0 … 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and < 0.5", "label_smoothing")


@dataclass(frozen=True, kw_only=True)
class SampledConfig(LogisticConfig):
    """Options of pairwise methods that draw answers while they train."""

    samples_per_prompt: int = 1  # answers drawn for each pair's prompt at each step
    samples_from: Literal["policy", "reference"] = "policy"  # who writes them
    samples_length: int = 64  # tokens such an answer may have

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "samples_per_prompt", "samples_length")


def layout(batch: Pairs) -> Answers:
    """Chosen and rejected answers, interleaved, on a shared prompt; then sampled answers on the same prompt, or the pair again on the prompts that
    ask for revisions of the chosen and of the rejected answer."""
    pair = (batch.chosen_ids, batch.chosen_length), (batch.rejected_ids, batch.rejected_length)
    if batch.sample_ids is not None:
        assert batch.sample_length is not None
        drawn = zip(batch.sample_ids.unbind(1), batch.sample_length.unbind(1), strict=True)
        return Answers.repeat(batch.prompt_ids, batch.prompt_length, *pair, *drawn)
    if batch.revise_chosen_ids is None:
        return Answers.repeat(batch.prompt_ids, batch.prompt_length, *pair)
    prompts = [
        (batch.prompt_ids, batch.prompt_length),
        (batch.revise_chosen_ids, batch.revise_chosen_length),
        (batch.revise_rejected_ids, batch.revise_rejected_length),
    ]
    width = max(ids.shape[1] for ids, _ in prompts)
    padded = [torch.nn.functional.pad(ids, (0, width - ids.shape[1])) for ids, _ in prompts]
    three = [(ids.repeat_interleave(3, 0), length.repeat_interleave(3)) for ids, length in pair]
    return Answers.repeat(torch.stack(padded, 1).flatten(0, 1), torch.stack([length for _, length in prompts], 1).flatten(), *three)


def pair_logps(tokens: Tensor, mask: Tensor, reference: Tensor | None, batch: Pairs) -> PairLogps:
    """Token scores [B, kinds, La] of what `layout` has put together, by what they are."""

    def pair(first: int, **more: Any) -> PairLogps:
        def of(side: int, values: Tensor | None) -> Any:
            return None if values is None else AnswerLogps(values[:, first + side], mask[:, first + side])

        scores = batch.chosen_score, batch.rejected_score
        return PairLogps(of(0, tokens), of(1, tokens), of(0, reference), of(1, reference), batch.margin, *scores, **more)

    if batch.sample_ids is not None:
        return pair(0, samples=SampleLogps(tokens[:, 2:], None if reference is None else reference[:, 2:], mask[:, 2:]))
    if batch.revise_chosen_ids is not None:
        return pair(0, revisions=(pair(2), pair(4)))
    return pair(0)


class Program(AlignmentProgram):
    config: PairsConfig

    def __init__(self, method: Method, config: PairsConfig, run: Run) -> None:
        self.sampler: Group[Writer] | None = None
        self._step = 0
        self.kinds = 2 + 4 * ("revisions" in method.needs)
        if isinstance(config, SampledConfig):
            self.kinds += config.samples_per_prompt
        super().__init__(method, config, run)
        if isinstance(config, SampledConfig):
            self.sampler = self.writer if config.samples_from == "policy" else self.reference_writer()
        self._drawn = 0  # batches for which answers were drawn
        self._chosen: list[float] = []  # mean log-probability of the chosen answers at the first steps
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._warned = False

    def build_model(self) -> LanguageModel:
        c, model = self.config, super().build_model()
        if c.loss_degree:
            _degree.add_head(model, c.loss_degree_levels, c.seed)
        return model

    def layout(self, batch: Pairs) -> Answers:
        return layout(batch)

    def read_table(self, source: str, option: str) -> Table:
        c, needs = self.config, self.method.needs
        return pairs_table(
            c,
            source,
            option,
            self.model,
            self.run,
            scorer=self.scorer,
            scores="scores" in needs,
            augmented=c.data_reward_augmented,
            revisions="revisions" in needs,
            degrees=c.loss_degree_levels if c.loss_degree else 0,
        )

    def denominators(self, batch: Pairs) -> Denominators:
        return Denominators(len(batch), int(batch.chosen_length.sum() + batch.rejected_length.sum()))

    def batch(self, table: Table, indices: Any) -> Pairs:
        batch = super().batch(table, indices)
        if self.config.loss_degree:
            # By the step, not by a counter: a batch that is asked for once more, or for another purpose, changes no later draw.
            place = ("held out", int(batch.row[0])) if self._evaluating else ("step", self._step)
            batch = _degree.draw(batch, self.config.seed, *place)
        return batch if self.sampler is None else self._with_samples(batch)

    def _with_samples(self, batch: Pairs) -> Pairs:
        c = self.config
        assert self.sampler is not None
        assert isinstance(c, SampledConfig)
        prompts = Prompts(prompt_ids=batch.prompt_ids, prompt_length=batch.prompt_length, row=batch.row, batch_size=[len(batch)])
        sampling, seed = Sampling(max_new_tokens=c.samples_length), derive(c.seed, "samples", self._drawn)
        self._drawn += 1
        drawn, _ = self.sampler.call("write", prompts, sampling=sampling, n=c.samples_per_prompt, seed=seed)
        shape = (len(batch), c.samples_per_prompt)
        return batch.replace(sample_ids=drawn.completion_ids.view(*shape, -1), sample_length=drawn.completion_length.view(shape))

    def losses(self, model: Any, part: Pairs, *rows: Tensor) -> Losses:
        answers = layout(part)
        tokens = model.logprobs(answers).logprobs
        shape = (len(part), self.kinds, tokens.shape[1])
        assert self.method.loss is not None
        found = self.method.loss(self.config, pair_logps(tokens.view(shape), answers.mask.view(shape), rows[0] if rows else None, part))
        if not self.config.loss_degree:
            return found
        return replace(found, extra=(*found.extra, _degree.losses(model, part, self.config.loss_degree)))

    # -- what users should be told ---------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        self._step = index
        metrics = super().step(index)
        self._watch_chosen(index, metrics)
        return metrics

    def _watch_chosen(self, index: int, metrics: Mapping[str, float]) -> None:
        """Warns once when the chosen answers have become less likely than they were, as contrastive losses allow (Pal et al. 2024)."""
        if "logps/chosen" not in metrics:
            return
        if len(self._chosen) < _WINDOW:
            self._chosen.append(metrics["logps/chosen"])
        self._recent.append(metrics["logps/chosen"])
        before, now = sum(self._chosen) / len(self._chosen), sum(self._recent) / len(self._recent)
        if index + 1 >= 3 * _WINDOW and not self._warned and now < before - max(1.0, 0.1 * abs(before)):
            self._warned = True
            self.run.warn(
                f"step {index + 1}: the log-probability of chosen answers has fallen from {before:.1f} to {now:.1f} (means over {_WINDOW} "
                "steps): the loss pushes both answers down. A smaller learning rate, a larger --beta, or a method with a likelihood term "
                "(rpo, cpo) keeps it up"
            )

    def state(self) -> dict[str, Any]:
        watched = {"chosen": self._chosen, "recent": list(self._recent), "warned": self._warned}
        return super().state() | {"drawn": self._drawn, "watched": watched}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        self._drawn = state["drawn"]
        self._chosen, self._warned = list(state["watched"]["chosen"]), bool(state["watched"]["warned"])
        self._recent = deque(state["watched"]["recent"], maxlen=_WINDOW)
