"""A task of control whose reward is nearly always zero."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.envs.classic_control.pendulum import PendulumEnv, angle_normalize


class SwingUp(PendulumEnv):
    """Gymnasium's Pendulum that earns 1 a step within `width` rad of upright and nothing else. At the start it is at rest (within 0.1 rad/s), anywhere
    within `spread` rad of hanging down (π: anywhere at all).

    The motor is too weak to lift it at once: it must be swung. An episode is cut after 200 steps of 0.05 s.
    """

    def __init__(self, width: float = 0.5, spread: float = np.pi) -> None:
        super().__init__()
        self.width, self.spread, self.taken = width, spread, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = np.array([np.pi, 0.0]) + self.np_random.uniform(-1, 1, 2) * [self.spread, 0.1]
        self.taken = 0
        return self._get_obs(), {}

    def step(self, u: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, _, _, _, _ = super().step(u)
        self.taken += 1
        upright = abs(float(angle_normalize(self.state[0]))) <= self.width
        return observation, float(upright), False, self.taken >= 200, {"success": upright}
