"""T1 (S107): oversampling, an entropy bonus and a moving anchor on a start that has seen trial and error, and accuracy by inference budget.

The system is a setting of existing options: `sft` on trial-and-error searches, then `rloo` with many answers to each prompt (`--samples_per_prompt`), the
entropy bonus (`--entropy_coef`), a reference that follows the policy as its exponential moving average (`--kl_coef`, `--reference_share`), and a penalty on
answers that do not end (`--missing_end_penalty`) (Hou et al. 2025, section 3). Inference scaling is examined by truncation: a search is cut at a budget of
tokens and has to answer there (`algorithms.language.forced_answers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telos.catalogue._search_traces import FULL, MOST_TOKENS, SMOKE, budgets_described, learn, searching_start, within_budgets
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab

T1: dict[str, Any] = {
    "minibatch_size": 128,  # one optimiser step an iteration, however many answers
    "entropy_coef": 0.001,
    "kl_coef": 0.01,
    "reference_share": 0.05,  # of the policy that the anchor takes on after each iteration
    "missing_end_penalty": 0.5,
    "normalize_advantage": True,
}
FEW, MANY = "few", "many"
ONE_TRY, TWO_TRIES = 24, 42  # tokens that they take, with their verdicts


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "arith", seed, watch)
    policies: dict[str, Any] = {"start": searching_start(lab, settings)}
    policies |= {name: learn(lab, name, "rloo", settings, **{**T1, "samples_per_prompt": settings[name]}) for name in (FEW, MANY)}
    figures: dict[str, float] = {}
    for name, policy in policies.items():
        figures |= budgets_described(name, within_budgets(lab, name, policy, settings))
        last = figures[f"accuracy at {MOST_TOKENS} tokens, {name}"]
        figures[f"accuracy from one try to the whole budget, {name}"] = last - figures[f"accuracy at {ONE_TRY} tokens, {name}"]
        figures[f"accuracy from two tries to the whole budget, {name}"] = last - figures[f"accuracy at {TWO_TRIES} tokens, {name}"]
    return figures | {
        "accuracy of many answers over few": figures[f"accuracy, {MANY}"] - figures[f"accuracy, {FEW}"],
        "accuracy of many answers over start": figures[f"accuracy, {MANY}"] - figures["accuracy, start"],
        "rise with the budget, many answers over start": figures[f"accuracy from one try to the whole budget, {MANY}"]
        - figures["accuracy from one try to the whole budget, start"],
    }


CLAIM = Claim(
    key="t1",
    statement="accuracy after reinforcement grows with the number of answers sampled to each prompt, and with the budget of tokens at inference",
    baselines=("the start, fine-tuned on searches", "the same with a quarter as many answers to each prompt"),
    facts=(
        Fact(
            "sixteen answers to a prompt give higher accuracy than four, after as many iterations",
            "accuracy of many answers over few",
            ">",
            0.0,
        ),
        Fact(
            "accuracy rises by more than 0.05 from a budget of one try to the whole one",
            "accuracy from one try to the whole budget, many",
            ">",
            0.05,
        ),
        Fact("and still from two tries on", "accuracy from two tries to the whole budget, many", ">", 0.0),
        Fact("it rises more than before reinforcement", "rise with the budget, many answers over start", ">", 0.0),
    ),
    experiment=experiment,
    budgets={"smoke": Budget(1, {**SMOKE, FEW: 2, MANY: 4}), "full": Budget(3, {**FULL, FEW: 4, MANY: 16})},
    notes="Prompts, iterations and optimiser steps are the same for few and many answers; many cost four times the tokens. The paper samples up to 64.",
)
