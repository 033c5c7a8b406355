"""PPO on HalfCheetah-v5 with 8 environments: an iteration is 256 steps of each, then 10 passes in minibatches of 64; Stable-Baselines3's other defaults.

The limit is MuJoCo's stepping alone, by our batched task with random actions.
"""

from __future__ import annotations

from typing import Any

from cases._control import nothing_to_prepare, our_ppo, returns, their_ppo

PEER, UNIT = "stable-baselines3", "environment_steps"
COPIES, ROLLOUT, EPOCHS, MINIBATCH = 8, 256, 10, 64
UNITS_A_STEP = COPIES * ROLLOUT
STEPS, WARMUP = 4, 4
SETTINGS: dict[str, Any] = {
    "env": "HalfCheetah-v5",
    "environments": COPIES,
    "rollout": ROLLOUT,
    "epochs": EPOCHS,
    "minibatch": MINIBATCH,
    "networks": "64 x 64, tanh, actor and critic apart",
    "seed": 0,
}
prepare, ours, peer, compare = nothing_to_prepare, our_ppo, their_ppo, returns


def limit(settings: dict[str, Any], gate: Any) -> None:
    import numpy as np

    from telos.environments.base import Driver
    from telos.environments.registry import make_environments

    driver = Driver(make_environments(SETTINGS["env"], COPIES), 0)
    actions = np.random.default_rng(0).uniform(-1, 1, (ROLLOUT, COPIES, 6)).astype(np.float32)
    gate.begin()
    while True:
        for action in actions:
            driver.step(action)
        gate.step()
