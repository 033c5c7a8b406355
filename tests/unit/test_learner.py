"""The learner and the reference: what an optimiser step is, what it is not, and from which distribution a policy is kept."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import telos
from data_fixtures import tiny_tokenizer
from support import World, program_of, snapshot
from telos.algorithms.language._options import TrainingConfig, load_policy
from telos.algorithms.language._roles import Learner, Reference
from telos.algorithms.learning import learning_rate_at
from telos.algorithms.run import train
from telos.core.errors import UsageError
from telos.core.loop import NotFinite
from telos.functional.reduction import Denominators, Losses
from telos.models.language import LanguageModel
from telos.models.packing import Answers


class Line(nn.Module):
    """y = w x, so that every gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.frozen = nn.Parameter(torch.tensor([5.0]), requires_grad=False)


def squared(model: Line, x: torch.Tensor, *_: Any) -> Losses:
    return Losses((model.w * x).sum(-1) ** 2, metrics={"mean": x.sum(-1)})


def learner(**options: Any) -> Learner:
    return Learner(Line(), TrainingConfig(**{"learning_rate": 0.1, "lr_schedule": "constant", "max_grad_norm": 0.0} | options), 10)


X = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.5, -1.0]])


# One optimiser step -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1, *(0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8))]),
    ],
)
def test_learning_rates_step_by_step(schedule: Any, wanted: list[float]) -> None:
    config = TrainingConfig(learning_rate=1.0, lr_schedule=schedule, warmup_steps=2)
    assert [learning_rate_at(config, step, 10) for step in range(10)] == pytest.approx(wanted)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_the_gradient_of_the_mean_by_hand(size: int) -> None:
    """Losses (w·x)² are 1, 1 and 6.25; the gradient of their mean is Σ 2 (w·x) x / 3."""
    one = learner(micro_batch_size=size)
    found = one.accumulate(X, losses=squared, denominators=Denominators(3, 1))
    assert found["loss"] == pytest.approx((1 + 1 + 6.25) / 3)
    assert found["metrics"]["mean"] == pytest.approx((1 + 2 - 0.5, 3))
    wanted = (2 * (X @ torch.tensor([1.0, -2.0]))[:, None] * X).sum(0) / 3
    assert one.model.w.grad is not None  # type: ignore[union-attr]
    torch.testing.assert_close(one.model.w.grad, wanted)  # type: ignore[union-attr]


def test_the_first_adamw_step_by_hand() -> None:
    """Its first step is −lr · sign(g), after the decay w ← w (1 − lr λ)."""
    one = learner(weight_decay=0.5)
    one.accumulate(X, losses=squared, denominators=Denominators(3, 1))
    gradient = one.model.w.grad.clone()  # type: ignore[union-attr]
    found = one.apply()
    wanted = torch.tensor([1.0, -2.0]) * (1 - 0.1 * 0.5) - 0.1 * gradient.sign()
    torch.testing.assert_close(one.model.w.detach(), wanted, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]
    assert found == {"grad_norm": pytest.approx(float(gradient.norm())), "learning_rate": 0.1}
    assert one.model.w.grad is None  # type: ignore[union-attr]
    assert one.model.frozen.item() == 5.0  # type: ignore[union-attr]


def test_gradients_are_scaled_down_to_the_norm_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    one = learner(max_grad_norm=0.25)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(one.optimiser, "step", lambda: seen.append(one.model.w.grad.clone()))  # type: ignore[union-attr]
    one.accumulate(X, losses=squared, denominators=Denominators(3, 1))
    before = one.model.w.grad.clone()  # type: ignore[union-attr]
    norm = one.apply()["grad_norm"]
    assert norm == pytest.approx(float(before.norm())), "what is logged is the norm before"
    torch.testing.assert_close(seen[0], before * 0.25 / before.norm(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_touches_no_weight(bad: float) -> None:
    one = learner()
    before = snapshot(one.model)
    one.accumulate(torch.tensor([[bad, 1.0]]), losses=squared, denominators=Denominators(1, 1))
    with pytest.raises(NotFinite, match=r"optimiser step 1: the gradient's norm is (nan|inf)") as caught:
        one.apply({"x": X})
    assert torch.equal(caught.value.batch["x"], X)
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(one.model).items())
    assert (one.applied, one.model.w.grad) == (0, None)  # type: ignore[union-attr]


def test_a_model_without_trainable_parameters_is_refused() -> None:
    model = Line()
    model.requires_grad_(False)
    with pytest.raises(UsageError, match=r"no parameter of .* is trainable: nothing would be learned"):
        Learner(model, TrainingConfig(), 1)


def test_state_of_other_parameters_is_refused() -> None:
    state = learner().state()
    state["weights"] = {"other": torch.zeros(1)}
    with pytest.raises(UsageError, match="other parameters than this model trains"):
        learner().load(state)


def test_assessing_leaves_no_trace() -> None:
    one = learner()
    before = snapshot(one.model)
    found = one.assess(X, losses=squared, denominators=Denominators(3, 1))
    assert found["loss"] == pytest.approx((1 + 1 + 6.25) / 3)
    assert one.model.w.grad is None  # type: ignore[union-attr]
    assert all(torch.equal(before[name], tensor) for name, tensor in snapshot(one.model).items())


# Dropout ----------------------------------------------------------------------------------------------------------------------------------


def answers() -> Answers:
    ids = torch.arange(24).view(4, 6) + 10
    return Answers(ids[:, :2], torch.tensor([2, 1, 2, 2]), ids[:, 2:], torch.tensor([4, 3, 2, 1]), torch.arange(4))


def likelihood(model: Any, batch: torch.Tensor, *_: Any) -> Losses:
    return Losses(-model.logprobs(answers()).logprobs, answers().mask)


def gradient_of(one: Learner) -> dict[str, torch.Tensor]:
    one.accumulate(torch.zeros(4), losses=likelihood, denominators=Denominators(4, 10))
    return {name: p.grad.clone() for name, p in one._named if p.grad is not None}


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with dropout of its own, as many have."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    words = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(words), n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=words.eos_token_id,
        resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_models_own_dropout_is_off_while_it_learns(gpt2: str, recompute: bool) -> None:
    """Else the first ratio of an on-policy update would not be 1, and recomputing activations would change the gradient."""
    config = TrainingConfig(model=gpt2, device="cpu", gradient_checkpointing=recompute)
    one = Learner(load_policy(config), config, 1)
    first = gradient_of(one)
    one.optimiser.zero_grad()
    second = gradient_of(one)
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name]), name
    plain = TrainingConfig(model=gpt2, device="cpu")
    for name, gradient in gradient_of(Learner(load_policy(plain), plain, 1)).items():
        torch.testing.assert_close(gradient, first[name], rtol=1e-4, atol=1e-6)
    assert not any(module.training for module in one.model.modules())


def test_the_adapters_dropout_is_on_while_gradients_are_taken_and_only_then(world: World) -> None:
    config = TrainingConfig(model=world.model, device="cpu", lora_rank=4, lora_dropout=0.5)
    policy = load_policy(config)
    one = Learner(policy, config, 1)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
    with torch.no_grad():
        quiet = policy.logprobs(answers()).logprobs
        torch.testing.assert_close(quiet, policy.logprobs(answers()).logprobs)
    first = gradient_of(one)
    one.optimiser.zero_grad()
    second = gradient_of(one)
    assert any(not torch.equal(first[name], second[name]) for name in first), "dropout draws anew each time"
    with torch.no_grad():
        assert torch.equal(policy.logprobs(answers()).logprobs, quiet), "and is off again afterwards"
    reference = Reference(policy)
    with torch.no_grad():
        again = [reference.logprobs(torch.zeros(4), layout=lambda _: answers(), kinds=1) for _ in range(2)]
    assert torch.equal(*again)


# The reference ----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a trained adapter, far from its base."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    run = train("sft", world.options("supervised", steps=20, learning_rate=0.05, lora_rank=4, out=str(out)))
    assert (run.path / "model" / "adapter_config.json").is_file()
    assert not (run.path / "model" / "config.json").exists()
    return str(run.path / "model")


@pytest.mark.parametrize("start", ["full", "new adapter", "trained adapter"])
def test_at_the_first_step_the_reference_is_the_policy(world: World, adapter: str, tmp_path: Path, start: str) -> None:
    """All implicit rewards are 0 and the loss is log 2: the reference is the policy as it is at the start, adapter and all."""
    options = {"full": {}, "new adapter": {"lora_rank": 2}, "trained adapter": {"model": adapter}}[start]
    program = program_of("dpo", world.options("pairs", **options), tmp_path)
    found = program.step(0)
    assert found["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)
    assert found["rewards/rejected"] == pytest.approx(0.0, abs=1e-5)
    assert found["loss"] == pytest.approx(math.log(2), abs=1e-5)
    second = program.step(1)
    assert second["rewards/margins"] != pytest.approx(0.0, abs=1e-4), "the policy has left it"


def test_the_reference_of_a_new_adapter_costs_no_second_model(world: World, tmp_path: Path) -> None:
    shared = program_of("dpo", world.options("pairs", lora_rank=2), tmp_path / "1")
    assert shared.reference.workers[0].model is shared.model
    assert program_of("simpo", world.options("pairs"), tmp_path / "2").reference is None, "a method without reference has none in memory"


def test_another_reference_is_the_one_that_was_named(world: World, tmp_path: Path) -> None:
    program = program_of("dpo", world.options("pairs", reference=world.other_model), tmp_path)
    other = LanguageModel.load(world.other_model, device="cpu")
    theirs = snapshot(program.reference.workers[0].model)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in snapshot(other).items())


def test_a_reference_of_another_vocabulary_is_refused(world: World, tmp_path: Path) -> None:
    words = tiny_tokenizer()
    words.add_tokens(["<|extra|>"])
    folder = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(world.model).save_pretrained(folder)
    words.save_pretrained(folder)
    with pytest.raises(UsageError, match="another vocabulary"):
        program_of("dpo", world.options("pairs", reference=str(folder)), tmp_path / "run")


def test_an_adapter_on_an_adapter_is_refused(world: World, adapter: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--lora_rank: .* is an adapter already"):
        program_of("dpo", world.options("pairs", model=adapter, lora_rank=2), tmp_path)


def test_adapter_options_without_a_rank_are_refused_by_name(world: World) -> None:
    for name, value in (("lora_alpha", 8.0), ("lora_dropout", 0.1), ("lora_targets", ("q_proj",))):
        with pytest.raises(UsageError, match=f"--{name} has no effect while --lora_rank is 0"):
            dataclasses.replace(TrainingConfig(), **{name: value})


# What a run leaves behind -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(("key", "loop"), [("sft", "supervised"), ("dpo", "pairs"), ("ppo-max", "rollouts")])
def test_a_trained_policy_opens_with_the_usual_libraries_alone(world: World, tmp_path: Path, key: str, loop: str, rank: int) -> None:
    run = train(key, world.options(loop, steps=2, lora_rank=rank, out=str(tmp_path / "run")))
    ours = telos.load(run.path)
    assert isinstance(ours, LanguageModel)
    if rank:
        from peft import PeftModel

        base = json.loads((run.path / "model" / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        theirs: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run.path / "model").eval()
    else:
        theirs = AutoModelForCausalLM.from_pretrained(run.path / "model").eval()
    ids = torch.tensor([[20, 30, 40, 50]])
    with torch.no_grad():
        wanted = torch.log_softmax(theirs(input_ids=ids).logits[0], -1)[torch.arange(3), ids[0, 1:]]
        batch = Answers(ids[:, :1], torch.tensor([1]), ids[:, 1:], torch.tensor([3]), torch.tensor([0]))
        torch.testing.assert_close(ours.logprobs(batch).logprobs[0], wanted, rtol=1e-4, atol=1e-4)
        start = LanguageModel.load(world.model, device="cpu").logprobs(batch).logprobs[0]
    assert not torch.allclose(start, wanted, atol=1e-3), "and it is not what the run began with"
    if key == "ppo-max":
        assert AutoModelForSequenceClassification.from_pretrained(run.path / "critic").config.num_labels == 1


@pytest.mark.parametrize("rank", [0, 2])
def test_a_trained_reward_model_opens_with_transformers_alone(world: World, tmp_path: Path, rank: int) -> None:
    run = train("reward-model", world.options("reward-model", steps=2, lora_rank=rank, out=str(tmp_path / "run")))
    ours: Any = telos.load(run.path)
    theirs = AutoModelForSequenceClassification.from_pretrained(run.path / "model").eval()
    ids = torch.tensor([[20, 30, 40, 50]])
    with torch.no_grad():
        wanted = theirs(input_ids=ids).logits[0, 0]
        found = ours.scores(Answers(ids[:, :1], torch.tensor([1]), ids[:, 1:], torch.tensor([3]), torch.tensor([0])))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_run_without_a_model_says_so(world: World, tmp_path: Path) -> None:
    run = train("best-of-n", world.options("sampling", steps=1, out=str(tmp_path / "run")))
    with pytest.raises(UsageError, match="holds no trained model"):
        telos.load(run.path)
