"""Returns between those of a random and of an expert policy, as D4RL normalises them (Fu et al. 2020, arXiv:2004.07219, section 4).

    score = 100 (return − random) / (expert − random)

0 is the random policy, 100 the expert. The references are those that D4RL publishes (`d4rl/infos.py`). They belong to D4RL's tasks: Gym's MuJoCo of
version 2, episodes of its lengths. The field also uses those of Hopper, HalfCheetah, Walker2d and Ant for the later versions of Gymnasium, whose rewards
differ a little (v5) or more (Ant, whose observations differ, too): comparable within a version, not with the figures of older papers. Minari's data sets
carry references of their own, which come first where they are known (`reference_of`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from telos.core.errors import UsageError, did_you_mean

Returns = TypeVar("Returns", float, np.ndarray)


@dataclass(frozen=True)
class Reference:
    """Mean returns of a random and of an expert policy. Raises `UsageError` where the expert is not the better one."""

    random: float
    expert: float

    def __post_init__(self) -> None:
        if not self.expert > self.random:
            raise UsageError(f"the expert's return {self.expert} must be above the random policy's {self.random}")

    def score(self, value: Returns) -> Returns:
        """0 for the random policy's return, 100 for the expert's."""
        return 100 * (value - self.random) / (self.expert - self.random)


REFERENCES: Mapping[str, Reference] = {
    "halfcheetah": Reference(-280.178953, 12135.0),
    "hopper": Reference(-20.272305, 3234.3),
    "walker2d": Reference(1.629008, 4592.3),
    "ant": Reference(-325.6, 3879.7),
    "maze2d-open": Reference(0.01, 20.66),
    "maze2d-umaze": Reference(23.85, 161.86),
    "maze2d-medium": Reference(13.13, 277.39),
    "maze2d-large": Reference(6.7, 273.99),
    "maze2d-open-dense": Reference(11.17817, 27.166538620695782),
    "maze2d-umaze-dense": Reference(68.537689, 193.66285642381482),
    "maze2d-medium-dense": Reference(44.264742, 297.4552547777125),
    "maze2d-large-dense": Reference(30.569041, 303.4857382709002),
    "antmaze-umaze": Reference(0.0, 1.0),
    "antmaze-medium": Reference(0.0, 1.0),
    "antmaze-large": Reference(0.0, 1.0),
    "pen": Reference(96.262799, 3076.8331017826877),
    "hammer": Reference(-274.856578, 12794.134825156867),
    "relocate": Reference(-6.425911, 4233.877797728884),
    "door": Reference(-56.512833, 2880.5693087298737),
    "kitchen": Reference(0.0, 4.0),
    "minigrid-fourrooms": Reference(0.01442, 2.89685),
    "flow-ring": Reference(-165.22, 24.42),
    "flow-merge": Reference(118.67993, 330.03179),
    "carla-lane": Reference(-0.8503839912088142, 1023.5784385429523),
    "carla-town": Reference(-114.81579500772153, 2440.1772022247314),
}
# How the policy acted, or where its goals lay, at the end of a data set's name: the references do not depend on it.
_SUFFIXES = (
    "random",
    "medium",
    "expert",
    "medium-replay",
    "full-replay",
    "medium-expert",
    "human",
    "cloned",
    "complete",
    "partial",
    "mixed",
)
_SUFFIXES += ("play", "diverse", "controller", "simple")
_ADROIT = re.compile(r"adroit-?hand-?(pen|hammer|relocate|door)")


def reference(env: str) -> Reference:
    """The reference of an environment or of one of its data sets: `hopper`, `Hopper-v5`, `hopper-medium-replay-v2`, `D4RL/pen/human-v2`.

    Raises `UsageError`, with the nearest name, where there is none; then `Reference(random, expert)` normalises with returns of one's own.
    """
    name = re.sub(r"-v\d+$", "", env.strip().lower().replace("_", "-").replace("/", "-"))
    name = _ADROIT.sub(r"\1", name.removeprefix("d4rl-")).removesuffix("-sparse")
    known = next((one for one in _candidates(name) if one in REFERENCES), None)
    if known is None:
        raise UsageError(
            f"there are no reference returns for {env!r}{did_you_mean(name, REFERENCES)}; known are {', '.join(REFERENCES)}. "
            "For others give the returns of a random and of an expert policy"
        )
    return REFERENCES[known]


def _candidates(name: str) -> list[str]:
    """The name, and the name without what says how the data came about."""
    found = [name, *(name.removesuffix(f"-{end}") for end in sorted(_SUFFIXES, key=len, reverse=True) if name.endswith(f"-{end}"))]
    return list(dict.fromkeys(found))


def normalised(env: str, value: Any) -> Any:
    """The score (0 random, 100 expert) of a return, or of an array of returns, in `env`. Raises `UsageError` for environments without references."""
    return reference(env).score(np.asarray(value, dtype=np.float64) if isinstance(value, list | tuple) else value)


def reference_of(env: str | None, provenance: Mapping[str, Any]) -> Reference | None:
    """The reference that a data set carries itself (`ref_min_score`, `ref_max_score`, as Minari calls them), else that of its environment, else None."""
    low, high = provenance.get("ref_min_score"), provenance.get("ref_max_score")
    if isinstance(low, int | float) and isinstance(high, int | float) and high > low:
        return Reference(float(low), float(high))
    try:
        return reference(env) if env else None
    except UsageError:
        return None
