"""IQL on data of Hopper's sizes: networks of 256 × 256, two critics, batches of 256."""

from __future__ import annotations

from typing import Any

from cases import _control
from cases._control import ACTION, OBSERVATION, ROWS, layers, nothing_to_compare, products, write_data

PEER, UNIT, UNITS_A_STEP = "d3rlpy", "updates", 50
STEPS, WARMUP = 4, 2
SETTINGS: dict[str, Any] = {"updates_a_step": UNITS_A_STEP, "batch": ROWS, "networks": "256 x 256, ReLU", "seed": 0}
prepare, compare = write_data, nothing_to_compare


def ours(settings: dict[str, Any], gate: Any) -> None:
    _control.ours_offline("iql", settings, gate, {})


def peer(settings: dict[str, Any], gate: Any) -> None:
    _control.d3rlpy("IQL", settings, gate, {})


def limit(settings: dict[str, Any], gate: Any) -> None:
    """Two critics and the value forward and backward, the slow critics and the value of the next states, the policy forward and backward."""
    critic, value, policy = (
        layers(OBSERVATION + ACTION, 256, 256, 1),
        layers(OBSERVATION, 256, 256, 1),
        layers(OBSERVATION, 256, 256, ACTION),
    )
    call = products(ROWS, (critic, "fxw"), (critic, "fxw"), (value, "fxw"), (critic, "f"), (critic, "f"), (value, "f"), (policy, "fxw"))
    _control.limit(settings, gate, call, UNITS_A_STEP)
