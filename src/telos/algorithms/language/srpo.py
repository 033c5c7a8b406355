"""Self-Improving Robust Preference Optimization: one model learns to answer and to improve an answer that it is shown, without adversarial training.

    min over π, max over π†   E_{y1 ∼ π, y2 ∼ π†(·|y1, x)}[P(y2 ≻ y1|x)] − β KL(π†‖π_ref | y1, x) + β KL(π‖π_ref | x)

π† is the model after the prompt that shows y1 (`data.preferences.revision_prompt`), and its reference is π_ref after the same prompt. Write ρ for
log π/π_ref and ρ†(y2|y1) for log π†(y2|y1, x)/π_ref(y2|y1, x). The inner maximum is π† ∝ π_ref exp(P(y2 ≻ y1)/β), so that with P(y1 ≻ y1) = ½

    P(y2 ≻ y1) = ½ + β (ρ†(y2|y1) − ρ†(y1|y1))                                                                                          (1)

and its value β log Z†(y1) = ½ − β ρ†(y1|y1) leaves for π the minimum π ∝ π_ref/Z†: ρ(y) = ρ†(y|y) up to a constant of the prompt. (1) for (y1, y2) less (1)
for (y2, y1), with ρ in the place of ρ†(y|y), gives

    P(y2 ≻ y1) = ½ + β/2 (ρ†(y2|y1) − ρ†(y1|y2) + ρ(y2) − ρ(y1))                                                                        (2)

Both right-hand sides are regressed on the label, which is P in expectation:

    L_improve = Σ_{y ∈ {y_w, y_l}} (½ − β (ρ†(y_w|y) − ρ†(y_l|y)))²,    L_generate = (½ − β/2 (ρ†(y_w|y_l) − ρ†(y_l|y_w) + ρ(y_w) − ρ(y_l)))²
    L = (1 − α) L_generate + α L_improve

The minimum does not depend on who wrote the pairs, as long as they cover the answers. π† needs L_improve: α = 0 leaves (2) one equation for two unknowns.
Both terms of L_improve are summed here; their mean would be another α. `revise` improves answers again and again at inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from telos.algorithms.language._loop_pairs import PairsConfig
from telos.algorithms.language._sampling import sample_texts
from telos.core.config import require
from telos.core.method import Method
from telos.core.seeds import derive
from telos.data.preferences import revision_prompt
from telos.functional.pairwise import PairLogps, diagnostics
from telos.functional.reduction import Losses
from telos.models.generation import Sampling
from telos.models.language import LanguageModel


@dataclass(frozen=True, kw_only=True)
class Config(PairsConfig):
    """Options of SRPO."""

    beta: float = 0.1  # strength of the KL regularisation, > 0, in units of probability a nat
    alpha: float = 0.5  # share of the loss of improving shown answers, 0 … 1; the rest is that of answering

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, ">= 0 and <= 1", "alpha")


def loss(config: Config, pair: PairLogps) -> Losses:
    assert pair.revisions is not None
    beta, (after_chosen, after_rejected) = config.beta, pair.revisions
    improve = sum((0.5 - beta * (after.chosen_ratio - after.rejected_ratio)) ** 2 for after in pair.revisions)
    crossed = after_rejected.chosen_ratio - after_chosen.rejected_ratio  # each side after the prompt that shows the other
    generate = (0.5 - beta / 2 * (crossed + pair.chosen_ratio - pair.rejected_ratio)) ** 2
    better = sum((after.chosen_ratio > after.rejected_ratio).float() for after in pair.revisions) / 2
    metrics = {"loss/generate": generate, "loss/improve": improve, "revisions/accuracies": better}
    return Losses(
        (1 - config.alpha) * generate + config.alpha * improve,
        metrics=diagnostics(pair, beta * pair.chosen_ratio, beta * pair.rejected_ratio) | metrics,
    )


def revise(model: LanguageModel, prompts: Sequence[Any], n: int, sampling: Sampling, seed: int = 0) -> list[list[str]]:
    """Answers to the prompts (text or conversations) and `n` revisions of them: n + 1 lists of one text a prompt. Each revision is shown the
    answer before it, and none of the earlier ones."""
    asked = list(prompts)
    steps: list[list[str]] = []
    for step in range(n + 1):
        steps.append([texts[0] for texts in sample_texts(model, asked, sampling, seed=derive(seed, "revision", step))])
        asked = [revision_prompt(prompt, text) for prompt, text in zip(prompts, steps[-1], strict=True)]
    return steps


METHOD = Method(
    key="srpo",
    title="Self-Improving Robust Preference Optimization",
    family="language",
    loop="pairs",
    changes="learns to improve a shown answer together with answering, by two regressions that solve a min-max game offline",
    paper="Choi et al. 2024, Self-Improving Robust Preference Optimization, arXiv:2406.01660",
    config=Config,
    loss=loss,
    needs=frozenset({"reference", "revisions"}),
    system=56,
    aliases=("self-improving-robust-preference-optimization",),
)
