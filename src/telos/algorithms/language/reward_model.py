"""Bradley–Terry reward model, with an annotated margin and centring.

    L = − log σ(r(x, y_w) − r(x, y_l) − m) + c (r(x, y_w) + r(x, y_l))²

The first term is Ouyang et al. 2022, eq. 1, for pairs; the margin m is that of Touvron et al. 2023 (Llama 2), eq. 2; the second term (Eisenstein et al. 2023,
arXiv:2312.09244, section 2) fixes the constant that Bradley–Terry leaves free, so that scores of different prompts can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from telos.algorithms.language._loop_reward_model import RewardModelConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(RewardModelConfig):
    """Options of the reward model."""

    center_coef: float = 0.01  # weight of the centring term, >= 0 (0.01 in Eisenstein et al.); 0 = off
    use_margin: bool = True  # subtract the data's `margin` column (0 where it has none)
    label_smoothing: float = 0.0  # probability that a label is wrong, 0 … 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "center_coef")
        require(self, ">= 0 and < 0.5", "label_smoothing")


def loss(config: Config, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Losses:
    """Per-pair loss from the scores of both answers, all [B]."""
    difference = chosen - rejected - (margin if config.use_margin else 0.0)
    eps = config.label_smoothing
    values = -(1 - eps) * logsigmoid(difference) - eps * logsigmoid(-difference)
    if config.center_coef:
        values = values + config.center_coef * (chosen + rejected) ** 2
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).float(),
    }
    return Losses(values, metrics=metrics)


METHOD = Method(
    key="reward-model",
    title="Bradley–Terry reward model",
    family="language",
    loop="reward-model",
    changes="learns a scalar score whose differences explain the preferences",
    paper="Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288; centring: Eisenstein et al. 2023, arXiv:2312.09244",
    config=Config,
    loss=loss,
    aliases=("rm", "reward-modeling", "bradley-terry"),
)
