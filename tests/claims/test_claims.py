"""Claims are decided by their intervals alone, on seeds that no tuning can have seen; and every recipe's smoke run measures what its facts name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from telos.catalogue.claims import Budget, Claim, Fact, claim_of, decide, run_claim
from telos.catalogue.status import entries
from telos.core.errors import UsageError
from telos.core.seeds import seed_in

RECIPES = [entry.key for entry in entries() if entry.recipe]


def claim_with(facts: tuple[Fact, ...], figures: list[dict[str, float]]) -> dict:
    claim = Claim(key="dpo", statement="s", baselines=(), facts=facts, experiment=lambda *_: {}, budgets={"full": Budget(1, {})})
    return decide(claim, "full", [{"seed": i, "figures": row} for i, row in enumerate(figures)])


ABOVE, BELOW = Fact("x above 0", "x", ">", 0.0), Fact("x below 0", "x", "<", 0.0)


@pytest.mark.parametrize(
    ("fact", "values", "verdict"),
    [
        (ABOVE, [1.0, 2.0, 3.0], "supported"),
        (ABOVE, [-1.0, -2.0, -3.0], "not supported"),
        (ABOVE, [-5.0, 1.0, 5.0], "inconclusive"),
        (ABOVE, [0.0, 0.0, 0.0], "not supported"),
        (BELOW, [-1.0, -2.0, -3.0], "supported"),
        (BELOW, [1.0, 2.0, 3.0], "not supported"),
        (BELOW, [0.0, 0.0, 0.0], "not supported"),
        (ABOVE, [1.0], "inconclusive"),  # one seed has no interval
    ],
)
def test_a_fact_is_decided_by_its_whole_interval(fact: Fact, values: list[float], verdict: str) -> None:
    assert claim_with((fact,), [{"x": value} for value in values])["verdict"] == verdict


def test_a_claim_fails_when_one_of_its_facts_fails() -> None:
    facts = (ABOVE, Fact("y above 0", "y", ">", 0.0))
    assert claim_with(facts, [{"x": 1.0, "y": -1.0}, {"x": 2.0, "y": -2.0}])["verdict"] == "not supported"
    assert claim_with(facts, [{"x": 1.0, "y": -1.0}, {"x": 2.0, "y": 2.0}])["verdict"] == "inconclusive"


def test_a_fact_about_a_figure_that_was_not_measured_is_refused() -> None:
    with pytest.raises(UsageError, match="measured no figure 'x'"):
        claim_with((ABOVE,), [{"y": 1.0}])


def test_claims_run_on_reporting_seeds_and_finished_seeds_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def experiment(root: Path, seed: int, settings: dict, watch: object) -> dict[str, float]:
        root.mkdir(parents=True, exist_ok=True)
        seen.append(seed)
        return {"x": float(len(seen))}

    budgets = {"full": Budget(3, {}), "smoke": Budget(1, {})}
    claim = Claim(key="dpo", statement="s", baselines=(), facts=(ABOVE,), experiment=experiment, budgets=budgets)
    monkeypatch.setattr("telos.catalogue.claims.require_claim", lambda key: claim)
    record = run_claim("dpo", "full", root=tmp_path / "run", records=tmp_path / "claims")
    assert seen == [seed_in("reporting", i) for i in range(3)]
    again = run_claim("dpo", "full", root=tmp_path / "run", records=tmp_path / "claims")
    assert len(seen) == 3
    assert record["verdict"] == again["verdict"] == "supported"
    written = json.loads((tmp_path / "claims" / "dpo.json").read_text())
    assert [row["figures"]["x"] for row in written["seeds"]] == [1.0, 2.0, 3.0]
    run_claim("dpo", "smoke", root=tmp_path / "smoke")
    assert seen[3:] == [seed_in("tuning", 0)]


def test_every_ready_system_has_a_claim() -> None:
    assert {"dpo", "simpo", "ppo-max"} <= set(RECIPES)
    for key in RECIPES:
        claim = claim_of(key)
        assert claim is not None
        assert claim.key == key
        assert {"smoke", "full"} <= set(claim.budgets)
        assert claim.budgets["full"].seeds >= 3


@pytest.mark.parametrize("key", RECIPES)
@pytest.mark.filterwarnings("ignore::telos.core.errors.TelosWarning")
def test_the_smoke_run_measures_every_figure_of_the_facts(key: str, tmp_path: Path) -> None:
    record = run_claim(key, "smoke", root=tmp_path)
    claim = claim_of(key)
    assert claim is not None
    assert {fact.figure for fact in claim.facts} <= set(record["figures"])
    assert record["verdict"] in {"inconclusive", "not supported"}  # one seed decides nothing in a claim's favour
