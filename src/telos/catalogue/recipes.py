"""`telos run KEY`: a system's recipe on its bundled testbed, for one seed of the user's choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from telos.catalogue.claims import budget_of, require_claim
from telos.core.run import write_atomically


def run(key: str, budget: str = "full", *, seed: int = 0, out: str | None = None, watch: Any = None) -> tuple[Path, dict[str, float]]:
    """Runs the experiment of a system's claim once, on a training seed; returns its folder and figures. An interrupted run is continued."""
    claim = require_claim(key)
    plan = budget_of(claim, budget)
    root = Path(out) if out else Path("runs") / f"{claim.key}-{budget}-{seed}"
    figures = {name: float(value) for name, value in claim.experiment(root, seed, plan.settings, watch).items()}
    write_atomically(root / "figures.json", json.dumps(figures, indent=1))
    return root, figures
