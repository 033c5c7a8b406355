"""Implicit process rewards: an outcome model in the form of a log-ratio knows the value of every prefix, though nobody labelled a step.

    r(x, y) = β log π(y|x) / π_ref(y|x)
    L = − l log σ(r) − (1 − l) log(1 − σ(r)),   l = 1 where the answer is right        (Yuan et al. 2024: the cross-entropy objective)

The ratio of a prefix, q_t = β log π(y_1 … y_t | x) / π_ref(y_1 … y_t | x), is β log of the mean of e^{r/β} over the reference's ways to go on (their
proposition 3.1): a value of the prefix, so that q_t − q_{t−1} rewards step t. Any loss in which the reward is this ratio trains such a model: `dpo` and `nca`
from pairs, `kto` from labels, this one, the paper's best with few answers a prompt, from labels as well. `implicit:MODEL,REFERENCE` names the step rewards of
any of them.

Metrics: `rewards/chosen` and `rewards/rejected` are r of right and of wrong answers; `rewards/accuracies` the share with the right sign.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.nn.functional import binary_cross_entropy_with_logits

from telos.algorithms.language._loop_unpaired import UnpairedConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import LabelledLogps
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(UnpairedConfig):
    """Options of implicit process rewards."""

    beta: float = 0.05  # scale of the reward, > 0 (paper: 0.05)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")


def loss(config: Config, batch: LabelledLogps) -> Losses:
    assert batch.label is not None
    rewards, label, logps = config.beta * batch.ratio, batch.label, batch.answer.sum
    values = binary_cross_entropy_with_logits(rewards, label.to(rewards.dtype), reduction="none")
    metrics = {
        "rewards/chosen": (rewards, label),
        "rewards/rejected": (rewards, ~label),
        "rewards/accuracies": ((rewards > 0) == label).float(),
        "logps/chosen": (logps, label),
        "logps/rejected": (logps, ~label),
    }
    return Losses(values, metrics=metrics)


METHOD = Method(
    key="implicit-prm",
    title="Implicit PRM",
    family="language",
    loop="unpaired",
    changes="fits a log-ratio to whole answers' labels, whose differences between prefixes are process rewards",
    paper="Yuan et al. 2024, Free Process Rewards without Process Labels, arXiv:2412.01981",
    config=Config,
    loss=loss,
    needs=frozenset({"reference", "labels"}),
    system=160,
    aliases=("implicit-process-reward", "free-process-rewards"),
)
