"""Directional Preference Alignment: one model for all trade-offs, which reads in its prompt the direction in which its rewards are to be added.

    v = (v_1, …, v_k), |v| = 1, drawn for each prompt and written into it
    y* = argmax over n samples of π_t(·|x, v) of v · r(x, y),   L = − log π(y*|x, v) per token     (rejection sampling fine-tuning, conditioned)

At inference `directed` writes the prompt for a direction of the user's choice. For two rewards the paper draws v uniformly within 45° of the first
(helpfulness), so that the second may count against an answer; `max_angle` is that half-width, and with more than two rewards v leans from the first by
such an angle towards a uniformly drawn side. `region` positive draws v with no negative weight instead: for two rewards uniformly between the two axes.

`normalize` divides each reward by its standard deviation over the iteration's answers (its mean changes no choice), so that a direction means the
same whatever units the rewards have; one that is constant counts nothing. The paper scales its rewards to a common range beforehand.

Departures: a prompt keeps its direction for the whole run (`directions` gives it several); weights are written as whole per cent, as in the paper, with our
own words; the paper learns its rewards from ratings, here they are given. The rewards are shown the prompt without the direction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from telos.algorithms.language import rejection_sampling_sft
from telos.algorithms.language._arrange import Arranged, best_answers
from telos.algorithms.language._loop_iterative import IterativeConfig, refuse_changed
from telos.core.config import require
from telos.core.method import Method
from telos.core.seeds import numpy_generator
from telos.data.formats import Examples
from telos.objectives.judges import Judged

Floats = NDArray[np.float64]
COLUMN = "direction"


@dataclass(frozen=True, kw_only=True)
class Config(IterativeConfig):
    """Options of DPA."""

    samples_per_prompt: int = 8  # n: answers to each prompt, >= 2
    learning_rate: float = 1e-5  # peak, AdamW
    directions: int = 1  # directions that each prompt of the data is asked with, each a prompt of its own
    region: Literal["first", "positive"] = "first"  # directions near the first reward, or all without a negative weight
    max_angle: float = 45.0  # largest angle from the first reward's axis, degrees, 0 … 180 (paper: 45)
    normalize: bool = True  # rewards are divided by their standard deviation over an iteration's answers

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 2", "samples_per_prompt")
        require(self, ">= 1", "directions")
        require(self, "> 0 and <= 180", "max_angle")
        refuse_changed(self, "reward_scale", "where answers are ranked by their rewards alone")
        if self.region == "positive":
            refuse_changed(self, "max_angle", "on --region positive")


def objective_names(rewards: Sequence[str]) -> list[str]:
    """What the prompt calls the rewards: the names of their functions or folders, the second of equal ones with its number."""
    names = [spec.rpartition(":")[2] if ":" in spec else Path(spec).name for spec in rewards]
    return [name if names.count(name) == 1 else f"{name} {i + 1}" for i, name in enumerate(names)]


def directed(prompt: Any, names: Sequence[str], direction: Sequence[float]) -> Any:
    """The prompt (text or messages) that asks for an answer in this direction; `direction` [k] is brought to length 1."""
    length = math.hypot(*direction)
    weights = [f"{name} {round(100 * weight / length)}" for name, weight in zip(names, direction, strict=True)]
    wish = f"Weights: {', '.join(weights)}."
    if isinstance(prompt, str):
        return f"{wish}\n{prompt}"
    if prompt[0]["role"] == "system":
        return [{"role": "system", "content": f"{wish}\n{prompt[0]['content']}"}, *prompt[1:]]
    return [{"role": "system", "content": wish}, *prompt]


def draw_directions(config: Config, count: int, k: int, generator: np.random.Generator) -> Floats:
    """[count, k] random unit vectors of the configured region."""
    side = generator.normal(size=(count, k))
    if config.region == "positive":
        side = np.abs(side)
        return side / np.linalg.norm(side, axis=1, keepdims=True)
    side[:, 0] = 0.0
    angle = np.radians(generator.uniform(0, config.max_angle, size=(count, 1)))
    return np.cos(angle) * np.eye(k)[:1] + np.sin(angle) * side / np.linalg.norm(side, axis=1, keepdims=True)


def prepare(config: Config, examples: Examples) -> Examples:
    """Each row `directions` times, with as many directions in its prompt and in the column `direction`."""
    rows = np.repeat(np.arange(len(examples)), config.directions).tolist()
    names = objective_names(config.reward)
    drawn = draw_directions(config, len(rows), len(names), numpy_generator(config.seed, "directions")).tolist()
    records = [examples.records[i] for i in rows]
    examples.counts.kept = len(rows)
    return dataclasses.replace(
        examples,
        records=[row | {"prompt": directed(row["prompt"], names, v)} for row, v in zip(records, drawn, strict=True)],
        places=[examples.places[i] for i in rows],
        extra={name: [values[i] for i in rows] for name, values in examples.extra.items()} | {COLUMN: drawn},
    )


def arrange(config: Config, judged: Judged) -> Arranged:
    assert judged.scores is not None
    scores = judged.scores
    if config.normalize:
        spread = scores[judged.valid].std(0) if judged.valid.any() else np.ones(scores.shape[-1])
        scores = scores / np.where(spread > 0, spread, np.inf)
    return best_answers(np.einsum("pnk,pk->pn", scores, np.array(judged.columns[COLUMN])), config.examples_per_prompt)


METHOD = Method(
    key="dpa",
    title="Directional Preference Alignment",
    family="language",
    loop="iterative",
    changes="conditions rejection sampling fine-tuning on a direction in the space of several rewards",
    paper="Wang et al. 2024, Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with Multi-Objective Rewards, "
    "arXiv:2402.18571",
    config=Config,
    loss=rejection_sampling_sft.loss,
    arrange=arrange,
    prepare=prepare,
    needs=frozenset({"objectives"}),
    system=189,
    aliases=("directional-preference-alignment",),
)
