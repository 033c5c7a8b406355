"""`telos quickstart`: the whole path on real text, in minutes on a laptop.

The bundled `tinylm` learns to summarise functions of Python's standard library (SFT on human docstrings), a reward model learns from noisy preferences between
its answers, and two methods align it: DPO on the same preferences and PPO against the learned reward. The report says what a hidden gold judge
makes of both, and whether the learned reward was over-optimised. Every stage survives a kill: the same command, or `telos resume`, continues it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.language.assess import Assessment
from telos.catalogue.lab import Lab, Labelling, Watch
from telos.core.errors import UsageError
from telos.core.run import commit, hardware, versions, write_atomically
from telos.environments.text.base import Item
from telos.evaluation import plots
from telos.evaluation.over_optimisation import Checkpoint, OverOptimisation, judge
from telos.evaluation.report import Completion, Report, Sample
from telos.evaluation.statistics import Interval, bootstrap_interval, win_rate

SFT: dict[str, Any] = {
    "steps": 160,
    "batch_size": 16,
    "learning_rate": 5e-4,
    "warmup_steps": 10,
    "max_completion_length": 44,
    "max_prompt_length": 160,
}
PAIRS = Labelling(pairs=900, label_temperature=0.05, noise=0.1)
REWARD: dict[str, Any] = {"steps": 90, "batch_size": 16, "learning_rate": 2e-4}
DPO: dict[str, Any] = {"steps": 90, "batch_size": 16, "learning_rate": 1e-4, "beta": 0.1, "checkpoint_every": 30, "keep_checkpoints": 4}
PPO: dict[str, Any] = {
    "steps": 36,
    "batch_size": 24,
    "minibatch_size": 12,
    "epochs": 2,
    "learning_rate": 1e-4,
    "critic_learning_rate": 1e-4,
    "critic_warmup": 1,
    "kl_coef": 0.02,
    "max_completion_length": 44,
    "max_prompt_length": 160,
    "checkpoint_every": 9,
    "keep_checkpoints": 5,
}
HELD_OUT = 200  # functions of modules that no stage has seen


@dataclass(frozen=True)
class Outcome:
    """Where the report is, and its verdicts in a sentence each."""

    report: Path
    markdown: Path
    sentences: tuple[str, ...]


def run(out: Path, *, seed: int = 0, fresh: bool = False, watch: Watch | None = None) -> Outcome:
    """Does the whole job in folder `out`, or what is left of it. `fresh` starts a new one beside a finished or unfinished one.

    Raises `UsageError` when the folder holds something else, or was started with another seed.
    """
    out = _new_name(out) if fresh and (out / "quickstart.json").exists() else out
    record = out / "quickstart.json"
    if record.exists():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before["seed"] != seed:
            raise UsageError(f"{out} was started with --seed {before['seed']}; give that seed, another --out, or --fresh")
    elif out.exists() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty and holds no quickstart; give another --out")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(record, json.dumps({"seed": seed, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}))
    return _work(Lab(out, "docstrings", seed, watch))


def resume(path: Path, *, watch: Watch | None = None) -> Outcome:
    """Continues the quickstart in `path`. Raises `UsageError` when there is none."""
    record = path / "quickstart.json"
    if not record.exists():
        raise UsageError(f"{path} holds no quickstart")
    return run(path, seed=json.loads(record.read_text(encoding="utf-8"))["seed"], watch=watch)


def _new_name(out: Path) -> Path:
    number = 2
    while (candidate := out.with_name(f"{out.name}-{number}")).exists():
        number += 1
    return candidate


def _work(lab: Lab) -> Outcome:
    sft = lab.train("sft", "sft", model="tinylm", data="docstrings", **SFT)
    start = str(sft.path / "model")
    pairs = lab.pairs("pairs", start, PAIRS)
    held_pairs = lab.pairs("held-out-pairs", start, Labelling(pairs=150, label_temperature=0.0), split="validation")
    fitted = lab.train("reward-model", "reward-model", model=start, data=str(pairs), eval_data=str(held_pairs), eval_every=10**6, **REWARD)
    reward = str(fitted.path / "model")
    dpo = lab.train("dpo", "dpo", model=start, data=str(pairs), **DPO)
    ppo = lab.train("ppo", "ppo-max", model=start, data="docstrings", reward=reward, **PPO)
    items = lab.items(HELD_OUT)
    base = lab.assess("tinylm", "tinylm", items)
    before = lab.assess("start", start, items, reference=start, reward=reward)
    paths = {name: lab.trajectory(run, items, reference=start, reward=reward, start=before) for name, run in (("DPO", dpo), ("PPO", ppo))}
    accuracy = fitted.metrics()[-1]["eval/rewards/accuracies"]
    return _report(lab, items, base, paths, accuracy)


def _verdict(trajectory: Sequence[tuple[int, Assessment]]) -> OverOptimisation:
    points = [Checkpoint(step, np.asarray(a.kl), np.asarray(a.proxy), np.asarray(a.gold)) for step, a in trajectory]
    return judge(points)


def _mean(values: Sequence[float]) -> Interval:
    return bootstrap_interval(np.asarray(values, dtype=float), statistic=np.mean)


def _report(
    lab: Lab, items: Sequence[Item], base: Assessment, paths: Mapping[str, list[tuple[int, Assessment]]], accuracy: float
) -> Outcome:
    start = paths["DPO"][0][1]
    last = {name: path[-1][1] for name, path in paths.items()}
    verdicts = {name: _verdict(path) for name, path in paths.items()}
    rates = {name: win_rate(found.gold, start.gold) for name, found in last.items()}
    everyone: dict[str, Assessment] = {"tinylm": base, "SFT": start, **last}
    sentences = [f"{name}: gold win rate over SFT {rates[name].short()}; learned reward {verdicts[name].verdict}." for name in last]
    report = Report("Telos quickstart: docstrings")
    report.summary(
        "A 4.2 M-parameter language model was fine-tuned on human docstrings, a reward model learned from noisy preferences, and DPO and PPO "
        "aligned the model.",
        f"All figures are on {len(items)} functions of modules that no stage has seen; the gold judge knows the human's own docstring and was "
        "hidden from training.",
        *sentences,
    )
    for name, verdict in verdicts.items():
        report.verdict(f"Did {name} over-optimise the learned reward?", verdict.verdict, verdict.reason, verdict.status)
    report.verdict(
        "Can the learned reward be trusted?",
        f"{100 * accuracy:.0f} % right",
        f"The reward model agrees with the gold judge on {100 * accuracy:.1f} % of held-out pairs; chance is 50 %.",
        "good" if accuracy > 0.65 else "bad" if accuracy < 0.55 else "neutral",
    )
    rows = []
    for name, found in everyone.items():
        rows.append(
            [
                name,
                _mean(found.gold),
                _mean(found.proxy) if found.proxy else "–",
                "0 (the reference)" if name == "SFT" else _mean(found.kl) if found.kl else "–",
                _mean(found.length),
                f"{100 * np.mean(found.ended):.0f} %",
            ]
        )
    report.table("What each model does", ["model", "gold score", "learned reward", "KL from SFT [nats]", "tokens", "ended"], rows)
    report.table(
        "The gold score's parts",
        ["model", *lab.testbed.attributes(items[0], "x")],
        [[name, *_attributes(lab, items, found)] for name, found in everyone.items()],
    )
    curves = [
        plots.RewardCurves(name, [p.kl for p in v.points], [p.proxy for p in v.points], [p.gold for p in v.points])
        for name, v in verdicts.items()
    ]
    report.picture(
        "reward-against-kl",
        plots.reward_against_kl(curves, "Learned reward", "Gold score"),
        "What was optimised (left) and what was wanted (right) against the distance from the fine-tuned model.",
        "Learned reward and gold score against KL divergence for DPO and PPO",
    )
    report.picture(
        "win-rates",
        plots.win_rates(rates, "SFT"),
        "Share of held-out prompts on which the gold score beats SFT's.",
        "Win rates against SFT",
    )
    report.picture(
        "lengths",
        plots.length_histogram({name: np.asarray(found.length) for name, found in everyone.items()}),
        "Answer lengths: a learned reward that likes long answers shows here first.",
        "Histogram of answer lengths in tokens",
    )
    report.samples("Samples side by side", [_sample(item, i, everyone) for i, item in enumerate(items[:8])])
    report.command(f"telos quickstart --seed {lab.seed} --out NEW_FOLDER")
    report.facts("Settings", {"seed": lab.seed, "sft": SFT, "pairs": PAIRS, "reward-model": REWARD, "dpo": DPO, "ppo-max": PPO})
    report.facts("Preferences", json.loads(lab.folder("pairs.counts.json").read_text(encoding="utf-8")))
    report.facts("Versions", {**versions(), "commit": commit() or "installed package"})
    report.facts("Hardware", hardware())
    html, markdown = report.write(lab.root)
    facts = json.loads(lab.folder("quickstart.json").read_text(encoding="utf-8"))
    verdict_facts = {name: verdict.as_dict() for name, verdict in verdicts.items()}
    write_atomically(lab.folder("quickstart.json"), json.dumps(facts | {"status": "finished", "verdicts": verdict_facts}))
    return Outcome(html, markdown, tuple(sentences))


def _attributes(lab: Lab, items: Sequence[Item], found: Assessment) -> list[str]:
    parts = [lab.testbed.attributes(item, text) for item, text in zip(items, found.texts, strict=True)]
    return [f"{np.mean([part[name] for part in parts]):.3f}" for name in parts[0]]


def _sample(item: Item, i: int, everyone: Mapping[str, Assessment]) -> Sample:
    completions = [Completion("human", item.reference.strip(), {})]
    for name, found in everyone.items():
        scores = {"gold": round(found.gold[i], 3)} | ({"reward": round(found.proxy[i], 2)} if found.proxy else {})
        completions.append(Completion(name, found.texts[i].strip(), scores))
    return Sample(item.prompt, completions)
