"""From `--data` to encoded tables: files and data sets by the readers of `data`, bundled testbeds by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from telos.algorithms.language._options import LanguageConfig
from telos.core.errors import UsageError
from telos.core.run import Run
from telos.data.formats import Format, read_examples
from telos.data.readers import read_rows
from telos.data.tokenize import Limits, Table, tokenize
from telos.environments.text.base import TESTBEDS, Split, TextTestbed, load_testbed

_TESTBED_ROWS = 4000  # rows taken from a bundled testbed named in --data; files from `telos data make` can be of any size


def testbed_rows(testbed: TextTestbed, split: Split, n: int | None, seed: int, with_reference: bool) -> list[dict[str, Any]]:
    """Rows of a testbed: prompt (and reference answer as completion), with what its gold judge needs in the column `facts` (JSON)."""
    rows = []
    for item in testbed.items(split, n, seed):
        row = {"prompt": item.prompt, "facts": json.dumps(item.facts), "reference": item.reference, "testbed": testbed.name}
        rows.append(row | ({"completion": item.reference} if with_reference else {}))
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


def _table(config: LanguageConfig, source: str, option: str, model: Any, run: Run | None, wanted: Sequence[Format]) -> Table:
    rows = read_rows(_source(config, source, option, wanted))
    examples = read_examples(rows, wanted, on_bad_row=config.on_bad_row)
    context = model.context
    limits = {
        "language-modeling": Limits(
            max_length=min(context, config.max_prompt_length + config.max_completion_length), overlong=config.overlong
        ),
        "prompt-only": Limits(max_prompt_length=min(config.max_prompt_length, context - 1), overlong=config.overlong),
    }.get(
        examples.format,
        Limits(
            max_prompt_length=min(config.max_prompt_length, context - 1),
            max_completion_length=config.max_completion_length,
            max_length=context,
            overlong=config.overlong,
        ),
    )
    table = tokenize(examples, model.tokenizer, limits)
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


def fingerprint(table: Table) -> str:
    """A SHA-256 of everything in a table that training can depend on."""
    digest = hashlib.sha256(json.dumps([table.extra, table.prompts], sort_keys=True, default=str).encode())
    for name, values in sorted(table.columns.items()):
        arrays = [np.atleast_1d(value) for value in values]
        digest.update(f"{name} {[len(array) for array in arrays]}".encode())
        digest.update(np.concatenate(arrays).tobytes())
    return digest.hexdigest()


def supervised_table(config: LanguageConfig, source: str, option: str, model: Any, run: Run | None) -> Table:
    return _table(config, source, option, model, run, ("prompt-completion", "language-modeling"))


def pairs_table(config: LanguageConfig, source: str, option: str, model: Any, run: Run | None) -> Table:
    return _table(config, source, option, model, run, ("preference",))


def prompts_table(config: LanguageConfig, source: str, option: str, model: Any, run: Run | None) -> Table:
    return _table(config, source, option, model, run, ("prompt-only",))
