"""Regularized Preference Optimization: DPO plus the likelihood of the chosen answers, which is an adversarial regulariser in disguise.

    L = − log σ(β log π(y_w)/π_ref(y_w) − β log π(y_l)/π_ref(y_l)) − η β log π(y_0|x)

The paper looks for the policy that is best under the worst reward: one that fits the preferences nearly as well as possible but says the
least good of the policy compared with a baseline policy. Because every reward is β log π/π_ref of its own optimal policy, the max-min
problem becomes one minimisation, and the adversary becomes the second term: η is its weight, y_0 an answer of the baseline policy. As in
the paper's experiments, the baseline is the policy that wrote the chosen answers: y_0 = y_w. η = 0 is DPO.

Normalisation of the likelihood: summed over the answer in the paper's main part and the authors' code for it, which also has the product
η β; averaged over the answer's tokens in the paper's appendix (`nll_per_token`), where the authors' code weighs it by 0.2 at β = 0.5, an
η of 0.4 here. TRL's `sft` term averages over all chosen tokens of a batch and takes the whole weight as one number; that mean gives long
answers more weight than short ones and is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language._loop_pairs import LogisticConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, answer_nll, diagnostics, smoothed_logistic
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(LogisticConfig):
    """Options of RPO."""

    beta: float = 0.1  # strength of the KL regularisation, > 0 (paper: 0.01)
    eta: float = 0.005  # weight of the likelihood of chosen answers, over beta, >= 0 (paper: 0.005; 0.4 with nll_per_token); 0 = DPO
    nll_per_token: bool = False  # the likelihood is averaged over each answer's tokens, not summed

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, ">= 0", "eta")


def loss(config: Config, pair: PairLogps) -> Losses:
    chosen, rejected = config.beta * pair.chosen_ratio, config.beta * pair.rejected_ratio
    nll = answer_nll(pair.chosen, config.nll_per_token)
    values = smoothed_logistic(chosen - rejected, config.label_smoothing) + config.eta * config.beta * nll
    return Losses(values, metrics=diagnostics(pair, chosen, rejected) | {"nll_loss": nll})


METHOD = Method(
    key="rpo",
    title="Regularized Preference Optimization",
    family="language",
    loop="pairs",
    changes="adds to DPO the weighted likelihood of the chosen answers, derived from a reward chosen against the policy",
    paper="Liu et al. 2024, Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial Regularizer, "
    "arXiv:2405.16436",
    config=Config,
    loss=loss,
    needs=frozenset({"reference"}),
    system=70,
    aliases=("regularized-preference-optimization", "dpo-sft"),
)
