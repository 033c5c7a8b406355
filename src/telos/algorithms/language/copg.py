"""Contrastive Policy Gradient: a policy gradient that is right on data of any policy, because each answer is the other's baseline.

    ρ(y) = log π(y|x)/π_ref(y|x),   R_β(y) = R(x, y) − β ρ(y)
    ℓ(y, y′) = (R_{β/2}(y) − R_{β/2}(y′)) (ρ(y) − ρ(y′)),   maximised: L = −ℓ
    ∇ℓ = (R_β(y) − R_β(y′)) ∇ log π(y) + (R_β(y′) − R_β(y)) ∇ log π(y′)

The loss is differentiated as it stands; the ½ in R_{β/2} is what makes R_β of its gradient. It takes any score of whole answers, and the
two answers in any order. With answers from π, ∇E[ℓ] is twice the policy gradient of E[R] − β KL(π‖π_ref). With answers from any policies
of full support the maximum is still π ∝ π_ref exp(R/β), with no importance weights. −ℓ is (β/2) (ρ(y) − ρ(y′) − (R(y) − R(y′))/β)² less a
constant: IPO is the case R(y_w) = −R(y_l) = ¼, and its gradient is 2/β times this one.
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
    """Options of CoPG."""

    beta: float = 0.1  # strength of the KL regularisation, > 0, in units of the score a nat

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")


def loss(config: Config, pair: PairLogps) -> Losses:
    assert pair.chosen_score is not None
    assert pair.rejected_score is not None
    log_ratio = pair.chosen_ratio - pair.rejected_ratio
    score = pair.chosen_score - pair.rejected_score
    values = (config.beta / 2 * log_ratio - score) * log_ratio
    metrics = diagnostics(pair, config.beta * pair.chosen_ratio, config.beta * pair.rejected_ratio)
    # The better answer is the one with the higher score, on whichever side it stands; pairs of equal scores are not counted.
    agreement = ((log_ratio * score > 0).float(), score != 0)
    scores = {"scores/chosen": pair.chosen_score, "scores/rejected": pair.rejected_score}
    residual = {"rewards/residual": (config.beta * log_ratio - score).abs()}  # 0 at the optimum, for every pair
    return Losses(values, metrics=metrics | scores | residual | {"rewards/accuracies": agreement})


METHOD = Method(
    key="copg",
    title="CoPG",
    family="language",
    loop="pairs",
    changes="takes the policy gradient on off-policy pairs, each answer the other's baseline, without importance weights",
    paper="Flet-Berliac et al. 2024, Contrastive Policy Gradient: Aligning LLMs on sequence-level scores in a supervised-friendly fashion, "
    "arXiv:2406.19185",
    config=Config,
    loss=loss,
    needs=frozenset({"reference", "scores"}),
    system=54,
    aliases=("contrastive-policy-gradient",),
)
