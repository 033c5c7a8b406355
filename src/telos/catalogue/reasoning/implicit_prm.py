"""Implicit PRM (S160): step rewards of models that have seen labels of whole answers alone, on `arith`: do they find the first mistake, and choose answers
better than a scalar outcome reward model?

All models learn from the same judged answers of the starting policy, each right one and a wrong one to the same problem, with as many optimiser steps of as
many answers: the log-ratio by cross-entropy (`implicit-prm`), `kto`, `dpo` and `nca`, and a scalar head by cross-entropy (`process-reward` on answers of one
step). That both kinds are equally many is our choice: four answers of five are wrong, and a log-ratio that is fitted to all of them must first say that
answers are mostly wrong, by taking probability from all that the policy writes, and gives it to texts that nobody has judged.

`implicit:MODEL,REFERENCE` and `value:FOLDER` give the steps of held-out answers rewards that add up to the score of the answer. For the scalar model they
are differences of its probability between steps, at which nobody has trained it.

Where the first mistake is, the testbed's exact checker says; no model sees that. It is looked for in wrong answers, among all steps with "Answer: …" as the
last, and a model points at the step with the least reward. Mistakes come in some places more often than in others, and models may prefer a place whatever
stands there. So chance is what a pointer that has the model's places, and mistakes that have theirs, would hit if one knew nothing of the other, in answers
of equally many steps; and rewards are compared between steps at the same place of answers of equally many steps.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from telos.algorithms import run as runs
from telos.algorithms.language.best_of_n import expected_best
from telos.catalogue._arith import START, accuracy, answers, held_out_problems, items_of
from telos.catalogue._arith_process import judge_of_steps, steps_of
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab, commons, named
from telos.catalogue.reasoning._offline import FULL, LEARNER, SMOKE, judged_answers, pairs
from telos.core.run import write_atomically
from telos.data.batches import pad_1d
from telos.environments.text.arith import TESTBED, check_steps
from telos.environments.text.base import Item
from telos.evaluation.leash import Sampled
from telos.evaluation.reasoning import majority_at_k
from telos.functional.process import auc
from telos.models.language import LanguageModel
from telos.models.packing import Answers
from telos.objectives.process_reward import load_process_reward

RATIO: dict[str, Any] = {**LEARNER, "beta": 0.05}  # the paper's scale
OBJECTIVES = {"CE": "implicit-prm", "KTO": "kto", "DPO": "dpo", "NCA": "nca"}
FEW = 4  # best-of-n is reported for this n, too
_BATCH = 64  # answers scored at once

StepRewards = list[list[list[float]]]  # of each problem's answers' steps


def scalar_model(lab: Lab, both: Path, steps: int) -> str:
    """The folder of a scalar outcome reward model: one step an answer, the whole, labelled right or wrong."""

    def rows() -> list[dict[str, Any]]:
        found = [json.loads(line) for line in both.read_text(encoding="utf-8").splitlines()]
        return [
            {"prompt": row["prompt"], "completions": [row[side]], "labels": [side == "chosen"], "step_separator": ""}
            for row in found
            for side in ("chosen", "rejected")
        ]

    file = lab.file(f"{named('whole', pairs=both)}.jsonl", rows)
    return judge_of_steps(lab, file, steps, **({"batch_size": 2} if _few(both) else {}))


def implicit_model(lab: Lab, objective: str, both: Path, steps: int) -> str:
    """The specification of the step rewards of a log-ratio that an objective has fitted."""
    size = 1 if _few(both) else RATIO["batch_size"] // 2
    options = {**RATIO, "batch_size": size if objective in ("DPO", "NCA") else 2 * size}
    run = lab.train(objective.lower(), OBJECTIVES[objective], model=START, data=str(both), steps=steps, **options)
    return f"implicit:{run.path / 'model'},{START}"


def _few(both: Path) -> bool:
    """Whether there are too few pairs for a batch, which is so in smoke runs alone."""
    return len(both.read_text(encoding="utf-8").splitlines()) < RATIO["batch_size"] // 2


def step_rewards(lab: Lab, guide: str, pool: Sampled, held_out: Path) -> StepRewards:
    """What a model says of the steps of sampled answers, kept in the lab."""
    path = lab.folder(f"rewards/{named('steps', guide=guide, problems=held_out)}.json")
    if not path.exists():
        runs.prepare_threads()
        policy = LanguageModel.load(START)
        tokenizer, samples = policy.tokenizer, pool.right.shape[1]

        def encoded(text: str) -> list[int]:
            return cast(Any, tokenizer(text, add_special_tokens=False))["input_ids"]

        end = [cast(int, tokenizer.eos_token_id)]
        rows = zip((text for texts in pool.texts for text in texts), pool.ended.flatten(), strict=True)
        written = pad_1d([encoded(text or " ") + (end if whole else []) for text, whole in rows])
        prompts = pad_1d([encoded(item.prompt) for item in items_of(held_out)])
        scorer = load_process_reward(guide, policy, batch_size=_BATCH)
        scores = scorer.score(Answers(*prompts, *written, torch.arange(len(pool.texts)).repeat_interleave(samples)))
        flat = [values[mask].tolist() for values, mask in zip(scores.values.double(), scores.mask, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps([flat[i : i + samples] for i in range(0, len(flat), samples)]))
    return json.loads(path.read_text(encoding="utf-8"))


def first_mistake(item: Item, text: str) -> int | None:
    """The place of the first wrong step of an answer, "Answer: …" being the last of its steps; None where every step is right."""
    verdicts = [verdict.right for verdict in check_steps(item, text)]
    if len(verdicts) < len(steps_of(text)):
        verdicts.append(TESTBED.gold(item, text) > 0.5)
    return verdicts.index(False) if False in verdicts else None


def localisation(rewards: StepRewards, mistakes: Sequence[Sequence[int | None]], right: np.ndarray) -> dict[str, float]:
    """How well the least reward of a wrong answer marks its first mistake, and how well rewards tell right steps from first mistakes; see the module's
    docstring. Answers of one step, and wrong ones without a wrong step (cut off, for example), have nothing to find."""
    pointed: dict[int, list[tuple[int, int]]] = defaultdict(list)
    steps: dict[tuple[int, int], list[tuple[float, bool]]] = defaultdict(list)
    for given, places, good in zip(rewards, mistakes, right > 0.5, strict=True):
        for row, place, solved in zip(given, places, good, strict=True):
            if solved == (place is not None) or len(row) < 2:
                continue
            if place is not None:
                pointed[len(row)].append((int(np.argmin(row)), place))
            for t in range(len(row) if place is None else place + 1):
                steps[len(row), t].append((row[t], t != place))
    total, hits, chance = sum(map(len, pointed.values())), 0.0, 0.0
    for count, found in pointed.items():
        said, true = np.array(found).T
        hits += float((said == true).sum())
        habits = [np.bincount(places, minlength=count) / len(found) for places in (said, true)]
        chance += len(found) * float(habits[0] @ habits[1])
    areas = [_area_and_pairs(some) for some in steps.values()]
    weight = sum(count for _, count in areas)
    return {
        "first mistakes found": hits / total if total else 0.0,
        "first mistakes found over chance": (hits - chance) / total if total else 0.0,
        "first mistakes found over a draw among steps": (hits - sum(len(found) / n for n, found in pointed.items())) / total
        if total
        else 0.0,
        "right step above first mistake": sum(area * count for area, count in areas) / weight if weight else 0.5,
    }


def _area_and_pairs(steps: Sequence[tuple[float, bool]]) -> tuple[float, int]:
    rewards, right = (torch.tensor(column) for column in zip(*steps, strict=True))
    count = int(right.sum()) * int((~right).sum())
    return (auc(rewards, right) if count else 0.5), count


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "arith", seed, watch)
    held_out, samples, steps = held_out_problems(lab, settings), settings["samples"], settings["steps"]
    both = pairs(lab, judged_answers(lab, settings))
    pool = answers(commons(lab), START, held_out, samples)
    items = items_of(held_out)
    mistakes = [[first_mistake(item, text) for text in texts] for item, texts in zip(items, pool.texts, strict=True)]
    guides = {"scalar": f"value:{scalar_model(lab, both, steps)}"}
    guides |= {name: implicit_model(lab, name, both, steps) for name in OBJECTIVES}

    figures = {
        "accuracy of one answer": accuracy(pool),
        "solved at all": float(pool.right.max(1).mean()),
        f"accuracy of the vote of {samples}": float(np.mean(majority_at_k(pool.right, pool.answers, samples))),
        "wrong answers without a wrong step": float(
            np.mean(
                [
                    place is None
                    for places, good in zip(mistakes, pool.right, strict=True)
                    for place, g in zip(places, good, strict=True)
                    if not g
                ]
            )
        ),
    }
    for name, guide in guides.items():
        rewards = step_rewards(lab, guide, pool, held_out)
        outcome = np.array([[sum(row) for row in given] for given in rewards])
        least = np.array([[min(row) for row in given] for given in rewards])
        figures |= {
            f"accuracy of the best of {samples}, {name}": float(expected_best(outcome, samples, of=pool.right).mean()),
            f"accuracy of the best of {FEW}, {name}": float(expected_best(outcome, min(FEW, samples), of=pool.right).mean()),
            f"accuracy of the best of {samples} by the least step, {name}": float(expected_best(least, samples, of=pool.right).mean()),
            f"right answer above wrong, {name}": auc(torch.tensor(outcome).flatten(), torch.tensor(pool.right).flatten() > 0.5),
            **{f"{what}, {name}": value for what, value in localisation(rewards, mistakes, pool.right).items()},
        }
    for name in OBJECTIVES:
        best = f"accuracy of the best of {samples}"
        figures[f"best of n, {name} over scalar"] = figures[f"{best}, {name}"] - figures[f"{best}, scalar"]
    return figures


CLAIM = Claim(
    key="implicit-prm",
    statement="a log-ratio that was fitted to labels of whole answers finds first mistakes above chance, and chooses among answers better than a scalar "
    "outcome reward model that learned the same labels",
    baselines=("a pointer with the same habits that does not look", "a scalar outcome reward model (process-reward on whole answers)"),
    facts=(
        Fact(
            "in wrong answers the least step reward marks the first mistake more often than chance would, by 0.05",
            "first mistakes found over chance, CE",
            ">",
            0.05,
        ),
        Fact(
            "a right step has a higher reward than a first mistake at its place in 6 cases of 10",
            "right step above first mistake, CE",
            ">",
            0.6,
        ),
        Fact("the best of n by it is right more often than the best by a scalar model", "best of n, CE over scalar", ">", 0.0),
    ),
    experiment=experiment,
    budgets={"smoke": Budget(1, SMOKE), "full": Budget(3, {**FULL, "problems": 960, "samples": 16})},
    notes="Facts are stated for the cross-entropy objective, the paper's best with few answers a prompt; DPO, KTO and NCA are among the figures. The best of "
    "n is by the reward of the whole answer; that by the least step, as process reward models are used, is beside. Right answers are alike and wrong ones are "
    "not, so that a score that knows nothing chooses worse than one answer does, the more so the larger n. The paper's models have 8 thousand million "
    "parameters and learn from 33 thousand problems; this one has 4.2 million and learns from a few hundred.",
)
