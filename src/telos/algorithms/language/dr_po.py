"""Dr. PO: PPO that also starts from states inside the answers of the preference data.

A generator can be reset to any partial text, so rollouts need not all begin at the prompt: with probability `reset_share` an answer goes on from a beginning of
the data's answer to the same prompt, cut at a uniformly drawn place (Chang et al. 2024, Algorithm 1, line 5). Good states that the policy would hardly reach by
itself are then learned from directly. Only the policy's own tokens are learned from; the reward sees the whole answer. Data are prompts with completions, or
pairs, whose chosen answers are taken. Advantages, critic and loss are those of `ppo-max`. Answers to one prompt go on from one beginning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from telos.algorithms.language import ppo_max
from telos.core.config import require
from telos.core.method import Method
from telos.core.seeds import numpy_generator
from telos.data.batches import Prompts, Rollouts


@dataclass(frozen=True, kw_only=True)
class Config(ppo_max.Config):
    """Options of Dr. PO."""

    reset_share: float = 0.5  # β: share of prompts whose answers go on from the data, 0 … 1 (paper: 0.5 to 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and <= 1", "reset_share")


def sample(config: Config, draw: Callable[..., tuple[Rollouts, list[str]]], prompts: Prompts, index: int) -> tuple[Rollouts, list[str]]:
    assert prompts.answer_ids is not None
    assert prompts.answer_length is not None
    generator = numpy_generator(config.seed, "resets", index)
    begun = []
    for ids, length in zip(prompts.answer_ids.tolist(), prompts.answer_length.tolist(), strict=True):
        # At least one token is left to write; the answer's last one is its end.
        most = min(length - 1, config.max_completion_length - 1)
        cut = int(generator.integers(0, most + 1)) if most > 0 else 0
        begun.append(ids[:cut] if generator.random() < config.reset_share else [])
    return draw("policy", prompts, begun)


METHOD = Method(
    key="dr-po",
    title="Dataset Reset Policy Optimization",
    family="language",
    loop="rollouts",
    changes="PPO whose answers also go on from beginnings of the answers in the preference data",
    paper="Chang et al. 2024, Dataset Reset Policy Optimization for RLHF, arXiv:2404.08495",
    config=Config,
    loss=ppo_max.loss,
    estimate=ppo_max.estimate,
    critic_loss=ppo_max.critic_loss,
    sample=sample,
    needs=frozenset({"reference", "reward", "critic", "answers"}),
    system=20,
    aliases=("dataset-reset",),
)
