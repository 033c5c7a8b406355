"""Math-Shepherd: the policy's own completions say which steps are right.

From after each step of an answer the completer, here the policy itself, writes N completions. With c of them reaching the right answer the step's label is

    hard    1 if c > 0, else 0            soft    c / N                                                     (Wang et al. 2023, section 3.3)

A process reward model is then trained on these labels by `process-reward`. The hard estimate asks whether the answer can still be reached, the soft one how
surely. Departures: the last step's label is the success of the answer as it stands; the prompt is labelled, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telos.algorithms.language._loop_steps import StepsConfig
from telos.algorithms.language.step_labels import Labelling, Successes
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(StepsConfig):
    """Options of Math-Shepherd."""

    labels: Labelling = "hard"  # hard: right if any completion succeeds; soft: the share that does (the paper trains on hard labels)


def estimate(config: Config, successes: Successes) -> Tensor:
    """Labels of the prompt and of the steps, [S + 1]."""
    return successes.labels(config.labels)


METHOD = Method(
    key="math-shepherd",
    title="Math-Shepherd",
    family="language",
    loop="steps",
    changes="labels the steps of answers by whether completions from there succeed, without people",
    paper="Wang et al. 2023, Math-Shepherd: Verify and Reinforce LLMs Step-by-step without Human Annotations, arXiv:2312.08935",
    config=Config,
    estimate=estimate,
    needs=frozenset({"reward"}),
    aliases=("shepherd", "monte-carlo-step-labels"),
)
