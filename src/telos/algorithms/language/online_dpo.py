"""Online DPO: DPO's loss on pairs that the policy has just written and an oracle has just labelled.

    y₁, y₂ ~ π_t(·|x),   (y_w, y_l) by the oracle
    L = − log σ(β log π(y_w|x)/π_ref(y_w|x) − β log π(y_l|x)/π_ref(y_l|x))      (DPO's loss, its reference fixed over the whole run)

The pairs follow the policy, so the data never fall behind it. With Bradley–Terry labels every π_t of full support has the same optimum as offline DPO,
π ∝ π_ref exp(r/β); what changes is which pairs show it. The oracle's label is drawn with the probability that it states: a reward prefers with
odds exp(Δr / reward_scale), and a small `reward_scale` makes its labels certain. More than two samples a prompt are an extension: the pairs are drawn
from them at random, and equal answers make no pair.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language._arrange import Arranged, labelled_pairs
from telos.algorithms.language._loop_iterative import PairedConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.pairwise import PairLogps, diagnostics, smoothed_logistic
from telos.functional.reduction import Losses
from telos.objectives.judges import Judged


@dataclass(frozen=True, kw_only=True)
class Config(PairedConfig):
    """Options of online DPO."""

    beta: float = 0.1  # strength of the KL regularisation, > 0 (paper: 0.1)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")


def arrange(config: PairedConfig, judged: Judged) -> Arranged:
    return labelled_pairs(judged, config.examples_per_prompt)


def loss(config: Config, pair: PairLogps) -> Losses:
    chosen, rejected = config.beta * pair.chosen_ratio, config.beta * pair.rejected_ratio
    return Losses(smoothed_logistic(chosen - rejected, 0.0), metrics=diagnostics(pair, chosen, rejected))


METHOD = Method(
    key="online-dpo",
    title="Online DPO",
    family="language",
    loop="iterative",
    changes="labels pairs of the policy's own answers while it trains, in place of pairs collected before",
    paper="Guo et al. 2024, Direct Language Model Alignment from Online AI Feedback, arXiv:2402.04792",
    config=Config,
    loss=loss,
    arrange=arrange,
    needs=frozenset({"reference"}),
    aliases=("oaif", "online-ai-feedback"),
)
