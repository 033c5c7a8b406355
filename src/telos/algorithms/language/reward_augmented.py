"""Reward-augmented data: the policy is told the score that its answer shall have, and so learns from both answers of a scored pair what they are.

    R(x, y, g) = −(g − r(x, y))²
    (x, y_w, y_l)  becomes  (x with target r(y_w): y_w ≻ y_l)  and  (x with target r(y_l): y_l ≻ y_w)
    L = − log σ(β log π(y_w|x, g)/π_ref(y_w|x, g) − β log π(y_l|x, g)/π_ref(y_l|x, g))

This is DPO on twice the pairs. A good rejected answer is not unlearnt, since it is the right one for its own score; a chosen answer that is hardly
better is not favoured blindly; and the best is asked for by conditioning on the highest score (`data.preferences.conditioned`), which the policy can
generalise to. The target is written in front of the prompt as a sentence of our own.

The relabelling is an option of every pairwise method (`--data.reward_augmented`), and the loss here is DPO's: this method is that option switched on.
The data must have scores (`chosen_score`, `rejected_score`), or `--reward` gives them.
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
    """Options of DPO on reward-augmented pairs."""

    beta: float = 0.1  # strength of the KL regularisation, > 0
    data_reward_augmented: bool = True  # learn from both sides of each pair, conditioned on their scores; it is what makes the method

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        if not self.data_reward_augmented:
            raise UsageError("--data_reward_augmented false makes reward-augmented plain dpo; train dpo instead")


def loss(config: Config, pair: PairLogps) -> Losses:
    return dpo.loss(dpo.Config(beta=config.beta, label_smoothing=config.label_smoothing), pair)


METHOD = Method(
    key="reward-augmented",
    title="Reward-Augmented DPO",
    family="language",
    loop="pairs",
    changes="conditions each pair on either answer's score as the target, so that both sides teach",
    paper="Zhang et al. 2024, Reward-Augmented Data Enhances Direct Preference Alignment of LLMs, arXiv:2410.08067",
    config=Config,
    loss=loss,
    needs=frozenset({"reference"}),
    system=154,
    aliases=("reward-augmented-data", "reward-conditioned-dpo"),
)
