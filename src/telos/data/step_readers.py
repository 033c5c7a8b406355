"""Offline data of control from where users keep them, without the packages that wrote them.

`read_steps` looks at what is there, never at a name's ending:

- a folder of Minari (`main_data.hdf5`, alone or under `data/`), such a file itself, or the id of a data set that lies under `MINARI_DATASETS_PATH`
  (`~/.minari/datasets` where it is not set);
- an HDF5 file of D4RL: `observations`, `actions`, `rewards` and `terminals` or `timeouts`, with or without `next_observations`;
- an npz file of OGBench, as published or as its loader gives it, with or without `rewards` and `masks`;
- the folder of a run that keeps a replay (an off-policy method of ours).

What a file does not say is not guessed in silence: each decision is counted in `Steps.counts`, and what cannot be decided is an error. A step that terminates
in the middle of a trajectory (D4RL's antmaze, OGBench's `masks`) ends the episode there, and what follows is another episode, as D4RL's own loaders have it.
HDF5 needs the package h5py.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Dict, Discrete, MultiDiscrete

from telos.core.errors import DataError, Failure, UsageError, did_you_mean
from telos.data.hdf5 import array, opened
from telos.data.minari_folders import EPISODE, ID, MAIN, Spaces, described, minari_root, read_minari
from telos.data.steps import Steps
from telos.environments.base import Observation, take

_HDF5, _ZIP = b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"  # how such files begin
_KINDS = "a Minari folder or id, a D4RL HDF5 file, an OGBench npz file, or the folder of an off-policy run"


def read_steps(spec: str | Path | Steps, *, env: str | None = None, horizon: int | None = None) -> Steps:
    """The steps that `spec` names (see the module's docstring).

    `env`: a Gymnasium id whose spaces the data must have; without it they are the file's, or inferred. `horizon`: steps after which every episode was cut, for
    D4RL files that do not say so. Raises `UsageError` for what is not there, of no known kind, or does not hold what its kind needs; the message names file,
    key, episode and step.
    """
    if isinstance(spec, Steps):
        return spec
    if horizon is not None and horizon < 1:
        raise UsageError(f"a horizon is at least 1 step; got {horizon}")
    path, spaces = Path(spec).expanduser(), _spaces_of(env)
    if path.is_dir():
        steps = _from_folder(path, str(spec), env, spaces, horizon)
    elif path.is_file():
        steps = _from_file(path, env, spaces, horizon)
    elif ID.fullmatch(str(spec)) and (folder := minari_root() / str(spec)).is_dir():
        steps = _from_folder(folder, str(spec), env, spaces, horizon)
    else:
        raise _missing(str(spec))
    return steps


def holds_steps(spec: str | Path) -> bool:
    """Whether something there looks like data of control, so that `read_steps` is the one to read it or to say what is wrong with it."""
    path = Path(spec).expanduser()
    if not path.exists() and ID.fullmatch(str(spec)):
        path = minari_root() / str(spec)
    if path.is_dir():
        minari = any((place / name).is_file() for place in (path, path / "data") for name in (MAIN, "metadata.json"))
        return minari or (path / "run.json").is_file()
    try:
        with path.open("rb") as file:
            return file.read(8).startswith((_HDF5, _ZIP))
    except OSError:
        return False


def _spaces_of(env: str | None) -> Spaces:
    if env is None:
        return None
    from telos.environments.registry import make_environments

    environments = make_environments(env, 1)
    spaces = environments.observation_space, environments.action_space
    environments.close()
    return spaces


def _missing(spec: str) -> UsageError:
    root = minari_root()
    if not ID.fullmatch(spec) or Path(spec).suffix:
        return UsageError(f"{spec}: no such file or folder; data of control are {_KINDS}")
    known = [str(path.parent.parent.relative_to(root)) for path in root.rglob(f"data/{MAIN}")] if root.is_dir() else []
    return UsageError(
        f"{spec}: no such file or folder, and no data set of this id under {root}{did_you_mean(spec, known)}; "
        f"`minari download {spec}` fetches a published one, MINARI_DATASETS_PATH says where they lie"
    )


def _from_folder(folder: Path, source: str, env: str | None, spaces: Spaces, horizon: int | None) -> Steps:
    for place in (folder / "data", folder):
        if (place / MAIN).is_file():
            _refuse_horizon(horizon, f"{place / MAIN}")
            return read_minari(place / MAIN, source, env, spaces)
        if (place / "metadata.json").is_file():
            kind = described(place).get("data_format", "hdf5")
            problem = f"the data set is stored as {kind}" if kind != "hdf5" else f"there is a metadata.json and no {MAIN}"
            raise DataError(
                str(place), problem, f"Steps are read from {MAIN}; with the package minari, a data set can be written anew as hdf5"
            )
    if (folder / "run.json").is_file():
        _refuse_horizon(horizon, str(folder))
        steps = read_run(folder)
        if env not in (None, steps.env):
            raise UsageError(f"{folder} is a run in {steps.env}, not in {env}")
        return steps
    raise DataError(str(folder), f"the folder holds neither {MAIN} nor a run", f"Data of control are {_KINDS}")


def _refuse_horizon(horizon: int | None, place: str) -> None:
    if horizon is not None:
        raise UsageError(f"{place} says itself where its episodes end; a horizon has no effect")


def _from_file(path: Path, env: str | None, spaces: Spaces, horizon: int | None) -> Steps:
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error.strerror or error}", "Check its permissions") from None
    if start == _HDF5:
        with opened(path) as file:
            if any(EPISODE.fullmatch(name) for name in file):
                _refuse_horizon(horizon, str(path))
                return read_minari(path, str(path), env, spaces)
            arrays = _datasets(file, path)
        return _from_d4rl(path.name, arrays, env, spaces, horizon)
    if start.startswith(_ZIP):
        arrays = _from_npz(path)
        if "timeouts" in arrays:
            return _from_d4rl(path.name, arrays, env, spaces, horizon)
        _refuse_horizon(horizon, path.name)
        return _from_ogbench(path.name, arrays, env, spaces)
    problem = "is empty" if not start else "is neither HDF5 nor npz"
    raise DataError(str(path), problem, f"Data of control are {_KINDS}")


# -- HDF5 and npz -----------------------------------------------------------------------------------------------------------------------------------


def _datasets(group: Any, path: Path, prefix: str = "") -> dict[str, Any]:
    """The arrays of a group by name, those of groups in it as dictionaries; `infos` and `metadata` are only named, as empty dictionaries of None."""
    found: dict[str, Any] = {}
    for name, value in group.items():
        if not prefix and name in ("infos", "metadata"):
            found |= {f"{name}/{key}": None for key in (value if hasattr(value, "items") else ())}
        elif hasattr(value, "items"):
            found[name] = _datasets(value, path, f"{prefix}{name}/")
        else:
            found[name] = array(value, f"{path.name}: {prefix}{name}")
    return found


def _from_npz(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                try:
                    found[name] = file[name]
                except ValueError as error:
                    raise DataError(f"{path.name}: {name}", f"cannot be read: {error}", "Pickled objects are never opened") from None
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(str(path), f"the npz file is damaged or cut off ({error})", "Write or download it again") from None
    return found


def _needed(source: str, arrays: Mapping[str, Any], kind: str, *names: str) -> None:
    held = ", ".join(sorted(name for name in arrays)) or "nothing"
    for name in names:
        if arrays.get(name) is None:
            raise DataError(f"{source}: {name}", f"is missing; the file holds {held}", f"{kind} needs {', '.join(names)}")


def _column(source: str, arrays: Mapping[str, Any], name: str, rows: int) -> np.ndarray:
    """One number a step, however many empty axes it is stored with."""
    array = np.asarray(arrays[name])
    if array.size != rows or len(array) != rows:
        raise DataError(
            f"{source}: {name}", f"has the shape {array.shape}, and the observations have {rows} rows", "Each row needs one number"
        )
    return array.reshape(rows)


def _rows(source: str, observation: Observation) -> int:
    counts = {key: len(value) for key, value in observation.items()} if isinstance(observation, dict) else {"": len(observation)}
    if len(set(counts.values())) != 1:
        raise DataError(f"{source}: observations", f"its entries have {counts} rows", "All need the same")
    return next(iter(counts.values()))


def _ignored(arrays: Mapping[str, Any], used: set[str]) -> dict[str, int]:
    """How many arrays of the file go unused, by a name that says which."""
    names = sorted(name for name in arrays if name not in used)
    return {f"arrays that are not read ({', '.join(names)})": len(names)} if names else {}


# -- D4RL -------------------------------------------------------------------------------------------------------------------------------------------


def _from_d4rl(source: str, arrays: dict[str, Any], env: str | None, spaces: Spaces, horizon: int | None) -> Steps:
    """Rows of transitions. Where there are no `next_observations`, the next row holds them, except at the end of an episode: there a step that terminated
    needs none and repeats its own, and one that was cut is left out, as D4RL's `qlearning_dataset` does."""
    _needed(source, arrays, "A D4RL file", "observations", "actions", "rewards")
    if arrays.get("terminals") is None and arrays.get("timeouts") is None:
        raise DataError(
            f"{source}: terminals and timeouts",
            f"are both missing, so that nothing says where episodes end; the file holds {', '.join(sorted(arrays))}",
            "Write terminals (the task was over) and timeouts (the episode was cut), one of each a step",
        )
    observation = arrays["observations"]
    n = _rows(source, observation)
    following = arrays.get("next_observations")
    if following is not None and _rows(source, following) != n:
        raise DataError(f"{source}: next_observations", f"has {_rows(source, following)} rows, and observations has {n}")
    terminated, cut = (
        _column(source, arrays, name, n).astype(bool) if arrays.get(name) is not None else np.zeros(n, bool)
        for name in ("terminals", "timeouts")
    )
    counts = _ignored(arrays, {"observations", "actions", "rewards", "terminals", "timeouts", "next_observations"})
    counts["steps that are both terminal and cut, read as terminal"] = int((terminated & cut).sum())
    ended = terminated | cut
    if arrays.get("timeouts") is None and horizon is None:
        ended, counts = _found_cuts(source, observation, following, ended, counts)
    if horizon is not None:
        ended = _cut_after(ended, horizon)
    if not ended[-1]:
        counts["episodes that the end of the file cuts"] = 1
        ended[-1] = True
    values: dict[str, Any] = {"action": np.asarray(arrays["actions"]), "reward": _column(source, arrays, "rewards", n)}
    if len(values["action"]) != n:
        raise DataError(f"{source}: actions", f"has {len(values['action'])} rows, and observations has {n}", "Each step needs one")
    if following is None:
        at = np.where(ended, np.arange(n), np.minimum(np.arange(n) + 1, n - 1))
        following = take(observation, at)
        counts["terminal steps whose next observation is not in the file (their own stands there)"] = int(terminated.sum())
        kept = terminated | ~ended
        counts["steps at a cut whose next observation is not in the file, left out"] = int((~kept).sum())
        if not kept.any():
            raise DataError(f"{source}: next_observations", "is missing, and every episode has one step", "Write it")
        # A step before one that is left out is the last of its episode now.
        ended = (terminated | np.append(~kept[1:], True))[kept]
        observation, following, terminated = take(observation, kept), take(following, kept), terminated[kept]
        values = {name: value[kept] for name, value in values.items()}
    return Steps.of(
        observation,
        values["action"],
        values["reward"],
        following,
        terminated,
        ended,
        observation_space=spaces[0] if spaces else None,
        action_space=spaces[1] if spaces else None,
        source=source,
        env=env,
        counts=counts,
        provenance={"format": "D4RL"},
        keys={
            "observation": "observations",
            "action": "actions",
            "reward": "rewards",
            "next_observation": "next_observations",
            "terminated": "terminals",
            "ended": "timeouts",
        },
    )


def _found_cuts(
    source: str, observation: Observation, following: Observation | None, ended: np.ndarray, counts: dict[str, int]
) -> tuple[np.ndarray, dict[str, int]]:
    """Ends of a file without `timeouts`: its terminals, and where the next observation is not that of the next row."""
    if following is None:
        if ended[-1]:
            return ended, counts | {"episodes whose ends are terminals alone (the file has no timeouts)": int(ended.sum())}
        raise DataError(
            f"{source}: timeouts",
            "is missing, next_observations too, and the last step is not terminal: where episodes were cut cannot be known",
            "Write one of them, or give the number of steps after which episodes were cut (horizon)",
        )
    parts = [(following[key], observation[key]) for key in observation] if isinstance(observation, dict) else [(following, observation)]
    jumps = np.zeros(len(ended), bool)
    for after, before in parts:
        apart = ~np.isclose(np.asarray(after)[:-1], np.asarray(before)[1:], rtol=1e-5, atol=1e-6)
        jumps[:-1] |= apart.reshape(len(apart), -1).any(1)
    found = jumps & ~ended
    return ended | jumps, counts | {"cuts found where the next row goes on from elsewhere (the file has no timeouts)": int(found.sum())}


def _cut_after(ended: np.ndarray, horizon: int) -> np.ndarray:
    stops = np.flatnonzero(ended) + 1
    starts = np.concatenate([[0], stops])
    position = np.arange(len(ended)) - starts[np.searchsorted(stops, np.arange(len(ended)), side="right")]
    return ended | (position % horizon == horizon - 1)


# -- OGBench ----------------------------------------------------------------------------------------------------------------------------------------


def _from_ogbench(source: str, arrays: dict[str, Any], env: str | None, spaces: Spaces) -> Steps:
    """Three layouts. As published: a trajectory of T steps has T + 1 rows, the last of which (`terminals` 1) holds the last observation and an action that was
    never taken. Compact: the same with `valids` 0 in that row and `terminals` 1 already in the row before. Regular: T rows with `next_observations`.
    `terminals` marks the end of a trajectory, not of the task: only `masks` 0 says that nothing follows."""
    _needed(source, arrays, "An OGBench file", "observations", "actions", "terminals")
    observation = arrays["observations"]
    n = _rows(source, observation)
    marks = _column(source, arrays, "terminals", n).astype(bool)
    counts = _ignored(arrays, {"observations", "actions", "terminals", "next_observations", "valids", "rewards", "masks"})
    if len(arrays["actions"]) != n:
        raise DataError(f"{source}: actions", f"has {len(arrays['actions'])} rows, and observations has {n}", "Each row needs one")
    columns = {name: _column(source, arrays, name, n) for name in ("rewards", "masks", "valids") if name in arrays}
    if "next_observations" in arrays:
        layout, kept = "regular", np.ones(n, bool)
        following, ended = arrays["next_observations"], marks.copy()
        if not ended[-1]:
            counts["trajectories that the end of the file cuts"] = 1
            ended[-1] = True
    else:
        layout = "compact" if "valids" in columns else "as published"
        final = columns["valids"] == 0 if "valids" in columns else marks.copy()
        if not final.any():
            raise DataError(
                f"{source}: {'valids' if 'valids' in columns else 'terminals'}",
                "marks no end of a trajectory",
                "The last row of each has one",
            )
        if not final[-1]:
            counts["last rows of the file without the end of their trajectory, left out"] = 1
            final[-1] = True
        kept = ~final
        following, ended = take(observation, np.minimum(np.arange(n) + 1, n - 1)), np.append(final[1:], True)
    if not kept.any():
        raise DataError(f"{source}: terminals", "every row is the end of a trajectory, so that there is no step", "Check the file")
    terminated = columns["masks"] == 0 if "masks" in columns else np.zeros(n, bool)
    counts["steps whose mask ends the episode inside a trajectory"] = int((terminated & ~ended & kept).sum())
    if "rewards" not in columns:
        counts["steps without a reward in the file (0 stands there)"] = int(kept.sum())
    return Steps.of(
        take(observation, kept),
        np.asarray(arrays["actions"])[kept],
        columns["rewards"][kept] if "rewards" in columns else np.zeros(int(kept.sum()), np.float32),
        take(following, kept),
        terminated[kept],
        (ended | terminated)[kept],
        observation_space=spaces[0] if spaces else None,
        action_space=spaces[1] if spaces else None,
        source=source,
        env=env,
        counts=counts,
        provenance={"format": f"OGBench, {layout}"},
        keys={
            "observation": "observations",
            "action": "actions",
            "reward": "rewards",
            "next_observation": "next_observations",
            "terminated": "masks",
            "ended": "terminals",
        },
    )


# -- runs of ours -----------------------------------------------------------------------------------------------------------------------------------


def read_run(folder: str | Path, upto: int | None = None) -> Steps:
    """What an off-policy run has seen and not forgotten, of its first `upto` environment steps (None: all), in the environment's units.

    An episode whose beginning was overwritten is left out; one that was under way at the end counts as cut. Observations come back as float32 rounded them.
    Raises `UsageError` for a run that keeps no replay or is not finished.
    """
    from telos.core import checkpoint
    from telos.models.observations import Reader
    from telos.models.policies import Policy

    folder = Path(folder)
    if not (folder / "policy" / "policy.json").is_file():
        raise UsageError(
            f"{folder} is not the folder of a finished run of control (it has no policy); continue it with `telos resume {folder}`"
        )
    policy = Policy.load(folder / "policy")
    try:
        _, state, _ = checkpoint.load(folder / "checkpoints")
    except Failure as error:
        raise UsageError(str(error)) from None
    kept = state["program"].get("replay") if isinstance(state.get("program"), Mapping) else None
    if kept is None:
        raise UsageError(f"{folder} keeps no replay: its method forgets what it has seen. Off-policy methods (sac, td3, dqn) keep one")
    arrays = dict(kept["arrays"]) if "arrays" in kept else _replay_files(folder / "replay")
    rows, copies = arrays["reward"].shape
    written = int(kept["written"]) if upto is None else min(int(kept["written"]), max(1, upto // copies))
    oldest = max(0, int(kept["written"]) - rows)
    if written <= oldest:
        raise UsageError(f"{folder} has forgotten its first {oldest * copies} steps; a larger --replay_size remembers them")
    order = np.arange(oldest, written) % rows
    counts: dict[str, int] = {}
    chosen, ends = [], []
    for copy in range(copies):
        ended = np.array(arrays["ended"][order, copy], dtype=bool)
        first = 0
        if oldest:
            marks = np.flatnonzero(ended)
            first = int(marks[0]) + 1 if len(marks) else len(ended)
            _add(counts, "steps of episodes whose beginning was forgotten, left out", first)
        if first < len(ended):
            _add(counts, "episodes under way at the end, read as cut", int(not ended[-1]))
            ended[-1] = True
            chosen.append((order[first:], np.full(len(order) - first, copy)))
            ends.append(ended[first:])
    if not chosen:
        raise UsageError(f"{folder}: no episode in the replay has its beginning; a larger --replay_size remembers more")
    at = tuple(np.concatenate([part[axis] for part in chosen]) for axis in (0, 1))
    reader = Reader(policy.observation_space)
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return Steps.of(
        _unread(reader, np.asarray(arrays["observation"][at])),
        policy.to_environment(np.asarray(arrays["action"][at])),
        arrays["reward"][at],
        _unread(reader, np.asarray(arrays["next_observation"][at])),
        arrays["terminated"][at],
        np.concatenate(ends),
        observation_space=policy.observation_space,
        action_space=policy.action_space,
        source=str(folder),
        env=facts.get("plan", {}).get("environment"),
        counts=counts,
        provenance={"format": "run", "run": str(folder), "method": facts.get("method"), "commit": facts.get("commit")},
    )


def _add(counts: dict[str, int], name: str, number: int) -> None:
    counts[name] = counts.get(name, 0) + number


def _replay_files(folder: Path) -> dict[str, np.ndarray]:
    names = ("observation", "next_observation", "action", "reward", "terminated", "ended")
    try:
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    except (OSError, ValueError) as error:
        raise DataError(str(folder), f"the replay cannot be read: {error}", "Its files belong to the run") from None


def _unread(reader: Any, values: np.ndarray) -> Observation:
    """Observations of a space from what a `models.observations.Reader` makes of them."""
    space = reader.space
    if reader.picture:
        pictures = np.moveaxis(values, 1, -1)
        return pictures.reshape(len(values), *space.shape)
    if isinstance(space, Dict):
        return {key: _unread_vector(values[:, reader.slices[key]], part) for key, part in space.spaces.items()}
    return _unread_vector(values, space)


def _unread_vector(values: np.ndarray, space: gymnasium.Space) -> np.ndarray:
    if isinstance(space, Discrete):
        return values.argmax(1) + int(space.start)
    if isinstance(space, MultiDiscrete):
        stops = np.cumsum(space.nvec)
        return np.stack([part.argmax(1) for part in np.split(values, stops[:-1], axis=1)], axis=1)
    return values.reshape(len(values), *(space.shape or ())).astype(space.dtype)
