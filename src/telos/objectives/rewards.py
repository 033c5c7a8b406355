"""Rewards for text: functions called as TRL calls them, verl's `compute_score`, learned reward models, and weighted sums of several.

A reward is valid, not applicable (`None`) or an error, and stays that: 0.0 is a valid reward, and a row without a reward is never given
one. Functions named by a string run in a process of their own, which is killed when a batch takes too long; nothing is pickled (JSON lines
over pipes).
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from telos.core.errors import Failure, TelosError, UsageError, did_you_mean
from telos.data.batches import REWARD_ERROR, REWARD_NOT_APPLICABLE, REWARD_VALID
from telos.objectives import reward_worker
from telos.objectives.reward_worker import OURS, VERL_COLUMNS, LoadError, Outcome, Problem, Signature

OnError = Literal["stop", "invalid"]
Text = str | list[dict[str, Any]]  # plain text, or the turns of a conversation ({"role", "content"})
Columns = dict[str, list[Any]]

ACCEPTED = (
    "a reward is a Python function (path/to/file.py:function or package.module:function, called as "
    "f(prompts=, completions=, completion_ids=, **columns) -> list[float | None] or as verl's "
    "compute_score(data_source, solution_str, ground_truth, extra_info)), or a reward model (the folder or hub id org/name of a Hugging "
    "Face sequence-classification model with one label)"
)


@dataclass(frozen=True, eq=False)
class Scores:
    """Rewards of a batch. values [N] float32, NaN wherever the status is not 0; status [N] int8: 0 valid, 1 not applicable, 2 error.

    `problem` is the first error's text ('' when there is none), for the run's warnings.
    """

    values: Tensor
    status: Tensor
    problem: str = ""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def valid(self) -> Tensor:
        """[N] bool."""
        return self.status == REWARD_VALID

    def counts(self) -> dict[str, int]:
        """Rows by status: `valid`, `not_applicable`, `error`."""
        names = {"valid": REWARD_VALID, "not_applicable": REWARD_NOT_APPLICABLE, "error": REWARD_ERROR}
        return {name: int((self.status == code).sum()) for name, code in names.items()}


@runtime_checkable
class RewardSource(Protocol):
    """Anything that rewards completions. `close` ends what it holds (a process); a closed source starts again when asked for scores."""

    name: str

    def score(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Columns) -> Scores:
        """The rewards of N completions. prompts and completions are texts (or conversations' turns), `completion_ids` the tokens as
        sampled, `columns` the data's other columns, each a list of N. Raises `Failure` for a bad reward when errors stop the run,
        `UsageError` when the data lack a column that the reward needs."""
        ...

    def close(self) -> None: ...


def require_some(scores: Scores, name: str) -> None:
    """Raises `Failure` when a batch has rows but no valid reward at all: there would be nothing to learn from."""
    counts = scores.counts()
    if len(scores) and not counts["valid"]:
        detail = f"; first error: {scores.problem}" if scores.problem else ""
        raise Failure(
            f"reward {name!r} gave no reward for any of the {len(scores)} rows of a batch ({counts['not_applicable']} not applicable, "
            f"{counts['error']} errors){detail}. Check that it applies to these data"
        )


def settle(name: str, outcomes: Sequence[Outcome] | Problem, completions: Sequence[Text], on_error: OnError) -> Scores:
    """Outcomes row by row, or the problem of the whole batch, as `Scores`. Raises `Failure` for the first problem when `on_error` is
    'stop'."""
    count = len(completions)
    values = torch.full((count,), math.nan)
    status = torch.full((count,), REWARD_NOT_APPLICABLE, dtype=torch.int8)
    first = ""
    if isinstance(outcomes, Problem):
        status[:] = REWARD_ERROR
        first = f"reward {name!r} {outcomes.text} (rows 0 to {count - 1} of the batch, first completion {_excerpt(completions[0])})"
    else:
        for i, outcome in enumerate(outcomes):
            if isinstance(outcome, Problem):
                first = first or f"reward {name!r} {outcome.text} (row {i} of the batch's {count}, completion {_excerpt(completions[i])})"
                status[i] = REWARD_ERROR
            elif outcome is not None:
                values[i], status[i] = outcome, REWARD_VALID
    if first and on_error == "stop":
        raise Failure(f"{first}. Mend the reward, or choose --reward_on_error invalid: such rows are then counted and not learned from")
    return Scores(values, status, first)


def _excerpt(completion: Text) -> str:
    text = reward_worker.plain_text(completion)
    return repr(text if len(text) <= 60 else text[:57] + "...")


# Functions -------------------------------------------------------------------------------------------------------------------------------


def _columns_for(name: str, signature: Signature, columns: Columns) -> Columns:
    """The columns to hand over. Raises `UsageError` when one is missing that the function cannot do without."""
    if clash := [column for column in OURS if column in columns]:
        raise UsageError(f"the data's column {clash[0]!r} would hide what rewards are called with; rename it")
    have = f"; the data have {', '.join(sorted(columns))}" if columns else "; the data have no further column"
    offered = {*OURS, *columns}
    if signature.style == "verl":
        nested = columns.get("reward_model") or [None]
        if "ground_truth" not in columns and not all(isinstance(row, dict) and "ground_truth" in row for row in nested):
            raise UsageError(f"reward {name!r} needs a column 'ground_truth', or 'reward_model' with a 'ground_truth' in every row{have}")
        offered = {"solution_str", "ground_truth", "extra_info", *columns.keys() & {"data_source"}}
    for wanted in signature.required:
        if wanted not in offered:
            near = did_you_mean(wanted, sorted(offered))
            raise UsageError(f"reward {name!r} has a parameter {wanted!r}, but the data have no such column{near}{have}")
    takes = VERL_COLUMNS.__contains__ if signature.style == "verl" else signature.takes
    return {column: values for column, values in columns.items() if takes(column)}


class _TimedOut(BaseException):
    """Raised inside user code by the alarm; not an `Exception`, so that user code does not swallow it by accident."""


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises `_TimedOut` in the block after `seconds`, and again every second: in the main thread of a POSIX system, elsewhere never."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TimedOut

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class FunctionReward:
    """A Python callable, called in this process. A `TelosError` that it raises is passed on, whatever `on_error` says.

    `timeout` (seconds a batch) works by an alarm signal in the main thread. In other threads, and in compiled code that never returns to
    the interpreter, a hanging callable cannot be stopped: name it by a string to run it in a process that can be killed.
    """

    def __init__(self, function: Callable[..., Any], *, name: str | None = None, timeout: float = 30.0, on_error: OnError = "stop") -> None:
        self.name = name or _name_of(function)
        self.timeout = timeout
        self.on_error: OnError = on_error
        self._function = function
        try:
            self._signature = reward_worker.signature_of(function)
        except LoadError as error:
            raise UsageError(f"reward {self.name!r}: {error}") from None

    def score(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Columns) -> Scores:
        if not completions:
            return settle(self.name, [], completions, self.on_error)
        given = _columns_for(self.name, self._signature, columns)
        try:
            with _alarm(self.timeout):
                found = reward_worker.call(self._function, self._signature, prompts, completions, completion_ids, given, passing=TelosError)
        except _TimedOut:
            found = Problem(f"took longer than its timeout of {self.timeout:g} s")
        return settle(self.name, found, completions, self.on_error)

    def close(self) -> None:
        pass


def _name_of(function: Any) -> str:
    function = getattr(function, "func", function)  # functools.partial
    return str(getattr(function, "__name__", type(function).__name__))


class _Gone(Exception):
    """The process of a reward ended or was killed; the message says why."""


class _Process:
    """A started worker. `exchange` sends one request and waits for its answer; a worker that is late is killed with all it started."""

    def __init__(self) -> None:
        # -P keeps this package's folder off the worker's module path: a user's module may have any name.
        command = [sys.executable, "-P", reward_worker.__file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        self._received = bytearray()
        for pipe in (self._input, self._output):
            os.set_blocking(pipe.fileno(), False)

    def exchange(self, request: str, timeout: float) -> dict[str, Any]:
        """The answer to a request in JSON. Raises `_Gone` after `timeout` seconds, or when the process ends."""
        to_send = memoryview(request.encode() + b"\n")
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as ready:
            ready.register(self._output, selectors.EVENT_READ)
            ready.register(self._input, selectors.EVENT_WRITE)
            while not self._received.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0:
                    self.kill()
                    raise _Gone(f"took longer than its timeout of {timeout:g} s; its process was killed")
                for key, _ in ready.select(left):
                    if key.fileobj is self._input:
                        to_send = self._send(to_send)
                        if not to_send:
                            ready.unregister(self._input)
                    elif chunk := os.read(self._output.fileno(), 1 << 16):
                        self._received += chunk
                    else:
                        raise _Gone(self._ending())
        answer = json.loads(self._received)
        self._received.clear()
        return answer

    def _send(self, data: memoryview) -> memoryview:
        """What is left to be sent."""
        try:
            return data[os.write(self._input.fileno(), data[: 1 << 16]) :]
        except BrokenPipeError:  # the process has ended, which the other pipe tells
            return data[:0]

    def _ending(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
            return "closed its output; its process was killed"
        self.close()
        if code >= 0:
            return f"ended its process with exit code {code}"
        hint = ", as happens when memory runs out" if -code == signal.SIGKILL else ""
        known = {int(number): number.name for number in signal.Signals}
        return f"lost its process to signal {known.get(-code, -code)}{hint}"

    def kill(self) -> None:
        if self._process.poll() is None:
            # The group: programs that the reward has started must not go on either.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self.close()

    def close(self) -> None:
        """Ends the process: it leaves when its input ends, and is killed after two seconds."""
        self._input.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.kill()
        self._output.close()


class ProcessReward:
    """A function of a `.py` file or a module, called in a process of its own (same machine, same Python, same working folder).

    Its module is imported once. What the function keeps between batches, a random state among it, lasts until the process is killed for a
    timeout or ends by itself; the next batch then starts another. What it prints goes to the error stream. A folder or module that cannot
    be loaded raises `UsageError`.
    """

    def __init__(
        self,
        target: str,
        function: str,
        *,
        name: str | None = None,
        timeout: float = 30.0,
        start_timeout: float = 300.0,
        on_error: OnError = "stop",
    ) -> None:
        """`timeout`: seconds for one batch. `start_timeout`: seconds for importing the module, which may load models of its own."""
        self.name = name or function.rpartition(".")[2]
        self.timeout, self.start_timeout = timeout, start_timeout
        self.on_error: OnError = on_error
        self._spec = f"{target}:{function}"
        self._load = json.dumps({"load": {"target": target, "function": function}})
        self._process: _Process | None = None
        try:
            self._signature = self._start()
        except _Gone as gone:
            raise Failure(f"reward {self._spec} {gone} (while it was imported)") from None

    def _start(self) -> Signature:
        process = _Process()
        answer = process.exchange(self._load, self.start_timeout)
        if "refused" in answer:
            process.close()
            raise UsageError(f"reward {self._spec}: {answer['refused']}")
        self._process = process
        found = answer["signature"]
        return Signature(found["style"], None if found["accepts"] is None else tuple(found["accepts"]), tuple(found["required"]))

    def score(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Columns) -> Scores:
        if not completions:
            return settle(self.name, [], completions, self.on_error)
        request = self._request(prompts, completions, completion_ids, _columns_for(self.name, self._signature, columns))
        try:
            if self._process is None:
                self._start()
            assert self._process is not None
            answer = self._process.exchange(request, self.timeout)
        except _Gone as gone:
            self._process = None
            return settle(self.name, Problem(str(gone)), completions, self.on_error)
        if "problem" in answer:
            return settle(self.name, Problem(answer["problem"]), completions, self.on_error)
        outcomes = [Problem(value["problem"]) if isinstance(value, dict) else value for value in answer["outcomes"]]
        return settle(self.name, outcomes, completions, self.on_error)

    def _request(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Columns) -> str:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "columns": columns}
        try:
            return json.dumps({"score": given}, default=_plain)
        except (TypeError, ValueError):
            for column, values in columns.items():
                try:
                    json.dumps(values, default=_plain)
                except (TypeError, ValueError) as error:
                    remedy = "use plain values there, or give the reward as a Python callable"
                    message = f"reward {self.name!r}: column {column!r} cannot be sent to the reward's process ({error}); {remedy}"
                    raise UsageError(message) from None
            raise

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is no JSON value")


# From a specification to a source --------------------------------------------------------------------------------------------------------


def load_reward(
    spec: Any,
    *,
    name: str | None = None,
    timeout: float = 30.0,
    start_timeout: float = 300.0,
    on_error: OnError = "stop",
    policy_tokenizer: Any = None,
    batch_size: int = 32,
    precision: Literal["auto", "float32", "bfloat16"] = "auto",
    device: str = "auto",
) -> RewardSource:
    """The reward that `spec` names: a Python callable, `path/to/file.py:function`, `package.module:function`, a folder or hub id (org/name)
    of a sequence-classification model with one label, a `RewardModel`, or a `RewardSource`, which is returned as it is.

    `timeout`: seconds a batch, of functions; `start_timeout`: of importing one. `on_error`: 'stop' raises `Failure` at the first error,
    'invalid' gives such rows status 2. The last four concern reward models: `policy_tokenizer` is the tokenizer of `completion_ids`
    (without it the texts are encoded anew), `batch_size` the answers of one pass. Raises `UsageError` for anything else, saying what is
    accepted.
    """
    if not (timeout > 0 and start_timeout > 0):
        raise UsageError(f"a reward's timeout must be above 0 seconds, not {min(timeout, start_timeout):g}")
    if on_error not in ("stop", "invalid"):
        raise UsageError(f"on_error is 'stop' or 'invalid', not {on_error!r}")
    functions: dict[str, Any] = {"name": name, "timeout": timeout, "on_error": on_error}
    models: dict[str, Any] = {"name": name, "on_error": on_error, "policy_tokenizer": policy_tokenizer, "batch_size": batch_size}
    if isinstance(spec, torch.nn.Module):
        from telos.objectives.reward_model import ModelReward, RewardModel

        if not isinstance(spec, RewardModel):
            raise UsageError(f"a {type(spec).__name__} is no reward; load its folder with RewardModel.load. {ACCEPTED}")
        return ModelReward(spec, **models)
    if not isinstance(spec, (str, Path)):
        if isinstance(spec, RewardSource):
            return spec
        if callable(spec):
            return FunctionReward(spec, **functions)
        raise UsageError(f"a reward cannot be made of a {type(spec).__name__}: {ACCEPTED}")
    text = str(spec)
    is_folder = text != "" and Path(text).is_dir()
    if ":" in text and not is_folder:  # a folder's name may hold a colon
        target, _, function = text.rpartition(":")
        _check_function(text, target, function)
        return ProcessReward(target, function, start_timeout=start_timeout, **functions)
    if text.endswith(".py"):
        raise UsageError(f"reward {text!r} names no function; write {text}:FUNCTION{_functions_in(Path(text))}")
    if is_folder or re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        from telos.objectives.reward_model import ModelReward, RewardModel

        return ModelReward(RewardModel.load(text, precision=precision, device=device, option="--reward"), **models)
    raise UsageError(f"reward {text!r} is neither a folder nor a function: {ACCEPTED}")


_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def _check_function(spec: str, target: str, function: str) -> None:
    if not _DOTTED.fullmatch(function):
        raise UsageError(f"reward {spec!r}: {function!r} is no function's name; {ACCEPTED}")
    if target.endswith(".py"):
        path = Path(target)
        if not path.is_file():
            near = did_you_mean(path.name, (other.name for other in path.parent.glob("*.py")))
            raise UsageError(f"reward {spec!r}: there is no file {target}{near}")
    elif not _DOTTED.fullmatch(target):
        raise UsageError(f"reward {spec!r}: {target!r} is neither a .py file nor a module's name; {ACCEPTED}")


def _functions_in(path: Path) -> str:
    """' (it has …)' with the file's top-level functions, or ''."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, ValueError, SyntaxError):
        return ""
    names = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_")]
    return f" (it has {', '.join(names[:10])})" if names else ""


# Several rewards -------------------------------------------------------------------------------------------------------------------------


class Combined:
    """The weighted sum of several rewards, over those that apply to a row.

    A row to which none applies is not applicable; a row for which any of them failed is an error, because a sum without one of its parts
    would be another reward. `clip`: (lowest, highest) of the sum.
    """

    def __init__(
        self,
        sources: Sequence[RewardSource],
        weights: Sequence[float] | None = None,
        clip: tuple[float, float] | None = None,
        name: str = "reward",
    ) -> None:
        if not sources:
            raise UsageError(f"no reward was given: {ACCEPTED}")
        weights = [1.0] * len(sources) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(sources):
            raise UsageError(f"there are {len(weights)} reward weights for {len(sources)} rewards; give one for each")
        if not all(math.isfinite(weight) for weight in weights):
            raise UsageError(f"reward weights must be finite numbers, not {weights}")
        if clip is not None and not clip[0] < clip[1]:
            raise UsageError(f"rewards cannot be clipped to [{clip[0]}, {clip[1]}]: the first bound must be the lower one")
        self.name, self.weights, self.clip = name, weights, clip
        self.sources = list(sources)
        self.labels = _distinct([source.name for source in sources])

    def score(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Columns) -> Scores:
        return self.score_parts(prompts, completions, completion_ids, columns)[0]

    def score_parts(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Columns
    ) -> tuple[Scores, dict[str, float]]:
        """The sum, and the numbers to log: for each reward `rewards/<name>/mean` and `/std` over its valid rows (absent when there is none)
        and the counts `/not_applicable` and `/errors`; with a clip, `rewards/clipped`, the fraction of the valid sums that it changed."""
        count = len(completions)
        total = torch.zeros(count, dtype=torch.float64)
        applies, failed = torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        metrics: dict[str, float] = {}
        problem = ""
        for source, label, weight in zip(self.sources, self.labels, self.weights, strict=True):
            part = source.score(prompts, completions, completion_ids, columns)
            total += torch.where(part.valid, weight * part.values.double(), 0.0)
            applies |= part.valid
            failed |= part.status == REWARD_ERROR
            problem = problem or part.problem
            metrics |= {f"rewards/{label}/{key}": value for key, value in _summary(part).items()}
        valid = applies & ~failed
        if self.clip is not None:
            clipped = total.clamp(*self.clip)
            if valid.any():
                metrics["rewards/clipped"] = float((clipped != total)[valid].double().mean())
            total = clipped
        status = torch.where(failed, REWARD_ERROR, torch.where(applies, REWARD_VALID, REWARD_NOT_APPLICABLE)).to(torch.int8)
        return Scores(torch.where(valid, total, math.nan).float(), status, problem), metrics

    def close(self) -> None:
        for source in self.sources:
            source.close()


def _summary(scores: Scores) -> dict[str, float]:
    counts = scores.counts()
    found: dict[str, float] = {"not_applicable": counts["not_applicable"], "errors": counts["error"]}
    if counts["valid"]:
        values = scores.values[scores.valid].double()
        found |= {"mean": values.mean().item(), "std": values.std(correction=0).item()}
    return found


def _distinct(names: list[str]) -> list[str]:
    """The names, the second of equal ones with '_2' and so on, so that no reward's numbers hide another's."""
    found: list[str] = []
    for wanted in names:
        name, number = wanted, 1
        while name in found:
            number += 1
            name = f"{wanted}_{number}"
        found.append(name)
    return found
