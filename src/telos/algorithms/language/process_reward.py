"""Process reward model: learns the chance that each step of an answer is right, or that an answer succeeds from there on.

    L = − 1/|steps| Σ_t  y_t log σ(z_t) + (1 − y_t) log(1 − σ(z_t))             (Lightman et al. 2023; Wang et al. 2023)

z_t is the head's number at step t's last token. A label y_t is 0 or 1 (a person's or a checker's verdict; the hard estimate of Math-Shepherd by
`--hard_labels`) or a chance in [0, 1] (its soft estimate), for which σ(z_t) → E[y_t]: trained on the success rates of a prover the model is a value
function, and differences between steps are process advantages (Setlur et al. 2024). `telos train math-shepherd` and `pav` write such labels.

Departures: the papers let a language model say one of two tokens at the end of a step; here a head gives one number, so that the folder is that of a reward
model. Every step weighs the same, whatever the length of its answer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from telos.algorithms.language._loop_process import ProcessConfig
from telos.core.method import Method
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(ProcessConfig):
    """Options of the process reward model."""


def loss(config: Config, logits: Tensor, labels: Tensor, mask: Tensor) -> Losses:
    return Losses(binary_cross_entropy_with_logits(logits, labels, reduction="none"), mask)


METHOD = Method(
    key="process-reward",
    title="Process reward model",
    family="language",
    loop="process",
    changes="judges every step of an answer, not the whole",
    paper="Lightman et al. 2023, Let's Verify Step by Step, arXiv:2305.20050; Wang et al. 2023, Math-Shepherd, arXiv:2312.08935",
    config=Config,
    loss=loss,
    aliases=("prm", "process-reward-model", "process-supervision"),
)
