"""Data that online methods learn from beside what they meet: read once, in the units of the policy, and drawn from at random."""

from __future__ import annotations

from typing import Any

import torch

from telos.algorithms.offline._loop_offline import Table, shape_of
from telos.core.errors import UsageError
from telos.data.step_readers import read_steps
from telos.data.transitions import Transitions
from telos.models.policies import Policy


class OfflineData:
    """The steps of the option `--data` of `config`, which also has `env`, `env_options` and `gamma`, in the units of a policy.

    Raises `UsageError` where there are none, or their observations or actions are of another shape than the policy's.
    """

    def __init__(self, config: Any, policy: Policy) -> None:
        if not config.data:
            raise UsageError(
                "--data is missing: give a Minari folder or id, a D4RL HDF5 file, an OGBench npz file, or the folder of an off-policy run"
            )
        # The environment's spaces complete those that a file does not tell; with options it may have others than by default.
        steps = read_steps(config.data, env=None if config.env_options else config.env)
        pairs = (steps.observation_space, policy.observation_space), (steps.action_space, policy.action_space)
        for what, (recorded, met) in zip(("observations", "actions"), pairs):
            if shape_of(recorded) != shape_of(met):
                raise UsageError(f"--env {config.env} has {what} of another shape ({met}) than --data {config.data} ({recorded})")
        self.table, self.gamma = Table(steps, policy, config), config.gamma

    def __len__(self) -> int:
        return len(self.table)

    def draw(self, count: int, generator: torch.Generator) -> Transitions:
        """`count` steps, uniformly with replacement, on the generator's device; their discount is γ, 0 where they terminated."""
        rows = torch.randint(len(self.table), (count,), generator=generator, device=generator.device)
        batch = self.table.batch(rows.cpu().numpy()).to(generator.device)
        batch.discount = batch.discount * self.gamma
        return batch
