"""`telos data make` and `telos data inspect`."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from telos.cli import step_data, text
from telos.cli.progress import Bar
from telos.core.errors import Failure, UsageError

KINDS = ("prompts", "sft", "pairs", "corpus")
_PAIR_OPTIONS = {"model": "tinylm", "temperature": 1.0, "label_temperature": 0.1, "noise": 0.0, "with_gold": False, "threads": 0}
_EXAMPLE = 400  # characters of a value that are shown


def make(arguments: Namespace) -> int:
    from telos.catalogue.step_data import is_name, parse
    from telos.environments.text.base import TESTBEDS

    if is_name(arguments.testbed):
        return step_data.make(arguments)
    if arguments.testbed not in TESTBEDS and "-" in arguments.testbed:
        parse(arguments.testbed)  # says what is wrong with it
    for name in ("kind", "n"):
        if getattr(arguments, name) is None:
            raise UsageError(f"--{name} is missing")
    for name in ("steps", "size", "behaviour"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} is for data of control, such as cartpole-medium")
    out = Path(arguments.out)
    _check(arguments, out)
    from telos.environments.text.base import load_testbed

    testbed = load_testbed(arguments.testbed)
    rows, told = _rows(arguments, testbed)
    write_jsonl(out, rows)
    print(f"{len(rows)} rows ({arguments.kind} of {testbed.name}, {arguments.split}, seed {arguments.seed}) in {text.shown_path(out)}")
    if len(rows) < arguments.n:
        print(f"{arguments.n} were asked for; the split {arguments.split} of {testbed.name} gives no more")
    if told:
        print("on the way: " + ", ".join(f"{count} {name}" for name, count in told.items() if count))
    return 0


def _check(arguments: Namespace, out: Path) -> None:
    """Everything that can be known to be wrong before the work is done."""
    if arguments.n < 1:
        raise UsageError(f"--n {arguments.n}: ask for at least one row")
    if (arguments.threads or 0) < 0:
        raise UsageError(f"--threads {arguments.threads}: 0 (all cores) or more")
    if out.suffix not in (".jsonl", ".ndjson"):
        raise UsageError(f"--out {out}: rows are written as JSON lines; give a name that ends in .jsonl")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; name a file")
    if out.exists() and not arguments.force:
        raise UsageError(f"--out {out} exists already; name another file, or replace it with --force")
    for name, default in _PAIR_OPTIONS.items():
        given = getattr(arguments, name)
        if arguments.kind != "pairs" and given not in (None, False):
            raise UsageError(f"--{name} has no effect on --kind {arguments.kind}; it is for --kind pairs")
        if given is None:
            setattr(arguments, name, default)
    if arguments.kind == "corpus" and arguments.split != "train":
        raise UsageError(f"--split {arguments.split}: a corpus is made from the training split alone")


def _rows(arguments: Namespace, testbed: Any) -> tuple[list[dict[str, Any]], dict[str, int]]:
    n, seed, split = arguments.n, arguments.seed, arguments.split
    if arguments.kind == "corpus":
        return [{"text": document} for document in testbed.corpus(n, seed)], {}
    if arguments.kind != "pairs":
        from telos.algorithms.language._rows import testbed_rows

        return testbed_rows(testbed, split, n, seed, arguments.kind == "sft"), {}
    from telos.algorithms.language.preference_data import make_pairs
    from telos.algorithms.run import prepare_threads
    from telos.models.language import LanguageModel

    prepare_threads(arguments.threads)
    model = LanguageModel.load(arguments.model)
    bar = Bar(f"pairs of {testbed.name}", n, unit="pair", quiet=arguments.quiet)
    try:
        return make_pairs(
            model,
            testbed,
            n,
            seed=seed,
            split=split,
            temperature=arguments.temperature,
            label_temperature=arguments.label_temperature,
            noise=arguments.noise,
            with_gold=arguments.with_gold,
            on_progress=bar.update,
        )
    finally:
        bar.close()


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows to a file that appears whole or not at all. Raises `Failure` when the disk refuses."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error.strerror or error)
        raise Failure(f"cannot write {path}: {reason}; nothing was written") from error
    finally:
        with contextlib.suppress(OSError):  # gone when it was renamed, never there when its folder could not be made
            partial.unlink()


def inspect(arguments: Namespace) -> int:
    from telos.data.inspection import inspect as look
    from telos.data.step_readers import holds_steps
    from telos.environments.text.base import TESTBEDS, load_testbed
    from telos.evaluation.report import visible
    from telos.models.language import load_tokenizer

    if holds_steps(arguments.source):
        return step_data.inspect(arguments)
    if arguments.reference is not None:
        raise UsageError("--reference is for data of control")
    source: Any = arguments.source
    if source in TESTBEDS and not Path(source).exists():
        from telos.algorithms.language._rows import testbed_rows

        source = testbed_rows(load_testbed(source), "train", 1000, 0, True)
    found = look(source, load_tokenizer(arguments.tokenizer))
    kind = "conversations" if found.conversational else "text"
    read = "" if found.layout == found.format else f", read as {found.format}"
    head = [
        ["source", arguments.source],
        ["format", f"{found.layout}{read}, {kind}"],
        ["columns", ", ".join(found.columns)],
        ["rows", f"{found.counts.read} read, {found.counts.kept} usable"],
    ]
    if found.counts.extra_columns:
        head.append(["kept for reward functions", ", ".join(found.counts.extra_columns)])
    for what, reasons in (("bad rows", found.counts.dropped), ("noted", found.counts.changed)):
        head += [[f"{what}: {reason}", f"{count} (first: {found.counts.first[reason]})"] for reason, count in reasons.items()]
    head += [["identical rows", str(found.identical_rows)]]
    head += [["rows with a repeated prompt", str(found.repeated_prompts)]] if "prompt" in found.characters else []
    if found.pairs is not None:
        pairs = found.pairs
        head += [
            ["pairs with identical answers", str(pairs.identical)],
            ["chosen is longer", f"in {100 * pairs.chosen_longer:.1f} % of pairs, by {pairs.mean_difference:+.4g} {pairs.unit} on average"],
        ]
    print(text.columns(head, width=text.terminal_width()))
    table = [["LENGTH OF", "UNIT", "MEAN", "MEDIAN", "95 %", "SHORTEST", "LONGEST"]]
    for unit, lengths in (("characters", found.characters), (f"tokens ({arguments.tokenizer})", found.tokens)):
        for name, of in lengths.items():
            table.append([name, unit, *(text.number_text(value) for value in (of.mean, of.median, of.p95, of.shortest, of.longest))])
    print("\n" + text.columns(table))
    print("\nfirst usable row")
    for name, value in found.example.items():
        written = visible(json.dumps(value, ensure_ascii=False))
        print(f"  {name}: {written[:_EXAMPLE]}{f'… ({len(written)} characters)' if len(written) > _EXAMPLE else ''}")
    return 0
