"""Running Python programs that nobody has read, such as a model's answers: `Sandbox().run(source)`.

What is promised of a program, by whatever means: it is a process of its own with nothing of ours in it but its source and its input; it has no
network; memory, processor time, time, processes, files and output are bounded (`Limits`); the one place where it can write is an empty working
folder, which is deleted afterwards; it can read the Python installation and the system's libraries and no other file, so neither the home
folder nor the project; it cannot signal or trace processes outside; and when its time is over, or it ends, everything that it started is
killed, daemons too.

Two means keep these promises (`sandbox_worker.py` has the details): **bubblewrap** (`bwrap`), which shows the program a file system
of its own, where it is installed and namespaces are allowed; else **Landlock** and seccomp, which Linux 5.13 and newer offer to every
process, in most containers too. Before the first program runs, the means is put to a test that tries each forbidden thing, and is not used when
one succeeds. Where no means passes, a `Failure` says why. No program ever runs without.

Not promised: that the kernel has no hole. Under Landlock a program can learn whether a file exists whose name it guesses, but not what is in it
or what a folder holds. The size of the working folder is looked at fifty times a second, so its bound can be passed for a moment.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from telos.core.errors import Failure, UsageError
from telos.objectives import sandbox_worker

Status = Literal["ok", "error", "timeout", "memory", "output", "files", "killed"]
Name = Literal["bubblewrap", "landlock"]
_GRACE_S = 60.0  # beyond a program's own time: for starting, killing and cleaning on a busy machine
_LEAST_MEMORY = 64 << 20  # with less, Python does not start


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use. Raises `UsageError` for values outside their ranges."""

    seconds: float = 10.0  # time by the clock, > 0; on a busy machine it passes faster than processor time
    cpu_seconds: int = 5  # processor time of each process, whole seconds, >= 1
    memory_bytes: int = 512 << 20  # address space of all its processes together; each has an equal share, of at least 64 MiB
    processes: int = 1  # processes and threads at one time, >= 1; with 1 it cannot start another process, but up to 64 threads
    output_bytes: int = 1 << 20  # standard output and error together, >= 0
    file_bytes: int = 16 << 20  # its largest file, and all its files together, >= 0

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise UsageError(f"a program in the sandbox needs more than {self.seconds} seconds")
        for name, least in (("cpu_seconds", 1), ("processes", 1), ("output_bytes", 0), ("file_bytes", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} of a program in the sandbox must be at least {least}, not {getattr(self, name)}")
        if self.memory_bytes < _LEAST_MEMORY * self.processes:
            needed = f"{self.processes} of Python need at least {_LEAST_MEMORY * self.processes} (64 MiB each)"
            raise UsageError(f"memory_bytes of a program in the sandbox is {self.memory_bytes}, but {needed}")


@dataclass(frozen=True)
class Outcome:
    """What came of a program.

    status: "ok" (exit code 0); "error" (another exit code, as after an uncaught exception); "timeout" (by the clock or the processor);
    "memory" (an uncaught MemoryError); "output" or "files" (more than it may write); "killed" (by a signal of its own making, such as a crash).
    exit_code: minus the signal's number when a signal ended it, None when a limit did. stdout, stderr: at most `output_bytes` each, what
    cannot be decoded replaced. seconds are by the clock, cpu_seconds of all its processes (under bubblewrap without what a limit ended); both
    include the start of Python, some 20 ms.
    """

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float
    cpu_seconds: float

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass(frozen=True)
class Means:
    """A way to confine. own_user: programs have a user id of their own, which only root can give them."""

    name: Name
    own_user: bool
    bwrap: str = ""

    def __str__(self) -> str:
        tool = f"bubblewrap ({self.bwrap})" if self.name == "bubblewrap" else f"Landlock {sandbox_worker.landlock_version()}"
        user = "a user id of its own" if self.own_user else "a user namespace" if self.bwrap else "this user's id without its rights"
        return f"{tool} and seccomp, {user}"


class Sandbox:
    """Runs programs under `limits`, from any thread. Raises `Failure` when this machine has no means to keep the promises.

    `means` insists on one of them. `modules`: folders that programs may read and import from, beside the standard library.
    It keeps a process for each thread that uses it at the same time; `close`, or the end of this one, ends them.
    """

    def __init__(self, limits: Limits | None = None, *, means: Name | Means | None = None, modules: Sequence[str | Path] = ()) -> None:
        self.limits = limits or Limits()
        self._modules = tuple(str(Path(folder).resolve()) for folder in modules)
        for folder in self._modules:
            if not Path(folder).is_dir():
                raise UsageError(f"programs in the sandbox cannot import from {folder}: there is no such folder")
        self.means = _choose(means, self.limits.processes > 1)
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._idle: list[_Worker] = []
        self._end = weakref.finalize(self, _close_all, self._idle)

    def describe(self) -> str:
        """The means in use, for people."""
        return str(self.means)

    def run(self, source: str, stdin: str = "") -> Outcome:
        """What comes of a program, given as Python source. Raises `Failure` when it could not be confined; whatever the program does is in
        the outcome."""
        with self._worker() as worker:
            return _run(worker, self.means, self.limits, self._modules, tempfile.gettempdir(), source, stdin)

    def run_many(self, sources: Sequence[str], stdins: Sequence[str] | None = None, *, workers: int | None = None) -> list[Outcome]:
        """The outcomes of several programs, in their order; `workers` run at the same time (None = one for each processor)."""
        given = [""] * len(sources) if stdins is None else stdins
        if len(given) != len(sources):
            raise UsageError(f"{len(sources)} programs were given {len(given)} inputs; give one for each")
        if workers is not None and workers < 1:
            raise UsageError(f"{workers} workers cannot run programs; give at least 1")
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            return list(pool.map(self.run, sources, given))

    @contextmanager
    def _worker(self) -> Iterator[_Worker]:
        with self._lock:
            if self._owner != os.getpid():  # after a fork: the workers are the parent's
                self._owner = os.getpid()
                self._idle = []
                self._end = weakref.finalize(self, _close_all, self._idle)
            worker = self._idle.pop() if self._idle else None
        worker = worker or _Worker()
        try:
            yield worker
        except BaseException:
            worker.kill()
            raise
        with self._lock:
            self._idle.append(worker)

    def close(self) -> None:
        with self._lock:
            _close_all(self._idle)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """A started `sandbox_worker.py`."""

    def __init__(self) -> None:
        # The interpreter outside any virtual environment: programs get the standard library, and not what happens to be installed here.
        python = getattr(sys, "_base_executable", None) or sys.executable
        self._process = subprocess.Popen(
            [python, "-I", "-S", sandbox_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
            start_new_session=True,  # who kills our process group must not kill it before it has killed its program
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    def exchange(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The answer to a request. Raises `Failure` when there is none within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        received = bytearray()
        try:
            left = memoryview(json.dumps(request).encode() + b"\n")
            while left:
                left = left[self._input.write(left) or 0 :]
            with selectors.DefaultSelector() as ready:
                ready.register(self._output, selectors.EVENT_READ)
                while not received.endswith(b"\n"):
                    if not ready.select(max(0.0, deadline - time.monotonic())):
                        raise Failure(f"the sandbox gave no answer within {timeout:g} seconds, and was ended")
                    chunk = os.read(self._output.fileno(), 1 << 16)
                    if not chunk:
                        raise Failure("the sandbox's process has ended by itself")
                    received += chunk
        except BrokenPipeError:
            raise Failure("the sandbox's process has ended by itself") from None
        return json.loads(received)

    def kill(self) -> None:
        """Ends it at once; it kills its program when it sees that its input is closed, and is killed itself where that takes long."""
        self._input.close()
        self._output.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _close_all(workers: list[_Worker]) -> None:
    while workers:
        workers.pop().kill()


def _run(worker: _Worker, means: Means, limits: Limits, modules: tuple[str, ...], folder: str, source: str, stdin: str) -> Outcome:
    """`folder` is where the working folder is made."""
    settings = {"means": dataclasses.asdict(means), "limits": dataclasses.asdict(limits), "modules": modules, "folder": folder}
    found = worker.exchange(settings | {"source": source, "stdin": stdin}, limits.seconds + _GRACE_S)
    if "refused" in found:
        raise Failure(f"a program could not be run in the sandbox ({means}): {found['refused']}")
    reason, code = found["reason"], found["code"]
    # The kernel ends what has used up its processor time: first by a signal that can be refused, a second later by one that cannot.
    if not reason and (code == -signal.SIGXCPU or (code == -signal.SIGKILL and found["cpu_seconds"] >= limits.cpu_seconds)):
        reason = "timeout"
    status: Status
    if reason:
        status, code = reason, None
    elif code < 0:
        status = "killed"
    elif code and found["stderr"].rstrip().rpartition("\n")[2].startswith("MemoryError"):
        status = "memory"
    else:
        status = "error" if code else "ok"
    return Outcome(status, code, found["stdout"], found["stderr"], found["seconds"], found["cpu_seconds"])


# Choosing the means ----------------------------------------------------------------------------------------------------------------------

_TRIAL = """
import json, os, socket, sys, time

given = json.load(sys.stdin)
limits, let = given["limits"], []


def attempt(what, action):
    try:
        action()
    except (OSError, MemoryError):
        return
    let.append(what)


def larger():
    with open("large", "wb") as file:
        file.seek(limits["file_bytes"])
        file.write(b"x")


def processes():
    count = 1
    try:
        while count < limits["processes"] + 8:
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            count += 1
    except OSError:
        pass
    return count


with open("small", "w") as file:
    file.write("x")
attempt("read a file outside", lambda: open(given["canary"]).read())
attempt("list a folder outside", lambda: os.listdir(given["folder"]))
attempt("write to a file outside", lambda: open(given["canary"], "a"))
attempt("make a file outside", lambda: open(given["folder"] + "/new", "w"))
attempt("delete a file outside", lambda: os.unlink(given["canary"]))
attempt("change a file's rights outside", lambda: os.chmod(given["canary"], 0o777))
attempt("open a socket", socket.socket)
attempt("signal a process outside", lambda: os.kill(given["pid"], 0))
attempt("take more memory than it may", lambda: bytearray(limits["memory_bytes"]))
attempt("write a larger file than it may", larger)
count = processes()
if count > limits["processes"]:
    let.append("start more processes than it may")
elif count == 1 < limits["processes"]:
    let.append("start no process where it may")
print(json.dumps(let))
"""


def _candidates() -> Iterator[tuple[Name, Means | None, str]]:
    """The means worth a trial, best first; None with the reason where one is not."""
    users = (True, False) if os.geteuid() == 0 else (False,)
    if (bwrap := shutil.which("bwrap")) is None:
        yield "bubblewrap", None, "bubblewrap is not installed"
    else:
        for own in users:
            yield "bubblewrap", Means("bubblewrap", own, bwrap), ""
    try:
        sandbox_worker.landlock_version()
    except OSError as error:
        yield "landlock", None, f"this system offers no Landlock ({os.strerror(error.errno or 0)})"
    else:
        for own in users:
            yield "landlock", Means("landlock", own), ""


def _trial(means: Means, many: bool) -> str:
    """What is wrong with a means; '' when it keeps every promise."""
    if many and means.name == "landlock" and not means.own_user:
        return "Landlock can bound more than one process only where we are root"
    limits = Limits(processes=4, seconds=60.0) if many else Limits(seconds=60.0)
    with tempfile.TemporaryDirectory(prefix="telos-sandbox-trial-") as folder:
        Path(folder).chmod(0o755)
        canary, place = Path(folder, "canary"), Path(folder, "place")
        place.mkdir()
        canary.write_text("canary", encoding="utf-8")
        given = {"canary": str(canary), "folder": folder, "pid": os.getpid(), "limits": dataclasses.asdict(limits)}
        worker = _Worker()
        try:
            outcome = _run(worker, means, limits, (), str(place), _TRIAL, json.dumps(given))
        except Failure as failure:
            return str(failure)
        finally:
            worker.kill()
        left = any(place.iterdir())
    if left:
        return f"{means} leaves working folders behind"
    if not outcome.ok:
        return f"with {means}, a program that should run ended in {outcome.status!r}: {outcome.stderr.strip()[-300:]}"
    let = json.loads(outcome.stdout)
    return f"{means} lets a program {', '.join(let)}" if let else ""


@functools.cache
def _choose(wanted: Name | Means | None, many: bool) -> Means:
    """The best means that keeps every promise here. Raises `Failure` when there is none."""
    if not isinstance(wanted, Means) and wanted not in (None, "bubblewrap", "landlock"):
        raise UsageError(f"a sandbox's means is 'bubblewrap' or 'landlock', not {wanted!r}")
    machine = os.uname().machine
    reasons = [] if sys.platform == "linux" else [f"it needs Linux, and this is {sys.platform}"]
    if not reasons and machine not in sandbox_worker.MACHINES:
        reasons = [f"its filter of system calls knows {' and '.join(sandbox_worker.MACHINES)}, and this is {machine}"]
    for name, means, reason in [] if reasons else _candidates():
        if wanted in (None, name, means):
            if means is not None and not (reason := _trial(means, many)):
                return means
            reasons.append(reason)
    raise Failure(
        f"programs cannot be run safely on this machine, so none is run: {'; '.join(reasons)}. Install bubblewrap (`apt install bubblewrap`, "
        "`dnf install bubblewrap`, or as your system calls it) and allow user namespaces, or use a Linux kernel of version 5.13 or newer "
        "with Landlock (a container's own filter of system calls must let it through)"
    )
