"""What recipes on `review` share: the starting policy, its preferences, a learned reward, and held-out prompts.

The starting policy is `tinylm` fine-tuned on the testbed's own mixed texts: as people write, not as the judge would like. Preferences
compare two of its answers. What recipes make alike from the same seed (the start, the pairs, the learned reward, the DPO baseline) is made once and shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.language.assess import Assessment
from telos.catalogue.lab import Lab, Labelling, commons
from telos.catalogue.lab import named as _named
from telos.core.run import Run
from telos.core.seeds import derive
from telos.environments.text.base import Item, Split

# Chosen on tuning seeds, once, for all recipes on this testbed.
SFT = {"steps": 60, "batch_size": 16, "learning_rate": 3e-4, "lr_schedule": "linear", "checkpoint_every": 0}
REWARD = {"steps": 150, "batch_size": 16, "learning_rate": 1e-3, "checkpoint_every": 0}
DPO: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-4, "beta": 0.1, "lr_schedule": "linear"}
SMOKE: Mapping[str, Any] = {"sft_steps": 4, "pairs": 32, "reward_steps": 4, "steps": 4, "iterations": 2, "held_out": 16}


def starting_policy(lab: Lab, settings: Mapping[str, Any]) -> str:
    """The folder of the fine-tuned policy."""
    lab = commons(lab)

    def rows() -> list[dict[str, Any]]:
        texts = lab.testbed.corpus(2000, derive(lab.seed, "demonstrations") % 2**31)
        return [dict(zip(("prompt", "completion"), _split(text), strict=True)) for text in texts]

    data = lab.file("demonstrations.jsonl", rows)
    options = {**SFT, "steps": settings["sft_steps"]}
    run = lab.train(_named("sft", **options), "sft", model="tinylm", data=str(data), **options)
    return str(run.path / "model")


def _split(document: str) -> tuple[str, str]:
    prompt, mark, reply = document.partition("Reply:")
    return prompt + mark, reply


def preferences(lab: Lab, policy: str, settings: Mapping[str, Any], noise: float = 0.0, split: Split = "train") -> Path:
    """Pairs of the policy's own answers, labelled by the judge; a fifth as many where they are held out."""
    count = settings["pairs"] if split == "train" else settings["pairs"] // 5
    labelling = Labelling(pairs=count, noise=noise)
    return commons(lab).pairs(_named("pairs", policy=policy, labelling=labelling, split=split), policy, labelling, split)


def learned_reward(lab: Lab, policy: str, pairs: Path, settings: Mapping[str, Any]) -> str:
    """The folder of a reward model that starts from the policy."""
    options = {**REWARD, "steps": settings["reward_steps"], "model": policy, "data": str(pairs)}
    return str(commons(lab).train(_named("reward-model", **options), "reward-model", **options).path / "model")


def dpo_baseline(lab: Lab, policy: str, pairs: Path, settings: Mapping[str, Any]) -> Run:
    """DPO from the same start on the same pairs, with the settings of its own recipe."""
    options = {**DPO, "model": policy, "data": str(pairs), "steps": settings["steps"], "checkpoint_every": 0, "keep_checkpoints": 1}
    return commons(lab).train(_named("dpo", **options), "dpo", **options)


def measure_common(lab: Lab, model: str | Run, start: str, items: Sequence[Item], reward: str | None = None) -> Assessment:
    """Answers of a policy that several recipes share, with their divergence from the start."""
    place = str(model.path) if isinstance(model, Run) else model
    name = _named("assessment", model=place, start=start, reward=reward, prompts=[item.prompt for item in items])
    return commons(lab).assess(name, model, items, reference=start, reward=reward)


def mean_gold(found: Assessment) -> float:
    return float(np.mean(found.gold))


def wins(ours: Assessment, theirs: Assessment) -> float:
    """Share of prompts on which ours has the higher gold score; equal scores count one half."""
    a, b = np.asarray(ours.gold), np.asarray(theirs.gold)
    return float(np.mean((a > b) + 0.5 * (a == b)))


def gold_at(trajectory: list[tuple[int, Assessment]], kl: float) -> float:
    """Mean gold where a trajectory's mean KL first reaches `kl` nats, interpolated linearly between checkpoints in order of KL."""
    points = sorted((float(np.mean(found.kl)), mean_gold(found)) for _, found in trajectory)
    return float(np.interp(kl, [x for x, _ in points], [y for _, y in points]))


def reach(trajectory: list[tuple[int, Assessment]]) -> float:
    """The largest mean KL of a trajectory."""
    return max(float(np.mean(found.kl)) for _, found in trajectory)
