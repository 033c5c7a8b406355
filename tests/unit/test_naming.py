"""Functions and classes that are handed over in Python are found again by name."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import telos
from telos.core.errors import UsageError
from telos.core.naming import IMPORTING, importing, named
from telos.functional.returns import gae

REWARD = "def brief(completions, **columns):\n    return [1.0 / (1 + len(text)) for text in completions]\n"


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_a_function_of_a_file_is_named_by_it_and_one_of_a_package_by_its_module(tmp_path: Path) -> None:
    path = tmp_path / "own_rewards.py"
    path.write_text(REWARD)
    brief = imported(path).brief
    assert named("reward", brief) == f"{path}:brief"
    assert named("reward", [brief, "a/folder"]) == [f"{path}:brief", "a/folder"]
    assert named("reward", gae) == "telos.functional.returns:gae"
    for plain in (3, "text", None, 0.5, ("a", "b"), True):
        assert named("x", plain) == plain


def test_what_has_no_name_of_its_own_is_refused() -> None:
    def inner() -> None: ...

    message = "cannot be found again by another process: give a function or class that a file defines at its top"
    for nameless in (lambda: None, inner, functools.partial(gae)):
        with pytest.raises(UsageError, match=message):
            named("reward", nameless)


SCRIPT = (
    REWARD
    + """
import telos

{guard}telos.train("grpo", model="tinylm", data="docstrings", reward=brief, steps=1, batch_size=2, samples_per_prompt=2, minibatch_size=4,
    max_completion_length=4, checkpoint_every=0, out="run", threads=1)
"""
)


def test_a_script_trains_with_a_reward_that_it_defines_itself(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SCRIPT.format(guard='if __name__ == "__main__": '))
    subprocess.run([sys.executable, "own.py"], cwd=tmp_path, check=True, capture_output=True)
    assert "reward: \n" not in (config := (tmp_path / "run" / "config.yaml").read_text())
    assert "own.py:brief" in config


def test_a_script_that_trains_when_it_is_imported_is_told_how_not_to(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SCRIPT.format(guard=""))
    done = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'put the call under `if __name__ == "__main__":`' in done.stderr


def test_training_is_refused_only_while_a_file_is_imported() -> None:
    with importing("own.py"), pytest.raises(UsageError, match=r"own\.py starts training when it is imported"):
        telos.train("sft")
    assert IMPORTING not in os.environ
    with pytest.raises(UsageError, match="--data is missing"):
        telos.train("sft")


def test_an_environment_class_may_be_given_as_it_is(tmp_path: Path) -> None:
    path = Path(__file__).parents[2] / "examples" / "own_environment.py"
    options = {"num_envs": 1, "total_steps": 8, "rollout_steps": 8, "minibatch_size": 8, "epochs": 1, "eval_episodes": 1, "hidden": [4]}
    run = telos.train("ppo", env=imported(path).Hover, out=str(tmp_path / "run"), **options)
    assert run.facts["evaluation"]["evaluation/count"] == 1
