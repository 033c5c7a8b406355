"""DPO against TRL's DPOTrainer, the reference model's forward pass included on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cases import _pairs
from cases._pairs import SETTINGS, STEPS, UNIT, UNITS_A_STEP, WARMUP, compare, prepare

__all__ = ["PEER", "SETTINGS", "STEPS", "UNIT", "UNITS_A_STEP", "WARMUP", "compare", "limit", "ours", "peer", "prepare"]

PEER = "trl"
BETA = 0.1


def ours(settings: dict[str, Any], gate: Any) -> None:
    _pairs.ours("dpo", settings, gate, {"beta": BETA, "reference": str(Path(settings["folder"]) / "reference")})


def peer(settings: dict[str, Any], gate: Any) -> None:
    from trl import DPOConfig, DPOTrainer

    chosen = {**_pairs.training_arguments(settings), "beta": BETA, "loss_type": ["sigmoid"], "precompute_ref_log_probs": False}
    _pairs.peer_train(settings, gate, DPOTrainer, DPOConfig, chosen, with_reference=True)


def limit(settings: dict[str, Any], gate: Any) -> None:
    _pairs.limit(settings, gate, with_reference=True)
