"""Expert iteration and STaR: which answers are learned from, from which weights, and what a hint changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_fixtures import write_jsonl
from support import World, changed, program_of, snapshot
from telos.algorithms.language import expert_iteration, star
from telos.algorithms.language._arrange import right_answers
from telos.core.errors import UsageError
from telos.objectives.judges import Judged, bradley_terry


def judged_of(rewards: list[list[float]], same: list[tuple[int, int, int]] = ()) -> Judged:  # type: ignore[assignment]
    scores = np.array(rewards)
    equal = np.zeros((*scores.shape, scores.shape[1]), dtype=bool)
    for prompt, i, j in same:
        equal[prompt, i, j] = equal[prompt, j, i] = True
    return Judged(bradley_terry(scores), scores[..., None], np.ones_like(scores, dtype=np.int64), {}, np.random.default_rng(0), equal)


def test_right_answers_are_kept_once_each_and_no_others() -> None:
    judged = judged_of([[1.0, 0.0, 1.0, 1.0], [0.0, 0.2, 0.4, np.nan], [0.9, 0.6, 0.0, 0.0]], [(0, 0, 2)])
    found = right_answers(judged, 0.5, 3)
    assert sorted(zip(found.prompt.tolist(), found.first.tolist(), strict=True)) == [(0, 0), (0, 3), (2, 0), (2, 1)]
    assert len(right_answers(judged, 0.5, 1).prompt) == 2


def test_hinted_answers_count_only_where_all_others_failed() -> None:
    config = star.Config(samples_per_prompt=2, hinted_samples=2, examples_per_prompt=4)
    judged = judged_of([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    found = star.arrange(config, judged)
    assert sorted(zip(found.prompt.tolist(), found.first.tolist(), strict=True)) == [(0, 0), (1, 2)]


def all_right(folder: Path) -> str:
    (folder / "right.py").write_text("def right(completions, **_):\n    return [1.0] * len(completions)\n", encoding="utf-8")
    return f"{folder / 'right.py'}:right"


@pytest.mark.parametrize("key", ["expert-iteration", "star"])
def test_every_iteration_learns_from_the_start_anew(key: str, world: World, tmp_path: Path) -> None:
    """With a learning rate of 0 in the second iteration the weights are again those of the start."""
    program = program_of(key, world.options("iterative", reward=[all_right(tmp_path)]), tmp_path / "run")
    start = snapshot(program.model)
    program.step(0)
    assert changed(start, snapshot(program.model))
    for group in program.learner.workers[0].optimiser.param_groups:
        group["lr"] = 0.0
    program.learner.workers[0].config = program.config.__class__(**{**vars(program.config), "learning_rate": 0.0})
    program.step(1)
    assert changed(start, snapshot(program.model)) == set()


def test_the_writer_is_the_policy_of_the_iteration_before(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("expert-iteration", world.options("iterative", reward=[all_right(tmp_path)]), tmp_path / "run")
    seen: list[dict[str, torch.Tensor]] = []
    write = program._write
    monkeypatch.setattr(program, "_write", lambda index: (seen.append(snapshot(program.model)), write(index))[1])
    program.step(0)
    learned = snapshot(program.model)
    program.step(1)
    assert changed(seen[1], learned) == set()
    assert changed(seen[0], learned)


def test_what_was_written_with_a_hint_is_learned_without_it(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": f"hello {i}", "answer": f"blue {i}"} for i in range(6)]
    data = str(write_jsonl(tmp_path / "hints.jsonl", rows))
    hint = "It is {answer}. {prompt}"
    options: dict[str, Any] = {"data": data, "hint": hint, "hinted_samples": 1, "samples_per_prompt": 1, "reward": [all_right(tmp_path)]}
    program = program_of("star", world.options("iterative", **options), tmp_path / "run")
    decode = program.model.tokenizer.decode
    assert decode(program.hinted.columns["prompt_ids"][2]).endswith("It is blue 2. hello 2")
    rollouts, _ = program._write(0)
    prompts = [decode(ids[:n]) for ids, n in zip(rollouts.prompt_ids.tolist(), rollouts.prompt_length.tolist(), strict=True)]
    assert all("blue" not in prompt for prompt in prompts)
    assert prompts[0::2] == prompts[1::2]


def test_a_hint_that_names_no_column_is_refused_with_those_there_are(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--hint '\{nothing\}'.*the columns are prompt, answer"):
        program_of("star", world.options("iterative", hint="{nothing}"), tmp_path)


def test_expert_iteration_says_what_it_needs() -> None:
    with pytest.raises(UsageError, match="samples_per_prompt"):
        expert_iteration.Config(samples_per_prompt=1)
