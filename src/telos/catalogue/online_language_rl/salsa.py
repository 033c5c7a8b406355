"""SALSA (S53): PPO that is held near the mean of three fine-tuned models goes further and higher than near one; and soups serve other methods alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from telos.catalogue._review import SFT, mean_gold, measure_common
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.direct_alignment.dpo import PPO
from telos.catalogue.lab import commons
from telos.catalogue.online_language_rl._online import SMALL, Scene, final, learn, mean_kl, mean_proxy, prepare
from telos.core.run import Run
from telos.core.seeds import derive
from telos.models.language import LanguageModel

# A penalty that holds the policy back, so that it matters from where it is counted.
SALSA: dict[str, Any] = {**PPO, "kl_coef": 0.3, "checkpoint_every": 0}
OTHERS: Mapping[str, dict[str, Any]] = {
    "dpo": {"batch_size": 4, "eval_prompts": 0},
    "kto": {"batch_size": 4, "eval_prompts": 0},
    "grpo": {"batch_size": 2, "samples_per_prompt": 2, "minibatch_size": 4, "max_completion_length": 16, "kl_coef": 0.05},
}


def fine_tuned(scene: Scene, settings: Mapping[str, Any], count: int = 2) -> list[str]:
    """Folders of further models fine-tuned as the start was, on the same texts in another order."""
    data = commons(scene.lab).folder("demonstrations.jsonl")
    found = []
    for index in range(count):
        options = {**SFT, "steps": settings["sft_steps"], "seed": derive(scene.lab.seed, "soup", index) % 2**31}
        found.append(str(scene.lab.train(f"sft-{index + 2}", "sft", model="tinylm", data=str(data), **options).path / "model"))
    return found


def mean_of(folders: list[str], place: Path) -> str:
    """Writes a model whose weights are the mean of the others', worked out in float64."""
    if not (place / "config.json").exists():
        model = LanguageModel.load(folders[0])
        weights = [load_file(Path(folder) / "model.safetensors") for folder in folders]
        with torch.no_grad():
            for name, parameter in model.model.named_parameters():
                parameter.copy_(torch.stack([each[name].double() for each in weights]).mean(0))
        model.save(place)
    return str(place)


def difference(one: Run, other: Run) -> float:
    """The mean over all weights."""
    mine, theirs = (load_file(run.path / "model" / "model.safetensors") for run in (one, other))
    return sum(float((mine[name] - theirs[name]).abs().sum()) for name in mine) / sum(value.numel() for value in mine.values())


def served_alike(scene: Scene, soup: str, mean: str) -> dict[str, float]:
    """Two steps of methods of other loops with the soup, with the mean of its weights as a folder, and with the start as reference: how far their
    weights are apart in the end, over how far the first are from the last."""
    figures = {}
    for method, options in OTHERS.items():
        data: dict[str, Any] = {"data": "review", "reward": [scene.reward]} if method == "grpo" else {"data": str(scene.pairs)}
        runs = [
            scene.lab.train(
                f"{method}-{name}",
                method,
                model=scene.start,
                reference=reference,
                steps=2,
                learning_rate=1e-5,
                lr_schedule="constant",
                checkpoint_every=0,
                **data,
                **options,
            )
            for name, reference in (("soup", soup), ("mean", mean), ("start", scene.start))
        ]
        figures[method] = difference(runs[0], runs[1]) / max(difference(runs[0], runs[2]), 1e-12)
    return figures


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    scene = prepare(root, seed, settings, watch)
    others = fine_tuned(scene, settings)
    soup = "soup:" + ",".join([scene.start, *others])
    mean = mean_of([scene.start, *others], scene.lab.folder("mean"))
    cooked = measure_common(scene.lab, mean, scene.start, scene.items, scene.reward)
    ours = final(scene, learn(scene, "salsa", "salsa", settings, reference=soup, **SALSA))
    theirs = final(scene, learn(scene, "ppo", "ppo-max", settings, **SALSA))
    served = served_alike(scene, soup, mean)
    return {
        "KL over PPO's": mean_kl(ours) - mean_kl(theirs),
        "learned reward over PPO's": mean_proxy(ours) - mean_proxy(theirs),
        "gold over PPO's": mean_gold(ours) - mean_gold(theirs),
        "soup from mean of weights, worst of DPO, KTO and GRPO": max(served.values()),
        **{f"soup from mean of weights, {name}": value for name, value in served.items()},
        "gold, SFT": mean_gold(scene.before),
        "gold, soup": mean_gold(cooked),
        "gold, SALSA": mean_gold(ours),
        "gold, PPO": mean_gold(theirs),
        "learned reward, SFT": mean_proxy(scene.before),
        "learned reward, soup": mean_proxy(cooked),
        "learned reward, SALSA": mean_proxy(ours),
        "learned reward, PPO": mean_proxy(theirs),
        "KL, soup": mean_kl(cooked),
        "KL, SALSA": mean_kl(ours),
        "KL, PPO": mean_kl(theirs),
        "tokens, SALSA": float(np.mean(ours.length)),
        "tokens, PPO": float(np.mean(theirs.length)),
    }


CLAIM = Claim(
    key="salsa",
    statement="With the mean of fine-tuned models as its reference PPO goes further from its start and to a higher reward than with one of them, and "
    "such a soup serves other methods alike",
    baselines=("ppo-max",),
    facts=(
        Fact(
            "KL from the start above that of PPO with one reference, at the same weight of the penalty, on `review`",
            "KL over PPO's",
            ">",
            0.0,
        ),
        Fact("learned reward above that of PPO with one reference", "learned reward over PPO's", ">", 0.0),
        Fact("gold above that of PPO with one reference", "gold over PPO's", ">", 0.0),
        Fact(
            "DPO, KTO and GRPO learn the same from a soup as from a model of its mean weights, to a thousandth of what the reference changes",
            "soup from mean of weights, worst of DPO, KTO and GRPO",
            "<",
            1e-3,
        ),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, SMALL),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "reward_steps": 125, "iterations": 30, "held_out": 256}),
    },
    notes="The three models differ in the order of the same 2,000 texts, of which each saw 960. KL is measured from the start, from which both "
    "policies set out.",
)
