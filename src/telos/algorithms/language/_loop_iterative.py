"""Iterative alignment with an oracle: write answers, have them judged, arrange what is learned from, learn; again from the new policy.

A step is one iteration. Its answers come from the sources that the method's `writers(config)` names, by default all from the policy: "policy",
"reference", "average" (an exponential moving average of the policy's weights) and "mixture" (policy and reference, mixed geometrically token by token).
The oracle is a reward, a judge of two answers, or a human. `arrange(config, judged)` takes an `objectives.judges.Judged` and returns an `Arranged`: pairs, or
single answers. `loss(config, view)` takes a `PairLogps` or a `LabelledLogps`, whose anchor is the policy at the start of the iteration, and
`advance(config, weights, previous)` may change the weights with which the next iteration begins. What a method `needs`:

- "reference": log-probabilities under the model that regularises;
- "anchor": log-probabilities under the policy at the start of the iteration;
- "history": the examples of all iterations so far, not of the last one alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from telos.algorithms.language import _loop_pairs, _loop_unpaired
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
from telos.data.formats import Examples
from telos.dataflow import Group, make_backend
from telos.functional.pairwise import AnswerLogps, LabelledLogps, PairLogps, SampleLogps
from telos.functional.policy import sequence_kl
from telos.functional.reduction import Denominators, Losses, means
from telos.models.generation import Sampling
from telos.objectives.judges import HumanQueue, Judged, bradley_terry, compare_all
from telos.objectives.rewards import RewardSource

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class IterativeConfig(TrainingConfig):
    """Options of iterative alignment. A step is one iteration: write, judge, learn."""

    steps: int = 20  # iterations
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


@dataclass(frozen=True, eq=False)
class Arranged:
    """What is learned from, M examples: `first` and `second` are answers (0 … n − 1) of the prompts `prompt` (0 … P − 1), the preferred one first where
    one is; `second` None makes single answers. `samples` [M, k] are further answers of the prompt for methods that use them."""

    prompt: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64] | None = None
    first_score: Floats | None = None  # what the loss reads as `chosen_score`, or as `score` of single answers
    second_score: Floats | None = None
    samples: NDArray[np.int64] | None = None


class Program:
    """Write, judge, arrange, learn."""

    def __init__(self, method: Method, config: IterativeConfig, run: Run) -> None:
        self.method, self.config, self.run = method, config, run
        self.last_batch: Mapping[str, Any] = {}
        self._check()
        backend = make_backend(config.backend)
        self.model = load_policy(config)
        self.table = prompts_table(config, config.data, "--data", self.model, run, self._prepare if method.prepare else None)
        if len(self.table) < config.batch_size:
            raise UsageError(f"--batch_size {config.batch_size} is larger than the {len(self.table)} usable prompts of {config.data}")
        self.cursor = Cursor(len(self.table), config.batch_size, derive(config.seed, "rows"), drop_last=True)
        self.sources: dict[str, int] = method.writers(config) if method.writers else {"policy": config.samples_per_prompt}
        self.n = sum(self.sources.values())
        self.rewards: list[RewardSource] = [
            open_reward(spec, timeout=config.reward_timeout, on_error=config.reward_on_error, policy=self.model) for spec in config.reward
        ]
        self.judge = self._open_judge()
        examples = config.batch_size * min(config.examples_per_prompt, max(1, self.n))
        self.learner = backend.place(
            lambda: Learner(self.model, config, config.steps * config.epochs * math.ceil(examples / config.minibatch_size))
        )
        wanted = {"reference", "mixture"} & (method.needs | self.sources.keys())
        self.reference: Group[Reference] | None = backend.place(lambda: Reference(self.model, config.reference)) if wanted else None
        if config.reference is not None and not wanted:
            raise UsageError(f"--reference has no effect on {method.key}, which uses no reference model")
        self.now = backend.place(lambda: Scorer(self.model)) if "anchor" in method.needs else None
        self.average = backend.place(lambda: Reference(self.model)) if "average" in self.sources else None
        self.writers = {name: backend.place(lambda name=name: self._writer(name)) for name in self.sources}
        self.previous: dict[str, Tensor] | None = None  # the weights that the last iteration learned, before `advance`
        self.history: list[Any] = []

    def _check(self) -> None:
        c = self.config
        if bool(c.reward) == bool(c.judge):
            raise UsageError(
                "give one of --reward (file.py:function, module:function, a reward model's folder or hub id, gold:TESTBED) and --judge "
                "(file.py:function or module:function that compares two answers, or human:FOLDER)"
            )

    def _prepare(self, examples: Examples) -> Examples:
        assert self.method.prepare is not None
        return self.method.prepare(self.config, examples)

    def _open_judge(self) -> RewardSource | None:
        c = self.config
        if c.judge is None:
            return None
        if c.judge.startswith("human:"):
            return HumanQueue(c.judge.removeprefix("human:"), tell=self.run.warn)
        return open_reward(c.judge, timeout=c.reward_timeout, on_error=c.reward_on_error, policy=self.model)

    def _writer(self, name: str) -> Writer:
        c = self.config
        if name == "policy":
            return Writer(self.model, c.engine)
        if name == "average":
            assert self.average is not None
            return Writer(self.average.workers[0].model, c.engine)
        assert self.reference is not None
        theirs = self.reference.workers[0]
        if name == "reference":
            return Writer(theirs.model, c.engine, under=theirs.as_it_scores)
        return Writer(self.model, c.engine, mixed_with=theirs, share=c.mixture)  # type: ignore[attr-defined]

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        c = self.config
        examples = c.batch_size * min(c.examples_per_prompt, max(1, self.n))
        return {
            "prompts": len(self.table),
            "prompts an iteration": c.batch_size,
            "answers a prompt": ", ".join(f"{count} by the {name}" for name, count in self.sources.items()),
            "examples an iteration, at most": examples,
            "optimiser steps an iteration, at most": c.epochs * math.ceil(examples / c.minibatch_size),
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
        metrics = self._describe(rollouts, judged)
        reference, anchor = self._score(self.reference, rollouts, "reference"), self._score(self.now, rollouts, "anchor")
        if reference is not None:
            mine = torch.arange(len(rollouts), device=reference.device) % self.n < self.sources.get("policy", 0)
            if bool(mine.any()) and next(iter(self.sources)) == "policy" and not self._tempered:
                metrics["kl"] = float(sequence_kl(rollouts.logprobs, reference, rollouts.action_mask)[mine].mean())
        assert self.method.arrange is not None
        arranged: Arranged = self.method.arrange(c, judged)
        if len(arranged.prompt) == 0:
            raise Failure(
                "no example of this iteration can be learned from: every answer was the same or was not judged; look at the reward or the judge, "
                "or ask for more answers with --samples_per_prompt"
            )
        metrics["examples"] = float(len(arranged.prompt))
        examples = self._examples(arranged, rollouts, reference, anchor)
        if "history" in self.method.needs:
            self.history.append(examples)
            examples = _join(self.history)
        before = self.learner.call("weights") if self.method.advance is not None else None
        metrics |= self._learn(index, examples)
        if before is not None:
            self._advance(before)
        if self.average is not None:
            self._move_average()
        return metrics

    @property
    def _tempered(self) -> bool:
        """Whether answers are drawn from another distribution than the model's own."""
        c = self.config
        return c.temperature != 1 or c.top_p < 1 or c.top_k > 0

    def _write(self, index: int) -> tuple[Rollouts, list[str]]:
        """n answers to each prompt, source after source, those of a prompt together."""
        c = self.config
        prompts = self.table.batch(self.cursor.next()).to(self.model.device)
        sampling = Sampling(temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, max_new_tokens=c.max_completion_length)
        parts, texts, places = [], [], []
        for name, count in self.sources.items():
            seed = derive(c.seed, "sampling", name, index)
            drawn, written = self.writers[name].call("write", prompts, sampling=sampling, n=count, seed=seed)
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
        columns = {name: [values[i] for i in rows] for name, values in self.table.extra.items()}
        lengths = rollouts.completion_length.view(-1, n).cpu().numpy()
        generator = numpy_generator(c.seed, "arrange", index)
        if self.judge is None:
            found = [score(reward, self.table, rollouts, texts).values.double().view(-1, n).cpu().numpy() for reward in self.rewards]
            scores = np.stack(found, -1)
            return Judged(bradley_terry(scores.sum(-1), c.reward_scale), scores, lengths, columns, generator)
        prompts = [self.table.prompts[i] for i in rows]
        ids = [ids[:length] for ids, length in zip(rollouts.completion_ids.tolist(), rollouts.completion_length.tolist(), strict=True)]
        starts = range(0, len(texts), n)
        answers, tokens = [texts[i : i + n] for i in starts], [ids[i : i + n] for i in starts]
        return Judged(compare_all(self.judge, prompts, answers, tokens, columns), None, lengths, columns, generator)

    def _score(self, group: Group[Any] | None, rollouts: Rollouts, need: str) -> Tensor | None:
        if group is None or need not in self.method.needs:
            return None
        return group.call("logprobs", rollouts, layout=rollouts_layout, kinds=1, micro_batch_size=self.config.micro_batch_size).squeeze(1)

    def _describe(self, rollouts: Rollouts, judged: Judged) -> dict[str, float]:
        reward = judged.reward
        usable = np.isfinite(reward)
        found = {
            "completions/mean_length": float(rollouts.completion_length.float().mean()),
            "completions/clipped_ratio": float((~rollouts.ended).float().mean()),
            "rewards/unusable": float((~usable).sum()),
        }
        return found | ({"reward": float(reward[usable].mean()), "reward_std": float(reward[usable].std())} if usable.any() else {})

    def _examples(self, arranged: Arranged, rollouts: Rollouts, reference: Tensor | None, anchor: Tensor | None) -> tuple[Any, ...]:
        """The batch to learn from and the frozen log-probabilities [M, kinds, T] of its answers (reference, then anchor, where needed)."""
        device, n = rollouts.row.device, self.n
        at = [torch.from_numpy(arranged.prompt * n + arranged.first).to(device)]
        if arranged.second is not None:
            at.append(torch.from_numpy(arranged.prompt * n + arranged.second).to(device))
        shared: dict[str, Any] = {
            "prompt_ids": rollouts.prompt_ids[at[0]],
            "prompt_length": rollouts.prompt_length[at[0]],
            "row": rollouts.row[at[0]],
        }

        def numbers(values: Floats | None) -> Tensor | None:
            return None if values is None else torch.from_numpy(values).float().to(device)

        ids, length = rollouts.completion_ids, rollouts.completion_length
        count = len(arranged.prompt)
        if arranged.second is None:
            batch: Any = Labelled(
                **shared,
                completion_ids=ids[at[0]],
                completion_length=length[at[0]],
                label=torch.ones(count, dtype=torch.bool, device=device),
                score=numbers(arranged.first_score),
                batch_size=[count],
            )
        else:
            batch = Pairs(
                **shared,
                chosen_ids=ids[at[0]],
                chosen_length=length[at[0]],
                rejected_ids=ids[at[1]],
                rejected_length=length[at[1]],
                margin=torch.zeros(count, device=device),
                chosen_score=numbers(arranged.first_score),
                rejected_score=numbers(arranged.second_score),
                batch_size=[count],
            )
        kinds = torch.stack(at, 1)
        if arranged.samples is not None:
            extra = torch.from_numpy(arranged.prompt[:, None] * n + arranged.samples).to(device)
            batch = batch.replace(sample_ids=ids[extra], sample_length=length[extra])
            kinds = torch.cat([kinds, extra], 1)
        return batch, *(values[kinds] for values in (reference, anchor) if values is not None)

    def _learn(self, index: int, examples: tuple[Any, ...]) -> dict[str, float]:
        c = self.config
        batch, rows = examples[0], examples[1:]
        totals: dict[str, tuple[float, float]] = {}
        loss, updates, update = 0.0, 0, {}
        # A growing history is not learned from oftener, it is learned from more widely.
        most = math.ceil(c.batch_size * min(c.examples_per_prompt, max(1, self.n)) / c.minibatch_size)
        for epoch in range(c.epochs):
            order = torch.from_numpy(numpy_generator(c.seed, "minibatches", index, epoch).permutation(len(batch)))
            for start in list(range(0, len(batch), c.minibatch_size))[:most]:
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

    def _advance(self, before: dict[str, Tensor]) -> None:
        """The method's own start of the next iteration, from the weights just learned and those that the iteration before had learned."""
        assert self.method.advance is not None
        learned = self.learner.call("weights")
        self.learner.call("set_weights", self.method.advance(self.config, learned, self.previous or before))
        self.previous = learned

    def _move_average(self) -> None:
        assert self.average is not None
        share = self.config.average_share  # type: ignore[attr-defined]
        mine = dict(self.model.named_parameters())
        with torch.no_grad():
            for worker in self.average.workers:
                for name, p in worker.model.named_parameters():
                    p.lerp_(mine[name], share)

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"learner": self.learner.workers[0].state(), "cursor": self.cursor.state_dict()}
        if self.previous is not None:
            state["previous"] = self.previous
        if self.average is not None:
            trained = {name for name, _ in self.model.trainable()}
            state["average"] = {n: p.detach() for n, p in self.average.workers[0].model.named_parameters() if n in trained}
        if self.history:
            state["history"] = [[_plain(batch), *rows] for batch, *rows in self.history]
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        for worker in self.learner.workers:
            worker.load(state["learner"])
        self.cursor.load_state_dict(state["cursor"])
        self.previous = dict(state["previous"]) if "previous" in state else None
        if self.average is not None:
            with torch.no_grad():
                for worker in self.average.workers:
                    for name, p in worker.model.named_parameters():
                        if name in state["average"]:
                            p.copy_(state["average"][name])
        device = self.model.device
        self.history = [
            (
                Pairs(**{name: value.to(device) for name, value in held.items()}, batch_size=[len(held["row"])]),
                *(row.to(device) for row in rows),
            )
            for held, *rows in state.get("history", [])
        ]

    def finish(self, run: Run) -> None:
        self.model.save(run.path / "model")
        for source in (*self.rewards, *([self.judge] if self.judge else [])):
            source.close()


def _plain(batch: Any) -> dict[str, Tensor]:
    return {name: value for name, value in batch.to_dict().items() if isinstance(value, Tensor)}


def _join(history: list[Any]) -> tuple[Any, ...]:
    """The examples of several iterations as one, padded to the widest answer."""
    batches = [examples[0] for examples in history]
    rows = zip(*(examples[1:] for examples in history), strict=True)
    width = max(values.shape[-1] for examples in history for values in examples[1:]) if len(history[0]) > 1 else 0
    padded = (torch.cat([torch.nn.functional.pad(v, (0, width - v.shape[-1])) for v in values]) for values in rows)
    return (concatenate(batches), *padded)
