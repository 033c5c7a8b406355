"""Policies: from raw observations to actions. What they need to read an observation, its normalisation too, travels inside them and is saved with them.

    policy = telos.load("runs/…");  action, state = policy.predict(observation)

A folder holds `policy.safetensors` and `policy.json` (kind, spaces, sizes). Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from telos.core.errors import UsageError
from telos.functional.closed_form import Actions, CategoricalActions, GaussianActions, MultiCategoricalActions
from telos.functional.distributions import Categorical, Distribution, Gaussian, MultiCategorical, TanhGaussian
from telos.models.networks import Activation, Cached, Fast, Normaliser, Pixels, perceptron
from telos.models.observations import Reader, batched

Kind = Literal["stochastic", "softplus", "squashed", "deterministic", "values"]


@dataclass(frozen=True)
class Shape:
    """What a policy's network looks like. `kind`: `stochastic` gives a categorical, or a Gaussian whose deviation does not depend on the state; `softplus` a
    Gaussian whose deviation is the softplus of further outputs; `squashed` a Gaussian behind tanh, with a deviation of its own in each state;
    `deterministic` tanh of the output; `values` the action values of discrete actions. `layer_norm` is as in `networks.perceptron`."""

    kind: Kind = "stochastic"
    hidden: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    orthogonal: bool = True
    layer_norm: bool | Literal["plain"] = False
    normalise: bool = False
    log_std_init: float = 0.0
    dueling: bool = False


class Policy(nn.Module):
    """A policy over one observation space and one action space. Raises `UsageError` where the kind does not fit the actions."""

    def __init__(self, observation_space: gymnasium.Space, action_space: gymnasium.Space, shape: Shape) -> None:
        super().__init__()
        self.observation_space, self.action_space, self.shape = observation_space, action_space, shape
        self.reader = Reader(observation_space)
        self.normaliser = Normaliser(self.reader.size) if shape.normalise and not self.reader.picture else None
        self.pixels = Pixels(self.reader.shape) if self.reader.picture else None
        wide = self.pixels.size if self.pixels is not None else self.reader.size
        self.size = outputs = _outputs(action_space, shape)  # numbers that the network gives for a state
        gains = (math.sqrt(2), 0.01) if shape.orthogonal else None
        self._fast = Cached()
        self.body = perceptron((wide, *shape.hidden, outputs), shape.activation, gains=gains, layer_norm=shape.layer_norm)
        if shape.kind == "stochastic" and isinstance(action_space, Box):
            self.log_std = nn.Parameter(torch.full((outputs,), shape.log_std_init))
        if isinstance(action_space, Box):
            low, high = (np.asarray(edge, np.float32).reshape(-1) for edge in (action_space.low, action_space.high))
            if not np.isfinite([low, high]).all():
                raise UsageError(
                    f"the action space {action_space} has no finite bounds; wrap the environment in gymnasium.wrappers.ClipAction"
                )
            self._low, self._high, self._middle, self._half = low, high, (low + high) / 2, (high - low) / 2

    @property
    def action_size(self) -> int:
        """Numbers in a continuous action."""
        return len(self._half)

    # -- learning -----------------------------------------------------------------------------------------------------------------------------

    def features(self, observation: Tensor) -> Tensor:
        """[B, …] as the `Reader` gives them, to what the perceptron reads."""
        if self.pixels is not None:
            return self.pixels(observation)
        return observation if self.normaliser is None else self.normaliser(observation)

    def forward(self, observation: Tensor) -> Tensor:
        """The network's outputs [B, outputs]."""
        out = self.body(self.features(observation))
        if self.shape.dueling:
            value, advantage = out[:, :1], out[:, 1:]
            return value + advantage - advantage.mean(1, keepdim=True)
        return out

    def distribution(self, observation: Tensor) -> Distribution:
        """What is acted by in states [B, …]. Raises `UsageError` for kinds without one."""
        return self.distribution_of(self(observation))

    def distribution_of(self, out: Tensor) -> Distribution:
        if self.shape.kind == "squashed":
            mean, log_std = out.chunk(2, -1)
            # Smooth bounds keep a gradient everywhere (Haarnoja et al. clip to [−20, 2]).
            return TanhGaussian(mean, -5 + 3.5 * (torch.tanh(log_std) + 1))
        if self.shape.kind == "softplus":
            mean, before = out.chunk(2, -1)
            return Gaussian(mean, nn.functional.softplus(before).log())
        if self.shape.kind != "stochastic":
            raise UsageError(f"a {self.shape.kind} policy has no distribution over actions")
        if isinstance(self.action_space, Box):
            return Gaussian(out, self.log_std)
        if isinstance(self.action_space, MultiDiscrete):
            return MultiCategorical(out, tuple(int(n) for n in self.action_space.nvec))
        return Categorical(out)

    def actions(self) -> Actions:
        """`distribution_of` for arrays, of a stochastic policy."""
        if self.shape.kind != "stochastic":
            raise UsageError(f"a {self.shape.kind} policy has no distribution over arrays")
        if isinstance(self.action_space, Box):
            return GaussianActions(self.log_std.detach().cpu().numpy())
        if isinstance(self.action_space, MultiDiscrete):
            return MultiCategoricalActions(tuple(int(n) for n in self.action_space.nvec))
        return CategoricalActions(self.size)

    # -- acting -------------------------------------------------------------------------------------------------------------------------------

    @property
    def fast(self) -> Fast | None:
        """The perceptron as NumPy evaluates it, where it can."""
        return self._fast.of(self.body) if self.pixels is None and not self.shape.dueling else None

    def outputs(self, read: np.ndarray) -> np.ndarray:
        """The network's outputs for observations as the reader gave them, [N, outputs] float32, without gradient."""
        fast = self.fast
        if fast is not None:
            return fast(read if self.normaliser is None else self.normaliser.of_array(read))
        with torch.no_grad():
            return self(torch.from_numpy(read).to(next(self.parameters()).device)).cpu().numpy()

    def predict(self, observation: Any, state: Any = None, deterministic: bool = True, seed: int | None = None) -> tuple[Any, Any]:
        """(action, state) for a raw observation or a batch of them, as the environment gives and takes them.

        `deterministic` False draws from the policy's distribution, `seed` makes the draw repeatable. `state` is what a policy with memory carries from step to
        step; these have none and hand it back.
        """
        given, single = batched(self.observation_space, observation)
        read = self.reader(given)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        action = self.to_environment(self.choose(read, deterministic, generator))
        return (action[0] if single else action), state

    def choose(self, read: np.ndarray, deterministic: bool = True, generator: torch.Generator | None = None) -> np.ndarray:
        """Actions [N, …] before they are brought into the environment's bounds."""
        out = torch.from_numpy(self.outputs(read))
        with torch.no_grad():
            if self.shape.kind == "values":
                return out.argmax(1).numpy()
            if self.shape.kind == "deterministic":
                return torch.tanh(out).numpy()
            if self.shape.kind == "stochastic" and isinstance(self.action_space, Box):
                found: Distribution = Gaussian(out, self.log_std.detach().cpu())
            else:
                found = self.distribution_of(out)
            return (found.mode() if deterministic else found.sample(generator)).numpy()

    def random(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Uniformly random actions [count, …], in the policy's own units."""
        space = self.action_space
        if isinstance(space, Box):
            inside = generator.uniform(-1, 1, (count, len(self._half))).astype(np.float32)
            return inside if self.shape.kind in ("squashed", "deterministic") else inside * self._half + self._middle
        if isinstance(space, MultiDiscrete):
            return generator.integers(0, space.nvec, (count, len(space.nvec)))
        assert isinstance(space, Discrete)
        return generator.integers(0, int(space.n), count)

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """Actions as the environment takes them: those in (−1, 1) are scaled to its bounds, others are clipped to them; choices start where it says."""
        space = self.action_space
        if isinstance(space, Box):
            inside = action * self._half + self._middle if self.shape.kind in ("squashed", "deterministic") else action
            return np.clip(inside, self._low, self._high).reshape(-1, *space.shape).astype(space.dtype)
        assert isinstance(space, (Discrete, MultiDiscrete))
        return action.astype(np.int64) + space.start

    def from_environment(self, action: np.ndarray) -> np.ndarray:
        """The inverse of `to_environment` for actions inside the bounds: what networks read and losses compare, [N, …]."""
        space = self.action_space
        if isinstance(space, Box):
            flat = np.asarray(action, np.float32).reshape(len(action), -1)
            return (flat - self._middle) / self._half if self.shape.kind in ("squashed", "deterministic") else flat
        assert isinstance(space, (Discrete, MultiDiscrete))
        return np.asarray(action, np.int64) - space.start

    # -- on disk ------------------------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / "policy.safetensors")
        described = {
            "format": 1,
            "shape": dataclasses.asdict(self.shape),
            "observation_space": describe_space(self.observation_space),
            "action_space": describe_space(self.action_space),
        }
        (folder / "policy.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Policy:
        """Raises `UsageError` for a folder that holds no whole policy."""
        folder = Path(folder)
        try:
            described = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
            if described["format"] != 1:
                raise ValueError(f"it is of format {described['format']}, which a later version of Telos writes")
            given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in described["shape"].items()}
            shape = Shape(**given)
            if shape.kind not in get_args(Kind):
                raise ValueError(f"there is no kind of policy {shape.kind!r}")
            policy = cls(read_space(described["observation_space"]), read_space(described["action_space"]), shape)
            policy.load_state_dict(load_file(folder / "policy.safetensors"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UsageError(f"{folder} holds no whole policy: {error}") from error
        return policy.requires_grad_(False)

    def export_onnx(self, path: str | Path) -> None:
        """The network from what the reader gives, [n, …], to its outputs [n, outputs], normalisation included, as an ONNX file. Raises `UsageError` without
        the package onnx."""
        if importlib.util.find_spec("onnx") is None:
            raise UsageError("writing ONNX needs the package onnx: pip install onnx")
        example = torch.zeros(1, *self.reader.shape, dtype=torch.uint8 if self.reader.picture else torch.float32)
        sizes = {name: {0: "n"} for name in ("observation", "output")}
        torch.onnx.export(
            self, (example,), str(path), input_names=["observation"], output_names=["output"], dynamic_axes=sizes, dynamo=False
        )


def _outputs(space: gymnasium.Space, shape: Shape) -> int:
    continuous = isinstance(space, Box)
    if not isinstance(space, (Box, Discrete, MultiDiscrete)) or (isinstance(space, MultiDiscrete) and space.nvec.ndim != 1):
        raise UsageError(f"policies act in Box, Discrete and one-dimensional MultiDiscrete spaces; the environment's actions are {space}")
    if shape.kind in ("softplus", "squashed", "deterministic") and not continuous:
        raise UsageError(f"this method acts in continuous spaces (Box); the environment's actions are {space}")
    if shape.kind == "values" and not isinstance(space, Discrete):
        raise UsageError(f"this method acts in discrete spaces (Discrete); the environment's actions are {space}")
    if continuous:
        return int(np.prod(space.shape)) * (2 if shape.kind in ("softplus", "squashed") else 1)
    if isinstance(space, MultiDiscrete):
        return int(space.nvec.sum())
    assert isinstance(space, Discrete)
    return int(space.n) + int(shape.dueling)


def describe_space(space: gymnasium.Space) -> dict[str, Any]:
    """A space as plain values."""
    if isinstance(space, Dict):
        return {"kind": "Dict", "spaces": {key: describe_space(part) for key, part in space.spaces.items()}}
    if isinstance(space, Discrete):
        return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, MultiDiscrete):
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, MultiBinary):
        return {"kind": "MultiBinary", "n": space.n if isinstance(space.n, int) else list(space.n)}
    assert isinstance(space, Box)
    bounds = {
        name: [None if not math.isfinite(x) else x for x in edge.reshape(-1).tolist()]
        for name, edge in (("low", space.low), ("high", space.high))
    }
    return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), **bounds}


def read_space(described: dict[str, Any]) -> gymnasium.Space:
    """The inverse of `describe_space`."""
    kind = described["kind"]
    if kind == "Dict":
        return Dict({key: read_space(part) for key, part in described["spaces"].items()})
    if kind == "Discrete":
        return Discrete(described["n"], start=described["start"])
    if kind == "MultiDiscrete":
        return MultiDiscrete(described["nvec"], start=described["start"])
    if kind == "MultiBinary":
        return MultiBinary(described["n"])
    dtype = np.dtype(described["dtype"])
    edges = [
        np.array([empty if x is None else x for x in described[name]], dtype=dtype).reshape(described["shape"])
        for name, empty in (("low", -math.inf), ("high", math.inf))
    ]
    return Box(edges[0], edges[1], dtype=dtype.type)
