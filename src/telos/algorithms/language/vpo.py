"""Value-incentivized Preference Optimization: DPO whose implicit reward is made worse (offline) or better (online) where the data do not decide it.

The reward r is estimated by maximum likelihood, regularised by what it promises: min over r of ℓ(r) − s α J*(r), where
J*(r) = max over π of E_π[r] − β KL(π‖π_ref), s = −1 is pessimism and s = +1 optimism. Since preferences do not change when a function of the prompt is
added to r, r is calibrated: E_{y ∼ π_cal}[r(x, y)] = 0. With π_r ∝ π_ref exp(r/β), which attains J*, every y has J*(r) = r(x, y) − β log π_r/π_ref(y|x);
averaged over π_cal,

    J* = −β E_{y ∼ π_cal}[log π(y|x)/π_ref(y|x)],      L = L_DPO − s α J* = L_DPO + s α β E_{y ∼ π_cal}[log π(y|x)/π_ref(y|x)]

Here π_cal is the reference, whose answers are drawn anew at each step. Then J* = β KL(π_ref‖π) ≥ 0: pessimism adds αβ KL(π_ref‖π) and keeps the policy
where the reference is, optimism subtracts it. π_cal does not depend on π, so the gradient of the sampled mean is unbiased as it stands; of answers that
are cut at `samples_length` tokens it is the mean over their beginnings.

α = 0 is DPO. The paper's ℓ sums over the data where this is a mean over pairs: its α over their number is ours. Since J* is convex in r, pessimism has one
optimum. Optimism has none where no pair binds the reward, and at π = π_ref its gradient is 0: it is for data that the policy goes on to collect
(`vpo-online`), with an α that is small beside the fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from telos.algorithms.language import dpo
from telos.algorithms.language._loop_pairs import SampledConfig
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, SampleLogps
from telos.functional.reduction import Losses

Mode = Literal["pessimism", "optimism"]


@dataclass(frozen=True, kw_only=True)
class Config(SampledConfig):
    """Options of VPO."""

    beta: float = 0.1  # strength of the KL regularisation, > 0
    value_coef: float = 0.1  # weight of the optimal value J*, >= 0 (the paper's α, there over the number of pairs); 0 = DPO
    mode: Mode = "pessimism"  # the value is made small (for fixed data) or large (for data that the policy goes on to collect)
    samples_from: Literal["policy", "reference"] = (
        "reference"  # who writes the answers over which rewards have mean 0; only the reference here
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, ">= 0", "value_coef")
        if self.samples_from != "reference":
            raise UsageError(
                f"--samples_from {self.samples_from}: the reward of vpo is calibrated on a fixed distribution, the reference's"
            )


def optimal_value(beta: float, samples: SampleLogps) -> Tensor:
    """J* of the implicit reward with mean 0 over π_cal, estimated from answers of π_cal, [B]; in units of the reward."""
    return -beta * samples.ratio.mean(1)


def objective(pair: PairLogps, *, beta: float, label_smoothing: float, value_coef: float, mode: Mode) -> Losses:
    """DPO's loss plus or minus the weighted optimal value."""
    assert pair.samples is not None
    fit = dpo.loss(dpo.Config(beta=beta, label_smoothing=label_smoothing), pair)
    value = optimal_value(beta, pair.samples)
    weight = value_coef if mode == "pessimism" else -value_coef
    return Losses(fit.values + weight * value, metrics={**fit.metrics, "value": value})


def loss(config: Config, pair: PairLogps) -> Losses:
    return objective(pair, beta=config.beta, label_smoothing=config.label_smoothing, value_coef=config.value_coef, mode=config.mode)


METHOD = Method(
    key="vpo",
    title="Value-Incentivized Preference Optimization",
    family="language",
    loop="pairs",
    changes="adds to DPO the optimal value of the implicit reward, to be small offline (pessimism) or large online (optimism)",
    paper="Cen et al. 2024, Value-Incentivized Preference Optimization: A Unified Approach to Online and Offline RLHF, arXiv:2405.19320",
    config=Config,
    loss=loss,
    needs=frozenset({"reference", "samples"}),
    system=36,
    aliases=("value-incentivized-preference-optimization",),
)
