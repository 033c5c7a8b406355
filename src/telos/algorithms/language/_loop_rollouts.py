"""On-policy reinforcement learning of language models: sample, score, estimate, learn.

One iteration draws `batch_size` prompts, samples answers with the current weights, scores them, and hands a `functional.policy.Scored` to
the method's `estimate(config, scored, state)`; its advantages then train the policy over `epochs` passes of minibatches with the method's
`loss(config, view)`, and the critic, where the method `needs` one, with `critic_loss(config, view)`. Before that `select(config, scored, generator)`, where
a method has it, says which answers are learned from (indices [M], in rising order): the others cost no further pass. `sample(config, draw, prompts, index)`,
where a method has it, writes the answers: `draw(who, prompts, begun, n)` has them written by the policy or the guide, from given beginnings. What a method
`needs`:

- "reference": log-probabilities under the model that regularises. A method with the option `kl_coef` and no teacher has none while that is 0;
- "soup": that model is the mean of several, `--reference soup:A,B`;
- "critic": values of the state before each token, by a model that learns beside the policy;
- "greedy": the score of the greedy answer to each prompt;
- "teacher": log-probabilities under the model that the option `teacher` names;
- "answers": the answers that the data have, in the prompts' batches;
- "guide": a second writer, the model that the option `guide` names;
- "nucleus": answers are drawn among the tokens in the nucleus `mask_top_p` of a copy of the policy that is renewed every `mask_every` iterations;
- "groups": the answers to one prompt stay together, in minibatches, micro-batches and on workers.

The log-probability contract: the answers' token ids are never encoded again, and the first ratio of new to sampled probabilities must be 1
within tolerance, or the run stops and says why. Sampling temperature and support travel with the rollout. Answers without a valid reward
are masked out and counted.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from telos.algorithms.language._forced import Forcing, progress_of_steps
from telos.algorithms.language._options import TrainingConfig, load_policy, lora_of
from telos.algorithms.language._roles import Learner, Reference, Scorer, micro_batches
from telos.algorithms.language._rows import answered_prompts_table, prompts_table, supervised_table
from telos.algorithms.language._sampling import Writer, open_rewards
from telos.algorithms.language._steps import CutConfig, cut_of
from telos.core.config import require
from telos.core.errors import Failure, UsageError
from telos.core.loop import NotFinite
from telos.core.method import Method
from telos.core.run import JsonLines, Run
from telos.core.seeds import derive, numpy_generator
from telos.data.batches import REWARD_NOT_APPLICABLE, REWARD_VALID, Prompts, Rollouts, concatenate
from telos.data.cursor import Cursor
from telos.data.tokenize import Table
from telos.dataflow import Role, make_backend, transfer
from telos.functional.policy import CriticView, Estimates, PolicyView, Scored, sequence_kl
from telos.functional.process import refine
from telos.functional.reduction import Denominators, Losses, masked_mean, means
from telos.models.generation import Sampling
from telos.models.generation.native import Nucleus
from telos.models.language import LanguageModel
from telos.models.packing import Answers
from telos.objectives.process_reward import ProcessReward, load_process_reward
from telos.objectives.reward_model import RewardModel, same_ids
from telos.objectives.rewards import Combined, RewardSource, Scores, require_some


@dataclass(frozen=True, kw_only=True)
class RolloutsConfig(TrainingConfig):
    """Options of on-policy training. A step is one iteration of sample and learn."""

    steps: int = 100  # iterations of sample and learn
    batch_size: int = 32  # prompts an iteration
    samples_per_prompt: int = 1  # answers to each prompt
    epochs: int = 2  # passes over an iteration's answers
    minibatch_size: int = 16  # answers in one optimiser step
    learning_rate: float = 5e-6  # peak, of the policy
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # down to zero at the last optimiser step
    max_completion_length: int = 64  # tokens an answer may have
    temperature: float = 1.0  # of sampling, > 0; log-probabilities are taken at the same temperature
    top_p: float = 1.0  # nucleus of sampling, (0, 1]; ratios are taken over the same nucleus
    top_k: int = 0  # most probable tokens kept; 0 = all
    reward: tuple[
        str, ...
    ] = ()  # one or several, added up: file.py:function, module:function, a reward model's folder or hub id, gold:TESTBED
    reward_weights: tuple[float, ...] = ()  # of several rewards, in their order; default: 1 each
    reward_timeout: float = 60.0  # seconds a batch may take in a reward function before it is ended
    reward_on_error: Literal["stop", "invalid"] = "stop"  # a failing reward function stops the run, or its answers are left out and counted
    missing_end_penalty: float = 0.0  # taken off the score of answers that were cut before their end token
    mask_truncated: bool = False  # answers that were cut before their end token are not learned from
    reference: str | None = None  # model that regularises, or soup:A,B for the mean of models' weights; default: the policy at the start
    reference_share: float = 0.0  # share of the policy's weights that the reference takes on after each iteration; 0 = it stays
    engine: Literal["native", "vllm"] = "native"  # what generates; vllm is an extra and needs a GPU
    pretrain_data: str | None = None  # text whose likelihood is kept up beside the reward (PPO-ptx)
    pretrain_coef: float = 0.0  # weight of that likelihood, >= 0
    log_rewards: bool = False  # writes rewards.jsonl: of each iteration each prompt's row and its answers' rewards

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "samples_per_prompt", "epochs", "minibatch_size")
        require(self, ">= 0", "top_k", "missing_end_penalty", "pretrain_coef")
        require(self, ">= 0 and <= 1", "reference_share")
        require(self, "> 0", "temperature", "reward_timeout")
        require(self, "> 0 and <= 1", "top_p")
        if self.lora_dropout:
            raise UsageError("--lora_dropout must be 0 in on-policy training: the policy that learns must be the one that was sampled")


@dataclass(frozen=True, kw_only=True)
class CriticConfig(RolloutsConfig):
    """Options of on-policy training with a critic."""

    critic_learning_rate: float = 1e-5  # peak, of the critic
    critic_init: Literal["reward", "policy"] = "reward"  # the critic starts as the reward model, or as the policy with a new head
    critic_warmup: int = 0  # iterations at the start in which only the critic learns

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "critic_learning_rate", "critic_warmup")
        if self.critic_warmup >= self.steps:
            raise UsageError(f"--critic_warmup {self.critic_warmup} leaves none of {self.steps} steps for the policy")


@dataclass(frozen=True, kw_only=True)
class StepRewardConfig(CutConfig):
    """Options of methods that also learn from rewards of an answer's steps."""

    process_reward: str | None = (
        None  # what scores steps: a process reward model, value:FOLDER, implicit:POLICY[,REFERENCE], or forced:ANSWERS[,TOKENS]
    )
    process_coef: float = 1.0  # weight of the steps' rewards beside the answer's own
    process_beta: float | None = None  # scale of an implicit process reward, > 0; default: 0.05
    process_clip: float | None = None  # η: a step is paid min(score - η, 0), so that more steps never pay; default: the score itself
    process_delta: bool = False  # a step is paid its score less the next one's, so that the sum does not grow with the number of steps

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.process_beta is not None:
            require(self, "> 0", "process_beta")
        if self.process_reward is None:
            for name in ("process_coef", "process_beta", "process_clip", "process_delta", "step_separators", "answer_mark"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise UsageError(f"--{name} has no effect without --process_reward")


@dataclass(frozen=True, kw_only=True)
class ResamplingConfig(RolloutsConfig):
    """Options of methods that pass over whole prompts and draw others for them."""

    sampling_rounds: int = 4  # batches of prompts that an iteration may draw until batch_size prompts are kept

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "sampling_rounds")


def layout(batch: Rollouts) -> Answers:
    """The answers, with prompts shared by neighbours of the same group."""
    _, owner, counts = torch.unique_consecutive(batch.group, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return Answers(batch.prompt_ids[first], batch.prompt_length[first], batch.completion_ids, batch.completion_length, owner)


class Critic(Role):
    """Values of frozen weights are asked for here; the same weights learn through their `Learner`."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    @transfer(split="rows", collect="rows")
    def values(self, batch: Rollouts, *, micro_batch_size: int = 0) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model.values(layout(part)) for (part,) in micro_batches(micro_batch_size, batch)])


class StepScorer(Role):
    """Scores of frozen models for the steps of answers."""

    def __init__(self, source: ProcessReward) -> None:
        self.source = source

    @transfer(split="rows", collect="rows")
    def score(self, batch: Rollouts) -> tuple[Tensor, Tensor]:
        return self.source.score_rollouts(batch)


class Program:
    """Sample, score, estimate, learn."""

    def __init__(self, method: Method, config: RolloutsConfig, run: Run) -> None:
        self.method, self.config, self.run = method, config, run
        self.last_batch: Mapping[str, Any] = {}
        self.uses_reference = "reference" in method.needs and ("teacher" in method.needs or getattr(config, "kl_coef", None) != 0)
        self._check()
        backend = make_backend(config.backend)
        self.model = load_policy(config)
        read = answered_prompts_table if "answers" in method.needs else prompts_table
        self.table = read(config, config.data, "--data", self.model, run)
        if len(self.table) < config.batch_size:
            raise UsageError(f"--batch_size {config.batch_size} is larger than the {len(self.table)} usable prompts of {config.data}")
        self.cursor = Cursor(len(self.table), config.batch_size, derive(config.seed, "rows"), drop_last=True)
        self.pretrain = None
        if config.pretrain_data:
            whole = dataclasses.replace(config, max_completion_length=self.model.context)  # the limit on answers is not one on text
            self.pretrain = supervised_table(whole, config.pretrain_data, "--pretrain_data", self.model, run)
        if self.pretrain is not None:
            self.pretrain_cursor = Cursor(
                len(self.pretrain), min(config.minibatch_size, len(self.pretrain)), derive(config.seed, "pretrain"), drop_last=True
            )
        self.reward = open_rewards(
            config.reward, config.reward_weights, timeout=config.reward_timeout, on_error=config.reward_on_error, policy=self.model
        )
        updates = config.epochs * math.ceil(config.batch_size * config.samples_per_prompt / config.minibatch_size)
        self.warmup = config.critic_warmup if isinstance(config, CriticConfig) else 0
        # What stays together is one row to the learner.
        self.together = config.samples_per_prompt if "groups" in method.needs else 1
        shaped = dataclasses.replace(config, micro_batch_size=-(-config.micro_batch_size // self.together))
        self.learner = backend.place(lambda: Learner(self.model, shaped, (config.steps - self.warmup) * updates))
        self.reference = backend.place(lambda: Reference(self.model, config.reference)) if self.uses_reference else None
        if config.reference_share and self.reference is not None and self.reference.workers[0].shared:
            raise UsageError("--reference_share: the reference is the policy without its adapter and has no weights that could move")
        self.teacher = backend.place(lambda: Reference(self.model, config.teacher)) if "teacher" in method.needs else None  # type: ignore[attr-defined]
        self.steps = self.forcing = None
        if isinstance(config, StepRewardConfig) and config.process_reward:
            self.forcing = Forcing.read(config.process_reward)
            if self.forcing is not None and config.process_beta is not None:
                raise UsageError("--process_beta scales implicit rewards alone; it has no effect on forced answers")
            self.steps = backend.place(lambda: self._step_scorer(config)) if self.forcing is None else None
        self.critic = None
        if "critic" in method.needs:
            assert isinstance(config, CriticConfig)
            self.critic_model = self._load_critic(config)
            critic_config = dataclasses.replace(config, learning_rate=config.critic_learning_rate)
            self.critic_learner = backend.place(lambda: Learner(self.critic_model, critic_config, config.steps * updates))
            self.critic = backend.place(lambda: Critic(self.critic_model))
        partner = None
        if "nucleus" in method.needs:
            self.mask = backend.place(lambda: Scorer(self.model.frozen_copy()))
            partner = Nucleus(self.mask.workers[0].model, config.mask_top_p)  # type: ignore[attr-defined]
        self.writer = backend.place(lambda: Writer(self.model, config.engine, partner=partner))
        self.guide = backend.place(lambda: self._guide(config.guide)) if "guide" in method.needs else None  # type: ignore[attr-defined]
        self.sampling = Sampling(
            temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, max_new_tokens=config.max_completion_length
        )
        self.lines = JsonLines(run.path / "rewards.jsonl") if config.log_rewards else None
        self.method_state: dict[str, float] = {}
        self._unchecked = True  # whether this iteration's first ratio is still to be checked

    def _check(self) -> None:
        c = self.config
        if not c.reward:
            raise UsageError(
                "--reward is missing: give file.py:function, module:function, a reward model's folder or hub id, or gold:TESTBED"
            )
        for name in ("teacher", "guide"):
            if name in self.method.needs and not getattr(c, name):
                raise UsageError(f"--{name} is missing: {self.method.key} needs a model's folder or hub id there")
        if "soup" in self.method.needs and not (c.reference or "").startswith("soup:"):
            raise UsageError("--reference is missing: give soup:A,B with the folders of fine-tuned models of one shape")
        if c.pretrain_coef and not c.pretrain_data:
            raise UsageError("--pretrain_coef needs --pretrain_data")
        if c.pretrain_data and not c.pretrain_coef:
            raise UsageError("--pretrain_data has no effect while --pretrain_coef is 0")
        if c.reference is not None and not self.uses_reference:
            raise UsageError(f"--reference has no effect on {self.method.key}, which uses no reference model as it is set up")
        if not self.uses_reference and getattr(c, "kl_as", None) != getattr(type(c), "kl_as", None):
            raise UsageError("--kl_as has no effect while --kl_coef is 0")
        if c.reference_share and not self.uses_reference:
            raise UsageError("--reference_share has no effect without a reference model")
        if "groups" in self.method.needs and c.minibatch_size % c.samples_per_prompt:
            raise UsageError(
                f"--minibatch_size {c.minibatch_size} cuts the {c.samples_per_prompt} answers to a prompt apart; give a multiple"
            )

    def _step_scorer(self, config: StepRewardConfig) -> StepScorer:
        size = self.config.micro_batch_size or 32
        return StepScorer(
            load_process_reward(config.process_reward, self.model, beta=config.process_beta, cut=cut_of(config), batch_size=size)
        )

    def _guide(self, source: str) -> Writer:
        guide = LanguageModel.load(source, precision=self.config.precision, device=str(self.model.device))
        guide.requires_grad_(False)
        if not same_ids(self.model.tokenizer, guide.tokenizer):
            raise UsageError(
                f"--guide {source} has another vocabulary than {self.config.model}; it could not go on from the policy's tokens"
            )
        return Writer(guide, self.config.engine)

    def _load_critic(self, c: CriticConfig) -> RewardModel:
        source, fresh = c.model, True
        if c.critic_init == "reward":
            if not isinstance(getattr(self.reward, "model", None), RewardModel):
                given = ", ".join(c.reward)
                raise UsageError(f"--critic_init reward needs a reward model, and --reward {given} is not one; use --critic_init policy")
            source, fresh = c.reward[0], False
        critic = RewardModel.load(source, fresh=fresh, tokenizer=c.tokenizer, lora=lora_of(c), precision=c.precision, device=c.device)
        if not same_ids(self.model.tokenizer, critic.tokenizer):
            raise UsageError(f"the critic from {source} has another vocabulary than {c.model}; use --critic_init policy")
        return critic

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        c = self.config
        answers = c.batch_size * c.samples_per_prompt
        return {
            "prompts": len(self.table),
            "prompts an iteration": c.batch_size,
            "answers an iteration": answers,
            "optimiser steps an iteration": c.epochs * math.ceil(answers / c.minibatch_size),
            "answers an optimiser step": c.minibatch_size,
            "iterations": c.steps,
            "tokens an answer, at most": c.max_completion_length,
            "trained parameters": sum(p.numel() for p in self.learner.workers[0].parameters_to_reduce()),
        }

    # -- one iteration --------------------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        rollouts, scored, metrics = self._collect(index)
        self.last_batch = {name: value for name, value in rollouts.to_dict().items() if isinstance(value, Tensor)}
        if not bool(torch.isfinite(rollouts.reward).all()):
            raise NotFinite(f"iteration {index + 1}: a reward is not finite", self.last_batch)
        if len(rollouts) == 0 or (c.mask_truncated and not bool(scored.valid.any()) and not bool(rollouts.ended.any())):
            return metrics | {"iterations/skipped": 1.0}
        scored = self._informed(index, rollouts, scored)
        if scored.reference is not None and bool(scored.valid.any()):
            metrics["kl"] = float(sequence_kl(scored.logprobs, scored.reference, scored.mask)[scored.valid].mean())
        if scored.dense is not None and scored.steps is not None and bool(scored.valid.any()):
            metrics["reward/steps"] = float(scored.dense.sum(1)[scored.valid].mean())
            metrics["completions/mean_steps"] = float(scored.steps.sum(1)[scored.valid].double().mean())
        assert self.method.estimate is not None
        estimates: Estimates = self.method.estimate(c, scored, self.method_state)
        self.method_state = dict(estimates.state)
        self._unchecked = True
        metrics |= dict(estimates.metrics) | self._learn(index, rollouts, scored, estimates)
        if c.reference_share and self.reference is not None:
            self.reference.call("approach", self.learner.call("weights"), share=c.reference_share)
        if "nucleus" in self.method.needs and (index + 1) % c.mask_every == 0:  # type: ignore[attr-defined]
            self.mask.call("approach", self.learner.call("weights"), share=1.0)
        return metrics

    def _collect(self, index: int) -> tuple[Rollouts, Scored, dict[str, float]]:
        """Scored answers that are learned from, of as many as `batch_size` prompts. A method that passes over whole prompts has others drawn for them."""
        c = self.config
        rounds = c.sampling_rounds if isinstance(c, ResamplingConfig) else 1
        drawn: list[Rollouts] = []
        kept: list[Rollouts] = []
        counts: dict[str, float] = {}
        prompts = 0
        for round_ in range(rounds):
            rollouts, found = self._sample(index, round_)
            counts = {name: counts.get(name, 0.0) + value for name, value in found.items()}
            drawn.append(rollouts)
            if self.method.select is not None:
                rows = self.method.select(c, self._scored(rollouts), numpy_generator(c.seed, "selection", index, round_))
                rollouts = _taken(rollouts, torch.as_tensor(rows))
            kept.append(rollouts)
            prompts += len(torch.unique(rollouts.group))
            if prompts >= c.batch_size:
                break
        everything = concatenate(drawn)
        metrics = counts | _describe(everything, self._scored(everything))
        if self.lines is not None:
            self.lines.append([{"step": index + 1, **row} for row in _rewards_by_prompt(everything)])
        rollouts = concatenate(kept)
        if self.method.select is not None:
            numbers = torch.unique_consecutive(rollouts.group)
            rollouts = _taken(rollouts, torch.isin(rollouts.group, numbers[: c.batch_size]).nonzero()[:, 0])
            metrics["completions/learned_from"] = len(rollouts) / len(everything)
        return rollouts, self._scored(rollouts), metrics

    def _scored(self, rollouts: Rollouts) -> Scored:
        usable = rollouts.reward_status == REWARD_VALID
        if self.config.mask_truncated:
            usable = usable & rollouts.ended
        mask = rollouts.action_mask & usable[:, None]
        return Scored(mask, rollouts.logprobs, None, None, rollouts.reward, rollouts.ended, rollouts.group, greedy=rollouts.greedy_reward)

    def _informed(self, index: int, rollouts: Rollouts, scored: Scored) -> Scored:
        """With what other models say of the answers."""
        c = self.config
        under = {"layout": layout, "kinds": 1, "micro_batch_size": c.micro_batch_size, "temperature": c.temperature}
        found: dict[str, Tensor] = {}
        if self.reference is not None:
            found["reference"] = self.reference.call("logprobs", rollouts, **under).squeeze(1)
        if self.teacher is not None:
            found["teacher"] = self.teacher.call("logprobs", rollouts, **under).squeeze(1)
        if self.critic is not None:
            found["values"] = self.critic.call("values", rollouts, micro_batch_size=c.micro_batch_size)
        if self.steps is not None or self.forcing is not None:
            assert isinstance(c, StepRewardConfig)
            scores, steps = self._forced_progress(index, rollouts) if self.steps is None else self.steps.call("score", rollouts)
            found["steps"] = steps = steps & scored.mask
            found["dense"] = c.process_coef * refine(scores, steps, c.process_clip, c.process_delta)
        return dataclasses.replace(scored, **found)

    def _forced_progress(self, index: int, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        def judge(answers: Rollouts, texts: list[str]) -> Tensor:
            return score(self.reward, self.table, answers, texts)[0].values

        c = self.config
        assert isinstance(c, StepRewardConfig)
        assert self.forcing is not None
        options: dict[str, Any] = {"cut": cut_of(c), "sampling": self.sampling, "seed": derive(c.seed, "forced answers", index)}
        return progress_of_steps(rollouts, self.writer, self.model, judge, self.forcing, **options)[:2]

    def _sample(self, index: int, round_: int) -> tuple[Rollouts, dict[str, float]]:
        """Answers to the next prompts with their rewards, and how many rows had none."""
        c = self.config
        prompts: Prompts = self.table.batch(self.cursor.next()).to(self.model.device)  # type: ignore[assignment]
        seed = derive(c.seed, "sampling", index) if round_ == 0 else derive(c.seed, "sampling", index, round_)
        rollouts, texts = self._write(prompts, c.samples_per_prompt, index, seed)
        rollouts.group = rollouts.group + round_ * len(self.table)  # a prompt that comes again makes another group
        counts = self._reward(rollouts, texts)
        if "greedy" in self.method.needs:
            counts |= self._add_greedy(prompts, rollouts)
        return rollouts, counts

    def _add_greedy(self, prompts: Prompts, rollouts: Rollouts) -> dict[str, float]:
        """Sets the rewards of the greedy answers; a prompt whose greedy answer has no reward is left out."""
        c = self.config
        greedy, texts = self.writer.call("write", prompts, sampling=Sampling(temperature=0.0, max_new_tokens=c.max_completion_length), n=1)
        scores, _ = score(self.reward, self.table, greedy, texts)
        value = torch.where(scores.valid, scores.values, 0.0).to(rollouts.reward)
        value = value - c.missing_end_penalty * (~greedy.ended).to(value)
        rollouts.greedy_reward = value.repeat_interleave(c.samples_per_prompt)
        known = scores.valid.to(rollouts.reward_status.device).repeat_interleave(c.samples_per_prompt)
        rollouts.reward_status = torch.where(known, rollouts.reward_status, REWARD_NOT_APPLICABLE).to(rollouts.reward_status.dtype)
        return {"rewards/greedy_missing": float((~scores.valid).sum())} if not bool(scores.valid.all()) else {}

    def _write(self, prompts: Prompts, n: int, index: int, seed: int) -> tuple[Rollouts, list[str]]:
        if self.method.sample is None:
            return self.writer.call("write", prompts, sampling=self.sampling, n=n, seed=seed)
        count = itertools.count()

        def draw(who: str, given: Prompts, begun: list[list[int]] | None = None, n: int = n) -> tuple[Rollouts, list[str]]:
            writer = self.guide if who == "guide" else self.writer
            assert writer is not None
            return writer.call("write", given, begun, sampling=self.sampling, n=n, seed=derive(seed, next(count)))

        return self.method.sample(self.config, draw, prompts, index)

    def _reward(self, rollouts: Rollouts, texts: list[str]) -> dict[str, float]:
        """Sets the rewards of the answers; returns what is to be logged of them."""
        scores, metrics = score(self.reward, self.table, rollouts, texts)
        require_some(scores, self.reward.name)
        value = torch.where(scores.valid, scores.values, 0.0).to(rollouts.reward)
        rollouts.reward = value - self.config.missing_end_penalty * (~rollouts.ended).to(value)
        rollouts.reward_status = scores.status.to(rollouts.reward_status)
        counts = scores.counts()
        return metrics | {f"rewards/{name}": float(n) for name, n in counts.items() if name != "valid"}

    def _learn(self, index: int, rollouts: Rollouts, scored: Scored, estimates: Estimates) -> dict[str, float]:
        c = self.config
        totals: dict[str, tuple[float, float]] = {}
        sums = {"loss": 0.0, "loss/critic": 0.0, "loss/pretrain": 0.0}
        update: dict[str, float] = {}
        updates = 0
        n = len(rollouts)
        entries = {
            "mask": scored.mask,
            "old": scored.logprobs,
            "advantages": estimates.advantages,
            "group": scored.group,
            **estimates.extra,
        }
        entries |= {} if scored.reference is None else {"reference": scored.reference}
        losses = functools.partial(self._policy_losses, tuple(entries))
        critic_entries = [scored.mask, scored.values, estimates.returns] if self.critic is not None else []
        for epoch in range(c.epochs):
            order = torch.from_numpy(_shuffled_groups(rollouts.group, numpy_generator(c.seed, "minibatches", index, epoch)))
            for start in range(0, n, c.minibatch_size):
                rows = order[start : start + c.minibatch_size].to(rollouts.group.device)
                part, counts = rollouts[rows], Denominators(int(scored.valid[rows].sum()), int(scored.mask[rows].sum()))
                if counts.examples == 0:
                    continue
                if index >= self.warmup:
                    given = [part, *(entry[rows] for entry in entries.values())]
                    result = self.learner.call(
                        "accumulate", *(_in_groups(value, self.together) for value in given), losses=losses, denominators=counts
                    )
                    sums["loss"] += result["loss"]
                    _add(totals, result["metrics"])
                    if self.pretrain is not None:
                        sums["loss/pretrain"] += self._accumulate_pretrain()
                    update = self.learner.call("apply", self.last_batch)
                if self.critic is not None:
                    result = self.critic_learner.call(
                        "accumulate", part, *(entry[rows] for entry in critic_entries), losses=self._critic_losses, denominators=counts
                    )
                    sums["loss/critic"] += result["loss"]
                    _add(totals, result["metrics"])
                    self.critic_learner.call("apply", self.last_batch)
                updates += 1
        if updates == 0:
            raise Failure("no answer of this iteration has a valid reward, so there is nothing to learn from; look at the reward function")
        wanted = {"loss": True, "loss/critic": self.critic is not None, "loss/pretrain": self.pretrain is not None}
        return {name: value / updates for name, value in sums.items() if wanted[name]} | means(totals) | update

    def _accumulate_pretrain(self) -> float:
        table = self.pretrain
        assert table is not None
        batch = table.batch(self.pretrain_cursor.next()).to(self.model.device)
        counts = Denominators(len(batch), int(batch.loss_mask.sum()))  # type: ignore[union-attr]
        return self.learner.call("accumulate", batch, losses=self._pretrain_losses, denominators=counts)["loss"]

    def _pretrain_losses(self, model: Any, part: Any) -> Losses:
        from telos.algorithms.language._loop_supervised import layout as sequence_layout

        scores = model.logprobs(sequence_layout(part))
        return Losses(-self.config.pretrain_coef * scores.logprobs, part.loss_mask[:, 1:])

    def _policy_losses(self, names: tuple[str, ...], model: Any, part: Rollouts, *rows: Tensor) -> Losses:
        c = self.config
        if self.together > 1:
            part, rows = cast(Rollouts, part.reshape(-1)), tuple(value.flatten(0, 1) for value in rows)
        given = dict(zip(names, rows, strict=True))
        scores = model.logprobs(layout(part), temperature=c.temperature, support=part.support, want_entropy=True)
        old = given.pop("old")
        if self._unchecked:
            self._check_first_ratio(scores.logprobs, old, part.action_mask)
        assert scores.entropy is not None
        assert self.method.loss is not None
        known: dict[str, Any] = {name: given.pop(name, None) for name in ("reference", "advantages", "mask", "group")}
        return self.method.loss(c, PolicyView(scores.logprobs, scores.entropy, old, **known, extra=given))

    def _critic_losses(self, model: Any, part: Rollouts, mask: Tensor, old: Tensor, returns: Tensor) -> Losses:
        assert self.method.critic_loss is not None
        return self.method.critic_loss(self.config, CriticView(model.values(layout(part)), old, returns, mask))

    def _check_first_ratio(self, new: Tensor, old: Tensor, mask: Tensor) -> None:
        """Before the first update of an iteration, trainer and sampler must agree on what was sampled."""
        self._unchecked = False
        gap = float(masked_mean((new.detach() - old).abs(), mask))
        tolerance = 1e-3 if self.model.precision == "float32" else 5e-2
        if gap > tolerance:
            raise Failure(
                f"the trainer's log-probabilities differ from the sampler's by {gap:.3g} nats a token before any update (allowed: {tolerance:g}): "
                "the engine runs other weights, another precision or another sampling distribution than the trainer"
            )

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "learner": self.learner.workers[0].state(),
            "cursor": self.cursor.state_dict(),
            "method": self.method_state,
        }
        if self.critic is not None:
            state["critic"] = self.critic_learner.workers[0].state()
        if self.pretrain is not None:
            state["pretrain"] = self.pretrain_cursor.state_dict()
        if self.config.reference_share and self.reference is not None:
            state["reference"] = self.reference.workers[0].weights()
        if "nucleus" in self.method.needs:
            state["mask"] = self.mask.workers[0].weights()
        if self.lines is not None:
            state["lines"] = self.lines.written
        return state

    def load(self, state: Mapping[str, Any]) -> None:
        for worker in self.learner.workers:
            worker.load(state["learner"])
        self.cursor.load_state_dict(state["cursor"])
        self.method_state = dict(state["method"])
        if self.critic is not None:
            for worker in self.critic_learner.workers:
                worker.load(state["critic"])
        if self.pretrain is not None:
            self.pretrain_cursor.load_state_dict(state["pretrain"])
        if "reference" in state and self.reference is not None:
            self.reference.call("approach", state["reference"], share=1.0)
        if "nucleus" in self.method.needs:
            self.mask.call("approach", state["mask"], share=1.0)
        if self.lines is not None:
            self.lines.written = state["lines"]

    def finish(self, run: Run) -> None:
        self.model.save(run.path / "model")
        if self.critic is not None:
            self.critic_model.save(run.path / "critic")
        self.reward.close()


def _add(totals: dict[str, tuple[float, float]], more: Mapping[str, tuple[float, float]]) -> None:
    for name, (value, count) in more.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = (before[0] + value, before[1] + count)


def _taken(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    """The answers `rows` [M]."""
    return cast(Rollouts, rollouts[rows.to(rollouts.row.device)])


def _in_groups(values: Any, size: int) -> Any:
    """Rows [M, …] as groups of `size` [M / size, size, …]."""
    if size == 1:
        return values
    return values.unflatten(0, (-1, size)) if isinstance(values, Tensor) else values.reshape(-1, size)


def _shuffled_groups(group: Tensor, generator: np.random.Generator) -> np.ndarray:
    """An order of the rows in which groups are shuffled and stay together, so that their prompt is computed once."""
    found, number = np.unique(group.cpu().numpy(), return_inverse=True)
    return np.argsort(generator.permutation(len(found))[number], kind="stable")


def score(reward: RewardSource, table: Table, rollouts: Rollouts, texts: list[str]) -> tuple[Scores, dict[str, float]]:
    """What the reward says of sampled answers, and its parts' numbers where there are several. It sees prompts as given, texts without end tokens, and the
    data's own columns."""
    rows = rollouts.row.tolist()
    ids = [ids[:length] for ids, length in zip(rollouts.completion_ids.tolist(), rollouts.completion_length.tolist(), strict=True)]
    columns = {name: [values[i] for i in rows] for name, values in table.extra.items()}
    if getattr(reward, "uses_ids", False):  # a reward model that reads the policy's tokens takes the prompts as the policy read them, too
        columns["prompt_ids"] = [
            ids[:length] for ids, length in zip(rollouts.prompt_ids.tolist(), rollouts.prompt_length.tolist(), strict=True)
        ]
    given = ([table.prompts[i] for i in rows], texts, ids, columns)
    return reward.score_parts(*given) if isinstance(reward, Combined) else (reward.score(*given), {})


def _rewards_by_prompt(rollouts: Rollouts) -> list[dict[str, Any]]:
    """For each group its row in the table and the rewards of its answers, None where there is none."""
    found: dict[int, dict[str, Any]] = {}
    valid = (rollouts.reward_status == REWARD_VALID).tolist()
    for group, row, reward, known in zip(rollouts.group.tolist(), rollouts.row.tolist(), rollouts.reward.tolist(), valid, strict=True):
        found.setdefault(group, {"row": row, "rewards": []})["rewards"].append(reward if known else None)
    return list(found.values())


def _describe(rollouts: Rollouts, scored: Scored) -> dict[str, float]:
    """The numbers that users watch, under their usual names."""
    usable = scored.mask.any(1)
    rewards = rollouts.reward[usable]
    mask = scored.mask
    return {
        "reward": float(rewards.mean()) if len(rewards) else 0.0,
        "reward_std": float(rewards.std(unbiased=False)) if len(rewards) else 0.0,
        "completions/mean_length": float(rollouts.completion_length.float().mean()),
        "completions/clipped_ratio": float((~rollouts.ended).float().mean()),
        "perplexity": float(masked_mean(-scored.logprobs, mask).exp()),
    }
