"""From `--data` to encoded tables: files and data sets by the readers of `data`, bundled testbeds by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.language import _degree
from telos.algorithms.language._options import LanguageConfig
from telos.core.errors import UsageError
from telos.core.run import Run
from telos.data.formats import Examples, Format, read_examples
from telos.data.images import located
from telos.data.preferences import Scorer, revision_prompt, reward_augmented, unpaired, with_scores
from telos.data.readers import read_rows
from telos.data.tokenize import Limits, Table, tokenize
from telos.environments.text.base import TESTBEDS, Split, TextTestbed, item_columns, load_testbed

_VERSIONS = "versions of the answers"
_ANSWER = "the data's answer"
_TESTBED_ROWS = 4000  # rows taken from a bundled testbed named in --data; files from `telos data make` can be of any size


def testbed_rows(testbed: TextTestbed, split: Split, n: int | None, seed: int, with_reference: bool) -> list[dict[str, Any]]:
    """Rows of a testbed: prompt (and reference answer as completion), with what its gold judge needs in the column `facts` (JSON)."""
    rows = []
    for item in testbed.items(split, n, seed):
        row = {"prompt": item.prompt, "facts": json.dumps(item.facts), "reference": item.reference, "testbed": testbed.name}
        rows.append(row | item_columns(testbed, item) | ({"completion": item.reference} if with_reference else {}))
    return rows


def _source(config: LanguageConfig, source: str, option: str, wanted: Sequence[Format]) -> Any:
    if not source:
        raise UsageError(
            f"{option} is missing: give a file (JSONL, JSON, CSV, Parquet), a data set's folder or hub id, or a testbed ({', '.join(TESTBEDS)})"
        )
    if source in TESTBEDS and not Path(source).exists():
        if "preference" in wanted:
            raise UsageError(
                f"{option} {source}: a testbed has no preferences of its own; make some with `telos data make {source} --kind pairs --out pairs.jsonl`"
            )
        testbed = load_testbed(source)
        split: Split = "train" if option == "--data" else "validation"
        return testbed_rows(testbed, split, _TESTBED_ROWS, config.seed, "prompt-completion" in wanted)
    return source


def _table(
    config: LanguageConfig,
    source: str,
    option: str,
    model: Any,
    run: Run | None,
    wanted: Sequence[Format],
    change: Callable[[Examples], Examples] | None = None,
    step_separator: Callable[[Examples], str] | None = None,
) -> Table:
    """Reads, checks and encodes; `change` works on the checked rows before they are encoded. `step_separator`: what closes the steps of stepwise rows."""
    rows = located(read_rows(_source(config, source, option, wanted)), source)
    examples = read_examples(rows, wanted, on_bad_row=config.on_bad_row)
    if change is not None:
        examples = change(examples)
    closing = {} if step_separator is None else {"step_separator": step_separator(examples)}
    table = tokenize(examples, model.tokenizer, _limits(config, examples.format, model.context), **closing)
    counts = table.counts
    if run is not None:
        name, found = option.lstrip("-"), fingerprint(table)
        known = run.facts.get(f"rows {name}", {}).get("sha256", found)
        if known != found:
            raise UsageError(
                f"{option} {source} gives other rows than when the run was started, so the run cannot be continued as it was; put the data "
                "(or the tokenizer) back, or start a new run"
            )
        run.describe(**{f"rows {name}": counts.as_dict() | {"sha256": found}})
        if counts.dropped or counts.changed:
            run.warn(f"{option} " + "; ".join(counts.lines()))
    return table


def _limits(config: LanguageConfig, format: Format, context: int) -> Limits:
    prompt, answer = min(config.max_prompt_length, context - 1), config.max_completion_length
    if format == "language-modeling":
        return Limits(max_length=min(context, config.max_prompt_length + answer), overlong=config.overlong)
    if format == "prompt-only":
        return Limits(max_prompt_length=prompt, overlong=config.overlong)
    return Limits(max_prompt_length=prompt, max_completion_length=answer, max_length=context, overlong=config.overlong)


def fingerprint(table: Table) -> str:
    """A SHA-256 of everything in a table that training can depend on."""
    digest = hashlib.sha256(json.dumps([table.extra, table.prompts], sort_keys=True, default=str).encode())
    for name, values in sorted(table.columns.items()):
        arrays = [np.atleast_1d(value) for row in values for value in (row if isinstance(row, list) else [row])]
        digest.update(f"{name} {[len(array) for array in arrays]}".encode())
        digest.update(np.concatenate(arrays).tobytes())
    return digest.hexdigest()


def supervised_table(config: LanguageConfig, source: str, option: str, model: Any, run: Run | None) -> Table:
    return _table(config, source, option, model, run, ("prompt-completion", "language-modeling"))


def pairs_table(
    config: LanguageConfig,
    source: str,
    option: str,
    model: Any,
    run: Run | None,
    *,
    scorer: Scorer | None = None,
    scores: bool = False,
    augmented: bool = False,
    revisions: bool = False,
    degrees: int = 0,
) -> Table:
    """Pairs. `scores`: with the columns of their answers' scores; `augmented`: conditioned on target scores, twice as many; `revisions`: with the
    prompts that show one of the answers and ask for a better one; `degrees`: with so many versions of each answer, of falling content."""

    def change(examples: Examples) -> Examples:
        if scores or augmented:
            examples = with_scores(examples, ("chosen", "rejected"), scorer)
        if augmented:
            examples = reward_augmented(examples)
        if revisions:
            shown = {side: [revision_prompt(row["prompt"], row[side]) for row in examples.records] for side in ("chosen", "rejected")}
            examples = replace(examples, extra=examples.extra | {_shows(side): prompts for side, prompts in shown.items()})
        if degrees:
            texts = [{side: _degree.versions(row[side], degrees) for side in _degree.SIDES} for row in examples.records]
            examples = replace(examples, extra=examples.extra | {_VERSIONS: texts})
        return examples

    table = _table(config, source, option, model, run, ("preference",), change)
    if scores:
        table = table.with_columns(**{name: table.extra[name] for name in ("chosen_score", "rejected_score")})
    if revisions:
        # Such a prompt may be long. It must stay whole at its end, where the prompt comes again, and it must leave room for the longest answer.
        longest = max(len(ids) for side in ("chosen", "rejected") for ids in table.columns[f"{side}_ids"])
        room = Limits(max_prompt_length=model.context - longest)
        for side in ("chosen", "rejected"):
            prompts = read_examples(read_rows([{"prompt": prompt} for prompt in table.extra.pop(_shows(side))]), ("prompt-only",))
            table = table.with_columns(**{f"revise_{side}_ids": tokenize(prompts, model.tokenizer, room).columns["prompt_ids"]})
    if degrees:
        limits = _limits(config, "preference", model.context)
        table = _degree.with_versions(table, table.extra.pop(_VERSIONS), model.tokenizer, limits)
    return table


def _shows(side: str) -> str:
    return f"revision of the {side} answer"


def labelled_table(
    config: LanguageConfig,
    source: str,
    option: str,
    model: Any,
    run: Run | None,
    *,
    scorer: Scorer | None = None,
    labels: bool = False,
    scores: bool = False,
) -> Table:
    """Single answers: with labels from unpaired rows or from the sides of pairs; without, completions are taken too. `scores`: with the column of
    the answers' scores."""
    wanted: tuple[Format, ...] = ("unpaired", "preference") if labels else ("unpaired", "prompt-completion", "preference")

    def change(examples: Examples) -> Examples:
        examples = unpaired(examples)
        return with_scores(examples, ("completion",), scorer) if scores else examples

    table = _table(config, source, option, model, run, wanted, change)
    return table.with_columns(score=table.extra["score"]) if scores else table


def ranked_table(config: LanguageConfig, source: str, option: str, model: Any, run: Run | None) -> Table:
    """Lists of answers from best to worst, from ranked rows or from pairs."""

    def change(examples: Examples) -> Examples:
        if examples.format == "ranked":
            return examples
        records = [
            {name: row[name] for name in ("prompt", "tools") if name in row}
            | {"completions": [row["chosen"], row["rejected"]], "quality": [1.0, 0.0]}
            for row in examples.records
        ]
        return replace(examples, format="ranked", records=records)

    return _table(config, source, option, model, run, ("ranked", "preference"), change)


def stepwise_table(
    config: LanguageConfig,
    source: str,
    option: str,
    model: Any,
    run: Run | None,
    *,
    separator: str | None = None,
    hard: bool = False,
    until_mistake: bool = False,
) -> Table:
    """Answers whose steps have labels. `separator` closes each step that does not end with it; None is what the rows say in a column `step_separator`, else
    a new line. `hard`: every label above 0 is 1; `until_mistake`: nothing after the first label below 1/2 is kept. A column `prompt_label` (the chance of
    success before the first step) becomes the label of a step that ends at −1, the prompt's last token."""

    def change(examples: Examples) -> Examples:
        records = []
        for record in examples.records:
            labels = [float(label > 0) for label in record["labels"]] if hard else record["labels"]
            kept = next((i + 1 for i, label in enumerate(labels) if label < 0.5), len(labels)) if until_mistake else len(labels)
            records.append(record | {"completions": record["completions"][:kept], "labels": labels[:kept]})
        return replace(examples, records=records)

    def closing(examples: Examples) -> str:
        if separator is not None:
            return separator
        said = {"\n" if value is None else str(value) for value in examples.extra.get("step_separator", ["\n"])}
        if len(said) > 1:
            raise UsageError(
                f"{option} {source}: its rows have different step_separator ({', '.join(map(repr, sorted(said)))}); keep them apart"
            )
        return said.pop()

    table = _table(config, source, option, model, run, ("stepwise",), change, closing)
    first = table.extra.get("prompt_label")
    if first is None:
        return table
    for value, place in zip(first, table.places, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            raise UsageError(
                f"{place}: prompt_label must be a number in [0, 1] in every row that has one and in all rows or none, not {value!r}"
            )
    ends = [np.concatenate([[-1], row]) for row in table.columns["step_ends"]]
    labels = [[float(value > 0) if hard else float(value), *row] for value, row in zip(first, table.columns["step_labels"], strict=True)]
    return table.with_columns(step_ends=ends, step_labels=labels)


def prompts_table(
    config: LanguageConfig,
    source: str,
    option: str,
    model: Any,
    run: Run | None,
    change: Callable[[Examples], Examples] | None = None,
) -> Table:
    return _table(config, source, option, model, run, ("prompt-only",), change)


def answered_prompts_table(config: LanguageConfig, source: str, option: str, model: Any, run: Run | None) -> Table:
    """Prompts with the answers that the data have: completions, or the chosen side of pairs."""

    def change(examples: Examples) -> Examples:
        side = "chosen" if examples.format == "preference" else "completion"
        records = [{name: row[name] for name in ("prompt", "tools") if name in row} for row in examples.records]
        return replace(
            examples, format="prompt-only", records=records, extra=examples.extra | {_ANSWER: [row[side] for row in examples.records]}
        )

    table = _table(config, source, option, model, run, ("prompt-completion", "preference"), change)
    answers = [
        {"prompt": prompt, "completion": answer, "label": True}
        for prompt, answer in zip(table.prompts, table.extra.pop(_ANSWER), strict=True)
    ]
    # Whole, whatever their length: a beginning is cut from them.
    room = Limits(max_prompt_length=None, max_completion_length=None)
    encoded = tokenize(read_examples(read_rows(answers), ("unpaired",)), model.tokenizer, room)
    return table.with_columns(answer_ids=encoded.columns["completion_ids"])
