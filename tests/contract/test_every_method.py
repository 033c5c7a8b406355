"""What every method is, in every family: how it describes itself, and how it takes its options."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
from pathlib import Path

import pytest

import telos
from telos.core import config as configs
from telos.core import discovery
from telos.core.config import RunConfig, options_of
from telos.core.method import Method

NEEDS = {  # what a loop offers beside the policy
    "supervised": {"scores"},
    "pairs": {"reference", "scores", "samples", "revisions"},
    "unpaired": {"reference", "labels", "scores", "advantages", "kl"},
    "ranked": set(),
    "iterative": {"reference", "anchor", "history", "restart", "objectives"},
    "reward-model": set(),
    "rollouts": {"reference", "reward", "critic", "greedy", "teacher", "answers", "guide", "nucleus", "soup", "groups"},
    "sampling": {"reward"},
    "steps": {"reward"},
    "search": {"process-reward"},
    "process": set(),
    "values": {"reference", "steps", "step-advantages", "critic"},
    "on-policy": set(),
    "off-policy": set(),
    "offline": set(),
    "policy-gradient": set(),
    "greedy-random": set(),
    "streaming": set(),
    "tabular": set(),
}
FUNCTIONS = {  # what a loop calls
    "supervised": {"loss"},
    "pairs": {"loss"},
    "unpaired": {"loss"},
    "ranked": {"loss"},
    "iterative": {"loss", "arrange"},
    "reward-model": {"loss"},
    "rollouts": {"loss", "estimate"},
    "sampling": {"select"},
    "steps": {"estimate"},
    "search": {"select"},
    "process": {"loss"},
    "values": {"loss"},
    "on-policy": {"loss", "estimate"},
    "off-policy": {"build", "updates", "explore"},
    "offline": {"build", "updates"},
    "policy-gradient": {"loss", "advance"},
    "greedy-random": {"build", "sample", "estimate"},
    "streaming": {"build", "explore", "update"},
    "tabular": {"plan"},
}
SOURCES = Path(telos.__file__).parent


@pytest.fixture(params=[card.key for card in discovery.cards() if card.file is not None])
def method(request: pytest.FixtureRequest) -> Method:
    return discovery.load(request.param)


# What it is ----------------------------------------------------------------------------------------------------------------------------


def test_a_method_says_what_it_is_where_it_comes_from_and_what_it_changes(method: Method) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method.key)
    assert method.title.strip() == method.title != ""
    assert re.search(r"\b(19|20)\d\d\b", method.paper), "the paper's year is missing"
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi:|https?://|ISBN", method.paper), "the paper cannot be looked up"
    assert len(method.changes.split()) >= 4
    assert not method.changes.endswith(".")
    assert method.needs <= NEEDS[method.loop]
    assert method.system is None or 1 <= method.system <= 200
    assert method.key not in method.aliases
    assert dataclasses.is_dataclass(method.config)
    assert method.config.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert issubclass(method.config, RunConfig)


def test_its_file_stands_in_its_family_beside_its_loop_and_opens_with_the_equation(method: Method) -> None:
    card = discovery.find(method.key)
    assert card.file is not None
    assert card.file.parent.name == method.family
    assert (card.file.parent / f"_loop_{method.loop.replace('-', '_')}.py").is_file()
    assert len((ast.get_docstring(ast.parse(card.file.read_text(encoding="utf-8"))) or "").splitlines()) >= 3


def test_it_brings_the_functions_that_its_loop_calls_and_no_others(method: Method) -> None:
    wanted = FUNCTIONS[method.loop] | ({"critic_loss"} if "critic" in method.needs else set())
    found = {part.name for part in dataclasses.fields(method) if callable(getattr(method, part.name)) and part.name != "config"}
    may = {
        "iterative": {"writers", "advance", "prepare"},
        "supervised": {"prepare"},
        "rollouts": {"select", "sample"},
        "on-policy": {"update", "slopes", "build"},
        "policy-gradient": {"propose"},
        "tabular": {"update"},
    }
    allowed = may.get(method.loop, set())
    assert wanted <= found <= wanted | allowed


def test_what_is_listed_without_importing_is_what_the_method_says(method: Method) -> None:
    card = discovery.find(method.key)
    for name in ("key", "title", "family", "loop", "changes", "paper", "system", "aliases"):
        assert getattr(card, name) == getattr(method, name)


def test_it_is_found_by_its_key_its_title_and_its_aliases(method: Method) -> None:
    for word in (method.key, method.key.replace("-", "_").upper(), method.title, *method.aliases):
        assert method.key in {card.key for card in discovery.matches(word)}


# Options -------------------------------------------------------------------------------------------------------------------------------


def test_every_option_has_a_help_text(method: Method) -> None:
    bare = [option.name for option in options_of(method.config) if len(option.help.split()) < 2]
    assert bare == []


def test_the_defaults_survive_yaml(method: Method, tmp_path: Path) -> None:
    config = configs.from_mapping(method.config, {})
    configs.write_yaml(tmp_path / "config.yaml", configs.to_mapping(config))
    assert configs.from_mapping(method.config, configs.read_yaml(tmp_path / "config.yaml")) == config


@functools.cache
def attributes_read() -> set[str]:
    """Names read as `config.NAME`, `c.NAME`, `options.NAME` or `self.config.NAME` somewhere in the package."""
    found = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                base = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                if base in {"config", "c"} or base.endswith("_config"):
                    found.add(node.attr)
            if isinstance(node, ast.ClassDef) and node.name.endswith(
                "Config"
            ):  # what its properties make of its options; a check is no use
                uses = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name != "__post_init__"]
                found |= {
                    n.attr for part in uses for n in ast.walk(part) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "self"
                }
    return found


def test_every_option_is_read_somewhere(method: Method) -> None:
    ignored = {option.name for option in options_of(method.config)} - attributes_read()
    assert ignored == set(), "an option that is accepted and ignored is an error"


def test_an_options_default_is_what_an_empty_config_gives(method: Method) -> None:
    config = configs.from_mapping(method.config, {})
    assert {option.name: option.default for option in options_of(method.config)} == configs.to_mapping(config)
    assert inspect.getdoc(method.config)
