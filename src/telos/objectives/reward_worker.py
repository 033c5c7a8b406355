"""How a user's reward function is found, called and read; and the process in which functions named by a string run.

Run as a script, this file is that process: one JSON object a line on its standard input is a request, one on its standard output the
answer. User code gets its own standard streams (an empty input; output goes to the error stream), so that nothing it prints or reads can
touch the protocol. Requests: `{"load": {"target", "function"}}`, then any number of
`{"score": {"prompts", "completions", "completion_ids", "columns"}}`. The process ends when its input does, so it never outlives the one
that started it.

Only the standard library is imported here: the process must start fast and hold nothing but what the user's module needs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import queue
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

OURS = ("prompts", "completions", "completion_ids")  # the keywords that every TRL-style function is offered
VERL_COLUMNS = ("data_source", "ground_truth", "reward_model", "extra_info")
_LARGEST = 3.4028234663852886e38  # the largest float32
_GRACE_S = 2.0  # how long user code may go on after our input ended


@dataclass(frozen=True)
class Problem:
    """Why a row, or a whole batch, has no reward."""

    text: str


Outcome = float | None | Problem


class LoadError(Exception):
    """The function cannot be had; the message is for the user."""


@dataclass(frozen=True)
class Signature:
    """How a function wants to be called. `accepts` are the keywords it takes (None = any), `required` those without a default."""

    style: Literal["trl", "verl"]
    accepts: tuple[str, ...] | None
    required: tuple[str, ...]

    def takes(self, name: str) -> bool:
        return self.accepts is None or name in self.accepts


def signature_of(function: Callable[..., Any]) -> Signature:
    """The signature. verl's `compute_score` is known by its parameters `solution_str` and `ground_truth`. Raises `LoadError`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise LoadError(f"its parameters cannot be read ({error}); wrap it in a function of your own") from None
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = tuple(p.name for p in named)
    unnamed = [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]
    if unnamed:
        raise LoadError(f"its parameter {unnamed[0]!r} is positional-only, but rewards are called by keyword")
    style = "verl" if {"solution_str", "ground_truth"} <= set(names) else "trl"
    any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Signature(style, None if any_keyword and style == "trl" else names, tuple(p.name for p in named if p.default is p.empty))


# Finding the function --------------------------------------------------------------------------------------------------------------------


def load(target: str, function: str) -> Callable[..., Any]:
    """The function of a `.py` file or of a module. Raises `LoadError`."""
    os.environ["TELOS_IMPORTING"] = target  # so that a file which trains when it is imported is told so (`core.naming`)
    try:
        module = _run_guarded(lambda: _module(target), target)
    finally:
        del os.environ["TELOS_IMPORTING"]
    found: Any = module
    for part in function.split("."):
        known = [name for name in dir(found) if not name.startswith("_") and callable(getattr(found, name, None))]
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.6)
            own = [name for name in known if getattr(getattr(found, name), "__module__", None) == getattr(found, "__name__", "")]
            hint = f" (did you mean {near[0]!r}?)" if near else f"; it has {', '.join(own[:10])}" if own else ""
            raise LoadError(f"{target} has no function {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise LoadError(f"{function!r} in {target} is a {type(found).__name__}, not a function")
    return found


def _module(target: str) -> ModuleType:
    if not target.endswith(".py"):
        return importlib.import_module(target)
    path = Path(target).resolve()
    sys.path.insert(0, str(path.parent))  # so that the file can import its neighbours
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _run_guarded(action: Callable[[], ModuleType], target: str) -> ModuleType:
    try:
        return action()
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if target == missing or target.startswith(missing + "."):
            remedy = "run from the folder that holds it, set PYTHONPATH, or give the .py file"
            raise LoadError(f"there is no module {missing!r} here: {remedy}") from None
        raise LoadError(f"importing {target} needs the module {missing!r}, which is not installed ({place(error)})") from None
    except SyntaxError as error:
        raise LoadError(f"{error.filename}, line {error.lineno}: {error.msg}") from None
    except SystemExit as error:
        raise LoadError(f"importing {target} called sys.exit({error.code!r}) at {place(error)}") from None
    except Exception as error:
        raise LoadError(f"importing {target} raised {_named(error)} at {place(error)}") from None


# Calling it ------------------------------------------------------------------------------------------------------------------------------


def place(error: BaseException, file: str | None = None) -> str:
    """FILE, line N of the last frame of the traceback in `file`, else of the last that is neither import machinery nor this file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<frozen")]
    own = [frame for frame in frames if file is not None and frame.filename == file]
    others = [frame for frame in frames if Path(frame.filename) != Path(__file__)]
    frame = (own or others or frames or [None])[-1]
    return f"{frame.filename}, line {frame.lineno}" if frame is not None else "an unknown line"


def _named(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _file_of(function: Callable[..., Any]) -> str | None:
    code = getattr(inspect.unwrap(getattr(function, "func", function)), "__code__", None)
    return code.co_filename if code is not None else None


def call(
    function: Callable[..., Any],
    signature: Signature,
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    columns: dict[str, list[Any]],
    passing: type[Exception] | tuple[()] = (),
) -> list[Outcome] | Problem:
    """One outcome a row, or the problem of the whole batch. What user code raises becomes a `Problem`, unless it is a `passing`."""
    if signature.style == "verl":
        return _call_verl(function, signature, completions, columns, passing)
    offered = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    try:
        values = _finished(function(**{name: value for name, value in offered.items() if signature.takes(name)}))
    except passing:
        raise
    except (Exception, SystemExit) as error:
        return _raised(function, error)
    if hasattr(values, "tolist"):  # a tensor or an array
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        wanted = f"a list with one number for each of the {len(completions)} completions"
        return Problem(f"returned {_short(values)} (a {type(values).__name__}), not {wanted}")
    if len(values) != len(completions):
        return Problem(f"returned {len(values)} rewards for {len(completions)} completions; expected {len(completions)}, got {len(values)}")
    return [number(value) for value in values]


def _call_verl(
    function: Callable[..., Any],
    signature: Signature,
    completions: list[Any],
    columns: dict[str, list[Any]],
    passing: type[Exception] | tuple[()],
) -> list[Outcome]:
    offered = [_verl_row(completions, columns, i) for i in range(len(completions))]
    rows = [{name: value for name, value in row.items() if signature.takes(name)} for row in offered]

    def one(row: dict[str, Any]) -> Any:
        try:
            return function(**row)
        except passing:
            raise
        except (Exception, SystemExit) as error:
            return _raised(function, error)

    async def wait(value: Awaitable[Any]) -> Any:
        try:
            return await value
        except passing:
            raise
        except (Exception, SystemExit) as error:
            return _raised(function, error)

    async def wait_all(found: list[Any]) -> list[Any]:
        return await asyncio.gather(*[wait(value) if inspect.isawaitable(value) else _given(value) for value in found])

    values = [one(row) for row in rows]
    if any(inspect.isawaitable(value) for value in values):
        values = run_to_end(wait_all(values))
    return [value if isinstance(value, Problem) else number(_verl_score(value)) for value in values]


async def _given(value: Any) -> Any:
    return value


def _verl_score(value: Any) -> Any:
    return value["score"] if isinstance(value, dict) and "score" in value else value


def plain_text(completion: str | list[dict[str, Any]]) -> str:
    """A completion's text, also when it is given as the turns of a conversation."""
    return completion if isinstance(completion, str) else "".join(str(turn.get("content") or "") for turn in completion)


def _verl_row(completions: list[Any], columns: dict[str, list[Any]], i: int) -> dict[str, Any]:
    """The keywords of verl's `compute_score` for row i; the ground truth is a column of its own or stands in the column `reward_model`."""
    row = {name: columns[name][i] for name in ("data_source", "ground_truth", "extra_info") if name in columns}
    if "ground_truth" not in row:
        row["ground_truth"] = columns["reward_model"][i]["ground_truth"]
    return {"extra_info": {}, **row, "solution_str": plain_text(completions[i])}


def _raised(function: Callable[..., Any], error: BaseException) -> Problem:
    where = place(error, _file_of(function))
    if isinstance(error, SystemExit):
        return Problem(f"called sys.exit({error.code!r}) at {where}")
    return Problem(f"raised {_named(error)} at {where}")


def _finished(value: Any) -> Any:
    return run_to_end(value) if inspect.isawaitable(value) else value


def run_to_end(awaitable: Awaitable[Any]) -> Any:
    """What an awaitable gives; in a thread of its own where this one already runs an event loop (notebooks)."""

    async def waited() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(waited())
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((True, asyncio.run(waited())))
        except BaseException as error:
            found.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    fine, value = found[0]
    if not fine:
        raise value
    return value


def number(value: Any) -> Outcome:
    """A reward as user code gave it: a finite float, None (not applicable), or what is wrong with it."""
    if value is None:
        return None
    if hasattr(value, "item"):  # a scalar of numpy or torch
        try:
            value = value.item()
        except (ValueError, RuntimeError, TypeError):
            return Problem(f"gave {_short(value)}, which is not one number")
    if not isinstance(value, numbers.Real):
        return Problem(f"gave {_short(value)} (a {type(value).__name__}), which is neither a number nor None")
    try:
        real = float(value)
    except OverflowError:
        real = math.inf
    if math.isnan(real):
        return Problem("gave NaN")
    if abs(real) > _LARGEST:
        return Problem(f"gave {'-' if real < 0 else ''}infinity" if math.isinf(real) else f"gave {real:g}, which is too large for float32")
    return real


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else text[:57] + "..."


# The process -----------------------------------------------------------------------------------------------------------------------------


def _plain(outcome: Outcome) -> Any:
    return {"problem": outcome.text} if isinstance(outcome, Problem) else outcome


def _read_requests(source: Any, requests: queue.Queue[str | None]) -> None:
    for line in source:
        requests.put(line)
    requests.put(None)
    # Our input has ended, so nobody waits for us any more; user code that does not come to an end must not stay behind.
    threading.Event().wait(_GRACE_S)
    os._exit(0)


def main() -> None:
    source = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)  # also what compiled code and child processes print
    sys.stdout = sys.stderr
    sys.path.insert(0, os.getcwd())
    requests: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_requests, args=(source, requests), daemon=True).start()

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    function: Callable[..., Any] | None = None
    signature: Signature | None = None
    while (line := requests.get()) is not None:
        request = json.loads(line)
        if "load" in request:
            try:
                function = load(**request["load"])
                signature = signature_of(function)
            except LoadError as error:
                reply({"refused": str(error)})
                continue
            reply({"signature": dataclasses.asdict(signature)})
        else:
            assert function is not None
            assert signature is not None
            outcomes = call(function, signature, **request["score"])
            reply(_plain(outcomes) if isinstance(outcomes, Problem) else {"outcomes": [_plain(outcome) for outcome in outcomes]})


if __name__ == "__main__":
    main()
