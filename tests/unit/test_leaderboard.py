"""The leaderboard: means, spreads, ranks and standings against values by hand, its records, and its command."""

from __future__ import annotations

import json
import math
from argparse import Namespace

import numpy as np
import pytest

from telos.cli.leaderboard import leaderboard
from telos.core.errors import DataError, UsageError
from telos.evaluation.leaderboard import Leaderboard, Score, direction, ranks, read_record, record_files, write_record
from telos.evaluation.statistics import bootstrap_interval

GOLD = {
    ("qa", "sft"): (0.30, 0.32, 0.34),
    ("qa", "ppo"): (0.20, 0.50, 0.80),
    ("qa", "nlpo"): (0.60, 0.62, 0.64),
    ("dialogue", "sft"): (0.50, 0.50, 0.50),
    ("dialogue", "ppo"): (0.70, 0.71, 0.72),
    ("dialogue", "nlpo"): (0.60, 0.61, 0.62),
}


def scores() -> list[Score]:
    return [
        Score(task, method, seed, {"gold": value, "fluency/perplexity": 10 * value})
        for (task, method), row in GOLD.items()
        for seed, value in enumerate(row)
    ]


def test_cells_hold_mean_interval_spread_and_rank():
    cells = Leaderboard(scores()).cells("gold", "qa")
    assert [cells[m].score.estimate for m in ("sft", "ppo", "nlpo")] == pytest.approx([0.32, 0.5, 0.62])
    assert [cells[m].rank for m in ("sft", "ppo", "nlpo")] == [3, 2, 1]
    # Sample deviations: seeds lie 0.02 and 0.3 apart around the middle one.
    assert [cells[m].spread for m in ("sft", "ppo", "nlpo")] == pytest.approx([0.02, 0.3, 0.02])
    assert 0.2 - 1e-9 < cells["ppo"].score.low < 0.5 < cells["ppo"].score.high < 0.8 + 1e-9
    assert cells["ppo"].score.n == 3


def test_smaller_is_better_for_perplexity_and_length_has_no_rank():
    board = Leaderboard(scores())
    assert [board.cells("fluency/perplexity", "qa")[m].rank for m in ("sft", "ppo", "nlpo")] == [1, 2, 3]
    assert (direction("lexical/ter"), direction("lexical/meteor"), direction("diversity/length")) == (-1, 1, 0)
    assert ranks({"a": 1.0, "b": 2.0}, "diversity/length") == {"a": None, "b": None}


def test_ties_share_the_better_rank():
    assert ranks({"a": 0.5, "b": 0.7, "c": 0.7, "d": 0.1}, "gold") == {"a": 3, "b": 1, "c": 1, "d": 4}


def test_standings_average_ranks_and_scores_over_tasks_with_seeds_resampled_within_tasks():
    first, second, third = Leaderboard(scores()).standings("gold")
    # nlpo is first and second, ppo second and first: the tie in rank falls to the better mean, 0.615 against 0.605.
    assert [s.method for s in (first, second, third)] == ["nlpo", "ppo", "sft"]
    assert [s.rank for s in (first, second, third)] == [1.5, 1.5, 3.0]
    assert [s.score.estimate for s in (first, second, third)] == pytest.approx([0.615, 0.605, 0.41])  # type: ignore[union-attr]
    assert [s.spread for s in (first, second, third)] == pytest.approx([0.015, 0.155, 0.01])
    assert second.score == bootstrap_interval([GOLD["qa", "ppo"], GOLD["dialogue", "ppo"]], lambda x: float(np.mean(x)))


def test_a_method_without_a_run_on_each_task_has_no_standing_and_comes_last():
    board = Leaderboard([s for s in scores() if (s.task, s.method) != ("dialogue", "nlpo")])
    last = board.standings("gold")[-1]
    assert (last.method, last.tasks, last.score, last.rank) == ("nlpo", 1, None, None)
    assert board.task_table("gold")[2][3] == "–"
    assert board.cells("gold", "dialogue")["ppo"].rank == 1


def test_unequal_numbers_of_seeds_and_single_seeds_give_means_without_an_interval():
    board = Leaderboard([s for s in scores() if (s.task, s.seed) != ("qa", 2)])
    score = next(s.score for s in board.standings("gold") if s.method == "ppo")
    assert score is not None
    assert score.estimate == pytest.approx((0.35 + 0.71) / 2)
    assert score.low == -math.inf
    assert "2 to 3 seeds" in board.note("gold")
    single = Leaderboard([s for s in scores() if s.seed == 0])
    assert math.isnan(single.cells("gold", "qa")["sft"].spread)
    assert "[no interval] #2" in single.task_table("gold")[1][1]
    assert single.standings_table("gold")[1][3] == "–"


def test_tasks_that_lack_a_metric_are_left_out_of_its_tables():
    rows = [*scores(), Score("qa", "sft", 9, {"lexical/bleu": 0.4})]
    board = Leaderboard(rows)
    assert [row[0] for row in board.task_table("lexical/bleu")] == ["task", "qa"]
    assert next((s.method, s.tasks) for s in board.standings("lexical/bleu")) == ("sft", 1)


def test_the_same_run_twice_nothing_at_all_and_unknown_metrics_are_refused():
    with pytest.raises(UsageError, match="two records of task qa, method sft, seed 0"):
        Leaderboard([*scores(), scores()[0]])
    with pytest.raises(UsageError, match="at least one record"):
        Leaderboard([])
    with pytest.raises(UsageError, match="did you mean 'gold'"):
        Leaderboard(scores()).check("golf")


# Records ----------------------------------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_without_what_could_not_be_measured(tmp_path):
    score = Score("qa", "ppo", 4, {"gold": 0.25, "diversity/msttr-100": math.nan}, {"steps": 60})
    path = write_record(tmp_path / "new", score)
    assert path.name == "qa-ppo-4.score.json"
    assert json.loads(path.read_text())["metrics"] == {"gold": 0.25, "diversity/msttr-100": None}
    assert read_record(path) == Score("qa", "ppo", 4, {"gold": 0.25}, {"steps": 60})
    with pytest.raises(UsageError, match="cannot name"):
        write_record(tmp_path, Score("a/b", "ppo", 0, {}))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no leaderboard record"),
        ('{"task": "qa", "method": "ppo", "seed": 0}', "no leaderboard record"),
        ('{"task": "qa", "method": "ppo", "seed": 0, "metrics": {}, "sed": 1}', "nothing else"),
        ('{"task": "qa", "method": "ppo", "seed": true, "metrics": {}}', "'seed' is bool, wanted int"),
        ('{"task": "qa", "method": "ppo", "seed": 0, "metrics": {"gold": "0.5"}}', "'gold' is str"),
    ],
)
def test_a_bad_record_is_named_with_what_is_wrong(tmp_path, text, problem):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(DataError, match=problem) as caught:
        read_record(path)
    assert str(path) in str(caught.value)


def test_folders_are_searched_for_records_alone_and_no_file_counts_twice(tmp_path):
    path = write_record(tmp_path / "deep" / "er", scores()[0])
    (tmp_path / "run.json").write_text("{}")
    assert record_files([tmp_path, path]) == [path]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no"):
        record_files([tmp_path / "empty"])
    with pytest.raises(UsageError, match="no such file"):
        record_files([tmp_path / "none.json"])


# The command ------------------------------------------------------------------------------------------------------------------------------


def command(*sources, metric=None, out=None) -> int:
    return leaderboard(Namespace(sources=[str(source) for source in sources], metric=metric, out=out and str(out)))


def test_the_command_prints_the_tables_and_writes_them_beside_the_records(tmp_path, capsys):
    for score in scores():
        write_record(tmp_path, score)
    assert command(tmp_path) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert next(line for line in lines if line.startswith("TASK")).split() == ["TASK", "nlpo", "ppo", "sft"]
    assert next(line for line in lines if line.startswith("nlpo")).split()[:3] == ["nlpo", "1.50", "0.615"]
    assert "perplexity" not in said
    written = (tmp_path / "leaderboard.md").read_text()
    assert "0.620 [0.600, 0.640] #1" in said
    assert r"0.620 \[0.600, 0.640\] #1" in written
    assert written.startswith("# Leaderboard")


def test_metrics_are_chosen_and_all_is_every_one(tmp_path, capsys):
    files = [write_record(tmp_path, score) for score in scores()]
    out = tmp_path / "tables" / "board.md"
    assert command(*files, metric=["all"], out=out) == 0
    assert "## fluency/perplexity" in out.read_text()
    capsys.readouterr()
    assert command(*files, metric=["fluency/perplexity"]) == 0
    said = capsys.readouterr().out
    assert "smaller is better" in said
    assert "gold" not in said
    assert not (tmp_path / "leaderboard.md").exists()
    with pytest.raises(UsageError, match=r"ends in \.md"):
        command(tmp_path, out=tmp_path / "board.txt")
