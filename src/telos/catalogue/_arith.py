"""What recipes on `arith` share: the starting policy, problems to learn from and held-out ones, repeated answers, and the GRPO baseline.

The starting policy is `tinylm` as it is, without fine-tuning: a base model. Its pretraining has shown it documents of `arith`, right and wrong
ones. On tuning seeds nine answers in ten are in form at temperature 1; about 30 % are right at level 1 and 8 % at level 2, though the likeliest
answer is right in 55 % and 28 %, and one of sixteen answers is in 94 % and 47 %. So there is much to sharpen and a support that can shrink, which is
what these claims are about. More text of the same corpus, a third of which is wrong, would only be pretraining continued.

Problems are of levels 1 and 2, as many of each; at level 3 (3 % right) few groups of eight answers would say anything.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms import run as runs
from telos.algorithms.language.repeated_answers import answer_repeatedly, load_problems, open_policy
from telos.catalogue.lab import Lab, commons, named
from telos.core.run import Run, write_atomically
from telos.core.seeds import derive
from telos.environments.text.arith import TESTBED
from telos.environments.text.base import Item, Split
from telos.evaluation.leash import Sampled

START = "tinylm"
LEVELS = (1, 2)
MOST_TOKENS = 48  # of an answer; references of levels 1 to 3 take 46 at most

# Chosen on a tuning seed, once, for all recipes on this testbed. No divergence is paid, as in most work that this stands for.
GRPO: dict[str, Any] = {
    "reward": ["gold:arith"],
    "batch_size": 16,
    "samples_per_prompt": 8,
    "minibatch_size": 64,
    "learning_rate": 1e-4,
    "kl_coef": 0.0,
    "max_completion_length": MOST_TOKENS,
    "checkpoint_every": 0,
}
SMOKE: Mapping[str, Any] = {"problems": 16, "iterations": 3, "held_out": 4, "samples": 4}
FULL: Mapping[str, Any] = {"problems": 2000, "iterations": 60, "held_out": 96, "samples": 16}


def problems(lab: Lab, name: str, n: int, split: Split = "train", levels: tuple[int, ...] = LEVELS) -> Path:
    """A file of `n` problems, as many of each level, with what the judge needs. The same for all recipes of a seed that ask for it."""

    def rows() -> list[dict[str, Any]]:
        seed = derive(lab.seed, name) % 2**31
        items = [item for level in levels for item in TESTBED.level_items(level, n // len(levels), seed, split)]
        return [
            {"prompt": item.prompt, "facts": json.dumps(item.facts), "reference": item.reference, "testbed": TESTBED.name} for item in items
        ]

    return commons(lab).file(f"{named(name, n=n, split=split, levels=levels)}.jsonl", rows)


def training_problems(lab: Lab, settings: Mapping[str, Any]) -> Path:
    return problems(lab, "train", settings["problems"])


def held_out_problems(lab: Lab, settings: Mapping[str, Any]) -> Path:
    return problems(lab, "held-out", settings["held_out"], "test")


def items_of(file: Path) -> list[Item]:
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [Item(row["prompt"], row["reference"], json.loads(row["facts"])) for row in rows]


def learn(lab: Lab, name: str, method: str, data: Path, iterations: int, **options: Any) -> Run:
    """Reinforcement of the starting policy by the judge, with GRPO's settings where no others are given."""
    return lab.train(name, method, model=START, data=str(data), steps=iterations, **{**GRPO, **options})


def grpo_baseline(lab: Lab, settings: Mapping[str, Any]) -> Run:
    """GRPO on the training problems; made once for all recipes of a seed."""
    data, iterations = training_problems(lab, settings), settings["iterations"]
    return learn(commons(lab), named("grpo", data=data, iterations=iterations, **GRPO), "grpo", data, iterations)


def answers(lab: Lab, policy: str | Run, file: Path, samples: int) -> Sampled:
    """`samples` answers of a policy (a run, or what `--model` takes, or RUN:STEP) to each problem of a file at temperature 1, kept in the lab.

    All policies of a seed draw with the same random numbers, so that differences are paired.
    """
    source = policy if isinstance(policy, str) else str(policy.path)
    path = lab.folder(f"answers/{named('answers', source=source, problems=file, samples=samples)}.json")
    if path.exists():
        return _opened(path)
    runs.prepare_threads()
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = load_problems(str(file), len(items_of(file)), max_new_tokens=MOST_TOKENS)
    bar = lab.watch.bar(f"{Path(source).name}: {samples} answers to each problem", len(asked.prompts))
    try:
        found, _ = answer_repeatedly(
            open_policy(source), asked, samples, name=source, seed=derive(lab.seed, "answers"), on_progress=bar.update
        )
    finally:
        bar.close()
    write_atomically(path, json.dumps(dataclasses.asdict(found), default=np.ndarray.tolist))
    return found


def _opened(path: Path) -> Sampled:
    found = json.loads(path.read_text(encoding="utf-8"))
    tables = {name: np.asarray(found[name], dtype=np.float64) for name in ("scores", "right", "tokens", "ended", "entropy")}
    return Sampled(**{**found, **tables})


def accuracy(found: Sampled) -> float:
    return float(found.right.mean())


def mean_length(found: Sampled) -> float:
    """Tokens an answer, the end included."""
    return float(found.tokens.mean())


def token_entropy(found: Sampled) -> float:
    """Nats a token; every token counts once."""
    return float((found.entropy * found.tokens).sum() / found.tokens.sum())


def described(name: str, found: Sampled, file: Path) -> dict[str, float]:
    """Figures of a policy: accuracy, in all and by level, the share of problems solved at all, length, entropy, and the share of answers in form."""
    items = items_of(file)
    levels = np.array([item.facts["level"] for item in items])
    form = [TESTBED.attributes(item, text)["format"] for item, texts in zip(items, found.texts, strict=True) for text in texts]
    return {
        f"accuracy, {name}": accuracy(found),
        **{f"accuracy at level {level}, {name}": float(found.right[levels == level].mean()) for level in sorted(set(levels.tolist()))},
        f"solved at all, {name}": float(found.right.max(1).mean()),
        f"tokens, {name}": mean_length(found),
        f"token entropy, {name}": token_entropy(found),
        f"in form, {name}": float(np.mean(form)),
    }
