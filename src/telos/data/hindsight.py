"""Hindsight: steps that are learned from once more as if what was reached later had been the goal (Andrychowicz et al. 2017, arXiv:1707.01495).

Of a batch that was drawn from a replay, a share gets another goal: what was achieved after a step drawn uniformly from this one
to the last of the same episode (the paper's strategy `future`; its four relabelled steps for each that is kept are a share of 0.8). The reward and whether
the episode ends there are asked of the environment anew. An episode under way reaches to its newest step.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch

from telos.core.errors import UsageError
from telos.data.replay import Replay
from telos.data.transitions import Transitions

ACHIEVED, DESIRED = "achieved_goal", "desired_goal"


class Judge(Protocol):
    """What knows of goals: `environments.base.Environments`."""

    name: str

    def judge_goals(self, achieved: np.ndarray, desired: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None: ...


class Hindsight:
    """The episodes of a replay, and goals from them. `slices` says where the entries of a flattened observation lie (`models.observations.Reader`).

    Raises `UsageError` for environments whose observations have no goals or which cannot judge others than the episode's own.
    """

    def __init__(self, replay: Replay, environments: Judge, slices: dict[str, slice], share: float) -> None:
        self.replay, self.environments, self.share = replay, environments, share
        if not {ACHIEVED, DESIRED} <= slices.keys():
            raise UsageError(
                f"--hindsight needs goals: observations with the entries {ACHIEVED} and {DESIRED}; {environments.name} has none"
            )
        self.achieved, self.desired = slices[ACHIEVED], slices[DESIRED]
        one = np.zeros((1, self.achieved.stop - self.achieved.start))
        if environments.judge_goals(one, one) is None:
            raise UsageError(
                f"--hindsight needs compute_reward(achieved_goal, desired_goal, info), which {environments.name} does not have"
            )
        self.number = np.zeros((replay.rows, replay.copies), dtype=np.int64)  # of each row's episode, by copy
        self.current = np.zeros(replay.copies, dtype=np.int64)  # of the episodes under way
        self.last = np.zeros((1024, replay.copies), dtype=np.int64)  # [episode, copy]: the newest row of each

    def note(self, ended: np.ndarray) -> None:
        """Takes in the row that was just added to the replay; ended [N] bool."""
        self._count(self.replay.written - 1, ended)

    def _count(self, row: int, ended: np.ndarray) -> None:
        if self.current.max() >= len(self.last):
            self.last = np.concatenate([self.last, np.zeros_like(self.last)])
        self.number[row % self.replay.rows] = self.current
        self.last[self.current, np.arange(self.replay.copies)] = row
        self.current += ended

    def rebuild(self) -> None:
        """Counts anew what the replay holds, after it was loaded. Episodes get other numbers, and draws stay what they were."""
        self.current[:] = 0
        replay = self.replay
        for row in range(max(0, replay.written - replay.rows), replay.written):
            self._count(row, replay.ended[row % replay.rows])

    def relabel(self, places: np.ndarray, batch: Transitions, gamma: float, generator: np.random.Generator) -> Transitions:
        """The batch of single steps that was taken from `places` [B], with other goals in a share of its rows."""
        replay, count = self.replay, len(places)
        row, copy = np.divmod(places, replay.copies)
        chosen = np.flatnonzero(generator.random(count) < self.share)
        end = self.last[self.number[row % replay.rows, copy], copy]
        future = row + (generator.random(count) * (end - row + 1)).astype(np.int64)
        rows, copies = future[chosen] % replay.rows, copy[chosen]
        goal = replay.next_observation[rows, copies][:, self.achieved]
        where = torch.from_numpy(chosen)
        observation, following = batch.observation.clone(), batch.next_observation.clone()
        observation[where, self.desired] = following[where, self.desired] = torch.from_numpy(goal)
        judged = self.environments.judge_goals(following[where, self.achieved].numpy().astype(np.float64), goal.astype(np.float64))
        assert judged is not None
        reward, over = (torch.from_numpy(np.array(part)) for part in judged)
        found = batch.clone(recurse=False)
        found.observation, found.next_observation = observation, following
        found.reward = batch.reward.index_copy(0, where, reward.to(batch.reward.dtype))
        found.discount = batch.discount.index_copy(0, where, torch.where(over, 0.0, gamma).to(batch.discount.dtype))
        return found
