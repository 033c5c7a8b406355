"""f-DPG (S128): DPG and RLHF as special cases, gradient by gradient on `bandit`; Jensen–Shannon between them in alignment and in diversity."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telos.algorithms.language import f_dpg
from telos.catalogue._review import mean_gold
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.online_language_rl._online import SMALL, final, learn, logit_gradient, mean_kl, mean_proxy, one_token, prepare
from telos.core.run import Run
from telos.core.seeds import derive, numpy_generator
from telos.environments.bandit import TabularPolicy, fit, random_bandit
from telos.functional.divergences import divergence, entropy, kl
from telos.functional.equilibria import kl_optimum

DIVERGENCES = ("forward-kl", "jensen-shannon", "reverse-kl")
SHORT = {"forward-kl": "forward", "jensen-shannon": "JS", "reverse-kl": "reverse"}
# β: about half of the deviation of the learned reward over the start's answers, so that the target is some 1.5 nats away.
F_DPG: dict[str, Any] = {
    "batch_size": 8,
    "samples_per_prompt": 16,
    "minibatch_size": 32,
    "learning_rate": 1e-4,
    "beta": 0.2,
    "max_completion_length": 72,
    "checkpoint_every": 0,
}


def special_cases(seed: int, answers: int = 64, beta: float = 0.5) -> dict[str, float]:
    """The largest difference of the method's gradient from the exact one of each divergence, over the exact one's largest entry.

    Each response stands in the group as often as the policy writes it in `answers` answers, so that the group is the expectation and its Z exact.
    DPG's gradient is that of the cross-entropy of the target, RLHF's that of E[r] − β KL(π‖π_ref) over β; those two are worked out without f."""
    bandit = random_bandit(3, 6, seed)
    assert bandit.reward is not None
    generator = numpy_generator(seed, "policy")
    counts = np.stack([1 + generator.multinomial(answers - 6, np.full(6, 1 / 6)) for _ in range(3)])
    context = torch.arange(3).repeat_interleave(answers)
    drawn = torch.from_numpy(np.concatenate([np.repeat(np.arange(6), row) for row in counts]))
    logits = torch.from_numpy(counts / answers).log()
    scored = one_token(bandit, logits.exp(), context, drawn)
    target = torch.as_tensor(kl_optimum(bandit.reward, bandit.reference, beta)).log()
    reward, reference = bandit.reward, bandit.reference.log()

    def exact(name: str, log_probs: Tensor) -> Tensor:
        if name == "forward-kl":
            return kl(target, log_probs).mean()
        if name == "reverse-kl":
            return -(log_probs.exp() * (reward - beta * (log_probs - reference))).sum(-1).mean() / beta
        return divergence(name, log_probs, target).mean()

    def difference(name: Any) -> float:
        config = f_dpg.Config(samples_per_prompt=answers, divergence=name, beta=beta, ratio_bound=100.0)
        ours = logit_gradient(f_dpg, config, scored, logits, context, drawn) * (answers - 1) / answers  # the baseline leaves one out
        leaf = logits.clone().requires_grad_()
        (theirs,) = torch.autograd.grad(exact(name, leaf.log_softmax(-1)), leaf)
        return float((ours - theirs).abs().max() / theirs.abs().max())

    return {f"gradient's difference, {name}": difference(name) for name in (*DIVERGENCES, "total-variation")}


def between(middle: float, one: float, other: float) -> float:
    """How far `middle` lies inside of the other two; negative outside."""
    return min(middle - min(one, other), max(one, other) - middle)


def blind_policies(seed: int, bandits: int = 40, beta: float = 0.25) -> dict[str, float]:
    """Optima of a policy that cannot see its context and so cannot reach the targets, in exact expectation: E[r] and entropy, means over bandits."""
    rewards: dict[str, list[float]] = {name: [] for name in DIVERGENCES}
    entropies: dict[str, list[float]] = {name: [] for name in DIVERGENCES}
    for index in range(bandits):
        bandit = random_bandit(4, 8, derive(seed, "bandit", index) % 2**31)
        assert bandit.reward is not None
        target = torch.as_tensor(kl_optimum(bandit.reward, bandit.reference, beta)).log()

        def distance(name: str, log_probs: Tensor, target: Tensor = target) -> Tensor:
            return divergence(name, log_probs.expand_as(target), target).mean()

        for name in DIVERGENCES:
            policy = TabularPolicy(bandit.reference.mean(0, keepdim=True))
            fit(policy, functools.partial(distance, name), steps=200)
            rewards[name].append(float((policy.probs() * bandit.reward).sum(-1).mean()))
            entropies[name].append(float(entropy(policy.log_probs().detach())))
    reward = {name: float(np.mean(values)) for name, values in rewards.items()}
    spread = {name: float(np.mean(values)) for name, values in entropies.items()}
    forward, js, reverse = DIVERGENCES
    return {
        "JS inside in reward, blind policies": between(reward[js], reward[forward], reward[reverse]),
        "JS inside in entropy, blind policies": between(spread[js], spread[forward], spread[reverse]),
        **{f"reward, {SHORT[name]}, blind policies": reward[name] for name in DIVERGENCES},
        **{f"entropy, {SHORT[name]}, blind policies": spread[name] for name in DIVERGENCES},
    }


def answer_entropy(run: Run, last: int = 5) -> float:
    """Entropy of an answer in nats, by the chain rule the sum of its tokens' entropies: mean over the answers of the last iterations."""
    rows = run.metrics()[-last:]
    return float(np.mean([row["entropy"] * row["completions/mean_length"] for row in rows]))


def distinct(texts: tuple[str, ...]) -> float:
    """Share of different ones among all pairs of neighbouring words (Li et al. 2016)."""
    pairs = [pair for text in texts for pair in itertools.pairwise(text.split())]
    return len(set(pairs)) / max(1, len(pairs))


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    scene = prepare(root, seed, settings, watch)
    figures = special_cases(seed % 2**31) | blind_policies(seed % 2**31, settings["bandits"])
    reward, spread = {}, {}
    for name in DIVERGENCES:
        run = learn(scene, name, "f-dpg", settings, divergence=name, **F_DPG)
        found = final(scene, run)
        reward[name], spread[name] = mean_proxy(found), answer_entropy(run)
        short = SHORT[name]
        figures |= {
            f"learned reward, {short}": reward[name],
            f"entropy of answers [nats], {short}": spread[name],
            f"distinct pairs of words, {short}": distinct(found.texts),
            f"gold, {short}": mean_gold(found),
            f"KL, {short}": mean_kl(found),
        }
    forward, js, reverse = DIVERGENCES
    return figures | {
        "JS inside in learned reward": between(reward[js], reward[forward], reward[reverse]),
        "JS inside in entropy of answers [nats]": between(spread[js], spread[forward], spread[reverse]),
        "learned reward, SFT": mean_proxy(scene.before),
        "gold, SFT": mean_gold(scene.before),
        "distinct pairs of words, SFT": distinct(scene.before.texts),
    }


CLAIM = Claim(
    key="f-dpg",
    statement="f-DPG is DPG in forward KL and KL-regularised RLHF in reverse KL, and in Jensen–Shannon lies between them in alignment and diversity",
    baselines=("f-dpg --divergence forward-kl", "f-dpg --divergence reverse-kl"),
    facts=(
        Fact("the forward KL's gradient is DPG's to 1e-5 on `bandit`", "gradient's difference, forward-kl", "<", 1e-5),
        Fact("the reverse KL's gradient is RLHF's to 1e-5 on `bandit`", "gradient's difference, reverse-kl", "<", 1e-5),
        Fact("Jensen–Shannon's gradient is exact to 1e-5 on `bandit`", "gradient's difference, jensen-shannon", "<", 1e-5),
        Fact(
            "a blind policy's expected reward in JS lies between the others' on `bandit`", "JS inside in reward, blind policies", ">", 0.0
        ),
        Fact("a blind policy's entropy in JS lies between the others' on `bandit`", "JS inside in entropy, blind policies", ">", 0.0),
        Fact(
            "expected target reward in JS lies between the others' on `review`, up to 0.03, about the standard error of a mean",
            "JS inside in learned reward",
            ">",
            -0.03,
        ),
        Fact(
            "entropy of answers in JS lies between the others' on `review`, up to 1 nat",
            "JS inside in entropy of answers [nats]",
            ">",
            -1.0,
        ),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMALL, "small": {**SMALL["small"], "batch_size": 2, "minibatch_size": 16}, "bandits": 4}),
        "full": Budget(3, {"sft_steps": 60, "pairs": 2000, "reward_steps": 125, "iterations": 15, "held_out": 256, "bandits": 40}),
    },
    notes="A tabular policy that sees its context reaches the target in every divergence; a policy that does not see it shows what each gives up. On text the "
    "target is tilted by the learned reward, of a 4.2 M-parameter model.",
)
