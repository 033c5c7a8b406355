"""OREO (S200): soft Bellman consistency of policy and value from judged answers, against rejection sampling and DPO, and its value in search, on `arith`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.catalogue._arith import MOST_TOKENS, START, accuracy, answers, described, held_out_problems
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab, commons
from telos.catalogue.reasoning._offline import (
    FULL,
    LEARNER,
    SMOKE,
    accuracy_of_greedy,
    accuracy_of_search,
    dpo_baseline,
    judged_answers,
    late_mean,
    rejection_baseline,
)
from telos.evaluation.reasoning import majority_at_k

OREO: dict[str, Any] = {**LEARNER, "beta": 0.1, "critic_learning_rate": 3e-4}
SEARCH: dict[str, Any] = {
    "batch_size": 32,
    "beams": 2,
    "expansions": 4,
    "temperature": 0.5,
    "max_completion_length": MOST_TOKENS,
    "checkpoint_every": 0,
}


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "arith", seed, watch)
    held_out, samples, steps = held_out_problems(lab, settings), settings["samples"], settings["steps"]
    judged = judged_answers(lab, settings)
    ours = lab.train("oreo", "oreo", **OREO, model=START, data=str(judged), steps=steps, critic_warmup=settings["critic_warmup"])
    arms = {"OREO": ours, "rejection sampling": rejection_baseline(lab, settings), "DPO": dpo_baseline(lab, settings)}
    found = {"start": answers(commons(lab), START, held_out, samples)}
    found |= {name: answers(lab, run, held_out, samples) for name, run in arms.items()}
    batches = -(-settings["held_out"] // SEARCH["batch_size"])
    critic = str(ours.path / "critic")
    search = lab.train(
        "search", "beam-search", **SEARCH, model=str(ours.path / "model"), process_reward=critic, data=str(held_out), steps=batches
    )
    searched, greedy = (
        accuracy_of_search(search, held_out),
        {name: accuracy_of_greedy(lab, name, run, held_out) for name, run in arms.items()},
    )
    votes = found["OREO"]
    figures = {
        "accuracy over rejection sampling": accuracy(found["OREO"]) - accuracy(found["rejection sampling"]),
        "accuracy over DPO": accuracy(found["OREO"]) - accuracy(found["DPO"]),
        "accuracy of guided search over greedy answers": searched - greedy["OREO"],
        "accuracy of guided search": searched,
        f"accuracy of the vote of {samples}, OREO": float(np.mean(majority_at_k(votes.right, votes.answers, samples))),
        "tokens that search generates a problem": float(np.mean([row["tokens/generated_a_prompt"] for row in search.metrics()])),
        "bellman error, last steps": late_mean(ours, "bellman/error"),
    }
    figures |= {f"accuracy of greedy answers, {name}": value for name, value in greedy.items()}
    for name, sampled in found.items():
        figures |= described(name, sampled, held_out)
    return figures


CLAIM = Claim(
    key="oreo",
    statement="soft Bellman consistency from single judged answers gives a better policy than rejection sampling and DPO, and search guided by its value finds "
    "more right answers still",
    baselines=("sft on the right answers", "dpo on pairs of the same answers", "greedy answers of the same policy"),
    facts=(
        Fact("more answers are right than after fine-tuning on the right answers", "accuracy over rejection sampling", ">", 0.0),
        Fact("and than after DPO", "accuracy over DPO", ">", 0.0),
        Fact(
            "beam search by the learned value solves more problems than the policy's likeliest answers",
            "accuracy of guided search over greedy answers",
            ">",
            0.0,
        ),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "critic_warmup": 1}),
        "full": Budget(3, {**FULL, "critic_warmup": 20}),
    },
    notes="All arms learn from the same answers of the starting policy with the same number of optimiser steps; rejection sampling sees the right ones "
    "several times over. The policies are compared by the share of right answers at temperature 1, the search with the likeliest answers of the policy "
    "that it searches with; its tokens and the vote among sampled answers are beside. The paper's values are models of 1.5 to 7 thousand million "
    "parameters; one of 4.2 million that has seen four thousand short answers can hardly verify a sum.",
)
