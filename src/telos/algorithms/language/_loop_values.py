"""Offline training on single answers with an outcome, by values of what stands before each of their parts.

A method's `loss(config, view)` takes a `ValuedLogps` and returns per-answer (or, at the last tokens of steps, per-step) `Losses`. The outcome of an answer is
the data's `score`, what `--reward` says of it, or, without either, its label as 0 or 1. What a method `needs`:

- "reference": log-probabilities under the model that regularises;
- "steps": where answers are cut into steps;
- "step-advantages": of each step, by a model of the chance of success that was trained before and stays as it is (`--process_reward value:FOLDER`, see
  `objectives.process_reward`). They are computed once, before training; the outcome, a success or none, stands for the value after the last step;
- "critic": values of the state before each token, by a model that learns beside the policy with the method's `critic_loss(config, view)`. Both gradients
  are taken before either model moves. The folder `critic` of the run keeps it: a process reward model like any other (`beam-search --process_reward`).

An end token belongs to the last step here: what the policy does is cut into steps without a rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telos.algorithms.language._alignment import AlignmentProgram, ScoredConfig
from telos.algorithms.language._loop_unpaired import layout
from telos.algorithms.language._options import lora_of
from telos.algorithms.language._roles import Learner, Scorer, micro_batches
from telos.algorithms.language._rows import labelled_table
from telos.algorithms.language._steps import CutConfig, cut_of
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.data.batches import Labelled
from telos.data.tokenize import Table
from telos.dataflow import Role, make_backend, transfer
from telos.functional.pairwise import AnswerLogps
from telos.functional.reduction import Denominators, Losses, means
from telos.models.packing import Answers
from telos.objectives.process_reward import ProcessRewardModel, StepProbabilities, StepProgress, load_process_reward, step_ends

_ROWS = {
    "reference": "reference",
    "ends": "steps",
    "advantages": "step-advantages",
    "values": "critic",
}  # what is known of answers, and by which need


@dataclass(frozen=True, kw_only=True)
class ValuesConfig(ScoredConfig, CutConfig):
    """Options of training on answers by values."""

    @property
    def spares(self) -> frozenset[str]:
        """Of what the method needs, what these options do without."""
        return frozenset()


@dataclass(frozen=True, kw_only=True)
class AdvantagesConfig(ValuesConfig):
    """Options of training on the advantages of steps."""

    process_reward: str = ""  # value:FOLDER, a process reward model that was trained on chances of success, at prompts too
    success_above: float = 0.5  # an answer succeeds when its score is greater than this


@dataclass(frozen=True, kw_only=True)
class CriticConfig(ValuesConfig):
    """Options of training with a critic."""

    critic_learning_rate: float = 1e-5  # peak, of the critic
    critic_warmup: int = 0  # steps at the start in which only the critic learns

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "critic_learning_rate", "critic_warmup")
        if self.critic_warmup >= self.steps:
            raise UsageError(f"--critic_warmup {self.critic_warmup} leaves none of {self.steps} steps for the policy")


@dataclass(frozen=True)
class ValuedLogps:
    """A batch of single answers as a loss sees it. What a method does not declare among its `needs` is None. A loss of the policy sees values without gradient,
    a loss of the critic log-probabilities without."""

    answer: AnswerLogps
    reference: AnswerLogps
    outcome: Tensor  # [B]; with "step-advantages" 1 for a success and 0 for none
    ends: Tensor | None = None  # [B, T] bool, true at the last token of each step; needs "steps"
    advantages: Tensor | None = None  # [B, T] at the last tokens of steps, 0 elsewhere; needs "step-advantages"
    values: Tensor | None = None  # [B, T] of the state before each token; needs "critic"

    @property
    def ratio(self) -> Tensor:
        """log π/π_ref of each token, [B, T], 0 where padded."""
        return (self.answer.tokens - self.reference.tokens).masked_fill(~self.answer.mask, 0.0)


class Critic(Role):
    """Values of frozen weights are asked for here; the same weights learn through their `Learner`."""

    def __init__(self, model: ProcessRewardModel) -> None:
        self.model = model

    @transfer(split="rows", collect="rows")
    def values(self, batch: Labelled, *, micro_batch_size: int = 0) -> Tensor:
        """[B, T]"""
        with torch.no_grad():
            return torch.cat([self.model.values(layout(part)) for (part,) in micro_batches(micro_batch_size, batch)])


class _Labels:
    """Stands where a reward would. When it is asked, the data have no scores, and their labels are the outcomes."""

    asked = False

    def __call__(self, prompts: list[Any], answers: list[str], columns: dict[str, list[Any]]) -> list[float]:
        self.asked = True
        return [0.0] * len(answers)


class Program(AlignmentProgram):
    config: ValuesConfig
    kinds = 1

    def __init__(self, method: Method, config: ValuesConfig, run: Run) -> None:
        method = dataclasses.replace(method, needs=method.needs - config.spares)
        self.names = tuple(name for name, need in _ROWS.items() if need in method.needs)
        super().__init__(method, config, run)
        self.critic_model: ProcessRewardModel | None = None
        if "critic" in method.needs:
            assert isinstance(config, CriticConfig)
            self._open_critic(config)

    def _open_critic(self, c: CriticConfig) -> None:
        backend = make_backend(c.backend)
        critic = ProcessRewardModel.load(
            c.model,
            fresh=True,
            tokenizer=c.tokenizer,
            chat_template=c.chat_template,
            lora=lora_of(c),
            precision=c.precision,
            device=c.device,
        )
        assert isinstance(critic, ProcessRewardModel)
        critic.values_prompts = True
        self.critic_model = critic
        its = dataclasses.replace(c, learning_rate=c.critic_learning_rate)
        self.critic = backend.place(lambda: Critic(critic))
        self.critic_learner = backend.place(lambda: Learner(critic, its, c.steps))
        self.now = backend.place(lambda: Scorer(self.model))
        if c.critic_warmup:  # the policy's schedule runs over the steps in which it learns
            self.learner = backend.place(lambda: Learner(self.model, c, c.steps - c.critic_warmup))

    def plan(self) -> dict[str, Any]:
        if self.critic_model is None:
            return super().plan()
        return super().plan() | {"trained parameters of the critic": sum(p.numel() for _, p in self.critic_model.trainable())}

    # -- data -----------------------------------------------------------------------------------------------------------------------------------

    def layout(self, batch: Labelled) -> Answers:
        return layout(batch)

    def read_table(self, source: str, option: str) -> Table:
        labels = _Labels()
        table = labelled_table(self.config, source, option, self.model, self.run, scorer=self.scorer or labels, scores=True)
        if labels.asked:
            table = table.with_columns(score=[float(label) for label in table.columns["label"]])
        outcomes = table.columns["score"]
        if labels.asked and option == "--data" and len(set(outcomes)) == 1:
            raise UsageError(
                f"{option} {source} has no column 'score', and no labels that tell its answers apart: add one of them, or give --reward to score the answers"
            )
        self.run.describe(
            **{f"outcomes {option.lstrip('-')}": {"mean": sum(outcomes) / len(outcomes), "from": "labels" if labels.asked else "scores"}}
        )
        return table

    def prepare_tables(self) -> None:
        """Where the steps of all answers end, and what they gain."""
        self.ends: dict[int, list[list[int]]] = {}
        self.advantages: dict[int, list[list[float]]] = {}
        if "steps" not in self.method.needs:
            return
        critic = self._open_process_reward(self.config) if isinstance(self.config, AdvantagesConfig) else None
        for table in filter(None, (self.table, self.eval_table)):
            rows = [ids.tolist() for ids in table.columns["completion_ids"]]
            cuts = [step_ends(self.model.tokenizer, ids, cut_of(self.config)) for ids in rows]
            self.ends[id(table)] = [[*ends[:-1], len(ids) - 1] for ends, ids in zip(cuts, rows, strict=True)]
            if critic is not None:
                self.advantages[id(table)] = self._advantages(table, critic)
        if self.advantages:
            gains = [gain for row in self.advantages[id(self.table)] for gain in row]
            self.run.describe(
                advantages={"steps": len(gains), "positive": sum(gain > 0 for gain in gains), "mean": sum(gains) / len(gains)}
            )

    def _open_process_reward(self, c: AdvantagesConfig) -> StepProgress:
        if not c.process_reward:
            raise UsageError(
                "--process_reward is missing: give value:FOLDER, a model of `telos train process-reward` on labels of `math-shepherd` or `pav`"
            )
        found = load_process_reward(c.process_reward, self.model, cut=cut_of(c))
        if not isinstance(found, StepProgress) or not found.model.values_prompts:
            raise UsageError(
                f"--process_reward {c.process_reward}: advantages need value:FOLDER, a process reward model that was trained at prompts, too (on rows with "
                "prompt_label, as `math-shepherd` and `pav` write them)"
            )
        return found

    def _advantages(self, table: Table, critic: StepProgress) -> list[list[float]]:
        chances = StepProbabilities(critic.model, cut=critic.cut, batch_size=critic.batch_size)
        found: list[list[float]] = []
        for start in range(0, len(table), critic.batch_size):
            batch: Any = self.batch(table, range(start, min(start + critic.batch_size, len(table))))
            gains, after = critic.score(layout(batch)), chances.score(layout(batch))
            last = gains.mask & (gains.mask.cumsum(1) == gains.mask.sum(1, keepdim=True))
            values = gains.values + torch.where(last, self._outcome(batch)[:, None] - after.values, 0.0)
            found += [row[steps].tolist() for row, steps in zip(values, gains.mask, strict=True)]
        return found

    def _outcome(self, batch: Labelled) -> Tensor:
        assert batch.score is not None
        return (batch.score > self.config.success_above).float() if isinstance(self.config, AdvantagesConfig) else batch.score

    def denominators(self, batch: Labelled) -> Denominators:
        ends = self.ends.get(id(self._asked))
        return Denominators(len(batch), sum(len(ends[row]) for row in batch.row.tolist()) if ends else int(batch.completion_length.sum()))

    @property
    def _asked(self) -> Table | None:
        """The table from which batches come now."""
        return self.eval_table if self._evaluating else self.table

    def frozen_rows(self, batch: Labelled) -> tuple[Tensor, ...]:
        (reference,) = super().frozen_rows(batch)
        found = {"reference": reference[:, 0]}
        if ends := self.ends.get(id(self._asked)):
            found["ends"] = torch.zeros_like(found["reference"], dtype=torch.bool)
            found["advantages"] = torch.zeros_like(found["reference"])
            gains = self.advantages.get(id(self._asked))
            for i, row in enumerate(batch.row.tolist()):
                found["ends"][i, ends[row]] = True
                if gains is not None:
                    found["advantages"][i, ends[row]] = found["advantages"].new_tensor(gains[row])
        if self.critic_model is not None:
            found["values"] = self.critic.call("values", batch, micro_batch_size=self.config.micro_batch_size)
        return tuple(found[name] for name in self.names)

    # -- a step ---------------------------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        if not isinstance(self.config, CriticConfig):
            return super().step(index)
        c, batch = self.config, self.batch(self.table, self.next_rows(index))
        self.last_batch = {name: value for name, value in batch.to_dict().items() if isinstance(value, Tensor)}
        rows, counts = self.frozen_rows(batch), self.denominators(batch)
        now = self.now.call("logprobs", batch, layout=layout, kinds=1, micro_batch_size=c.micro_batch_size)
        result = self.critic_learner.call("accumulate", batch, *rows, now[:, 0], losses=self._critic_losses, denominators=counts)
        metrics = {"loss/critic": result["loss"], **means(result["metrics"])}
        if index >= c.critic_warmup:
            result = self.learner.call("accumulate", batch, *rows, losses=self.losses, denominators=counts)
            metrics |= {"loss": result["loss"], **means(result["metrics"]), **self.learner.call("apply", self.last_batch)}
        self.critic_learner.call("apply", self.last_batch)
        due = (index + 1) % c.eval_every == 0 or index + 1 == c.steps
        return metrics | self.evaluate() if due else metrics

    def losses(self, model: Any, part: Labelled, *rows: Tensor) -> Losses:
        assert self.method.loss is not None
        return self.method.loss(self.config, self._view(part, model.logprobs(layout(part)).logprobs, rows))

    def _critic_losses(self, model: Any, part: Labelled, *rows: Tensor) -> Losses:
        assert self.method.critic_loss is not None
        view = self._view(part, rows[-1], rows[:-1])
        return self.method.critic_loss(self.config, dataclasses.replace(view, values=model.values(layout(part))))

    def _view(self, part: Labelled, tokens: Tensor, rows: tuple[Tensor, ...]) -> ValuedLogps:
        given, mask = dict(zip(self.names, rows, strict=True)), layout(part).mask
        return ValuedLogps(
            AnswerLogps(tokens, mask),
            AnswerLogps(given["reference"], mask),
            self._outcome(part),
            *(given.get(name) for name in ("ends", "advantages", "values")),
        )

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        found = super().state()
        return found if self.critic_model is None else found | {"critic": self.critic_learner.workers[0].state()}

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        if self.critic_model is not None:
            for worker in self.critic_learner.workers:
                worker.load(state["critic"])

    def finish(self, run: Run) -> None:
        super().finish(run)
        if self.critic_model is not None:
            self.critic_model.save(run.path / "critic")
