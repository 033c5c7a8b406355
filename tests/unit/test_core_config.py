"""Options: one way in for text, YAML and Python, refused by name when they do not fit."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telos.core import config as configs
from telos.core.config import RunConfig, StepsConfig, from_mapping, options_of, read_yaml, require, to_mapping, write_yaml
from telos.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Parent(StepsConfig):
    """Options of a loop."""

    steps: int = 7  # iterations of this loop
    rate: float = 0.5  # how fast, in units a step # not a second comment

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0 and <= 1", "rate")


@dataclass(frozen=True, kw_only=True)
class Config(Parent):
    """Options of a method."""

    kind: Literal["a", "b"] = "a"  # which of two
    names: tuple[str, ...] = ()  # any number of names
    where: str | None = None  # a folder, or none
    long: tuple[int, ...] = (
        1,
        2,
    )  # a field over several lines
    flag: bool = False  # on or off


def test_options_come_with_type_default_and_comment_the_methods_own_first() -> None:
    found = options_of(Config)
    assert [option.name for option in found][:5] == ["kind", "names", "where", "long", "flag"]
    assert [option.name for option in found][5:7] == ["rate", "seed"] or "rate" in [option.name for option in found][5:7]
    by_name = {option.name: option for option in found}
    assert by_name["steps"].default == 7
    assert by_name["steps"].help == "iterations of this loop", "the nearest class speaks"
    assert by_name["seed"].help == "seed of everything random in the run"
    assert by_name["long"].help == "a field over several lines"
    assert by_name["kind"].type == "Literal['a', 'b']" or "a" in by_name["kind"].type
    assert {option.name for option in found} == {field.name for field in dataclasses.fields(Config)}


def test_every_option_of_every_run_has_a_comment() -> None:
    assert [option.name for option in options_of(RunConfig) if not option.help] == []


@pytest.mark.parametrize(
    ("given_", "name", "value"),
    [
        ({"rate": "0.25"}, "rate", 0.25),
        ({"rate": "1e-3"}, "rate", 0.001),
        ({"steps": "12"}, "steps", 12),
        ({"flag": "true"}, "flag", True),
        ({"flag": "no"}, "flag", False),
        ({"names": ["x", "y"]}, "names", ("x", "y")),
        ({"where": None}, "where", None),
        ({"checkpoint-every": 3}, "checkpoint_every", 3),
    ],
)
def test_text_and_values_become_the_options_type(given_: dict[str, Any], name: str, value: Any) -> None:
    found = getattr(from_mapping(Config, given_), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"stepz": 3}, r"unknown option 'stepz' \(did you mean 'steps'\?\)"),
        ({"zzzzzz": 3}, r"unknown option 'zzzzzz'; `telos show`"),
        ({"steps": "many"}, r"option 'steps'.*'many'"),
        ({"steps": 2.5}, r"option 'steps'.*2\.5"),
        ({"rate": None}, r"option 'rate'.*None"),
        ({"kind": "c"}, r"option 'kind'.*'a' or 'b'"),
        ({"names": 3}, r"option 'names'"),
        ({"rate": 0.0}, r"--rate 0\.0 must be > 0 and <= 1"),
        ({"rate": math.nan}, r"--rate nan must be > 0"),
        ({"rate": 1.5}, r"--rate 1\.5"),
        ({"steps": 0}, r"--steps 0 must be >= 1"),
        ({"log_every": 0}, r"--log_every 0 must be >= 1"),
        ({"seed": -1}, r"--seed -1 must be >= 0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        from_mapping(Config, given_)
    assert caught.value.exit_code == 2


def test_a_missing_option_without_default_is_named() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needy(RunConfig):
        data: str  # rows

    with pytest.raises(UsageError, match="option 'data'"):
        from_mapping(Needy, {})


def test_a_config_cannot_be_changed() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rate = 0.1  # type: ignore[misc]
    with pytest.raises(UsageError, match="--rate"):
        dataclasses.replace(config, rate=2.0)


text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    rate=st.floats(0, 1, exclude_min=True),
    names=st.lists(text, max_size=3),
    where=st.none() | text,
    seed=st.integers(0, 2**62),
    flag=st.booleans(),
    kind=st.sampled_from("ab"),
)
def test_any_config_survives_yaml(tmp_path_factory: pytest.TempPathFactory, **values: Any) -> None:
    config = from_mapping(Config, values)
    file = tmp_path_factory.mktemp("yaml") / "config.yaml"
    write_yaml(file, to_mapping(config))
    assert from_mapping(Config, read_yaml(file)) == config


@pytest.mark.parametrize("content", [b"a: [", b"- 1\n- 2\n", b"just text", b"", b"\xff\xfe\x00"])
def test_a_file_that_holds_no_options_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=r"--config .*bad\.yaml"):
        read_yaml(tmp_path / "bad.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .*none\.yaml: cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("rate: 1e-3\nsteps: 5\n", encoding="utf-8")  # YAML 1.1 reads 1e-3 as text
    config = from_mapping(Config, read_yaml(tmp_path / "c.yaml"))
    assert (config.rate, config.steps) == (0.001, 5)


@pytest.mark.parametrize(
    ("rule", "good", "bad"), [("> 0", 1, 0), (">= 0", 0, -1), ("< 1", 0, 1), ("<= 1", 1, 2), (">= 0 and < 1", 0.5, 1.0)]
)
def test_a_rule_is_a_comparison(rule: str, good: float, bad: float) -> None:
    @dataclass
    class Holder:
        x: float

    require(Holder(good), rule, "x")
    with pytest.raises(UsageError, match=f"--x {bad} must be {rule}"):
        require(Holder(bad), rule, "x")
    assert configs.require is require
