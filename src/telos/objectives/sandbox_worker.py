"""The process that starts, confines, watches and ends the programs of the sandbox; `sandbox.py` says what is promised.

Run as a script, this file is that process: one JSON object a line on its standard input is a program to run, one on its standard output is
what came of it. It leaves when its input ends, after it has killed what runs, so that no program outlives the process that asked for it.
With an argument it is the first program inside a bubblewrap: it gives up what is left to give up, and becomes the program.

A program is confined in four ways. Resource limits bound it. A seccomp filter refuses the system calls that reach outside: sockets, signals to
others, tracing, mounts, namespaces, kernel settings, and, where one process is allowed, starting another. Landlock or bubblewrap hides the
files. A user id of its own (where we may change it) or a process namespace keeps its processes apart, so that all can be found and killed.

Only the standard library is imported here, and as little of it as will do: the process must start fast and holds nothing worth stealing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from typing import Any, NoReturn

THREADS = 64  # how many threads a program may have when it may have one process; for root under its own id the address space bounds them
FILES = 1024  # how many files and folders its working folder may hold
DESCRIPTORS = 64  # how many files it may have open
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache", "/etc/localtime", "/usr/share/zoneinfo")
INSIDE = "/sandbox"  # where a program finds itself in a bubblewrap
READY = b"ready"  # noted when every bound is in force and the program begins
_TICK_S = 0.02  # how often the working folder is looked at

LIBC = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _prctl(what: str, *arguments: int | ctypes.Array[Any]) -> None:
    padded = [a if isinstance(a, ctypes.Array) else ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:5]]
    _checked(LIBC.prctl(*padded), what)


def _syscall(what: str, number: int, *arguments: int | ctypes.Array[Any] | None) -> int:
    return _checked(LIBC.syscall(ctypes.c_long(number), *[ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]), what)


# System calls ----------------------------------------------------------------------------------------------------------------------------

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables below, and the kernel's name of the architecture
_LAST = 456  # the newest system call that was considered; newer ones do not exist for a program
_X32 = 0x40000000  # the bit of x86-64's second way to number its calls


def _calls(table: str) -> dict[str, tuple[int, int]]:
    """System calls with their numbers on x86-64 and on 64-bit ARM; -1 where there is none."""
    rows = [row.split() for row in table.split(",")]
    return {name: (int(one), int(other)) for name, one, other in rows}


_REFUSED = _calls(
    """
    socket 41 198, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, tkill 200 130,
    rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424, pidfd_getfd 438 438, setpriority 141 140,
    ioprio_set 251 30, sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274, migrate_pages 256 238,
    move_pages 279 239, process_madvise 440 440, process_mrelease 448 448, personality 135 92, modify_ldt 154 -1, mount 165 40,
    umount2 166 39, pivot_root 155 41, chroot 161 51, unshare 272 97, setns 308 268, open_tree 428 428, move_mount 429 429,
    fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, name_to_handle_at 303 264,
    open_by_handle_at 304 265, truncate 76 45, mknod 133 -1, mknodat 259 33, inotify_add_watch 254 27, fanotify_init 300 262,
    quotactl 179 60, quotactl_fd 443 443, swapon 167 224, swapoff 168 225, acct 163 89, uselib 134 -1, reboot 169 142,
    kexec_load 246 104, kexec_file_load 320 294, init_module 175 105, finit_module 313 273, delete_module 176 106, iopl 172 -1,
    ioperm 173 -1, vhangup 153 58, settimeofday 164 170, clock_settime 227 112, clock_adjtime 305 266, adjtimex 159 171,
    sethostname 170 161, setdomainname 171 162, syslog 103 116, lookup_dcookie 212 18, keyctl 250 219, add_key 248 217,
    request_key 249 218, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, shmget 29 194, semget 64 190, msgget 68 186,
    mq_open 240 180, memfd_create 319 279, memfd_secret 447 447
    """
)
# Their arguments lie in memory, where a filter cannot look; C libraries do without them when they do not exist.
_ABSENT = _calls("clone3 435 435, openat2 437 437, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427")
# With our user's own rights, a program could change what files outside say about themselves, which Landlock does not govern.
_METADATA = _calls(
    """
    chmod 90 -1, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -1, fchown 93 55, lchown 94 -1, fchownat 260 54,
    utime 132 -1, utimes 235 -1, futimesat 261 -1, utimensat 280 88
    """
)
_ATTRIBUTES = _calls(
    """
    setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, getxattr 191 8, lgetxattr 192 9, fgetxattr 193 10, listxattr 194 11,
    llistxattr 195 12, flistxattr 196 13, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16
    """
)
_FORKS = _calls("fork 57 -1, vfork 58 -1")
_CLONE, _KILL, _TGKILL, _PRLIMIT, _AFFINITY = (56, 220), (62, 129), (234, 131), (302, 261), (203, 122)
_OPEN, _OPENAT, _SOCKETPAIR, _FCNTL, _IOCTL, _PRCTL = (2, -1), (257, 56), (53, 199), (72, 25), (16, 29), (157, 167)

_EPERM, _EAGAIN, _ENOSYS, _ENOTSUP = 1, 11, 38, 95
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x54, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # places in `struct seccomp_data`
_NEW_NAMESPACES, _THREAD = 0x7E020000, 0x00010000  # flags of clone
_TRUNCATE, _ACCESS = 0o1000, 3  # flags of open
_UNIX = 1  # the family of socket pairs
_OWNER_OF_SIGNALS = (8, 10, 15)  # fcntl's F_SETOWN, F_SETSIG, F_SETOWN_EX: a way round kill
_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG, which ends the program when its worker is killed
_TERMINAL = (0x8901, 0x8902, 0x5412, 0x541C)  # ioctl's FIOSETOWN, SIOCSPGRP, TIOCSTI, TIOCLINUX

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def seccomp_filter(machine: str, pid: int, *, one_process: bool, shared_user: bool) -> list[Instruction]:
    """The filter as instructions of classic BPF. `pid` is the program's own, the only one that it may signal when it is alone.

    `one_process`: no other process can be started, and none but itself be touched. `shared_user`: files outside are in sight, and some are
    the program's own.
    """
    column, architecture = MACHINES[machine]

    def error(number: int) -> Instruction:
        return (_RETURN, 0, 0, _ERROR | number)

    def argument(index: int) -> Instruction:
        return (_LOAD, 0, 0, _ARGUMENTS + 8 * index)  # the low half: every argument looked at here is an int

    def unless(accepted: tuple[int, ...]) -> list[Instruction]:
        return [(_EQUAL, len(accepted) - i, 0, value) for i, value in enumerate(accepted)] + [error(_EPERM)]

    def if_any(refused: tuple[int, ...]) -> list[Instruction]:
        return [step for value in refused for step in ((_EQUAL, 0, 1, value), error(_EPERM))]

    program: list[Instruction] = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL_PROCESS)]
    program += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), error(_ENOSYS), (_GREATER, 0, 1, _LAST), error(_ENOSYS)]

    def rule(call: tuple[int, int], steps: list[Instruction]) -> None:
        """Decides about a call: `steps` refuse it, or fall through and it is allowed."""
        if call[column] >= 0:
            program.extend([(_EQUAL, 0, len(steps) + 1, call[column]), *steps, (_RETURN, 0, 0, _ALLOW)])

    refused = {**_REFUSED, **(_METADATA if shared_user else {})}
    groups: list[tuple[dict[str, tuple[int, int]], int]] = [(refused, _EPERM), (_ABSENT, _ENOSYS)]
    groups += [(_ATTRIBUTES, _ENOTSUP)] if shared_user else []
    groups += [(_FORKS, _EAGAIN)] if one_process else []
    for calls, number in groups:
        for call in calls.values():
            rule(call, [error(number)])
    only_threads: list[Instruction] = [(_ANY_BIT, 1, 0, _THREAD), error(_EAGAIN)] if one_process else []
    rule(_CLONE, [argument(0), (_ANY_BIT, 0, 1, _NEW_NAMESPACES), error(_EPERM), *only_threads])
    if one_process:
        for call in (_KILL, _TGKILL):
            rule(call, [argument(0), *unless((pid,))])
        for call in (_PRLIMIT, _AFFINITY):
            rule(call, [argument(0), *unless((0, pid))])
    # Before Landlock's third version, a file that may only be read can be emptied by opening it so.
    opening: list[Instruction] = [(_AND, 0, 0, _TRUNCATE | _ACCESS), *if_any((_TRUNCATE, _ACCESS, _TRUNCATE | _ACCESS))]
    rule(_OPEN, [argument(1), *opening])
    rule(_OPENAT, [argument(2), *opening])
    rule(_SOCKETPAIR, [argument(0), *unless((_UNIX,))])
    rule(_FCNTL, [argument(1), *if_any(_OWNER_OF_SIGNALS)])
    rule(_IOCTL, [argument(1), *if_any(_TERMINAL)])
    rule(_PRCTL, [argument(0), *if_any((_DEATH_SIGNAL,))])
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _install(program: list[Instruction]) -> None:
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
    _prctl("seccomp", 22, 2, described)


# Files -----------------------------------------------------------------------------------------------------------------------------------

_EXECUTE, _WRITE, _READ, _LIST = 1, 2, 4, 8
_MAKE_DEVICES = (1 << 6) | (1 << 11)
_DEVICE_IOCTL = 1 << 15


def landlock_version() -> int:
    """The version of Landlock's interface. Raises `OSError` where there is none."""
    return _syscall("Landlock", 444, None, 0, 1)


def _landlock_rules(readable: list[str], program: str, work: str) -> int:
    """A descriptor of the rules: `readable` and `program` can be read, `work` be used, devices be used, and nothing else be opened."""
    version = landlock_version()
    handled = (1 << 13) - 1
    for since, right in ((2, 1 << 13), (3, 1 << 14), (5, _DEVICE_IOCTL)):
        handled |= right if version >= since else 0
    # Files; from version 4 on TCP; from 6 on abstract sockets and signals to processes outside.
    attributes = struct.pack("QQQ", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = _syscall("Landlock", 444, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes), 0)
    rights = [(path, _EXECUTE | _READ | _LIST) for path in readable] + [(program, _READ)]
    rights += [(path, _READ | _WRITE) for path in DEVICES if os.path.exists(path)]
    rights += [(work, handled & ~(_EXECUTE | _MAKE_DEVICES | _DEVICE_IOCTL))]
    for path, right in rights:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        right = right if os.path.isdir(path) else right & ~_LIST
        described = struct.pack("=Qi", right, place)
        _syscall(f"Landlock ({path})", 445, rules, 1, ctypes.create_string_buffer(described, len(described)), 0)
        os.close(place)
    return rules


def readable_paths(executable: str, prefix: str, more: list[str]) -> list[str]:
    """What a Python program needs to read: the interpreter, its standard library, shared libraries, time zones; and `more`."""
    wanted = [os.path.realpath(executable), os.path.join(prefix, "lib"), os.path.join(prefix, "lib64"), *LIBRARIES, *more]
    return list(dict.fromkeys(path for path in wanted if os.path.exists(path)))


# The user --------------------------------------------------------------------------------------------------------------------------------

_READ_ANYTHING = 1 << 2  # CAP_DAC_READ_SEARCH


def own_id() -> int | None:
    """A number that is nobody's user or group id, at random; None where we cannot take another."""
    if os.geteuid() != 0:
        return None
    spans = []
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}", encoding="ascii") as file:
            spans.append(
                max(((int(start), int(start) + int(count)) for start, _, count in map(str.split, file)), key=lambda s: s[1] - s[0])
            )
    low, high = max(start for start, _ in spans), min(end for _, end in spans)
    low, high = (max(low, 10**9), 2 * 10**9) if high > 2 * 10**9 else (max(low, 30_000), min(high, 60_000))
    return low + int.from_bytes(os.urandom(8), "little") % (high - low) if high > low else None


def _set_capabilities(mask: int) -> None:
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    data = ctypes.create_string_buffer(struct.pack("6I", mask, mask, mask, 0, 0, 0))
    _checked(LIBC.capset(header, data), "capset")


def _give_up_rights(user: int | None, needed: list[str]) -> None:
    """Takes the user id `user` where there is one, and gives up every capability. Where `needed` files lie in folders that only their owner may
    enter, the right to read them stays; Landlock and seccomp then decide alone what can be read."""
    if user is None:
        _set_capabilities(0)
        return
    _prctl("keepcaps", 8, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    if all(os.access(path, os.R_OK) for path in needed):
        _set_capabilities(0)
        return
    try:
        _set_capabilities(_READ_ANYTHING)
        _prctl("ambient capability", 47, 2, 2)
    except OSError as error:
        raise OSError(error.errno, "Python or the temporary folder lies where only root may go") from None


def tasks_of_user() -> int:
    """How many processes and threads our user has."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                if os.stat(f"/proc/{name}").st_uid == os.getuid():
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue
    return count


# Becoming the program --------------------------------------------------------------------------------------------------------------------


def _limit(which: int, soft: int, hard: int | None = None) -> None:
    _, most = resource.getrlimit(which)
    ceiling = most if most != resource.RLIM_INFINITY else None
    values = [value if ceiling is None else min(value, ceiling) for value in (soft, soft if hard is None else hard)]
    resource.setrlimit(which, (values[0], values[1]))


def become_program(plan: dict[str, Any]) -> NoReturn:
    """Confines this process for good and turns it into the program. Raises `OSError` when a step fails."""
    limits, user = plan["limits"], plan["user"]
    one_process = limits["processes"] == 1
    os.umask(0o022)
    rules = _landlock_rules(plan["readable"], plan["program"], plan["work"]) if plan["landlock"] else None
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1)
    _limit(resource.RLIMIT_FSIZE, limits["file_bytes"])
    _limit(resource.RLIMIT_NOFILE, DESCRIPTORS)
    _limit(resource.RLIMIT_MEMLOCK, 0)
    _limit(resource.RLIMIT_STACK, 8 << 20)
    _prctl("no new privileges", 38, 1)
    _give_up_rights(user, [plan["program"], plan["python"], os.path.join(os.path.dirname(os.__file__), "os.py")])
    os.chdir(plan["work"])
    if plan["landlock"]:
        # Only here: in a bubblewrap the parent is in another process namespace, and everything dies with the namespace.
        _prctl("death signal", _DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != plan["parent"]:
            os._exit(127)
    machine = os.uname().machine
    program = seccomp_filter(machine, os.getpid(), one_process=one_process, shared_user=user is None and rules is not None)
    if rules is not None:
        _syscall("Landlock", 446, rules, 0)
    environment = {
        "HOME": plan["work"],
        "TMPDIR": plan["work"],
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "PYTHONUTF8": "1",
        "PYTHONHASHSEED": "0",  # the order of sets is the same each time, and so is what is made of it
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": os.pathsep.join(plan["modules"]),
        "MALLOC_ARENA_MAX": "2",  # else each thread reserves address space as if there were plenty
        "OMP_NUM_THREADS": "1",
    }
    if plan["libraries"]:
        environment["LD_LIBRARY_PATH"] = plan["libraries"]
    # Each process gets its share, so that all together stay below the limit.
    _limit(resource.RLIMIT_NPROC, plan["tasks"])
    _limit(resource.RLIMIT_AS, limits["memory_bytes"] // limits["processes"])
    _install(program)
    os.write(plan["notes"], READY)
    os.execve(plan["python"], [plan["python"], "-s", "-P", plan["program"]], environment)


def _folders_above(path: str) -> list[str]:
    """The folders on the way to a path, the first one first, without the root."""
    parts = path.split("/")[1:-1]
    return ["/" + "/".join(parts[: i + 1]) for i in range(len(parts))]


def _bubblewrap(plan: dict[str, Any]) -> list[str]:
    """The command line that runs this file inside a bubblewrap, where it becomes the program."""
    command = [plan["bwrap"], "--die-with-parent"]
    command += [f"--unshare-{name}" for name in ("ipc", "pid", "net", "uts", "cgroup-try", *(["user"] if plan["user"] is None else []))]
    if plan["user"] is not None:
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    # Made by name, because bubblewrap would let nobody else into those that it makes on the way.
    for folder in dict.fromkeys(above for path in [*plan["readable"], *DEVICES, f"{INSIDE}/"] for above in _folders_above(path)):
        command += ["--dir", folder]
    for path in plan["readable"]:
        command += ["--ro-bind", path, path]
    for path in DEVICES:
        command += ["--dev-bind-try", path, path]
    inside = plan | {"program": f"{INSIDE}/program.py", "work": f"{INSIDE}/work"}
    command += ["--ro-bind", plan["program"], inside["program"], "--ro-bind", os.path.abspath(__file__), f"{INSIDE}/worker.py"]
    command += ["--bind", plan["work"], inside["work"], "--remount-ro", "/", "--chdir", "/"]
    return [*command, "--", plan["python"], "-I", "-S", f"{INSIDE}/worker.py", json.dumps(inside)]


def _start(plan: dict[str, Any], streams: tuple[int, int, int]) -> NoReturn:
    """The first steps of the child: its own session and streams, then the program."""
    try:
        os.setsid()
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")  # when the machine's memory runs out, this goes first
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        if plan["landlock"]:
            become_program(plan)
        os.set_inheritable(plan["notes"], True)
        command = _bubblewrap(plan)
        os.execve(command[0], command, {})
    except BaseException as problem:
        _give_up(plan, problem)


def _give_up(plan: dict[str, Any], problem: BaseException) -> NoReturn:
    os.write(plan["notes"], str(problem).encode()[:2000])
    os._exit(127)


# Watching it -----------------------------------------------------------------------------------------------------------------------------


class Abandoned(Exception):
    """Nobody waits for the program any more."""


class Running:
    """A started program."""

    def __init__(self, plan: dict[str, Any], stdin: bytes) -> None:
        given = os.path.join(os.path.dirname(plan["work"]), "stdin")
        with open(given, "wb") as file:
            file.write(stdin)
        source = os.open(given, os.O_RDONLY | os.O_CLOEXEC)
        os.unlink(given)
        self.out, out = os.pipe()
        self.err, err = os.pipe()
        self.notes, notes = os.pipe()
        self.plan: dict[str, Any] = plan | {"notes": notes}
        self.started = time.monotonic()
        self.before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.pid = os.fork()
        if self.pid == 0:
            _start(self.plan, (source, out, err))
        for descriptor in (source, out, err, notes):
            os.close(descriptor)
        for descriptor in (self.out, self.err, self.notes):
            os.set_blocking(descriptor, False)
        self.written = {self.out: bytearray(), self.err: bytearray()}

    def watch(self, control: int) -> str:
        """Waits for the end, or for a limit to be passed: 'timeout', 'output' or 'files', '' when the program ended. Raises `Abandoned` when
        `control` was closed at its other end."""
        limits = self.plan["limits"]
        poller = select.poll()
        poller.register(control, 0)
        for stream in self.written:
            poller.register(stream, select.POLLIN)
        try:
            ended = os.pidfd_open(self.pid)
            poller.register(ended, select.POLLIN)
        except OSError:
            ended = -1  # an old kernel: asked at every tick
        try:
            while True:
                left = self.started + limits["seconds"] - time.monotonic()
                if left <= 0:
                    return "timeout"
                found = [descriptor for descriptor, _ in poller.poll(1000 * min(left, _TICK_S))]
                if control in found:
                    raise Abandoned
                for stream in self.written:
                    if stream in found and not self._read(stream):
                        poller.unregister(stream)
                if self._written() > limits["output_bytes"]:
                    return "output"
                # WNOWAIT leaves the process to be reaped by `end`, so that its id stays its own until then.
                if ended in found or (ended < 0 and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)):
                    return ""
                if not fits(self.plan["work"], limits["file_bytes"]):
                    return "files"
        finally:
            if ended >= 0:
                os.close(ended)

    def _read(self, stream: int) -> bool:
        """Takes what is there; False at the end of the stream."""
        try:
            chunk = os.read(stream, 1 << 16)
        except BlockingIOError:
            return True
        self.written[stream] += chunk
        return bool(chunk)

    def _written(self) -> int:
        return sum(map(len, self.written.values()))

    def end(self) -> int:
        """Kills whatever is left of the program, waits until nothing is, and returns how its first process ended (as `os.wait` says it)."""
        user = self.plan["user"]
        if user is not None and self.plan["landlock"]:
            # A process that takes the user id can kill all that have it at once, and no fork slips through. Root may lack the right to kill others.
            helper = os.fork()
            if helper == 0:
                try:
                    os.setgroups([])
                    os.setresgid(user, user, user)
                    os.setresuid(user, user, user)
                    if os.getuid() == user != 0:
                        os.kill(-1, signal.SIGKILL)
                finally:
                    os._exit(0)
        with contextlib.suppress(PermissionError):
            os.kill(self.pid, signal.SIGKILL)  # it is still there, if only as an entry; of a bubblewrap all others die with the first
        status = 0
        while True:
            try:
                pid, found = os.waitpid(-1, 0)
            except ChildProcessError:
                break
            status = found if pid == self.pid else status
        for stream in self.written:
            while self._written() <= self.plan["limits"]["output_bytes"] and self._waiting(stream):
                pass
        return status

    def _waiting(self, stream: int) -> bool:
        before = len(self.written[stream])
        return self._read(stream) and len(self.written[stream]) > before

    def problem(self) -> str:
        """Why it never became the program; '' when it did."""
        noted = os.read(self.notes, 2000)
        if noted == READY:
            return ""
        return (noted.removeprefix(READY) or bytes(self.written[self.err][:2000])).decode(errors="replace").strip() or "it ended at once"

    def close(self) -> None:
        for descriptor in (self.out, self.err, self.notes):
            os.close(descriptor)

    def processor_seconds(self) -> float:
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return now.ru_utime + now.ru_stime - self.before.ru_utime - self.before.ru_stime


def fits(folder: str, size: int) -> bool:
    """Whether the files of a folder hold at most `size` bytes on the disk and are at most `FILES`. What cannot be looked into does not fit."""
    folders, count, total = [folder], 0, 0
    while folders:
        try:
            entries = os.scandir(folders.pop())
        except FileNotFoundError:
            continue
        except OSError:
            return False
        with entries:
            for entry in entries:
                count += 1
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        total += 512 * entry.stat(follow_symlinks=False).st_blocks
                if count > FILES or total > size + (1 << 16):  # blocks are rounded up
                    return False
    return True


def remove(folder: str) -> None:
    """Deletes a folder, whatever lies in it."""
    import shutil
    import subprocess

    try:
        shutil.rmtree(folder)
    except (OSError, RecursionError):  # folders without rights, or thousands of them inside each other
        for command in (["chmod", "-R", "u+rwx", folder], ["rm", "-rf", folder]):
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False, env={"PATH": os.defpath})


def run(request: dict[str, Any], user: int | None) -> dict[str, Any]:
    """Runs one program. What came of it, or `refused` with the step that could not be taken."""
    means, limits = request["means"], request["limits"]
    if means["own_user"] and user is None:
        return {"refused": "there is no user id that it could take"}
    user = user if means["own_user"] else None
    folder = os.path.join(request["folder"], "telos-sandbox-" + os.urandom(8).hex())
    os.mkdir(folder, 0o711)
    os.chmod(folder, 0o711)
    try:
        program, work = os.path.join(folder, "program.py"), os.path.join(folder, "work")
        with open(program, "wb") as file:
            file.write(request["source"].encode(errors="surrogatepass"))
        os.chmod(program, 0o644)
        os.mkdir(work, 0o700)
        if user is not None:
            os.chown(work, user, user)
        one, base = limits["processes"] == 1, 0 if user is not None else 1 if limits["processes"] > 1 else tasks_of_user()
        plan: dict[str, Any] = {
            "landlock": means["name"] == "landlock",
            "bwrap": means["bwrap"],
            "user": user,
            "parent": os.getpid(),
            "limits": limits,
            "program": program,
            "work": work,
            "python": os.path.realpath(sys.executable),
            "modules": request["modules"],
            "libraries": os.environ.get("LD_LIBRARY_PATH", ""),
            "readable": readable_paths(sys.executable, sys.base_prefix, request["modules"]),
            "tasks": base + (THREADS if one else limits["processes"]),
        }
        running = Running(plan, request["stdin"].encode(errors="surrogatepass"))
        try:
            reason = running.watch(0)
        finally:
            status = running.end()
            seconds = time.monotonic() - running.started
            problem = running.problem()
            out, err = (bytes(written) for written in running.written.values())
            running.close()
        if problem and not reason:
            return {"refused": problem}
        place = f"{folder if plan['landlock'] else INSIDE}/program.py".encode()
        return {
            "reason": reason or ("output" if len(out) + len(err) > limits["output_bytes"] else ""),
            "code": _code(status, plan["landlock"]),
            "stdout": out[: limits["output_bytes"]].decode(errors="replace"),
            # Where the program lies is chance; with it, the same error would read differently each time.
            "stderr": err.replace(place, b"program.py")[: limits["output_bytes"]].decode(errors="replace"),
            "seconds": seconds,
            "cpu_seconds": running.processor_seconds(),
        }
    finally:
        remove(folder)


def _code(status: int, direct: bool) -> int:
    """The exit code, or minus the number of the signal that ended it."""
    code = os.waitstatus_to_exitcode(status)
    # bubblewrap passes a signal on as 128 and its number.
    return 128 - code if not direct and 128 < code <= 128 + 64 else code


def serve() -> None:
    _prctl("subreaper", 36, 1)  # processes that lost their parent become ours, and so can be waited for
    user = own_id()
    source = os.fdopen(0, "rb", closefd=False)
    while line := source.readline():
        request = json.loads(line)
        try:
            found = run(request, user)
        except Abandoned:
            return
        except OSError as problem:
            found = {"refused": str(problem)}
        os.write(1, json.dumps(found).encode() + b"\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        given = json.loads(sys.argv[1])
        os.set_inheritable(given["notes"], False)
        try:
            become_program(given)
        except BaseException as problem:
            _give_up(given, problem)
    serve()
