"""SAC on HalfCheetah-v5: one environment, networks of 256 × 256, batches of 256, an update after each step, the temperature learned."""

from __future__ import annotations

from typing import Any

from cases import _control
from cases._control import layers, nothing_to_compare, nothing_to_prepare, products

PEER, UNIT = "stable-baselines3", "environment_steps"
EVERY = 100
UNITS_A_STEP = EVERY
STEPS, WARMUP = 4, 4
SETTINGS: dict[str, Any] = {"env": "HalfCheetah-v5", "networks": "256 x 256, ReLU, two critics", "batch": 256, "seed": 0}
prepare, compare = nothing_to_prepare, nothing_to_compare


def ours(settings: dict[str, Any], gate: Any) -> None:
    options = {
        "env": SETTINGS["env"],
        "iteration_steps": EVERY,
        "start_steps": EVERY,
        "random_steps": EVERY,
        "total_steps": EVERY * (settings["total_steps"] + 1),
        "batch_size": SETTINGS["batch"],
    }
    _control.ours("sac", "online._loop_off_policy", settings, gate, options, "episode/return")


def peer(settings: dict[str, Any], gate: Any) -> None:
    _control.stable_baselines("SAC", settings, gate, SETTINGS["env"], 1, EVERY, {"learning_starts": EVERY, "batch_size": SETTINGS["batch"]})


def limit(settings: dict[str, Any], gate: Any) -> None:
    """Two critics forward and backward on the batch; policy and slow critics on the next states; the policy forward and backward through the critics."""
    critic, policy = layers(23, 256, 256, 1), layers(17, 256, 256, 12)
    call = products(
        SETTINGS["batch"],
        (critic, "fxw"),
        (critic, "fxw"),
        (policy, "f"),
        (critic, "f"),
        (critic, "f"),
        (policy, "fxw"),
        (critic, "fx"),
        (critic, "fx"),
    )
    _control.limit(settings, gate, call, EVERY)
