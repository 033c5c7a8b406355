"""CQL on data of Hopper's sizes: networks of 256 × 256, two critics, batches of 256, ten actions from each of three sources in every state."""

from __future__ import annotations

from typing import Any

from cases import _control
from cases._control import ACTION, OBSERVATION, ROWS, layers, nothing_to_compare, products, write_data

PEER, UNIT, UNITS_A_STEP = "d3rlpy", "updates", 5
STEPS, WARMUP = 4, 2
SAMPLES = 10
SETTINGS: dict[str, Any] = {"updates_a_step": UNITS_A_STEP, "batch": ROWS, "networks": "256 x 256, ReLU", "samples": SAMPLES, "seed": 0}
prepare, compare = write_data, nothing_to_compare


def ours(settings: dict[str, Any], gate: Any) -> None:
    _control.ours_offline("cql", settings, gate, {"samples": SAMPLES})


def peer(settings: dict[str, Any], gate: Any) -> None:
    _control.d3rlpy("CQL", settings, gate, {"n_action_samples": SAMPLES})


def limit(settings: dict[str, Any], gate: Any) -> None:
    """Two critics forward and backward on 30 actions a state and on the data's; the slow critics and the policy once a state."""
    import torch

    critic, policy = layers(OBSERVATION + ACTION, 256, 256, 1), layers(OBSERVATION, 256, 256, 2 * ACTION)
    torch.set_num_threads(settings["threads"])
    many = products(ROWS * (3 * SAMPLES + 1), (critic, "fxw"), (critic, "fxw"))
    few = products(ROWS, (policy, "f"), (policy, "f"), (critic, "f"), (critic, "f"), (policy, "fxw"), (critic, "fx"), (critic, "fx"))

    def call() -> None:
        many()
        few()

    _control.limit(settings, gate, call, UNITS_A_STEP)
