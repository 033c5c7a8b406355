"""Minari's folders, read and written without the package minari: `data/main_data.hdf5` with a group for each episode, and `data/metadata.json`.

An episode of T steps has T + 1 observations; actions, rewards, terminations and truncations have T rows. Dictionaries of observations are groups. What we
write opens in minari 0.5 (`MinariDataset(folder / "data")`, or by its id where the folder lies under `MINARI_DATASETS_PATH`).
"""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

from telos.core.errors import DataError, Failure, UsageError
from telos.data.hdf5 import array, h5py, opened
from telos.data.steps import Steps, not_finite
from telos.environments.base import Observation, take

MAIN = "main_data.hdf5"
ID = re.compile(r"(?:[-\w]+/)*[-\w]+-v\d+")
EPISODE = re.compile(r"episode_(\d+)")
Spaces = tuple[gymnasium.Space, gymnasium.Space] | None
_VERSION = "0.5.4"  # of minari, whose layout is written
_REMEDY = "Write or download the data set again"
_KEPT = ("dataset_id", "algorithm_name", "code_permalink", "ref_min_score", "ref_max_score", "description")


def minari_root() -> Path:
    """Where Minari keeps data sets on this machine."""
    given = os.environ.get("MINARI_DATASETS_PATH")
    return Path(given) if given else Path.home() / ".minari" / "datasets"


def described(folder: Path) -> dict[str, Any]:
    """`metadata.json` of a folder, empty where there is none. Raises `DataError` where it is broken."""
    path = folder / "metadata.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(path), f"broken JSON: {error}", _REMEDY) from None
    if not isinstance(found, dict):
        raise DataError(str(path), "is not an object", _REMEDY)
    return found


def recorded_env(metadata: Mapping[str, Any]) -> str | None:
    """The id of the environment that metadata name."""
    if isinstance(own := metadata.get("telos"), Mapping) and isinstance(own.get("env"), str):
        return own["env"]
    try:
        return str(json.loads(metadata["env_spec"])["id"])
    except (KeyError, TypeError, ValueError):
        return None


# -- reading ----------------------------------------------------------------------------------------------------------------------------------------


def read_minari(path: Path, source: str, env: str | None, spaces: Spaces) -> Steps:
    """The steps of a `main_data.hdf5`, called `source` in messages. `spaces` None: those of metadata.json beside it, or inferred. Raises `DataError` with
    episode and key."""
    metadata = described(path.parent)
    recorded = recorded_env(metadata)
    given = spaces or _recorded_spaces(path.parent, metadata)
    counts: dict[str, int] = {}
    parts: list[dict[str, Any]] = []
    with opened(path) as file:
        numbered = sorted((int(found[1]), name) for name in file if (found := EPISODE.fullmatch(name)))
        for _, name in numbered:
            part = _episode(source, name, file[name], given, counts, bool(metadata.get("jpeg_encoding", True)))
            if part is not None:
                parts.append(part)
    expected = metadata.get("total_episodes")
    if isinstance(expected, int) and expected != len(numbered):
        raise DataError(source, f"metadata.json says {expected} episodes, and {MAIN} holds {len(numbered)}", _REMEDY)
    if not parts:
        raise DataError(source, "holds no episode with a step", _REMEDY)
    told = {key: metadata[key] for key in _KEPT if metadata.get(key) is not None}
    if isinstance(metadata.get("telos"), Mapping):
        told |= metadata["telos"]
    told["format"] = "Minari"
    names = ("observation", "action", "reward", "next_observation", "terminated", "ended")
    return Steps.of(
        *(_together([part[name] for part in parts]) for name in names),
        observation_space=given[0] if given else None,
        action_space=given[1] if given else None,
        source=source,
        env=env or recorded,
        counts=counts,
        provenance=told,
        keys=dict(zip(names, ("observations", "actions", "rewards", "observations", "terminations", "truncations"))),
    )


def _recorded_spaces(folder: Path, metadata: Mapping[str, Any]) -> Spaces:
    if "observation_space" not in metadata or "action_space" not in metadata:
        return None
    found = []
    for name in ("observation_space", "action_space"):
        try:
            value = metadata[name]
            found.append(_read_space(json.loads(value) if isinstance(value, str) else value))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / 'metadata.json'}: {name}", f"is no space that is read: {error}", _REMEDY) from None
    return found[0], found[1]


def _episode(source: str, name: str, group: Any, spaces: Spaces, counts: dict[str, int], jpeg: bool) -> dict[str, Any] | None:
    """The rows of one episode, None where it has no step."""
    place = f"{source}: {name}/"
    if missing := [key for key in ("observations", "actions", "rewards", "terminations", "truncations") if key not in group]:
        raise DataError(place + missing[0], f"is missing; the episode holds {', '.join(group)}", _REMEDY)
    reward, terminated, cut = (array(group[key], place + key).reshape(-1) for key in ("rewards", "terminations", "truncations"))
    steps = len(reward)
    if not steps:
        _add(counts, "episodes without a step, left out", 1)
        return None
    seen = _tree(group["observations"], place + "observations", spaces[0] if spaces else None, jpeg)
    action = _tree(group["actions"], place + "actions", None, False)
    if isinstance(action, dict):
        raise DataError(place + "actions", "is a dictionary", "Actions are read as one array")
    parts = [(f"observations/{key}", value, steps + 1) for key, value in seen.items()] if isinstance(seen, dict) else []
    parts += [] if parts else [("observations", seen, steps + 1)]
    for key, value, wanted in [*parts, ("actions", action, steps), ("terminations", terminated, steps), ("truncations", cut, steps)]:
        if len(value) != wanted:
            more = " (one more than steps: where the last one led is observed, too)" if wanted > steps else ""
            raise DataError(place + key, f"has {len(value)} rows; {steps} rewards need {wanted}{more}", "Write the episode again")
    for key, value, _ in [*parts, ("actions", action, 0), ("rewards", reward, 0)]:
        if (bad := not_finite(value)) is not None:
            raise DataError(f"{place}{key}, step {bad[0]}{bad[1]}", f"is {bad[2]}", "Numbers must be finite; repair the file")
    terminated, cut = terminated.astype(bool), cut.astype(bool)
    ended = terminated | cut
    _add(counts, "steps that are both terminal and cut, read as terminal", int((terminated & cut).sum()))
    _add(counts, "episodes without a mark of their end, read as cut", int(not ended[-1]))
    _add(counts, "episodes divided at a mark of an end inside them", int(ended[:-1].any()))
    _add(counts, "episodes whose infos are not read", int("infos" in group))
    ended[-1] = True
    return {
        "observation": take(seen, slice(0, steps)),
        "next_observation": take(seen, slice(1, steps + 1)),
        "action": action,
        "reward": reward,
        "terminated": terminated,
        "ended": ended,
    }


def _add(counts: dict[str, int], name: str, number: int) -> None:
    if number:
        counts[name] = counts.get(name, 0) + number


def _tree(value: Any, place: str, space: gymnasium.Space | None, jpeg: bool) -> Observation:
    if hasattr(value, "items"):
        parts = space.spaces if isinstance(space, Dict) else {}
        found: dict[str, np.ndarray] = {}
        for key, part in value.items():
            inner = _tree(part, f"{place}/{key}", parts.get(key), jpeg)
            if isinstance(inner, dict):
                raise DataError(f"{place}/{key}", "is a dictionary in a dictionary", "One level is read; flatten the observation")
            found[key] = inner
        return found
    values = array(value, place)
    if jpeg and isinstance(space, Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3) and values.shape[1:] != space.shape:
        return _decoded(values, place)
    return values


def _decoded(encoded: np.ndarray, place: str) -> np.ndarray:
    """Pictures [T, H, W, C] from the bytes of JPEG files, as Minari stores those of 32 pixels and more unless it is told otherwise."""
    try:
        image = importlib.import_module("PIL.Image")
    except ImportError:
        raise UsageError(f"{place} holds JPEG pictures, which need the package Pillow: pip install pillow") from None
    try:
        return np.stack([np.asarray(image.open(io.BytesIO(np.asarray(one, np.uint8).tobytes()))) for one in encoded])
    except (OSError, ValueError) as error:
        raise DataError(place, f"holds a picture that cannot be read: {error}", _REMEDY) from None


def _together(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


# -- spaces -----------------------------------------------------------------------------------------------------------------------------------------


def _read_space(told: Mapping[str, Any]) -> gymnasium.Space:
    """A space as Minari describes it. Raises `ValueError` for kinds that are not read."""
    kind = told["type"]
    if kind == "Dict":
        return Dict({key: _read_space(part) for key, part in told["subspaces"].items()})
    if kind == "Discrete":
        return Discrete(int(told["n"]), start=int(told.get("start", 0)))
    if kind == "MultiDiscrete":
        return MultiDiscrete(told["nvec"])
    if kind == "MultiBinary":
        return MultiBinary(told["n"])
    if kind != "Box":
        raise ValueError(f"{kind}; known are Box, Discrete, MultiDiscrete, MultiBinary and Dict")
    dtype = np.dtype(told["dtype"])
    low, high = (np.asarray(told[name], dtype=dtype).reshape(told["shape"]) for name in ("low", "high"))
    return Box(low, high, dtype=dtype.type)


def _describe_space(space: gymnasium.Space) -> dict[str, Any]:
    """The inverse. Raises `UsageError` for spaces that are not written."""
    if isinstance(space, Dict):
        return {"type": "Dict", "subspaces": {key: _describe_space(part) for key, part in space.spaces.items()}}
    if isinstance(space, Discrete):
        return {"type": "Discrete", "dtype": "int64", "start": int(space.start), "n": int(space.n)}
    if isinstance(space, MultiDiscrete):
        return {"type": "MultiDiscrete", "dtype": str(space.dtype), "nvec": space.nvec.tolist(), "start": space.start.tolist()}
    if isinstance(space, MultiBinary):
        return {"type": "MultiBinary", "n": space.n if isinstance(space.n, int) else [int(x) for x in space.n]}
    if isinstance(space, Box):
        bounds = {"low": space.low.tolist(), "high": space.high.tolist()}
        return {"type": "Box", "dtype": str(space.dtype), "shape": list(space.shape), **bounds}
    raise UsageError(f"the space {space} cannot be written; known are Box, Discrete, MultiDiscrete, MultiBinary and Dict")


# -- writing ----------------------------------------------------------------------------------------------------------------------------------------


def write_minari(folder: str | Path, steps: Steps, env: str | None = None, provenance: Mapping[str, Any] | None = None) -> Path:
    """Writes `folder/data`, whole or not at all, and returns `folder`.

    `env`: the id of the environment (default: that of the steps); a registered one is written as Minari's `env_spec`, so that minari makes it again.
    `provenance`, over that of the steps: plain values that say where the data come from (run, seed, commit, command …); they stand in metadata.json under
    `telos`, the counts of what reading them dropped under `telos.counts`. `algorithm_name`, `code_permalink`, `description`, `ref_min_score` and
    `ref_max_score` (the returns that minari normalises with) go where minari looks for them. Pictures are written as they are, not as JPEG.

    The data set's id is the folder's place under `MINARI_DATASETS_PATH`, or its name. Raises `UsageError` where data lie in the folder already and where an
    observation is not where the step before led, which the layout cannot hold; `Failure` when the disk refuses.
    """
    folder = Path(folder)
    data = folder / "data"
    if data.exists():
        raise UsageError(f"{data} exists already; name another folder")
    _check_continuous(steps)
    told = {**steps.provenance, **(provenance or {})}
    env = env or steps.env
    metadata: dict[str, Any] = {
        "dataset_id": _id_of(folder),
        "total_episodes": len(steps.stops),
        "total_steps": len(steps),
        "data_format": "hdf5",
        "jpeg_encoding": False,
        "observation_space": json.dumps(_describe_space(steps.observation_space)),
        "action_space": json.dumps(_describe_space(steps.action_space)),
        "minari_version": _VERSION,
        **{key: told.pop(key) for key in _KEPT[1:] if key in told},
    }
    for name in ("dataset_id", "format", "env", "counts"):  # of what was read, where these steps were read from a file
        told.pop(name, None)
    metadata["telos"] = {"env": env, **told, **({"counts": dict(steps.counts)} if steps.counts else {})}
    if spec := _spec_of(env):
        metadata["env_spec"] = spec
    partial = folder / f".data.{os.getpid()}"
    try:
        partial.mkdir(parents=True)
        _write_episodes(partial / MAIN, steps)
        metadata["dataset_size"] = round((partial / MAIN).stat().st_size / 1e6, 1)  # MB, as minari counts
        (partial / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, data)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror or error)
        raise Failure(f"cannot write {data}: {reason}; nothing was written") from error
    except TypeError as error:
        raise UsageError(f"provenance must be plain values: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone when it was renamed
    return folder


def _write_episodes(path: Path, steps: Steps) -> None:
    with h5py().File(path, "w", track_order=True) as file:
        for number, rows in enumerate(steps.episodes):
            group = file.create_group(f"episode_{number}")
            group.attrs["id"], group.attrs["total_steps"] = number, rows.stop - rows.start
            seen, last = take(steps.observation, rows), take(steps.next_observation, slice(rows.stop - 1, rows.stop))
            if isinstance(seen, dict):
                assert isinstance(last, dict)
                inner = group.create_group("observations")
                for key, value in seen.items():
                    _write(inner, key, np.concatenate([value, last[key]]))
            else:
                _write(group, "observations", np.concatenate([seen, np.asarray(last)]))
            _write(group, "actions", steps.action[rows])
            _write(group, "rewards", steps.reward[rows])
            _write(group, "terminations", steps.terminated[rows])
            _write(group, "truncations", steps.ended[rows] & ~steps.terminated[rows])


def _write(group: Any, key: str, values: np.ndarray) -> None:
    # Chunks of the episode's own size keep small episodes small; without a bound on rows minari can add to it.
    group.create_dataset(key, data=values, chunks=values.shape, maxshape=(None, *values.shape[1:]))


def _check_continuous(steps: Steps) -> None:
    inner = ~steps.ended[:-1]
    seen, led = steps.observation, steps.next_observation
    pairs = [(seen[key], np.asarray(led[key])) for key in seen] if isinstance(seen, dict) else [(seen, np.asarray(led))]  # type: ignore[index]
    for before, after in pairs:
        apart = (after[:-1] != before[1:]).reshape(len(inner), -1).any(1) & inner
        if apart.any():
            episode, step = steps.place(int(np.flatnonzero(apart)[0]))
            place = f"{steps.source}: next_observation, episode {episode}, step {step}"
            raise DataError(place, "is not the observation of the next step, and a Minari episode holds it once", "End the episode there")


def _id_of(folder: Path) -> str:
    try:
        name = str(folder.resolve().relative_to(minari_root().resolve()))
    except ValueError:
        name = folder.resolve().name
    if ID.fullmatch(name):
        return name
    return re.sub(r"[^-\w]+", "-", re.sub(r"-v\d+$", "", name)).strip("-") + "-v0"


def _spec_of(env: str | None) -> str | None:
    if env is None or env not in gymnasium.registry:
        return None
    try:
        return gymnasium.spec(env).to_json()
    except (TypeError, ValueError, gymnasium.error.Error):
        return None  # an environment whose arguments are no JSON
