"""The on-policy loop: what was sampled is what is learned from, and what has no reward is not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_fixtures import write_jsonl
from support import PROMPTS, World, changed, numbers, program_of, snapshot
from telos.algorithms.language import ppo_max
from telos.algorithms.language._loop_rollouts import layout, score
from telos.algorithms.language._sampling import Writer
from telos.algorithms.run import train
from telos.core.errors import Failure, TelosWarning, UsageError
from telos.dataflow import Group
from telos.functional.policy import PolicyView
from telos.models.language import LanguageModel


def reward_file(folder: Path, body: str) -> dict[str, Any]:
    path = folder / "its_reward.py"
    path.write_text(f"def judge(prompts, completions, completion_ids, **columns):\n    {body}\n", encoding="utf-8")
    return {"reward": f"{path}:judge", "critic_init": "policy"}


def views(monkeypatch: pytest.MonkeyPatch) -> list[PolicyView]:
    """Every view that the policy loss is given."""
    seen: list[PolicyView] = []
    original = ppo_max.METHOD.loss
    assert original is not None

    def watch(config: Any, view: PolicyView) -> Any:
        seen.append(view)
        return original(config, view)

    monkeypatch.setattr(ppo_max, "METHOD", ppo_max.METHOD.__class__(**{**vars(ppo_max.METHOD), "loss": watch}))
    return seen


# Sampled and learned ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7}, {"top_p": 0.6}, {"top_k": 4}, {"temperature": 1.5, "top_p": 0.8, "top_k": 20}]
)
def test_the_first_ratio_is_one_under_any_sampling(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampling: dict[str, float]
) -> None:
    seen = views(monkeypatch)
    program_of("ppo-max", world.options("rollouts", minibatch_size=8, epochs=1, **sampling), tmp_path).step(0)
    (view,) = seen
    gap = (view.logprobs.detach() - view.old_logprobs)[view.mask].abs()
    assert float(gap.max()) < 1e-4
    assert view.mask.sum() > 8


def test_a_sampler_with_other_weights_is_noticed_before_anything_is_learned(world: World, tmp_path: Path) -> None:
    program = program_of("ppo-max", world.options("rollouts"), tmp_path)
    program.writer = Group([Writer(LanguageModel.load(world.other_model, device="cpu"))])
    before = snapshot(program.model)
    with pytest.raises(Failure, match=r"trainer's log-probabilities differ from the sampler's by .* nats a token"):
        program.step(0)
    assert changed(before, snapshot(program.model)) == set()


def test_a_sampler_at_another_temperature_is_noticed(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("ppo-max", world.options("rollouts"), tmp_path)
    original = Writer.write

    def hotter(self: Writer, prompts: Any, *, sampling: Any, n: int = 1, seed: int = 0) -> Any:
        import dataclasses

        return original(self, prompts, sampling=dataclasses.replace(sampling, temperature=1.3), n=n, seed=seed)

    hotter.transfer = original.transfer  # type: ignore[attr-defined]
    monkeypatch.setattr(Writer, "write", hotter)
    with pytest.raises(Failure, match="differ from the sampler's"):
        program.step(0)


def test_weights_that_go_stale_after_an_update_are_noticed_at_the_next_iteration(world: World, tmp_path: Path) -> None:
    program = program_of("ppo-max", world.options("rollouts"), tmp_path)
    stale = program.model.frozen_copy()
    program.writer = Group([Writer(stale)])
    program.step(0)
    with pytest.raises(Failure, match="the engine runs other weights"):
        program.step(1)


def test_answers_are_never_encoded_again(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("ppo-max", world.options("rollouts"), tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an answer was encoded")

    for model in (program.model, program.reward.model):
        monkeypatch.setattr(type(model.tokenizer), "__call__", refuse)
        monkeypatch.setattr(type(model.tokenizer), "encode", refuse)
    program.step(0)


@pytest.mark.filterwarnings("default::telos.core.errors.TelosWarning")
def test_a_reward_model_scores_the_very_tokens_that_were_sampled_after_the_very_prompt(world: World, tmp_path: Path) -> None:
    program = program_of("ppo-max", world.options("rollouts", max_prompt_length=3), tmp_path)
    prompts = program.table.batch(range(4))
    from telos.models.generation import Sampling

    rollouts, texts = program.writer.call("write", prompts, sampling=Sampling(max_new_tokens=5), n=2, seed=1)
    found, _ = score(program.reward, program.table, rollouts, texts)
    with torch.no_grad():
        wanted = program.reward.model.scores(layout(rollouts))
    torch.testing.assert_close(found.values, wanted, rtol=1e-5, atol=1e-5)
    assert {bool(ended) for ended in rollouts.ended} == {True, False}, "cut answers are scored without an end token"


# Rewards ----------------------------------------------------------------------------------------------------------------------------------


def test_answers_without_a_reward_are_left_out_and_counted(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.0 is a reward; None is none."""
    seen = views(monkeypatch)
    function = reward_file(tmp_path, "return [None if i % 2 else 0.0 for i in range(len(completions))]")
    found = program_of("ppo-max", world.options("rollouts", minibatch_size=8, epochs=1, **function), tmp_path / "run").step(0)
    (view,) = seen
    assert found["rewards/not_applicable"] == 4
    assert found["rewards/error"] == 0
    assert (view.mask.any(1).sum(), len(view.mask)) == (4, 8)
    assert found["reward"] == 0.0


def test_a_reward_for_nobody_ends_the_run(world: World, tmp_path: Path) -> None:
    with pytest.raises(Failure, match="gave no reward for any of the 8 rows"):
        program_of(
            "ppo-max", world.options("rollouts", **reward_file(tmp_path, "return [None] * len(completions)")), tmp_path / "run"
        ).step(0)


@pytest.mark.parametrize(("body", "problem"), [("return [float('nan')] * len(completions)", "NaN"), ("raise KeyError('x')", "KeyError")])
def test_a_broken_reward_ends_the_run_by_name_and_learns_nothing(world: World, tmp_path: Path, body: str, problem: str) -> None:
    options = world.options("rollouts", out=str(tmp_path / "run"), **reward_file(tmp_path, body))
    with pytest.raises(Failure, match=f"reward 'judge' .*{problem}"):
        train("ppo-max", options)
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "failed"
    assert not (run / "model").exists()


def test_errors_may_be_left_out_instead(world: World, tmp_path: Path) -> None:
    function = reward_file(tmp_path, "return [float('inf') if i < 3 else 1.0 for i in range(len(completions))]")
    found = program_of("ppo-max", world.options("rollouts", reward_on_error="invalid", **function), tmp_path / "run").step(0)
    assert found["rewards/error"] == 3
    assert math.isfinite(found["loss"])


def test_rewards_see_texts_without_end_tokens_and_the_datas_columns(world: World, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": text, "wanted": f"w{i}"} for i, text in enumerate(PROMPTS)])
    place = str(tmp_path / "seen.jsonl")
    body = f"import json; open({place!r}, 'a').write(json.dumps([prompts, completions, completion_ids, columns]) + '\\n')"
    body += "; return [1.0 * len(text) for text in completions]"
    program_of("ppo-max", world.options("rollouts", data=str(data), **reward_file(tmp_path, body)), tmp_path / "run").step(0)
    prompts, completions, ids, columns = json.loads((tmp_path / "seen.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert len(prompts) == len(completions) == len(ids) == 8
    assert [PROMPTS[int(w[1:])] for w in columns["wanted"]] == prompts
    assert "prompt_ids" not in columns, "a function gets the data's columns and no others"
    assert not any("<|" in text for text in completions)


def test_answers_that_were_cut_lose_the_penalty(world: World, tmp_path: Path) -> None:
    plain, less = (
        program_of(
            "ppo-max", world.options("rollouts", missing_end_penalty=penalty, max_completion_length=2), tmp_path / f"{penalty}"
        ).step(0)
        for penalty in (0.0, 3.0)
    )
    assert plain["completions/clipped_ratio"] > 0
    assert less["reward"] == pytest.approx(plain["reward"] - 3.0 * plain["completions/clipped_ratio"], rel=1e-5)


# Policy and critic ------------------------------------------------------------------------------------------------------------------------


def test_while_the_critic_warms_up_the_policy_stays(world: World, tmp_path: Path) -> None:
    program = program_of("ppo-max", world.options("rollouts", critic_warmup=1), tmp_path)
    policy, critic = snapshot(program.model), snapshot(program.critic_model)
    program.step(0)
    assert changed(policy, snapshot(program.model)) == set()
    assert changed(critic, snapshot(program.critic_model)) != set()
    program.step(1)
    assert changed(policy, snapshot(program.model)) != set()


def test_the_critic_starts_as_the_reward_model_or_with_a_new_head(world: World, tmp_path: Path) -> None:
    by_reward = program_of("ppo-max", world.options("rollouts"), tmp_path / "1")
    assert changed(snapshot(by_reward.reward.model), snapshot(by_reward.critic_model)) == set()
    assert by_reward.reward.model is not by_reward.critic_model, "and learns apart from it"
    by_policy = program_of("ppo-max", world.options("rollouts", critic_init="policy"), tmp_path / "2")
    body, ours = snapshot(by_policy.critic_model), snapshot(by_policy.model)
    shared = [name for name in body if name.removeprefix("body.") in ours]
    assert len(shared) > 10
    assert all(torch.equal(body[name], ours[name.removeprefix("body.")]) for name in shared)


def test_a_critic_from_a_function_is_refused_with_the_remedy(world: World, tmp_path: Path) -> None:
    options = reward_file(tmp_path, "return [1.0] * len(completions)") | {"critic_init": "reward"}
    with pytest.raises(UsageError, match="use --critic_init policy"):
        program_of("ppo-max", world.options("rollouts", **options), tmp_path / "run")


def test_the_values_of_a_critic_stand_before_each_token(world: World, tmp_path: Path) -> None:
    """V at token t is the head's product with the state that predicts t: it does not know t itself."""
    program = program_of("ppo-max", world.options("rollouts"), tmp_path)
    prompts = program.table.batch(range(4))
    from telos.models.generation import Sampling

    rollouts, _ = program.writer.call("write", prompts, sampling=Sampling(max_new_tokens=6), n=1, seed=3)
    values: Tensor = program.critic.call("values", rollouts)
    assert values.shape == rollouts.completion_ids.shape
    model = program.critic_model.model
    for i in range(4):
        p, n = int(rollouts.prompt_length[i]), int(rollouts.completion_length[i])
        ids = torch.cat([rollouts.prompt_ids[i, :p], rollouts.completion_ids[i, :n]])[None]
        with torch.no_grad():
            states = model.model(input_ids=ids).last_hidden_state[0]
            wanted = model.score(states)[p - 1 : p + n - 1, 0]
        torch.testing.assert_close(values[i, :n], wanted, rtol=1e-4, atol=1e-4)


def test_the_plan_says_which_size_is_which(world: World, tmp_path: Path) -> None:
    plan = program_of("ppo-max", world.options("rollouts", batch_size=6, samples_per_prompt=3, minibatch_size=5, epochs=2), tmp_path).plan()
    assert plan["prompts"] == len(PROMPTS)
    assert plan["answers an iteration"] == 18
    assert plan["optimiser steps an iteration"] == 8
    assert plan["answers an optimiser step"] == 5


def test_learning_moves_the_reward_that_is_asked_for(world: World, tmp_path: Path) -> None:
    """The reward is the share of one frequent token; some tens of steps must raise it well beyond its spread at the start."""
    function = reward_file(tmp_path, "return [sum(i < 160 for i in ids) / len(ids) for ids in completion_ids]")
    options = world.options(
        "rollouts", steps=10, batch_size=12, samples_per_prompt=4, minibatch_size=24, learning_rate=5e-3, kl_coef=0.0, out=str(tmp_path / "run"), **function
    )  # fmt: skip
    run = train("ppo-max", options)
    rewards = [row["reward"] for row in numbers(run)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.15


# Choosing among samples -------------------------------------------------------------------------------------------------------------------


def test_best_of_n_keeps_the_answer_with_the_best_score_and_writes_all(world: World, tmp_path: Path) -> None:
    run = train("best-of-n", world.options("sampling", steps=2, n=5, reward=world.reward, out=str(tmp_path / "run")))
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS[:8]
    for row in rows:
        assert len(row["completions"]) == len(row["scores"]) == 5
        assert row["completion"] == row["completions"][int(np.argmax(row["scores"]))]
        wanted = [text.count(" ") - 0.5 * text.count("e") + 0.01 * len(text) for text in row["completions"]]
        assert row["scores"] == pytest.approx(wanted, rel=1e-5)
    logged = numbers(run)
    assert logged[0]["reward/kept"] == pytest.approx(np.mean([max(row["scores"]) for row in rows[:4]]), rel=1e-5)


@pytest.mark.filterwarnings("default::telos.core.errors.TelosWarning")
def test_a_prompt_whose_answers_have_no_score_keeps_none_of_them(world: World, tmp_path: Path) -> None:
    reward = reward_file(tmp_path, "return [None if p.startswith('The sky is') else 1.0 for p in prompts]")["reward"]
    run = train("best-of-n", world.options("sampling", steps=1, n=2, reward=reward, out=str(tmp_path / "run")))
    rows = [json.loads(line) for line in (run.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["prompt"] == "The sky is"
    assert rows[0]["scores"] == [None, None]
    assert rows[0]["completion"] is None
    assert rows[1]["completion"] is not None
    assert numbers(run)[0]["rewards/unusable_prompts"] == 1
    assert issubclass(TelosWarning, UserWarning)
