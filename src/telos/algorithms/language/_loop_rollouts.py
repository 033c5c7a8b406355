"""On-policy reinforcement learning of language models: sample, score, estimate, learn.

One iteration draws `batch_size` prompts, samples answers with the current weights, scores them, and hands a `functional.policy.Scored` to
the method's `estimate(config, scored, state)`; its advantages then train the policy over `epochs` passes of minibatches with the method's
`loss(config, view)`, and the critic, where the method `needs` one, with `critic_loss(config, view)`.

The log-probability contract: the answers' token ids are never encoded again, and the first ratio of new to sampled probabilities must be 1
within tolerance, or the run stops and says why. Sampling temperature and support travel with the rollout. Answers without a valid reward
are masked out and counted.
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

from telos.algorithms.language._options import TrainingConfig, load_policy, lora_of
from telos.algorithms.language._roles import Learner, Reference, micro_batches
from telos.algorithms.language._rows import prompts_table, supervised_table
from telos.algorithms.language._sampling import Writer, open_reward
from telos.core.config import require
from telos.core.errors import Failure, UsageError
from telos.core.loop import NotFinite
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import derive, numpy_generator
from telos.data.batches import REWARD_VALID, Prompts, Rollouts
from telos.data.cursor import Cursor
from telos.data.tokenize import Table
from telos.dataflow import Role, make_backend, transfer
from telos.functional.policy import CriticView, Estimates, PolicyView, Scored, sequence_kl
from telos.functional.reduction import Denominators, Losses, masked_mean, means
from telos.models.generation import Sampling
from telos.models.packing import Answers
from telos.objectives.reward_model import RewardModel, same_ids
from telos.objectives.rewards import require_some


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
    critic_learning_rate: float = 1e-5  # peak, of the critic
    critic_init: Literal["reward", "policy"] = "reward"  # the critic starts as the reward model, or as the policy with a new head
    critic_warmup: int = 0  # iterations at the start in which only the critic learns
    max_completion_length: int = 64  # tokens an answer may have
    temperature: float = 1.0  # of sampling, > 0; log-probabilities are taken at the same temperature
    top_p: float = 1.0  # nucleus of sampling, (0, 1]; ratios are taken over the same nucleus
    top_k: int = 0  # most probable tokens kept; 0 = all
    reward: str = ""  # file.py:function, module:function, a reward model's folder or hub id, or gold:TESTBED
    reward_timeout: float = 60.0  # seconds a batch may take in a reward function before it is ended
    reward_on_error: Literal["stop", "invalid"] = "stop"  # a failing reward function stops the run, or its answers are left out and counted
    missing_end_penalty: float = 0.0  # taken off the score of answers that were cut before their end token
    reference: str | None = None  # model that regularises; default: the policy as it is at the start
    engine: Literal["native", "vllm"] = "native"  # what generates; vllm is an extra and needs a GPU
    pretrain_data: str | None = None  # text whose likelihood is kept up beside the reward (PPO-ptx)
    pretrain_coef: float = 0.0  # weight of that likelihood, >= 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "samples_per_prompt", "epochs", "minibatch_size")
        require(self, ">= 0", "critic_learning_rate", "critic_warmup", "top_k", "missing_end_penalty", "pretrain_coef")
        require(self, "> 0", "temperature", "reward_timeout")
        require(self, "> 0 and <= 1", "top_p")
        if self.lora_dropout:
            raise UsageError("--lora_dropout must be 0 in on-policy training: the policy that learns must be the one that was sampled")


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


class Program:
    """Sample, score, estimate, learn."""

    def __init__(self, method: Method, config: RolloutsConfig, run: Run) -> None:
        self.method, self.config, self.run = method, config, run
        self.last_batch: Mapping[str, Any] = {}
        self._check()
        backend = make_backend(config.backend)
        self.model = load_policy(config)
        self.table = prompts_table(config, config.data, "--data", self.model, run)
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
        self.reward = open_reward(config.reward, timeout=config.reward_timeout, on_error=config.reward_on_error, policy=self.model)
        updates = config.epochs * math.ceil(config.batch_size * config.samples_per_prompt / config.minibatch_size)
        trained = config.steps - config.critic_warmup
        self.learner = backend.place(lambda: Learner(self.model, config, trained * updates))
        self.reference = backend.place(lambda: Reference(self.model, config.reference)) if "reference" in method.needs else None
        self.critic = None
        if "critic" in method.needs:
            self.critic_model = self._load_critic()
            critic_config = _with_rate(config)
            self.critic_learner = backend.place(lambda: Learner(self.critic_model, critic_config, config.steps * updates))
            self.critic = backend.place(lambda: Critic(self.critic_model))
        self.writer = backend.place(lambda: Writer(self.model, config.engine))
        self.method_state: dict[str, float] = {}
        self._unchecked = True  # whether this iteration's first ratio is still to be checked

    def _check(self) -> None:
        c = self.config
        if not c.reward:
            raise UsageError(
                "--reward is missing: give file.py:function, module:function, a reward model's folder or hub id, or gold:TESTBED"
            )
        if c.pretrain_coef and not c.pretrain_data:
            raise UsageError("--pretrain_coef needs --pretrain_data")
        if c.pretrain_data and not c.pretrain_coef:
            raise UsageError("--pretrain_data has no effect while --pretrain_coef is 0")
        if c.critic_warmup >= c.steps:
            raise UsageError(f"--critic_warmup {c.critic_warmup} leaves none of {c.steps} steps for the policy")

    def _load_critic(self) -> RewardModel:
        c = self.config
        source, fresh = c.model, True
        if c.critic_init == "reward":
            if not isinstance(getattr(self.reward, "model", None), RewardModel):
                raise UsageError(f"--critic_init reward needs a reward model, and --reward {c.reward} is not one; use --critic_init policy")
            source, fresh = c.reward, False
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
        rollouts, metrics = self._sample(index)
        self.last_batch = {name: value for name, value in rollouts.to_dict().items() if isinstance(value, Tensor)}
        if not bool(torch.isfinite(rollouts.reward).all()):
            raise NotFinite(f"iteration {index + 1}: a reward is not finite", self.last_batch)
        micro = c.micro_batch_size
        reference = None
        if self.reference is not None:
            reference = self.reference.call(
                "logprobs", rollouts, layout=layout, kinds=1, micro_batch_size=micro, temperature=c.temperature
            ).squeeze(1)
        values = self.critic.call("values", rollouts, micro_batch_size=micro) if self.critic is not None else None
        usable = rollouts.reward_status == REWARD_VALID
        mask = rollouts.action_mask & usable[:, None]
        scored = Scored(mask, rollouts.logprobs, reference, values, rollouts.reward, rollouts.ended, rollouts.group)
        assert self.method.estimate is not None
        estimates: Estimates = self.method.estimate(c, scored, self.method_state)
        self.method_state = dict(estimates.state)
        metrics |= _describe(rollouts, scored) | dict(estimates.metrics)
        self._unchecked = True
        return metrics | self._learn(index, rollouts, scored, estimates)

    def _sample(self, index: int) -> tuple[Rollouts, dict[str, float]]:
        c = self.config
        rows = self.cursor.next()
        prompts: Prompts = self.table.batch(rows).to(self.model.device)  # type: ignore[assignment]
        sampling = Sampling(temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, max_new_tokens=c.max_completion_length)
        rollouts, texts = self.writer.call(
            "write", prompts, sampling=sampling, n=c.samples_per_prompt, seed=derive(c.seed, "sampling", index)
        )
        scores = score(self.reward, self.table, rollouts, texts)
        require_some(scores, self.reward.name)
        value = torch.where(scores.valid, scores.values, 0.0).to(rollouts.reward)
        rollouts.reward = value - c.missing_end_penalty * (~rollouts.ended).to(value)
        rollouts.reward_status = scores.status.to(rollouts.reward_status)
        counts = scores.counts()
        return rollouts, {f"rewards/{name}": float(n) for name, n in counts.items() if name != "valid"}

    def _learn(self, index: int, rollouts: Rollouts, scored: Scored, estimates: Estimates) -> dict[str, float]:
        c = self.config
        totals: dict[str, tuple[float, float]] = {}
        sums = {"loss": 0.0, "loss/critic": 0.0, "loss/pretrain": 0.0}
        update: dict[str, float] = {}
        updates = 0
        n = len(rollouts)
        entries = [scored.mask, scored.logprobs, estimates.advantages]
        entries += [scored.reference] if scored.reference is not None else []
        critic_entries = [scored.mask, scored.values, estimates.returns] if self.critic is not None else []
        for epoch in range(c.epochs):
            order = torch.from_numpy(_shuffled_groups(rollouts.group, numpy_generator(c.seed, "minibatches", index, epoch)))
            for start in range(0, n, c.minibatch_size):
                rows = order[start : start + c.minibatch_size].to(rollouts.group.device)
                part, tokens = rollouts[rows], int(scored.mask[rows].sum())
                if tokens == 0:
                    continue
                counts = Denominators(len(part), tokens)
                if index >= c.critic_warmup:
                    result = self.learner.call(
                        "accumulate", part, *(entry[rows] for entry in entries), losses=self._policy_losses, denominators=counts
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

    def _policy_losses(self, model: Any, part: Rollouts, mask: Tensor, old: Tensor, advantages: Tensor, *reference: Tensor) -> Losses:
        c = self.config
        scores = model.logprobs(layout(part), temperature=c.temperature, support=part.support, want_entropy=True)
        if self._unchecked:
            self._check_first_ratio(scores.logprobs, old, part.action_mask)
        assert scores.entropy is not None
        assert self.method.loss is not None
        view = PolicyView(scores.logprobs, scores.entropy, old, reference[0] if reference else None, advantages, mask)
        return self.method.loss(c, view)

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

    def finish(self, run: Run) -> None:
        self.model.save(run.path / "model")
        if self.critic is not None:
            self.critic_model.save(run.path / "critic")
        self.reward.close()


def _with_rate(config: RolloutsConfig) -> TrainingConfig:
    """The optimiser's options for the critic."""
    return dataclasses.replace(config, learning_rate=config.critic_learning_rate)


def _add(totals: dict[str, tuple[float, float]], more: Mapping[str, tuple[float, float]]) -> None:
    for name, (value, count) in more.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = (before[0] + value, before[1] + count)


def _shuffled_groups(group: Tensor, generator: np.random.Generator) -> np.ndarray:
    """An order of the rows in which groups are shuffled and stay together, so that their prompt is computed once."""
    found, number = np.unique(group.cpu().numpy(), return_inverse=True)
    return np.argsort(generator.permutation(len(found))[number], kind="stable")


def score(reward: Any, table: Table, rollouts: Rollouts, texts: list[str]) -> Any:
    """What the reward says of sampled answers; it sees prompts as given, texts without end tokens, and the data's own columns."""
    rows = rollouts.row.tolist()
    ids = [ids[:length] for ids, length in zip(rollouts.completion_ids.tolist(), rollouts.completion_length.tolist(), strict=True)]
    columns = {name: [values[i] for i in rows] for name, values in table.extra.items()}
    if getattr(reward, "uses_ids", False):  # a reward model that reads the policy's tokens takes the prompts as the policy read them, too
        columns["prompt_ids"] = [
            ids[:length] for ids, length in zip(rollouts.prompt_ids.tolist(), rollouts.prompt_length.tolist(), strict=True)
        ]
    return reward.score([table.prompts[i] for i in rows], texts, ids, columns)


def _describe(rollouts: Rollouts, scored: Scored) -> dict[str, float]:
    """The numbers that users watch, under their usual names."""
    usable = scored.mask.any(1)
    rewards = rollouts.reward[usable]
    mask = scored.mask
    out = {
        "reward": float(rewards.mean()) if len(rewards) else 0.0,
        "reward_std": float(rewards.std(unbiased=False)) if len(rewards) else 0.0,
        "completions/mean_length": float(rollouts.completion_length.float().mean()),
        "completions/clipped_ratio": float((~rollouts.ended).float().mean()),
        "perplexity": float(masked_mean(-scored.logprobs, mask).exp()),
    }
    if scored.reference is not None:
        out["kl"] = float(sequence_kl(scored.logprobs, scored.reference, mask)[usable].mean()) if bool(usable.any()) else 0.0
    return out
