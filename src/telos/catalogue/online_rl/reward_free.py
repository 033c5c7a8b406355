"""Reward-free exploration (S137): planning errors that do not grow with the horizon and fall as the root of the episodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from telos.algorithms.online.reward_free import estimate, plan_for
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Stages
from telos.core.seeds import derive, numpy_generator
from telos.environments.linear_mixture import linear_mixture, unit_rewards
from telos.environments.tabular import greedy

SETTINGS: dict[str, Any] = {
    "env": "telos/LinearMixture-v0",
    "batch_episodes": 4,
    "eval_episodes": 1,
    "checkpoint_every": 0,
    "log_every": 50,
}
REVEALED = 40  # rewards that are planned for after each exploration
HORIZON = 16  # where episodes are varied


@dataclasses.dataclass(frozen=True)
class Errors:
    """Of planning for rewards that were revealed afterwards, over instances and rewards."""

    value: float  # root of the mean square of (planned value − true value of the planned policy)
    loss: float  # mean of (optimal value − true value of the planned policy)


def errors(stages: Stages, instances: int, horizon: int, episodes: int, weighting: str) -> Errors:
    """Explores `instances` random processes without a reward, then plans for each revealed one."""
    apart, lost = [], []
    for i in range(instances):
        instance = derive(stages.seed, "instance", i) % 10**6
        run = stages.train(
            f"{weighting}-{horizon}-{episodes}-{i}",
            "reward-free",
            env_options=[f"horizon={horizon}", f"seed={instance}"],
            episodes=episodes,
            weighting=weighting,
            **SETTINGS,
        )
        process = linear_mixture(seed=instance, horizon=horizon)
        theta = estimate(load_file(run.path / "policy" / "by_step.safetensors"))[0]
        rewards = unit_rewards(REVEALED, process.states, process.actions, horizon, numpy_generator(stages.seed, "revealed", i))
        values, actions = plan_for(process.models, theta, rewards, horizon)
        for c, reward in enumerate(rewards):
            told = dataclasses.replace(process, rewards=reward)
            reached = told.performance(greedy(actions[:, c]))
            apart.append(float(process.start @ values[0, c]) - reached)
            lost.append(float(process.start @ told.optimal().state[0]) - reached)
    return Errors(float(np.sqrt(np.mean(np.square(apart)))), float(np.mean(lost)))


def exponent(x: list[int], y: list[float]) -> float:
    """The slope of log y over log x; errors below 1e-9 count as that."""
    return float(np.polyfit(np.log(x), np.log(np.maximum(y, 1e-9)), 1)[0])


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    stages = Stages(root, seed, watch)
    n, horizons, episodes = settings["instances"], list(settings["horizons"]), list(settings["episodes"])
    by_horizon = {w: [errors(stages, n, h, settings["episodes_of_horizons"], w) for h in horizons] for w in ("variance", "none")}
    by_episodes = [errors(stages, settings["instances_of_episodes"], HORIZON, k, "variance") for k in episodes]
    over = {w: exponent(horizons, [e.value for e in found]) for w, found in by_horizon.items()}
    return {
        "value error over horizon, exponent": over["variance"],
        "value error over horizon, exponent above the unweighted": over["variance"] - over["none"],
        "value error over episodes, exponent": exponent(episodes, [e.value for e in by_episodes]),
        "loss over episodes, exponent": exponent(episodes, [e.loss for e in by_episodes]),
        "value error over horizon, exponent, unweighted": over["none"],
        **{f"value error, horizon {h}": e.value for h, e in zip(horizons, by_horizon["variance"])},
        **{f"value error, horizon {h}, unweighted": e.value for h, e in zip(horizons, by_horizon["none"])},
        **{f"loss, horizon {h}": e.loss for h, e in zip(horizons, by_horizon["variance"])},
        **{f"value error, {k} episodes": e.value for k, e in zip(episodes, by_episodes)},
        **{f"loss, {k} episodes": e.loss for k, e in zip(episodes, by_episodes)},
    }


CLAIM = Claim(
    key="reward-free",
    statement="Reward-free exploration with variance-weighted regression plans for revealed rewards with an error that does not grow with the horizon and "
    "falls with the root of the episodes",
    baselines=("the same with unweighted regression",),
    facts=(
        Fact(
            "the error of planned values grows with at most the power 0.15 of the horizon", "value error over horizon, exponent", "<", 0.15
        ),
        Fact(
            "its exponent is at least 0.1 below that of unweighted regression",
            "value error over horizon, exponent above the unweighted",
            "<",
            -0.1,
        ),
        Fact("ε⁻²: the error falls about as the root of the episodes: not faster", "value error over episodes, exponent", ">", -0.75),
        Fact("ε⁻²: and not more slowly", "value error over episodes, exponent", "<", -0.35),
        Fact("what the planned policies lose falls at least as fast", "loss over episodes, exponent", "<", -0.35),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(
            1, {"instances": 1, "instances_of_episodes": 1, "horizons": (8, 16), "episodes_of_horizons": 32, "episodes": (16, 64)}
        ),
        "full": Budget(
            5,
            {
                "instances": 4,
                "instances_of_episodes": 8,
                "horizons": (8, 32, 128),
                "episodes_of_horizons": 512,
                "episodes": (64, 256, 1024),
            },
        ),
    },
    notes="Processes of 6 states and 3 actions that mix 4 models; an episode makes about 6 moves whatever its horizon is, so that each tells as much and total "
    "rewards lie between 0 and 1. Candidate rewards are drawn where the paper has an oracle; confidence widths are a constant.",
)
