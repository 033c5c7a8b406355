"""KTO: each answer is worth more or less than a reference point, as people see gains and losses; no pairs are needed.

    r(x, y) = log π(y|x) / π_ref(y|x),   z_0 = KL(π‖π_ref)
    v(x, y) = λ_D σ(β (r − z_0)) where y is desirable,   λ_U σ(β (z_0 − r)) where it is not
    L = E[λ_y − v(x, y)]                                                        (section 4.1)

z_0 is the loop's estimate, the same for a whole batch, at least 0 and without gradient. Losses saturate: an answer that is far on the wrong side of
z_0 has hardly any gradient, so KTO gives up on answers it cannot move, mislabelled ones among them. The paper advises to choose the weights so that
λ_D n_D / (λ_U n_U) is between 1 and 4/3 for n_D desirable and n_U undesirable answers (the run's record has both counts).

Metrics: `rewards/chosen` and `rewards/rejected` are β r of desirable and of undesirable answers. z_0 is `kl/reference_point`; `kl` is, as everywhere,
the KL estimated from the policy's own answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from telos.algorithms.language._loop_unpaired import UnpairedConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import LabelledLogps
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(UnpairedConfig):
    """Options of KTO."""

    beta: float = 0.1  # risk aversion, how fast value saturates, > 0, a nat (paper: 0.1)
    desirable_weight: float = 1.0  # λ_D: weight of desirable answers, >= 0 (paper: 1)
    undesirable_weight: float = 1.0  # λ_U: weight of undesirable answers, >= 0 (paper: 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, ">= 0", "desirable_weight", "undesirable_weight")


def loss(config: Config, batch: LabelledLogps) -> Losses:
    assert batch.label is not None
    assert batch.kl is not None
    label, gain = batch.label, batch.ratio - batch.kl
    weight = torch.where(label, gain.new_tensor(config.desirable_weight), gain.new_tensor(config.undesirable_weight))
    values = weight - weight * torch.sigmoid(config.beta * torch.where(label, gain, -gain))
    rewards, logps = config.beta * batch.ratio, batch.answer.sum
    metrics = {"rewards/chosen": (rewards, label), "rewards/rejected": (rewards, ~label)}
    return Losses(
        values, metrics=metrics | {"logps/chosen": (logps, label), "logps/rejected": (logps, ~label), "kl/reference_point": batch.kl}
    )


METHOD = Method(
    key="kto",
    title="KTO",
    family="language",
    loop="unpaired",
    changes="learns from single answers marked desirable or not, by a value function of gains and losses",
    paper="Ethayarajh et al. 2024, KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306",
    config=Config,
    loss=loss,
    needs=frozenset({"reference", "labels", "kl"}),
    aliases=("kahneman-tversky-optimization",),
)
