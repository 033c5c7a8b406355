"""Iterative alignment with an oracle: write answers, have them judged, arrange what is learned from, learn; again from the new policy.

A step is one iteration. Its answers come from the sources that the method's `writers(config)` names, by default all from the policy: "policy",
"reference", "average" (an exponential moving average of the policy's weights, of which each iteration is the share `average_share`), "hinted" (the
policy, shown the prompt as the template `hint` changes it; what it writes is learned from as an answer to the prompt itself) and "mixture"
(policy and reference, mixed geometrically token by token, the reference with the share `mixture`). The answers to a prompt stand in the order of the
sources. The oracle is a reward, a judge of two answers, or a human; where the method's `prepare(config, examples)` changes the prompts, it still sees
them as they were. `arrange(config, judged)` takes an `objectives.judges.Judged` and returns an `Arranged`: pairs, or single answers.
`loss(config, view)` takes a `PairLogps`, with the policy at the start of the iteration as its anchor, or a `LabelledLogps`.
`advance(config, weights, previous)` may change the weights with which the next iteration begins: it gets those just learned, and those that the
iteration before had learned (at first, those of the start). What a method `needs`:

- "reference": log-probabilities under the model that regularises;
- "anchor": log-probabilities under the policy at the start of the iteration in which the answers were written; for pairs;
- "history": the examples of all iterations so far, not of the last one alone;
- "restart": every iteration learns from the start's weights and a fresh optimiser anew, and writes with those that the one before has learned;
- "objectives": several rewards, which the oracle gives one by one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from telos.algorithms.language import _loop_pairs, _loop_unpaired
from telos.algorithms.language._arrange import Arranged, Floats
from telos.algorithms.language._loop_rollouts import layout as rollouts_layout
from telos.algorithms.language._loop_rollouts import score
from telos.algorithms.language._options import TrainingConfig, load_policy
from telos.algorithms.language._roles import Learner, Reference, Scorer
from telos.algorithms.language._rows import prompts_table
from telos.algorithms.language._sampling import Writer, open_reward
from telos.core.config import require
from telos.core.errors import Failure, UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import derive, numpy_generator
from telos.data.batches import Labelled, Pairs, Rollouts, concatenate
from telos.data.cursor import Cursor
from telos.data.formats import Examples, read_examples
from telos.data.readers import read_rows
from telos.data.tokenize import Limits, Table, tokenize
from telos.dataflow import Group, make_backend
from telos.functional.pairwise import AnswerLogps, LabelledLogps, PairLogps, SampleLogps
from telos.functional.policy import sequence_kl
from telos.functional.reduction import Denominators, Losses, means
from telos.models.generation import Sampling
from telos.models.generation.native import Mixture
from telos.objectives.judges import Judged, bradley_terry, compare_all, open_judge, same_texts
from telos.objectives.rewards import RewardSource, require_some

_AS_GIVEN = "prompt as given"  # column with the prompts as they were before `prepare`


@dataclass(frozen=True, kw_only=True)
class IterativeConfig(TrainingConfig):
    """Options of iterative alignment. A step is one iteration: write, judge, learn."""

    steps: int = 20  # iterations of writing, judging and learning
    batch_size: int = 64  # prompts an iteration
    samples_per_prompt: int = 2  # answers to each prompt
    examples_per_prompt: int = 1  # pairs (or answers) that a prompt gives to learn from, at most
    epochs: int = 1  # passes over an iteration's examples
    minibatch_size: int = 16  # examples in one optimiser step
    learning_rate: float = 1e-6  # peak, AdamW
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # down to zero at the last optimiser step
    max_completion_length: int = 64  # tokens an answer may have
    temperature: float = 1.0  # of sampling, > 0
    top_p: float = 1.0  # nucleus of sampling, (0, 1]
    top_k: int = 0  # most probable tokens kept; 0 = all
    reward: tuple[str, ...] = ()  # one or several: file.py:function, module:function, a reward model's folder or hub id, gold:TESTBED
    reward_scale: float = 1.0  # difference of reward that is preferred with odds e : 1, > 0
    judge: str | None = None  # instead of a reward: file.py:function or module:function that compares two answers, or human:FOLDER
    reward_timeout: float = 60.0  # seconds a batch may take in a reward function or judge before it is ended
    reward_on_error: Literal["stop", "invalid"] = "stop"  # a failing reward function stops the run, or its answers are left out and counted
    reference: str | None = None  # model that regularises, or soup:A,B for the mean of models' weights; default: the policy at the start
    engine: Literal["native", "vllm"] = "native"  # what generates; vllm is an extra and needs a GPU

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "samples_per_prompt", "examples_per_prompt", "epochs", "minibatch_size")
        require(self, ">= 0", "top_k")
        require(self, "> 0", "temperature", "reward_timeout", "reward_scale")
        require(self, "> 0 and <= 1", "top_p")


@dataclass(frozen=True, kw_only=True)
class PairedConfig(IterativeConfig):
    """Options of iterative methods that learn from pairs of the sampled answers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 2", "samples_per_prompt")


def refuse_changed(config: IterativeConfig, name: str, why: str) -> None:
    """Raises `UsageError` when the option `name`, which would have no effect, has another value than by default."""
    if getattr(config, name) != type(config).__dataclass_fields__[name].default:
        raise UsageError(f"--{name} has no effect {why}")


class Program:
    """Write, judge, arrange, learn."""

    def __init__(self, method: Method, config: IterativeConfig, run: Run) -> None:
        self.method, self.config, self.run = method, config, run
        self.last_batch: Mapping[str, Any] = {}
        self._check()
        backend = make_backend(config.backend)
        self.model = load_policy(config)
        self.table = prompts_table(config, config.data, "--data", self.model, run, self._prepare if method.prepare else None)
        extra = dict(self.table.extra)
        self.shown = dataclasses.replace(self.table, prompts=extra.pop(_AS_GIVEN, self.table.prompts), extra=extra)  # to the oracle
        if len(self.table) < config.batch_size:
            raise UsageError(f"--batch_size {config.batch_size} is larger than the {len(self.table)} usable prompts of {config.data}")
        self.cursor = Cursor(len(self.table), config.batch_size, derive(config.seed, "rows"), drop_last=True)
        self.sources: dict[str, int] = method.writers(config) if method.writers else {"policy": config.samples_per_prompt}
        self.n = sum(self.sources.values())
        self.hinted: Table | None = None
        if "hinted" in self.sources:
            self.hinted = self._with_hints()
        ends = np.cumsum(list(self.sources.values())).tolist()
        self.places = {name: slice(end - count, end) for (name, count), end in zip(self.sources.items(), ends, strict=True)}
        options: dict[str, Any] = {"timeout": config.reward_timeout, "on_error": config.reward_on_error}
        self.rewards: list[RewardSource] = [open_reward(spec, policy=self.model, **options) for spec in config.reward]
        self.judge: RewardSource | None = None
        if config.judge is not None:
            self.judge = open_judge(config.judge, tell=run.warn, **options)
        self.learner = backend.place(lambda: Learner(self.model, config, config.steps * config.epochs * self.updates))
        wanted = {"reference", "mixture"} & (method.needs | self.sources.keys())
        if config.reference is not None and not wanted:
            raise UsageError(f"--reference has no effect on {method.key}, which uses no reference model")
        self.reference: Group[Reference] | None = backend.place(lambda: Reference(self.model, config.reference)) if wanted else None
        self.now = backend.place(lambda: Scorer(self.model)) if "anchor" in method.needs else None
        self.average = backend.place(lambda: Scorer(self.model.frozen_copy())) if "average" in self.sources else None
        self.writers = {name: backend.place(lambda name=name: self._writer(name)) for name in self.sources}
        # The weights that the last iteration learned, before `advance`.
        self.previous: dict[str, Tensor] | None = self.learner.call("weights") if method.advance is not None else None
        self.start: dict[str, Tensor] | None = self.learner.call("weights") if "restart" in method.needs else None
        self.history: list[tuple[Any, ...]] = []

    def _check(self) -> None:
        c, key = self.config, self.method.key
        if "objectives" in self.method.needs and len(c.reward) < 2:
            raise UsageError(f"{key} weighs several rewards: give two or more by --reward" + (", and no --judge" if c.judge else ""))
        if bool(c.reward) == bool(c.judge):
            raise UsageError(
                "give one of --reward (file.py:function, module:function, a reward model's folder or hub id, gold:TESTBED) and --judge "
                "(file.py:function or module:function that compares two answers, or human:FOLDER)"
            )
        if c.judge:
            refuse_changed(c, "reward_scale", "on a judge, which gives probabilities")
            for name in ("reward_timeout", "reward_on_error") if c.judge.startswith("human:") else ():
                refuse_changed(c, name, "on a human, who is waited for")

    def _prepare(self, examples: Examples) -> Examples:
        assert self.method.prepare is not None
        given = [record["prompt"] for record in examples.records]
        return self.method.prepare(self.config, dataclasses.replace(examples, extra=examples.extra | {_AS_GIVEN: given}))

    def _with_hints(self) -> Table:
        """The prompts as the template changes them, row by row."""
        template: str = self.config.hint  # type: ignore[attr-defined]
        if template == "{prompt}":
            return self.table
        rows = []
        for i, (prompt, place) in enumerate(zip(self.table.prompts, self.table.places, strict=True)):
            if not isinstance(prompt, str):
                raise UsageError(f"--hint works on prompts that are texts; {place} is a conversation")
            try:
                rows.append({"prompt": template.format(prompt=prompt, **{name: values[i] for name, values in self.table.extra.items()})})
            except (KeyError, IndexError, ValueError) as error:
                known = ", ".join(["prompt", *self.table.extra])
                raise UsageError(f"--hint {template!r}: {error} at {place}; the columns are {known}") from None
        room = Limits(max_prompt_length=min(self.config.max_prompt_length, self.model.context - 1))
        return tokenize(read_examples(read_rows(rows), ("prompt-only",)), self.model.tokenizer, room)

    @property
    def updates(self) -> int:
        """Optimiser steps of one pass over the examples that an iteration can give."""
        return math.ceil(self.config.batch_size * self.config.examples_per_prompt / self.config.minibatch_size)

    def _writer(self, name: str) -> Writer:
        c = self.config
        if name in ("policy", "hinted"):
            return Writer(self.model, c.engine)
        if name == "average":
            assert self.average is not None
            return Writer(self.average.workers[0].model, c.engine)
        assert self.reference is not None
        theirs = self.reference.workers[0]
        if name == "reference":
            return Writer(theirs.model, c.engine, under=theirs.as_it_scores)
        mixture = Mixture(theirs.model, c.mixture, theirs.as_it_scores)  # type: ignore[attr-defined]
        return Writer(self.model, c.engine, partner=mixture)

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        c = self.config
        return {
            "prompts": len(self.table),
            "prompts an iteration": c.batch_size,
            "answers a prompt": ", ".join(f"{count} by the {name}" for name, count in self.sources.items()),
            "examples an iteration, at most": c.batch_size * c.examples_per_prompt,
            "optimiser steps an iteration, at most": c.epochs * self.updates,
            "examples an optimiser step": c.minibatch_size,
            "iterations": c.steps,
            "tokens an answer, at most": c.max_completion_length,
            "trained parameters": sum(p.numel() for p in self.learner.workers[0].parameters_to_reduce()),
        }

    # -- one iteration --------------------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        rollouts, texts = self._write(index)
        judged = self._judge(index, rollouts, texts)
        assert self.method.arrange is not None
        arranged: Arranged = self.method.arrange(c, judged)
        if len(arranged.prompt) == 0:
            raise Failure(
                f"iteration {index + 1} gave no example to learn from: the answers to each prompt were the same, were not judged, or were passed "
                f"over by {self.method.key}; look at the reward or the judge, or ask for more answers with --samples_per_prompt"
            )
        metrics = self._describe(rollouts, judged) | {"examples": float(len(arranged.prompt))}
        answers = self._answers_of(arranged).to(rollouts.row.device)
        used = torch.zeros(len(rollouts), dtype=torch.bool, device=answers.device).index_fill(0, answers.flatten(), True)
        own = self._own(rollouts)
        reference = self._score(self.reference, "reference", rollouts, used | own)
        anchor = self._score(self.now, "anchor", rollouts, used)
        if reference is not None and bool(own.any()):
            metrics["kl"] = float(sequence_kl(rollouts.logprobs, reference, rollouts.action_mask)[own].mean())
        batch = self._batch(arranged, answers, rollouts)
        examples: tuple[Any, ...] = (batch, *(values[answers] for values in (reference, anchor) if values is not None))
        if "history" in self.method.needs:
            self.history.append(examples)
            examples = _join(self.history)
        if self.start is not None:
            self.learner.call("restart", self.start)
        metrics |= self._learn(index, examples)
        if self.method.advance is not None:
            learned = self.learner.call("weights")
            self.learner.call("set_weights", self.method.advance(c, learned, self.previous))
            self.previous = learned
        if self.average is not None:
            self.average.call("approach", self.learner.call("weights"), share=c.average_share)  # type: ignore[attr-defined]
        return metrics

    def _own(self, rollouts: Rollouts) -> Tensor:
        """[N] bool: answers that are samples of the policy's own distribution, from which its KL can be estimated."""
        c = self.config
        found = torch.zeros(len(rollouts), dtype=torch.bool, device=rollouts.row.device)
        if "policy" in self.places and c.temperature == 1 and c.top_p == 1 and c.top_k == 0:
            found.view(-1, self.n)[:, self.places["policy"]] = True
        return found

    def _write(self, index: int) -> tuple[Rollouts, list[str]]:
        """n answers to each prompt, source after source, those of a prompt together."""
        c = self.config
        rows = self.cursor.next()
        prompts = self.table.batch(rows).to(self.model.device)
        sampling = Sampling(temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, max_new_tokens=c.max_completion_length)
        parts, texts, places = [], [], []
        for name, count in self.sources.items():
            seed = derive(c.seed, "sampling", name, index)
            shown = prompts
            if name == "hinted":
                assert self.hinted is not None
                shown = self.hinted.batch(rows).to(self.model.device)
            drawn, written = self.writers[name].call("write", shown, sampling=sampling, n=count, seed=seed)
            if name == "hinted":
                drawn.prompt_ids = prompts.prompt_ids.repeat_interleave(count, 0)  # type: ignore[union-attr]
                drawn.prompt_length = prompts.prompt_length.repeat_interleave(count)  # type: ignore[union-attr]
            offset = sum(len(part) for part in parts)
            places.append(offset + torch.arange(len(drawn)).view(-1, count))
            parts.append(drawn)
            texts += written
        order = torch.cat(places, 1).flatten()
        joined = concatenate(parts) if len(parts) > 1 else parts[0]
        return joined[order.to(joined.row.device)], [texts[i] for i in order.tolist()]

    def _judge(self, index: int, rollouts: Rollouts, texts: list[str]) -> Judged:
        c, n = self.config, self.n
        rows = rollouts.row.view(-1, n)[:, 0].tolist()
        columns = {name: [values[i] for i in rows] for name, values in self.shown.extra.items()}
        answers = [texts[i : i + n] for i in range(0, len(texts), n)]
        scores = None
        if self.judge is None:
            scores = np.stack([self._scores(reward, rollouts, texts) for reward in self.rewards], -1)
            wins = bradley_terry(scores.sum(-1), c.reward_scale)
        else:
            ids = _tokens_of(rollouts)
            tokens = [ids[i : i + n] for i in range(0, len(ids), n)]
            order = numpy_generator(c.seed, "order", index)
            wins = compare_all(self.judge, [self.shown.prompts[i] for i in rows], answers, tokens, columns, order)
        lengths = rollouts.completion_length.view(-1, n).cpu().numpy()
        return Judged(wins, scores, lengths, columns, numpy_generator(c.seed, "arrange", index), same_texts(answers))

    def _scores(self, reward: RewardSource, rollouts: Rollouts, texts: list[str]) -> Floats:
        """[P, n] of one reward, NaN where it gave none."""
        if self.shown.prompts is self.table.prompts:
            scores, _ = score(reward, self.table, rollouts, texts)
        else:  # the tokens of the prompts are not those of the prompts that the reward is shown
            rows = rollouts.row.tolist()
            columns = {name: [values[i] for i in rows] for name, values in self.shown.extra.items()}
            scores = reward.score([self.shown.prompts[i] for i in rows], texts, _tokens_of(rollouts), columns)
        require_some(scores, reward.name)
        return scores.values.double().view(-1, self.n).cpu().numpy()

    def _score(self, group: Group[Any] | None, need: str, rollouts: Rollouts, which: Tensor) -> Tensor | None:
        """[N, T] log-probabilities of the answers `which` [N] (0 for the others); None for what the method does not need."""
        if group is None or need not in self.method.needs:
            return None
        options = {"layout": rollouts_layout, "kinds": 1, "micro_batch_size": self.config.micro_batch_size}
        found = rollouts.logprobs.new_zeros(rollouts.logprobs.shape)
        found[which] = group.call("logprobs", rollouts[which], **options).squeeze(1)
        return found

    def _describe(self, rollouts: Rollouts, judged: Judged) -> dict[str, float]:
        """What users watch: of the policy's answers where it writes, else of all."""
        own = self.places.get("policy", slice(0, self.n))
        found = {
            "completions/mean_length": float(judged.lengths[:, own].mean()),
            "completions/clipped_ratio": float((~rollouts.ended).view(-1, self.n)[:, own].float().mean()),
            "rewards/unusable": float((~judged.valid).sum()),
        }
        if judged.scores is None:
            others = np.delete(judged.wins[:, own], np.arange(self.n)[own], 2)
            won = others[np.isfinite(others)]  # against the other sources' answers; against its own it wins half
            return found | ({"win_rate": float(won.mean())} if len(won) else {})
        scores = judged.scores[:, own][judged.valid[:, own]]
        if not len(scores):
            return found
        found |= {"reward": float(scores.sum(-1).mean()), "reward_std": float(scores.sum(-1).std())}
        return found | ({f"reward/{i + 1}": float(value) for i, value in enumerate(scores.mean(0))} if len(self.rewards) > 1 else {})

    def _answers_of(self, arranged: Arranged) -> Tensor:
        """[M, kinds] rows of the rollouts: each example's answers."""
        kinds = [side[:, None] for side in (arranged.first, arranged.second) if side is not None]
        kinds += [arranged.samples] if arranged.samples is not None else []
        return torch.from_numpy(arranged.prompt[:, None] * self.n + np.concatenate(kinds, 1))

    def _batch(self, arranged: Arranged, answers: Tensor, rollouts: Rollouts) -> Pairs | Labelled:
        count, first = len(answers), answers[:, 0]
        ids, length = rollouts.completion_ids, rollouts.completion_length
        shared: dict[str, Any] = {name: getattr(rollouts, name)[first] for name in ("prompt_ids", "prompt_length", "row")}

        def numbers(values: Floats | None) -> Tensor | None:
            return None if values is None else torch.from_numpy(values).float().to(answers.device)

        if arranged.second is None:
            label = torch.ones(count, dtype=torch.bool, device=answers.device)
            scores = numbers(arranged.first_score)
            return Labelled(
                **shared, completion_ids=ids[first], completion_length=length[first], label=label, score=scores, batch_size=[count]
            )
        second = answers[:, 1]
        samples = answers[:, 2:] if arranged.samples is not None else None
        return Pairs(
            **shared,
            chosen_ids=ids[first],
            chosen_length=length[first],
            rejected_ids=ids[second],
            rejected_length=length[second],
            margin=torch.zeros(count, device=answers.device),
            chosen_score=numbers(arranged.first_score),
            rejected_score=numbers(arranged.second_score),
            sample_ids=None if samples is None else ids[samples],
            sample_length=None if samples is None else length[samples],
            batch_size=[count],
        )

    def _learn(self, index: int, examples: tuple[Any, ...]) -> dict[str, float]:
        c = self.config
        batch, rows = examples[0], examples[1:]
        totals: dict[str, tuple[float, float]] = {}
        loss, updates, update = 0.0, 0, {}
        for epoch in range(c.epochs):
            order = torch.from_numpy(numpy_generator(c.seed, "minibatches", index, epoch).permutation(len(batch)))
            # A growing history is not learned from oftener, it is learned from more widely.
            for start in list(range(0, len(batch), c.minibatch_size))[: self.updates]:
                chosen = order[start : start + c.minibatch_size].to(batch.row.device)
                part = batch[chosen]
                self.last_batch = {name: value for name, value in part.to_dict().items() if isinstance(value, Tensor)}
                counts = Denominators(len(part), self._tokens(part))
                result = self.learner.call(
                    "accumulate", part, *(values[chosen] for values in rows), losses=self._losses, denominators=counts
                )
                update = self.learner.call("apply", self.last_batch)
                loss += result["loss"]
                updates += 1
                for name, (value, count) in result["metrics"].items():
                    before = totals.get(name, (0.0, 0.0))
                    totals[name] = (before[0] + value, before[1] + count)
        return {"loss": loss / updates} | means(totals) | update

    @staticmethod
    def _tokens(part: Any) -> int:
        if isinstance(part, Pairs):
            return int(part.chosen_length.sum() + part.rejected_length.sum())
        return int(part.completion_length.sum())

    def _losses(self, model: Any, part: Any, *rows: Tensor) -> Losses:
        frozen = list(rows)
        reference = frozen.pop(0) if "reference" in self.method.needs else None
        anchor = frozen.pop(0) if "anchor" in self.method.needs else None
        answers = _loop_pairs.layout(part) if isinstance(part, Pairs) else _loop_unpaired.layout(part)
        tokens = model.logprobs(answers).logprobs
        kinds, width = len(answers.ids) // len(part), answers.ids.shape[1]
        tokens, mask = tokens.view(-1, kinds, width), answers.mask.view(-1, kinds, width)

        def of(kind: int, values: Tensor | None) -> Any:
            return None if values is None else AnswerLogps(values[:, kind, :width], mask[:, kind])

        assert self.method.loss is not None
        if not isinstance(part, Pairs):
            return self.method.loss(self.config, LabelledLogps(of(0, tokens), of(0, reference), None, part.score))
        samples = None
        if kinds > 2:
            samples = SampleLogps(tokens[:, 2:], None if reference is None else reference[:, 2:, :width], mask[:, 2:])
        view = PairLogps(
            chosen=of(0, tokens),
            rejected=of(1, tokens),
            reference_chosen=of(0, reference),
            reference_rejected=of(1, reference),
            margin=part.margin,
            chosen_score=part.chosen_score,
            rejected_score=part.rejected_score,
            anchor_chosen=of(0, anchor),
            anchor_rejected=of(1, anchor),
            samples=samples,
        )
        return self.method.loss(self.config, view)

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"learner": self.learner.workers[0].state(), "cursor": self.cursor.state_dict()}
        if self.previous is not None:
            state["previous"] = self.previous
        if self.average is not None:
            state["average"] = self.average.workers[0].weights()
        if self.history:
            state["history"] = [[_plain(batch), *rows] for batch, *rows in self.history]
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        for worker in self.learner.workers:
            worker.load(state["learner"])
        self.cursor.load_state_dict(state["cursor"])
        device = self.model.device
        self.previous = {name: value.to(device) for name, value in state["previous"].items()} if "previous" in state else None
        if self.average is not None:
            self.average.call("approach", state["average"], share=1.0)
        self.history = [(_batch_of(held).to(device), *(row.to(device) for row in rows)) for held, *rows in state.get("history", [])]

    def finish(self, run: Run) -> None:
        self.model.save(run.path / "model")
        for source in (*self.rewards, *([self.judge] if self.judge else [])):
            source.close()


def _tokens_of(rollouts: Rollouts) -> list[list[int]]:
    return [ids[:length] for ids, length in zip(rollouts.completion_ids.tolist(), rollouts.completion_length.tolist(), strict=True)]


def _plain(batch: Any) -> dict[str, Tensor]:
    return {name: value for name, value in batch.to_dict().items() if isinstance(value, Tensor)}


def _batch_of(plain: Mapping[str, Tensor]) -> Any:
    kind: Any = Pairs if "chosen_ids" in plain else Labelled
    return kind(**plain, batch_size=[len(plain["row"])])


def _join(history: list[Any]) -> tuple[Any, ...]:
    """The examples of several iterations as one, padded to the widest answer."""
    batches = [examples[0] for examples in history]
    rows = zip(*(examples[1:] for examples in history), strict=True)
    width = max(values.shape[-1] for examples in history for values in examples[1:]) if len(history[0]) > 1 else 0
    padded = (torch.cat([torch.nn.functional.pad(v, (0, width - v.shape[-1])) for v in values]) for values in rows)
    return (concatenate(batches), *padded)
