"""Step-level search: the steps that are written, which beams are kept, and what comes out, against a scripted world and a search by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_fixtures import tiny_tokenizer
from support import PROMPTS, World, program_of
from telos.algorithms.language import beam_search
from telos.algorithms.language._loop_search import GuideRole, StepWriter, choose
from telos.algorithms.language.beam_search import Config, select
from telos.algorithms.run import train
from telos.core.errors import UsageError
from telos.dataflow import Group, Role, transfer
from telos.models.generation import Sampling
from telos.models.language import LanguageModel
from telos.models.packing import Answers
from telos.objectives.process_reward import Cut, StepScores, load_process_reward, step_ends

WORDS = tiny_tokenizer()
OFTEN = (" ", ".", "e", "a", "o", "s", "t")
ROOMY = Sampling(max_new_tokens=5)


def options(world: World, folder: Path, **changes: Any) -> dict[str, Any]:
    found = {"model": world.model, "device": "cpu", "threads": 1, "data": world.data["prompt-only"], "process_reward": world.reward_model}
    found |= {"steps": 1, "batch_size": 4, "beams": 2, "expansions": 3, "max_completion_length": 12, "step_separators": OFTEN}
    found |= {"checkpoint_every": 0, "out": str(folder)}
    return found | changes


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


# Choices -----------------------------------------------------------------------------------------------------------------------------------


def test_the_best_beams_are_kept_best_first_and_the_first_of_equals() -> None:
    assert select(Config(beams=3), np.array([0.1, 0.9, 0.9, -1.0, 0.5])).tolist() == [1, 2, 4]
    assert select(Config(beams=3), np.array([-2.0, -1.0])).tolist() == [1, 0]


def test_the_answer_is_the_best_beam_or_that_with_the_most_votes() -> None:
    scores, texts = np.array([0.6, 0.4, 0.35, 0.9]), ["a. Answer: 1", "b. Answer: 2", "c. Answer: 2 ", "no answer"]
    assert choose(Config(), scores, texts) == 3
    assert choose(Config(choose="vote"), scores, texts) == 1, "0.4 + 0.35 for 2, and the better of the two"
    assert choose(Config(choose="vote"), np.array([0.1, 0.2]), ["x", "y"]) == 1, "where none has an answer"


def test_options_that_cannot_be_are_refused(world: World, tmp_path: Path) -> None:
    for changes, said in (
        ({"process_reward": ""}, "--process_reward is missing"),
        ({"choose": "vote", "answer_mark": ""}, "--choose vote needs --answer_mark"),
        ({"process_beta": 0.1}, "beta scales implicit rewards alone"),
        ({"process_beta": 0.0}, "--process_beta"),
        ({"model": world.encoder_decoder}, "answers are continued by decoders alone"),
        ({"beams": 0}, "--beams"),
        ({"expansions": 0}, "--expansions"),
        ({"step_separators": ["", "a"]}, "none of them may be empty"),
    ):
        with pytest.raises(UsageError, match=said):
            train("beam-search", options(world, tmp_path / "run", **changes))


# Steps -------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(world: World) -> LanguageModel:
    return LanguageModel.load(world.model, device="cpu")


def prompts(n: int = 4) -> list[list[int]]:
    return [WORDS(text, add_special_tokens=False)["input_ids"] for text in PROMPTS[:n]]


def test_every_step_ends_where_steps_end_or_where_there_is_no_room(policy: LanguageModel) -> None:
    cut = Cut(OFTEN)
    writer = StepWriter(policy, cut)
    asked, prefixes = prompts(), [(), tuple(WORDS("hi ", add_special_tokens=False)["input_ids"]), (), ()]
    written, spent = writer.write(asked, prefixes, sampling=ROOMY, room=[9, 9, 2, 9], n=20, seed=0)
    kinds = set()
    for prefix, steps, most in zip(prefixes, written, (5, 5, 2, 5), strict=True):
        assert len(steps) == 20
        for step in steps:
            assert 1 <= len(step) <= most
            whole = [*prefix, *step]
            before = len(step_ends(WORDS, prefix, cut)) if prefix else 0
            if step[-1] == WORDS.eos_token_id:
                kinds.add("ended")
            elif len(step) == most:
                kinds.add("full")
            else:
                kinds.add("closed")
                assert step_ends(WORDS, whole, cut)[-1] == len(whole) - 1
                assert len(step_ends(WORDS, whole, cut)) == before + 1
                assert any(mark in WORDS.decode([step[-1]]) for mark in OFTEN)
            assert len(step_ends(WORDS, [t for t in whole if t != WORDS.eos_token_id] or whole, cut)) <= before + 1, (
                "never two steps at once"
            )
    assert kinds == {"ended", "full", "closed"}
    assert spent >= sum(len(step) for steps in written for step in steps)


def test_a_blank_step_is_written_on_and_so_is_what_stands_behind_the_answers_mark(policy: LanguageModel) -> None:
    """A stop that closes no step does not end it; behind the mark nothing but the end token does."""
    for cut, prefix in ((Cut(OFTEN, "x"), "x"), (Cut(("\n\n",), ""), "a")):
        writer = StepWriter(policy, cut)
        ids = tuple(WORDS(prefix, add_special_tokens=False)["input_ids"])
        ((*steps,),), _ = writer.write(prompts(1), [ids], sampling=Sampling(max_new_tokens=12), room=[12], n=30, seed=1)
        for step in steps:
            assert step[-1] == WORDS.eos_token_id or len(step) == 12 or "\n\n" in WORDS.decode(step)
        if prefix == "x":
            assert any(token in writer.engine.stops for step in steps for token in step[:-1])


def test_steps_are_drawn_from_the_policy(policy: LanguageModel) -> None:
    """Of single tokens after a prompt each comes as often as the policy says."""
    writer, asked = StepWriter(policy, Cut(OFTEN)), prompts(1)
    ((*steps,),), spent = writer.write(asked, [()], sampling=Sampling(max_new_tokens=1), room=[1], n=3000, seed=0)
    with torch.no_grad():
        chances = policy.model(torch.tensor(asked)).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([step[0] for step in steps]), minlength=len(chances)) / 3000
    assert spent == 3000
    assert float((counts - chances).abs().max()) < 0.05
    assert float(chances.max()) > 0.1


# Search in a scripted world ------------------------------------------------------------------------------------------------------------------

END = 1


class Scripted(Role):
    """Step j of a beam is the token 10 + j, up to three of them, then the end; all at the cost of two tokens."""

    def __init__(self) -> None:
        self.ends = {END}
        self.rounds = self.spent = 0

    @transfer(split="broadcast", collect="first")
    def write(self, prompts: Any, prefixes: Any, *, sampling: Any, room: Any, n: int, seed: int) -> Any:
        self.rounds += 1
        self.spent += 2 * n * len(prefixes)
        return [[(END,) if len(prefix) >= 3 else (10 + j % 4,) for j in range(n)] for prefix in prefixes], 2 * n * len(prefixes)

    def text(self, ids: tuple[int, ...]) -> str:
        return " ".join(map(str, ids))


class Table(Role):
    """Scores of steps by the answer's tokens so far; the end token scores nothing."""

    name = "table"

    def score(self, answers: Answers) -> StepScores:
        ends = torch.arange(answers.ids.shape[1]).expand(answers.ids.shape)
        mask = answers.mask & (answers.ids != END)
        values = torch.tensor(
            [
                [value(row[: t + 1]) if t < n else 0.0 for t in range(len(row))]
                for row, n in zip(answers.ids.tolist(), answers.length.tolist())
            ]
        )
        return StepScores(values.masked_fill(~mask, 0.0), ends, mask, answers.ids.shape[1])

    def score_rollouts(self, rollouts: Any) -> Any:
        raise NotImplementedError


def value(ids: list[int]) -> float:
    """An arbitrary number for each beginning."""
    return round(float(np.random.default_rng([*ids, 7]).random()), 3)


def by_hand(beams: int, expansions: int, rounds: int, how: Any) -> list[tuple[tuple[int, ...], float]]:
    kept: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for turn in range(rounds):
        pool = [beam for beam in kept if beam[0] and beam[0][-1] == END]
        for ids, _ in kept:
            if not (ids and ids[-1] == END):
                n = beams * expansions if turn == 0 else expansions
                steps = [END] if len(ids) >= 3 else [10 + j for j in range(min(n, 4))]
                for step in steps:
                    new = (*ids, step)
                    scores = [value(list(new[: t + 1])) for t in range(len(new)) if new[t] != END]
                    pool.append((new, how(scores)))
        kept = sorted(pool, key=lambda beam: -beam[1])[:beams]
    return kept


@pytest.mark.parametrize(("score", "how"), [("last", lambda s: s[-1]), ("min", min), ("product", np.prod), ("sum", sum)])
@pytest.mark.parametrize(("beams", "expansions", "rounds"), [(1, 4, 9), (2, 2, 9), (3, 4, 2), (4, 1, 9)])
def test_the_search_is_beam_search(world: World, tmp_path: Path, score: str, how: Any, beams: int, expansions: int, rounds: int) -> None:
    program = program_of(
        "beam-search",
        options(world, tmp_path / "run", score=score, beams=beams, expansions=expansions, max_steps=rounds, batch_size=2),
        tmp_path / "run",
    )
    writer = Scripted()
    program.writer, program.guide = Group([writer]), Group([GuideRole(Table(), torch.device("cpu"))])
    metrics = program.step(0)
    wanted = by_hand(beams, expansions, rounds, how)
    for line in lines_of(tmp_path / "run"):
        assert line["completions"] == [writer.text(ids) for ids, _ in wanted]
        assert line["scores"] == pytest.approx([score for _, score in wanted], abs=1e-6)
        assert line["completion"] == writer.text(wanted[0][0])
    assert metrics["score/kept"] == pytest.approx(wanted[0][1], abs=1e-6)
    assert metrics["tokens/generated"] == writer.spent
    assert metrics["search/rounds"] == writer.rounds == min(rounds, 4)
    assert metrics["completions/clipped_ratio"] == float(rounds < 4)


# Runs --------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", "value:", "implicit:"])
def test_any_process_reward_guides_and_the_scores_in_the_file_are_the_guides(
    world: World, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = kind + (world.other_model if kind == "implicit:" else world.reward_model)
    how: Any = "last" if kind == "" else "sum"
    asked: list[tuple[list[int], tuple[int, ...], float]] = []
    original = GuideRole.scores

    def recording(self: GuideRole, prompts: Any, answers: Any, *, how: Any) -> Any:
        found = original(self, prompts, answers, how=how)
        for prompt, some, scores in zip(prompts, answers, found, strict=True):
            asked.extend((prompt, ids, score) for ids, score in zip(some, scores, strict=True))
        return found

    recording.transfer = original.transfer  # type: ignore[attr-defined]
    monkeypatch.setattr(GuideRole, "scores", recording)
    run = train("beam-search", options(world, tmp_path / "run", process_reward=spec, score=how))
    guide = load_process_reward(spec, LanguageModel.load(world.model, device="cpu"), cut=Cut(OFTEN))
    (metrics,), lines = run.metrics(), lines_of(run.path)
    for prompt, ids, score in asked[-8:]:
        one = [torch.tensor([x]) for x in (prompt, len(prompt), ids, len(ids), 0)]
        found = guide.score(Answers(*one))
        assert float(found.values[found.mask][-1] if how == "last" else found.values.sum()) == pytest.approx(score, abs=1e-4)
    for line in lines:
        assert line["completion"] == line["completions"][0]
        assert line["scores"] == sorted(line["scores"], reverse=True)
        assert set(line["scores"]) <= {score for _, _, score in asked}
    assert len(lines) == 4
    assert metrics["score/kept"] == pytest.approx(np.mean([line["scores"][0] for line in lines]), abs=1e-6)


def test_without_expansions_nothing_is_thrown_away(world: World, tmp_path: Path) -> None:
    """Best-of-n: all that was generated is in the answers."""
    program = program_of("beam-search", options(world, tmp_path / "run", beams=4, expansions=1, batch_size=3), tmp_path / "run")
    writer = Scripted()
    program.writer, program.guide = Group([writer]), Group([GuideRole(Table(), torch.device("cpu"))])
    metrics = program.step(0)
    assert {len(line["completions"]) for line in lines_of(tmp_path / "run")} == {4}
    assert metrics["tokens/generated"] == 2 * 3 * 4 * 4, "two tokens for each of three steps and the end of four answers to three prompts"
    assert metrics["tokens/generated_a_prompt"] == 32


def test_the_same_seed_searches_alike_and_another_otherwise(world: World, tmp_path: Path) -> None:
    found = [train("beam-search", options(world, tmp_path / f"{i}", seed=seed)) for i, seed in enumerate((1, 1, 2))]
    texts = [lines_of(run.path) for run in found]
    assert texts[0] == texts[1] != texts[2]


def test_more_beams_find_answers_that_the_guide_likes_better(world: World, tmp_path: Path) -> None:
    kept = [
        train("beam-search", options(world, tmp_path / f"{n}", beams=n, score="last", batch_size=8)).metrics()[0]["score/kept"]
        for n in (1, 8)
    ]
    assert kept[1] > kept[0]


def test_its_method_needs_a_process_reward() -> None:
    assert beam_search.METHOD.needs == {"process-reward"}
