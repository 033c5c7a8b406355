"""PPO-max (S120): every stabiliser switched off in turn, and a setting in which plain PPO collapses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telos.catalogue._review import SMOKE, learned_reward, mean_gold, preferences, starting_policy
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab

# A hard setting: a reward model of noisy labels and large steps.
HARD: dict[str, Any] = {
    "batch_size": 32,
    "minibatch_size": 8,
    "epochs": 4,
    "learning_rate": 5e-4,
    "critic_learning_rate": 5e-4,
    "max_completion_length": 72,
    "checkpoint_every": 0,
}
MAX: dict[str, Any] = {"kl_coef": 0.1, "critic_warmup": 1}
ABLATIONS: Mapping[str, dict[str, Any]] = {
    "vanilla": {"preset": "vanilla", "critic_init": "policy"},
    "without KL penalty": {**MAX, "kl_coef": 0.0},
    "without reward normalisation": {**MAX, "normalize_reward": False},
    "without advantage normalisation": {**MAX, "normalize_advantage": False},
    "without value clipping": {**MAX, "clip_range_vf": 0.0},
    "without critic pre-training": {"kl_coef": 0.1, "critic_warmup": 0, "critic_init": "policy"},
}


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings, noise=0.2)
    reward = learned_reward(lab, start, pairs, settings)
    items = lab.items(settings["held_out"])
    before = lab.assess("start", start, items, reference=start, reward=reward)
    figures = {"gold, SFT": mean_gold(before)}
    for name, options in {"PPO-max": MAX, **ABLATIONS}.items():
        stage = name.replace(" ", "-").lower()
        run = lab.train(stage, "ppo-max", model=start, data="review", reward=reward, steps=settings["iterations"], **HARD, **options)
        found = lab.assess(stage, run, items, reference=start, reward=reward)
        last = run.metrics()[-1]
        figures |= {
            f"gold, {name}": mean_gold(found),
            f"proxy, {name}": sum(found.proxy) / len(found.proxy),
            f"KL, {name}": sum(found.kl) / len(found.kl),
            f"entropy, {name}": last["entropy"],
            f"perplexity, {name}": last["perplexity"],
            f"tokens, {name}": sum(found.length) / len(found.length),
        }
    figures["gold change, PPO-max"] = figures["gold, PPO-max"] - figures["gold, SFT"]
    figures["gold change, vanilla"] = figures["gold, vanilla"] - figures["gold, SFT"]
    return figures


CLAIM = Claim(
    key="ppo-max",
    statement="PPO-max improves and does not collapse in a setting where vanilla PPO does",
    baselines=("ppo-max --preset vanilla", "each stabiliser switched off"),
    facts=(
        Fact("PPO-max does not fall below its starting policy", "gold change, PPO-max", ">", 0.0),
        Fact("vanilla PPO falls below its starting policy by more than 0.05 gold", "gold change, vanilla", "<", -0.05),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, SMOKE),
        "full": Budget(3, {"sft_steps": 60, "pairs": 1600, "reward_steps": 100, "iterations": 16, "held_out": 256}),
    },
    notes="Monitors (KL, entropy, perplexity, length) of every ablation are among the figures.",
)
