"""What offline alignment shares: soups, the cache of the reference, what is told of the policy, and dotted options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support import World, make_model, numbers, outcome, program_of
from telos.algorithms.language._roles import Reference
from telos.algorithms.run import train
from telos.cli.options import groups_of, parse
from telos.core import discovery
from telos.core.errors import TelosWarning, UsageError
from telos.models.language import LanguageModel


def test_a_soup_is_the_mean_of_its_models_weights(world: World) -> None:
    policy = LanguageModel.load(world.model)
    soup = dict(Reference(policy, f"soup:{world.model},{world.other_model}").model.named_parameters())
    other = dict(LanguageModel.load(world.other_model).named_parameters())
    for name, p in policy.named_parameters():
        torch.testing.assert_close(soup[name], (p + other[name]) / 2)
        assert not soup[name].requires_grad


def test_a_soup_of_one_or_of_other_shapes_is_refused(world: World, tmp_path: Path) -> None:
    policy = LanguageModel.load(world.model)
    with pytest.raises(UsageError, match="at least two models"):
        Reference(policy, f"soup:{world.model}")
    wider = make_model(tmp_path / "wider", intermediate_size=64)
    with pytest.raises(UsageError, match="only models of one shape"):
        Reference(policy, f"soup:{world.model},{wider}")


@pytest.mark.parametrize("loop", ["pairs"])
def test_a_cached_reference_gives_the_same_run_without_a_second_model(world: World, tmp_path: Path, loop: str) -> None:
    options = world.options(loop, eval_data=world.data["preference"], eval_every=2, batch_size=5)
    live = train("dpo", options | {"out": str(tmp_path / "live")})
    for name in ("first", "second"):  # computed, then read
        cached = train("dpo", options | {"out": str(tmp_path / name), "reference_cache": str(tmp_path / "cache")})
        for ours, theirs in zip(numbers(cached), numbers(live), strict=True):
            assert ours.keys() <= theirs.keys()
            for key, value in ours.items():
                assert value == pytest.approx(theirs[key], rel=2e-4, abs=2e-5), key
    assert len(list((tmp_path / "cache").iterdir())) == 2, "one file for the data, one for the held-out rows"
    program = program_of("dpo", options | {"reference_cache": str(tmp_path / "cache")}, tmp_path / "program")
    assert program.reference is None


@pytest.mark.filterwarnings("ignore::telos.core.errors.TelosWarning")
def test_the_cache_knows_other_weights_and_other_data(world: World, tmp_path: Path) -> None:
    options = world.options("pairs", steps=1, reference_cache=str(tmp_path / "cache"))
    for i, change in enumerate(({}, {"reference": world.other_model}, {"data": world.data["preference"]}, {"max_completion_length": 2})):
        train("dpo", options | change | {"out": str(tmp_path / f"{i}")})
        assert len(list((tmp_path / "cache").iterdir())) == i + 1


def test_a_damaged_cache_names_its_file(world: World, tmp_path: Path) -> None:
    options = world.options("pairs", steps=1, reference_cache=str(tmp_path / "cache"))
    train("dpo", options | {"out": str(tmp_path / "run")})
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UsageError, match=f"{file.name} cannot be read.*delete it"):
        train("dpo", options | {"out": str(tmp_path / "again")})


def test_a_run_with_a_cached_reference_resumes_bit_for_bit(world: World, tmp_path: Path) -> None:
    options = world.options("pairs", reference_cache=str(tmp_path / "cache"))
    one, two = (train("dpo", options | {"out": str(tmp_path / name)}) for name in ("one", "two"))
    assert outcome(one) == outcome(two)


def test_every_run_tells_the_kl_entropy_and_length_of_its_policy(world: World, tmp_path: Path) -> None:
    last = numbers(train("dpo", world.options("pairs", out=str(tmp_path / "run"))))[-1]
    assert last["kl"] != 0
    assert 0 < last["entropy"] < 6
    assert last["completions/mean_length"] >= 1
    none = numbers(train("dpo", world.options("pairs", eval_prompts=0, out=str(tmp_path / "none"))))[-1]
    assert "entropy" not in none


def test_at_the_start_the_policys_kl_to_its_reference_is_zero(world: World, tmp_path: Path) -> None:
    program = program_of("dpo", world.options("pairs"), tmp_path / "run")
    assert program._describe_policy()["kl"] == pytest.approx(0, abs=1e-5)


def test_a_fall_of_the_chosen_answers_is_told_once(world: World, tmp_path: Path) -> None:
    program = program_of("dpo", world.options("pairs", steps=60), tmp_path / "run")
    for index in range(29):
        program._watch_chosen(index, {"logps/chosen": -10.0 if index < 10 else -20.0})
    with pytest.warns(TelosWarning, match=r"chosen answers has fallen from -10\.0 to -20\.0"):
        program._watch_chosen(29, {"logps/chosen": -20.0})
    program._watch_chosen(30, {"logps/chosen": -20.0})
    assert len(program.run.warnings()) == 1


def test_chosen_answers_that_stay_likely_are_not_warned_of(world: World, tmp_path: Path) -> None:
    program = program_of("dpo", world.options("pairs", steps=60), tmp_path / "run")
    for index in range(60):
        program._watch_chosen(index, {"logps/chosen": -10.0 + 0.05 * (index % 7)})
    assert program.run.warnings() == []


@pytest.mark.parametrize("written", ["--data.reward_augmented", "--data-reward-augmented", "--data_reward_augmented"])
def test_options_may_be_written_with_dots(written: str) -> None:
    assert parse([written], groups_of(discovery.load("dpo").config)) == {"data_reward_augmented": True}


@pytest.mark.parametrize("options", [{"reference": "tinylm"}, {"reference_cache": "folder"}])
def test_a_reference_is_refused_where_it_makes_no_sense(world: World, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(options))} has no effect on simpo"):
        program_of("simpo", world.options("pairs", **options), tmp_path / "run")


def test_reward_options_without_a_reward_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--reward_timeout has no effect without --reward"):
        program_of("dpo", world.options("pairs", reward_timeout=3.0), tmp_path / "run")
