"""CoPG (S54): the optimum from off-policy data where the plain policy gradient misses it; the identities with IPO and the policy gradient."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from telos.algorithms.language import copg, ipo
from telos.catalogue._exact import distance, optimum_of, with_scores
from telos.catalogue._review import DPO, SMOKE, learned_reward, mean_gold, measure_common, preferences, starting_policy, wins
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.core.seeds import torch_generator
from telos.environments.bandit import Bandit, TabularPolicy, fit, random_bandit
from telos.functional.equilibria import kl_optimum


def off_policy(seed: int, beta: float = 0.5) -> dict[str, float]:
    """Data of a policy that has nothing to do with the reference: CoPG's optimum, and that of E_μ[R_β log π], which takes them for on-policy."""
    random = random_bandit(3, 5, seed)
    assert random.reward is not None
    generator = torch_generator(seed, "behaviour")
    behaviour = torch.softmax(torch.randn(3, 5, generator=generator, dtype=torch.float64), -1)
    bandit = Bandit.from_reward(random.reward, random.reference, behaviour)
    wanted = kl_optimum(random.reward, random.reference, beta)
    ours = optimum_of(functools.partial(copg.loss, copg.Config(beta=beta)), bandit)
    plain = TabularPolicy(random.reference)

    def gradient_free_of_baseline(log_probs: torch.Tensor) -> torch.Tensor:
        # Its gradient is −E_μ[R_β ∇ log π], R_β = R − β log π/π_ref: the square's own gradient is the second part.
        ratio = log_probs - random.reference.log()
        return -(behaviour * (random.reward * log_probs - beta / 2 * ratio**2)).sum(-1).mean()  # type: ignore[operator]

    fit(plain, gradient_free_of_baseline, steps=400)
    return {"distance of CoPG": distance(ours, wanted), "distance of the plain policy gradient": distance(plain.probs(), wanted)}


def identities(seed: int, beta: float = 0.3) -> float:
    """The largest difference of gradients: CoPG on scores ±¼ against β/2 times IPO's; twice the policy gradient of E[R] − β KL on-policy."""
    bandit = random_bandit(2, 4, seed)
    assert bandit.reward is not None
    generator = torch_generator(seed, "policy")
    logits = torch.randn(2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    pairs = bandit.exact_pairs()

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, logits)[0]

    batch = bandit.pair_batch(logits.log_softmax(-1), pairs)
    quarter = torch.full_like(pairs.weight, 0.25)
    scored = dataclasses.replace(batch, chosen_score=quarter, rejected_score=-quarter)
    ours = gradient((pairs.weight * copg.loss(copg.Config(beta=beta), scored).values).sum())
    batch = bandit.pair_batch(logits.log_softmax(-1), pairs)
    theirs = gradient((pairs.weight * ipo.loss(ipo.Config(beta=beta), batch).values).sum())
    first = float((ours - beta / 2 * theirs).abs().max())

    policy = logits.detach().softmax(-1)
    own = Bandit.from_reward(bandit.reward, bandit.reference, policy)
    law = own.exact_pairs()
    batch = with_scores(own, own.pair_batch(logits.log_softmax(-1), law), law)
    ours = gradient((law.weight * copg.loss(copg.Config(beta=beta), batch).values).sum())
    log_probs = logits.log_softmax(-1)
    objective = (log_probs.exp() * (bandit.reward - beta * (log_probs - bandit.reference.log()))).sum(-1).mean()
    return max(first, float((ours + 2 * gradient(objective)).abs().max()))


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings)
    reward = learned_reward(lab, start, pairs, settings)
    run = lab.train("copg", "copg", model=start, data=str(pairs), reward=reward, steps=settings["steps"], checkpoint_every=0, **DPO)
    items = lab.items(settings["held_out"])
    ours, before = lab.assess("copg", run, items, reference=start), measure_common(lab, start, start, items)
    return off_policy(seed % 2**31) | {
        "largest error of the identities": identities(seed % 2**31),
        "gold win rate over SFT": wins(ours, before),
        "gold, SFT": mean_gold(before),
        "gold, CoPG": mean_gold(ours),
        "KL, CoPG": float(np.mean(ours.kl)),
    }


CLAIM = Claim(
    key="copg",
    statement="CoPG finds the optimum from off-policy data where the plain policy gradient does not, and contains IPO and the policy gradient",
    baselines=("off-policy policy gradient without importance weights", "ipo"),
    facts=(
        Fact("within 0.02 total variation of the KL-regularised optimum from data of another policy", "distance of CoPG", "<", 0.02),
        Fact("the plain policy gradient on the same data more than 0.05 away", "distance of the plain policy gradient", ">", 0.05),
        Fact("gradients equal those of IPO and of the policy gradient to 1e-8", "largest error of the identities", "<", 1e-8),
        Fact("gold win rate over the fine-tuned policy above one half on `review`", "gold win rate over SFT", ">", 0.5),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, SMOKE),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "reward_steps": 125, "steps": 120, "held_out": 256}),
    },
    notes="On text the scores are those of a reward model learned from the same pairs.",
)
