"""STaR: expert iteration that also explains answers it was told.

For a prompt to which none of the policy's answers is right, the policy is shown the prompt with a hint, such as the right result (`hint`, a template over the
data's columns), and what it then writes is kept when it is right, as an answer to the prompt without the hint: rationalisation (Zelikman et al. 2022,
section 3.3). Every iteration learns from the start's weights anew (Algorithm 1, line 7), as `expert-iteration` does. Departures: hinted answers are sampled
for every prompt, since which prompts fail is known only afterwards, and used for failed ones alone; several samples a prompt where the paper has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from telos.algorithms.language import rejection_sampling_sft
from telos.algorithms.language._arrange import Arranged, right_answers
from telos.algorithms.language._loop_iterative import IterativeConfig, refuse_changed
from telos.core.config import require
from telos.core.method import Method
from telos.objectives.judges import Judged


@dataclass(frozen=True, kw_only=True)
class Config(IterativeConfig):
    """Options of STaR."""

    samples_per_prompt: int = 4  # answers to each prompt (paper: 1)
    examples_per_prompt: int = 1  # right answers that a prompt gives to learn from, at most (paper: 1)
    learning_rate: float = 1e-5  # peak, AdamW (paper: 1e-6)
    threshold: float = 0.5  # reward from which on an answer is right
    hint: str = (
        "{prompt}"  # the prompt with a hint: a template over {prompt} and the data's columns, as "It is {answer}. {prompt}"; default: none
    )
    hinted_samples: int = 1  # answers that are written with the hint, >= 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "hinted_samples")
        refuse_changed(self, "reward_scale", "where answers are judged one by one")


def writers(config: Config) -> Mapping[str, int]:
    return {"policy": config.samples_per_prompt, "hinted": config.hinted_samples}


def arrange(config: Config, judged: Judged) -> Arranged:
    """The right answers that were written without a hint; with one, where there is none of these."""
    right = np.nan_to_num(judged.reward, nan=-np.inf) >= config.threshold
    hinted = np.arange(right.shape[1]) >= config.samples_per_prompt
    solved = right[:, ~hinted].any(1, keepdims=True)
    return right_answers(judged, config.threshold, config.examples_per_prompt, np.where(solved, ~hinted, hinted))


METHOD = Method(
    key="star",
    title="STaR",
    family="language",
    loop="iterative",
    changes="expert iteration that also learns from right answers which were written after a hint",
    paper="Zelikman et al. 2022, STaR: Bootstrapping Reasoning With Reasoning, arXiv:2203.14465",
    config=Config,
    loss=rejection_sampling_sft.loss,
    arrange=arrange,
    writers=writers,
    needs=frozenset({"restart"}),
    aliases=("self-taught-reasoner", "rationalization"),
)
