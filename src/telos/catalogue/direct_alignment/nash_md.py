"""Nash-MD and Nash-EMA (S141): their last iterates reach the regularised equilibrium of a cyclic game in which self-play circles."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telos.algorithms.language import nash_md
from telos.catalogue._exact_iterative import mirror_step
from telos.catalogue._review import SMOKE, learned_reward, mean_gold, measure_common, preferences, starting_policy, wins
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.core.seeds import numpy_generator
from telos.environments.bandit import Bandit, random_bandit, rock_paper_scissors, total_variation
from telos.functional.equilibria import regularised_gap, regularised_nash

# An iteration is one on-policy optimiser step, so there are four times as many as of methods that take four steps in each.
NASH_MD: dict[str, Any] = {
    "minibatch_size": 64,  # never fewer than the prompts of an iteration
    "samples_per_prompt": 1,
    "tau": 0.008,
    "mixture": 0.125,
    "learning_rate": 1e-4,
    "max_completion_length": 72,
}
ETA, TAU, AVERAGE_SHARE = 5.0, 0.1, 0.05
ITERATIONS, LATE = 600, 100


def random_cycles(seed: int) -> Bandit:
    """Three games of rock-paper-scissors, each with one advantage a from 0.4 to 0.5 and the uniform reference, which is the equilibrium for every τ.

    With the step η = 5 and τ = 0.1 a mirror step's linearisation there has eigenvalues of the size |½ ± 5iσ| in self-play and ½|1 ± 5iσ| against the
    mixture of the share ητ = ½, where σ = a/√3: the first is unstable from a = 0.3 on, the second stable up to a = 0.6.
    """
    advantages = numpy_generator(seed, "claim", "cycle").uniform(0.4, 0.5, 3)
    games = [rock_paper_scissors(advantages=(a,) * 3, reference=(1 / 3,) * 3) for a in advantages.tolist()]
    reference = torch.cat([game.reference for game in games])
    return Bandit(reference, reference, torch.cat([game.preference for game in games]))


def step(bandit: Bandit, policy: Tensor, opponent: Tensor, eta: float, tau: float) -> Tensor:
    return mirror_step(functools.partial(nash_md.loss, nash_md.Config(tau=tau)), bandit, policy, opponent, eta)


def mixture(bandit: Bandit, policy: Tensor, share: float) -> Tensor:
    return torch.softmax((1 - share) * policy.log() + share * bandit.reference.log(), -1)


def distance(policy: Tensor, wanted: Tensor) -> float:
    """The largest total variation over contexts."""
    return float(total_variation(policy, wanted).max())


def fixed_step(seed: int) -> dict[str, float]:
    """Distances to the equilibrium regularised with τ after equal mirror steps on the method's loss, which differ in the opponent alone."""
    bandit = random_cycles(seed)
    wanted = torch.from_numpy(regularised_nash(bandit.preference, bandit.reference, TAU).policy)
    start = torch.softmax(torch.from_numpy(0.5 * numpy_generator(seed, "claim", "start").normal(size=(3, 3))), -1)
    policies = dict.fromkeys(("Nash-MD", "Nash-EMA", "self-play"), start)
    average, late = start.log(), []
    for _ in range(ITERATIONS):
        opponents = {
            "Nash-MD": mixture(bandit, policies["Nash-MD"], ETA * TAU),
            "Nash-EMA": average.softmax(-1),
            "self-play": policies["self-play"],
        }
        policies = {name: step(bandit, policy, opponents[name], ETA, TAU) for name, policy in policies.items()}
        average = torch.lerp(average, policies["Nash-EMA"].log(), AVERAGE_SHARE)  # weights of a tabular policy are its log-probabilities
        late = [*late, distance(policies["self-play"], wanted)][-LATE:]
    found = {f"distance of {name}": distance(policy, wanted) for name, policy in policies.items()}
    gaps = {name: float(regularised_gap(policy, bandit.preference, bandit.reference, TAU).max()) for name, policy in policies.items()}
    return found | {f"regularised gap of {name}": gap for name, gap in gaps.items()} | {"smallest late distance of self-play": min(late)}


def falling_steps(seed: int, iterations: int = 600, tau: float = 0.3) -> dict[str, float]:
    """Nash-MD with the steps of the paper's proof, η_t = 2/(τ (t + 2)) against the mixture of the share η_t τ, on a random intransitive game."""
    bandit = random_bandit(2, 4, seed, preference="intransitive")
    wanted = torch.from_numpy(regularised_nash(bandit.preference, bandit.reference, tau).policy)
    policy = bandit.reference
    for t in range(iterations):
        eta = 2 / (tau * (t + 2))
        policy = step(bandit, policy, mixture(bandit, policy, eta * tau), eta, tau)
    return {
        "distance of Nash-MD, random game": distance(policy, wanted),
        "distance of the start, random game": distance(bandit.reference, wanted),
    }


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    reward = learned_reward(lab, start, preferences(lab, start, settings), settings)
    run = lab.train(
        "nash-md",
        "nash-md",
        model=start,
        data="review",
        reward=[reward],
        steps=4 * settings["iterations"],
        checkpoint_every=0,
        batch_size=settings["prompts"],
        **NASH_MD,
    )
    items = lab.items(settings["held_out"])
    ours, before = lab.assess("nash-md", run, items, reference=start), measure_common(lab, start, start, items)
    return (
        fixed_step(seed % 2**31)
        | falling_steps(seed % 2**31)
        | {
            "win rate over SFT": wins(ours, before),
            "gold, SFT": mean_gold(before),
            "gold, Nash-MD": mean_gold(ours),
            "KL, Nash-MD": float(np.mean(ours.kl)),
        }
    )


CLAIM = Claim(
    key="nash-md",
    statement="The last iterates of Nash-MD and Nash-EMA go to the regularised equilibrium of a cyclic preference, where self-play keeps circling",
    baselines=("self-play",),
    facts=(
        Fact(
            "Nash-MD's last iterate within 0.01 total variation of the regularised equilibrium of a cycle", "distance of Nash-MD", "<", 0.01
        ),
        Fact("Nash-EMA's last iterate within 0.01 total variation of it", "distance of Nash-EMA", "<", 0.01),
        Fact(
            "with the same step none of self-play's last 100 iterates within 0.05 of it", "smallest late distance of self-play", ">", 0.05
        ),
        Fact(
            "Nash-MD's last iterate within 0.01 of the equilibrium of a random intransitive game, with the proof's falling steps",
            "distance of Nash-MD, random game",
            "<",
            0.01,
        ),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "prompts": 16}),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "reward_steps": 125, "iterations": 15, "prompts": 64, "held_out": 256}),
    },
    notes="The cycles are games of rock-paper-scissors with a uniform reference, where a fixed share of the mixture does not move the equilibrium, "
    "and a fixed step so large that self-play does not settle: with small or falling steps the regularisation would settle self-play too. On text "
    "Nash-MD plays by the Bradley–Terry preference of a learned reward, and its win rate is a figure beside the facts.",
)
