"""Action values of continuous actions, and state values."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from gymnasium.spaces import Box
from torch import Tensor, nn

from telos.core.errors import UsageError
from telos.models.networks import Activation, Normaliser, Pixels, ensemble, perceptron
from telos.models.observations import Reader
from telos.models.policies import Policy


class ActionValues(nn.Module):
    """Q(s, a) of `members` networks at once: [E, B]."""

    def __init__(
        self,
        reader: Reader,
        action_size: int,
        hidden: tuple[int, ...] = (256, 256),
        *,
        members: int = 2,
        activation: Activation = "relu",
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.pixels = Pixels(reader.shape) if reader.picture else None
        wide = (self.pixels.size if self.pixels is not None else reader.size) + action_size
        self.body = ensemble(members, (wide, *hidden, 1), activation, layer_norm=layer_norm)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        features = observation if self.pixels is None else self.pixels(observation)
        return self.body(torch.cat([features, action], -1))[..., 0]


class StateValues(nn.Module):
    """V(s), [B]."""

    def __init__(
        self, reader: Reader, hidden: tuple[int, ...] = (256, 256), *, activation: Activation = "relu", layer_norm: bool = False
    ) -> None:
        super().__init__()
        self.pixels = Pixels(reader.shape) if reader.picture else None
        wide = self.pixels.size if self.pixels is not None else reader.size
        self.body = perceptron((wide, *hidden, 1), activation, layer_norm=layer_norm)

    def forward(self, observation: Tensor) -> Tensor:
        return self.body(observation if self.pixels is None else self.pixels(observation))[:, 0]


class Normalised(nn.Module):
    """A network that reads observations in the units of a policy's normaliser, which stays the policy's."""

    def __init__(self, network: nn.Module, normaliser: Normaliser) -> None:
        super().__init__()
        self.network = network
        self.units = [normaliser]  # in a list: shared, not owned

    def __deepcopy__(self, memo: dict[int, Any]) -> Normalised:
        return Normalised(copy.deepcopy(self.network, memo), self.units[0])

    def forward(self, observation: Tensor, *rest: Tensor) -> Tensor:
        return self.network(self.units[0](observation), *rest)


class HasHidden(Protocol):
    """The options that say what a critic looks like."""

    @property
    def hidden(self) -> tuple[int, ...]: ...
    @property
    def activation(self) -> Activation: ...
    @property
    def layer_norm(self) -> bool: ...


def in_units(policy: Policy, network: nn.Module) -> nn.Module:
    """The network itself, or reading observations in the units of the policy's normaliser where it has one."""
    return network if policy.normaliser is None else Normalised(network, policy.normaliser)


def action_values(policy: Policy, config: HasHidden, members: int = 2) -> nn.Module:
    """Critics [E, B] of continuous actions, for a policy's observations in its units."""
    if not isinstance(policy.action_space, Box):
        raise UsageError(f"this method acts in continuous spaces (Box); the environment's actions are {policy.action_space}")
    critic = ActionValues(
        policy.reader, policy.action_size, config.hidden, members=members, activation=config.activation, layer_norm=config.layer_norm
    )
    return in_units(policy, critic)
