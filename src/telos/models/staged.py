"""Policies that change from step to step of an episode: action values of their own for each of its first T steps.

    policy = StagedPolicy.load("runs/…/policy");  action, state = policy.predict(observation, state)

`state` is how many steps of the episode are done; None begins one. A folder holds `stages.safetensors` and `stages.json`. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from telos.core.errors import UsageError
from telos.models.networks import Activation, EnsembleLinear, ensemble
from telos.models.observations import batched
from telos.models.policies import Policy, Shape, describe_space, read_space


class StagedPolicy(Policy):
    """The best of discrete actions by the values Q_t(s, ·) of step t = 0 … `steps` - 1; those of the last one hold for all later steps.

    `blind` policies do not look: their values depend on the step alone. Raises `UsageError` for actions that are not discrete, and for pictures unless it is
    blind.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space,
        action_space: gymnasium.Space,
        steps: int,
        hidden: tuple[int, ...] = (),
        activation: Activation = "relu",
        blind: bool = False,
    ) -> None:
        super().__init__(observation_space, action_space, Shape("values", hidden, activation, orthogonal=False))
        if self.reader.picture and not blind:
            raise UsageError("this method reads vectors; the environment's observations are pictures")
        self.pixels = None
        self.steps, self.blind = steps, blind
        self.body = ensemble(steps, (self.inputs, *hidden, self.choices), activation)
        for layer in self.body:
            if isinstance(layer, EnsembleLinear):  # before a step is learned all its actions are worth the same
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
                layer.weight.requires_grad_(not blind)

    @property
    def choices(self) -> int:
        """How many actions there are."""
        return int(self.action_space.n)  # type: ignore[attr-defined]

    @property
    def inputs(self) -> int:
        """Numbers that the values of a step depend on; those of a blind policy are zero."""
        return 1 if self.blind else self.reader.size

    def looked(self, read: np.ndarray) -> Tensor:
        """What the values depend on [N, inputs], for observations as the reader gave them."""
        device = next(self.parameters()).device
        return torch.zeros(len(read), 1, device=device) if self.blind else torch.from_numpy(read).to(device)

    def set(self, step: int, network: nn.Module) -> None:
        """Takes over the linear layers of a perceptron as the values of a step."""
        mine = [layer for layer in self.body if isinstance(layer, EnsembleLinear)]
        theirs = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for into, layer in zip(mine, theirs, strict=True):
                into.weight[step].copy_(layer.weight.T)
                into.bias[step, 0].copy_(layer.bias)

    def forward(self, observation: Tensor, step: int = 0) -> Tensor:
        """Values [B, A] at a step, of what `looked` gives."""
        step = min(step, self.steps - 1)
        for layer in self.body:
            observation = observation @ layer.weight[step] + layer.bias[step] if isinstance(layer, EnsembleLinear) else layer(observation)
        return observation

    def outputs(self, read: np.ndarray, step: int | np.ndarray = 0) -> np.ndarray:
        """Values [N, A] of observations as the reader gave them, each at its own step where steps [N] are given."""
        looked, steps = self.looked(read), np.broadcast_to(np.asarray(step), len(read))
        found = np.empty((len(read), self.choices), dtype=np.float32)
        with torch.no_grad():
            for one in np.unique(steps):
                rows = np.flatnonzero(steps == one)
                found[rows] = self(looked[torch.from_numpy(rows)], int(one)).cpu().numpy()
        return found

    def choose(  # type: ignore[override]
        self, read: np.ndarray, deterministic: bool = True, generator: torch.Generator | None = None, step: int | np.ndarray = 0
    ) -> np.ndarray:
        """The best actions [N], the first of equal ones."""
        return self.outputs(read, step).argmax(1)

    def predict(self, observation: Any, state: Any = None, deterministic: bool = True, seed: int | None = None) -> tuple[Any, Any]:
        """(action, state): as of any policy; `state` must be handed from step to step, None at an episode's first. One number stands for a whole batch."""
        given, single = batched(self.observation_space, observation)
        step = np.asarray(0 if state is None else state)
        action = self.to_environment(self.choose(self.reader(given), step=step))
        following = step + 1
        return (action[0] if single else action), (int(following) if following.ndim == 0 else following)

    # -- on disk --------------------------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "stages.safetensors")
        described = {
            "format": 1,
            "steps": self.steps,
            "blind": self.blind,
            "shape": {name: value for name, value in dataclasses.asdict(self.shape).items() if name in ("hidden", "activation")},
            "observation_space": describe_space(self.observation_space),
            "action_space": describe_space(self.action_space),
        }
        (folder / "stages.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> StagedPolicy:
        """Raises `UsageError` for a folder that holds no whole policy of this kind."""
        folder = Path(folder)
        try:
            described = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
            if described["format"] != 1:
                raise ValueError(f"it is of format {described['format']}, which a later version of Telos writes")
            policy = cls(
                read_space(described["observation_space"]),
                read_space(described["action_space"]),
                int(described["steps"]),
                tuple(described["shape"]["hidden"]),
                described["shape"]["activation"],
                bool(described["blind"]),
            )
            policy.load_state_dict(load_file(folder / "stages.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"{folder} holds no whole policy of steps: {error}") from error
        return policy.requires_grad_(False)
