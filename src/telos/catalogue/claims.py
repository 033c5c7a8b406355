"""Claims: what a system's run must show, decided by figures over seeds, and written down as it fell.

A claim is a list of facts. A fact names a figure that the experiment measures once per reporting seed, and a bound; its interval (bootstrap
of the interquartile mean over seeds, 95 %) decides: *supported* when the whole interval satisfies the bound, *not supported* when the whole
interval violates it, *inconclusive* otherwise. The claim is supported when all its facts are, not supported when one is not, and
inconclusive otherwise.

The full budget runs on the reporting range of seeds (`core.seeds`), which no tuning can have seen; a smoke run takes tuning seeds. With
three to five seeds a percentile bootstrap is somewhat too narrow; records therefore carry every seed's figures.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from telos.catalogue.status import records_folder
from telos.catalogue.systems import find
from telos.core.errors import UsageError, did_you_mean
from telos.core.run import commit, hardware, versions, write_atomically
from telos.core.seeds import seed_in
from telos.evaluation.statistics import Interval, bootstrap_interval

Verdict = Literal["supported", "not supported", "inconclusive"]


@dataclass(frozen=True)
class Fact:
    """`figure` `relation` `bound`, in the figure's unit: for example "gold gain over SFT" > 0."""

    statement: str
    figure: str
    relation: Literal[">", "<"]
    bound: float

    def decide(self, interval: Interval) -> Verdict:
        if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
            return "inconclusive"
        low, high = (interval.low, interval.high) if self.relation == ">" else (-interval.high, -interval.low)
        bound = self.bound if self.relation == ">" else -self.bound
        return "supported" if low > bound else "not supported" if high <= bound else "inconclusive"


@dataclass(frozen=True)
class Budget:
    """How much an experiment may spend. `settings` are handed to it."""

    seeds: int
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a system must show. `experiment(root, seed, settings, watch)` measures every figure for one seed, in a folder of its own."""

    key: str  # of the system
    statement: str
    baselines: tuple[str, ...]
    facts: tuple[Fact, ...]
    experiment: Callable[..., Mapping[str, float]]
    budgets: Mapping[str, Budget]  # "smoke" decides nothing and takes under a minute or two; "full" decides
    notes: str = ""  # departures of scale, known limits
    settings: Mapping[str, Any] = field(default_factory=dict)


def claim_of(key: str) -> Claim | None:
    """The claim in the system's recipe, or None while it has none."""
    system = find(key)
    name = f"telos.catalogue.{system.family.replace('-', '_')}.{system.key.replace('-', '_')}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            return None
        raise
    return module.CLAIM


def require_claim(key: str) -> Claim:
    claim = claim_of(key)
    if claim is None:
        raise UsageError(f"{find(key).key} is planned: it has no recipe yet; `telos list --status ready` shows what can be run")
    return claim


def budget_of(claim: Claim, name: str) -> Budget:
    if name not in claim.budgets:
        raise UsageError(f"--budget {name!r} is unknown{did_you_mean(name, claim.budgets)}; there are {', '.join(claim.budgets)}")
    return claim.budgets[name]


def run_claim(
    key: str, budget: str = "full", *, root: Path | None = None, records: Path | None = None, watch: Any = None
) -> dict[str, Any]:
    """Runs a claim and writes the record: `claims/<key>.json` for the full budget, in the run's folder for others.

    A run that was interrupted is continued; seeds that are done are not run again.
    """
    claim = require_claim(key)
    plan = budget_of(claim, budget)
    root = root or Path("runs") / "claims" / f"{claim.key}-{budget}"
    seeds = [seed_in("reporting" if budget == "full" else "tuning", i) for i in range(plan.seeds)]
    started = time.time()
    per_seed = []
    for seed in seeds:
        done = root / str(seed) / "figures.json"
        if not done.exists():
            figures = {name: float(value) for name, value in claim.experiment(root / str(seed), seed, plan.settings, watch).items()}
            write_atomically(done, json.dumps(figures))
        per_seed.append({"seed": seed, "figures": json.loads(done.read_text(encoding="utf-8"))})
    record = decide(claim, budget, per_seed) | {
        "commit": commit(),
        "settings": dict(plan.settings),
        "versions": versions(),
        "hardware": hardware(),
        "seconds": round(time.time() - started),
        "date": time.strftime("%Y-%m-%d"),
    }
    folder = (records or records_folder()) if budget == "full" else root
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{claim.key}.json", json.dumps(record, indent=1) + "\n")
    return record | {"path": str(folder / f"{claim.key}.json")}


def decide(claim: Claim, budget: str, per_seed: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The record's figures and verdicts from every seed's figures."""
    names = list(per_seed[0]["figures"])
    intervals = {name: bootstrap_interval([row["figures"][name] for row in per_seed]) for name in names}
    facts = []
    for fact in claim.facts:
        if fact.figure not in intervals:
            raise UsageError(f"{claim.key}: the experiment measured no figure {fact.figure!r}; it measured {', '.join(names)}")
        interval = intervals[fact.figure]
        facts.append(dataclasses.asdict(fact) | {"interval": interval.as_dict(), "verdict": fact.decide(interval)})
    verdicts = {fact["verdict"] for fact in facts}
    overall: Verdict = "not supported" if "not supported" in verdicts else "inconclusive" if "inconclusive" in verdicts else "supported"
    system = find(claim.key)
    return {
        "key": claim.key,
        "system": system.s,
        "title": system.title,
        "budget": budget,
        "statement": claim.statement,
        "baselines": list(claim.baselines),
        "verdict": overall,
        "facts": facts,
        "figures": {name: interval.as_dict() for name, interval in intervals.items()},
        "seeds": [dict(row) for row in per_seed],
        "notes": claim.notes,
    }
