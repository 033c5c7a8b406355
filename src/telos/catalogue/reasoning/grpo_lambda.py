"""GRPO-λ (S194): length and accuracy of plain GRPO, of a length penalty in every group, and of one in the groups that do best, on `arith`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from telos.catalogue._arith import (
    FULL,
    SMOKE,
    START,
    accuracy,
    answers,
    described,
    grpo_baseline,
    held_out_problems,
    learn,
    mean_length,
    training_problems,
)
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab, commons

PENALTY = 0.5  # α, the same for both arms: what the longest right answers of a penalised group lose
SHARES: Mapping[str, float] = {"GRPO-λ": 0.2, "penalty everywhere": 1.0}  # λ; 0.2 is the paper's


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "arith", seed, watch)
    data, held_out, samples = training_problems(lab, settings), held_out_problems(lab, settings), settings["samples"]
    found = {
        "start": answers(commons(lab), START, held_out, samples),
        "GRPO": answers(commons(lab), grpo_baseline(lab, settings), held_out, samples),
    }
    for name, share in SHARES.items():
        stage = name.replace(" ", "-")
        run = learn(lab, stage, "grpo-lambda", data, settings["iterations"], penalised_share=share, length_penalty=PENALTY)
        found[name] = answers(lab, run, held_out, samples)
    ours, everywhere, plain = (found[name] for name in (*SHARES, "GRPO"))
    figures = {
        "length of GRPO-λ over GRPO": mean_length(ours) / mean_length(plain),
        "length of penalty everywhere over GRPO": mean_length(everywhere) / mean_length(plain),
        "accuracy of GRPO-λ over GRPO": accuracy(ours) - accuracy(plain),
        "accuracy of penalty everywhere over GRPO": accuracy(everywhere) - accuracy(plain),
        "accuracy of GRPO-λ over penalty everywhere": accuracy(ours) - accuracy(everywhere),
    }
    for name, sampled in found.items():
        figures |= described(name, sampled, held_out)
    return figures


CLAIM = Claim(
    key="grpo-lambda",
    statement="GRPO-λ gives shorter answers than GRPO at no loss of accuracy, where a length penalty in every group collapses",
    baselines=("grpo", "grpo-lambda --penalised_share 1"),
    facts=(
        Fact("answers at least a twentieth shorter than GRPO's", "length of GRPO-λ over GRPO", "<", 0.95),
        Fact("accuracy not more than 0.02 below GRPO's", "accuracy of GRPO-λ over GRPO", ">", -0.02),
        Fact("the penalty in every group costs more than 0.05 of GRPO's accuracy", "accuracy of penalty everywhere over GRPO", "<", -0.05),
    ),
    experiment=experiment,
    budgets={"smoke": Budget(1, SMOKE), "full": Budget(3, FULL)},
    notes="An answer of these levels is one or two short steps and a number, 4 to 33 tokens: what can be left out are the steps of an expression. A 4.2 "
    "M-parameter model of 13 % accuracy stands for a reasoning model whose answers are thousands of tokens long.",
)
