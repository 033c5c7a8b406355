"""`telos leash BASE TRAINED`: what training has moved, by many answers of both models to the same problems."""

from __future__ import annotations

import math
import shlex
import sys
import time
import uuid
from argparse import Namespace
from pathlib import Path
from typing import Any

from telos.cli import text
from telos.cli.progress import Bar
from telos.core.errors import UsageError


def add_options(add: Any) -> None:
    """The command's arguments; what takes long is watched by `--quiet`, which the caller adds."""
    add.add_argument(
        "base", metavar="BASE", help="tinylm, a model's folder, a hub id, a run's folder, or RUN:STEP for one of its checkpoints"
    )
    add.add_argument("trained", metavar="TRAINED", help="the same; usually what BASE was trained into")
    add.add_argument("--data", default="arith", help="a testbed, or a file, folder or hub id of prompts (default: %(default)s)")
    add.add_argument("--level", type=int, help="of --data arith: 1 to 5 (default: 1 to 3 mixed)")
    add.add_argument("--reward", help="what judges answers, as in `telos train` (default: the testbed's gold judge)")
    add.add_argument(
        "--threshold", type=float, default=0.5, help="an answer is right when its reward is at least this (default: %(default)s)"
    )
    add.add_argument("--prompts", type=int, default=100, help="problems (default: %(default)s)")
    add.add_argument("--samples", type=int, default=32, help="answers of each model to each problem (default: %(default)s)")
    add.add_argument("--temperature", type=float, default=1.0, help="of sampling, > 0 (default: %(default)s)")
    add.add_argument("--top_p", type=float, default=1.0, help="share of probability that is kept, in (0, 1] (default: %(default)s)")
    add.add_argument("--max_new_tokens", type=int, help="longest answer in tokens (default: the testbed's own, else 256)")
    add.add_argument(
        "--answer",
        metavar="REGEX",
        help="where the final answer stands in a text: its first group (default: arith's own, else the whole text)",
    )
    add.add_argument(
        "--support_threshold",
        type=float,
        default=0.0,
        help="share of its samples that a model must exceed to count as finding something (default: 0, at least once)",
    )
    add.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = as many as there are cores (default: %(default)s)")
    add.add_argument("--out", metavar="FOLDER", help="where samples.jsonl, leash.json and the report go (default: runs/leash-…)")


def leash(arguments: Namespace) -> int:
    out = _checked(arguments)
    from telos.algorithms.language.repeated_answers import answer_repeatedly, load_problems, open_policy
    from telos.algorithms.run import prepare_threads
    from telos.evaluation.leash import Leash

    prepare_threads(arguments.threads)
    problems = load_problems(
        arguments.data,
        arguments.prompts,
        seed=arguments.seed,
        level=arguments.level,
        reward=arguments.reward,
        threshold=arguments.threshold,
        max_new_tokens=arguments.max_new_tokens,
        answer=arguments.answer,
    )
    count = len(problems.examples)
    if count < 2:
        raise UsageError(f"--data {arguments.data} has one problem; intervals over problems need at least two")
    notes = [f"{arguments.prompts} problems were asked for; {arguments.data} has {count}"] if count < arguments.prompts else []
    # Both are opened before either is asked: a name that leads nowhere must not cost half of the work.
    models = [open_policy(source) for source in (arguments.base, arguments.trained)]
    sampled: list[Any] = []
    for source, model in zip((arguments.base, arguments.trained), models, strict=True):
        bar = Bar(f"answers of {source}", count, unit="problem", quiet=arguments.quiet)
        try:
            found, told = answer_repeatedly(
                model,
                problems,
                arguments.samples,
                name=source,
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                seed=arguments.seed,
                on_progress=bar.update,
            )
        finally:
            bar.close()
        sampled.append(found)
        notes += [note for note in told if note not in notes]
    names = ("data", "level", "threshold", "prompts", "samples", "temperature", "top_p", "support_threshold", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    settings |= {
        "reward": problems.reward,
        "max_new_tokens": problems.max_new_tokens,
        "answer": problems.answer and problems.answer.pattern,
    }
    result = Leash(sampled[0], sampled[1], problems.prompts, settings, arguments.support_threshold, notes)
    _print(result)
    html, markdown = result.write(out, shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]))
    rows = [["report", html], ["", markdown], ["figures", out / "leash.json"], ["answers", out / "samples.jsonl"]]
    print("\n" + text.columns([[what, text.shown_path(path)] for what, path in rows]))
    return 0


def _checked(arguments: Namespace) -> Path:
    """Everything that can be known to be wrong before the work is done; the folder to write into."""
    from telos.evaluation.leash import FILES

    for name in ("prompts", "samples"):
        if getattr(arguments, name) < 2:
            raise UsageError(f"--{name} {getattr(arguments, name)}: at least two are needed")
    if not (math.isfinite(arguments.temperature) and arguments.temperature > 0):
        raise UsageError(
            f"--temperature {arguments.temperature:g}: give a number above 0; at 0 every sample of a problem would be the same"
        )
    if not 0 < arguments.top_p <= 1:
        raise UsageError(f"--top_p {arguments.top_p:g}: give a share above 0 and at most 1 (1 keeps every token)")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise UsageError(f"--max_new_tokens {arguments.max_new_tokens}: at least 1")
    if not 0 <= arguments.support_threshold < 1:
        raise UsageError(f"--support_threshold {arguments.support_threshold:g}: give a share from 0 (found at all) to below 1")
    if not math.isfinite(arguments.threshold):
        raise UsageError(f"--threshold {arguments.threshold}: give a number")
    if arguments.threads < 0:
        raise UsageError(f"--threads {arguments.threads}: 0 (all cores) or more")
    out = Path(arguments.out) if arguments.out else Path("runs") / f"leash-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:4]}"
    if (out / "run.json").exists():
        raise UsageError(f"--out {out} is a run's folder and has its own report; name another folder")
    if out.is_file():
        raise UsageError(f"--out {out} is a file; name a folder")
    if taken := [name for name in FILES if (out / name).exists()]:
        raise UsageError(f"--out {out} holds {taken[0]} already; name another folder")
    return out


def _print(result: Any) -> None:
    rows = [
        ["MEASURE", "BASE", "TRAINED", "DIFFERENCE"],
        *([r.name, r.base.short(), r.trained.short(), r.difference.short()] for r in result.rows),
    ]
    print(text.columns(rows))
    print("\n" + text.columns(_support_rows(result)))
    print(
        f"\nin brackets: {100 * result.rows[0].base.level:g} % intervals over {len(result.prompts)} problems, {result.samples} answers of each model to each"
    )
    for note in result.notes:
        print(f"note: {note}")


def _support_rows(result: Any) -> list[list[str]]:
    def cell(interval: Any) -> str:
        return "–" if math.isnan(interval.estimate) else interval.short()

    rows = [["SUPPORT OF", "BOTH", "NEW", "LOST", "NEITHER", "RETENTION", "DISCOVERY", "DYNAMICS", "CHANGE"]]
    for unit, of in result.support.items():
        counts = [str(count) for count in (of.preserved, of.expanded, of.shrunk, of.outside)]
        rows.append([unit, *counts, *map(cell, (of.retention, of.discovery, of.dynamics, of.change))])
    rows.insert(2, ["problems, by chance", *(f"{count:.1f}" for count in result.chance.values()), "–", "–", "–", "–"])
    return rows
