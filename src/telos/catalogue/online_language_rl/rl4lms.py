"""RL4LMs and NLPO (S9): tasks × {SFT, PPO, NLPO} as a leaderboard, and how far the final scores of PPO and NLPO lie apart over training seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from telos.algorithms import run as runs
from telos.algorithms.language._loop_supervised import layout
from telos.algorithms.language._sampling import sample_texts
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab
from telos.catalogue.online_language_rl._grue import PPO, fine_tuned
from telos.core.seeds import derive
from telos.data.formats import read_examples
from telos.data.readers import read_rows
from telos.data.tokenize import Limits, tokenize
from telos.environments.text.base import Item
from telos.environments.text.grue._task import GrueTask
from telos.evaluation.leaderboard import MAIN, SUFFIX, Leaderboard, Score, read_record, record_files, write_record
from telos.functional.reduction import masked_mean
from telos.models.generation import Sampling
from telos.models.language import LanguageModel

# The same for both, as in the paper, whose NLPO has PPO's settings and those of its mask.
RL: dict[str, Any] = {**PPO, "epochs": 1, "critic_warmup": 1, "max_completion_length": 28}
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {"ppo": ("ppo-max", {}), "nlpo": ("nlpo", {"mask_top_p": 0.9, "mask_every": 5})}
SHOWN = {"sft": "SFT", "ppo": "PPO", "nlpo": "NLPO"}
PERPLEXITY = "fluency/perplexity"
NUCLEUS = 0.9  # in which all answers are drawn when they are measured: NLPO learns nothing of tokens outside its mask


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    records = root / "leaderboard"
    for task in settings["tasks"]:
        measure_task(Lab(root / task, task, seed, watch), records, settings)
    return figures(Leaderboard(map(read_record, record_files([records]))))


def measure_task(lab: Lab, records: Path, settings: Mapping[str, Any]) -> None:
    """Writes the records of one task: of the fine-tuned policy, and of PPO and NLPO from it, once for each training seed."""
    start, items = fine_tuned(lab, settings["sft_steps"]), lab.items(settings["held_out"])
    record(lab, records, "sft", lab.seed, start, items)
    task = lab.testbed
    common = {"model": start, "data": task.name, "reward": [f"gold:{task.name}"], "steps": settings["iterations"], **RL}
    for name, (method, own) in METHODS.items():
        for index in range(settings["runs"]):
            seed = derive(lab.seed, "training", index) % 2**31
            run = lab.train(f"{name}-{index}", method, **{**common, **own, "seed": seed, **settings.get("small", {})})
            record(lab, records, name, seed, str(run.path / "model"), items)


def record(lab: Lab, records: Path, method: str, seed: int, source: str, items: Sequence[Item]) -> None:
    """Writes what the task's metrics say of a model's answers to the items, which all models draw with the same random numbers."""
    task = cast(GrueTask, lab.testbed)
    if (records / f"{task.name}-{method}-{seed}{SUFFIX}").exists():
        return
    runs.prepare_threads()
    model = LanguageModel.load(source)
    sampling = Sampling(top_p=NUCLEUS, max_new_tokens=task.max_new_tokens)
    drawn = sample_texts(model, [item.prompt for item in items], sampling, seed=derive(lab.seed, "assessment"))
    metrics = task.metrics(items, [text for (text,) in drawn], perplexity(model, items))
    write_record(records, Score(task.name, method, seed, metrics, {"model": source, "prompts": len(items), "top_p": NUCLEUS}))


def perplexity(model: LanguageModel, items: Sequence[Item]) -> float:
    """Of the references: it rises when a policy forgets how people write."""
    rows = [{"prompt": item.prompt, "completion": item.reference} for item in items]
    table = tokenize(read_examples(read_rows(rows), ("prompt-completion",)), model.tokenizer, Limits(max_length=model.context))
    batch: Any = table.batch(range(len(table))).to(model.device)
    with torch.no_grad():
        logprobs = model.logprobs(layout(batch)).logprobs
    return math.exp(-float(masked_mean(logprobs, batch.loss_mask[:, 1:])))


def figures(board: Leaderboard) -> dict[str, float]:
    """What the leaderboard says of one reporting seed: spreads are those over its training seeds."""
    standings = {standing.method: standing for standing in board.standings(MAIN)}
    cells = [
        bool(board.values(metric, task, method))
        for metric in board.metrics
        for task in board.tasks
        if board.values(metric, task, "sft")
        for method in SHOWN
    ]
    found = {"share of the tables that is filled": sum(cells) / len(cells)}
    for method, name in SHOWN.items():
        score, spread = standings[method].score, standings[method].spread
        assert score is not None
        assert spread is not None
        found[f"gold, {name}"] = score.estimate
        for task in board.tasks:
            found[f"gold on {task}, {name}"] = sum(values := board.values(MAIN, task, method)) / len(values)
        perplexities = [value for task in board.tasks for value in board.values(PERPLEXITY, task, method)]
        found[f"perplexity of references, {name}"] = sum(perplexities) / len(perplexities)
        if method != "sft":
            found[f"spread over training seeds, {name}"] = spread
            worst = [min(board.values(MAIN, task, method)) - board.values(MAIN, task, "sft")[0] for task in board.tasks]
            found[f"gold of the worst run over SFT, {name}"] = min(worst)
    return {
        "spread over training seeds, NLPO less PPO": found["spread over training seeds, NLPO"] - found["spread over training seeds, PPO"],
        "gold of NLPO over SFT": found["gold, NLPO"] - found["gold, SFT"],
        "gold of NLPO over PPO": found["gold, NLPO"] - found["gold, PPO"],
        **found,
    }


CLAIM = Claim(
    key="rl4lms",
    statement="One run fills a leaderboard of tasks × {SFT, PPO, NLPO}, on which NLPO's final scores vary less over training seeds than PPO's",
    baselines=("sft", "ppo-max"),
    facts=(
        Fact(
            "every metric that the fine-tuned policy has on a task PPO and NLPO have, too", "share of the tables that is filled", ">", 0.999
        ),
        Fact(
            "the standard deviation of NLPO's final gold over training seeds, mean over tasks, is below PPO's",
            "spread over training seeds, NLPO less PPO",
            "<",
            0.0,
        ),
        Fact("NLPO learns: gold above the fine-tuned policy's, mean over tasks", "gold of NLPO over SFT", ">", 0.0),
        Fact("and is not steady at the price of its score: at most 0.02 below PPO's", "gold of NLPO over PPO", ">", -0.02),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(
            1,
            {
                "tasks": ("grue-dialogue",),
                "sft_steps": 3,
                "iterations": 2,
                "runs": 2,
                "held_out": 8,
                "small": {"batch_size": 4, "minibatch_size": 4, "max_completion_length": 8},
            },
        ),
        "full": Budget(
            3,
            {
                "tasks": ("grue-concepts", "grue-sentiment", "grue-dialogue"),
                "sft_steps": 60,
                "iterations": 16,
                "runs": 3,
                "held_out": 512,
            },
        ),
    },
    notes="`telos leaderboard` of the run's folder prints the tables; the metrics beside gold need `telos[metrics]`. Answers are drawn in the nucleus of mass "
    "0.9 of each policy, the mass of NLPO's mask. Both methods have the stabilisers of PPO-max. Steady means alike over training seeds from one fine-tuned "
    "policy: the standard deviation over three runs on each task, in each reporting seed. Three of the six tasks, a 4.2 M-parameter model, and 1,024 answers "
    "a run.",
)
