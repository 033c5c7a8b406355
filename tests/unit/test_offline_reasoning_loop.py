"""Offline training by values: where advantages and outcomes come from, what critic and policy see of each other, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from data_fixtures import tiny_tokenizer, write_jsonl
from support import BAD, GOOD, PROMPTS, STEP_ENDS, World, changed, make_reward_model, program_of, snapshot
from telos.algorithms.language._loop_unpaired import layout
from telos.algorithms.language._loop_values import ValuedLogps
from telos.algorithms.run import train
from telos.core.errors import UsageError
from telos.models.language import LanguageModel
from telos.objectives.process_reward import Cut, ProcessRewardModel, load_process_reward, step_ends

CUT = Cut(tuple(STEP_ENDS))


@pytest.fixture(scope="module")
def value_model(world: World) -> str:
    """A random process reward model that passes for one that was trained at prompts, too."""
    folder = make_reward_model(world.root / "offline-values", seed=5)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"telos_values_prompts": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def judged(world: World) -> str:
    """Answers of which every other one succeeds."""
    rows = [{"prompt": PROMPTS[i], "completion": (GOOD if i % 2 else BAD)[i % 8], "score": i % 2} for i in range(12)]
    return str(write_jsonl(world.root / "judged.jsonl", rows))


def options(world: World, data: str, **changes: Any) -> dict[str, Any]:
    found = {"model": world.model, "data": data, "device": "cpu", "threads": 1, "steps": 3, "batch_size": 12, "checkpoint_every": 0}
    return found | {"learning_rate": 1e-2, "eval_prompts": 0} | changes


def dapo(world: World, judged: str, value_model: str, **changes: Any) -> dict[str, Any]:
    return options(world, judged, process_reward=f"value:{value_model}", step_separators=STEP_ENDS, **changes)


def views(program: Any, role: str = "loss") -> list[ValuedLogps]:
    """Every view that the method's function is given from now on."""
    seen: list[ValuedLogps] = []
    original = getattr(program.method, role)
    object.__setattr__(program.method, role, lambda config, view: seen.append(view) or original(config, view))
    return seen


def numbers_at(folder: str, rows: list[list[int]], places: list[list[int]]) -> list[list[float]]:
    """A classifier's head at places of unpadded rows, by `transformers`."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        states = [model.model(torch.tensor([ids])).last_hidden_state[0] for ids in rows]
        return [[float(model.score(state[place])) for place in some] for state, some in zip(states, places, strict=True)]


# Advantages --------------------------------------------------------------------------------------------------------------------------------


def test_advantages_are_differences_of_the_critics_chances_and_the_outcome_stands_after_the_last_step(
    world: World, judged: str, value_model: str, tmp_path: Path
) -> None:
    program = program_of("dapo-direct", dapo(world, judged, value_model), tmp_path)
    seen = views(program)
    batch = program.batch(program.table, range(12))
    program.losses(program.model, batch, *program.frozen_rows(batch))
    (view,) = seen
    assert view.ends is not None
    assert view.advantages is not None
    words = tiny_tokenizer()
    prompts = [ids.tolist() for ids in program.table.columns["prompt_ids"]]
    answers = [ids.tolist() for ids in program.table.columns["completion_ids"]]
    cuts = [step_ends(words, ids, CUT) for ids in answers]
    assert max(map(len, cuts)) > 2
    places = [[len(p) - 1, *(len(p) + end for end in ends)] for p, ends in zip(prompts, cuts, strict=True)]
    read = numbers_at(value_model, [p + a for p, a in zip(prompts, answers, strict=True)], places)
    for i, ends in enumerate(cuts):
        chances = [1 / (1 + np.exp(-z)) for z in read[i]]
        chances[-1] = float(i % 2)
        at = [*ends[:-1], len(answers[i]) - 1]
        assert answers[i][-1] == words.eos_token_id, "the end token is part of the last step"
        assert view.ends[i].nonzero()[:, 0].tolist() == at
        np.testing.assert_allclose(view.advantages[i, at].numpy(), np.diff(chances), atol=1e-5)
        assert view.advantages[i].abs().sum() == pytest.approx(np.abs(np.diff(chances)).sum(), abs=1e-5)
    assert program.denominators(batch).tokens == sum(map(len, cuts))


def test_held_out_answers_have_steps_and_advantages_of_their_own(world: World, judged: str, value_model: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in Path(judged).read_text(encoding="utf-8").splitlines()]
    other = str(write_jsonl(tmp_path / "other.jsonl", rows[::-1]))
    for key, given in (("dapo-direct", dapo(world, judged, value_model)), ("oreo", options(world, judged, critic_learning_rate=1e-2))):
        changes = {"eval_data": other, "eval_every": 1, "steps": 1, "learning_rate": 0.0}
        if key == "oreo":
            changes |= {"critic_learning_rate": 0.0, "variant": "step", "step_separators": STEP_ENDS}
        metrics = program_of(key, given | changes, tmp_path / key).step(0)
        assert metrics["eval/loss"] == pytest.approx(metrics["loss"], rel=1e-5), "the same answers in another order"


def test_a_score_above_the_threshold_is_a_success(world: World, value_model: str, tmp_path: Path) -> None:
    rows = [{"prompt": PROMPTS[i], "completion": GOOD[i % 8], "score": float(i)} for i in range(12)]
    data = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    program = program_of("dapo-direct", dapo(world, data, value_model, success_above=6.0), tmp_path / "run")
    batch = program.batch(program.table, range(12))
    assert program._outcome(batch).tolist() == [float(i > 6) for i in range(12)]
    program = program_of("oreo", options(world, data), tmp_path / "oreo")
    assert program._outcome(batch).tolist() == [float(i) for i in range(12)], "OREO takes any outcome as it is"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"process_reward": ""}, "--process_reward is missing"),
        ({"process_reward": "{reward}"}, "advantages need value:FOLDER"),
        ({"process_reward": "implicit:{model}"}, "advantages need value:FOLDER"),
        ({"process_reward": "value:{reward}"}, "trained at prompts, too"),
        ({"process_reward": "value:{model}"}, "--process_reward .*no trained one-label head"),
        ({"beta": 0.0}, "--beta"),
    ],
)
def test_what_gives_no_advantages_is_refused(
    world: World, judged: str, value_model: str, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    given = {
        name: value.format(reward=world.reward_model, model=world.model) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    with pytest.raises(UsageError, match=said):
        program_of("dapo-direct", dapo(world, judged, value_model) | given, tmp_path / "run")


# Outcomes ----------------------------------------------------------------------------------------------------------------------------------


def outcomes(program: Any) -> list[float]:
    return program.table.columns["score"]


def test_outcomes_are_scores_else_the_rewards_else_labels(world: World, tmp_path: Path) -> None:
    bare = [{"prompt": PROMPTS[i], "completion": GOOD[i % 8], "label": i % 3 == 0} for i in range(12)]
    labelled = str(write_jsonl(tmp_path / "labelled.jsonl", bare))
    scored = str(write_jsonl(tmp_path / "scored.jsonl", [row | {"score": -1.0 * i} for i, row in enumerate(bare)]))
    sides = [{"prompt": PROMPTS[i], "chosen": GOOD[i % 8], "rejected": BAD[i % 8]} for i in range(6)]
    reward = tmp_path / "reward.py"
    reward.write_text("def length(completions, **_):\n    return [float(len(text)) for text in completions]\n", encoding="utf-8")
    rewarded = {"reward": f"{reward}:length"}
    for data, changes, wanted in (
        (scored, {}, [-1.0 * i for i in range(12)]),
        (labelled, {}, [float(i % 3 == 0) for i in range(12)]),
        (labelled, rewarded, [float(len(GOOD[i % 8])) for i in range(12)]),
        (str(write_jsonl(tmp_path / "sides.jsonl", sides)), {}, [1.0, 0.0] * 6),
    ):
        assert outcomes(program_of("oreo", options(world, data, **changes), tmp_path / f"{len(list(tmp_path.iterdir()))}")) == wanted


def test_answers_that_nothing_tells_apart_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--data .* has no column 'score', and no labels that tell its answers apart"):
        program_of("oreo", options(world, world.data["prompt-completion"]), tmp_path)


# OREO's critic -----------------------------------------------------------------------------------------------------------------------------


def test_a_value_is_the_heads_number_at_the_token_before(world: World, judged: str, tmp_path: Path) -> None:
    """At the prompt's last token before the first, and so where a process reward model is read after a step."""
    program = program_of("oreo", options(world, judged), tmp_path)
    seen = views(program)
    batch = program.batch(program.table, range(12))
    program.losses(program.model, batch, *program.frozen_rows(batch))
    values, mask = seen[0].values, seen[0].answer.mask
    assert values is not None
    before = torch.arange(mask.shape[1]).expand(mask.shape) - 1
    with torch.no_grad():
        read = program.critic_model.steps(layout(batch), torch.where(mask, before, 0))
    torch.testing.assert_close(values[mask], read[mask], atol=1e-5, rtol=1e-5)
    assert not values.requires_grad


def test_the_saved_critic_guides_search_by_its_values(world: World, judged: str, tmp_path: Path) -> None:
    run = train("oreo", options(world, judged, critic_learning_rate=1e-2, out=str(tmp_path / "run")))
    policy = LanguageModel.load(str(run.path / "model"), device="cpu")
    critic = ProcessRewardModel.load(str(run.path / "critic"), device="cpu")
    assert isinstance(critic, ProcessRewardModel)
    assert critic.values_prompts
    program = program_of("oreo", options(world, judged), tmp_path / "other")
    answers = layout(program.batch(program.table, range(12)))
    found = load_process_reward(str(run.path / "critic"), policy, cut=CUT).score(answers)
    with torch.no_grad():
        wanted = critic.steps(answers, found.ends).sigmoid()
    torch.testing.assert_close(found.values[found.mask], wanted[found.mask])
    gains = load_process_reward(f"value:{run.path / 'critic'}", policy, cut=CUT).score(answers)
    with torch.no_grad():
        start = critic.steps(answers, torch.full_like(found.ends[:, :1], -1)).sigmoid()
    last = torch.stack([row[mask][-1] for row, mask in zip(found.values, found.mask, strict=True)])
    torch.testing.assert_close(gains.values.sum(1), last - start[:, 0], atol=1e-5, rtol=1e-5)
    searched = {"model": str(run.path / "model"), "data": world.data["prompt-only"], "device": "cpu", "threads": 1, "steps": 1}
    searched |= {"batch_size": 4, "beams": 2, "expansions": 2, "max_completion_length": 6, "step_separators": STEP_ENDS}
    search = train("beam-search", searched | {"process_reward": str(run.path / "critic"), "out": str(tmp_path / "search")})
    lines = [json.loads(line) for line in (search.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4
    assert all(0 < score < 1 for line in lines for score in line["scores"])


def first_weights(world: World, judged: str, folder: Path, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(policy, critic) after one step."""
    program = program_of("oreo", options(world, judged, **{"critic_learning_rate": 1e-2} | changes), folder)
    program.step(0)
    return snapshot(program.model), snapshot(program.critic_model)


def test_both_gradients_are_taken_before_either_model_moves(world: World, judged: str, tmp_path: Path) -> None:
    policy, critic = first_weights(world, judged, tmp_path / "both")
    still_policy, critic_alone = first_weights(world, judged, tmp_path / "critic", learning_rate=0.0)
    policy_alone, still_critic = first_weights(world, judged, tmp_path / "policy", critic_learning_rate=0.0)
    assert changed(critic, critic_alone) == set()
    assert changed(policy, policy_alone) == set()
    assert changed(policy, still_policy)
    assert changed(critic, still_critic)


def test_in_the_warm_up_only_the_critic_learns_and_the_policys_schedule_waits(world: World, judged: str, tmp_path: Path) -> None:
    given = options(world, judged, critic_learning_rate=1e-2, critic_warmup=2, steps=4)
    program = program_of("oreo", given, tmp_path)
    policy, critic = snapshot(program.model), snapshot(program.critic_model)
    rows = [program.step(index) for index in range(2)]
    assert changed(policy, snapshot(program.model)) == set()
    assert changed(critic, snapshot(program.critic_model))
    assert [sorted(row) for row in rows] == [["loss/critic"]] * 2
    rates = [program.step(index)["learning_rate"] for index in (2, 3)]
    assert rates == pytest.approx([1e-2, 5e-3]), "linear over the two steps in which it learns"
    with pytest.raises(UsageError, match="--critic_warmup 4 leaves none of 4 steps"):
        program_of("oreo", given | {"critic_warmup": 4}, tmp_path / "none")


def test_steps_matter_to_the_step_variant_alone(world: World, judged: str, tmp_path: Path) -> None:
    for variant in ("token", "response"):
        for changes in ({"step_separators": [" "]}, {"answer_mark": ""}):
            with pytest.raises(UsageError, match=f"--{next(iter(changes))} has no effect on --variant {variant}"):
                program_of("oreo", options(world, judged, variant=variant, **changes), tmp_path)
    program = program_of("oreo", options(world, judged, variant="step", step_separators=STEP_ENDS), tmp_path / "step")
    seen = views(program, "critic_loss")
    program.step(0)
    assert seen[0].ends is not None
    assert seen[0].ends.sum() > 12, "several steps an answer"


def test_the_reference_cache_serves_values_too(world: World, judged: str, value_model: str, tmp_path: Path) -> None:
    for key, given in (("dapo-direct", dapo(world, judged, value_model)), ("oreo", options(world, judged))):
        plain = program_of(key, given, tmp_path / f"{key}-plain").step(0)
        cached = program_of(key, given | {"reference_cache": str(tmp_path / "cache")}, tmp_path / f"{key}-cached")
        assert cached.reference is None
        found = cached.step(0)
        assert {name: found[name] for name in plain} == pytest.approx(plain, rel=1e-4, abs=1e-5)
