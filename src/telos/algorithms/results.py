"""Opens what a run has trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from telos.core.errors import UsageError


def load_result(path: Path) -> Any:
    """The model in a run's folder (or in a model's folder itself). Raises `UsageError` when there is none."""
    from telos.models.language import LanguageModel
    from telos.objectives.reward_model import RewardModel

    for place in (path / "policy", path):
        if (place / "policy.json").is_file():
            from telos.models.policies import Policy

            return Policy.load(place)
        if (place / "stages.json").is_file():
            from telos.models.staged import StagedPolicy

            return StagedPolicy.load(place)
    folder = path / "model" if (path / "model").is_dir() else path
    if not ((folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()):
        raise UsageError(f"{path} holds no trained model; is the run finished? (`telos resume {path}`)")
    config = folder / "config.json"
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or [] if config.is_file() else []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return RewardModel.load(str(folder))
    return LanguageModel.load(str(folder))
