"""What the on-policy loop offers its methods: greedy baselines, other writers, beginnings, resampling, a reference that moves, several rewards."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support import STEP_ENDS, World, changed, program_of, snapshot
from telos.algorithms.language import dr_po, rlgf
from telos.algorithms.language._loop_rollouts import layout
from telos.algorithms.language._sampling import Writer
from telos.algorithms.run import train
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.data.batches import REWARD_VALID, Rollouts
from telos.functional.policy import Scored
from telos.models.generation import Sampling
from telos.models.generation.native import NativeEngine, Nucleus
from telos.models.language import LanguageModel
from telos.objectives.process_reward import Cut, ProcessRewardModel, StepProbabilities


def reward_file(folder: Path, body: str) -> str:
    path = folder / "its_reward.py"
    path.write_text(f"def judge(prompts, completions, completion_ids, **columns):\n    {body}\n", encoding="utf-8")
    return f"{path}:judge"


LENGTHS = "return [float(len(ids)) for ids in completion_ids]"


def scored_in(program: Any, monkeypatch: pytest.MonkeyPatch) -> list[Scored]:
    """Every `Scored` that the method is given."""
    seen: list[Scored] = []
    method: Method = program.method
    assert method.estimate is not None
    estimate = method.estimate

    def watch(config: Any, scored: Scored, state: Any) -> Any:
        seen.append(scored)
        return estimate(config, scored, state)

    program.method = dataclasses.replace(method, estimate=watch)
    return seen


def test_the_greedy_answers_score_is_that_of_the_most_likely_tokens(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("remax", options_of(world, reward=reward_file(tmp_path, LENGTHS)), tmp_path / "run")
    seen = scored_in(program, monkeypatch)
    model = program.model.frozen_copy()
    program.step(0)
    (scored,) = seen
    rows = scored.group.unique_consecutive().tolist()
    prompts = [program.table.columns["prompt_ids"][row].tolist() for row in rows]
    greedy = NativeEngine(model).generate(prompts, Sampling(temperature=0.0, max_new_tokens=program.config.max_completion_length))
    wanted = dict(zip(rows, greedy.length.tolist(), strict=True))
    assert scored.greedy is not None
    assert scored.greedy.tolist() == [wanted[group] for group in scored.group.tolist()]


def options_of(world: World, **changes: Any) -> dict[str, Any]:
    """Options of a small run without a critic."""
    options = world.options("rollouts", **changes)
    options.pop("critic_learning_rate")
    return options


def test_without_a_kl_penalty_there_is_no_reference(world: World, tmp_path: Path) -> None:
    program = program_of("grpo", options_of(world, kl_coef=0.0), tmp_path / "a")
    assert program.reference is None
    assert "kl" not in program.step(0)
    with pytest.raises(UsageError, match="--reference has no effect on grpo"):
        program_of("grpo", options_of(world, kl_coef=0.0, reference=world.other_model), tmp_path / "b")


def test_the_reference_moves_by_its_share_of_the_way(world: World, tmp_path: Path) -> None:
    program = program_of("grpo", options_of(world, reference_share=0.25), tmp_path)
    before = snapshot(program.reference.workers[0].model)
    program.step(0)
    policy, after = snapshot(program.model), snapshot(program.reference.workers[0].model)
    for name, weight in after.items():
        torch.testing.assert_close(weight, before[name] + 0.25 * (policy[name] - before[name]))
    assert changed(before, after)


def test_a_reference_without_weights_of_its_own_cannot_move(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--reference_share: the reference is the policy without its adapter"):
        program_of("grpo", options_of(world, reference_share=0.25, lora_rank=2), tmp_path)


def test_several_rewards_are_weighed_and_told_apart(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = [reward_file(tmp_path, LENGTHS), world.brevity]
    program = program_of("grpo", options_of(world, reward=rewards, reward_weights=[2.0, 0.5]), tmp_path / "run")
    seen = scored_in(program, monkeypatch)
    metrics = program.step(0)
    lengths = seen[0].mask.sum(1).float()
    assert metrics["rewards/judge/mean"] == pytest.approx(float(lengths.mean()))
    wanted = 2 * metrics["rewards/judge/mean"] + 0.5 * metrics["rewards/brevity/mean"]
    assert metrics["reward"] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(UsageError, match="3 reward weights for 2 rewards"):
        program_of("grpo", options_of(world, reward=rewards, reward_weights=[1, 2, 3]), tmp_path / "b")


def test_prompts_without_a_difference_are_passed_over_and_others_drawn(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = reward_file(tmp_path, "return [float(len(ids) % 2) for ids in completion_ids]")
    program = program_of("dapo", options_of(world, reward=parity, sampling_rounds=6), tmp_path / "run")
    seen = scored_in(program, monkeypatch)
    metrics = program.step(0)
    (scored,) = seen
    groups = scored.group.unique()
    assert 1 <= len(groups) <= program.config.batch_size
    assert all(scored.scores[scored.group == group].std() > 0 for group in groups)
    assert 0 < metrics["completions/learned_from"] <= 1


def test_an_iteration_without_any_difference_is_skipped(world: World, tmp_path: Path) -> None:
    constant = reward_file(tmp_path, "return [1.0] * len(completions)")
    program = program_of("dapo", options_of(world, reward=constant, sampling_rounds=2), tmp_path / "run")
    before = snapshot(program.model)
    metrics = program.step(0)
    assert metrics["iterations/skipped"] == 1.0
    assert metrics["reward"] == 1.0
    assert changed(before, snapshot(program.model)) == set()


def test_answers_that_were_cut_can_be_left_out(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of("grpo", options_of(world, mask_truncated=True, max_completion_length=3), tmp_path)
    seen = scored_in(program, monkeypatch)
    program.step(0)
    assert torch.equal(seen[0].valid, seen[0].ended)
    assert {bool(x) for x in seen[0].ended} == {True, False}


def test_rewards_are_written_down_by_prompt(world: World, tmp_path: Path) -> None:
    run = train("grpo", options_of(world, reward=world.reward, log_rewards=True, out=str(tmp_path / "run")))
    rows = [json.loads(line) for line in (run.path / "rewards.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    assert all(len(row["rewards"]) == 2 and 0 <= row["row"] < 12 for row in rows)
    means = [sum(sum(row["rewards"]) for row in rows if row["step"] == step) / 8 for step in (1, 2, 3)]
    assert means == pytest.approx([row["reward"] for row in run.metrics()], rel=1e-5)


# Beginnings -----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(max_new_tokens=6), Sampling(max_new_tokens=6, top_k=5)])
def test_answers_go_on_from_their_beginnings_and_only_what_follows_is_the_policys(world: World, sampling: Sampling) -> None:
    from telos.algorithms.language._loop_rollouts import layout

    model = LanguageModel.load(world.model, device="cpu")
    program_prompts = prompts_of(world)
    begun = [[5, 6, 7], [], [9]]
    rollouts, _ = Writer(model).write(program_prompts, begun, sampling=sampling, n=2, seed=1)
    for row, start in enumerate(start for start in begun for _ in range(2)):
        assert rollouts.completion_ids[row, : len(start)].tolist() == start
        assert rollouts.action_mask[row].tolist() == [
            len(start) <= t < int(rollouts.completion_length[row]) for t in range(rollouts.action_mask.shape[1])
        ]
        assert int(rollouts.completion_length[row]) <= 6
    with torch.no_grad():
        again = model.logprobs(layout(rollouts), support=rollouts.support).logprobs
    torch.testing.assert_close(again[rollouts.action_mask], rollouts.logprobs[rollouts.action_mask], atol=1e-4, rtol=1e-4)


def prompts_of(world: World) -> Any:
    from telos.data.formats import read_examples
    from telos.data.readers import read_rows
    from telos.data.tokenize import Limits, tokenize

    rows = [{"prompt": text} for text in ("The sky is", "hello", "What is good?")]
    table = tokenize(read_examples(read_rows(rows), ("prompt-only",)), LanguageModel.load(world.model).tokenizer, Limits())
    return table.batch(range(3))


def test_resets_begin_with_the_datas_own_answers(world: World, tmp_path: Path) -> None:
    options = world.options("rollouts", data=world.data["preference"], reset_share=1.0, max_completion_length=12)
    program = program_of("dr-po", options, tmp_path)
    prompts = program.table.batch(range(6))
    rollouts, _ = program._write(prompts, 2, 0, 1)
    begun = ~rollouts.action_mask & (torch.arange(rollouts.action_mask.shape[1]) < rollouts.completion_length[:, None])
    assert int(begun.sum()) > 4
    for row in range(12):
        k = int(begun[row].sum())
        assert rollouts.completion_ids[row, :k].tolist() == prompts.answer_ids[row // 2, :k].tolist()
        assert k < int(prompts.answer_length[row // 2])
    none = dr_po.sample(dataclasses.replace(program.config, reset_share=0.0), lambda who, given, begun: begun, prompts, 0)  # type: ignore[arg-type,return-value]
    assert none == [[]] * 6


@pytest.mark.parametrize("scheme", ["ppo++", "aggrevated", "lols", "d2lols"])
def test_guided_answers_are_learned_from_where_the_policy_wrote_them(world: World, tmp_path: Path, scheme: str) -> None:
    options = world.options("rollouts", guide=world.other_model, scheme=scheme, max_completion_length=8)
    if scheme != "aggrevated":
        options["guide_share"] = 0.5
    program = program_of("rlgf", options, tmp_path)
    prompts = program.table.batch(range(8))
    rollouts, texts = program._write(prompts, 2, 0, 3)
    from telos.algorithms.language._loop_rollouts import layout

    with torch.no_grad():
        own = program.model.logprobs(layout(rollouts)).logprobs
    torch.testing.assert_close(own[rollouts.action_mask], rollouts.logprobs[rollouts.action_mask], atol=1e-4, rtol=1e-4)
    actions = rollouts.action_mask.sum(1)
    if scheme in ("aggrevated", "lols", "d2lols"):
        assert (actions == 1).all()
    else:
        assert (actions >= 1).all()
        assert int(actions.max()) > 1
    assert len(texts) == 16
    assert (rollouts.reward_status == REWARD_VALID).all()
    metrics = program.step(0)
    assert metrics["reward_std"] > 0


def test_a_guide_of_another_vocabulary_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--guide tinylm has another vocabulary"):
        program_of("rlgf", world.options("rollouts", guide="tinylm"), tmp_path)
    with pytest.raises(UsageError, match="--guide is missing"):
        program_of("rlgf", world.options("rollouts"), tmp_path / "b")
    with pytest.raises(UsageError, match="--switch_step has no effect with --scheme lols"):
        rlgf.Config(scheme="lols", switch_step=3)


# A nucleus of another model --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["lean", "generic"])
def test_tokens_come_from_the_other_models_nucleus_and_are_drawn_by_the_policy(world: World, path: Any) -> None:
    mine, other = LanguageModel.load(world.model, device="cpu"), LanguageModel.load(world.other_model, device="cpu")
    prompts = [[5, 6, 7, 8], [9, 10]]
    drawn = NativeEngine(mine, path=path, partner=Nucleus(other, 0.5)).generate(prompts, Sampling(max_new_tokens=5), n=3, seed=2)
    assert drawn.support is not None
    for row in range(6):
        ids = prompts[row // 3] + drawn.ids[row, : int(drawn.length[row])].tolist()
        with torch.no_grad():
            logits = {name: model.model(input_ids=torch.tensor([ids])).logits[0] for name, model in (("mine", mine), ("other", other))}
        for t in range(int(drawn.length[row])):
            place = len(prompts[row // 3]) + t - 1
            p, order = torch.softmax(logits["other"][place], 0).sort(descending=True)
            nucleus = order[: int((p.cumsum(0) < 0.5).sum()) + 1]
            kept = drawn.support[row, t]
            assert set(kept[kept >= 0].tolist()) == set(nucleus.tolist())
            wanted = torch.log_softmax(logits["mine"][place][nucleus], 0)[nucleus.tolist().index(ids[place + 1])]
            assert float(drawn.logprobs[row, t]) == pytest.approx(float(wanted), abs=1e-4)


def test_the_mask_is_renewed_when_it_is_due(world: World, tmp_path: Path) -> None:
    program = program_of("nlpo", world.options("rollouts", mask_every=2), tmp_path)
    start = snapshot(program.mask.workers[0].model)
    program.step(0)
    assert changed(start, snapshot(program.mask.workers[0].model)) == set()
    program.step(1)
    assert changed(snapshot(program.model), snapshot(program.mask.workers[0].model)) == set()


def test_steps_are_paid_at_their_last_tokens_after_clip_and_delta(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the arithmetic of Clip and Delta done by hand on a reward model's probabilities of the same tokens."""
    cut = {"step_separators": STEP_ENDS, "answer_mark": "", "max_completion_length": 24, "samples_per_prompt": 16}
    given = {"process_reward": world.reward_model, "process_clip": 0.4, "process_delta": True, "process_coef": 2.0}
    program = program_of("reinforce", options_of(world, reward=reward_file(tmp_path, LENGTHS), **cut, **given), tmp_path / "run")
    seen = scored_in(program, monkeypatch)
    metrics = program.step(0)
    (scored,) = seen
    judge = ProcessRewardModel.load(world.reward_model)
    answers = layout(Rollouts(**program.last_batch, batch_size=[len(scored.scores)]))
    found = StepProbabilities(judge, cut=Cut(tuple(STEP_ENDS), "")).score(answers)
    assert scored.dense is not None
    assert int(found.mask.sum(1).max()) > 2
    for row, (values, ends, known) in enumerate(zip(found.values.tolist(), found.ends.tolist(), found.mask.tolist(), strict=True)):
        paid = [min(value - 0.4, 0.0) for value, there in zip(values, known, strict=True) if there]
        steps = len(paid)
        wanted = [0.0] * scored.dense.shape[1]
        for k in range(steps - 1):  # Delta pays nothing at the last step, and the one before it in full
            wanted[ends[k]] = 2.0 * (paid[k] - (paid[k + 1] if k < steps - 2 else 0.0))
        assert scored.dense[row].tolist() == pytest.approx(wanted, abs=1e-6)
    assert metrics["reward/steps"] == pytest.approx(float(scored.dense.sum(1).mean()), abs=1e-6)


def test_options_of_step_rewards_mean_nothing_without_a_step_reward(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--process_clip has no effect without --process_reward"):
        program_of("grpo", options_of(world, process_clip=0.4), tmp_path)
