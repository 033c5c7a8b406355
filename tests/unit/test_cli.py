"""The command line: what is listed and found, how options are read, and what each command says and writes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import create_autospec

import pytest
import yaml

from data_fixtures import write_jsonl
from telos.algorithms.language import preference_data
from telos.catalogue import status
from telos.cli import main as entry
from telos.cli import options, progress, text
from telos.cli.main import main
from telos.core import discovery
from telos.core.config import RunConfig, options_of
from telos.core.errors import TelosWarning, UsageError
from telos.environments.text.base import Item, load_testbed


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def telos(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command in this process."""

    def run(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return run


# list, where, show -----------------------------------------------------------------------------------------------------------------------


def test_list_imports_nothing_heavy_and_takes_under_three_tenths_of_a_second():
    code = (
        "import sys; from telos.cli.main import main; main(['list']); print({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules))"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "set()"
    # Processor time: what the clock on the wall says depends on who else is working.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


def test_list_shows_each_of_the_200_systems_once_and_counts_them(telos):
    said = telos("list")
    lines = said.out.splitlines()
    assert said.code == 0
    assert sorted(int(re.search(r" S(\d+) ", line)[1]) for line in lines[1:-1]) == list(range(1, 201))  # type: ignore[index]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (planned|ready|supported|not supported|inconclusive)", lines[-1])}
    assert lines[-1].startswith("200 systems: ")
    assert sum(counts.values()) == 200


def test_list_narrows_by_family_and_status_and_json_says_the_same(telos):
    rows = json.loads(telos("list", "--family", "direct_alignment", "--json").out)
    assert {row["family"] for row in rows} == {"direct-alignment"}
    assert {"key": "dpo", "system": 136, "title": "DPO", "method": "dpo"}.items() <= next(r for r in rows if r["key"] == "dpo").items()
    rows = json.loads(telos("list", "--status", "planned", "--json").out)
    assert {row["status"] for row in rows} == {"planned"}
    assert len(telos("list", "--status", "planned").out.splitlines()) - 2 == len(rows)


def test_baseline_methods_are_listed_on_request_only(telos):
    assert "best-of-n" not in telos("list").out
    assert re.search(r"^best-of-n +– .* baseline ", telos("list", "--methods").out, re.MULTILINE)


@pytest.mark.parametrize(("option", "word", "hint"), [("--family", "direct-alignmnt", "direct-alignment"), ("--status", "redy", "ready")])
def test_unknown_family_and_status_are_refused_with_a_suggestion(telos, option, word, hint):
    said = telos("list", option, word)
    assert said.code == 2
    assert f"{option} {word}" in said.err
    assert f"(did you mean '{hint}'?)" in said.err


@pytest.fixture
def claims_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(status, "records_folder", lambda: tmp_path)
    return tmp_path


@pytest.mark.parametrize("verdict", ["supported", "not supported", "inconclusive"])
def test_status_is_the_verdict_of_a_full_run(telos, claims_folder, verdict):
    (claims_folder / "malloc-game.json").write_text(json.dumps({"key": "malloc-game", "budget": "full", "verdict": verdict}))
    rows = json.loads(telos("list", "--status", verdict.replace(" ", "-"), "--json").out)
    assert [row["key"] for row in rows] == ["malloc-game"]


def test_a_smoke_run_decides_no_status(telos, claims_folder):
    (claims_folder / "malloc-game.json").write_text(json.dumps({"key": "malloc-game", "budget": "smoke", "verdict": "supported"}))
    assert telos("list", "--status", "supported").out.splitlines() == ["0 systems"]


def test_a_recipe_makes_a_system_ready(claims_folder, monkeypatch, tmp_path):
    assert status.find("malloc-game").status == "planned"
    recipe = tmp_path / "malloc-game.py"
    recipe.touch()
    monkeypatch.setattr(status, "recipe_file", lambda family, key: recipe if key == "malloc-game" else tmp_path / "none.py")
    assert (status.find("malloc-game").status, status.find("dpo").status) == ("ready", "planned")


def test_recipes_are_looked_for_under_their_family():
    assert status.recipe_file("online-language-rl", "ppo-max").parts[-3:] == ("catalogue", "online_language_rl", "ppo_max.py")


def test_a_record_that_cannot_be_read_is_named_and_counts_for_nothing(telos, claims_folder):
    (claims_folder / "dpo.json").write_text('{"budget": "full", "verd')
    said = telos("list", "--status", "supported")
    assert said.out.splitlines() == ["0 systems"]
    assert said.err.startswith("telos: note: the claim record ")
    assert "dpo.json" in said.err


@pytest.mark.parametrize("name", ["dpo", "DPO", "S136", "s136", "136", "direct_preference_optimization", "Direct Preference Optimization"])
def test_where_finds_files_by_key_alias_title_and_number(telos, name):
    said = telos("where", name)
    assert said.code == 0
    assert said.out.startswith("dpo (S136): DPO, ")
    assert "algorithms/language/dpo.py" in said.out
    assert "algorithms/language/_loop_pairs.py" in said.out


def test_where_lists_every_match_of_a_name(telos, monkeypatch):
    card = discovery.find("sft")
    monkeypatch.setattr(discovery, "cards", lambda: (dataclasses.replace(card, aliases=("malloc-game",)),))
    assert [line.split(" ")[0].rstrip(":") for line in telos("where", "malloc-game").out.splitlines() if not line.startswith(" ")] == [
        "malloc-game",
        "sft",
    ]
    assert status.find("malloc-game").number == "S11"  # a key goes before an alias


@pytest.mark.parametrize("command", ["where", "show"])
def test_unknown_names_are_refused_with_a_suggestion(telos, command):
    said = telos(command, "simpoo")
    assert said.code == 2
    assert "did you mean 'simpo'?" in said.err


def test_show_says_what_a_planned_system_will_have_to_decide(telos):
    said = telos("show", "S64")
    assert said.code == 0
    assert (
        "Reinforcement Learning in the Era of LLMs: What is Essential? What is needed? An RL Perspective on RLHF, Prompting, and Beyond"
        in said.out
    )
    assert "compounding error grows with length" in " ".join(said.out.split())
    assert "Planned" in said.out


def test_show_tells_claim_verdict_needs_and_options(telos, claims_folder):
    record = {"key": "dpo", "budget": "full", "verdict": "inconclusive", "date": "2026-01-02", "commit": "abc"}
    (claims_folder / "dpo.json").write_text(json.dumps(record))
    said = telos("show", "dpo").out
    assert re.search(r"verdict +inconclusive \(full, 2026-01-02, abc\)", said)
    assert re.search(r"needs +reference\n", said)
    assert re.search(r"--beta +float +0.1 +strength of the KL regularisation", said)


# Options of a method ---------------------------------------------------------------------------------------------------------------------


def test_help_lists_every_option_with_type_default_and_comment(telos):
    said = telos("train", "ppo-max", "--help")
    assert said.code == 0
    for option in options_of(discovery.load("ppo-max").config):
        line = next(line for line in said.out.splitlines() if line.startswith(f"  --{option.name} "))
        assert option.help
        assert line.endswith(option.help)
    assert re.search(r"--preset +max\|vanilla +max ", said.out)
    assert re.search(r"--reference +text or none +none ", said.out)
    titles = [line for line in said.out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[0] == "Options of PPO and PPO-max:"
    assert titles[-1] == "Options that mean the same in every run:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example(RunConfig):
    """Options of an example."""

    rate: float = 0.5  # a rate
    use_it: bool = True  # whether
    names: tuple[str, ...] = ()  # some names
    limit: int | None = 3  # at most


GROUPS = options.groups_of(Example)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("--rate 2", {"rate": "2"}),
        ("--rate=-2e-3", {"rate": "-2e-3"}),
        ("--rate -2", {"rate": "-2"}),
        ("--use_it", {"use_it": True}),
        ("--use-it", {"use_it": True}),
        ("--no-use-it", {"use_it": False}),
        ("--no_use_it", {"use_it": False}),
        ("--use_it false --rate 1", {"use_it": False, "rate": "1"}),
        ("--use_it --rate 1", {"use_it": True, "rate": "1"}),
        ("--use_it=off", {"use_it": False}),
        ("--names a,b", {"names": ["a", "b"]}),
        ("--names=", {"names": []}),
        ("--limit none", {"limit": None}),
        ("--out none", {"out": None}),
        ("--config a.yaml --seed 3", {"config": "a.yaml", "seed": "3"}),
    ],
)
def test_options_are_read_in_every_way_of_writing_them(words, found):
    assert options.parse(words.split(), GROUPS, extra=("config",)) == found


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--rat 2", r"unknown option --rat \(did you mean --rate\?\)"),
        ("--no-rate", r"unknown option --no-rate"),
        ("--zzzzzz", r"unknown option --zzzzzz; `--help` lists"),
        ("--rate", r"--rate needs a value \(float\)"),
        ("--rate --use_it", r"--rate needs a value"),
        ("--use_it=perhaps", r"--use_it is true or false, not 'perhaps'"),
        ("--no-use_it=true", r"--no-use_it takes no value"),
        ("--rate 1 --rate 2", r"--rate is given twice"),
        ("--use_it --no-use-it", r"--use_it is given twice"),
        ("--rate 1 2", r"unexpected word '2'.*--rate 'a b'"),
        ("-r 1", r"unexpected word '-r'.*two hyphens"),
    ],
)
def test_words_that_are_no_options_are_refused(words, problem):
    with pytest.raises(UsageError, match=problem):
        options.parse(words.split(), GROUPS)


def test_options_are_grouped_by_the_class_that_introduces_them():
    assert [group.title for group in GROUPS] == ["Options of an example", "Options that mean the same in every run"]
    assert [spec.name for spec in GROUPS[0].specs] == ["rate", "use_it", "names", "limit"]
    assert {spec.name for spec in GROUPS[1].specs} == {field.name for field in dataclasses.fields(RunConfig)}
    assert [spec.type for spec in GROUPS[0].specs] == ["float", "true|false", "text,…", "int or none"]


# How commands end ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["lst"], "there is no 'lst' (did you mean 'list'?)"),
        (["list", "--familly", "x"], "unknown option --familly (did you mean '--family'?)"),
        (["list", "too", "many"], "unexpected word 'too'"),
        (["data", "mak"], "there is no 'mak' (did you mean 'make'?)"),
        (["data", "make", "review", "--kind", "pair", "--n", "1", "--out", "x.jsonl"], "there is no 'pair' (did you mean 'pairs'?)"),
        (["data", "make", "review", "--kind", "sft", "--n", "x", "--out", "x.jsonl"], "argument --n: invalid int value: 'x'"),
        (["where"], "required: NAME"),
        (["train", "dpoo"], "did you mean 'dpo'?"),
        (["train", "malloc-game"], "malloc-game (S11) is planned"),
        (["train", "--steps", "3"], "name the method first"),
        (["train", "dpo", "--bta", "1"], "unknown option --bta (did you mean --beta?)"),
        (["train", "dpo", "--data", "x.jsonl", "--lr_schedule", "linea"], "option 'lr_schedule'"),
        (["run", "malloc-game"], "malloc-game (S11) is planned: it has no recipe yet"),
        (["run", "sft"], "sft is a baseline method"),
        (["claims", "run", "nothing-like-it"], "no system or method is called"),
        (["resume", "/nowhere"], "is not a run's folder"),
        (["report", "/nowhere"], "is not a run's folder"),
        (["compare", "one"], "at least two runs"),
    ],
)
def test_wrong_requests_end_with_code_2_and_one_line(telos, words, problem):
    said = telos(*words)
    assert said.code == 2
    assert problem in said.err
    assert said.err.startswith("telos: error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_hyphens_and_underscores_are_the_same_in_fixed_options(telos, tmp_path):
    said = telos("data", "make", "review", "--kind", "sft", "--n", 1, "--label-temperature=0.2", "--out", tmp_path / "a.jsonl")
    assert "--label_temperature has no effect on --kind sft" in said.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 1, "telos: error: interrupted\n"),
        (UsageError("two\nlines"), 2, "telos: error: two lines\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1, "telos: error: a.txt: No such file or directory\n"),
        (ZeroDivisionError("division by zero"), 1, "telos: error: ZeroDivisionError: division by zero; this is a defect"),
    ],
)
def test_errors_are_one_line_and_debug_lets_them_through(telos, monkeypatch, error, code, line):
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(entry, "_dispatch", fail)
    said = telos("list")
    assert (said.code, said.out) == (code, "")
    assert said.err.startswith(line)
    with pytest.raises(type(error)):
        main(["list", "--debug"])


def test_warnings_for_the_user_are_notes_and_each_is_shown(telos, monkeypatch):
    def warn(words: list[str]) -> int:
        import warnings

        for _ in range(2):
            warnings.warn("a thing to know", TelosWarning, stacklevel=1)
        return 0

    monkeypatch.setattr(entry, "_dispatch", warn)
    assert telos("list") == (0, "", "telos: note: a thing to know\n" * 2)


def test_version_and_help_are_no_errors(telos):
    assert re.fullmatch(r"telos \d+\.\d+\.\d+\n", telos("--version").out)
    said = telos("--help")
    assert said.code == 0
    assert "examples:" in said.out
    assert telos("train", "--help").code == 0


# train, resume, report, compare ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps: five in the file, three on the command line."""
    folder = tmp_path_factory.mktemp("cli")
    config = {
        "model": world.model,
        "data": world.data["preference"],
        "steps": 5,
        "batch_size": 4,
        "device": "cpu",
        "threads": 1,
        "beta": 0.3,
    }
    (folder / "dpo.yaml").write_text(yaml.safe_dump(config))
    out = folder / "run"
    assert (
        main(
            [
                "train",
                "dpo",
                "--config",
                str(folder / "dpo.yaml"),
                "--steps=3",
                "--eval-data",
                world.data["preference"],
                "--out",
                str(out),
                "--quiet",
            ]
        )
        == 0
    )
    return out


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(trained):
    written = yaml.safe_load((trained / "config.yaml").read_text())
    assert (written["steps"], written["beta"], written["max_grad_norm"]) == (3, 0.3, 1.0)
    assert [json.loads(line)["step"] for line in (trained / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_training_ends_with_a_report_and_says_where_everything_is(world, telos, tmp_path):
    out = tmp_path / "run"
    said = telos(
        "train", "sft", "--model", world.model, "--data", world.data["prompt-completion"], "--steps", 2, "--batch_size", 4, "--out", out
    )
    assert said.code == 0
    for path in (out, out / "model", out / "report.html", out / "report.md"):
        assert path.exists()
        assert f" {path}\n" in said.out
    assert f"telos train sft --config {out}/config.yaml" in said.out
    assert re.search(r"rows a step +4\n", said.err)  # the plan
    assert re.search(r"sft  2/2 \(100 %\)  .* left  \|  loss \d", said.err)


def test_a_run_is_not_overwritten(trained, telos, world):
    said = telos("train", "dpo", "--model", world.model, "--data", world.data["preference"], "--out", trained)
    assert said.code == 2
    assert "already holds a run" in said.err


def test_resuming_a_finished_run_says_so(trained, telos):
    before = (trained / "metrics.jsonl").read_bytes()
    said = telos("resume", trained)
    assert said.code == 0
    assert "is finished" in said.out
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_resume_names_the_runs_of_a_folder_that_holds_several(trained, telos):
    said = telos("resume", trained.parent)
    assert said.code == 2
    assert "holds several runs (run); repeat the command that made it" in said.err


def test_the_report_holds_curves_figures_settings_and_the_command(trained, telos):
    assert telos("report", trained).code == 0
    page = (trained / "report.md").read_text()
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"| eval/loss | {last['eval/loss']:.4g} |" in page
    assert "| --eval\\_data | " in page
    assert "| beta | 0.3 |" in page
    assert "--out NEW_FOLDER" in page
    assert (trained / "report" / "loss.png").is_file()
    assert "loss (held out)" in page
    assert "data:image/png;base64," in (trained / "report.html").read_text()


def fake_run(folder: Path, rows: list[dict[str, Any]], **facts: Any) -> Path:
    folder.mkdir()
    described = {"method": "dpo", "status": "finished", "reproduce": "telos train dpo", "options": {}} | facts
    (folder / "config.yaml").write_text(yaml.safe_dump({"steps": len(rows), "out": folder.name, **described.pop("options")}))
    (folder / "run.json").write_text(json.dumps(described))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_report_of_an_unfinished_run_says_so_and_counts_what_it_cannot_draw(tmp_path, telos):
    rows = [{"step": i, "loss": float(i), "kl": math.nan if i == 2 else 0.1} for i in (1, 2, 3)]
    run = fake_run(tmp_path / "run", rows, status="interrupted")
    (run / "warnings.log").write_text("two of the rows were cut\n" * 2)
    (run / "metrics.jsonl").open("a").write('{"step": 4, "lo')
    kept = {"prompt": "Say it", "completion": "b", "completions": ["a", "b"], "scores": [None, 2.5]}
    (run / "samples.jsonl").write_text(json.dumps(kept) + "\n")
    assert telos("report", run).code == 0
    page = (run / "report.md").read_text()
    assert "telos resume" in page
    assert "two of the rows were cut (2 times)" in page
    assert "1 values of kl are not finite and not drawn" in page
    assert "| loss | 3 | 2 | 1 | 1 | 3 | 3 |" in page  # last, mean of last 3, first, lowest, highest, logged
    assert page.index("**kept** (score 2.5)") < page.index("**answer 1** (score no valid score)")


def test_a_run_without_a_step_has_a_report(tmp_path, telos):
    run = fake_run(tmp_path / "run", [], status="running")
    assert telos("report", run).code == 0
    assert "No step was logged yet" in (run / "report.md").read_text()


def test_long_curves_are_averaged_with_their_range():
    import numpy as np

    from telos.evaluation.run_report import curve_of

    values = np.tile([0.0, 2.0], 500)
    curve, left_out = curve_of("x", np.arange(1000.0), values)
    assert curve is not None
    assert left_out == 0
    assert len(np.asarray(curve.x)) == 100
    np.testing.assert_array_equal(np.asarray(curve.y), 1.0)
    np.testing.assert_array_equal(np.asarray(curve.low), 0.0)
    np.testing.assert_array_equal(np.asarray(curve.high), 2.0)


def test_every_metric_but_time_is_in_one_group():
    from telos.evaluation.run_report import grouped

    names = ["loss", "eval/loss", "reward", "rewards/chosen", "eval/rewards/chosen", "kl", "own/thing", "own/other", "time/seconds"]
    found = grouped(names)
    assert sorted(name for _, _, group in found for name in group) == sorted(set(names) - {"time/seconds"})
    assert ["loss", "eval/loss"] in [group for _, _, group in found]
    assert found[-1] == ("Other: own", "own", ["own/thing", "own/other"])


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    first = fake_run(
        tmp_path / "first", [{"step": i, "loss": v} for i, v in enumerate((4.0, 3.0, 2.0, 1.0), 1)], options={"beta": 0.1, "seed": 0}
    )
    second = fake_run(
        tmp_path / "second", [{"step": i, "loss": v, "kl": 0.5} for i, v in enumerate((8.0, 6.0), 1)], options={"beta": 0.5, "seed": 0}
    )
    return first, second


def test_compare_puts_last_values_means_and_differing_options_side_by_side(two_runs, telos):
    said = telos("compare", *two_runs)
    assert said.code == 0
    assert re.search(r"METRIC +first +second\n", said.out)
    assert re.search(r"loss +1 \(2\) +6 \(7\)\n", said.out)  # (3 + 2 + 1) / 3 and, of the two that there are, (8 + 6) / 2
    assert re.search(r"kl +– +0.5 \(0.5\)\n", said.out)
    differing = said.out.partition("Options that differ")[2]
    assert re.search(r"beta +0.1 +0.5\n", differing)
    assert re.search(r"steps +4 +2\n", differing)
    assert "seed" not in differing
    assert "out" not in differing.replace("without", "")


def test_compare_writes_a_report_beside_the_runs_and_never_into_one(two_runs, telos, tmp_path):
    said = telos("compare", *two_runs, "--metric", "loss", "--out", tmp_path / "both")
    assert said.code == 0
    page = (tmp_path / "both" / "report.md").read_text()
    assert "loss by step of first, second" in page
    assert "kl by step" not in page
    refused = telos("compare", *two_runs, "--out", two_runs[0])
    assert refused.code == 2
    assert "has its own report" in refused.err


def test_compare_refuses_metrics_that_were_not_logged_and_a_run_named_twice(two_runs, telos):
    assert "did you mean 'loss'?" in telos("compare", *two_runs, "--metric", "los").err
    assert "is named twice" in telos("compare", two_runs[0], two_runs[0]).err


def test_report_of_a_quickstart_points_to_its_own(tmp_path, telos):
    (tmp_path / "quickstart.json").write_text("{}")
    assert "telos resume" in telos("report", tmp_path).err
    (tmp_path / "report.html").touch()
    assert f" {tmp_path / 'report.html'}\n" in telos("report", tmp_path).out


# Progress --------------------------------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_a_terminal_a_line_comes_every_ten_seconds_with_rate_and_time_left(capsys):
    clock = Clock()
    bar = progress.Bar("dpo", 100, clock=clock)
    for done in range(1, 31):
        clock.now += 4.0
        bar.update(done, {"loss": 1.0 / done})
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"(\d+)/100", line)[1] for line in lines] == [str(n) for n in range(3, 31, 3)]  # type: ignore[index]
    assert lines[-1] == "dpo  30/100 (30 %)  4 s/step  2:00 elapsed  4:40 left  |  loss 0.03333"


def test_a_resumed_run_counts_its_own_steps_for_the_rate(capsys):
    clock = Clock()
    bar = progress.Bar("dpo", 100, first=80, clock=clock)
    for done in range(81, 101):
        clock.now += 0.5
        bar.update(done)
    assert capsys.readouterr().err.splitlines()[-1] == "dpo  100/100 (100 %)  2 steps/s  0:10 elapsed  0:00 left"


def test_numbers_measured_now_and_then_stay_and_quiet_says_nothing(capsys):
    clock = Clock()
    bar = progress.Bar("dpo", 2, clock=clock)
    bar.update(1, {"loss": 1.0, "eval/loss": 3.0})
    clock.now += 1.0
    bar.update(2, {"loss": 2.0})
    assert capsys.readouterr().err.endswith("|  loss 2  eval/loss 3\n")
    quiet = progress.Bar("dpo", 1, quiet=True)
    quiet.update(1)
    quiet.close()
    assert capsys.readouterr().err == ""


def test_the_numbers_that_matter_are_chosen_from_what_is_logged():
    assert list(progress.watched({"grad_norm": 1.0, "logps/chosen": -3.0, "kl": 0.2, "reward": 1.0})) == ["reward", "kl", "grad_norm"]
    assert list(progress.watched({"time/seconds": 1.0, "own": 2.0})) == ["own"]


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03")])
def test_durations_are_shown_as_clocks_show_them(seconds, shown):
    assert text.seconds_text(seconds) == shown


def test_columns_are_aligned_and_the_last_is_cut_or_wrapped_to_the_width():
    rows = [["a", "bb", "one two three four five six seven"], ["ccc", "d", "x"]]
    assert text.columns(rows).splitlines() == ["a    bb  one two three four five six seven", "ccc  d   x"]
    assert text.columns(rows, width=30, last="cut").splitlines()[0] == "a    bb  one two three four f…"
    assert text.columns(rows, width=30).splitlines()[:2] == ["a    bb  one two three four", "         five six seven"]


# Data ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("testbed", ["review", "arith"])
@pytest.mark.parametrize(("kind", "read_as"), [("prompts", "prompt-only"), ("sft", "prompt-completion")])
def test_made_rows_are_the_testbeds_items_and_inspect_recognises_them(world, telos, tmp_path, testbed, kind, read_as):
    out = tmp_path / "rows.jsonl"
    said = telos("data", "make", testbed, "--kind", kind, "--n", 12, "--seed", 5, "--split", "validation", "--out", out)
    assert said.code == 0
    assert said.out.startswith("12 rows")
    items = load_testbed(testbed).items("validation", 12, 5)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [item.prompt for item in items]
    assert [json.loads(row["facts"]) for row in rows] == [json.loads(json.dumps(item.facts)) for item in items]
    assert [row.get("completion") for row in rows] == [item.reference if kind == "sft" else None for item in items]
    looked = telos("data", "inspect", out, "--tokenizer", world.model).out
    assert re.search(rf"format +{read_as}, text\n", looked)
    assert re.search(r"rows +12 read, 12 usable\n", looked)
    longest = max(len(item.prompt) for item in items)
    assert re.search(rf"prompt +characters .* {longest}\n", looked)


def test_a_corpus_is_documents_of_the_training_split(telos, tmp_path):
    assert telos("data", "make", "arith", "--kind", "corpus", "--n", 3, "--out", tmp_path / "c.jsonl").code == 0
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert rows == [{"text": document} for document in load_testbed("arith").corpus(3, 0)]
    assert telos("data", "make", "arith", "--kind", "corpus", "--n", 3, "--split", "test", "--out", tmp_path / "d.jsonl").code == 2


def test_an_existing_file_is_replaced_only_by_force_and_nothing_else_is_left(telos, tmp_path):
    out = tmp_path / "rows.jsonl"
    out.write_text("mine\n")
    words = ("data", "make", "arith", "--kind", "sft", "--n", 2, "--out", out)
    assert telos(*words).code == 2
    assert out.read_text() == "mine\n"
    assert telos(*words, "--force").code == 0
    assert len(out.read_text().splitlines()) == 2
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("words", "problem"), [(["--n", "0"], "--n 0"), (["--n", "2", "--out", "rows.txt"], "ends in .jsonl")])
def test_sizes_and_names_that_cannot_be_are_refused(telos, tmp_path, words, problem):
    said = telos("data", "make", "arith", "--kind", "sft", "--out", tmp_path / "a.jsonl", *words)
    assert said.code == 2
    assert problem in said.err


def test_a_broken_file_is_named_with_its_line(world, telos, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"prompt": \n')
    said = telos("data", "inspect", bad, "--tokenizer", world.model)
    assert said.code == 2
    assert "bad.jsonl:2: broken JSON" in said.err


def test_inspect_counts_bad_rows_repetitions_and_pairs_that_teach_nothing(world, telos, tmp_path):
    rows = [
        {"prompt": "a", "chosen": " long answer", "rejected": " no", "id": 1},
        {"prompt": "a", "chosen": " same", "rejected": " same", "id": 2},
        {"prompt": "b", "chosen": " x", "rejected": "  ", "id": 3},
        {"prompt": "a", "chosen": " long answer", "rejected": " no", "id": 4},
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    said = telos("data", "inspect", path, "--tokenizer", world.model).out
    assert re.search(r"rows +4 read, 3 usable\n", said)
    assert re.search(r"bad rows: empty-answer +1 \(first: pairs.jsonl:3\)\n", said)
    assert re.search(r"identical rows +1\n", said)
    assert re.search(r"rows with a repeated prompt +2\n", said)
    assert re.search(r"pairs with identical answers +1\n", said)
    assert re.search(r"chosen is longer +in 83.3 % of pairs", said)  # two of three, and the equal pair counts half
    assert re.search(r"kept for reward functions +id\n", said)
    assert re.search(r"chosen +characters +9.667 +12 +12 +5 +12\n", said)  # 12, 5, 12
    assert 'prompt: "a"' in said


# Preference pairs ------------------------------------------------------------------------------------------------------------------------


class Counting:
    """A testbed whose answers are numbers and whose gold score is a tenth of them."""

    name = "counting"
    max_new_tokens = 4

    def __init__(self, size: int = 10_000) -> None:
        self.size = size

    def items(self, split: str, n: int | None = None, seed: int = 0) -> list[Item]:
        return [Item(f"{split} {seed} {i}:", " 1", {"i": i}) for i in range(min(n or 0, self.size))]

    def gold(self, item: Item, completion: str) -> float:
        return float(completion) / 10


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], list[str]]], None]:
    """Sets what the model answers to the prompt with a number."""

    def set_answers(answer: Callable[[int], list[str]]) -> None:
        def sample(model: Any, prompts: list[str], sampling: Any, *, n: int, seed: int) -> list[list[str]]:
            return [answer(int(prompt.rstrip(":").split()[-1])) for prompt in prompts]

        monkeypatch.setattr(preference_data, "sample_texts", sample)

    return set_answers


def pairs(n: int, **arguments: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    return preference_data.make_pairs(None, arguments.pop("testbed", Counting()), n, **arguments)  # type: ignore[arg-type]


def test_without_noise_the_better_answer_is_chosen_and_gold_stays_hidden(answers):
    answers(lambda i: ["3", "5"] if i % 2 else ["7", "2"])
    rows, counts = pairs(4, label_temperature=0.0)
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("7", "2"), ("5", "3")] * 2
    assert [set(row) for row in rows] == [{"prompt", "chosen", "rejected", "facts", "reference", "testbed"}] * 4
    assert counts == {
        "prompts": 4,
        "pairs": 4,
        "empty answers": 0,
        "equal answers": 0,
        "equal scores": 0,
        "labels against the gold score": 0,
    }
    shown, _ = pairs(1, label_temperature=0.0, with_gold=True)
    assert (shown[0]["chosen_score"], shown[0]["rejected_score"]) == (0.7, 0.2)


def test_labels_follow_bradley_terry_at_the_temperature(answers):
    answers(lambda i: ["5", "4"])  # 0.1 apart
    rows, counts = pairs(1500, label_temperature=0.1, seed=3)
    expected = 1 / (1 + math.exp(-1.0))
    share = sum(row["chosen"] == "5" for row in rows) / 1500
    assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 1500)
    assert counts["labels against the gold score"] == sum(row["chosen"] == "4" for row in rows)


def test_noise_turns_its_share_of_labels(answers):
    answers(lambda i: ["9", "0"])
    _, counts = pairs(1500, label_temperature=0.0, noise=0.2)
    assert abs(counts["labels against the gold score"] / 1500 - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 1500)


def test_pairs_that_cannot_be_told_apart_are_counted_and_further_prompts_tried(answers):
    kinds = [["1", "2"], ["", "2"], ["1", " 1"], ["1", "1.0"]]
    answers(lambda i: kinds[i % 4])
    rows, counts = pairs(5, label_temperature=0.0)
    assert len(rows) == 5
    # The fifth good pair answers prompt 16, after four whole rounds of the four kinds.
    assert counts == {
        "prompts": 17,
        "pairs": 5,
        "empty answers": 4,
        "equal answers": 4,
        "equal scores": 4,
        "labels against the gold score": 0,
    }
    assert [json.loads(row["facts"])["i"] for row in rows] == [0, 4, 8, 12, 16]


def test_a_testbed_that_runs_out_gives_fewer_pairs_and_a_hopeless_model_none(answers):
    answers(lambda i: ["1", "2"])
    assert len(pairs(50, testbed=Counting(size=7))[0]) == 7
    answers(lambda i: ["1", "1"])
    with pytest.raises(preference_data.Failure, match=r"prompts 40, equal answers 40"):
        pairs(2)


def test_pairs_depend_on_the_seed_alone(answers):
    answers(lambda i: ["5", "4"])
    assert pairs(60, seed=1) == pairs(60, seed=1)
    assert [row["chosen"] for row in pairs(60, seed=1)[0]] != [row["chosen"] for row in pairs(60, seed=2)[0]]


@pytest.mark.parametrize("wrong", [{"noise": 0.5}, {"noise": math.nan}, {"label_temperature": -1.0}, {"temperature": 0.0}, {"n": 0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        pairs(**({"n": 3} | wrong))


def test_made_pairs_are_read_as_preferences_and_repeat_exactly(world, telos, tmp_path):
    for name in ("a", "b"):
        words = (
            "--kind",
            "pairs",
            "--n",
            3,
            "--model",
            world.model,
            "--seed",
            2,
            "--threads",
            1,
            "--quiet",
            "--out",
            tmp_path / f"{name}.jsonl",
        )
        assert telos("data", "make", "review", *words).code == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    looked = telos("data", "inspect", tmp_path / "a.jsonl", "--tokenizer", world.model).out
    assert re.search(r"format +preference, text\n", looked)
    assert re.search(r"rows +3 read, 3 usable\n", looked)
    assert "score" not in looked


# Doors to the catalogue's programs -------------------------------------------------------------------------------------------------------


def test_run_hands_recipe_budget_seed_and_folder_on_and_prints_the_figures(telos, monkeypatch, tmp_path):
    from telos.catalogue import recipes

    program = create_autospec(recipes.run, return_value=(tmp_path, {"gold win rate": 0.625, "KL": 3.0}))
    monkeypatch.setattr(recipes, "run", program)
    said = telos("run", "S136", "--budget", "smoke", "--seed", 4, "--out", tmp_path, "--quiet")
    assert said.code == 0
    assert program.call_args.args == ("dpo", "smoke")
    assert {"seed": 4, "out": str(tmp_path)}.items() <= program.call_args.kwargs.items()
    assert re.search(r"gold win rate +0.625\nKL +3\n", said.out)


def test_claims_run_prints_facts_verdict_and_record_and_writes_beside_the_others(telos, monkeypatch, tmp_path):
    from telos.catalogue import claims

    facts = [
        {"statement": "better", "interval": {"estimate": 0.75, "low": 0.5, "high": 1.0}, "verdict": "inconclusive"},
        {"statement": "exact", "interval": {"estimate": 0.01, "low": None, "high": None}, "verdict": "inconclusive"},
    ]
    record = {"facts": facts, "verdict": "inconclusive", "budget": "full", "seeds": [{}, {}, {}], "path": str(tmp_path / "dpo.json")}
    program = create_autospec(claims.run_claim, return_value=record)
    monkeypatch.setattr(claims, "run_claim", program)
    said = telos("claims", "run", "dpo", "--quiet")
    assert said.code == 0
    assert program.call_args.args == ("dpo", "full")
    assert program.call_args.kwargs["records"] == status.records_folder()
    assert re.search(r"better +0.75 +\[0.5, 1\] +inconclusive\n", said.out)
    assert re.search(r"exact +0.01 +– +inconclusive\n", said.out)
    assert "DPO: inconclusive (budget full, 3 seeds)" in said.out
    assert str(tmp_path / "dpo.json") in said.out


def test_claims_table_shows_verdicts_and_recipes_that_wait(telos, claims_folder):
    (claims_folder / "dpo.json").write_text(
        json.dumps({"budget": "full", "verdict": "supported", "date": "2026-01-02", "statement": "It works"})
    )
    said = telos("claims", "table").out
    assert re.search(r"dpo +S136 +supported +2026-01-02 +– +It works\n", said)
    assert re.search(r"simpo +S191 +not run yet ", said)


def test_quickstart_and_its_resumption_say_what_was_found_and_where(telos, monkeypatch, tmp_path):
    from telos.catalogue import quickstart

    outcome = quickstart.Outcome(tmp_path / "report.html", tmp_path / "report.md", ("DPO: better.",))
    start, again = (create_autospec(function, return_value=outcome) for function in (quickstart.run, quickstart.resume))
    monkeypatch.setattr(quickstart, "run", start)
    monkeypatch.setattr(quickstart, "resume", again)
    (tmp_path / "quickstart.json").write_text("{}")
    for words in (("quickstart", "--out", tmp_path, "--seed", 3, "--fresh"), ("resume", tmp_path)):
        said = telos(*words, "--quiet")
        assert said.code == 0
        assert said.out.startswith("DPO: better.\n")
        assert f" {tmp_path / 'report.html'}\n" in said.out
    assert start.call_args.args == again.call_args.args == (tmp_path,)
    assert {"seed": 3, "fresh": True}.items() <= start.call_args.kwargs.items()


@pytest.mark.parametrize("code", [0, 1])
def test_docs_end_with_the_code_of_the_check(telos, monkeypatch, code):
    from telos.catalogue import docs

    check = create_autospec(docs.main, return_value=code)
    monkeypatch.setattr(docs, "main", check)
    assert telos("docs", "--check").code == code
    assert check.call_args.args == (True,)


def test_a_watch_gives_bars_and_progress_with_the_stages_name(capsys):
    watch = progress.Watch()
    bar = watch.bar("held-out prompts", 2)
    bar.update(2)
    bar.close()
    assert capsys.readouterr().err.startswith("held-out prompts  2/2 (100 %)")
    assert [callback.title for callback in watch.callbacks("sft")] == ["sft"]
