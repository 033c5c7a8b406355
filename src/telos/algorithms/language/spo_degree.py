"""Self-supervised Preference Optimization: beside the alignment loss the model tells how much of an answer's key content has been taken away.

    L = L_DPO + γ · mean over both answers y of CE(head(h(x, y_d)), d)

y_d is y without d/K of its key phrases, the most important first, d ∈ {0 … K − 1} its degree, h the hidden state at the answer's end and `head` a linear
classifier that is learned along. A binary preference says which answer is better; the degrees, which cost no labels, teach the model to notice by how
much. The loss is an option of every pairwise method (`--loss.degree`, weight γ; see `_degree` for how versions are made); this method is DPO with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language import dpo
from telos.algorithms.language._loop_pairs import LogisticConfig
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.pairwise import PairLogps
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(LogisticConfig):
    """Options of DPO with the preference-degree loss."""

    beta: float = 0.1  # strength of the KL regularisation, > 0
    loss_degree: float = 0.1  # weight of the self-supervised preference-degree loss, > 0

    def __post_init__(self) -> None:
        if self.loss_degree == 0:
            raise UsageError("--loss_degree 0 makes spo-degree plain dpo; train dpo, or give a weight above 0")
        super().__post_init__()
        require(self, "> 0", "beta")


def loss(config: Config, pair: PairLogps) -> Losses:
    return dpo.loss(dpo.Config(beta=config.beta, label_smoothing=config.label_smoothing), pair)


METHOD = Method(
    key="spo-degree",
    title="Self-supervised Preference Optimization",
    family="language",
    loop="pairs",
    changes="adds to DPO a classifier of how much of an answer's key content was taken away",
    paper="Li et al. 2024, Self-supervised Preference Optimization: Enhance Your Language Model with Preference Degree Awareness, "
    "arXiv:2409.17791",
    config=Config,
    loss=loss,
    needs=frozenset({"reference"}),
    system=171,
    aliases=("spo-self-supervised", "preference-degree"),
)
