"""Checkpoints: whole or not there, verified before they are used, and never unpickled.

A checkpoint is a folder `checkpoints/step-00000100/` with `tensors.safetensors` (all tensors of the state), `state.json` (everything else, with
references to the tensors) and `manifest.json` (size and SHA-256 of both). It is written beside its place, synced, and renamed, so that a
kill at any moment leaves the older ones untouched; a folder whose hashes do not fit is refused by name and the one before it is used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from telos.core.errors import Failure

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"
_ITEMS = "__items__"  # a mapping whose keys are not all strings
_FORMAT = 1


def pack(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Splits a nested state into JSON-able structure and named tensors. Raises `TypeError` for what neither can hold."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(node: Any, name: str) -> Any:
        if isinstance(node, torch.Tensor):
            # Keys may hold dots or be numbers, so that different paths may read alike.
            name = name if name not in tensors else f"{name}#{len(tensors)}"
            # A copy of its own: tied or sliced tensors may share memory, which safetensors refuses.
            tensors[name] = node.detach().to("cpu", copy=True).contiguous()
            return {_TENSOR: name}
        if isinstance(node, np.ndarray):
            return {_TENSOR: walk(torch.from_numpy(node.copy()), name)[_TENSOR], "numpy": True}
        if isinstance(node, dict):
            if all(isinstance(key, str) for key in node) and not node.keys() & {_TENSOR, _TUPLE, _ITEMS}:
                return {key: walk(value, f"{name}.{key}") for key, value in node.items()}
            return {_ITEMS: [[walk(key, f"{name}.key{i}"), walk(value, f"{name}.{key}")] for i, (key, value) in enumerate(node.items())]}
        if isinstance(node, tuple):
            return {_TUPLE: [walk(value, f"{name}.{i}") for i, value in enumerate(node)]}
        if isinstance(node, list):
            return [walk(value, f"{name}.{i}") for i, value in enumerate(node)]
        if isinstance(node, np.generic):
            return node.item()
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"a checkpoint cannot hold {type(node).__name__} (at {name})")

    return walk(tree, "state"), tensors


def unpack(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(structure, list):
        return [unpack(value, tensors) for value in structure]
    if isinstance(structure, dict):
        if _TENSOR in structure:
            tensor = tensors[structure[_TENSOR]]
            return tensor.numpy() if structure.get("numpy") else tensor
        if _TUPLE in structure:
            return tuple(unpack(value, tensors) for value in structure[_TUPLE])
        if _ITEMS in structure:
            return {unpack(key, tensors): unpack(value, tensors) for key, value in structure[_ITEMS]}
        return {key: unpack(value, tensors) for key, value in structure.items()}
    return structure


def random_states() -> dict[str, Any]:
    """The states of the process's global generators."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_full(error: BaseException) -> bool:
    """Whether an error of the system or of safetensors says that there is no space."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def save(folder: Path, step: int, state: Any, keep: int = 2) -> Path:
    """Writes `state` as the checkpoint of `step` below `folder` and removes all but the newest `keep` (and those of later steps, which can only be
    damaged ones that were passed over).

    Raises `Failure` when the disk is full or not writable; older checkpoints stay as they were.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}-{os.getpid()}"
    structure, tensors = pack(state)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(tensors, partial / "tensors.safetensors")
        (partial / "state.json").write_text(json.dumps(structure), encoding="utf-8")
        files = {
            name: {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
            for name in ("tensors.safetensors", "state.json")
        }
        (partial / "manifest.json").write_text(json.dumps({"format": _FORMAT, "step": step, "files": files}, indent=1), encoding="utf-8")
        for name in (*files, "manifest.json"):
            _sync(partial / name)
        if final.exists():
            final.rename(folder / f".partial-old-{step:08d}-{os.getpid()}")
        partial.rename(final)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        last = newest(folder)
        kept = f"the last whole checkpoint is {last.name}" if last else "there is no earlier checkpoint"
        reason = "the disk is full" if disk_full(error) else str(error)
        raise Failure(
            f"cannot write the checkpoint of step {step} under {folder}: {reason}; {kept}. Free space, then `telos resume {folder.parent}`"
        ) from error
    found = _all(folder)
    own = found.index(final) + 1
    for old in (*found[: max(0, own - max(keep, 1))], *found[own:]):
        shutil.rmtree(old, ignore_errors=True)
    for stale in folder.glob(".partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return final


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None when its files are as the manifest says."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, wanted in manifest["files"].items():
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
                return f"{name} has {size} of {wanted['bytes']} bytes"
            if _sha256(path / name) != wanted["sha256"]:
                return f"{name} does not have the recorded SHA-256"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest or a file cannot be read ({error})"
    return None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, or None."""
    return next((path for path in reversed(_all(folder)) if fault(path) is None), None)


def load(folder: Path) -> tuple[int, Any, list[str]]:
    """(step, state, faults) of the newest whole checkpoint below `folder`; `faults` names the newer ones that had to be passed over.

    Raises `Failure` when none is whole.
    """
    faults = []
    for path in reversed(_all(folder)):
        problem = fault(path)
        if problem is None:
            return int(path.name.split("-")[1]), _read(path), faults
        faults.append(f"{path}: {problem}")
    raise Failure(
        f"no whole checkpoint under {folder}" + (": " + "; ".join(faults) if faults else " (the run was stopped before its first one)")
    )


def load_step(folder: Path, step: int) -> Any:
    """The state of the checkpoint of exactly `step`. Raises `Failure` when it is not there or not whole."""
    path = folder / f"step-{step:08d}"
    if problem := fault(path):
        raise Failure(f"{path}: {problem}")
    return _read(path)


def _read(path: Path) -> Any:
    structure = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return unpack(structure, load_file(path / "tensors.safetensors"))
