"""What recipes of control share: the same tasks for every method, and scores between random play and D4RL's experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from telos.catalogue.lab import Stages
from telos.evaluation.normalised import normalised


def scores(stages: Stages, name: str, method: str, tasks: Mapping[str, Mapping[str, Any]], **options: Any) -> dict[str, float]:
    """The normalised score (0: random, 100: D4RL's expert) of a method's last policy on each task, over its evaluation's episodes."""
    found = {}
    for env, of_task in tasks.items():
        run = stages.train(f"{name}-{env}", method, env=env, checkpoint_every=0, eval_episodes=20, **{**options, **of_task})
        found[env] = float(np.asarray(normalised(env, run.facts["evaluation"]["evaluation/return"])))
    return found
