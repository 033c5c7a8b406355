"""IPO: a squared loss that regresses the log-ratio margin on a constant, so that certain preferences do not drive it to infinity.

    h = log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)
    L = (h − 1 / (2β))²                                                         (eq. 17; β is the paper's τ)

On pairs whose two answers are drawn independently from a policy μ of full support, the minimum is the maximum of
E_π[P(y ≻ μ)] − β KL(π‖π_ref), which is π ∝ π_ref exp(P(y ≻ μ)/β), for any preference, transitive or not.

Two losses go by this name. The paper's takes h from whole answers (`length_normalized` false). TRL's takes h from log π/π_ref over the
answer's length (`length_normalized` true), which the paper does not derive: its optimum is another one as soon as lengths differ, and a β
that fits one does not fit the other, because h is then nats a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language._loop_pairs import PairsConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, diagnostics
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(PairsConfig):
    """Options of IPO."""

    beta: float = 0.1  # strength of the KL regularisation, > 0; the margin aims at 1/(2 beta) (paper's τ: 0.1, 0.5, 1)
    length_normalized: bool = False  # log-ratios over the answers' lengths, as in TRL; the paper's are summed

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")


def loss(config: Config, pair: PairLogps) -> Losses:
    chosen, rejected = pair.chosen_ratio, pair.rejected_ratio
    if config.length_normalized:
        chosen, rejected = chosen / pair.chosen.length, rejected / pair.rejected.length
    values = (chosen - rejected - 1 / (2 * config.beta)) ** 2
    return Losses(values, metrics=diagnostics(pair, config.beta * chosen, config.beta * rejected))


METHOD = Method(
    key="ipo",
    title="Identity Preference Optimization",
    family="language",
    loop="pairs",
    changes="regresses DPO's log-ratio margin on a constant, which keeps the regularisation when preferences are certain",
    paper="Azar et al. 2023, A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv:2310.12036",
    config=Config,
    loss=loss,
    needs=frozenset({"reference"}),
    aliases=("identity-preference-optimization", "psi-po"),
)
