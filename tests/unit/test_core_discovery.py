"""Methods are found by reading their files: quickly, without torch, and with names that collide told apart."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from telos.core import discovery
from telos.core.errors import Failure, UsageError
from telos.core.method import Method

METHOD = """
METHOD = Method(
    key="{key}",
    title="{title}",
    family="language",
    loop="pairs",
    changes="changes nothing at all",
    paper="Nobody 2024, arXiv:0000.00000",
    config=Config,
    aliases=({aliases}),
    system={system},
)
"""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    discovery.cards.cache_clear()
    yield
    discovery.cards.cache_clear()


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty `algorithms/` with one family."""
    (tmp_path / "language").mkdir()
    monkeypatch.setattr(discovery, "_ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    return tmp_path


def add(house: Path, file: str, key: str, title: str = "A Method", aliases: str = "", system: str = "None") -> Path:
    path = house / "language" / file
    path.write_text(METHOD.format(key=key, title=title, aliases=aliases, system=system), encoding="utf-8")
    return path


def test_the_methods_that_are_here_are_found() -> None:
    keys = [card.key for card in discovery.cards()]
    assert keys == sorted(keys)
    assert {"sft", "reward-model", "best-of-n", "dpo", "simpo", "ppo-max"} <= set(keys)
    systems = [card.system for card in discovery.cards() if card.system is not None]
    assert len(systems) == len(set(systems))
    assert {136, 191, 120} <= set(systems)


def test_listing_needs_no_torch_and_little_time() -> None:
    code = (
        "import json, sys, time; t = time.process_time()\n"
        "from telos.core import discovery; n = len(discovery.cards())\n"
        "print(json.dumps([n, time.process_time() - t, sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules))]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, seconds, heavy = json.loads(done.stdout)
    assert count >= 6
    assert heavy == []
    assert seconds < 1, "seconds of the processor; a listing reads small files"


def test_a_file_with_a_method_is_a_method(house: Path) -> None:
    path = add(house, "mine.py", "mine", aliases="'my-own', 'MO'", system="7")
    add(house, "_loop_pairs.py", "not-a-method")
    (house / "language" / "helper.py").write_text("x = 1\n", encoding="utf-8")
    (card,) = discovery.cards()
    assert (card.key, card.aliases, card.system, card.file) == ("mine", ("my-own", "MO"), 7, path)
    assert card.module == "telos.algorithms.language.mine"
    for word in ("mine", "MINE", "my_own", "mo", "A Method", "a method"):
        assert discovery.find(word) == card


def test_two_methods_of_one_key_are_refused_with_both_places(house: Path) -> None:
    add(house, "one.py", "same")
    add(house, "two.py", "same")
    with pytest.raises(
        Failure, match=r"two methods are called 'same': telos\.algorithms\.language\.one and telos\.algorithms\.language\.two"
    ):
        discovery.cards()


def test_an_alias_of_several_methods_lists_them_but_a_key_always_wins(house: Path) -> None:
    add(house, "one.py", "one", aliases="'pg',")
    add(house, "two.py", "two", aliases="'pg', 'three'")
    add(house, "three.py", "three")
    with pytest.raises(UsageError, match="'pg' names several methods: one, two; use one of these keys"):
        discovery.find("pg")
    assert [card.key for card in discovery.matches("pg")] == ["one", "two"]
    assert discovery.find("three").key == "three"


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match=r"there is no method 'dppo' \(did you mean '(dpo|ppo|cdpo)'\?\); `telos list` shows all"):
        discovery.find("dppo")
    with pytest.raises(UsageError, match="there is no method 'xyzzy'; `telos list`"):
        discovery.find("xyzzy")


def test_a_description_that_cannot_be_read_without_importing_names_its_file(house: Path) -> None:
    path = add(house, "mine.py", "mine")
    path.write_text(path.read_text(encoding="utf-8").replace('"A Method"', "make_title()"), encoding="utf-8")
    with pytest.raises(Failure, match=r"mine\.py: METHOD's title must be a literal"):
        discovery.cards()


@pytest.mark.parametrize("line", ['    key="mine",\n', '    paper="Nobody 2024, arXiv:0000.00000",\n'])
def test_a_description_that_lacks_a_part_names_the_file_and_the_part(house: Path, line: str) -> None:
    path = add(house, "mine.py", "mine")
    path.write_text(path.read_text(encoding="utf-8").replace(line, ""), encoding="utf-8")
    with pytest.raises(Failure, match=rf"mine\.py: METHOD has no {line.split('=')[0].strip()}"):
        discovery.cards()


def test_a_method_of_a_third_party_is_found_by_its_entry_point_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_method.py").write_text(
        "from telos.algorithms.language.dpo import Config, loss\n"
        "from telos.core.method import Method\n"
        "METHOD = Method(key='theirs', title='Theirs', family='language', loop='pairs', changes='nothing', paper='none',"
        " config=Config, loss=loss, needs=frozenset({'reference'}))\n",
        encoding="utf-8",
    )
    (tmp_path / "their_other.py").write_text("x = 1\n", encoding="utf-8")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        "[telos.methods]\ntheirs = their_method\nempty = their_other\ngone = their_gone\nother-name = their_method\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert {"theirs", "empty", "gone", "other-name"} <= {card.key for card in discovery.cards()}
    assert isinstance(discovery.load("theirs"), Method)
    assert discovery.load("theirs").key == "theirs"
    assert discovery.find("theirs").family == "third-party"
    with pytest.raises(Failure, match="their_other has no METHOD"):
        discovery.load("empty")
    with pytest.raises(Failure, match="their_gone"):
        discovery.load("gone")
    with pytest.raises(Failure, match="key 'theirs' is not the name of its entry point, 'other-name'"):
        discovery.load("other-name")


def test_a_third_party_cannot_take_the_key_of_a_bundled_method(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("dpo", "elsewhere", "telos.methods")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: (entry,))
    with pytest.raises(Failure, match=r"two methods are called 'dpo': telos\.algorithms\.language\.dpo and elsewhere"):
        discovery.cards()
