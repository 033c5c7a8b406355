"""HNPG (S27): on-policy natural gradients with a critic that also learns off-policy from offline data open a rich-observation lock sooner than hybrid
Q-learning does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Stages
from telos.core.run import Run
from telos.core.seeds import derive, numpy_generator
from telos.environments.base import Driver
from telos.environments.rich_lock import RichLock

COPIES, EVALUATIONS = 32, 20
HYBRID: dict[str, Any] = {"max_kl": 0.03, "round_steps": 20, "minibatch_size": 0, "online_weight": 1.0}
HY_Q: dict[str, Any] = {
    "num_envs": 4,
    "train_every": 4,
    "batch_size": 128,
    "hidden": [64, 64],
    "target_every": 100,
    "replay_on_disk": False,
}
TRPO: dict[str, Any] = {"minibatch_size": 0, "gae_lambda": 1.0, "max_kl": 0.03}


def write_data(path: Path, seed: int, horizon: int, noise: float, episodes: int) -> None:
    """Episodes of the right actions with a random one in every H-th step on average, in D4RL's layout, as the authors collect them."""
    lock = RichLock("telos/RichLock-v0", 100, horizon=horizon, noise=noise, seed=derive(seed, "lock") % 2**31)
    driver, draws = Driver(lock, seed, "data"), numpy_generator(seed, "data")
    rows: list[tuple[np.ndarray, ...]] = []
    for _ in range(horizon * -(-episodes // 100)):
        observation = np.array(driver.observation)
        action = np.where(draws.random(100) < 1 / horizon, draws.integers(10, size=100), lock.best())
        outcome, _ = driver.step(action)
        rows.append((observation, action, outcome.reward, np.array(outcome.observation), outcome.terminated))
    names = ("observations", "actions", "rewards", "next_observations", "terminals")
    joined: dict[str, Any] = {name: np.stack(part, 1).reshape(-1, *part[0].shape[1:]) for name, part in zip(names, zip(*rows), strict=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **joined, timeouts=np.zeros(len(joined["rewards"]), bool))


def curve(run: Run) -> list[float]:
    """The returns of the evaluations, which lie at equal distances."""
    return [row["evaluation/return"] for row in run.metrics() if "evaluation/return" in row] + [
        run.facts["evaluation"]["evaluation/return"]
    ]


def half(returns: list[float]) -> float:
    """The share of the steps after which more than half of the best return is first had, 1.05 where it never is (the paper counts the steps until then)."""
    return next((i + 1 for i, value in enumerate(returns) if value > 0.5), 1.05 * len(returns)) / len(returns)


def case(
    stages: Stages, name: str, horizon: int, noise: float, settings: Mapping[str, Any], others: tuple[str, ...]
) -> dict[str, list[float]]:
    """Returns over learning in one lock by HNPG, Hy-Q and `others`, from the same data and equally many online steps."""
    seed, steps = stages.seed, settings["steps"]
    data = stages.folder(f"{name}.npz")
    if not data.exists():
        write_data(partial := stages.folder("partial.npz"), seed, horizon, noise, settings["episodes"])
        partial.replace(data)
    lock = {"env": "telos/RichLock-v0", "env_options": [f"horizon={horizon}", f"noise={noise}", f"seed={derive(seed, 'lock') % 2**31}"]}
    common = {**lock, "checkpoint_every": 0, "eval_episodes": 100}
    met = {**common, "total_steps": steps}
    every = max(4, steps // EVALUATIONS // 4 * 4)
    on_policy = {**met, "num_envs": COPIES, "rollout_steps": horizon, "eval_every": max(1, steps // (COPIES * horizon) // EVALUATIONS)}
    off_policy = {
        **met,
        "iteration_steps": every,
        "eval_every": 1,
        "start_steps": every,
        "random_steps": every,
        "epsilon_steps": steps // 3,
    }
    options: dict[str, dict[str, Any]] = {
        "hnpg": {**on_policy, **HYBRID, "data": str(data)},
        "hy-q": {**off_policy, **HY_Q, "data": str(data)},
        "trpo": {**on_policy, **TRPO},
        "bc": {**common, "data": str(data), "updates": settings["updates"], "hidden": [64, 64]},
    }
    return {key: curve(stages.train(f"{name}-{key}", key, **options[key])) for key in ("hnpg", "hy-q", *others)}


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    stages = Stages(root, seed, watch)
    figures: dict[str, float] = {}
    for name, others in (("clear", ("trpo", "bc")), ("blurred", ("bc",))):
        horizon, noise = settings[name]
        curves = case(stages, name, horizon, noise, settings, others)
        area = {key: float(np.mean(returns)) for key, returns in curves.items()}
        figures[f"{name}: mean return over learning, HNPG over Hy-Q"] = area["hnpg"] - area["hy-q"]
        figures[f"{name}: last return, HNPG over Hy-Q"] = curves["hnpg"][-1] - curves["hy-q"][-1]
        for key, returns in curves.items():
            figures[f"{name}: last return, {key}"] = returns[-1]
            if key != "bc":
                figures |= {
                    f"{name}: mean return over learning, {key}": area[key],
                    f"{name}: share of the steps until half, {key}": half(returns),
                }
    return figures | {"clear: last return, HNPG over TRPO": figures["clear: last return, hnpg"] - figures["clear: last return, trpo"]}


CLAIM = Claim(
    key="hnpg",
    statement="HNPG opens a rich-observation lock where on-policy learning alone fails, and learns faster than hybrid Q-learning from the same data and "
    "samples, whether observations tell the state or not",
    baselines=("hy-q", "trpo", "bc"),
    facts=(
        Fact("clear: mean return over learning above Hy-Q's", "clear: mean return over learning, HNPG over Hy-Q", ">", 0.0),
        Fact("blurred: mean return over learning above Hy-Q's", "blurred: mean return over learning, HNPG over Hy-Q", ">", 0.0),
        Fact("clear: last return at most 0.05 below Hy-Q's", "clear: last return, HNPG over Hy-Q", ">", -0.05),
        Fact("clear: last return above TRPO's by more than 0.5", "clear: last return, HNPG over TRPO", ">", 0.5),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {"clear": (3, 0.1), "blurred": (2, 0.4), "steps": 960, "episodes": 200, "updates": 50}),
        "full": Budget(5, {"clear": (10, 0.1), "blurred": (5, 0.4), "steps": 25_600, "episodes": 2000, "updates": 1000}),
    },
    notes="Locks of 10 and 5 steps with 10 discrete actions, 2,000 episodes of data and 25,600 online samples, where the paper has continuous actions, up to "
    "50 steps, 50,000 episodes and millions of samples; one network for all steps where the authors have one for each. The hybrid off-policy baseline is DQN "
    "with half of its loss from the data (Hy-Q; the paper's is RLPD). In clear locks of up to 15 steps the paper, too, finds that its baseline needs fewer "
    "samples (on a tuning seed Hy-Q was the quicker one here as well). In the blurred lock, in "
    "the place of the paper's pictures, state and step can be told from the observation in about four of five cases. The data follow the right actions but "
    "for one step in H, so that cloning them already does well: it is reported beside.",
)
