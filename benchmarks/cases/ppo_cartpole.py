"""PPO on CartPole-v1 with Stable-Baselines3's default settings and 8 environments: an iteration is 2,048 steps of each, then 10 passes in minibatches of 64."""

from __future__ import annotations

from typing import Any

from cases import _control
from cases._control import layers, nothing_to_prepare, our_ppo, products, returns, their_ppo

PEER, UNIT = "stable-baselines3", "environment_steps"
COPIES, ROLLOUT, EPOCHS, MINIBATCH = 8, 2048, 10, 64
UNITS_A_STEP = COPIES * ROLLOUT
STEPS, WARMUP = 1, 4
SETTINGS: dict[str, Any] = {
    "env": "CartPole-v1",
    "environments": COPIES,
    "rollout": ROLLOUT,
    "epochs": EPOCHS,
    "minibatch": MINIBATCH,
    "networks": "64 x 64, tanh, actor and critic apart",
    "seed": 0,
}
prepare, ours, peer, compare = nothing_to_prepare, our_ppo, their_ppo, returns


def limit(settings: dict[str, Any], gate: Any) -> None:
    """The learner's products; acting and the environments left out."""
    call = products(MINIBATCH, (layers(4, 64, 64, 2), "fxw"), (layers(4, 64, 64, 1), "fxw"))
    _control.limit(settings, gate, call, EPOCHS * UNITS_A_STEP // MINIBATCH)
