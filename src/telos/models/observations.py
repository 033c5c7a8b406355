"""Observations as networks read them: one float32 vector, or one picture, whatever the space is made of."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

from telos.core.errors import UsageError
from telos.environments.base import Observation


class Reader:
    """Turns observations [N, …] of a space into arrays [N, size] float32, or [N, C, H, W] uint8 for a single picture.

    Numbers are flattened, choices become one-hot, dictionaries are joined in the order of their keys (sorted, as Gymnasium keeps them); `slices` says where
    each key's numbers lie. Raises `UsageError` for a dictionary that mixes pictures with numbers.
    """

    def __init__(self, space: gymnasium.Space) -> None:
        self.space = space
        self.picture = _is_picture(space)
        self.slices: dict[str, slice] = {}
        if self.picture:
            self.shape: tuple[int, ...] = _picture_shape(space)
            return
        if isinstance(space, Dict):
            start = 0
            for key, part in space.spaces.items():
                if _is_picture(part):
                    raise UsageError(
                        f"the observation {key!r} is a picture beside other entries; wrap the environment in gymnasium.wrappers.FilterObservation"
                    )
                size = _size(part)
                self.slices[key] = slice(start, start + size)
                start += size
            self.shape = (start,)
        else:
            self.shape = (_size(space),)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def dtype(self) -> type:
        return np.uint8 if self.picture else np.float32

    def __call__(self, observation: Observation) -> np.ndarray:
        if self.picture:
            assert isinstance(observation, np.ndarray)
            if _channels_first(self.space):
                return np.ascontiguousarray(observation)
            pictures = observation if observation.ndim == 4 else observation[..., None]
            return np.ascontiguousarray(np.moveaxis(pictures, -1, 1))
        if isinstance(observation, dict):
            assert isinstance(self.space, Dict)
            return np.concatenate([_vector(observation[key], part) for key, part in self.space.spaces.items()], 1)
        return _vector(observation, self.space)


def batched(space: gymnasium.Space, observation: Any) -> tuple[Observation, bool]:
    """(a batch of observations, whether it was a single one) from what a user hands in."""
    if isinstance(space, Dict):
        arrays = {key: np.asarray(observation[key], dtype=part.dtype) for key, part in space.spaces.items()}
        key, part = next(iter(space.spaces.items()))
        single = arrays[key].ndim == len(part.shape or ())
        return ({name: value[None] for name, value in arrays.items()} if single else arrays), single
    array = np.asarray(observation, dtype=space.dtype)
    single = array.ndim == len(space.shape or ())
    return (array[None] if single else array), single


def _vector(values: np.ndarray, space: gymnasium.Space) -> np.ndarray:
    if isinstance(space, Discrete):
        return np.eye(int(space.n), dtype=np.float32)[values.astype(np.int64) - int(space.start)]
    if isinstance(space, MultiDiscrete):
        chosen = values.astype(np.int64) - space.start
        parts = [np.eye(int(n), dtype=np.float32)[chosen[:, i]] for i, n in enumerate(space.nvec)]
        return np.concatenate(parts, 1)
    return values.reshape(len(values), -1).astype(np.float32, copy=False)


def _size(space: gymnasium.Space) -> int:
    if isinstance(space, Discrete):
        return int(space.n)
    if isinstance(space, MultiDiscrete):
        if space.nvec.ndim != 1:
            raise UsageError(f"the space {space} has choices in {space.nvec.ndim} dimensions; one is read")
        return int(space.nvec.sum())
    if isinstance(space, (Box, MultiBinary)):
        return int(np.prod(space.shape))
    raise UsageError(f"observations of the space {space} cannot be read")


_MOST_CHANNELS = 16  # of a picture whose channels come first, as stacks of frames have them
_SMALLEST = 16  # pixels of a picture's side


def _is_picture(space: gymnasium.Space) -> bool:
    """Whether a space is one of pictures: bytes [H, W], [H, W, C] or [C, H, W]."""
    if not isinstance(space, Box) or space.dtype != np.uint8 or len(space.shape) not in (2, 3):
        return False
    return min(space.shape[1:] if _channels_first(space) else space.shape[:2]) >= _SMALLEST


def _channels_first(space: gymnasium.Space) -> bool:
    assert space.shape is not None
    return len(space.shape) == 3 and space.shape[0] <= _MOST_CHANNELS and min(space.shape[1:]) >= _SMALLEST


def _picture_shape(space: gymnasium.Space) -> tuple[int, int, int]:
    """(channels, height, width)"""
    assert space.shape is not None
    if _channels_first(space):
        return space.shape  # type: ignore[return-value]
    height, width, *channels = space.shape
    return (channels[0] if channels else 1), height, width
