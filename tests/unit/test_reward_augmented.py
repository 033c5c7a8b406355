"""Reward-augmented pairs: what becomes of the rows, which methods take them, and what a policy that is told its score learns that DPO does not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support import World, config_of, outcome, program_of
from telos.algorithms.language import dpo, reward_augmented
from telos.algorithms.run import train
from telos.core.errors import UsageError
from telos.data.formats import Counts, Examples
from telos.data.preferences import conditioned
from telos.data.preferences import reward_augmented as augment
from telos.environments.bandit import Bandit, BanditPairs, TabularPolicy, fit, random_bandit

# The rows of a run --------------------------------------------------------------------------------------------------------------------------


def texts_of(program: Any, row: int) -> dict[str, str]:
    decode, columns = program.model.tokenizer.decode, program.table.columns
    return {side: decode(columns[f"{side}_ids"][row].tolist()).removesuffix("<|im_end|>") for side in ("prompt", "chosen", "rejected")}


@pytest.mark.parametrize("key", ["dpo", "simpo", "reward-augmented"])
def test_each_pair_comes_twice_with_exchanged_sides_and_the_score_of_its_chosen_answer(world: World, tmp_path: Path, key: str) -> None:
    plain = program_of("dpo", world.options("pairs"), tmp_path / "plain")
    options = {} if key == "reward-augmented" else {"data_reward_augmented": True}
    program = program_of(key, world.options("pairs", **options), tmp_path / "run")
    assert len(program.table) == 2 * len(plain.table) == 24
    for i in range(12):
        given, one, other = texts_of(plain, i), texts_of(program, 2 * i), texts_of(program, 2 * i + 1)
        scores = 1.0 + 0.1 * i, 0.5 - 0.2 * i  # as the data have them
        assert one == {"prompt": conditioned(given["prompt"], scores[0]), "chosen": given["chosen"], "rejected": given["rejected"]}
        assert other == {"prompt": conditioned(given["prompt"], scores[1]), "chosen": given["rejected"], "rejected": given["chosen"]}
    assert np.isfinite(program.step(0)["loss"])


def test_a_reward_gives_the_scores_that_the_data_lack(world: World, tmp_path: Path) -> None:
    options = world.options("pairs", data=world.data["preference"], reward=world.reward)
    program = program_of("reward-augmented", options, tmp_path)
    assert len(program.table) == 24
    # ' blue.' has one space, one e and six letters and points: 1 − 0.5 + 0.06.
    assert texts_of(program, 0)["prompt"].startswith(conditioned("The sky is", 0.56)[:20])
    assert "0.56" in texts_of(program, 0)["prompt"]


@pytest.mark.parametrize("key", ["dpo", "simpo", "reward-augmented"])
def test_without_scores_the_user_is_told_both_remedies(world: World, tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match=r"no column 'chosen_score' with the answers' scores; add it, or give --reward"):
        program_of(key, world.options("pairs", data=world.data["preference"], data_reward_augmented=True), tmp_path)


def test_the_method_is_dpo_with_the_option_on(world: World, tmp_path: Path) -> None:
    ours = train("reward-augmented", world.options("pairs", out=str(tmp_path / "ours")))
    theirs = train("dpo", world.options("pairs", data_reward_augmented=True, out=str(tmp_path / "theirs")))
    assert outcome(ours) == outcome(theirs)


def test_switching_the_option_off_is_refused_and_names_dpo(world: World) -> None:
    with pytest.raises(UsageError, match=r"--data_reward_augmented false .* dpo"):
        config_of("reward-augmented", world.options("pairs", data_reward_augmented=False))


# What is learned from them ------------------------------------------------------------------------------------------------------------------


def conditioned_bandit(bandit: Bandit) -> tuple[Bandit, BanditPairs]:
    """The bandit whose contexts are (context, score of one of its responses), and the exact law of its pairs after our own relabelling: context
    c with the score of response a is number c · A + a."""
    law, reward = bandit.exact_pairs(), bandit.reward
    assert reward is not None
    distinct = law.chosen != law.rejected
    law = BanditPairs(*(field[distinct] for field in law))
    context, chosen, rejected = (field.tolist() for field in law[:3])
    records = [{"prompt": f"{c}", "chosen": f"{w}", "rejected": f"{l_}"} for c, w, l_ in zip(context, chosen, rejected, strict=True)]
    extra = {
        "chosen_score": [float(reward[c, w]) for c, w in zip(context, chosen, strict=True)],
        "rejected_score": [float(reward[c, l_]) for c, l_ in zip(context, rejected, strict=True)],
    }
    found = augment(Examples("preference", False, records, extra, [""] * len(records), Counts("bandit")))
    known = {
        conditioned(f"{c}", float(reward[c, a])): c * bandit.responses + a for c in range(bandit.contexts) for a in range(bandit.responses)
    }
    assert len(known) == bandit.contexts * bandit.responses, "no two responses have the same score as it is written"
    numbers = {name: torch.tensor([int(record[name]) for record in found.records]) for name in ("chosen", "rejected")}
    weight = law.weight.repeat_interleave(2) / (2 * law.weight.sum())
    pairs = BanditPairs(torch.tensor([known[record["prompt"]] for record in found.records]), numbers["chosen"], numbers["rejected"], weight)

    def spread(table: Tensor) -> Tensor:
        return table.repeat_interleave(bandit.responses, 0)

    return Bandit(spread(bandit.reference), spread(bandit.behaviour), spread(bandit.preference), spread(reward)), pairs


def minimise(config: Any, module: Any, bandit: Bandit, pairs: BanditPairs) -> Tensor:
    policy = TabularPolicy(bandit.reference)
    end = fit(policy, lambda log_probs: (pairs.weight * module.loss(config, bandit.pair_batch(log_probs, pairs)).values).sum(), steps=500)
    assert end.gradient < 1e-7
    return policy.probs()


BETA, EPS = 1.0, 0.1


@pytest.mark.parametrize("seed", range(3))
def test_asked_for_a_score_the_policy_gives_the_answer_that_has_it(seed: int) -> None:
    """Under the target r(a) every pair with a prefers a, whichever side a label had put it on, and no pair is without a. So with smoothing ε the optimum
    raises log π/ref of a over all others by log((1 − ε)/ε)/β, also for the answers that most labels reject."""
    bandit = random_bandit(2, 5, seed)
    told, pairs = conditioned_bandit(bandit)
    found = minimise(reward_augmented.Config(beta=BETA, label_smoothing=EPS), reward_augmented, told, pairs).view(2, 5, 5)
    raised = bandit.reference[:, None] * torch.exp(torch.eye(5) * np.log((1 - EPS) / EPS) / BETA)
    np.testing.assert_allclose(found.numpy(), (raised / raised.sum(-1, keepdim=True)).numpy(), atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_asked_for_the_best_it_earns_more_than_dpo_on_the_same_pairs_and_keeps_the_good_rejected_answer(seed: int) -> None:
    """Which answer is nearer to a target is certain however noisy the labels are, so little smoothing is enough; DPO gets the same."""
    eps = 0.02
    drawn = random_bandit(2, 5, seed)
    bandit = dataclasses.replace(drawn, reference=torch.full_like(drawn.reference, 0.2), behaviour=torch.full_like(drawn.reference, 0.2))
    assert bandit.reward is not None
    told, pairs = conditioned_bandit(bandit)
    found = minimise(reward_augmented.Config(beta=BETA, label_smoothing=eps), reward_augmented, told, pairs).view(2, 5, 5)
    plain = minimise(dpo.Config(beta=BETA, label_smoothing=eps), dpo, bandit, bandit.exact_pairs())
    ranks = bandit.reward.argsort(-1, descending=True)
    for c in range(2):
        best, second = ranks[c, 0], ranks[c, 1]
        assert float((found[c, best] - plain[c]) @ bandit.reward[c]) > 0.1
        assert found[c, second, second] > plain[c, second]
