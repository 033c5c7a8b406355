"""A run's folder: what is written, what is never overwritten, and what a kill can do to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import telos
from telos.core import run as runs
from telos.core.config import RunConfig
from telos.core.errors import TelosWarning, UsageError
from telos.core.run import Run, write_atomically


def make(folder: Path, **options: object) -> Run:
    return Run.create("dpo", RunConfig(out=str(folder), **options))  # type: ignore[arg-type]


def test_a_new_run_says_with_what_it_is_done(tmp_path: Path) -> None:
    run = make(tmp_path / "a run", seed=3)
    facts = run.facts
    assert facts["method"] == "dpo"
    assert facts["status"] == "running"
    assert facts["versions"]["telos"] == telos.__version__
    assert facts["versions"].keys() >= {"python", "torch", "transformers", "numpy"}
    assert facts["hardware"]["cores"] >= 1
    assert f"telos train dpo --config '{tmp_path}/a run/config.yaml'" in facts["reproduce"], "a path with a space is quoted"
    written = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    assert written["seed"] == 3
    assert Run.open(run.path).facts == facts


def test_an_unnamed_run_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = Run.create("dpo", RunConfig()), Run.create("dpo", RunConfig())
    assert first.path != second.path
    assert first.path.parent == Path("runs")
    assert first.path.name.startswith("dpo-")


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = make(tmp_path / "run", seed=1)
    before = (run.path / "run.json").read_bytes(), (run.path / "config.yaml").read_bytes()
    with pytest.raises(UsageError, match=r"already holds a run; continue it with `telos resume"):
        make(tmp_path / "run", seed=2)
    assert ((run.path / "run.json").read_bytes(), (run.path / "config.yaml").read_bytes()) == before


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "model", "critic", "warnings.log"])
def test_a_users_file_of_a_name_that_runs_write_is_never_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=f"holds {name}, which the run would overwrite"):
        make(tmp_path)
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_a_users_other_files_may_be_in_the_folder_and_survive_a_run_that_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    run = make(tmp_path)
    run.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_start_that_was_killed_before_run_json_can_be_repeated(tmp_path: Path) -> None:
    run = make(tmp_path / "run", seed=4)
    (run.path / "run.json").unlink()
    with pytest.raises(UsageError, match=r"no run\.json"):
        Run.open(run.path)
    assert make(tmp_path / "run", seed=4).facts["status"] == "running"


def test_a_run_that_could_not_start_leaves_no_folder(tmp_path: Path) -> None:
    make(tmp_path / "run").discard()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"--out .*/file/run: cannot be written"):
        make(tmp_path / "file" / "run")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "null"])
def test_a_damaged_run_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"run\.json is damaged"):
        Run.open(tmp_path)


def test_numbers_are_on_disk_as_soon_as_they_are_logged_and_survive_exactly(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    rows = [{"step": 1, "loss": 0.1 + 0.2, "tiny": 5e-324}, {"step": 2, "loss": -1 / 3, "tiny": 1e300}]
    for row in rows:
        run.log(int(row["step"]), {name: value for name, value in row.items() if name != "step"})
        assert Run.open(run.path).metrics()[-1] == row, "without closing the file"
    run.rewind(1)
    assert run.metrics() == rows[:1]


def test_rewinding_keeps_lines_byte_for_byte(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    for step in (1, 2, 3):
        run.log(step, {"loss": 1 / 3, "nan": float("nan"), "ünïcode": 1e-7})
    run.close()
    before = (run.path / "metrics.jsonl").read_bytes()
    run.rewind(2)
    run.log(3, {"loss": 1 / 3, "nan": float("nan"), "ünïcode": 1e-7})
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_a_warning_reaches_the_user_and_the_log(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.warns(TelosWarning, match="three rows were dropped"):
        run.warn("three rows were dropped")
    assert run.warnings() == ["three rows were dropped"]


def test_a_file_is_the_old_or_the_new_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.json"
    write_atomically(file, "old")

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs.os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new")
    assert file.read_text(encoding="utf-8") == "old"


def test_facts_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.describe(plan={"steps": 3})
    run.describe(status="finished")
    facts = json.loads((run.path / "run.json").read_text(encoding="utf-8"))
    assert (facts["plan"], facts["status"], facts["method"]) == ({"steps": 3}, "finished", "dpo")


def test_a_package_inside_somebody_elses_repository_claims_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    def git(*words: str) -> None:
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", *words], check=True, capture_output=True)

    git("init"), (tmp_path / "theirs.txt").write_text("theirs"), git("add", "."), git("commit", "-m", "theirs")
    site = tmp_path / "site-packages" / "telos" / "core"
    site.mkdir(parents=True)
    (site / "run.py").write_text("")
    monkeypatch.setattr(runs, "__file__", str(site / "run.py"))
    assert runs.commit() is None
    git("add", "."), git("commit", "-m", "ours")
    assert len(runs.commit() or "") == 40
    (site / "run.py").write_text("changed")
    assert (runs.commit() or "").endswith("+")
