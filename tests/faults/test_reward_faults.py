"""What bad reward functions do to a run: each gives one clear error, none becomes a number."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from telos.core.errors import Failure, UsageError
from telos.objectives import reward_worker
from telos.objectives.rewards import FunctionReward, ProcessReward, RewardSource, load_reward

MODULE = """
import asyncio
import json
import os
import subprocess
import sys
import time

loaded = time.time_ns()


def good(completions, **columns):
    return [float(len(c)) for c in completions]


def raises(completions, **columns):
    total = len(completions)
    return [total / 0]


def raises_in_library(completions, **columns):
    return [json.loads(c) for c in completions]


def hangs(completions, **columns):
    if "hang" in completions:
        while True:
            time.sleep(0.01)
    return [1.0] * len(completions)


def starts_a_child(completions, **columns):
    if "hang" in completions:
        time.sleep(60)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    return [float(child.pid)] * len(completions)


def short(completions, **columns):
    return [1.0] * (len(completions) - 1)


def one_number(completions, **columns):
    return 1.0


def nan(completions, **columns):
    return [1.0, float("nan"), 2.0]


def inf(completions, **columns):
    return [float("-inf"), 0.0, 2.0]


def huge(completions, **columns):
    return [10**400, 1e39, 2.0]


def text(completions, **columns):
    return ["good", 0.0, 2.0]


def none(completions, **columns):
    return [None] * len(completions)


def mixed(completions, **columns):
    return [None, 0.0, True]


def prints(completions, **columns):
    print("noise on stdout")
    sys.__stdout__.write("more noise")
    os.system("echo noise of a child")
    os.write(1, b'{"outcomes": [9, 9, 9]}\\n')
    sys.stdin.read()
    return [1.0, 2.0, 3.0]


def exits(completions, **columns):
    sys.exit(3)


def kills(completions, **columns):
    os.kill(os.getpid(), 9)


def leaves(completions, **columns):
    os._exit(7)


async def waits(completions, **columns):
    await asyncio.sleep(0.01)
    return [2.5] * len(completions)


async def waits_forever(completions, **columns):
    await asyncio.sleep(60)


def age(completions, **columns):
    return [float(loaded % 10**6)] * len(completions)


def zero(completions, **columns):
    return [0.0] * len(completions)


def needs_answer(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "bad":
        raise ValueError("cannot parse")
    return {"score": float(solution_str == ground_truth), "from": data_source}


constant = 3
"""

ROWS = ["a", "bb", "ccc"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(folder: Path):
    """Loads a function of the module and closes it after the test."""
    sources: list[RewardSource] = []

    def make(function: str, **options) -> RewardSource:
        source = load_reward(f"{folder}/mine.py:{function}", **options)
        sources.append(source)
        return source

    yield make
    for source in sources:
        source.close()


def score(source: RewardSource, completions: list[str] = ROWS, **columns):
    count = len(completions)
    return source.score(["p"] * count, completions, [[1]] * count, columns)


def line_of(text: str) -> int:
    return MODULE.split("\n").index(text) + 1


# Functions in a process of their own ------------------------------------------------------------------------------------------------------


def test_a_sound_function_gives_its_numbers(load):
    scores = score(load("good"))
    assert scores.values.tolist() == [1.0, 2.0, 3.0]
    assert scores.counts() == {"valid": 3, "not_applicable": 0, "error": 0}


def test_zero_is_a_reward_and_none_is_not(load):
    assert score(load("zero")).counts() == {"valid": 3, "not_applicable": 0, "error": 0}
    scores = score(load("mixed"))
    assert scores.status.tolist() == [1, 0, 0]
    assert scores.values.isnan().tolist() == [True, False, False]
    assert scores.values[1:].tolist() == [0.0, 1.0]
    assert score(load("none")).counts() == {"valid": 0, "not_applicable": 3, "error": 0}


def test_an_exception_names_the_line_and_the_rows(load):
    with pytest.raises(Failure) as error:
        score(load("raises"))
    message = str(error.value)
    assert "ZeroDivisionError" in message
    assert f"mine.py, line {line_of('    return [total / 0]')}" in message
    assert "rows 0 to 2" in message
    assert "'raises'" in message


def test_an_exception_inside_a_library_names_the_users_line(load):
    with pytest.raises(Failure, match=f"mine.py, line {line_of('    return [json.loads(c) for c in completions]')}"):
        score(load("raises_in_library"))


def test_invalid_policy_counts_an_exception_and_goes_on(load):
    source = load("raises", on_error="invalid")
    scores = score(source)
    assert scores.counts() == {"valid": 0, "not_applicable": 0, "error": 3}
    assert scores.values.isnan().all()
    assert "ZeroDivisionError" in scores.problem


def test_a_hang_is_killed_after_its_timeout(load):
    source = load("hangs", timeout=1.0)
    began = time.monotonic()
    with pytest.raises(Failure, match=r"longer than its timeout of 1 s.*rows 0 to 1"):
        score(source, ["x", "hang"])
    assert 0.9 < time.monotonic() - began < 20


def test_after_a_hang_another_process_goes_on(load):
    source = load("hangs", timeout=1.0, on_error="invalid")
    assert score(source, ["hang"]).counts()["error"] == 1
    source.timeout = 30.0
    assert score(source, ["x"]).values.tolist() == [1.0]


def test_a_hang_takes_the_programs_it_started_with_it(load):
    source = load("starts_a_child")
    child = psutil.Process(int(score(source, ["x"]).values.item()))
    assert child.is_running()
    source.timeout = 0.5
    with pytest.raises(Failure, match="timeout"):
        score(source, ["hang"])
    deadline = time.monotonic() + 20
    with contextlib.suppress(psutil.NoSuchProcess):
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_module_is_imported_once(load):
    source = load("age")
    assert score(source).values.tolist() == score(source).values.tolist()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("short", "expected 3, got 2"),
        ("one_number", "a list with one number for each of the 3 completions"),
        ("nan", "gave NaN \\(row 1 of the batch's 3, completion 'bb'\\)"),
        ("inf", "gave -infinity \\(row 0"),
        ("huge", "gave infinity|too large"),
        ("text", "gave 'good' \\(a str\\).*row 0.*'a'"),
        ("exits", "sys.exit\\(3\\)"),
        ("kills", "SIGKILL"),
        ("leaves", "exit code 7"),
    ],
)
def test_a_bad_answer_stops_the_run_with_one_error(load, function, words):
    with pytest.raises(Failure, match=words) as error:
        score(load(function))
    assert f"reward {function!r}" in str(error.value)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("function", "status"),
    [
        ("short", [2, 2, 2]),
        ("nan", [0, 2, 0]),
        ("inf", [2, 0, 0]),
        ("huge", [2, 2, 0]),
        ("text", [2, 0, 0]),
        ("exits", [2, 2, 2]),
        ("kills", [2, 2, 2]),
    ],
)
def test_invalid_policy_marks_only_the_bad_rows(load, function, status):
    source = load(function, on_error="invalid")
    for _ in range(2):  # the second batch meets a living process, whatever the first did to it
        scores = score(source)
        assert scores.status.tolist() == status
        assert scores.values.isnan().tolist() == [code != 0 for code in status]


def test_printing_and_reading_do_not_touch_the_protocol(load):
    source = load("prints")
    for _ in range(2):
        assert score(source).values.tolist() == [1.0, 2.0, 3.0]


def test_async_functions_are_awaited(load):
    assert score(load("waits")).values.tolist() == [2.5] * 3
    with pytest.raises(Failure, match="timeout of 1 s"):
        score(load("waits_forever", timeout=1.0))


def test_verl_functions_are_called_row_by_row(load):
    source = load("compute_score", on_error="invalid")
    scores = score(source, ["4", "5", "bad"], data_source=["s"] * 3, reward_model=[{"ground_truth": "4"}] * 3)
    assert scores.status.tolist() == [0, 0, 2]
    assert scores.values[:2].tolist() == [1.0, 0.0]
    assert "cannot parse" in scores.problem
    assert "row 2" in scores.problem
    scores = score(source, ["4", "5"], data_source=["s"] * 2, ground_truth=["5", "5"])
    assert scores.values.tolist() == [0.0, 1.0]


def test_a_missing_column_is_refused_by_name(load):
    with pytest.raises(UsageError, match=r"parameter 'answer'.*did you mean 'answers'.*the data have answers, level"):
        score(load("needs_answer"), answers=[1] * 3, level=[1] * 3)
    with pytest.raises(UsageError, match="'ground_truth'"):
        score(load("compute_score"), data_source=["s"] * 3)
    with pytest.raises(UsageError, match="'data_source'"):
        score(load("compute_score"), ground_truth=["s"] * 3)


def test_a_column_that_is_no_json_is_refused_by_name(load):
    with pytest.raises(UsageError, match="column 'when'"):
        score(load("good"), fine=[1] * 3, when=[object()] * 3)


def test_large_batches_cross_the_pipes(load):
    completions = ["x" * 20_000] * 200  # four megabytes: many times what a pipe holds
    assert score(load("good"), completions).values.tolist() == [20_000.0] * 200


def test_an_empty_batch_has_no_scores(load):
    assert len(score(load("raises"), [])) == 0


def test_missing_functions_are_refused_with_a_suggestion(load):
    with pytest.raises(UsageError, match=r"no function 'god'.*did you mean 'good'"):
        load("god")
    with pytest.raises(UsageError, match=r"'constant'.*is a int, not a function"):
        load("constant")


def test_missing_files_and_modules_are_refused(folder):
    with pytest.raises(UsageError, match=r"no file .*mime.py.*did you mean 'mine.py'"):
        load_reward(f"{folder}/mime.py:good")
    with pytest.raises(UsageError, match="no module 'absent_package'"):
        load_reward("absent_package.rewards:good")
    with pytest.raises(UsageError, match="no module 'reward_model'"):  # this package's own files are no modules of the user's
        load_reward("reward_model:load")
    (folder / "needs.py").write_text("import absent_package\n")
    with pytest.raises(UsageError, match=r"needs the module 'absent_package'.*needs.py, line 1"):
        load_reward("needs.py:good")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = 1\ndef f(:\n    pass\n", r"broken.py, line 2"),
        ("x = 1\n1 / 0\n", r"raised ZeroDivisionError.*broken.py, line 2"),
        ("import sys\nsys.exit(4)\n", r"sys.exit\(4\).*broken.py, line 2"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_with_its_line(folder, code, words):
    (folder / "broken.py").write_text(code)
    with pytest.raises(UsageError, match=words):
        load_reward("broken.py:f")


def test_an_import_that_hangs_or_dies_fails(folder):
    (folder / "slow.py").write_text("import time\ntime.sleep(60)\n")
    with pytest.raises(Failure, match=r"timeout of 1 s.*imported"):
        load_reward("slow.py:f", start_timeout=1.0)
    (folder / "dies.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(Failure, match=r"exit code 5.*imported"):
        load_reward("dies.py:f")


def test_modules_are_found_from_the_working_folder_whatever_their_name(folder):
    # The worker's own folder holds a module of this name too.
    (folder / "rewards.py").write_text(
        "import neighbour\ndef f(completions, **columns):\n    return [neighbour.value] * len(completions)\n"
    )
    (folder / "neighbour.py").write_text("value = 4.0\n")
    source = load_reward("rewards:f")
    assert score(source).values.tolist() == [4.0] * 3
    source.close()


def test_a_closed_source_leaves_no_process_and_starts_again(load):
    source = load("good")
    assert isinstance(source, ProcessReward)
    before = {child.pid for child in psutil.Process().children()}
    source.close()
    assert len({child.pid for child in psutil.Process().children()}) == len(before) - 1
    assert score(source).values.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("busy", [False, True])
def test_the_process_ends_when_its_input_does(folder, busy):
    # Whatever ends the parent, kill -9 too, closes the pipe.
    (folder / "slow.py").write_text("import time\ntime.sleep(60)\n")
    command = [sys.executable, "-P", reward_worker.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder) as process:
        assert process.stdin is not None
        request = {"load": {"target": "slow.py" if busy else "mine.py", "function": "good"}}
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.close()
        assert process.wait(timeout=30) == 0


# Callables in this process ----------------------------------------------------------------------------------------------------------------


def test_a_callable_that_hangs_is_stopped_in_the_main_thread():
    def sleeps(completions, **columns):
        try:
            time.sleep(60)
        except Exception:  # a broad handler does not swallow the timeout
            time.sleep(60)

    source = FunctionReward(sleeps, timeout=0.3)
    began = time.monotonic()
    with pytest.raises(Failure, match=r"timeout of 0.3 s"):
        score(source)
    assert time.monotonic() - began < 20


def test_a_callable_that_swallows_everything_is_stopped_too():
    def stubborn(completions, **columns):
        for _ in range(2):
            with contextlib.suppress(BaseException):
                time.sleep(60)

    began = time.monotonic()
    source = FunctionReward(stubborn, timeout=0.2)
    with pytest.raises(Failure):
        score(source)
    assert time.monotonic() - began < 20


def test_the_alarm_leaves_nothing_behind():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    assert score(FunctionReward(lambda completions, **columns: [1.0] * len(completions), name="one")).values.tolist() == [1.0] * 3
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_callables_work_outside_the_main_thread():
    found = []
    source = FunctionReward(lambda completions: [0.5] * len(completions), name="half")
    thread = threading.Thread(target=lambda: found.append(score(source)))
    thread.start()
    thread.join()
    assert found[0].values.tolist() == [0.5] * 3


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda completions: [1.0], "expected 3, got 1"),
        (lambda completions: [float("nan")] * 3, "NaN"),
        (lambda completions: sys.exit(2), r"sys.exit\(2\)"),
        (lambda completions: {}["missing"], "KeyError: 'missing' at .*test_reward_faults.py, line"),
    ],
)
def test_a_callable_fails_as_a_named_function_does(function, words):
    with pytest.raises(Failure, match=words):
        score(FunctionReward(function, name="f"))
    assert score(FunctionReward(function, name="f", on_error="invalid")).counts()["error"] == 3
