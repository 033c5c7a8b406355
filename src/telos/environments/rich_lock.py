"""A combination lock of which only a noisy, rotated picture is seen (Misra et al. 2020; as in Zhou et al. 2023, arXiv:2311.08384, and Song et al. 2022).

At each of H steps the lock is in one of two good states or in the bad one. In a good state one of the A actions, drawn with the lock, leads to a good state of
the next step, to the other one with probability `switch`; every other action leads to the bad one, where it stays, and earns the lure with
probability `lure_chance`. The right action of the last step earns 1. Random play opens the lock with probability A^-H, and the lure leads learners away.

    o = R (e_state ⊕ e_step ⊕ 0 + noise),   R the Hadamard matrix of size D = 2^⌈log₂(H + 4)⌉

with normal noise on the H + 3 first entries. The authors' code pays the lure at the last step alone; here it is paid at every step, as their text has it. Their
experiments choose actions by a softmax over continuous numbers; here they are discrete.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import scipy.linalg
from gymnasium.spaces import Box, Discrete

from telos.core.errors import UsageError
from telos.core.seeds import numpy_generator
from telos.environments.arrays import ArrayEnvironments
from telos.environments.base import Environments, Observation
from telos.environments.tabular import counter_uniform as uniform

BAD = 2


class RichLock(ArrayEnvironments):
    """N copies of one lock. What happens in an episode depends on its seed and actions alone; `seed` is that of the lock, its right actions.

    `right` [H, 2] holds the right action of each step in either good state. Raises `UsageError` for numbers out of range.
    """

    def __init__(
        self,
        name: str,
        count: int,
        *,
        horizon: int = 10,
        actions: int = 10,
        switch: float = 0.5,
        lure: float = 0.1,
        lure_chance: float = 0.5,
        noise: float = 0.1,
        seed: int = 0,
        max_episode_steps: int | None = None,
    ) -> None:
        if horizon < 1 or actions < 2:
            raise UsageError(f"{name}: a lock has at least 1 step and 2 actions; got horizon {horizon} and actions {actions}")
        if not (0 <= switch <= 1 and 0 <= lure_chance <= 1 and noise >= 0):
            raise UsageError(f"{name}: switch and lure_chance are probabilities, noise is >= 0; got {switch}, {lure_chance} and {noise}")
        self.horizon, self.switch, self.lure, self.lure_chance, self.noise = horizon, switch, lure, lure_chance, noise
        self.size = 2 ** int(np.ceil(np.log2(horizon + 4)))
        super().__init__(name, count, Box(-np.inf, np.inf, (self.size,), np.float32), Discrete(actions), max_episode_steps)
        self.right = numpy_generator(seed, "rich-lock").integers(actions, size=(horizon, 2))
        self.rotation = scipy.linalg.hadamard(self.size).astype(np.float64)
        # Chances of a step: the switch, the lure, and two for each pair of normal numbers.
        self._pairs = -(-(horizon + 3) // 2)
        self._chances = 2 + 2 * self._pairs
        self.state_now, self._key = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.uint64)

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"state": self.state_now, "key": self._key}

    def best(self) -> np.ndarray:
        """The right actions [N] of all copies now; 0 where nothing is right any more."""
        step = np.minimum(self._elapsed, self.horizon - 1)
        return np.where(self.state_now == BAD, 0, self.right[step, np.minimum(self.state_now, 1)])

    def _start(self, copy: int, draws: np.random.Generator) -> None:
        self._key[copy] = draws.integers(2**64, dtype=np.uint64)
        self.state_now[copy] = draws.integers(2)

    def _chance(self, step: np.ndarray, first: int, count: int) -> np.ndarray:
        """Uniform numbers [N, count] of a step, from its `first` on."""
        counter = step[:, None] * self._chances + first + np.arange(count)
        return uniform(self._key[:, None], counter)

    def _observe(self) -> Observation:
        step = np.minimum(self._elapsed, self.horizon)
        seen, rows = np.zeros((self.count, self.size)), np.arange(self.count)
        chance = self._chance(step, 2, 2 * self._pairs)
        length, angle = np.sqrt(-2 * np.log1p(-chance[:, : self._pairs])), 2 * np.pi * chance[:, self._pairs :]
        normal = np.concatenate([length * np.cos(angle), length * np.sin(angle)], 1)  # Box and Muller
        seen[:, : self.horizon + 3] = self.noise * normal[:, : self.horizon + 3]
        seen[rows, self.state_now] += 1
        seen[rows, 3 + step] += 1
        return (seen @ self.rotation.T).astype(np.float32)

    def _advance(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, Mapping[str, np.ndarray]]:
        step = np.minimum(self._elapsed, self.horizon - 1)
        last = step == self.horizon - 1
        chance = self._chance(step, 0, 2)
        good = self.state_now != BAD
        right = good & (actions == self.right[step, np.minimum(self.state_now, 1)])
        lured = good & ~right & (chance[:, 1] < self.lure_chance)
        reward = np.where(right & last, 1.0, np.where(lured, self.lure, 0.0))
        other = np.where(chance[:, 0] < self.switch, 1 - self.state_now, self.state_now)
        self.state_now = np.where(right, other, BAD)
        return reward, last, {"success": (right & last).astype(np.float64)}


# What each id makes: called with the number of copies and the options.
ENVIRONMENTS: Mapping[str, Callable[..., Environments]] = {"telos/RichLock-v0": functools.partial(RichLock, "telos/RichLock-v0")}
