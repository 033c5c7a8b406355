"""Methods that search for an answer step by step and change no weight. A step answers one batch of prompts.

Every prompt has beams: answers that are being written. In each round the policy writes the next step of every beam several times, the guide (see
`objectives.process_reward`) scores all that was written, and a method's `select(config, scores)` keeps some: `scores` [C] are those of a prompt's candidates,
the finished beams among them, and it returns indices, the best first. Candidates with the same tokens are one. When every beam has ended, or after
`max_steps` rounds, one is chosen.

`samples.jsonl` in the run's folder gets a line for each prompt: the chosen answer (`completion`), all beams (`completions`) and their `scores`. The cost is
`tokens/generated`, everything that the policy wrote, what was thrown away as well: by it a search is compared with best-of-n.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from telos.algorithms.language._options import load_policy
from telos.algorithms.language._rows import prompts_table
from telos.algorithms.language._steps import CutConfig, cut_of, require_decoder
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import JsonLines, Run
from telos.core.seeds import derive
from telos.data.batches import pad_1d
from telos.dataflow import Role, make_backend, transfer
from telos.functional.process import Aggregate, aggregate
from telos.models.generation import Sampling
from telos.models.generation.native import NativeEngine
from telos.models.language import LanguageModel
from telos.models.packing import Answers
from telos.objectives.process_reward import Cut, ProcessReward, load_process_reward


@dataclass(frozen=True, kw_only=True)
class SearchConfig(CutConfig):
    """Options of searching step by step."""

    steps: int = 10  # batches of prompts
    batch_size: int = 32  # prompts a step
    process_reward: str = ""  # guide: a process reward model's folder or hub id, value:FOLDER, or implicit:POLICY[,REFERENCE]
    process_beta: float | None = None  # scale of an implicit guide, > 0; default: 0.05
    score: Aggregate = "last"  # how the scores of a beam's steps become its score
    beams: int = 4  # answers that are kept in each round
    expansions: int = 4  # ways to go on from each; the first round draws beams times as many
    max_steps: int = 16  # rounds, at most
    max_step_tokens: int = 48  # tokens a step may have; one that is longer is cut there
    max_completion_length: int = 128  # tokens an answer may have
    choose: Literal["best", "vote"] = (
        "best"  # the beam with the best score, or the answer (text from answer_mark on) with the largest sum of scores
    )
    temperature: float = 1.0  # of sampling; > 0
    top_p: float = 1.0  # nucleus, (0, 1]
    top_k: int = 0  # most probable tokens kept; 0 = all

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "batch_size", "beams", "expansions", "max_steps", "max_step_tokens")
        require(self, ">= 0", "top_k")
        require(self, "> 0", "temperature")
        require(self, "> 0 and <= 1", "top_p")
        if self.process_beta is not None:
            require(self, "> 0", "process_beta")
        if self.choose == "vote" and not self.answer_mark:
            raise UsageError("--choose vote needs --answer_mark, behind which the answers stand that are counted")


@dataclass(frozen=True)
class Beam:
    """An answer under way. `ended`: its end token was produced; `final`: nothing more is written to it."""

    ids: tuple[int, ...] = ()
    ended: bool = False
    final: bool = False
    score: float = -math.inf


@dataclass
class _Spent:
    tokens: int = 0
    rounds: int = 0


class _StepEngine(NativeEngine):
    """Stops at tokens with which a step may end, as well as at end tokens."""

    def __init__(self, model: LanguageModel, cut: Cut) -> None:
        super().__init__(model)
        size = model.base.get_output_embeddings().weight.shape[0]
        tokenizer: Any = model.tokenizer
        texts = tokenizer.batch_decode([[token] for token in range(size)], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        marks = {separator[-1] for separator in cut.separators}
        self.stops = {token for token, text in enumerate(texts) if any(mark in text for mark in marks)}

    def end_tokens(self) -> list[int]:
        return sorted({*super().end_tokens(), *self.stops})


class StepWriter(Role):
    """Writes the next step of answers with a model's current weights."""

    def __init__(self, model: LanguageModel, cut: Cut) -> None:
        self.model, self.cut = model, cut
        self.engine = _StepEngine(model, cut)
        self.ends = set(NativeEngine(model).end_tokens())

    @transfer(split="broadcast", collect="first")
    def write(
        self, prompts: list[list[int]], prefixes: list[tuple[int, ...]], *, sampling: Sampling, room: list[int], n: int, seed: int
    ) -> tuple[list[list[tuple[int, ...]]], int]:
        """`n` next steps for each prefix of an answer, of at most `sampling.max_new_tokens` and `room` tokens, and how many tokens were generated."""
        steps: list[list[int]] = [[] for _ in range(n * len(prefixes))]
        left = [min(sampling.max_new_tokens, room[i // n]) for i in range(len(steps))]
        open_rows, spent = list(range(len(steps))), 0
        for turn in range(sampling.max_new_tokens):
            if not open_rows:
                break
            # The first time prefixes are computed once for all their steps. Where a stop ended no step, as a blank one, writing goes on from there.
            asked = [[*prompt, *prefix] for prompt, prefix in zip(prompts, prefixes, strict=True)]
            if turn:
                asked = [[*asked[i // n], *steps[i]] for i in open_rows]
            drawn = self._draw(asked, sampling, max(left[i] for i in open_rows), 1 if turn else n, derive(seed, "step", turn))
            spent += sum(map(len, drawn))
            for i, new in zip(open_rows, drawn, strict=True):
                steps[i] += new[: left[i]]
                left[i] -= len(new[: left[i]])
            open_rows = [i for i in open_rows if left[i] and not self._over(prefixes[i // n], steps[i])]
        return [[tuple(steps[i * n + j]) for j in range(n)] for i in range(len(prefixes))], spent

    def _draw(self, asked: list[list[int]], sampling: Sampling, most: int, n: int, seed: int) -> list[list[int]]:
        found = self.engine.generate(asked, replace(sampling, max_new_tokens=most), n=n, seed=seed)
        return [ids[:length] for ids, length in zip(found.ids.tolist(), found.length.tolist(), strict=True)]

    def _over(self, prefix: tuple[int, ...], step: list[int]) -> bool:
        """Whether the answer has ended, the context is full, or a step is closed that was open before."""
        if step[-1] in self.ends or step[-1] not in self.engine.stops:
            return True
        before, after = (sum(closed for _, closed in self.cut.pieces(self.text(ids))) for ids in (prefix, (*prefix, *step)))
        return after > before

    def text(self, ids: tuple[int, ...]) -> str:
        return self.model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # type: ignore[return-value]


class GuideRole(Role):
    """Scores answers under way."""

    def __init__(self, guide: ProcessReward, device: torch.device) -> None:
        self.guide, self.device = guide, device

    @transfer(split="broadcast", collect="first")
    def scores(self, prompts: list[list[int]], answers: list[list[tuple[int, ...]]], *, how: Aggregate) -> list[list[float]]:
        """One number for each of the answers to each prompt; a prompt without answers has none."""
        asked = [(prompt, some) for prompt, some in zip(prompts, answers, strict=True) if some]
        prompt_ids, prompt_length = pad_1d([prompt for prompt, _ in asked])
        ids, length = pad_1d([answer for _, some in asked for answer in some])
        owner = torch.arange(len(asked)).repeat_interleave(torch.tensor([len(some) for _, some in asked]))
        found = self.guide.score(Answers(*(x.to(self.device) for x in (prompt_ids, prompt_length, ids, length, owner))))
        values = iter(aggregate(found.values.double(), found.mask, how).tolist())
        return [[next(values) for _ in some] for some in answers]


@dataclass
class _Search:
    """The beams of one prompt."""

    prompt: list[int]
    beams: list[Beam] = field(default_factory=lambda: [Beam()])

    @property
    def open(self) -> list[Beam]:
        return [beam for beam in self.beams if not beam.final]


class Program:
    def __init__(self, method: Method, config: SearchConfig, run: Run) -> None:
        self.method, self.config, self.run = method, config, run
        self.last_batch: Mapping[str, Any] = {}
        if not config.process_reward:
            raise UsageError(
                "--process_reward is missing: give a process reward model's folder or hub id, value:FOLDER, or implicit:POLICY[,REFERENCE]"
            )
        self.model = require_decoder(load_policy(config))
        self.table = prompts_table(config, config.data, "--data", self.model, run)
        guide = load_process_reward(config.process_reward, self.model, beta=config.process_beta, cut=cut_of(config))
        backend = make_backend(config.backend)
        self.writer = backend.place(lambda: StepWriter(self.model, cut_of(config)))
        self.guide = backend.place(lambda: GuideRole(guide, self.model.device))
        self.lines = JsonLines(run.path / "samples.jsonl")

    def plan(self) -> dict[str, Any]:
        c = self.config
        return {
            "prompts": len(self.table),
            "prompts a step": c.batch_size,
            "beams": c.beams,
            "candidates a round, at most": c.beams * c.expansions,
            "rounds, at most": c.max_steps,
            "steps": c.steps,
        }

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        rows = [(index * c.batch_size + i) % len(self.table) for i in range(min(c.batch_size, len(self.table)))]
        searches = [_Search(self.table.columns["prompt_ids"][row].tolist()) for row in rows]
        spent = _Spent()
        while spent.rounds < c.max_steps and any(search.open for search in searches):
            self._round(searches, spent, derive(c.seed, "search", index, spent.rounds))
        texts = [[self._text(beam) for beam in search.beams] for search in searches]
        scores = [np.array([beam.score for beam in search.beams]) for search in searches]
        chosen = [choose(c, values, answers) for values, answers in zip(scores, texts, strict=True)]
        self.lines.append(
            {"prompt": self.table.prompts[row], "completion": answers[best], "completions": answers, "scores": values.tolist()}
            for row, answers, values, best in zip(rows, texts, scores, chosen, strict=True)
        )
        kept = [search.beams[best] for search, best in zip(searches, chosen, strict=True)]
        return {
            "score/mean": float(np.concatenate(scores).mean()),
            "score/kept": float(np.mean([beam.score for beam in kept])),
            "search/rounds": float(spent.rounds),
            "search/beams": float(np.mean([len(search.beams) for search in searches])),
            "tokens/generated": float(spent.tokens),
            "tokens/generated_a_prompt": spent.tokens / len(rows),
            "completions/mean_length": float(np.mean([len(beam.ids) for beam in kept])),
            "completions/clipped_ratio": float(np.mean([not beam.ended for beam in kept])),
        }

    def _round(self, searches: list[_Search], spent: _Spent, seed: int) -> None:
        """One more step of every open beam, and the choice among all."""
        c = self.config
        work = [(search, beam) for search in searches for beam in search.open]
        prompts, prefixes = [search.prompt for search, _ in work], [beam.ids for _, beam in work]
        longest = [min(c.max_completion_length, self.model.context - len(prompt)) for prompt in prompts]
        written, tokens = self.writer.call(
            "write",
            prompts,
            prefixes,
            sampling=Sampling(temperature=c.temperature, top_p=c.top_p, top_k=c.top_k, max_new_tokens=c.max_step_tokens),
            room=[most - len(prefix) for most, prefix in zip(longest, prefixes, strict=True)],
            n=c.expansions if spent.rounds else c.beams * c.expansions,
            seed=seed,
        )
        spent.tokens += tokens
        spent.rounds += 1
        ends = self.writer.workers[0].ends
        fresh: dict[int, dict[tuple[int, ...], Beam]] = {id(search): {} for search in searches}
        for (search, beam), most, steps in zip(work, longest, written, strict=True):
            for step in steps:
                ids = (*beam.ids, *step)
                fresh[id(search)].setdefault(ids, Beam(ids, step[-1] in ends, step[-1] in ends or len(ids) >= most))
        found = [list(fresh[id(search)].values()) for search in searches]
        scored = self.guide.call(
            "scores", [search.prompt for search in searches], [[beam.ids for beam in some] for some in found], how=c.score
        )
        for search, some, values in zip(searches, found, scored, strict=True):
            if some:
                new = [replace(beam, score=value) for beam, value in zip(some, values, strict=True)]
                candidates = [*(beam for beam in search.beams if beam.final), *new]
                assert self.method.select is not None
                search.beams = [candidates[i] for i in self.method.select(c, np.array([beam.score for beam in candidates]))]

    def _text(self, beam: Beam) -> str:
        return self.writer.workers[0].text(beam.ids)

    def state(self) -> dict[str, Any]:
        return {"written": self.lines.written}

    def load(self, state: Mapping[str, Any]) -> None:
        self.lines.written = state["written"]

    def finish(self, run: Run) -> None:
        pass


def choose(config: SearchConfig, scores: np.ndarray, texts: list[str]) -> int:
    """Which of a prompt's beams is its answer; the first of equals. Under a vote beams whose text is the same from the answer's mark on add up their scores,
    and the best of the winners is taken; beams without an answer have no vote, unless none has one."""
    if config.choose == "best":
        return int(scores.argmax())
    answers = [text.partition(config.answer_mark)[2].strip() for text in texts]
    voting = [i for i, answer in enumerate(answers) if answer] or range(len(texts))
    votes: dict[str, float] = {}
    for i in voting:
        votes[answers[i]] = votes.get(answers[i], 0.0) + float(scores[i])
    winner = max(votes, key=votes.__getitem__)
    return max((i for i in voting if answers[i] == winner), key=lambda i: float(scores[i]))
