"""Checkpoints are whole or not there, give back exactly what they were given, and are never trusted unread."""

from __future__ import annotations

import errno
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from support import plain
from telos.core import checkpoint
from telos.core.errors import Failure


def state_of(step: int) -> dict[str, Any]:
    return {"step": step, "weights": torch.arange(1000.0) * step}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# What goes in comes out ----------------------------------------------------------------------------------------------------------------


def round_trip(folder: Path, state: Any) -> Any:
    checkpoint.save(folder, 1, state)
    step, found, faults = checkpoint.load(folder)
    assert (step, faults) == (1, [])
    return found


def test_every_kind_of_state_comes_back_with_its_types(tmp_path: Path) -> None:
    state = {
        "int keys": {0: {"exp_avg": torch.ones(2, 3), "step": torch.tensor(4.0)}, 17: None},
        "tuple": (1, (2, "three"), [torch.tensor([True, False])]),
        "bfloat16": torch.tensor([1.0, 1 / 3, -0.0], dtype=torch.bfloat16),
        "int64": torch.tensor([2**62 + 1, -(2**62)]),
        "empty tensor": torch.empty(0, 5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "view": torch.arange(12).view(3, 4).T,
        "numpy": np.arange(6, dtype=np.float64).reshape(2, 3),
        "numpy uint32": np.array([0, 2**32 - 1], dtype=np.uint32),
        "numpy bool": np.array([True, False]),
        "numpy number": np.float64(0.1),
        "plain": [None, True, 3, 0.1, "text", "ünïcode\n", math.inf, 2**80],
        "empty": [{}, [], ()],
        "keys": {(1, "a"): 1, None: 2, "text": 3, 1.5: 4},
    }
    found = round_trip(tmp_path, state)
    assert plain(found) == plain(state | {"numpy number": 0.1})
    assert isinstance(found["tuple"], tuple)
    assert isinstance(found["tuple"][1], tuple)
    assert isinstance(found["numpy"], np.ndarray)
    assert list(found["int keys"]) == [0, 17]
    assert found["plain"][1] is True


def test_not_a_number_comes_back_as_one(tmp_path: Path) -> None:
    found = round_trip(tmp_path, {"a": math.nan, "b": torch.tensor([math.nan, 1.0])})
    assert math.isnan(found["a"])
    assert found["b"].isnan().tolist() == [True, False]


def test_tensors_that_share_memory_come_back_apart(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    found = round_trip(tmp_path, {"a": whole, "b": whole, "c": whole[2:4]})
    found["a"][2] = 100
    assert found["b"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["c"].tolist() == [2, 3]


def test_paths_that_read_alike_are_kept_apart(tmp_path: Path) -> None:
    state = {
        "a.b": torch.tensor(1),
        "a": {"b": torch.tensor(2)},
        "mixed": {1: torch.tensor(3), "1": torch.tensor(4)},
        "state": {"key0": torch.tensor(5), 0: torch.tensor(6)},
        "marked": {"__tensor__": torch.tensor(7), "__tuple__": [torch.tensor(8)], "__items__": 9},
    }
    assert plain(round_trip(tmp_path, state)) == plain(state)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", lambda: 0, np.array(["text"]), np.array([object()])])
def test_what_cannot_be_held_is_refused_and_nothing_is_left(tmp_path: Path, value: Any) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    before = files(tmp_path)
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 2, {"weights": torch.ones(3), "bad": value})
    assert files(tmp_path) == before
    assert names(tmp_path) == ["step-00000001"]


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
tensors = st.lists(st.integers(-5, 5), max_size=3).map(torch.tensor)
trees = st.recursive(
    scalars | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(trees)
def test_any_nested_state_comes_back(tree: Any) -> None:
    structure, found = checkpoint.pack(tree)
    assert plain(checkpoint.unpack(json.loads(json.dumps(structure)), found)) == plain(tree)


def test_random_states_continue_all_streams(tmp_path: Path) -> None:
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.normal()  # leaves a second number waiting in numpy's state
    random.gauss(0, 1)
    state = round_trip(tmp_path, checkpoint.random_states())
    wanted = (random.random(), random.gauss(0, 1), np.random.normal(), np.random.random(), torch.rand(3).tolist())
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    checkpoint.restore_random_states(state)
    assert (random.random(), random.gauss(0, 1), np.random.normal(), np.random.random(), torch.rand(3).tolist()) == wanted


# Keeping ---------------------------------------------------------------------------------------------------------------------------------


def test_the_newest_few_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step * 50, state_of(step), keep=2)
    assert names(tmp_path) == ["step-00000200", "step-00000250"]
    assert checkpoint.load(tmp_path)[0] == 250
    assert checkpoint.load_step(tmp_path, 200)["step"] == 4


def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 5, state_of(1), keep=1)
    checkpoint.save(tmp_path, 5, state_of(2), keep=1)
    assert names(tmp_path) == ["step-00000005"]
    assert checkpoint.load(tmp_path)[1]["step"] == 2


def test_leftovers_of_a_killed_writer_are_ignored_and_swept_away(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    left = tmp_path / ".partial-00000002-123"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    assert checkpoint.load(tmp_path)[0] == 1
    checkpoint.save(tmp_path, 3, state_of(3))
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_damaged_newer_checkpoint_never_pushes_out_a_whole_one(tmp_path: Path) -> None:
    for step in (50, 100):
        checkpoint.save(tmp_path, step, state_of(step), keep=1 if step == 50 else 2)
    (tmp_path / "step-00000100" / "state.json").write_text("{", encoding="utf-8")
    assert checkpoint.load(tmp_path)[0] == 50
    checkpoint.save(tmp_path, 75, state_of(75), keep=1)  # the run went on from 50
    assert checkpoint.load(tmp_path)[0] == 75
    assert names(tmp_path) == ["step-00000075"]


# Damage ----------------------------------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_cut_or_missing_file_is_named_and_the_checkpoint_before_is_used(tmp_path: Path, name: str, damage: Any) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state_of(step))
    damage(tmp_path / "step-00000002" / name)
    step, state, faults = checkpoint.load(tmp_path)
    assert (step, state["step"]) == (1, 1)
    assert len(faults) == 1
    assert "step-00000002" in faults[0]
    assert name in faults[0] or "manifest" in faults[0]
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000001"


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_one_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state_of(step))
    flip(tmp_path / "step-00000002" / name)
    step, _, faults = checkpoint.load(tmp_path)
    assert step == 1
    assert f"{name} does not have the recorded SHA-256" in faults[0]
    with pytest.raises(Failure, match=f"step-00000002: {name}"):
        checkpoint.load_step(tmp_path, 2)


@pytest.mark.parametrize("text", ["[]", "{}", '{"files": []}', '{"files": {"state.json": 3}}', "null"])
def test_a_manifest_of_another_shape_is_a_fault_not_a_crash(tmp_path: Path, text: str) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))
    (tmp_path / "step-00000001" / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(Failure, match="no whole checkpoint"):
        checkpoint.load(tmp_path)


def test_when_none_is_whole_every_fault_is_told(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state_of(step))
        cut(tmp_path / f"step-0000000{step}" / "tensors.safetensors")
    with pytest.raises(Failure, match=r"step-00000002: tensors.safetensors has \d+ of \d+ bytes; .*step-00000001"):
        checkpoint.load(tmp_path)
    shutil.rmtree(tmp_path / "step-00000001"), shutil.rmtree(tmp_path / "step-00000002")
    with pytest.raises(Failure, match="stopped before its first one"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_said_and_older_checkpoints_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    folder = tmp_path / "run" / "checkpoints"
    checkpoint.save(folder, 1, state_of(1))
    before = files(folder)

    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        Failure, match=rf"step 2 .*the disk is full; the last whole checkpoint is step-00000001.*telos resume {tmp_path / 'run'}"
    ):
        checkpoint.save(folder, 2, state_of(2))
    assert files(folder) == before
    assert names(folder) == ["step-00000001"]


def test_a_folder_that_cannot_be_written_is_a_failure_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in its place", encoding="utf-8")
    with pytest.raises(Failure, match="there is no earlier checkpoint"):
        checkpoint.save(tmp_path / "checkpoints", 2, state_of(2))


@pytest.mark.parametrize("moment", ["save_file", "_sha256", "_sync"])
def test_a_kill_while_writing_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    checkpoint.save(tmp_path, 1, state_of(1))

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, moment, kill)
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, 2, state_of(2), keep=1)
    assert checkpoint.load(tmp_path)[0] == 1
    checkpoint.save(tmp_path, 2, state_of(2), keep=1)
    assert names(tmp_path) == ["step-00000002"]
