"""The map of systems is complete and unambiguous, wrong rows are refused, and reading it stays light."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from telos.catalogue.systems import System, check_systems, find, load_systems, parse_systems
from telos.core.errors import DataError, UsageError

# Written out here a second time so that a typo in the module's own list is seen. Counts are those of the plan's tables.
ROWS_PER_FAMILY = {
    "agents": 14,
    "applied": 17,
    "bandits": 4,
    "code-and-decoding": 9,
    "continual-and-diversity": 7,
    "direct-alignment": 18,
    "games-safety-robustness": 8,
    "generative": 8,
    "goals-and-imitation": 12,
    "models-and-meta": 7,
    "objectives": 8,
    "offline-rl": 16,
    "online-language-rl": 11,
    "online-rl": 11,
    "preferences": 8,
    "reasoning": 13,
    "rewards": 17,
    "robots-and-language": 9,
    "systems": 3,
}


@pytest.fixture(scope="module")
def systems() -> tuple[System, ...]:
    return load_systems()


def row(**changed: object) -> dict[str, object]:
    good: dict[str, object] = {
        "key": "dpo",
        "s": 136,
        "title": "DPO",
        "paper": "A paper",
        "family": "direct-alignment",
        "changes": "Adds.",
        "shows": "Shows.",
    }
    return good | changed


def test_every_number_from_1_to_200_occurs_exactly_once_and_in_order(systems):
    assert [system.s for system in systems] == list(range(1, 201))


def test_keys_are_unique_and_kebab_case(systems):
    keys = [system.key for system in systems]
    assert len(set(keys)) == 200
    assert [key for key in keys if not re.fullmatch(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*", key)] == []


def test_no_key_reads_as_a_system_number(systems):
    assert [system.key for system in systems if re.fullmatch(r"s?\d+", system.key)] == []


def test_families_have_the_planned_number_of_rows(systems):
    counts: dict[str, int] = {}
    for system in systems:
        counts[system.family] = counts.get(system.family, 0) + 1
    assert counts == ROWS_PER_FAMILY


def test_titles_papers_and_sentences_are_all_different(systems):
    for field in ("title", "paper", "changes", "shows"):
        assert len({getattr(system, field) for system in systems}) == 200, field


def test_sentences_fit_a_table_cell(systems):
    for system in systems:
        assert 20 <= len(system.changes) <= 120, system.key
        assert 20 <= len(system.shows) <= 160, system.key
        for text in (system.changes, system.shows):
            assert text.endswith("."), system.key
            assert "\n" not in text, system.key
        # One sentence: a full stop followed by a new word appears nowhere inside.
        assert not re.search(r"\.\s", system.changes), system.key


@pytest.mark.parametrize(
    ("s", "key", "family", "paper_start"),
    [
        (1, "alignment-ceiling", "rewards", "The Alignment Ceiling"),
        (28, "srl", "systems", "SRL: Scaling Distributed"),
        (82, "sequence-rl", "online-rl", "Overcoming Slow Decision Frequencies"),
        (136, "dpo", "direct-alignment", "Direct Preference Optimization"),
        (171, "spo-degree", "direct-alignment", "Self-supervised Preference Optimization"),
        (180, "spo-selfplay", "preferences", "A Minimaximalist Approach"),
        (200, "oreo", "reasoning", "Offline Reinforcement Learning for LLM"),
    ],
)
def test_number_key_family_and_paper_belong_together(s, key, family, paper_start):
    system = find(key)
    assert (system.s, system.family) == (s, family)
    assert system.paper.startswith(paper_start)


@pytest.mark.parametrize("name", ["dpo", "DPO", " dpo ", "S136", "s136", "136", 136, "S0136"])
def test_find_accepts_key_and_number_in_every_spelling(name):
    assert find(name).key == "dpo"


def test_find_takes_underscores_for_hyphens():
    assert find("ppo_max").key == "ppo-max"


def test_find_returns_each_system_by_its_key_and_by_its_number(systems):
    for system in systems:
        assert find(system.key) is system
        assert find(f"S{system.s}") is system


@pytest.mark.parametrize(("wrong", "near"), [("simpoo", "simpo"), ("hybrid-flow", "hybridflow"), ("Open-RL-Benchmrk", "open-rl-benchmark")])
def test_a_wrong_key_is_a_usage_error_that_suggests_the_nearest(wrong, near):
    with pytest.raises(UsageError, match=f"did you mean '{near}'") as caught:
        find(wrong)
    assert wrong in str(caught.value)


def test_a_key_near_nothing_is_refused_without_a_suggestion():
    with pytest.raises(UsageError) as caught:
        find("zzzzzz")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "S", "-1", "13.6", "s-136"])
def test_words_that_are_neither_key_nor_number_are_refused(name):
    with pytest.raises(UsageError, match="no system is called"):
        find(name)


@pytest.mark.parametrize("number", ["0", "S201", 999])
def test_a_number_out_of_range_is_a_usage_error_that_gives_the_range(number):
    with pytest.raises(UsageError, match="S1 to S200"):
        find(number)


def test_check_accepts_the_shipped_map_in_any_order(systems):
    check_systems(systems[::-1])


def test_check_names_every_missing_number(systems):
    with pytest.raises(DataError, match=r"missing system numbers: S7, S9$"):
        check_systems([system for system in systems if system.s not in (7, 9)])


def test_check_names_a_duplicated_number(systems):
    with pytest.raises(DataError, match=r"duplicated system numbers: S5$"):
        check_systems([*systems, replace(systems[4], key="another")])


def test_check_names_a_number_outside_the_range(systems):
    with pytest.raises(DataError, match=r"outside 1 to 200: S201$"):
        check_systems([*systems, replace(systems[0], key="another", s=201)])


def test_check_names_a_duplicated_key(systems):
    with pytest.raises(DataError, match=r"duplicated keys: dpo$"):
        check_systems([replace(systems[0], key="dpo"), *systems[1:]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "Not Kebab"}, "Not Kebab"),
        ({"key": "two--hyphens"}, "kebab-case"),
        ({"key": "s12"}, "kebab-case"),
        ({"family": "offline_rl"}, "did you mean 'offline-rl'"),
        ({"title": "  "}, "'title' is empty"),
        ({"changes": "x" * 121}, "121 characters"),
        ({"shows": "x" * 161}, "161 characters"),
    ],
)
def test_check_refuses_a_row_that_breaks_a_rule_and_names_it(systems, change, message):
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        check_systems([replace(systems[0], **change), *systems[1:]])
    assert "S1:" in str(caught.value)


def test_parse_reads_a_row_as_written():
    assert parse_systems({"system": [row()]}) == [
        System(key="dpo", s=136, title="DPO", paper="A paper", family="direct-alignment", changes="Adds.", shows="Shows.")
    ]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({name: value for name, value in row().items() if name != "shows"}, "row 2: field 'shows' is missing"),
        (row(papr="x"), "row 2: unknown field 'papr' (did you mean 'paper'?)"),
        (row(s="136"), "row 2: field 's' must be int, not str"),
        (row(s=True), "row 2: field 's' must be int, not bool"),
        (row(title=3), "row 2: field 'title' must be str, not int"),
    ],
)
def test_parse_refuses_a_malformed_row_and_names_row_and_field(bad, message):
    with pytest.raises(DataError, match=re.escape(message)):
        parse_systems({"system": [row(), bad]})


def test_parse_refuses_a_table_of_another_name():
    with pytest.raises(DataError, match="unknown table 'systems'"):
        parse_systems({"systems": [row()]})


def test_loading_the_map_imports_no_numeric_library():
    code = (
        "import sys\n"
        "from telos.catalogue.systems import find, load_systems\n"
        "assert len(load_systems()) == 200 and find('dpo').s == 136\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'tensordict'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
