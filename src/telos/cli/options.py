"""A method's options on the command line, made from its config class: `--name value`, `--name=value`, `--flag`, `--no-flag`.

Hyphens, dots and underscores are the same. `none` unsets an option that may be unset; lists are separated by commas. Values stay text here:
`core.config.from_mapping` gives them their type and names the option when they do not fit, as it does for a YAML file.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from telos.cli.text import columns, value_text
from telos.core.config import Option, option_name, options_of
from telos.core.errors import UsageError, did_you_mean

_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


@dataclass(frozen=True)
class Spec:
    """One option as the command line takes it."""

    name: str
    type: str  # for the user: "float", "constant|linear", "text or none"
    default: str
    help: str
    is_bool: bool = False
    is_list: bool = False
    may_be_none: bool = False


@dataclass(frozen=True)
class Group:
    """Options that one config class introduces."""

    title: str
    specs: list[Spec]


def groups_of(config: type) -> list[Group]:
    """The options of a config class by the class that introduces them: the method's own, then its loop's, then those of every run."""
    hints = _hints(config)
    bases = [base for base in config.__mro__ if dataclasses.is_dataclass(base)]
    owner: dict[str, type] = {}
    for base in reversed(bases):
        for name in inspect.get_annotations(base):
            owner.setdefault(name, base)
    found: dict[type, list[Spec]] = {base: [] for base in bases}
    for option in options_of(config):
        found[owner.get(option.name, config)].append(_spec(option, hints.get(option.name)))
    return [Group(_title(base), specs) for base, specs in found.items() if specs]


def _title(cls: type) -> str:
    lines = (cls.__doc__ or "").strip().splitlines()
    return lines[0].partition(". ")[0].partition(":")[0].rstrip(".") if lines else f"Options of {cls.__name__}"


def _hints(config: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(config)
    except (NameError, TypeError, AttributeError):  # a type that only a checker can see; the annotation's text has to do
        return {}


def _spec(option: Option, hint: Any) -> Spec:
    kind = option.type if hint is None else _type_text(hint)
    bare = [part for part in typing.get_args(hint) if part is not type(None)] if _is_union(hint) else [hint]
    return Spec(
        option.name,
        kind,
        "" if option.default is dataclasses.MISSING else value_text(option.default),
        option.help,
        is_bool=bare == [bool] or option.type == "bool",
        is_list=any(typing.get_origin(part) in (tuple, list) for part in bare) or option.type.startswith(("tuple", "list")),
        may_be_none=_is_union(hint) and type(None) in typing.get_args(hint),
    )


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _type_text(hint: Any) -> str:
    if hint is bool:
        return "true|false"
    if hint is str:
        return "text"
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (tuple, list):
        return _type_text(typing.get_args(hint)[0]) + ",…" if typing.get_args(hint) else "text,…"
    if _is_union(hint):
        return " or ".join("none" if part is type(None) else _type_text(part) for part in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint))


def described(groups: Sequence[Group], width: int | None) -> str:
    """The options as text: a title for each group, then name, type, default and comment."""
    rows = [[f"--{spec.name}", spec.type, spec.default, spec.help] for group in groups for spec in group.specs]
    sizes = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    parts = []
    for group in groups:
        cells = [[f"--{s.name}".ljust(sizes[0]), s.type.ljust(sizes[1]), s.default.ljust(sizes[2]), s.help] for s in group.specs]
        parts.append(f"{group.title}:\n" + columns(cells, width=width, indent=2))
    return "\n\n".join(parts)


def parse(words: Sequence[str], groups: Iterable[Group], extra: Sequence[str] = ()) -> dict[str, Any]:
    """`words` as option -> text, bool, list of texts, or None.

    `extra`: further options that take a text. Raises `UsageError` for an unknown option (with a suggestion), one without its value, one that
    is given twice, and words that belong to no option.
    """
    specs = {spec.name: spec for group in groups for spec in group.specs} | {name: Spec(name, "text", "", "") for name in extra}
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UsageError(f"unexpected word {word!r}; options are written --name value{_after(found, word)}")
        written, given, value = word[2:].partition("=")
        name = option_name(written)
        spec = specs.get(name)
        negated = specs.get(name.removeprefix("no_")) if spec is None and name.startswith("no_") else None
        if negated is not None and negated.is_bool:
            if given:
                raise UsageError(f"--{written} takes no value; write --{written}, or --{negated.name} {value}")
            result: Any = False
            spec = negated
        elif spec is None:
            raise UsageError(f"unknown option --{written}{_suggestion(name, specs)}")
        else:
            result = _value(spec, value if given else None, rest)
        if spec.name in found:
            raise UsageError(f"--{spec.name} is given twice")
        found[spec.name] = result
    return found


def _value(spec: Spec, given: str | None, rest: list[str]) -> Any:
    if spec.is_bool:
        if given is None and rest and rest[0].lower() in _TRUE | _FALSE:
            given = rest.pop(0)
        if given is None or given.lower() in _TRUE:
            return True
        if given.lower() in _FALSE:
            return False
        raise UsageError(f"--{spec.name} is true or false, not {given!r}")
    if given is None:
        if not rest or rest[0].startswith("--"):
            raise UsageError(f"--{spec.name} needs a value ({spec.type})")
        given = rest.pop(0)
    if spec.may_be_none and given.lower() == "none":
        return None
    if spec.is_list:
        return [] if given.lower() in ("", "none") else [part.strip() for part in given.split(",")]
    return given


def _after(found: dict[str, Any], word: str) -> str:
    """A hint for `--data a b` and for `-x`."""
    if word.startswith("-"):
        return ", with two hyphens"
    last = next(reversed(found), None)
    return f" (quote a value with spaces, as in --{last} 'a b')" if last else ""


def _suggestion(name: str, specs: Mapping[str, Spec]) -> str:
    hint = did_you_mean(name, specs)
    return hint.replace("'", "--", 1).replace("'", "", 1) if hint else "; `--help` lists the options"
