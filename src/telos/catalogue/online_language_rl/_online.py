"""What recipes of online RL share: the scene on `review`, a PPO baseline with checkpoints, comparisons at equal KL and along a run, and answers of one token
on `bandit` with the gradient that a method makes of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from telos.algorithms.language.assess import Assessment
from telos.catalogue._review import SMOKE, learned_reward, measure_common, preferences, reach, starting_policy
from telos.catalogue.direct_alignment.dpo import PPO
from telos.catalogue.lab import Lab, commons, named
from telos.core.run import Run
from telos.environments.bandit import Bandit
from telos.environments.text.base import Item
from telos.functional.policy import Estimates, PolicyView, Scored

Trajectory = list[tuple[int, Assessment]]
SMALL: Mapping[str, Any] = {**SMOKE, "small": {"batch_size": 4, "minibatch_size": 4, "epochs": 1, "max_completion_length": 16}}
SPREAD = 0.36  # deviation of the learned reward over the start's answers, measured on a tuning seed: what PPO divides its scores by


@dataclass(frozen=True)
class Scene:
    """What a recipe on `review` starts from."""

    lab: Lab
    start: str  # folder of the starting policy
    pairs: Path  # preferences between two of its answers
    reward: str  # folder of the reward learned from them
    items: list[Item]  # held out
    before: Assessment  # of the start


def prepare(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None, noise: float = 0.0) -> Scene:
    """The common starting policy, preferences (a share `noise` of them flipped), learned reward and held-out prompts."""
    lab = Lab(root, "review", seed, watch)
    start = starting_policy(lab, settings)
    pairs = preferences(lab, start, settings, noise)
    reward = learned_reward(lab, start, pairs, settings)
    items = lab.items(settings["held_out"])
    return Scene(lab, start, pairs, reward, items, measure_common(lab, start, start, items, reward))


def learn(scene: Scene, name: str, method: str, settings: Mapping[str, Any], **options: Any) -> Run:
    """Online training against the learned reward, with checkpoints at each sixth of the way. `settings["small"]` overrides options in smoke runs."""
    iterations = settings["iterations"]
    fixed = {"model": scene.start, "data": "review", "reward": [scene.reward], "steps": iterations}
    often = {"checkpoint_every": iterations // 6 or iterations, "keep_checkpoints": 8}
    return scene.lab.train(name, method, **{**fixed, **often, **options, **settings.get("small", {})})


def trajectory(scene: Scene, run: Run) -> Trajectory:
    """Held-out assessments of the start and of the run's checkpoints."""
    return scene.lab.trajectory(run, scene.items, reference=scene.start, reward=scene.reward, start=scene.before)


def final(scene: Scene, run: Run) -> Assessment:
    return scene.lab.assess(run.path.name, run, scene.items, reference=scene.start, reward=scene.reward)


def ppo_baseline(scene: Scene, settings: Mapping[str, Any]) -> Trajectory:
    """PPO from the same start against the same reward; made once for all recipes."""
    depends = {"start": scene.start, "reward": scene.reward, "prompts": [item.prompt for item in scene.items]}
    name = named("ppo", **depends, **PPO, iterations=settings["iterations"], small=settings.get("small"))
    shared = dataclasses.replace(scene, lab=commons(scene.lab))
    return trajectory(shared, learn(shared, name, "ppo-max", settings, **PPO))


# Comparisons ------------------------------------------------------------------------------------------------------------------------------------------


def mean_proxy(found: Assessment) -> float:
    return float(np.mean(found.proxy))


def mean_kl(found: Assessment) -> float:
    return float(np.mean(found.kl))


def gap_at_equal_kl(ours: Trajectory, theirs: Trajectory, value: Callable[[Assessment], float], points: int = 40) -> float:
    """Mean of ours less theirs over KLs from 0 to what both have reached, evenly spaced.

    Between checkpoints a value is interpolated linearly in √KL, in which rewards of short optimisation are nearly linear (Gao et al. 2023)."""
    common = max(0.0, min(reach(ours), reach(theirs)))
    where = np.sqrt(np.linspace(0, common, points + 1)[1:])

    def along(path: Trajectory) -> np.ndarray:
        found = sorted((max(0.0, mean_kl(a)) ** 0.5, value(a)) for _, a in path)
        return np.interp(where, [x for x, _ in found], [y for _, y in found])

    return float(np.mean(along(ours) - along(theirs)))


def mean_over_run(path: Trajectory, value: Callable[[Assessment], float]) -> float:
    """The area under `value` along a run over the run's length."""
    steps, values = [step for step, _ in path], [value(a) for _, a in path]
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))


def first_step_at(path: Trajectory, level: float, value: Callable[[Assessment], float]) -> float:
    """The step at which `value` first is `level`, linear between checkpoints; the last step if it never is."""
    for (a, before), (b, after) in itertools.pairwise(path):
        low, high = value(before), value(after)
        if high >= level:
            return a if low >= level else a + (b - a) * (level - low) / (high - low)
    return path[-1][0]


# Answers of one token ---------------------------------------------------------------------------------------------------------------------------------


def one_token(bandit: Bandit, policy: Tensor, context: Tensor, drawn: Tensor, scores: Tensor | None = None) -> Scored:
    """Answers `drawn` [N] that `policy` [C, A] (probabilities) gave in contexts [N], each context a prompt. Scores are gold rewards unless given; the
    greedy answer is the policy's likeliest."""
    assert bandit.reward is not None
    here = (context, drawn)
    old = policy.log()[here][:, None]
    greedy = bandit.reward[torch.arange(bandit.contexts), policy.argmax(1)][context]
    scores = bandit.reward[here] if scores is None else scores
    mask = torch.ones_like(old, dtype=torch.bool)
    return Scored(mask, old, bandit.reference.log()[here][:, None], torch.zeros_like(old), scores, mask[:, 0], context, greedy=greedy)


def losses_of(method: Any, config: Any, scored: Scored, logprobs: Tensor) -> Tensor:
    """The method's loss of each answer [N] at log-probabilities [N, 1] of the policy that learns."""
    found: Estimates = method.estimate(config, scored, {})
    entropy = torch.zeros_like(logprobs)
    view = PolicyView(logprobs, entropy, scored.logprobs, scored.reference, found.advantages, scored.mask, scored.group, found.extra)
    return method.loss(config, view).values.reshape(len(scored.scores), -1).sum(1)


def logit_gradient(method: Any, config: Any, scored: Scored, logits: Tensor, context: Tensor, drawn: Tensor) -> Tensor:
    """The gradient [C, A] of the mean loss in the logits [C, A] of the policy that learns."""
    logits = logits.detach().requires_grad_()
    logprobs = logits.log_softmax(-1)[context, drawn][:, None]
    return torch.autograd.grad(losses_of(method, config, scored, logprobs).mean(), logits)[0]
