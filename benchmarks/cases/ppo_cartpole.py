"""PPO on CartPole-v1 with Stable-Baselines3's default settings and 8 environments: an iteration is 2,048 steps of each, then 10 passes in minibatches of 64."""

from __future__ import annotations

from typing import Any

from cases import _control
from cases._control import layers, nothing_to_prepare, products, returns

PEER, UNIT = "stable-baselines3", "environment_steps"
COPIES, ROLLOUT, EPOCHS, MINIBATCH = 8, 2048, 10, 64
UNITS_A_STEP = COPIES * ROLLOUT
STEPS, WARMUP = 1, 4
SETTINGS: dict[str, Any] = {"env": "CartPole-v1", "environments": COPIES, "networks": "64 x 64, tanh, actor and critic apart", "seed": 0}
prepare, compare = nothing_to_prepare, returns


def ours(settings: dict[str, Any], gate: Any) -> None:
    options = {
        "env": SETTINGS["env"],
        "num_envs": COPIES,
        "rollout_steps": ROLLOUT,
        "epochs": EPOCHS,
        "minibatch_size": MINIBATCH,
        "total_steps": UNITS_A_STEP * (settings["total_steps"] + 1),
        "lr_schedule": "constant",
    }
    _control.ours("ppo", "online._loop_on_policy", settings, gate, options, "episode/return")


def peer(settings: dict[str, Any], gate: Any) -> None:
    chosen = {"n_steps": ROLLOUT, "batch_size": MINIBATCH, "n_epochs": EPOCHS}
    _control.stable_baselines("PPO", settings, gate, SETTINGS["env"], COPIES, 0, chosen)


def limit(settings: dict[str, Any], gate: Any) -> None:
    """The learner's products; acting and the environments left out."""
    call = products(MINIBATCH, (layers(4, 64, 64, 2), "fxw"), (layers(4, 64, 64, 1), "fxw"))
    _control.limit(settings, gate, call, EPOCHS * UNITS_A_STEP // MINIBATCH)
