"""ReMax (S25): memory and time beside PPO's with a critic, and the variance of its gradient beside REINFORCE's, exactly on `bandit`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from telos.algorithms import run as runs
from telos.algorithms.language import reinforce, remax
from telos.catalogue._review import mean_gold
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.online_language_rl._online import (
    SMALL,
    SPREAD,
    Scene,
    final,
    learn,
    losses_of,
    mean_kl,
    mean_proxy,
    one_token,
    prepare,
)
from telos.core import config as configs
from telos.core import discovery
from telos.core.errors import Failure
from telos.core.run import Run
from telos.core.seeds import derive
from telos.environments.bandit import Bandit, random_bandit
from telos.models.language import resolve

REMAX: dict[str, Any] = {
    "batch_size": 32,
    "minibatch_size": 16,
    "learning_rate": 1e-4,
    "kl_coef": round(0.05 * SPREAD, 3),
    "max_completion_length": 72,
    "checkpoint_every": 0,
}
# What both are given when they are measured: one pass over the answers, the paper's number for both.
ALIKE: dict[str, Any] = {"batch_size": 32, "minibatch_size": 16, "epochs": 1, "max_completion_length": 72, "kl_coef": 0.05}
# Few short answers and nothing but what is trained, so that the peak is weights, gradients and the optimiser's moments, as it is with models of real size.
BARE: dict[str, Any] = {
    "batch_size": 4,
    "minibatch_size": 4,
    "micro_batch_size": 1,
    "epochs": 1,
    "max_completion_length": 8,
    "kl_coef": 0.0,
}
_REWARD = "telos.catalogue.online_language_rl._rewards:plain"
_PEAK = """
import json, sys
from telos.algorithms import run as runs
from telos.core import config, discovery
from telos.core.run import Run

method = discovery.load(sys.argv[1])
for options in map(json.loads, sys.argv[2:]):
    options = config.from_mapping(method.config, options)
    runs.prepare(options)
    program = runs.build(method, options, Run.create(method.key, options))
    for index in range(2):
        program.step(index)
    program.reward.close()
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


# Memory -----------------------------------------------------------------------------------------------------------------------------------------------


def wide_model(folder: Path, layers: int, width: int) -> int:
    """Writes a random model of the bundled one's kind and tokenizer; returns the bytes of its weights in float32."""
    source = resolve("tinylm")
    config = AutoConfig.from_pretrained(source)
    config.update(
        {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 11 * width // 4, "num_attention_heads": width // 64}
    )
    config.update({"num_key_value_heads": width // 64, "dtype": "float32"})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return 4 * sum(p.numel() for p in model.parameters())


def peak_memory_mib(method: str, *options: Mapping[str, Any]) -> list[float]:
    """Peak resident memory in MiB (the kernel's high-water mark) of a process of its own that takes two iterations with each of the options in turn."""
    command = [sys.executable, "-c", _PEAK, method, *(json.dumps(dict(each)) for each in options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"measuring the memory of {method} failed: {done.stderr.strip().splitlines()[-1:]}")
    return [float(number) / 1024 for number in done.stdout.split()[-len(options) :]]


def memory(settings: Mapping[str, Any]) -> dict[str, float]:
    """Peaks of training a model of tens of millions of random weights. The reward is a function in another process, as the authors spread the reward model
    and the reference over other devices. What the process needs for a model of one narrow layer, libraries above all, is taken off."""
    runs.prepare_threads()
    folder = Path(tempfile.mkdtemp())
    found: dict[str, list[float]] = {}
    try:
        wide_model(folder / "narrow", 1, 64)
        weights = wide_model(folder / "wide", settings["layers"], settings["width"]) / 2**20
        for method, own in (("remax", {}), ("ppo-max", {"critic_init": "policy"})):
            common = {**BARE, "data": "review", "reward": [_REWARD], "steps": 2, "seed": 0, **own}
            options = [{**common, "model": str(folder / size), "out": str(folder / f"{method}-{size}")} for size in ("narrow", "wide")]
            found[method] = peak_memory_mib(method, *options)
    finally:
        shutil.rmtree(folder)
    grown = {method: wide - narrow for method, (narrow, wide) in found.items()}
    return {
        "peak memory over PPO's": grown["remax"] / max(grown["ppo-max"], 1e-3),
        "peak memory over PPO's, whole process": found["remax"][1] / found["ppo-max"][1],
        "peak memory, ReMax [MiB]": grown["remax"],
        "peak memory, PPO [MiB]": grown["ppo-max"],
        "weights of the model measured [MiB]": weights,
        # In units of the weights: a model that learns has its gradient and Adam's two moments beside it.
        "states over PPO's, what is trained": 4 / 8,
        "states over PPO's, gradients never both at once": 4 / 7,
        "states over PPO's, with reference and reward model": 6 / 10,
    }


# Time -------------------------------------------------------------------------------------------------------------------------------------------------


def seconds_an_iteration(scene: Scene, settings: Mapping[str, Any]) -> dict[str, float]:
    """Processor seconds of an iteration of each, in turns in this process; medians, without the first. The learning rates are 0, so that both write
    and score the same answers in every iteration."""
    folder = Path(tempfile.mkdtemp())
    common = {"model": scene.start, "data": "review", "reward": [scene.reward], "learning_rate": 0.0, "seed": scene.lab.seed}
    common |= {**ALIKE, "steps": settings["timed"], **settings.get("small", {})}
    try:
        programs = {}
        for key, own in (("remax", {}), ("ppo-max", {"critic_learning_rate": 0.0})):
            method = discovery.load(key)
            config: Any = configs.from_mapping(method.config, {**common, **own, "out": str(folder / key)})
            runs.prepare(config)
            programs[key] = runs.build(method, config, Run.create(key, config))
        times: dict[str, list[float]] = {key: [] for key in programs}
        for index in range(settings["timed"]):
            for key, program in programs.items():
                began = time.process_time()
                program.step(index)
                times[key].append(time.process_time() - began)
    finally:
        shutil.rmtree(folder)
    ours, theirs = (float(np.median(values[1:])) for values in times.values())
    return {
        "time of an iteration over PPO's": ours / theirs,
        "processor seconds an iteration, ReMax": ours,
        "processor seconds an iteration, PPO": theirs,
    }


# Variance ---------------------------------------------------------------------------------------------------------------------------------------------


def gradient_variance(method: Any, config: Any, bandit: Bandit, policy: Tensor) -> float:
    """The trace of the covariance of one answer's gradient in the logits, given its context, mean over contexts. Every answer is enumerated."""
    contexts, responses = policy.shape
    context = torch.arange(contexts).repeat_interleave(responses)
    drawn = torch.arange(responses).repeat(contexts)
    logits = policy.log().requires_grad_()
    logprobs = logits.log_softmax(-1)[context, drawn][:, None]
    losses = losses_of(method, config, one_token(bandit, policy, context, drawn), logprobs)
    each = torch.autograd.grad(losses, logits, torch.eye(len(losses), dtype=losses.dtype), is_grads_batched=True)[0].flatten(1)
    weight = policy[context, drawn][:, None]
    mean = (weight * each).view(contexts, responses, -1).sum(1)
    return float(((weight * each**2).sum() - (mean**2).sum()) / contexts)


def variances(seed: int, bandits: int = 60) -> dict[str, float]:
    """ReMax's variance over REINFORCE's: of rewards from 0 to 1, at the start and on the way to the best answers; and of rewards of mean 0.

    The policies are the reference tilted by exp(t r), t = 0, 4 and 8. Each bandit's mean over its policies counts once."""
    bare = reinforce.Config(baseline="none", kl_coef=0.0)
    mean = reinforce.Config(baseline="mean", kl_coef=0.0)
    ours = remax.Config(kl_coef=0.0)

    def measured(index: int, centred: bool) -> list[float]:
        drawn = random_bandit(4, 6, derive(seed, "bandit", index) % 2**31)
        assert drawn.reward is not None
        reward = drawn.reward if centred else torch.sigmoid(drawn.reward)
        bandit = dataclasses.replace(drawn, reward=reward)
        policies = [torch.softmax(drawn.reference.log() + tilt * torch.sigmoid(drawn.reward), -1) for tilt in (0, 4, 8)]
        return [
            sum(gradient_variance(*pair, bandit, policy) for policy in policies)
            for pair in ((remax, ours), (reinforce, bare), (reinforce, mean))
        ]

    positive = np.array([measured(index, False) for index in range(bandits)])
    centred = np.array([measured(index, True) for index in range(bandits)])
    return {
        "variance over REINFORCE's": float(positive[:, 0].sum() / positive[:, 1].sum()),
        "share of bandits with a lower variance": float(np.mean(positive[:, 0] < positive[:, 1])),
        "variance over that of REINFORCE with a mean baseline": float(positive[:, 0].sum() / positive[:, 2].sum()),
        "variance over REINFORCE's, rewards of mean 0": float(centred[:, 0].sum() / centred[:, 1].sum()),
    }


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    scene = prepare(root, seed, settings, watch)
    figures = variances(seed, settings["bandits"]) | memory(settings) | seconds_an_iteration(scene, settings)
    found = final(scene, learn(scene, "remax", "remax", settings, **REMAX))
    return figures | {
        "gold over SFT": mean_gold(found) - mean_gold(scene.before),
        "gold, SFT": mean_gold(scene.before),
        "gold, ReMax": mean_gold(found),
        "learned reward, SFT": mean_proxy(scene.before),
        "learned reward, ReMax": mean_proxy(found),
        "KL, ReMax": mean_kl(found),
    }


CLAIM = Claim(
    key="remax",
    statement="ReMax learns without a critic, in at most 55 % of PPO's memory and less time an iteration, with a lower variance than REINFORCE",
    baselines=("ppo-max", "reinforce --baseline none"),
    facts=(
        Fact("peak memory of training at most 55 % of PPO's", "peak memory over PPO's", "<", 0.55),
        Fact("processor time of an iteration below PPO's on the same answers", "time of an iteration over PPO's", "<", 1.0),
        Fact("variance of the gradient below REINFORCE's on `bandit`, rewards from 0 to 1", "variance over REINFORCE's", "<", 1.0),
        Fact("gold above the fine-tuned policy's on `review`", "gold over SFT", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMALL, "bandits": 2, "layers": 2, "width": 128, "timed": 2}),
        "full": Budget(
            3,
            {
                "sft_steps": 60,
                "pairs": 2000,
                "reward_steps": 125,
                "iterations": 30,
                "held_out": 256,
                "bandits": 60,
                "layers": 8,
                "width": 512,
                "timed": 7,
            },
        ),
    },
    notes="Memory is measured on a random model of 28 M parameters with few short answers, without a reference and with the reward in another "
    "process: what is trained. The same in units of the weights stands beside it; PPO here frees the policy's gradient before the critic's is made, "
    "so that its peak is 7 of them and not 8. Time is measured on the 4.2 M-parameter model, with the reference and the reward model in the process "
    "and one pass over 32 answers of at most 72 tokens, on a CPU. With rewards of mean 0 REINFORCE needs no baseline at the start, which a figure "
    "shows.",
)
