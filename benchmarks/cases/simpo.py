"""SimPO against TRL's CPOTrainer with its SimPO loss; no reference model on either side."""

from __future__ import annotations

from typing import Any

from cases import _pairs
from cases._pairs import SETTINGS, STEPS, UNIT, UNITS_A_STEP, WARMUP, compare, prepare

__all__ = ["PEER", "SETTINGS", "STEPS", "UNIT", "UNITS_A_STEP", "WARMUP", "compare", "limit", "ours", "peer", "prepare"]

PEER = "trl"
BETA, GAMMA = 2.0, 1.0


def ours(settings: dict[str, Any], gate: Any) -> None:
    _pairs.ours("simpo", settings, gate, {"beta": BETA, "gamma_beta_ratio": GAMMA / BETA})


def peer(settings: dict[str, Any], gate: Any) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    chosen = {**_pairs.training_arguments(settings), "beta": BETA, "loss_type": "simpo", "simpo_gamma": GAMMA, "cpo_alpha": 0.0}
    _pairs.peer_train(settings, gate, CPOTrainer, CPOConfig, chosen, with_reference=False)


def limit(settings: dict[str, Any], gate: Any) -> None:
    _pairs.limit(settings, gate, with_reference=False)
