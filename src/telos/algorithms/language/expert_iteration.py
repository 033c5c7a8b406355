"""Expert iteration: sample, keep what is right, raise its likelihood; again with the better policy.

    D_i = { (x, y) : y ~ π_{i−1}(· | x), r(x, y) >= threshold },   L = − Σ_t log π(y_t | x, y_<t) / (number of learned tokens)

The search of Anthony et al. 2017 is sampling here, as in its use for language models (ReST-EM: Singh et al. 2023; Havrilla et al. 2024). Equal answers to a
prompt count once, and each prompt gives up to `examples_per_prompt`, so that easy prompts do not crowd out the others. As in ReST-EM every iteration learns
from the start's weights anew (π_0), which keeps the policy from drifting; it writes with what the iteration before has learned.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language import rejection_sampling_sft
from telos.algorithms.language._arrange import Arranged, right_answers
from telos.algorithms.language._loop_iterative import IterativeConfig, refuse_changed
from telos.core.config import require
from telos.core.method import Method
from telos.objectives.judges import Judged


@dataclass(frozen=True, kw_only=True)
class Config(IterativeConfig):
    """Options of expert iteration."""

    samples_per_prompt: int = 8  # answers to each prompt, >= 2 (ReST-EM: 32)
    examples_per_prompt: int = 4  # right answers that a prompt gives to learn from, at most (ReST-EM: 10)
    learning_rate: float = 1e-5  # peak, AdamW
    threshold: float = 0.5  # reward from which on an answer is right

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 2", "samples_per_prompt")
        refuse_changed(self, "reward_scale", "where answers are judged one by one")


def arrange(config: Config, judged: Judged) -> Arranged:
    return right_answers(judged, config.threshold, config.examples_per_prompt)


METHOD = Method(
    key="expert-iteration",
    title="Expert iteration",
    family="language",
    loop="iterative",
    changes="learns from the start anew, in every iteration, the right answers that the policy of the one before has written",
    paper="Anthony et al. 2017, Thinking Fast and Slow with Deep Learning and Tree Search, arXiv:1705.08439; Singh et al. 2023, arXiv:2312.06585",
    config=Config,
    loss=rejection_sampling_sft.loss,
    arrange=arrange,
    needs=frozenset({"restart"}),
    aliases=("rest-em", "exit"),
)
