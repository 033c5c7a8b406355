"""What recipes share that learn to search: countdown problems of two numbers, a start fine-tuned on worked searches, and its answers.

Half of the demonstrations give up after some misses and answer wrong, the rest goes on until the target is found: the start can search and does so too
seldom. Operands are those of `arith`'s level 1; answers are judged by what a search ends with.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms import run as runs
from telos.algorithms.language._forced import Forcing
from telos.algorithms.language.forced_answers import Budgeted, answer_within
from telos.algorithms.language.repeated_answers import Problems, answer_repeatedly, load_problems, open_policy
from telos.catalogue._arith import _opened
from telos.catalogue.lab import Lab, commons, named
from telos.core.run import Run, write_atomically
from telos.core.seeds import derive
from telos.environments.text import search_traces
from telos.environments.text.arith import TESTBED
from telos.environments.text.base import Item, Split
from telos.evaluation.leash import Sampled
from telos.evaluation.reasoning import cumulative_regret
from telos.objectives.search_behaviour import behaviour

LEVEL = 1
MOST_TOKENS = 84  # of a search: nearly four tries and the answer
SOLVED = "telos.objectives.search_behaviour:solved"
EXPLORATION = "telos.objectives.search_behaviour:exploration"
MISSES = 2  # at most, in a demonstration
GIVES_UP = 0.5  # share of demonstrations
SFT: dict[str, Any] = {"batch_size": 32, "learning_rate": 1e-3, "lr_schedule": "linear", "checkpoint_every": 0}
LEARNING: dict[str, Any] = {
    "reward": [SOLVED],
    "batch_size": 8,
    "minibatch_size": 64,
    "learning_rate": 1e-4,
    "max_completion_length": MOST_TOKENS,
    "checkpoint_every": 0,
}
# Without division by the deviation, so that weights of further rewards stay what they are.
GRPO: dict[str, Any] = {"samples_per_prompt": 8, "kl_coef": 0.0, "scale_rewards": "none"}
BUDGETS = tuple(range(0, MOST_TOKENS + 1, 6))  # tokens before an answer has to be given
SMOKE: Mapping[str, Any] = {
    "problems": 16,
    "demonstrations": 64,
    "verdicts_steps": 2,
    "searches_steps": 2,
    "iterations": 2,
    "held_out": 6,
    "samples": 2,
}
FULL: Mapping[str, Any] = {
    "problems": 2000,
    "demonstrations": 6000,
    "verdicts_steps": 300,
    "searches_steps": 60,
    "iterations": 60,
    "held_out": 96,
    "samples": 8,
}


def countdowns(lab: Lab, name: str, n: int, split: Split = "train") -> list[Item]:
    drawn = TESTBED.level_items(LEVEL, 3 * n + 32, derive(lab.seed, name) % 2**31, split)
    return [item for item in drawn if item.facts["kind"] == "countdown"][:n]


def problems(lab: Lab, name: str, n: int, split: Split = "train") -> Path:
    def rows() -> list[dict[str, Any]]:
        return [{"prompt": item.prompt, "facts": json.dumps(item.facts)} for item in countdowns(lab, name, n, split)]

    return commons(lab).file(f"{named(f'search-{name}', n=n, split=split)}.jsonl", rows)


def searching_start(lab: Lab, settings: Mapping[str, Any]) -> str:
    """The folder of the start; made once for all recipes of a seed. It learns to tell hits from misses first, then searches, whole and from a verdict on."""
    shared, n = commons(lab), settings["demonstrations"]

    def verdicts() -> list[dict[str, Any]]:
        rng = random.Random(derive(lab.seed, "verdicts"))
        made = (search_traces.verdict(item, rng) for item in countdowns(lab, "verdicts", n))
        return [{"prompt": prompt, "completion": word} for prompt, word, _ in made]

    def demonstrations() -> list[dict[str, Any]]:
        rng = random.Random(derive(lab.seed, "searches"))
        made = []
        for i, item in enumerate(countdowns(lab, "searches", n)):
            if i % 2:
                prompt, word, rest = search_traces.verdict(item, rng)
                made.append({"prompt": prompt, "completion": word + rest})
            else:
                text = search_traces.trace(item, rng, rng.randint(0, MISSES), rng.random() < GIVES_UP)
                made.append({"prompt": item.prompt, "completion": text})
        return made

    model = "tinylm"
    for name, rows in (("verdicts", verdicts), ("searches", demonstrations)):
        data = shared.file(f"{named(name, n=n)}.jsonl", rows)
        options = {**SFT, "model": model, "data": str(data), "steps": settings[f"{name}_steps"]}
        model = str(shared.train(named(name, **options), "sft", **options).path / "model")
    return model


def training_problems(lab: Lab, settings: Mapping[str, Any]) -> Path:
    return problems(lab, "problems", settings["problems"])


def held_out_problems(lab: Lab, settings: Mapping[str, Any]) -> Path:
    return problems(lab, "held-out", settings["held_out"], "test")


def learn(lab: Lab, name: str, method: str, settings: Mapping[str, Any], **options: Any) -> Run:
    """Reinforcement of the searching start on the training problems, with the settings of `LEARNING` where no others are given."""
    data, start = training_problems(lab, settings), searching_start(lab, settings)
    return lab.train(name, method, model=start, data=str(data), steps=settings["iterations"], **{**LEARNING, **options})


def outcome_baseline(lab: Lab, settings: Mapping[str, Any]) -> Run:
    """GRPO on the outcome alone; made once for all recipes of a seed."""
    start, iterations = searching_start(lab, settings), settings["iterations"]
    name = named("search-grpo", start=start, iterations=iterations, **{**LEARNING, **GRPO})
    return learn(commons(lab), name, "grpo", settings, **GRPO)


def _asked(held_out: Path, n: int) -> Problems:
    return load_problems(str(held_out), n, reward=SOLVED, max_new_tokens=MOST_TOKENS, answer=r"Answer:\s*(\S+)")


def _source(policy: str | Run) -> str:
    return policy if isinstance(policy, str) else str(policy.path)


def searches(lab: Lab, name: str, policy: str | Run, settings: Mapping[str, Any]) -> Sampled:
    """Answers of a policy to the held-out problems, with the same random numbers for all policies of a seed; kept in the lab."""
    path = lab.folder(f"answers/{name}.json")
    if not path.exists():
        runs.prepare_threads()
        asked = _asked(held_out_problems(lab, settings), settings["held_out"])
        given: dict[str, Any] = {"name": name, "seed": derive(lab.seed, "answers")}
        found, _ = answer_repeatedly(open_policy(_source(policy)), asked, settings["samples"], **given)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(dataclasses.asdict(found), default=np.ndarray.tolist))
    return _opened(path)


def within_budgets(lab: Lab, name: str, policy: str | Run, settings: Mapping[str, Any]) -> Budgeted:
    """Answers of a policy to the held-out problems, whole and forced at each of `BUDGETS`; kept in the lab."""
    path = lab.folder(f"budgets/{name}.json")
    if not path.exists():
        runs.prepare_threads()
        asked = _asked(held_out_problems(lab, settings), settings["held_out"])
        given: dict[str, Any] = {"forcing": Forcing(1), "seed": derive(lab.seed, "budgets")}
        answer_within(open_policy(_source(policy)), asked, settings["samples"], BUDGETS, **given).save(path)
    return Budgeted.open(path)


def searching(name: str, found: Sampled, lab: Lab, settings: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a policy: accuracy, length, and what its searches do, means over answers."""
    items = countdowns(lab, "held-out", settings["held_out"], "test")
    seen = [behaviour(text, item.facts["target"]) for item, texts in zip(items, found.texts, strict=True) for text in texts]
    checks = sum(one.verified for one in seen)
    return {
        f"accuracy, {name}": float(found.right.mean()),
        f"tokens, {name}": float(found.tokens.mean()),
        f"different tries, {name}": float(np.mean([one.different for one in seen])),
        f"repeated tries, {name}": float(np.mean([one.tries - one.different for one in seen])),
        f"verifications, {name}": float(np.mean([one.verified for one in seen])),
        f"backtrackings, {name}": float(np.mean([one.backtracked for one in seen])),
        f"true verdicts, {name}": sum(one.true_verdicts for one in seen) / max(checks, 1),
    }


def budgets_described(name: str, found: Budgeted) -> dict[str, float]:
    """Figures of a policy: accuracy, length, accuracy per token, the curve over budgets, and cumulative regret in tokens over all of the budget."""
    curve = found.accuracy.mean(0)
    # Each success holds until the next budget; within the last one all answers fit.
    regret = cumulative_regret(curve[:-1], widths=np.diff(found.budgets))
    return {
        f"accuracy, {name}": float(found.right.mean()),
        f"tokens, {name}": float(found.tokens.mean()),
        f"accuracy per 100 tokens, {name}": 100 * float(found.right.mean() / found.tokens.mean()),
        f"regret, {name}": float(regret[-1]),
        **{f"accuracy at {int(budget)} tokens, {name}": float(value) for budget, value in zip(found.budgets, curve, strict=True)},
    }
