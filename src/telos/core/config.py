"""Options: frozen dataclasses, one way in for the command line, a YAML file and Python keywords.

Every option is a field with a comment (unit, range, the paper's value); the comment is its help text. Unknown names are refused with a
suggestion, wrong types name the option, and a config never rewrites itself: what was asked for is what is written to `config.yaml`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import operator
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from telos.core.errors import UsageError, did_you_mean

C = TypeVar("C")


def require(config: Any, rule: str, *names: str) -> None:
    """Checks that the options `names` follow `rule`: a comparison with a number, such as ">= 1", or two of them, ">= 0 and < 1".

    Raises `UsageError` naming the first that does not; NaN follows no rule.
    """
    for name in names:
        value = getattr(config, name)
        for part in rule.split(" and "):
            sign, bound = part.split()
            if not _COMPARISONS[sign](value, float(bound)):
                raise UsageError(f"--{name} {value} must be {rule}")


_COMPARISONS = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Options that mean the same in every run. A class that adds options checks their ranges in `__post_init__`, after its parent's."""

    seed: int = 0  # seed of everything random in the run
    out: str | None = None  # the run's folder; default runs/<method>-<time>
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where tensors live; auto takes the GPU when there is one
    threads: int = 0  # CPU threads of torch; 0 = as many as there are cores
    backend: Literal["inline"] = "inline"  # where the program's roles run; inline = in this process
    checkpoint_every: int = 50  # steps between checkpoints; 0 = only at the end
    keep_checkpoints: int = 2  # how many of the newest checkpoints stay on disk
    log_every: int = 1  # steps between lines of metrics.jsonl

    def __post_init__(self) -> None:
        require(self, ">= 0", "seed", "threads", "checkpoint_every")
        require(self, ">= 1", "keep_checkpoints", "log_every")

    @property
    def program_steps(self) -> int:
        """How often the run loop calls the program's `step`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class StepsConfig(RunConfig):
    """A run whose length is given in the program's own steps."""

    steps: int = 200  # optimiser steps (on-policy loops: iterations of sample and learn)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "steps")

    @property
    def program_steps(self) -> int:
        return self.steps


@dataclass(frozen=True)
class Option:
    """One option as the user sees it."""

    name: str
    type: str
    default: Any
    help: str


@functools.cache
def _comments(cls: type) -> dict[str, str]:
    """The comment beside each field of `cls` itself (not of its bases)."""
    try:
        source = inspect.cleandoc("\n" + inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    out: dict[str, str] = {}
    name = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and not name and token.start[1] == len(token.line) - len(token.line.lstrip()):
            name = token.string
        elif token.type == tokenize.COMMENT and name:
            out[name] = token.string.lstrip("# ")
        elif token.type == tokenize.NEWLINE:
            name = ""
    return out


def options_of(cls: type) -> list[Option]:
    """The options of a config class, the class's own first, then those of its loop, then those of every run."""
    comments: dict[str, str] = {}
    owner: dict[str, int] = {}
    for depth, base in enumerate(reversed(cls.__mro__)):
        comments |= _comments(base) if dataclasses.is_dataclass(base) else {}
        for name in inspect.get_annotations(base):
            owner.setdefault(name, depth)
    rows = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        rows.append((-owner.get(field.name, 0), Option(field.name, kind, default, comments.get(field.name, ""))))
    return [option for _, option in sorted(rows, key=lambda row: row[0])]


def option_name(written: str) -> str:
    """An option's name as it may be written: hyphens and dots (`--loss.degree`) are underscores."""
    return written.replace("-", "_").replace(".", "_")


def from_mapping(cls: type[C], values: Mapping[str, Any], *, source: str = "options") -> C:
    """Builds a config; where several texts may be given, one stands for a list of one.

    Raises `UsageError` naming the option for unknown names (with a suggestion), wrong types and missing values.
    """
    import pydantic

    names = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    given = {option_name(name): value for name, value in values.items()}
    for name in given:
        if name not in names:
            raise UsageError(f"{source}: unknown option {name!r}{did_you_mean(name, names)}; `telos show` lists the options of a method")
    lists = {field.name for field in dataclasses.fields(cls) if str(field.type).startswith("tuple[str")}  # type: ignore[arg-type]
    given = {name: (value,) if name in lists and isinstance(value, str) else value for name, value in given.items()}  # one is a list of one
    try:
        return pydantic.TypeAdapter(cls).validate_python(given)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "options"
        raise UsageError(f"{source}: option {place!r}: {first['msg']} (given: {first.get('input')!r})") from None


def to_mapping(config: Any) -> dict[str, Any]:
    """The config as plain values; `from_mapping(type(config), to_mapping(config)) == config`."""
    return dataclasses.asdict(config)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file. Raises `UsageError` when it cannot be read or is not a mapping."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--config {path}: expected lines of the form `option: value`")
    return values


def write_yaml(path: Path, values: Mapping[str, Any]) -> None:
    import yaml

    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
