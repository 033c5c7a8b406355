"""Rejection sampling fine-tuning (RAFT): write n answers, keep the best, raise their likelihood; again from the new policy.

    L = − Σ_t log π(y*_t | x, y*_<t) / (number of learned tokens),   y* = argmax over n samples of π_t of r(x, y)

The optimum of an iteration is the law of the best of n samples of π_t. Repeated, it moves on towards the best answer that the policy can write at all:
there is no reference, and what stops it is the number of iterations. With --judge the reward is the win rate among the n answers. `examples_per_prompt`
keeps several of the best; the paper's other variant, which ranks over a whole batch of prompts, is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language._arrange import Arranged, best_answers
from telos.algorithms.language._loop_iterative import IterativeConfig, refuse_changed
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import LabelledLogps
from telos.functional.reduction import Losses
from telos.objectives.judges import Judged


@dataclass(frozen=True, kw_only=True)
class Config(IterativeConfig):
    """Options of rejection sampling fine-tuning."""

    samples_per_prompt: int = 8  # n: answers to each prompt, >= 2 (paper: 8 to 32)
    learning_rate: float = 1e-5  # peak, AdamW (paper: 2e-5)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 2", "samples_per_prompt")
        refuse_changed(self, "reward_scale", "where answers are ranked by the reward alone")


def arrange(config: IterativeConfig, judged: Judged) -> Arranged:
    return best_answers(judged.reward, config.examples_per_prompt)


def loss(config: IterativeConfig, batch: LabelledLogps) -> Losses:
    """Negative log-likelihood per token of the kept answers."""
    assert batch.score is not None
    answer = batch.answer
    return Losses(-answer.tokens, answer.mask, {"logps/token": (answer.tokens, answer.mask), "reward/kept": batch.score})


METHOD = Method(
    key="rejection-sampling-sft",
    title="Rejection sampling fine-tuning",
    family="language",
    loop="iterative",
    changes="raises the likelihood of the best of several sampled answers, iteration by iteration",
    paper="Dong et al. 2023, RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment, arXiv:2304.06767",
    config=Config,
    loss=loss,
    arrange=arrange,
    aliases=("raft", "rsf", "rejection-sampling-finetuning", "reward-ranked-finetuning"),
)
