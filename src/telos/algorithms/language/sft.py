"""Supervised fine-tuning: maximum likelihood of the answers.

    L = − Σ_t log π(y_t | x, y_<t) / (number of learned tokens in the whole batch)

The mean runs over the tokens of the batch, not first over each example: with micro-batches or replicas the denominator stays that of the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telos.algorithms.language._loop_supervised import SupervisedConfig
from telos.core.method import Method
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(SupervisedConfig):
    """Options of SFT."""


def loss(config: Config, logprobs: Tensor, mask: Tensor) -> Losses:
    """Negative log-likelihood per learned token. logprobs [B, T], mask [B, T] bool."""
    return Losses(-logprobs, mask, {"logps/token": (logprobs, mask)})


METHOD = Method(
    key="sft",
    title="Supervised fine-tuning",
    family="language",
    loop="supervised",
    changes="maximises the likelihood of given answers",
    paper="Ouyang et al. 2022, Training language models to follow instructions with human feedback, arXiv:2203.02155, section 3.5",
    config=Config,
    loss=loss,
    aliases=("supervised", "behaviour-cloning-lm"),
)
