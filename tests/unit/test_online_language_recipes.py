"""What the recipes of on-policy training make of a leaderboard and of a model: spreads and worst runs by hand, perplexity by another path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from telos.catalogue.online_language_rl.rl4lms import PERPLEXITY, figures, perplexity
from telos.environments.text.base import load_testbed
from telos.evaluation.leaderboard import Leaderboard, Score
from telos.models.language import LanguageModel

GOLD = {
    ("concepts", "sft"): (0.40,),
    ("concepts", "ppo"): (0.30, 0.60, 0.90),
    ("concepts", "nlpo"): (0.60, 0.70, 0.80),
    ("dialogue", "sft"): (0.50,),
    ("dialogue", "ppo"): (0.50, 0.60, 0.70),
    ("dialogue", "nlpo"): (0.45, 0.60, 0.75),
}


def scores(more: dict[str, float]) -> list[Score]:
    return [
        Score(task, method, seed, {"gold": value, PERPLEXITY: 10 * value, **more})
        for (task, method), row in GOLD.items()
        for seed, value in enumerate(row)
    ]


def board() -> Leaderboard:
    return Leaderboard(scores({}))


def test_nlpo_is_steadier_when_the_mean_of_its_deviations_over_tasks_is_smaller() -> None:
    found = figures(board())
    # Three values evenly spaced by d have the sample deviation d.
    assert found["spread over training seeds, PPO"] == pytest.approx((0.3 + 0.1) / 2)
    assert found["spread over training seeds, NLPO"] == pytest.approx((0.1 + 0.15) / 2)
    assert found["spread over training seeds, NLPO less PPO"] == pytest.approx(0.125 - 0.2)


def test_gains_are_differences_of_means_over_tasks_and_the_worst_run_is_told_against_its_own_start() -> None:
    found = figures(board())
    assert found["gold of NLPO over SFT"] == pytest.approx((0.7 + 0.6) / 2 - 0.45)
    assert found["gold of NLPO over PPO"] == pytest.approx(0.65 - 0.6)
    assert found["gold of the worst run over SFT, PPO"] == pytest.approx(0.3 - 0.4)
    assert found["gold of the worst run over SFT, NLPO"] == pytest.approx(0.45 - 0.5)
    assert found["perplexity of references, NLPO"] == pytest.approx(6.5)


def test_a_metric_that_could_not_be_measured_for_a_method_leaves_its_cell_empty() -> None:
    assert figures(board())["share of the tables that is filled"] == 1.0
    without = [
        Score(s.task, s.method, s.seed, {name: v for name, v in s.metrics.items() if (s.method, name) != ("nlpo", "task/form")})
        for s in scores({"task/form": 0.5})
    ]
    # Three metrics on two tasks for three methods; two cells are empty.
    assert figures(Leaderboard(without))["share of the tables that is filled"] == pytest.approx(16 / 18)


def test_perplexity_is_that_of_the_references_and_their_ends_token_by_token() -> None:
    model = LanguageModel.load("tinylm")
    items = load_testbed("grue-concepts").items("test", 3)
    tokenizer, losses = model.tokenizer, []
    for item in items:
        prompt, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (item.prompt, item.reference))
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = [*begin, *prompt, *answer, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model.base(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        losses += [-float(logits[i - 1, ids[i]]) for i in range(len(ids) - len(answer) - 1, len(ids))]
    assert perplexity(model, items) == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
