"""The human in the loop: the queue of files, and `telos annotate` that asks in the terminal."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest

from telos.cli.main import main
from telos.core.errors import DataError, UsageError
from telos.objectives.judges import HumanQueue, append_lines, read_lines


@pytest.fixture
def queue(tmp_path: Path) -> HumanQueue:
    """Three questions; the second has been answered already."""
    queue = HumanQueue(tmp_path / "human", poll=0.01)
    questions = [
        {"id": "a", "prompt": "What is the sky?", "first": " blue", "second": " a bird"},
        {"id": "b", "prompt": "x", "first": "1", "second": "2"},
        {"id": "c", "prompt": [{"role": "user", "content": "And the grass?"}], "first": "green", "second": ""},
    ]
    append_lines(queue.questions, questions)
    queue.answer("b", 0)
    return queue


def annotate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, typed: str) -> tuple[int, str, str]:
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return main(["annotate", str(folder)]), *capsys.readouterr()


def test_open_questions_are_asked_in_order_and_the_answers_are_written(queue, monkeypatch, capsys):
    code, out, _ = annotate(monkeypatch, capsys, queue.folder, "1\n2\n")
    assert code == 0
    assert queue.given() == {"b": 0.5, "a": 1.0, "c": 0.0}
    assert queue.waiting() == []
    for text in ("What is the sky?", "[1] blue", "[2] a bird", "user: And the grass?", "[2] (empty)", "2 left", "1 left"):
        assert text in out
    assert out.index("2 left") < out.index("What is the sky?") < out.index("1 left") < out.index("And the grass?")
    assert "2 answered, 0 left" in out
    assert annotate(monkeypatch, capsys, queue.folder, "")[1].strip().startswith("0 answered, 0 left"), "nothing is asked twice"


@pytest.mark.parametrize("typed", ["0\nq\n", "0\n"])
def test_q_or_the_end_of_the_input_stops_and_keeps_what_was_answered(queue, monkeypatch, capsys, typed):
    code, out, _ = annotate(monkeypatch, capsys, queue.folder, typed)
    assert code == 0
    assert queue.given() == {"b": 0.5, "a": 0.5}
    assert "1 answered, 1 left" in out


def test_another_key_is_refused_and_asked_again(queue, monkeypatch, capsys):
    _, out, _ = annotate(monkeypatch, capsys, queue.folder, "3\n\n2\nq\n")
    assert out.count("is none of 1, 2, 0 and q") == 2
    assert queue.given()["a"] == 0.0


def test_a_folder_without_questions_is_refused_with_what_writes_them(tmp_path, monkeypatch, capsys):
    code, _, err = annotate(monkeypatch, capsys, tmp_path, "")
    assert code == 2
    assert f"--judge human:{tmp_path}" in err


def test_the_run_waits_for_answers_asks_each_question_once_and_takes_those_that_are_there(tmp_path: Path):
    told: list[str] = []
    queue = HumanQueue(tmp_path / "new", poll=0.01, tell=told.append)
    arguments = (["p", "p", "q"], ["one", "one", "1"], [[1]] * 3, {"opponents": ["two", "two", "2"]})

    def human() -> None:
        other = HumanQueue(tmp_path / "new")
        while len(other.waiting()) < 2:
            pass
        for question, preferred in zip(other.waiting(), (2, 1), strict=True):
            other.answer(question["id"], preferred)

    thread = threading.Thread(target=human)
    thread.start()
    scores = queue.score(*arguments)
    thread.join()
    assert scores.values.tolist() == [0.0, 0.0, 1.0]
    assert scores.valid.all()
    assert len(read_lines(queue.questions)) == 2, "equal comparisons are one question"
    assert len(told) == 1
    assert told[0].startswith("2 comparisons wait")
    assert queue.score(*arguments).values.tolist() == [0.0, 0.0, 1.0]
    assert len(told) == 1, "what was answered is not asked again"


def test_the_last_of_several_answers_counts(queue):
    queue.answer("b", 2)
    assert queue.given()["b"] == 0.0


def test_half_a_line_of_a_writer_that_was_killed_is_passed_over_and_taken_away(queue):
    with queue.answers.open("a") as file:
        file.write('{"id": "a", "pref')
    assert queue.given() == {"b": 0.5}
    queue.answer("c", 1)
    assert queue.given() == {"b": 0.5, "c": 1.0}


def test_a_hand_written_last_line_without_an_end_is_kept(queue):
    queue.answers.write_text(json.dumps({"id": "a", "preferred": 1}))
    assert queue.given() == {"a": 1.0}
    queue.answer("c", 2)
    assert queue.given() == {"a": 1.0, "c": 0.0}


@pytest.mark.parametrize("line", ["no json", "[1]", '{"id": "a", "preferred": 7}', '{"preferred": 1}'])
def test_a_line_that_is_no_answer_is_named(queue, line):
    queue.answers.write_text(f'{{"id": "b", "preferred": 1}}\n\n{line}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl(:3|, answer 2)"):
        queue.given()


def test_an_answer_out_of_range_is_refused(queue):
    with pytest.raises(UsageError, match="preferred is 1, 2 or 0"):
        queue.answer("a", 3)
