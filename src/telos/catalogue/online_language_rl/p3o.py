"""P3O (S3): updates equal bit for bit when a prompt's rewards are shifted, where PPO's are not; and the reward–KL frontier beside PPO's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from telos.algorithms.language import p3o, ppo_max
from telos.catalogue._review import mean_gold, reach
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.catalogue.online_language_rl._online import (
    SMALL,
    SPREAD,
    gap_at_equal_kl,
    learn,
    logit_gradient,
    mean_kl,
    mean_proxy,
    one_token,
    ppo_baseline,
    prepare,
    trajectory,
)
from telos.core.run import Run
from telos.core.seeds import derive, numpy_generator, torch_generator
from telos.environments.bandit import random_bandit

# As many answers and optimiser steps an iteration as PPO has. PPO's penalty counts in deviations of the score, P3O's in the score's own unit.
P3O: dict[str, Any] = {
    "batch_size": 16,
    "samples_per_prompt": 2,
    "minibatch_size": 16,
    "epochs": 2,
    "learning_rate": 1e-4,
    "kl_coef": round(0.05 * SPREAD, 3),
    "max_completion_length": 72,
}
SHORT: dict[str, Any] = {
    "batch_size": 8,
    "minibatch_size": 8,
    "epochs": 2,
    "learning_rate": 1e-4,
    "kl_coef": 0.05,
    "max_completion_length": 48,
    "checkpoint_every": 0,
}
REWARDS = "telos.catalogue.online_language_rl._rewards"


def equal_gradients(seed: int, batches: int = 40, contexts: int = 4, responses: int = 6) -> dict[str, float]:
    """Shares of batches of answers on `bandit` whose gradient is the same bit for bit after each prompt's rewards are shifted, of P3O and of PPO.

    Rewards are multiples of 1/256 and shifts whole numbers, so that float32 adds them exactly. The policy that learns has already moved away from
    the one that wrote the answers, so that ratios and bounds take part; every second batch has the joint bound."""
    ours = theirs = 0
    for index in range(batches):
        generator = numpy_generator(seed, "batch", index)
        bandit = random_bandit(contexts, responses, derive(seed, "bandit", index) % 2**31)
        assert bandit.reward is not None
        answers = 2 + index % 3
        context = torch.arange(contexts).repeat_interleave(answers)
        drawn = torch.multinomial(
            bandit.reference, answers, generator=torch_generator(seed, "answers", index)
        ).flatten()  # without replacement
        exact = ((bandit.reward[context, drawn] * 256).round() / 256).float()
        shift = torch.from_numpy(generator.integers(-64, 65, contexts)).float()[context]
        moved = bandit.reference.log() + 0.2 * torch.from_numpy(generator.normal(size=(contexts, responses)))
        bound: Literal["joint", "separate"] = "joint" if index % 2 else "separate"
        configs = ((p3o, p3o.Config(samples_per_prompt=answers, clip=bound)), (ppo_max, ppo_max.Config(clip_range_vf=0.0)))
        same = []
        for method, config in configs:
            found = [
                logit_gradient(method, config, one_token(bandit, bandit.reference, context, drawn, scores), moved, context, drawn)
                for scores in (exact, exact + shift)
            ]
            same.append(torch.equal(*found) and bool(found[0].any()))
        ours, theirs = ours + same[0], theirs + same[1]
    return {"share of equal gradients, P3O": ours / batches, "share of equal gradients, PPO": theirs / batches}


def share_of_equal_weights(one: Run, other: Run) -> float:
    """Of all numbers in the two runs' models."""
    mine, theirs = (load_file(run.path / "model" / "model.safetensors") for run in (one, other))
    equal = sum(int((mine[name] == theirs[name]).sum()) for name in mine)
    return equal / sum(value.numel() for value in mine.values())


def equal_runs(lab: Lab, start: str, settings: Mapping[str, Any]) -> dict[str, float]:
    """Shares of weights that are the same after training with a reward and with its prompt-wise shifted version, of P3O and of PPO."""
    figures = {}
    methods: dict[str, dict[str, Any]] = {"p3o": {"samples_per_prompt": 4}, "ppo-max": {"samples_per_prompt": 4, "critic_init": "policy"}}
    for method, options in methods.items():
        runs = [
            lab.train(
                f"{method}-{name}",
                method,
                model=start,
                data="review",
                reward=[f"{REWARDS}:{name}"],
                **{**SHORT, **options, **settings.get("small", {}), "steps": settings["short"]},
            )
            for name in ("plain", "shifted")
        ]
        figures[f"share of equal weights, {'P3O' if method == 'p3o' else 'PPO'}"] = share_of_equal_weights(*runs)
    return figures


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    scene = prepare(root, seed, settings, watch)
    figures = equal_gradients(seed) | equal_runs(scene.lab, scene.start, settings)
    ours = trajectory(scene, learn(scene, "p3o", "p3o", settings, **P3O))
    theirs = ppo_baseline(scene, settings)
    return figures | {
        "gold over PPO at equal KL": gap_at_equal_kl(ours, theirs, mean_gold),
        "learned reward over PPO at equal KL": gap_at_equal_kl(ours, theirs, mean_proxy),
        "KL up to which they are compared": min(reach(ours), reach(theirs)),
        "gold, SFT": mean_gold(scene.before),
        "gold, P3O": mean_gold(ours[-1][1]),
        "gold, PPO": mean_gold(theirs[-1][1]),
        "learned reward, SFT": mean_proxy(scene.before),
        "learned reward, P3O": mean_proxy(ours[-1][1]),
        "learned reward, PPO": mean_proxy(theirs[-1][1]),
        "KL, P3O": mean_kl(ours[-1][1]),
        "KL, PPO": mean_kl(theirs[-1][1]),
        "tokens, P3O": float(np.mean(ours[-1][1].length)),
        "tokens, PPO": float(np.mean(theirs[-1][1].length)),
    }


CLAIM = Claim(
    key="p3o",
    statement="P3O's updates do not change by a bit when a prompt's rewards are shifted, and its reward–KL frontier is better than PPO's",
    baselines=("ppo-max",),
    facts=(
        Fact(
            "every gradient on `bandit` is the same bit for bit after shifts of each prompt's rewards",
            "share of equal gradients, P3O",
            ">",
            0.9999,
        ),
        Fact("PPO's gradient on the same batches is not, in more than half of them", "share of equal gradients, PPO", "<", 0.5),
        Fact(
            "every weight is the same bit for bit after runs on `review` with a reward and its shifted version",
            "share of equal weights, P3O",
            ">",
            1 - 1e-9,
        ),
        Fact("more than half of PPO's weights are not", "share of equal weights, PPO", "<", 0.5),
        Fact("gold at equal KL above PPO's on `review`, averaged over the KLs that both reach", "gold over PPO at equal KL", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMALL, "short": 1}),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "reward_steps": 125, "iterations": 30, "short": 6, "held_out": 256}),
    },
    notes="Rewards of the invariance are multiples of 1/256 and shifts whole numbers up to 64, which float32 adds exactly; a shift that it must round leaves "
    "rounding errors. The frontier is that of one run's checkpoints against a learned reward, with as many answers and optimiser steps as PPO.",
)
