"""DPO (S136): the exact optimum on `bandit`, the gold win rate over its starting policy on `review`, and the reward–KL frontier beside PPO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from telos.algorithms.language import dpo
from telos.catalogue._review import DPO, SMOKE, gold_at, learned_reward, mean_gold, preferences, reach, starting_policy, wins
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.environments.bandit import TabularPolicy, fit, random_bandit, total_variation
from telos.functional.equilibria import kl_optimum

PPO: dict[str, Any] = {
    "batch_size": 32,
    "minibatch_size": 16,
    "epochs": 2,
    "learning_rate": 1e-4,
    "critic_learning_rate": 1e-4,
    "critic_warmup": 1,
    "max_completion_length": 72,
    "keep_checkpoints": 8,
}


def distance_to_optimum(seed: int, beta: float = 0.5) -> float:
    """The largest total variation, over contexts, between DPO's policy and the exact KL-regularised optimum on a random bandit with full coverage."""
    bandit = random_bandit(contexts=4, responses=6, seed=seed, coverage="full", preference="bradley-terry")
    config, pairs = dpo.Config(beta=beta), bandit.exact_pairs()
    policy = TabularPolicy(bandit.reference)

    def loss(log_probs: torch.Tensor) -> torch.Tensor:
        return (dpo.loss(config, bandit.pair_batch(log_probs, pairs)).values * pairs.weight).sum()

    fit(policy, loss, steps=200)
    best = torch.from_numpy(kl_optimum(bandit.reward, bandit.reference, beta))
    return float(total_variation(policy.probs().detach(), best).max())


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    reward = learned_reward(lab, start, pairs, settings)
    every = max(1, settings["steps"] // 4)
    aligned = lab.train(
        "dpo", "dpo", model=start, data=str(pairs), steps=settings["steps"], checkpoint_every=every, keep_checkpoints=8, **DPO
    )
    often = max(1, settings["iterations"] // 4)
    ppo = lab.train(
        "ppo", "ppo-max", model=start, data="review", reward=reward, steps=settings["iterations"], checkpoint_every=often, **PPO
    )
    items = lab.items(settings["held_out"])
    before = lab.assess("start", start, items, reference=start, reward=reward)
    ours = lab.trajectory(aligned, items, reference=start, reward=reward, start=before)
    theirs = lab.trajectory(ppo, items, reference=start, reward=reward, start=before)
    common = min(reach(ours), reach(theirs))
    return {
        "total variation to the optimum": distance_to_optimum(seed % 2**31),
        "gold win rate over SFT": wins(ours[-1][1], before),
        "gold over PPO at equal KL": gold_at(ours, common) - gold_at(theirs, common),
        "gold, SFT": mean_gold(before),
        "gold, DPO": mean_gold(ours[-1][1]),
        "gold, PPO": mean_gold(theirs[-1][1]),
        "KL, DPO": reach(ours),
        "KL, PPO": reach(theirs),
        "KL of the comparison": common,
    }


CLAIM = Claim(
    key="dpo",
    statement="DPO reaches the KL-regularised optimum where it is known, beats the policy it starts from, and its reward–KL frontier is no worse than PPO's",
    baselines=("sft", "ppo-max"),
    facts=(
        Fact("within 0.02 total variation of the exact optimum on `bandit`, full coverage", "total variation to the optimum", "<", 0.02),
        Fact("gold win rate over the fine-tuned policy above one half on `review`", "gold win rate over SFT", ">", 0.5),
        Fact("gold at equal KL not more than 0.02 below PPO's on `review`", "gold over PPO at equal KL", ">", -0.02),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, SMOKE),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "reward_steps": 125, "steps": 120, "iterations": 30, "held_out": 256}),
    },
    notes="A 4.2 M-parameter model and a programmatic judge stand for the paper's 6 B model and GPT-4; PPO learns from a reward model of the same preferences.",
)
