"""PF-PPO (S16): with an inaccurate reward model, R² on the answers that are kept, the strategy that it chooses, and gold beside PPO's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.language.pf_ppo import Strategy, filter_r2
from telos.catalogue._review import mean_gold
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.direct_alignment.dpo import PPO
from telos.catalogue.online_language_rl._online import SMALL, Scene, gap_at_equal_kl, learn, mean_kl, mean_proxy, prepare, trajectory
from telos.core.seeds import derive, numpy_generator

NOISE = 0.25  # share of flipped preferences
ANSWERS, KEPT = 5, 2  # answers to a prompt, and those of them that are learned from
STRATEGIES: tuple[Strategy, ...] = ("best", "best-random", "best-worst")
# 40 answers an iteration are drawn by both; minibatches are so large that both take as many optimiser steps.
PLAIN: dict[str, Any] = {**PPO, "batch_size": 8, "samples_per_prompt": ANSWERS, "minibatch_size": 20}
FILTERED: dict[str, Any] = {**PLAIN, "kept_per_prompt": KEPT, "minibatch_size": 8}


def ranked_answers(scene: Scene, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Learned rewards and gold scores of the start's answers to validation prompts, [P, n] both."""
    lab = scene.lab
    items = lab.testbed.items("validation", prompts, seed=derive(lab.seed, "ranks") % 2**31)
    found = lab.assess("ranks", scene.start, items * ANSWERS, reward=scene.reward)
    rewards, truths = (np.reshape(values, (ANSWERS, prompts)).T for values in (found.proxy, found.gold))
    return rewards, truths


def determination(seed: int, rewards: np.ndarray, truths: np.ndarray) -> dict[str, float]:
    """R² of each strategy; "" stands for as many answers drawn at random, which are the first of each prompt."""
    found = {"": filter_r2(rewards[:, :KEPT], truths[:, :KEPT], KEPT, "best", numpy_generator(seed, "random"))}
    return found | {name: filter_r2(rewards, truths, KEPT, name, numpy_generator(seed, name)) for name in STRATEGIES}


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    scene = prepare(root, seed, settings, watch, NOISE)
    rewards, truths = ranked_answers(scene, settings["held_out"])
    # The strategy is chosen on one half of the prompts and judged on the other.
    first, second = determination(seed, rewards[::2], truths[::2]), determination(seed, rewards[1::2], truths[1::2])
    chosen = max(STRATEGIES, key=first.__getitem__)
    ours = trajectory(scene, learn(scene, "pf-ppo", "pf-ppo", settings, strategy=chosen, **FILTERED))
    theirs = trajectory(scene, learn(scene, "ppo", "ppo-max", settings, **PLAIN))
    return {
        "R² gained by the chosen strategy": second[chosen] - second[""],
        "gold over PPO": mean_gold(ours[-1][1]) - mean_gold(theirs[-1][1]),
        "gold over PPO at equal KL": gap_at_equal_kl(ours, theirs, mean_gold),
        "R², all answers": second[""],
        **{f"R², {name}": second[name] for name in STRATEGIES},
        "number of the chosen strategy (0 best, 1 best-random, 2 best-worst)": float(STRATEGIES.index(chosen)),
        "accuracy of the learned reward on the start's answers": ordered_right(rewards, truths),
        "gold, SFT": mean_gold(scene.before),
        "gold, PF-PPO": mean_gold(ours[-1][1]),
        "gold, PPO": mean_gold(theirs[-1][1]),
        "learned reward, PF-PPO": mean_proxy(ours[-1][1]),
        "learned reward, PPO": mean_proxy(theirs[-1][1]),
        "KL, PF-PPO": mean_kl(ours[-1][1]),
        "KL, PPO": mean_kl(theirs[-1][1]),
    }


def ordered_right(rewards: np.ndarray, truths: np.ndarray) -> float:
    """Share of the pairs of answers to one prompt, of different gold, that the rewards put in the right order."""
    better = truths[:, :, None] > truths[:, None, :]
    return float((rewards[:, :, None] > rewards[:, None, :])[better].mean())


CLAIM = Claim(
    key="pf-ppo",
    statement="On the answers that PF-PPO keeps an inaccurate reward model explains more of the truth, and it reaches a higher gold score than PPO",
    baselines=("ppo-max",),
    facts=(
        Fact(
            "R² of rewards and gold is higher on the answers that the chosen strategy keeps than on as many at random",
            "R² gained by the chosen strategy",
            ">",
            0.0,
        ),
        Fact("gold above PPO's after as many answers were drawn on `review`", "gold over PPO", ">", 0.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMALL, "small": {**SMALL["small"], "batch_size": 2}}),
        "full": Budget(3, {"sft_steps": 60, "pairs": 800, "reward_steps": 75, "iterations": 30, "held_out": 256}),
    },
    notes="The reward is learned from 800 preferences of which a quarter were flipped. The strategy of the higher R² is chosen by gold scores of the start's "
    "answers to validation prompts, as the paper chooses it by true scores, and R² is measured on other ones; training sees the learned reward alone. R² is of "
    "the means of ten groups of neighbouring rewards.",
)
