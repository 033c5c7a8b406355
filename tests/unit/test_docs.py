"""The documentation says what is: generated tables fit the sources, commands parse, targets and links exist, pins are pins."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from telos.catalogue import docs, status
from telos.cli import options
from telos.cli.main import build_parser
from telos.core import discovery
from telos.core.config import from_mapping
from telos.core.errors import DataError, UsageError

ROOT = Path(__file__).parents[2]
GENERATED = {"methods.md", "systems.md", "options.md", "claims.md", "benchmarks.md"}
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name not in GENERATED)]
PAGES = [*WRITTEN, *sorted((ROOT / "docs" / name) for name in GENERATED)]


def commands(page: Path) -> list[str]:
    """Every `telos …` line of a page's shell blocks and code spans. Those with an ellipsis are no commands."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [line for line in (*lines, *spans) if line.startswith("telos ") and "…" not in line]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def anchors(page: Path) -> set[str]:
    return {docs._anchor(title) for title in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)}


def a_checkout(folder: Path) -> Path:
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copytree(ROOT / "claims", folder / "claims", dirs_exist_ok=True)
    shutil.copytree(ROOT / "benchmarks" / "records", folder / "benchmarks" / "records")
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


# Generated pages -------------------------------------------------------------------------------------------------------------------------


def test_generated_pages_fit_the_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert docs.main(check=True) == 0, capsys.readouterr().err


def test_check_names_what_was_edited_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = a_checkout(tmp_path)
    page = root / "docs" / "options.md"
    page.write_text(page.read_text(encoding="utf-8").replace("`beta`", "`bate`"), encoding="utf-8")
    edited = page.read_bytes()
    assert docs.main(check=True, root=root) == 1
    told = capsys.readouterr().err
    assert "docs/options.md" in told
    assert "README.md" not in told
    assert page.read_bytes() == edited


def test_writing_mends_what_was_edited_or_lost(tmp_path: Path) -> None:
    root = a_checkout(tmp_path)
    whole = {path: path.read_bytes() for path in root.rglob("*.md")}
    (root / "docs" / "methods.md").unlink()
    readme = root / "README.md"
    readme.write_text(readme.read_text(encoding="utf-8").replace("[`dpo`]", "[`odp`]"), encoding="utf-8")
    assert docs.main(root=root) == 0
    assert {path: path.read_bytes() for path in root.rglob("*.md")} == whole


def test_a_readme_without_markers_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="README\\.md has lost the markers"):
        docs.with_methods("# Telos\n<!-- methods -->\n")


def test_outside_a_checkout_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="checkout"):
        docs.main(root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_stands_around_the_markers_is_kept() -> None:
    made = docs.with_methods("before\n<!-- methods -->\nold\n<!-- /methods -->\nafter\n")
    assert made.startswith("before\n<!-- methods -->\n|")
    assert made.endswith("<!-- /methods -->\nafter\n")
    assert "old\n" not in made
    assert "Of the 200 systems" in made


def test_every_system_stands_on_the_map_once_with_its_status() -> None:
    page = docs.systems_page()
    rows = re.findall(r"^\| (S\d+) \| (?:\[)?`([\w-]+)`.*?\| (planned|ready|supported|not supported|inconclusive) \|", page, re.MULTILINE)
    assert sorted(rows) == sorted((entry.number, entry.key, entry.status) for entry in status.entries() if entry.system is not None)
    assert len(rows) == 200


def test_every_option_of_every_method_stands_in_its_table_or_a_table_it_names() -> None:
    page = docs.options_page()
    sections = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE))
    by_anchor = {docs._anchor(title): text for title, text in sections.items()}
    for card in discovery.cards():
        if card.file is None:
            continue
        named = re.findall(r"\(#([\w-]+)\)", sections[card.key])
        text = "\n".join([sections[card.key], *(by_anchor[name] for name in named)])
        stand = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
        without = re.search(r"Takes also: .*, but not (.*)\.$", sections[card.key], re.MULTILINE)
        stand -= set(re.findall(r"`(\w+)`", without[1] if without else ""))
        specs = [spec for group in options.groups_of(discovery.load(card.key).config) for spec in group.specs]
        assert stand == {spec.name for spec in specs}, card.key
        # The first table in the named order holds, which must be the default that training uses.
        for spec in specs:
            found = re.search(rf"^\| `{spec.name}` \| .*? \| `(.*?)` \|", text, re.MULTILINE)
            assert found is not None
            if "\n" not in spec.default:  # a table shows such a text as Python writes it
                assert found[1] == (spec.default or "none"), f"{card.key}: {spec.name}"


RECORD: dict[str, Any] = {
    "key": "dpo",
    "system": 136,
    "title": "DPO",
    "budget": "full",
    "statement": "A beats B",
    "baselines": ["ppo-max"],
    "verdict": "not supported",
    "facts": [
        {
            "statement": "A | B",
            "figure": "gain",
            "relation": ">",
            "bound": 0.0,
            "interval": {"estimate": -0.5, "low": -1.0, "high": -0.25, "n": 2, "level": 0.95},
            "verdict": "not supported",
        }
    ],
    "figures": {
        "gain": {"estimate": -0.5, "low": -1.0, "high": -0.25, "n": 2, "level": 0.95},
        "wide": {"estimate": 2.0, "low": None, "high": None, "n": 1, "level": 0.95},
    },
    "seeds": [{"seed": 2_000_000_000, "figures": {"gain": -0.75, "wide": 2.0}}, {"seed": 2_000_000_001, "figures": {"gain": -0.25}}],
    "notes": "Small.",
    "commit": "abc",
    "hardware": {"cpu": "X", "cores": 2, "gpus": []},
}


def test_a_failed_claim_is_shown_as_it_fell_with_interval_seeds_commit_and_hardware() -> None:
    page = docs.claims_page([RECORD])
    assert "| [S136 DPO](#s136-dpo) | **not supported** | A beats B |" in page
    assert "| A \\| B | gain > 0 | -0.500 [-1.000, -0.250] | not supported |" in page
    assert "| gain | -0.500 [-1.000, -0.250] | -0.75, -0.25 |" in page
    assert "| wide | 2.000 [no interval] | 2, |" in page
    for line in ("- seeds: 2000000000, 2000000001", "- commit: abc", "- hardware: cpu X, cores 2", "- baselines: ppo-max"):
        assert line in page.splitlines()


def test_a_benchmark_is_shown_with_its_spread_and_its_share_of_the_limit() -> None:
    record = {
        "case": "dpo",
        "peer": {"name": "trl", "version": "1.0"},
        "ratio": {"median": 3.25, "min": 3.0, "max": 3.5},
        "limit_share": 0.5,
        "peak_memory": {"ours": 100, "peer": 200},
        "machine": "two cores",
        "commit": "0123456789abcdef",
    }
    page = docs.benchmarks_page([record])
    assert "| `dpo` | trl 1.0 | 3.25x (3 to 3.5) | 50% | 100 / 200 MiB | two cores | 0123456789ab |" in page


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "dpo.json").write_text('{"key": "dpo"', encoding="utf-8")
    with pytest.raises(DataError, match=r"dpo\.json: not a readable record"):
        docs._records(tmp_path)
    (tmp_path / "dpo.json").write_text(json.dumps([RECORD]), encoding="utf-8")
    with pytest.raises(DataError, match=r"dpo\.json: not a record"):
        docs._records(tmp_path)


# Written pages ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses_with_the_options_that_it_shows(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        names = [word for word in words[:2] if word.isupper()]  # `telos show KEY`
        if words[0] != "train":
            build_parser().parse_args(words)
            if words[0] in ("show", "where", "run") and not names:
                assert status.matches(words[1]), line
        elif not names:
            method = discovery.load(words[1])
            wanted = [word for word in words[2:] if word != "--help"]
            given = options.parse(wanted, options.groups_of(method.config), extra=("config",))
            given.pop("config", None)
            from_mapping(method.config, given)


def test_the_readme_shows_commands() -> None:
    shown = [line.split()[1] for line in commands(ROOT / "README.md")]
    assert {"train", "report", "compare", "resume"} <= set(shown)


@pytest.mark.parametrize("page", [*PAGES, ROOT / ".ci" / "run"], ids=lambda page: page.name)
def test_every_target_that_is_named_exists(page: Path) -> None:
    named = set(re.findall(r"(?:`|^ *)make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets()


def test_every_target_that_others_should_know_is_named_in_contributing() -> None:
    known = re.findall(r"^([a-z][a-z-]*):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert [name for name in known if name != "help" and f"make {name}" not in text and f"`{name}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


# Pins and hooks --------------------------------------------------------------------------------------------------------------------------


def plain(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[=<>!~; ]", requirement)[0]).lower()


def test_constraints_are_exact_versions_and_name_no_place() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", line)] == []
    assert len({plain(line) for line in lines}) == len(lines)


def test_every_dependency_of_the_package_and_its_tests_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = {plain(name) for name in (*project["dependencies"], *extras["test"], *extras["dev"])}
    pinned = {plain(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    assert needed <= pinned


def test_hooks_are_local_and_call_what_make_check_calls() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", ".venv/bin")
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        assert " ".join(hook["entry"].split()[:2]) in makefile, hook["id"]
