"""From what `--env` says to environments: a Gymnasium id, or file.py:Class / module:Class for one's own."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium

from telos.core.errors import UsageError, did_you_mean
from telos.core.naming import importing
from telos.environments.base import Environments
from telos.environments.gym import GymEnvironments

# Module → the ids that it makes as arrays, by its `ENVIRONMENTS[id](count, **options)`. Imported only when used.
_MODULES: dict[str, tuple[str, ...]] = {
    "classic": ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"),
    "mujoco_tasks": (
        *("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5", "Swimmer-v5", "Humanoid-v5"),
        *("InvertedPendulum-v5", "InvertedDoublePendulum-v5", "Reacher-v5"),
    ),
    "tabular": (
        *("telos/Chain-v0", "telos/RiverSwim-v0", "telos/FourRooms-v0", "telos/Cliff-v0", "telos/Lock-v0"),
        *("telos/Random-v0", "telos/Garnet-v0"),
    ),
    "linear_mixture": ("telos/LinearMixture-v0",),
    "maze": ("telos/PointMazeU-v0", "telos/PointMazeMedium-v0", "telos/PointMazeLarge-v0"),
    "rich_lock": ("telos/RichLock-v0",),
    "submodular": ("telos/SubmodularGrid-v0",),
}
BATCHED = {env: f"telos.environments.{module}" for module, ids in _MODULES.items() for env in ids}


def make_environments(env: str, count: int = 1, *, options: Mapping[str, Any] | None = None) -> Environments:
    """`count` copies of `env`. `options` go to its constructor.

    Raises `UsageError`, with a suggestion, for an id that is not registered and for a class that cannot be found or made.
    """
    if not env:
        raise UsageError("--env is missing: give a Gymnasium id (CartPole-v1), or file.py:Class or module:Class for your own")
    given = dict(options or {})
    if env in BATCHED:
        make = importlib.import_module(BATCHED[env]).ENVIRONMENTS[env]
        try:
            inspect.signature(make).bind(count, **given)
        except TypeError as error:
            raise UsageError(f"--env_options: {env}: {error}") from None
        return make(count, **given)
    if _names_a_class(env):
        return GymEnvironments(env, functools.partial(_class_of(env), **given), count)
    return GymEnvironments(env, functools.partial(_make_registered, env, given), count)


def _names_a_class(env: str) -> bool:
    place, _, name = env.rpartition(":")
    return (
        bool(place) and name.isidentifier() and "/" not in name and (place.endswith(".py") or not name[-1:].isdigit() or "-v" not in name)
    )


def _make_registered(env: str, options: Mapping[str, Any]) -> gymnasium.Env:
    try:
        return gymnasium.make(env, disable_env_checker=True, **options)
    except gymnasium.error.UnregisteredEnv:
        known = sorted({*gymnasium.registry, *BATCHED})
        raise UsageError(
            f"--env {env}: Gymnasium knows no such environment{did_you_mean(env, known)}; for your own give file.py:Class or module:Class"
        ) from None
    except gymnasium.error.DependencyNotInstalled as error:
        raise UsageError(f"--env {env} needs a package that is not installed: {error}") from None
    except gymnasium.error.Error as error:
        raise UsageError(f"--env {env}: {error}") from None


def _class_of(env: str) -> Callable[..., Any]:
    place, _, name = env.rpartition(":")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise UsageError(f"--env {env}: there is no file {path}")
        label = f"telos_env_{path.stem}"
        spec = importlib.util.spec_from_file_location(label, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[label] = module
        try:
            with importing(str(path)):
                spec.loader.exec_module(module)
        except Exception as error:
            raise UsageError(f"--env {env}: the file cannot be run: {type(error).__name__}: {error}") from error
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise UsageError(f"--env {env}: module {place} cannot be imported: {error}") from None
    found = getattr(module, name, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise UsageError(f"--env {env}: {place} has no class {name!r}{did_you_mean(name, names)}")
    return found
