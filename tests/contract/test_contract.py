"""What every method for language models must keep, whatever its paper says. A new file under `algorithms/language` is tested by being there.

Methods that only choose among samples train nothing. What the contract says of training holds for them as facts: no learner exists and no weight changes.
"""

from __future__ import annotations

import copy
import math
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor

import telos
from support import World, changed, config_of, last_state, make_model, numbers, outcome, program_of, read_json, snapshot
from telos.algorithms.language._roles import Learner
from telos.algorithms.run import resume, train
from telos.core import config as configs
from telos.core import discovery
from telos.core.config import options_of
from telos.core.errors import Failure, UsageError
from telos.core.loop import Interrupted
from telos.core.method import Method
from telos.dataflow import Group

METHODS = [card.key for card in discovery.cards() if card.file is not None and card.family == "language"]
TRAINS_NOTHING = {"sampling", "steps", "search"}
SOURCES = Path(telos.__file__).parent


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Method:
    return discovery.load(request.param)


def learners_of(program: Any) -> dict[str, Group]:
    """The groups that take optimiser steps: by 'policy' and, where there is one, 'critic'."""
    found = {"policy": getattr(program, "learner", None), "critic": getattr(program, "critic_learner", None)}
    return {name: group for name, group in found.items() if group is not None}


def models_of(program: Any) -> dict[str, torch.nn.Module]:
    """Every model that a program holds."""
    critic = getattr(program, "critic_model", None)
    reference = getattr(program, "reference", None)
    reward = getattr(getattr(program, "reward", None), "model", None)
    found = {"policy": program.model, "critic": critic, "reward": reward, "reference": reference.workers[0].model if reference else None}
    return {name: model for name, model in found.items() if model is not None}


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Tensor]]:
    """The gradient that each learner applied first, by the learner's `id`, filled while programs run."""
    found: dict[int, dict[str, Tensor]] = {}
    apply = Learner.apply

    def recording(self: Learner, batch: Any = None) -> dict[str, float]:
        if id(self) not in found:
            found[id(self)] = {name: p.grad.detach().clone() for name, p in self._named if p.grad is not None}
        return apply(self, batch)

    recording.transfer = apply.transfer  # type: ignore[attr-defined]
    monkeypatch.setattr(Learner, "apply", recording)
    return found


def first_gradients(program: Any, found: Mapping[int, Any]) -> dict[str, list[dict[str, Tensor]]]:
    """By learner: the first gradient of each of its workers, after they were added up."""
    program.step(0)
    return {name: [found[id(worker)] for worker in group.workers] for name, group in learners_of(program).items()}


def assert_same_gradient(one: Mapping[str, Tensor], other: Mapping[str, Tensor], relative: float = 1e-5) -> None:
    assert one.keys() == other.keys()
    size = max(float(gradient.abs().max()) for gradient in one.values())
    assert size > 0
    for name, gradient in one.items():
        assert float((gradient - other[name]).abs().max()) <= relative * size, name


def adapters(method: Method, rank: int) -> dict[str, Any]:
    """Options for low-rank adapters; methods that train nothing have none."""
    assert ("lora_rank" in {option.name for option in options_of(method.config)}) == (method.loop not in TRAINS_NOTHING)
    return {"lora_rank": rank} if rank and method.loop not in TRAINS_NOTHING else {}


# Options -------------------------------------------------------------------------------------------------------------------------------


def test_options_survive_yaml_and_mappings(method: Method, world: World, tmp_path: Path) -> None:
    config = config_of(method.key, world.options(method, seed=5, max_prompt_length=17, out=str(tmp_path / "a, b: c")))
    assert configs.from_mapping(method.config, configs.to_mapping(config)) == config
    configs.write_yaml(tmp_path / "config.yaml", configs.to_mapping(config))
    assert configs.from_mapping(method.config, configs.read_yaml(tmp_path / "config.yaml")) == config
    strings = {name: str(value) for name, value in configs.to_mapping(config).items() if isinstance(value, (int, float, bool))}
    assert configs.from_mapping(method.config, configs.to_mapping(config) | strings) == config, "text from a command line is read alike"


def test_an_unknown_option_is_refused_with_a_suggestion_and_leaves_no_folder(method: Method, world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown option 'batch_sise' \(did you mean 'batch_size'\?\)"):
        train(method.key, world.options(method, batch_sise=3, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_wrong_type_is_refused_by_the_options_name(method: Method, world: World) -> None:
    with pytest.raises(UsageError, match=r"option 'batch_size'.*'many'"):
        config_of(method.key, world.options(method, batch_size="many"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, 0)
            for name in ("steps", "batch_size", "log_every", "eval_every", "keep_checkpoints", "max_prompt_length", "max_completion_length")
        ),
        *((name, 0) for name in ("minibatch_size", "epochs", "samples_per_prompt", "n", "temperature", "top_p", "reward_timeout", "beta")),
        *((name, -1) for name in ("seed", "threads", "checkpoint_every", "micro_batch_size", "warmup_steps", "lora_rank", "top_k")),
        *((name, -0.1) for name in ("max_grad_norm", "weight_decay", "lora_dropout", "label_smoothing", "kl_coef", "clip_range", "gamma")),
        *((name, math.nan) for name in ("learning_rate", "critic_learning_rate", "gae_lambda", "adam_beta1", "center_coef")),
    ],
)
def test_a_number_out_of_range_is_refused_by_name_and_leaves_no_folder(
    method: Method, world: World, tmp_path: Path, name: str, value: float
) -> None:
    if name not in {option.name for option in options_of(method.config)}:
        with pytest.raises(UsageError, match=f"unknown option {name!r}"):
            config_of(method.key, world.options(method, **{name: value}))
        return
    with pytest.raises(UsageError, match=rf"{name}\b"):
        train(method.key, world.options(method, **{name: value}, out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


# What it does --------------------------------------------------------------------------------------------------------------------------


def test_a_step_gives_finite_numbers(method: Method, world: World, tmp_path: Path) -> None:
    program = program_of(method.key, world.options(method), tmp_path)
    found = program.step(0)
    assert found
    assert all(math.isfinite(value) for value in found.values()), found
    assert ("loss" in found) == bool(learners_of(program))
    assert program.plan()


@pytest.mark.parametrize("rank", [0, 2])
def test_only_declared_parameters_change(method: Method, world: World, tmp_path: Path, rank: int) -> None:
    program = program_of(method.key, world.options(method, **adapters(method, rank)), tmp_path)
    models = models_of(program)
    before = {name: snapshot(model) for name, model in models.items()}
    for index in range(3):
        program.step(index)
    moved = {name: changed(before[name], snapshot(model)) for name, model in models.items()}
    learners = learners_of(program)
    expected = {"policy", *(["critic"] if "critic" in method.needs else [])} if method.loop not in TRAINS_NOTHING else set()
    assert set(learners) == expected
    for name in models:
        if name not in learners:
            # A reference that is the policy without its adapter lives in the policy's tensors; its base weights are looked at below.
            allowed = moved["policy"] if models[name] is models["policy"] else set()
            assert moved[name] == allowed, f"{name} must stay as it is"
            continue
        declared = {parameter for parameter, _ in learners[name].workers[0]._named}
        assert moved[name] == declared
        if rank:
            assert all(re.search(r"lora_|modules_to_save|^degree\.", parameter) for parameter in declared)
            assert any("lora_" in parameter for parameter in declared)
        else:
            assert declared == {parameter for parameter, _ in models[name].named_parameters()}


def test_files_that_were_given_are_left_as_they_are(method: Method, world: World, tmp_path: Path) -> None:
    given = [path for name in ("model", "reward-model", "data") for path in sorted((world.root / name).rglob("*")) if path.is_file()]
    before = [path.read_bytes() for path in given]
    train(method.key, world.options(method, steps=1, out=str(tmp_path / "run")))
    assert [path.read_bytes() for path in given] == before


def test_the_same_seed_gives_the_same_result_bit_for_bit_and_another_seed_another(method: Method, world: World, tmp_path: Path) -> None:
    runs = [train(method.key, world.options(method, seed=seed, out=str(tmp_path / f"{i}"))) for i, seed in enumerate((3, 3, 4))]
    first, again, other = map(outcome, runs)
    assert first == again
    assert first["metrics"] != other["metrics"]
    # What is never trained on cannot depend on the seed; everything that a method writes must.
    assert first["weights"] != other["weights"] or method.loop in TRAINS_NOTHING
    assert first["samples"] != other["samples"] or method.loop not in TRAINS_NOTHING


class StopAt:
    """Ends a run at a step: by Ctrl-C (a checkpoint of that step is written) or as a kill does (nothing more is written)."""

    def __init__(self, step: int, how: Callable[[], Any]) -> None:
        self.step, self.how = step, how

    def started(self, *_: Any) -> None: ...

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.step:
            self.how()

    def ended(self, status: str) -> None: ...


class Killed(BaseException):
    pass


def kill() -> None:
    raise Killed


def all_that_continues(method: Method, world: World, rank: int) -> dict[str, Any]:
    """Options under which a run has every kind of state that it can have: schedules, cursors, running statistics, adapted coefficients, noise."""
    if method.loop == "iterative":
        return {"warmup_steps": 2, "lr_schedule": "cosine"}
    if method.loop == "rollouts":
        critic = {"critic_warmup": 1} if "critic" in method.needs else {}
        moving = {"reference_share": 0.3} if "reference" in method.needs and not rank else {}
        if moving and "kl_coef" in {option.name for option in options_of(method.config)}:
            moving["kl_coef"] = 0.1  # 0 by default in some, which keeps no reference
        pretrain = {"pretrain_data": world.data["language-modeling"], "pretrain_coef": 0.1}
        return pretrain | critic | moving | {"lr_schedule": "cosine", "log_rewards": True}
    if method.loop in TRAINS_NOTHING:
        return {}
    return {"eval_data": world.options(method)["data"], "eval_every": 2, "warmup_steps": 2, **({"lora_dropout": 0.3} if rank else {})}


@pytest.mark.parametrize("rank", [0, 2])
def test_resuming_equals_the_uninterrupted_run_bit_for_bit(method: Method, world: World, tmp_path: Path, rank: int) -> None:
    options = world.options(method, steps=6, **adapters(method, rank), **all_that_continues(method, world, rank))
    whole = train(method.key, options | {"out": str(tmp_path / "whole")})

    interrupted = tmp_path / "interrupted"
    with pytest.raises(Interrupted, match="stopped after step 3 of 6"):
        train(method.key, options | {"out": str(interrupted)}, callbacks=[StopAt(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert read_json(interrupted / "run.json")["status"] == "interrupted"

    killed = tmp_path / "killed"
    with pytest.raises(Killed):
        train(method.key, options | {"out": str(killed), "checkpoint_every": 2}, callbacks=[StopAt(3, kill)])
    assert [row["step"] for row in telos.core.run.Run.open(killed).metrics()] == [1, 2, 3], "the killed run was a step past its checkpoint"

    for folder in (interrupted, killed):
        resumed = resume(folder)
        assert outcome(resumed) == outcome(whole)
        assert last_state(resumed) == last_state(whole)
        assert resumed.facts["status"] == "finished"


def test_a_finished_run_is_left_as_it_is_by_resuming(method: Method, world: World, tmp_path: Path) -> None:
    run = train(method.key, world.options(method, steps=1, out=str(tmp_path / "run")))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    resume(run.path)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_run_whose_data_have_changed_is_not_continued(method: Method, world: World, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    text = Path(world.options(method)["data"]).read_text(encoding="utf-8")
    data.write_text(text, encoding="utf-8")
    with pytest.raises(Killed):
        train(
            method.key,
            world.options(method, data=str(data), checkpoint_every=1, out=str(tmp_path / "run")),
            callbacks=[StopAt(2, kill)],
        )
    data.write_text(text.replace("The sky", "The sea"), encoding="utf-8")
    with pytest.raises(UsageError, match=r"--data .* gives other rows than when the run was started"):
        resume(tmp_path / "run")
    data.write_text(text, encoding="utf-8")
    assert resume(tmp_path / "run").facts["status"] == "finished"


class Poison(StopAt):
    """Makes one weight NaN before the first step."""

    def __init__(self) -> None:
        super().__init__(0, kill)

    def started(self, run: Any, program: Any, first: int, total: int) -> None:
        with torch.no_grad():
            next(program.model.parameters()).fill_(math.nan)


def test_weights_that_are_not_numbers_end_the_run_with_one_clear_error(method: Method, world: World, tmp_path: Path) -> None:
    with pytest.raises(Failure) as caught:
        train(method.key, world.options(method, out=str(tmp_path / "run")), callbacks=[Poison()])
    assert re.search(r"nan|not finite|not a number|not numbers", str(caught.value), re.IGNORECASE)
    assert read_json(tmp_path / "run" / "run.json")["status"] == "failed"
    assert not (tmp_path / "run" / "model").exists()
    if (
        method.loop not in ("rollouts", "iterative", *TRAINS_NOTHING) and "samples" not in method.needs
    ):  # there the engine refuses before there is a batch
        assert (tmp_path / "run" / "not-finite.safetensors").is_file()


@pytest.mark.filterwarnings("default::telos.core.errors.TelosWarning")
@pytest.mark.parametrize("longest", [1, 2])
def test_texts_cut_to_almost_nothing_give_finite_numbers(method: Method, world: World, tmp_path: Path, longest: int) -> None:
    options = world.options(method, max_prompt_length=longest, max_completion_length=longest)
    program = program_of(method.key, options, tmp_path)
    for index in range(2):
        assert all(math.isfinite(value) for value in program.step(index).values())


def one_update(method: Method) -> dict[str, Any]:
    """Options under which the first gradient is that of several micro-batches' worth of rows."""
    return {"minibatch_size": 8, "epochs": 1} if method.loop in ("rollouts", "iterative") else {}


def test_micro_batches_change_no_gradient(method: Method, world: World, tmp_path: Path, gradients: dict[int, Any]) -> None:
    if method.loop in TRAINS_NOTHING:
        assert "micro_batch_size" not in {option.name for option in options_of(method.config)}
        return
    found = []
    for size in (0, 1, 3):
        options = world.options(method, micro_batch_size=size, learning_rate=1e-5, **one_update(method))
        program = program_of(method.key, options, tmp_path / f"{size}")
        found.append(first_gradients(program, gradients))
    for name in found[0]:
        for other in found[1:]:
            assert_same_gradient(found[0][name][0], other[name][0])


def test_two_workers_give_the_gradient_and_the_weights_of_one(
    method: Method, world: World, tmp_path: Path, gradients: dict[int, Any]
) -> None:
    options = world.options(method, batch_size=5, **one_update(method))  # an odd number of rows for two workers
    alone = program_of(method.key, options, tmp_path / "1")
    pair = program_of(method.key, options, tmp_path / "2")
    if method.loop in TRAINS_NOTHING:
        alone.step(0)
        assert learners_of(alone) == {}
        assert all(parameter.grad is None for parameter in alone.model.parameters())
        return
    for attribute in ("learner", "critic_learner"):
        if hasattr(pair, attribute):
            first: Learner = getattr(pair, attribute).workers[0]
            second = Learner(copy.deepcopy(first.model), first.config, first.optimiser_steps)
            setattr(pair, attribute, Group([first, second]))
    one, two = first_gradients(alone, gradients), first_gradients(pair, gradients)
    for name, (gradient,) in one.items():
        assert_same_gradient(gradient, two[name][0])
        assert two[name][0].keys() == two[name][1].keys()
        assert all(torch.equal(two[name][0][key], two[name][1][key]) for key in two[name][0]), "replicas must apply the same gradient"
    for group in learners_of(pair).values():
        replicas = [snapshot(worker.model) for worker in group.workers]
        assert changed(*replicas) == set(), "replicas must stay equal"


def test_recomputing_activations_changes_no_gradient(
    method: Method, world: World, tmp_path: Path, gradients: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if method.loop in TRAINS_NOTHING:
        assert "gradient_checkpointing" not in {option.name for option in options_of(method.config)}
        return
    recomputed = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: recomputed.append(1) or original(*a, **k))
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", torch.utils.checkpoint.checkpoint)
    found = []
    for on in (False, True):
        options = world.options(method, gradient_checkpointing=on, **one_update(method))
        found.append(first_gradients(program_of(method.key, options, tmp_path / f"{on}"), gradients))
        assert bool(recomputed) == on
    for name in found[0]:
        assert_same_gradient(found[0][name][0], found[1][name][0])


@pytest.mark.parametrize("rank", [0, 2])
def test_an_encoder_decoder_is_aligned_like_any_other_model(
    method: Method, world: World, tmp_path: Path, gradients: dict[int, Any], rank: int
) -> None:
    if method.loop not in ("pairs", "unpaired", "ranked", "iterative", "rollouts"):
        return
    if method.sample is not None or method.key == "mrt":  # from beginnings of answers
        with pytest.raises(UsageError, match="an encoder–decoder cannot go on from the beginning of an answer"):
            program_of(method.key, world.options(method, model=world.encoder_decoder), tmp_path).step(0)
        return
    found = []
    sampled = method.loop in ("iterative", "rollouts")
    many = {"samples_per_prompt": 8, "minibatch_size": 32} if sampled else {}  # so that some of a random model's answers differ
    for size in (0, 1):
        common = {**adapters(method, rank), **one_update(method), **many}
        options = world.options(method, model=world.encoder_decoder, micro_batch_size=size, **common)
        program = program_of(method.key, options, tmp_path / f"{size}")
        found.append(first_gradients(program, gradients)["policy"][0])
    assert_same_gradient(*found)
    run = train(method.key, options | {"steps": 1, "out": str(tmp_path / "run")})
    assert (run.path / "model" / ("adapter_config.json" if rank else "config.json")).is_file()
    if not rank:
        transformers.AutoModelForSeq2SeqLM.from_pretrained(run.path / "model")


@pytest.mark.parametrize("habit", [{"padding_side": "left"}, {"pad_is_eos": True}])
def test_how_the_tokenizer_pads_changes_nothing(method: Method, world: World, tmp_path: Path, habit: dict[str, Any]) -> None:
    folder = make_model(tmp_path / "model", **habit)
    runs = []
    for i, model in enumerate((world.model, str(folder))):
        runs.append(train(method.key, world.options(method, steps=2, model=model, out=str(tmp_path / f"{i}"))))
    assert numbers(runs[0]) == numbers(runs[1])
    assert outcome(runs[0])["samples"] == outcome(runs[1])["samples"]


def test_the_config_that_was_asked_for_is_the_one_written_down(method: Method, world: World, tmp_path: Path) -> None:
    options = world.options(method, steps=1, out=str(tmp_path / "run"))
    run = train(method.key, options)
    written = yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8"))
    assert configs.from_mapping(method.config, written) == config_of(method.key, options)
    assert written.keys() == {option.name for option in options_of(method.config)}
    again = train(method.key, {"out": str(tmp_path / "again")}, config_file=str(run.path / "config.yaml"))
    assert outcome(again) == outcome(run), "config.yaml repeats the run"
