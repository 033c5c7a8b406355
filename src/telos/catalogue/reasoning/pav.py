"""Process Advantage Verifiers (S152): which provers improve a policy, computed exactly, and search and reinforcement by a learned verifier on `arith`.

Exact part: a planted sequence of `LENGTH` tokens must come, in order, within `HORIZON` tokens; the state is how many have come, and when. One step of natural
policy gradient on Q^π + α A^μ is taken for several provers μ, and the policy's value before and after is found by dynamic programming.

Text part: the verifier learns labels of `pav` (best of K of the policy as the prover). In search it guides step-level beam search, against an outcome reward
model that learns the same answers and chooses among whole ones, at equal numbers of generated tokens. In reinforcement a step's tokens are credited with the
outcome and α times their own step's progress (section 3.2's Q^π + α A^μ): `mrt --process_reward value:FOLDER`, against GRPO on the outcome alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import spearmanr

from telos.algorithms import run as runs
from telos.algorithms.language.best_of_n import expected_best
from telos.catalogue._arith import (
    FULL,
    MOST_TOKENS,
    SMOKE,
    START,
    accuracy,
    answers,
    described,
    grpo_baseline,
    held_out_problems,
    items_of,
    learn,
    training_problems,
)
from telos.catalogue._arith_process import judge_of_steps, labelled_steps, last_mean, outcomes_alone
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab, commons, named
from telos.core.seeds import numpy_generator
from telos.data.batches import pad_1d
from telos.environments.text.arith import TESTBED
from telos.evaluation.leash import Sampled
from telos.functional.process import aggregate
from telos.models.language import LanguageModel
from telos.models.packing import Answers
from telos.objectives.process_reward import load_process_reward

LENGTH, HORIZON = 4, 12
STEP_SIZE, ALPHA = 1.0, 3.0  # of the exact update; the paper's α lies between 3 and 5 in training
INSTANCES = 20
BEST_OF = 8  # the complementary prover of the exact part
LABELS: Mapping[str, Any] = {"completions": 8, "prover_best_of": 4}  # the paper's K
SEARCH: Mapping[str, Any] = {"beams": 2, "expansions": 4, "score": "last", "max_completion_length": MOST_TOKENS, "max_step_tokens": 24}
PROGRESS = 1.0  # α in training on text, where advantages are divided by their deviation


# Exact -----------------------------------------------------------------------------------------------------------------------------------


def values(right: np.ndarray) -> np.ndarray:
    """[H + 1, L + 1]: the chance of success at each time with so many tokens found; `right` [H, L] is the chance of the next one."""
    found = np.zeros((HORIZON + 1, LENGTH + 1))
    found[:, LENGTH] = 1.0
    for t in reversed(range(HORIZON)):
        found[t, :LENGTH] = right[t] * found[t + 1, 1:] + (1 - right[t]) * found[t + 1, :LENGTH]
    return found


def gains(of: np.ndarray) -> np.ndarray:
    """[H, L]: Q of the right token less Q of any other, from values."""
    return of[1:, 1:] - of[1:, :LENGTH]


def improvement(right: np.ndarray, prover: np.ndarray | None) -> float:
    """By how much one update with step size γ on Q^π + α A^μ, π'(a|s) ∝ π(a|s) exp(γ (Q^π + α A^μ)(s, a)), raises the chance of success."""
    before = values(right)
    reward = gains(before) + (0.0 if prover is None else ALPHA * gains(prover))
    odds = right / (1 - right) * np.exp(STEP_SIZE * reward)
    return float(values(odds / (1 + odds))[0, 0] - before[0, 0])


def distinction_and_alignment(right: np.ndarray, prover: np.ndarray) -> float:
    """E_s [ Var_{a∼π} A^μ(s, a) + E_{a∼π} A^μ(s, a) A^π(s, a) ], to which the improvement is at least proportional (Setlur et al. 2024, theorem 3.1)."""
    visits, now = np.zeros((HORIZON, LENGTH)), np.eye(LENGTH + 1)[0]
    for t in range(HORIZON):
        visits[t] = now[:LENGTH]
        move = now[:LENGTH] * right[t]
        now = now + np.append(-move, 0.0) + np.append(0.0, move)
    mine, its = gains(values(right)), gains(prover)
    return float((visits * right * (1 - right) * (its**2 + its * mine)).sum())


def provers(right: np.ndarray) -> dict[str, np.ndarray]:
    """The values of provers: best of K of the policy, one that is right whenever it can be, and one that hardly ever is."""
    own = values(right)
    found = {f"best of {k}": 1 - (1 - own) ** k for k in (1, 2, 4, 8, 16, 64, 1024)}
    time, done = np.indices(own.shape)
    return found | {"too strong": (HORIZON - time >= LENGTH - done).astype(float), "too weak": values(0.1 * right)}


def exact(seed: int) -> dict[str, float]:
    """Means over random policies of the improvement with each prover, and the rank correlation of it with the theorem's term over provers."""
    found: dict[str, list[float]] = {}
    correlations = []
    for instance in range(INSTANCES):
        right = np.tile(numpy_generator(seed, "planted", instance).uniform(0.1, 0.3, LENGTH), (HORIZON, 1))
        judged = {name: (improvement(right, its), distinction_and_alignment(right, its)) for name, its in provers(right).items()}
        for name, (gain, _) in judged.items():
            found.setdefault(name, []).append(gain)
        found.setdefault("no prover", []).append(improvement(right, None))
        gained, terms = zip(*judged.values(), strict=True)
        correlations.append(float(cast(Any, spearmanr(gained, terms))[0]))
    mean = {name: float(np.mean(some)) for name, some in found.items()}
    ours = mean[f"best of {BEST_OF}"]
    return {
        **{f"improvement, {name}": value for name, value in mean.items()},
        **{f"improvement of best of {BEST_OF} over {name}": ours - mean[name] for name in ("no prover", "too strong", "too weak")},
        "rank correlation of theorem 3.1's term with the improvement": float(np.mean(correlations)),
    }


# Search ----------------------------------------------------------------------------------------------------------------------------------


def searched(lab: Lab, guide: str, held_out: Path) -> tuple[float, float]:
    """Accuracy of beam search with a guide on the held-out problems, and the tokens that it generates for each."""
    items = items_of(held_out)
    options = {**SEARCH, "process_reward": guide, "model": START, "data": str(held_out), "batch_size": len(items), "steps": 1}
    run = lab.train("search", "beam-search", checkpoint_every=0, **options)
    lines = [json.loads(line) for line in (run.path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    by_prompt = {item.prompt: item for item in items}
    right = [TESTBED.gold(by_prompt[line["prompt"]], line["completion"]) for line in lines]
    return float(np.mean(right)), run.metrics()[-1]["tokens/generated_a_prompt"]


def verified(lab: Lab, guide: str, pool: Sampled, held_out: Path) -> np.ndarray:
    """[problems, samples]: what an outcome reward model says of sampled answers."""
    path = lab.folder(f"scores/{named('scores', guide=guide, problems=held_out)}.json")
    if not path.exists():
        runs.prepare_threads()
        policy = LanguageModel.load(START)
        scorer, encode = load_process_reward(guide, policy), policy.tokenizer
        found = []
        for item, texts in zip(items_of(held_out), pool.texts, strict=True):
            prompt = torch.tensor([encode(item.prompt, add_special_tokens=False)["input_ids"]])
            ids, length = pad_1d([encode(text or " ", add_special_tokens=False)["input_ids"] for text in texts])
            owner = torch.zeros(len(texts), dtype=torch.int64)
            scores = scorer.score(Answers(prompt, torch.tensor([prompt.shape[1]]), ids, length, owner))
            found.append(aggregate(scores.values.double(), scores.mask, "last").tolist())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found), encoding="utf-8")
    return np.array(json.loads(path.read_text(encoding="utf-8")))


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    lab = Lab(root, "arith", seed, watch)
    data, held_out, samples = training_problems(lab, settings), held_out_problems(lab, settings), settings["samples"]
    rows = labelled_steps(lab, "pav", data, settings["label_batches"], batch_size=settings["label_prompts"], **LABELS)
    verifier = judge_of_steps(lab, rows, settings["judge_steps"])
    outcome_model = judge_of_steps(lab, outcomes_alone(lab, rows), settings["judge_steps"])

    pool = answers(commons(lab), START, held_out, samples)
    found, spent = searched(lab, verifier, held_out)
    n = min(samples, math.ceil(spent / pool.tokens.mean()))
    best = expected_best(verified(lab, outcome_model, pool, held_out), n, of=pool.right)
    figures = exact(seed) | {
        "accuracy of search": found,
        "accuracy of the outcome model's choice": float(best.mean()),
        "accuracy of search over the outcome model": found - float(best.mean()),
        "tokens of search": spent,
        "tokens of the outcome model's answers": n * float(pool.tokens.mean()),
        "answers that the outcome model chooses from": float(n),
    }

    options = {"process_reward": f"value:{verifier}", "process_coef": PROGRESS}
    trained = {"GRPO": grpo_baseline(lab, settings), "PAV": learn(lab, "pav", "mrt", data, settings["iterations"], **options)}
    sampled = {name: answers(lab, run, held_out, samples) for name, run in trained.items()}
    curves = {name: [row["reward"] for row in run.metrics()] for name, run in trained.items()}
    for name, run in trained.items():
        figures |= {
            f"success over the run, {name}": float(np.mean(curves[name])),
            f"success in the last iterations, {name}": last_mean(run.metrics(), "reward", 10),
        }
        figures |= described(name, sampled[name], held_out)
    window = min(10, settings["iterations"])
    smooth = np.convolve(curves["PAV"], np.ones(window) / window, mode="valid")
    reached = np.flatnonzero(smooth >= figures["success in the last iterations, GRPO"])
    needed = (int(reached[0]) + window if len(reached) else 2 * settings["iterations"]) / settings["iterations"]
    return figures | {
        "success over the run, PAV over GRPO": figures["success over the run, PAV"] - figures["success over the run, GRPO"],
        "share of GRPO's iterations until its last success": needed,  # 2 where it is not reached
        "accuracy of PAV over GRPO": accuracy(sampled["PAV"]) - accuracy(sampled["GRPO"]),
    }


CLAIM = Claim(
    key="pav",
    statement="progress under a complementary prover improves a policy more than under a prover that is too strong or too weak, and a verifier of progress "
    "beats outcome rewards in search at equal compute and in the sample efficiency of reinforcement",
    baselines=(
        "no prover, one that is too strong, one that is too weak",
        "best-of-n by an outcome reward model",
        "grpo on the outcome reward",
    ),
    facts=(
        *(
            Fact(
                f"one exact update gains at least a tenth more success with the prover best of {BEST_OF} than with {name}",
                f"improvement of best of {BEST_OF} over {name}",
                ">",
                0.1,
            )
            for name in ("no prover", "too strong", "too weak")
        ),
        Fact(
            "over provers the improvement ranks as distinction and alignment do",
            "rank correlation of theorem 3.1's term with the improvement",
            ">",
            0.8,
        ),
        Fact(
            "search is right more often than the outcome model's choice from as many tokens",
            "accuracy of search over the outcome model",
            ">",
            0.0,
        ),
        Fact("over the whole run more answers succeed than with GRPO", "success over the run, PAV over GRPO", ">", 0.0),
        Fact("GRPO's last success is reached in fewer iterations", "share of GRPO's iterations until its last success", "<", 1.0),
    ),
    experiment=experiment,
    budgets={
        "smoke": Budget(1, {**SMOKE, "iterations": 2, "label_batches": 1, "label_prompts": 10, "judge_steps": 2}),
        "full": Budget(3, {**FULL, "label_batches": 4, "label_prompts": 32, "judge_steps": 60}),
    },
    notes="A tenth means 0.1 of the chance of success. On text the prover is best-of-4 alone. Beams are ranked by the verifier's chance of success under the "
    "prover, without the policy's own Q^π, for which the paper has a second verifier. The outcome model gets the labels' answers, not their completions.",
)
