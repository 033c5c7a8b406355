"""Programs that mean harm, in the sandbox: each is refused or ended, and leaves nothing behind.

Every program here is bounded in itself (what it starts ends within seconds, what it takes is little or never touched), so that a sandbox that
does not work fails a test and harms nothing. Nothing is tried outside a test's own folder and the loopback interface.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from telos.core.errors import Failure, UsageError
from telos.objectives import sandbox, sandbox_worker
from telos.objectives.sandbox import Limits, Means, Outcome, Sandbox

LIMITS = Limits(seconds=60.0, cpu_seconds=10)
MEANS = {str(means): means for _, means, _ in sandbox._candidates() if means is not None}


@pytest.fixture(params=MEANS)
def means(request: pytest.FixtureRequest) -> Means:
    """Every means that this machine offers by its looks; those that do not pass the trial must say so."""
    try:
        return sandbox._choose(MEANS[request.param], False)
    except Failure as failure:
        pytest.skip(str(failure))


@pytest.fixture
def many(means: Means) -> Means:
    """A means that allows and bounds several processes."""
    try:
        return sandbox._choose(means, True)
    except Failure as failure:
        pytest.skip(str(failure))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where sandboxes make their folders in this test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


BOXES: dict[tuple[Means, Limits], Sandbox] = {}


@pytest.fixture(scope="module", autouse=True)
def _close_boxes():
    yield
    for box in BOXES.values():
        box.close()


def run(means: Means, source: str, stdin: str = "", limits: Limits = LIMITS) -> Outcome:
    if (means, limits) not in BOXES:
        BOXES[means, limits] = Sandbox(limits, means=means)
    return BOXES[means, limits].run(source, stdin)


def alive(name: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["name"]) if process.info["name"] == name]


def gone(name: str, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while alive(name):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


NAMED = """
import ctypes, os, signal, sys, time

def call_me(name):
    ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
"""


# What ordinary programs get ----------------------------------------------------------------------------------------------------------------


def test_this_machine_has_a_means_that_keeps_every_promise():
    with Sandbox() as box:
        assert box.describe() == str(box.means)
        assert "seccomp" in box.describe()
        assert box.run("print('hello')").stdout == "hello\n"


def test_ordinary_programs_run_with_input_exit_code_and_both_streams(means: Means):
    outcome = run(means, "import sys\nprint(sys.stdin.read().upper())\nprint('warned', file=sys.stderr)\nsys.exit(3)", "grüße ✓")
    assert (outcome.status, outcome.exit_code, outcome.stdout, outcome.stderr) == ("error", 3, "GRÜSSE ✓\n", "warned\n")
    outcome = run(means, "pass")
    assert outcome.ok
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "", "")
    assert 0 < outcome.cpu_seconds < 5
    assert 0 < outcome.seconds < 20


def test_the_standard_library_works(means: Means):
    program = """
import asyncio, collections, concurrent.futures, datetime, hashlib, json, math, os, random, re, shutil, sqlite3, tempfile, threading, zoneinfo

async def wait():
    await asyncio.sleep(0.01)
    return 1

with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(abs, range(-3, 0)))
with tempfile.TemporaryDirectory() as folder:
    with open(folder + "/a", "w") as file:
        file.write("text")
    shutil.copyfile(folder + "/a", folder + "/b")
    os.rename(folder + "/b", folder + "/c")
    found.append(open(folder + "/c").read())
sqlite3.connect("base.db").execute("create table numbers (n integer)")
open(os.devnull, "w").write("x")
found += [asyncio.run(wait()), zoneinfo.ZoneInfo("Europe/Berlin").key, len(os.urandom(4)), os.listdir()]
print(json.dumps(found))
"""
    outcome = run(means, program)
    assert outcome.stderr == ""
    assert outcome.stdout == '[3, 2, 1, "text", 1, "Europe/Berlin", 4, ["base.db"]]\n'


def test_an_uncaught_exception_leaves_its_traceback_and_reads_the_same_each_time(means: Means):
    program = "def f(n):\n    return 1 / n\n\n\nf(0)\n"
    outcome = run(means, program)
    assert (outcome.status, outcome.exit_code) == ("error", 1)
    assert 'File "program.py", line 2, in f\n    return 1 / n' in outcome.stderr
    assert outcome.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert run(means, program).stderr == outcome.stderr


@pytest.mark.parametrize("source", ["print('", "\ud800", "# -*- coding: nonsense -*-", "return"])
def test_source_that_is_no_program_is_an_error_of_the_program(means: Means, source: str):
    outcome = run(means, source)
    assert (outcome.status, outcome.exit_code) == ("error", 1)
    assert "SyntaxError" in outcome.stderr or "encoding" in outcome.stderr


def test_nothing_of_ours_is_in_a_program(means: Means, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    program = """
import os, sys
open_ones = []
for number in range(256):
    try:
        os.fstat(number)
        open_ones.append(number)
    except OSError:
        pass
print(open_ones, "SECRET_TOKEN" in os.environ, os.getcwd() == os.environ["HOME"], os.listdir(), [m for m in sys.modules if "telos" in m])
"""
    assert run(means, program).stdout == "[0, 1, 2] False True [] []\n"


def test_sets_have_the_same_order_each_time(means: Means):
    program = "print({f'word{i}' for i in range(50)})"
    assert run(means, program).stdout == run(means, program).stdout


def test_folders_given_by_name_can_be_imported_from_and_no_others(means: Means, tmp_path: Path):
    for name in ("given", "hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}_module.py").write_text("value = 7\n", encoding="utf-8")
    with Sandbox(LIMITS, means=means, modules=[tmp_path / "given"]) as box:
        assert box.run("import given_module\nprint(given_module.value)").stdout == "7\n"
        assert "ModuleNotFoundError" in box.run("import hidden_module").stderr
        refused = box.run(f"open({str(tmp_path / 'given' / 'given_module.py')!r}, 'a')")
        assert refused.stderr.rstrip().rpartition("\n")[2].startswith(("PermissionError", "OSError: [Errno 30] Read-only"))
    with pytest.raises(UsageError, match="no such folder"):
        Sandbox(LIMITS, modules=[tmp_path / "missing"])


def test_many_programs_run_at_the_same_time_and_keep_their_order(means: Means):
    with Sandbox(LIMITS, means=means) as box:
        outcomes = box.run_many([f"print(input(), {i})" for i in range(6)], [f"in{i}" for i in range(6)], workers=3)
        assert [outcome.stdout for outcome in outcomes] == [f"in{i} {i}\n" for i in range(6)]
        assert len({worker._process.pid for worker in box._idle}) <= 3
        with pytest.raises(UsageError, match="6 programs were given 1 input"):
            box.run_many(["pass"] * 6, ["x"])
        with pytest.raises(UsageError, match="0 workers"):
            box.run_many(["pass"], workers=0)


def test_a_sandbox_goes_on_working_after_a_fork_and_after_close(means: Means):
    with Sandbox(LIMITS, means=means) as box:
        assert box.run("print(1)").stdout == "1\n"
        child = os.fork()
        if child == 0:
            os._exit(0 if box.run("print(2)").stdout == "2\n" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert box.run("print(3)").stdout == "3\n"
        box.close()
        assert box.run("print(4)").stdout == "4\n"


# Time, memory, output, files ---------------------------------------------------------------------------------------------------------------


def test_an_endless_loop_ends_with_its_processor_time(means: Means):
    outcome = run(means, "print('begun', flush=True)\nwhile True:\n    pass", limits=Limits(seconds=90.0, cpu_seconds=1))
    assert (outcome.status, outcome.exit_code, outcome.stdout) == ("timeout", None, "begun\n")
    assert outcome.seconds < 85


def test_a_program_that_ignores_the_first_signal_ends_with_the_second(means: Means):
    program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True:\n    pass"
    outcome = run(means, program, limits=Limits(seconds=90.0, cpu_seconds=1))
    assert outcome.status == "timeout"
    assert outcome.seconds < 85


def test_sleeping_ends_by_the_clock(means: Means):
    outcome = run(means, "import time\nprint('begun', flush=True)\ntime.sleep(60)", limits=Limits(seconds=2.0))
    assert (outcome.status, outcome.exit_code) == ("timeout", None)
    assert 2.0 <= outcome.seconds < 20


def test_ten_gigabytes_are_not_to_be_had(means: Means):
    outcome = run(means, "print('begun', flush=True)\nb = bytearray(10**10)")
    assert (outcome.status, outcome.stdout) == ("memory", "begun\n")
    assert outcome.exit_code == 1
    assert run(means, "import mmap\nmmap.mmap(-1, 10**10)").status == "error"
    # Half of what it may have, it may have.
    assert run(means, f"b = bytearray({LIMITS.memory_bytes // 2})").ok


def test_a_flood_of_output_is_cut(means: Means):
    outcome = run(
        means, "import sys\nfor i in range(10**6):\n    sys.stdout.write('x' * 1000)", limits=Limits(seconds=60.0, output_bytes=100_000)
    )
    assert (outcome.status, outcome.exit_code, outcome.stdout) == ("output", None, "x" * 100_000)
    outcome = run(means, "import sys\nsys.stderr.write('x' * 101)", limits=Limits(seconds=60.0, output_bytes=100))
    assert (outcome.status, outcome.stderr) == ("output", "x" * 100)
    outcome = run(means, "print('x' * 99)", limits=Limits(seconds=60.0, output_bytes=100))
    assert outcome.ok
    assert len(outcome.stdout) == 100


def test_a_huge_file_cannot_be_written(means: Means):
    limits = Limits(seconds=60.0, file_bytes=1 << 20)
    outcome = run(
        means, "f = open('large', 'wb', buffering=0)\nfor i in range(64):\n    assert f.write(b'x' * 2**16) == 2**16", limits=limits
    )
    assert outcome.status == "error"
    assert "AssertionError" in outcome.stderr or "File too large" in outcome.stderr
    assert "File too large" in run(means, "f = open('sparse', 'wb')\nf.seek(2**40)\nf.write(b'x')\nf.flush()", limits=limits).stderr
    assert run(means, "open('small', 'wb').write(b'x' * 2**19)", limits=limits).ok


def test_many_files_that_are_each_small_are_too_much_together(means: Means):
    limits = Limits(seconds=60.0, file_bytes=1 << 20)
    together = "for i in range(8):\n    open(str(i), 'wb').write(b'x' * 2**19)\nimport time\ntime.sleep(10)"
    assert run(means, together, limits=limits).status == "files"
    empty = "for i in range(1100):\n    open(str(i), 'w').close()\nimport time\ntime.sleep(10)"
    assert run(means, empty, limits=limits).status == "files"


def test_the_working_folder_is_deleted_whatever_lies_in_it(means: Means, scratch: Path):
    program = """
import os
os.makedirs("a/b/c")
os.symlink("/", "a/root")
os.mkdir("locked", 0)
print("begun", flush=True)
for i in range(1100):
    os.mkdir("d")
    os.chdir("d")
"""
    assert run(means, program).stdout == "begun\n"
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize("program", ["import os\nos.abort()", "import ctypes\nctypes.string_at(0)", "import os\nos.kill(os.getpid(), 9)"])
def test_a_crash_is_told_from_an_error(means: Means, program: str):
    outcome = run(means, program)
    assert outcome.status == "killed"
    assert outcome.exit_code in (-signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL)


# What lies outside -------------------------------------------------------------------------------------------------------------------------

REACH = """
import json, os, shutil, sys

def attempt(what, action):
    try:
        result = action()
    except OSError as error:
        return
    print("it could", what, repr(result))

home, secret = json.load(sys.stdin)
attempt("read", lambda: open(secret).read())
attempt("read as bytes", lambda: os.pread(os.open(secret, os.O_RDONLY), 100, 0))
attempt("list", lambda: os.listdir(home))
attempt("list the folder above", lambda: os.listdir(os.path.dirname(home)))
attempt("link", lambda: os.link(secret, "linked"))
attempt("read through a link", lambda: (os.symlink(secret, "soft"), open("soft").read()))
attempt("write", lambda: open(secret, "w"))
attempt("empty", lambda: os.truncate(secret, 0))
attempt("empty by opening", lambda: os.open(secret, os.O_RDONLY | os.O_TRUNC))
attempt("make a file", lambda: open(home + "/new", "w"))
attempt("make a folder", lambda: os.mkdir(home + "/folder"))
attempt("rename", lambda: os.rename(secret, home + "/renamed"))
attempt("bring one in", lambda: os.rename(secret, "brought"))
attempt("put one there", lambda: os.rename("soft", home + "/put"))
attempt("change rights", lambda: os.chmod(secret, 0o777))
attempt("change rights of the folder", lambda: os.chmod(home, 0o777))
attempt("change the owner", lambda: os.chown(secret, 12345, 12345))
attempt("change times", lambda: os.utime(secret, (1, 1)))
attempt("delete", lambda: os.unlink(secret))
attempt("delete the folder", lambda: os.rmdir(home))
attempt("delete everything", lambda: shutil.rmtree(home))
for folder in ("/tmp", "/var/tmp", "/dev/shm", "/run", "/etc", "/usr/lib", "/", "..", sys.prefix, os.path.dirname(os.__file__), "../.."):
    attempt("write to " + folder, lambda: open(folder + "/telos-sandbox-test", "w"))
attempt("read its memory", lambda: open("/proc/self/mem", "rb"))
attempt("read accounts", lambda: open("/etc/shadow").read())
print("end")
"""


def test_the_home_folder_can_neither_be_read_nor_deleted(means: Means, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "home"
    (home / "folder").mkdir(parents=True)
    secret = home / "canary"
    secret.write_text("a secret", encoding="utf-8")
    # What is only the owner's must be hidden, and so must what everybody may read and write.
    for rights in (0o600, 0o666):
        secret.chmod(rights)
        for folder in (home, tmp_path):
            folder.chmod(0o777 if rights == 0o666 else 0o700)
        monkeypatch.setenv("HOME", str(home))
        before = secret.stat()
        outcome = run(means, REACH, f'["{home}", "{secret}"]')
        assert (outcome.stdout, outcome.stderr) == ("end\n", "")
        assert secret.read_text(encoding="utf-8") == "a secret"
        after = secret.stat()
        assert (after.st_mode, after.st_uid, after.st_mtime, after.st_nlink) == (before.st_mode, before.st_uid, before.st_mtime, 1)
        assert sorted(path.name for path in home.iterdir()) == ["canary", "folder"]
        assert list((home / "folder").iterdir()) == []


def test_the_home_folder_of_this_user_is_not_to_be_seen(means: Means):
    home = Path(os.path.expanduser("~"))
    program = (
        "import os, sys\nfor name in sys.stdin.read().split(chr(0)):\n    print(os.access(name, os.F_OK) and open(name, 'rb').read(1))"
    )
    names = [str(path) for path in home.iterdir() if path.is_file()][:5] or [str(home / "none")]
    outcome = run(means, program, "\0".join(names))
    assert set(outcome.stdout.split()) <= {"False"}
    assert outcome.status == "ok" or "PermissionError" in outcome.stderr


def test_there_is_no_network_and_the_listener_hears_nothing(means: Means):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        program = f"""
import socket, urllib.request
for action in (
    lambda: socket.create_connection(("127.0.0.1", {port}), timeout=2),
    lambda: socket.socket(socket.AF_UNIX),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", {port})),
    lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
    lambda: urllib.request.urlopen("http://127.0.0.1:{port}/", timeout=2),
    lambda: socket.create_server(("127.0.0.1", 0)),
):
    try:
        print("connected", action())
    except OSError as error:
        print("refused")
"""
        assert run(means, program).stdout == "refused\n" * 6
        listener.settimeout(0.2)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_processes_outside_cannot_be_signalled_traced_or_limited(means: Means):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        program = f"""
import ctypes, fcntl, os, resource, signal
libc = ctypes.CDLL(None, use_errno=True)
for action in (
    lambda: os.kill(os.getppid(), signal.SIGKILL),
    lambda: os.kill({child.pid}, signal.SIGKILL),
    lambda: os.kill({child.pid}, 0),
    lambda: os.kill({os.getpid()}, signal.SIGCONT),
    lambda: os.kill(-1, signal.SIGCONT),
    lambda: resource.prlimit({child.pid}, resource.RLIMIT_CPU, (0, 0)),
    lambda: os.sched_setaffinity({child.pid}, [0]),
    lambda: os.setpriority(os.PRIO_PROCESS, {child.pid}, 19),
    lambda: signal.pidfd_send_signal(os.pidfd_open({child.pid}), signal.SIGKILL),
    lambda: fcntl.fcntl(0, fcntl.F_SETOWN, {child.pid}),
    lambda: fcntl.fcntl(0, 10, signal.SIGKILL),
):
    try:
        print("it could", action())
    except OSError:
        pass
for name, number in (("ptrace", 16), ("setns", 0), ("unshare", 0x10000000), ("mount", 0), ("chroot", 0)):
    if getattr(libc, name)(number, {child.pid}, 0, 0, 0) >= 0:
        print("it could", name)
print("end")
"""
        assert run(means, program).stdout == "end\n"
        assert child.poll() is None
        assert resource_limits_of(child.pid) == resource_limits_of(os.getpid())
    finally:
        child.kill()
        child.wait()


def resource_limits_of(pid: int) -> str:
    return next(line for line in Path(f"/proc/{pid}/limits").read_text(encoding="utf-8").splitlines() if line.startswith("Max cpu time"))


# Processes -------------------------------------------------------------------------------------------------------------------------------


def test_a_program_that_may_have_one_process_starts_no_other_but_threads(means: Means):
    program = """
import os, subprocess, threading
for action in (os.fork, lambda: subprocess.run(["/bin/true"]), lambda: os.posix_spawn("/bin/true", ["true"], {})):
    try:
        if action() == 0:
            os._exit(0)
        print("it could")
    except OSError:
        print("refused")
threads = [threading.Thread(target=print, args=("thread",)) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""
    assert run(means, program).stdout == "refused\n" * 3 + "thread\n" * 3


def test_threads_are_bounded(means: Means):
    if os.geteuid() == 0 and not means.own_user:
        pytest.skip("the kernel does not count the threads of root; the address space bounds them")
    program = """
import threading
threading.stack_size(32768)
started, stop = 0, threading.Event()
try:
    while started < 1000:
        threading.Thread(target=stop.wait, args=(10,), daemon=True).start()
        started += 1
except RuntimeError:
    pass
stop.set()
print(started)
"""
    # Under our user's own id the kernel counts our other threads too.
    others = 0 if means.own_user else sandbox_worker.tasks_of_user()
    assert 10 <= int(run(means, program).stdout) <= sandbox_worker.THREADS + others


BOMB = (
    NAMED
    + """
call_me(sys.stdin.read())
first = os.getpid()
left, right = os.pipe()
for _ in range(9):  # at most 512 in all
    try:
        if os.fork():
            os.write(right, b"x")
    except OSError:
        break
if os.getpid() == first:
    time.sleep(1)
    print(len(os.read(left, 1000)), flush=True)
else:
    time.sleep(15)
"""
)


def test_a_fork_bomb_goes_off_small_and_leaves_nothing(many: Means):
    name = "tb" + secrets.token_hex(5)
    limits = Limits(seconds=60.0, processes=6, memory_bytes=6 * (128 << 20))
    outcome = run(many, BOMB, name, limits)
    assert outcome.status == "ok"
    assert 1 <= int(outcome.stdout) <= limits.processes - 1
    assert alive(name) == []


DAEMON = (
    NAMED
    + """
name = sys.stdin.read()
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    call_me(name)
    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_IGN)
    open("ready", "w").close()
    for _ in range(200):  # it would end by itself after 20 seconds
        time.sleep(0.1)
    os._exit(0)
while not os.path.exists("ready"):
    time.sleep(0.01)
print("ready", flush=True)
"""
)


def test_a_daemon_left_behind_is_killed_when_its_program_ends(many: Means):
    name = "td" + secrets.token_hex(5)
    outcome = run(many, DAEMON, name, Limits(seconds=60.0, processes=4))
    assert (outcome.status, outcome.stdout) == ("ok", "ready\n")
    assert alive(name) == []


def test_a_daemon_is_killed_when_time_is_over(many: Means):
    name = "td" + secrets.token_hex(5)
    outcome = run(many, DAEMON + "time.sleep(30)", name, Limits(seconds=4.0, processes=4))
    assert outcome.status == "timeout"
    assert alive(name) == []


def test_a_program_with_several_processes_cannot_signal_those_outside(many: Means):
    program = f"""
import os, signal
for target in ({os.getpid()}, -{os.getpgid(0)}):
    try:
        os.kill(target, 0)
        print("it could", target)
    except OSError:
        pass
if (child := os.fork()) == 0:
    signal.pause()
os.kill(child, signal.SIGTERM)
print(os.waitpid(child, 0)[1])
"""
    assert run(many, program, limits=Limits(seconds=60.0, processes=4)).stdout == f"{int(signal.SIGTERM)}\n"


def test_several_processes_share_the_memory(many: Means):
    program = "b = bytearray(200 << 20)"
    assert run(many, program, limits=Limits(seconds=60.0, processes=2, memory_bytes=1 << 30)).ok
    assert run(many, program, limits=Limits(seconds=60.0, processes=4, memory_bytes=512 << 20)).status == "memory"


def test_a_program_dies_with_the_process_that_asked_for_it(means: Means, tmp_path: Path):
    name = "to" + secrets.token_hex(5)
    program = NAMED + f"call_me({name!r})\ntime.sleep(40)"
    asking = (
        "import sys; from telos.objectives import sandbox; "
        f"box = sandbox.Sandbox(sandbox.Limits(seconds=60.0), means=sandbox.{means!r}); box.run(sys.stdin.read())"
    )
    for victim in ("asking", "worker"):
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-c", asking]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        try:
            assert process.stdin is not None
            process.stdin.write(program)
            process.stdin.close()
            end = time.monotonic() + 90
            while not alive(name):
                assert time.monotonic() < end, "the program never began"
                time.sleep(0.05)
            workers = [child for child in psutil.Process(process.pid).children() if "sandbox_worker.py" in " ".join(child.cmdline())]
            assert len(workers) == 1
            if victim == "asking":
                process.kill()
            else:
                workers[0].kill()
            assert gone(name)
            _, alive_still = psutil.wait_procs(workers, timeout=20)
            assert alive_still == []
        finally:
            process.kill()
            process.wait()


# Refusals --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def afresh():
    """The choice of the means is made anew in this test, and again after it."""
    sandbox._choose.cache_clear()
    yield
    sandbox._choose.cache_clear()


def test_where_there_is_no_means_nothing_is_run_and_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, afresh: None):
    def none() -> int:
        raise OSError(38, "Landlock: Function not implemented")

    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    monkeypatch.setattr(sandbox_worker, "landlock_version", none)
    with pytest.raises(Failure, match=r"bubblewrap is not installed; .* no Landlock \(Function not implemented\).*apt install bubblewrap"):
        Sandbox()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(Failure, match="needs Linux, and this is darwin"):
        Sandbox()


def test_a_means_that_lets_one_thing_through_is_not_used(monkeypatch: pytest.MonkeyPatch, afresh: None):
    hole = 'attempt("read its own input", lambda: 0)\nprint(json.dumps(let))'
    monkeypatch.setattr(sandbox, "_TRIAL", sandbox._TRIAL.replace("print(json.dumps(let))", hole))
    with pytest.raises(Failure, match="lets a program read its own input"):
        Sandbox()


def test_the_trial_sees_what_an_unconfined_program_can_do(tmp_path: Path):
    """The trial's own program without any sandbox, on a folder of the test's own: it must find every hole."""
    (tmp_path / "canary").write_text("x", encoding="utf-8")
    limits = {"memory_bytes": 1 << 20, "file_bytes": 1 << 10, "processes": 1}
    given = {"canary": str(tmp_path / "canary"), "folder": str(tmp_path), "pid": os.getpid(), "limits": limits}
    # No process is started: the part that counts them is left out here.
    program = sandbox._TRIAL.replace("count = processes()", "count = 2")
    found = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(given), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert json.loads(found.stdout) == [
        "read a file outside",
        "list a folder outside",
        "write to a file outside",
        "make a file outside",
        "delete a file outside",
        "open a socket",
        "signal a process outside",
        "take more memory than it may",
        "write a larger file than it may",
        "start more processes than it may",
    ]


def test_limits_and_names_that_make_no_sense_are_refused():
    for wrong in (
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"cpu_seconds": 0},
        {"processes": 0},
        {"output_bytes": -1},
        {"file_bytes": -1},
    ):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            Limits(**wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="64 MiB each"):
        Limits(processes=4, memory_bytes=100 << 20)
    with pytest.raises(UsageError, match="'docker'"):
        Sandbox(means="docker")  # pyright: ignore[reportArgumentType]


# The filter of system calls, by an interpreter of its instructions -------------------------------------------------------------------------


def decide(program: list[sandbox_worker.Instruction], architecture: int, number: int, *arguments: int) -> int | str:
    """What a filter answers: 'allow', 'kill', or the number of the error. Written from the kernel's documentation of classic BPF."""
    words = {0: number, 4: architecture} | {16 + 8 * i: value & 0xFFFFFFFF for i, value in enumerate((*arguments, 0, 0, 0, 0, 0, 0)[:6])}
    accumulator, place = 0, 0
    while True:
        code, yes, no, constant = program[place]
        place += 1
        if code == 0x20:  # load a word
            accumulator = words[constant]
        elif code == 0x54:  # and
            accumulator &= constant
        elif code == 0x06:  # return
            action, data = constant & 0xFFFF0000, constant & 0xFFFF
            return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(action, data)
        else:
            true = {
                0x15: accumulator == constant,
                0x25: accumulator > constant,
                0x35: accumulator >= constant,
                0x45: bool(accumulator & constant),
            }
            place += yes if true[code] else no


# Numbers from the kernel's tables: x86-64, 64-bit ARM.
CALLS = {
    "read": (0, 63),
    "write": (1, 64),
    "mmap": (9, 222),
    "execve": (59, 221),
    "futex": (202, 98),
    "ftruncate": (77, 46),
    "socket": (41, 198),
    "ptrace": (101, 117),
    "mount": (165, 40),
    "bpf": (321, 280),
    "unshare": (272, 97),
    "chmod": (90, None),
    "fchmodat": (268, 53),
    "setxattr": (188, 5),
    "clone3": (435, 435),
    "io_uring_setup": (425, 425),
    "fork": (57, None),
    "clone": (56, 220),
    "kill": (62, 129),
    "openat": (257, 56),
    "socketpair": (53, 199),
    "fcntl": (72, 25),
    "prlimit64": (302, 261),
    "mseal": (462, 462),
}
EPERM, EAGAIN, ENOSYS, ENOTSUP = 1, 11, 38, 95
THREAD, FORK = 0x3D0F00, 0x1200011  # flags with which the C library makes a thread and a process


@pytest.mark.parametrize(("machine", "column", "architecture"), [("x86_64", 0, 0xC000003E), ("aarch64", 1, 0xC00000B7)])
def test_the_filter_decides_the_same_on_both_machines(machine: str, column: int, architecture: int):
    def answers(one_process: bool, shared_user: bool, *arguments: int) -> dict[str, int | str]:
        program = sandbox_worker.seccomp_filter(machine, 1234, one_process=one_process, shared_user=shared_user)
        assert len(program) < 4096
        assert all(yes < 256 and no < 256 for _, yes, no, _ in program)
        numbers = {name: pair[column] for name, pair in CALLS.items() if pair[column] is not None}
        return {name: decide(program, architecture, number, *arguments) for name, number in numbers.items()}

    for one_process in (True, False):
        for shared_user in (True, False):
            found = answers(one_process, shared_user)
            assert {found[name] for name in ("read", "write", "mmap", "execve", "futex", "ftruncate", "fcntl")} == {"allow"}
            assert {found[name] for name in ("socket", "ptrace", "mount", "bpf", "unshare")} == {EPERM}
            assert {found[name] for name in ("clone3", "io_uring_setup", "mseal")} == {ENOSYS}
            assert found["fchmodat"] == (EPERM if shared_user else "allow")
            assert found["setxattr"] == (ENOTSUP if shared_user else "allow")
            assert found.get("chmod") in ((EPERM, None) if shared_user else ("allow", None))
            assert found.get("fork") in ((EAGAIN, None) if one_process else ("allow", None))
            assert answers(one_process, shared_user, THREAD)["clone"] == "allow"
            assert answers(one_process, shared_user, FORK)["clone"] == (EAGAIN if one_process else "allow")
            assert answers(one_process, shared_user, FORK | 0x10000000)["clone"] == EPERM  # a user namespace
            assert answers(one_process, shared_user, 1234)["kill"] == "allow"
            assert answers(one_process, shared_user, 1)["kill"] == (EPERM if one_process else "allow")
            assert answers(one_process, shared_user, -1)["kill"] == (EPERM if one_process else "allow")
            assert answers(one_process, shared_user, 0)["prlimit64"] == "allow"
            assert answers(one_process, shared_user, 1)["prlimit64"] == (EPERM if one_process else "allow")
            assert answers(one_process, shared_user, 1)["socketpair"] == "allow"
            assert answers(one_process, shared_user, 2)["socketpair"] == EPERM
            assert answers(one_process, shared_user, 0, 8)["fcntl"] == EPERM
            flags = {"r": 0, "w": 0o1001, "a": 0o2001, "r+": 2, "emptied while read": 0o1000, "neither": 3, "neither, emptied": 0o1003}
            opened = {name: answers(one_process, shared_user, 0, 0, flag)["openat"] for name, flag in flags.items()}
            assert opened == dict.fromkeys(("r", "w", "a", "r+"), "allow") | dict.fromkeys(
                ("emptied while read", "neither", "neither, emptied"), EPERM
            )
    program = sandbox_worker.seccomp_filter(machine, 1234, one_process=True, shared_user=True)
    assert decide(program, 0x40000003, CALLS["read"][column] or 0) == "kill"  # 32-bit x86
    assert decide(program, architecture, 0x40000000) == ENOSYS  # x86-64's other numbering
