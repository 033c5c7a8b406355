"""TD3+BC on data of Hopper's sizes: networks of 256 × 256, two critics, batches of 256, the policy at every second update."""

from __future__ import annotations

from typing import Any

from cases import _control
from cases._control import ACTION, OBSERVATION, ROWS, layers, nothing_to_compare, products, write_data

PEER, UNIT, UNITS_A_STEP = "d3rlpy", "updates", 50
STEPS, WARMUP = 4, 2
SETTINGS: dict[str, Any] = {"updates_a_step": UNITS_A_STEP, "batch": ROWS, "networks": "256 x 256, ReLU", "seed": 0}
prepare, compare = write_data, nothing_to_compare


def ours(settings: dict[str, Any], gate: Any) -> None:
    _control.ours_offline("td3-bc", settings, gate, {})


def peer(settings: dict[str, Any], gate: Any) -> None:
    _control.d3rlpy("TD3PlusBC", settings, gate, {})


def limit(settings: dict[str, Any], gate: Any) -> None:
    """In two updates: twice the critics forward and backward with the slow networks on the next states, once the policy through one critic."""
    critic, policy = layers(OBSERVATION + ACTION, 256, 256, 1), layers(OBSERVATION, 256, 256, ACTION)
    once = [(critic, "fxw"), (critic, "fxw"), (policy, "f"), (critic, "f"), (critic, "f")]
    call = products(ROWS, *once, *once, (policy, "fxw"), (critic, "fx"))
    _control.limit(settings, gate, call, UNITS_A_STEP // 2)
