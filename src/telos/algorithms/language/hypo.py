"""Hybrid Preference Optimization: DPO on offline pairs, and the KL divergence from the reference on answers that the policy writes now.

    L = L_DPO(offline pairs) + λ E_{y ∼ π}[log π(y|x)/π_ref(y|x)]                                                             (algorithm 1)

On the pairs alone DPO leaves open how likely the answers are that no pair shows, so its reverse KL may be anything; the second term needs prompts
and answers but no labels. Its expectation is over the policy itself, ∇KL = E_π[log π/π_ref ∇log π] (the score function's; the term E_π[∇log π] is 0),
so the log-ratio of a sampled answer is not differentiated but weighs ∇log π, as in the paper: sg(log π/π_ref) · log π, sg stopping gradients, without
a baseline. What is written here has the same gradient and the log-ratio for its value, so that the loss that is logged is L:

    KL ≈ ρ (1 + log π(y|x) − sg(log π(y|x))),    ρ = sg(log π(y|x)/π_ref(y|x)),    y ∼ π at this step

Where an answer is cut at `samples_length` tokens this is the divergence of the answers' beginnings. λ = 0 is DPO.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telos.algorithms.language import dpo
from telos.algorithms.language._loop_pairs import SampledConfig
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, SampleLogps
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(SampledConfig):
    """Options of HyPO."""

    beta: float = 0.1  # strength of the KL regularisation in DPO's loss, > 0
    kl_coef: float = 0.01  # weight of the online KL divergence, >= 0 a nat (the paper's λ); 0 = DPO

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, ">= 0", "kl_coef")
        if self.samples_from != "policy":
            raise UsageError(f"--samples_from {self.samples_from}: the divergence of hypo is an expectation over the policy's own answers")


def kl_surrogate(samples: SampleLogps) -> Tensor:
    """[B, n]: of each answer drawn from the policy, an unbiased estimate of KL(π‖π_ref) in nats by value and by gradient."""
    log_prob = samples.sum
    return samples.ratio.detach() * (1 + log_prob - log_prob.detach())


def loss(config: Config, pair: PairLogps) -> Losses:
    assert pair.samples is not None
    fit = dpo.loss(dpo.Config(beta=config.beta, label_smoothing=config.label_smoothing), pair)
    kl = kl_surrogate(pair.samples).mean(1)
    return Losses(fit.values + config.kl_coef * kl, metrics={**fit.metrics, "samples/kl": kl})


METHOD = Method(
    key="hypo",
    title="Hybrid Preference Optimization",
    family="language",
    loop="pairs",
    changes="adds to DPO the reverse KL on answers that the policy writes while it learns, for which no labels are needed",
    paper="Song et al. 2024, The Importance of Online Data: Understanding Preference Fine-tuning via Coverage, arXiv:2406.01462",
    config=Config,
    loss=loss,
    needs=frozenset({"reference", "samples"}),
    system=41,
    aliases=("hybrid-preference-optimization",),
)
