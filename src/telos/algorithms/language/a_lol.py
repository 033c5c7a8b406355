"""A-LoL: the whole answer is one action, its advantage over what the reference would write weighs its likelihood, and bad answers are left out.

    A(x, y) = R(x, y) − V_ref(x)
    L = − A(x, y) w log π(y|x)

w is the importance weight π/π_ref, without gradient and clipped to [1 − ε, 1 + ε]:

    a-lol     w = clip(π(y|x)/π_ref(y|x)): of the whole answer
    seq       w_t = clip(π(y_t|·)/π_ref(y_t|·)): token by token, L = − A Σ_t w_t log π(y_t|·)
    ref-free  w = 1; no reference is in memory once the values are known
    kl        w = 1, and L gains β log π(y|x)/π_ref(y|x)

With π_ref as the law of the data, the gradient of L at π = π_ref is that of −E[R]: the value is a baseline. The KL penalty is estimated on the data, as in
the authors' code. There it has the gradient of β log π alone: an answer whose advantage is below β is pushed down, and the variant is `ref-free` with
A − β in the place of A.

Answers without a positive advantage are left out (`value_filter`), and answers are drawn in proportion to their advantage (`priority`), in addition to its
weight in the loss: drawn so, `ref-free` learns μ(y) A(x, y)², drawn uniformly μ(y) A(x, y), each normalised over the answers kept.

Departures: V_ref(x) is the mean score of `value_samples` answers that the reference writes to this prompt, where the paper trains a small head on the
reference by such answers to validation prompts. A prompt's value is then right in the mean but noisy (its error is σ/√n of one answer's σ). The paper
first fine-tunes the reference on all the data; give such a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from telos.algorithms.language._loop_unpaired import AdvantageConfig
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.pairwise import LabelledLogps
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(AdvantageConfig):
    """Options of A-LoL."""

    variant: Literal["a-lol", "ref-free", "seq", "kl"] = "a-lol"  # the importance weight: of the answer, none, of tokens; or a KL penalty
    clip_range: float = 0.9  # ε: importance weights are clipped to [1 − ε, 1 + ε], >= 0, for a-lol and seq (paper: 0.9)
    kl_coef: float = 0.1  # β: weight of the KL penalty, >= 0, in units of the score a nat, for kl

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "clip_range", "kl_coef")
        for name, variants in (("clip_range", ("a-lol", "seq")), ("kl_coef", ("kl",))):
            if self.variant not in variants and getattr(self, name) != getattr(Config, name):
                raise UsageError(f"--{name} has no effect with --variant {self.variant}")

    @property
    def spares(self) -> frozenset[str]:
        """Without importance weights the reference is there for values alone; one that was named still gives the KL."""
        named = self.reference is not None or self.reference_cache is not None
        return frozenset({"reference"}) if self.variant == "ref-free" and not named else frozenset()


def loss(config: Config, batch: LabelledLogps) -> Losses:
    assert batch.advantage is not None
    answer, advantage = batch.answer, batch.advantage
    metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = {"advantage": advantage, "logps/chosen": answer.sum}
    if batch.score is not None:
        metrics["reward"] = batch.score
    low, high = max(0.0, 1 - config.clip_range), 1 + config.clip_range
    if config.variant == "a-lol":
        weight = batch.ratio.detach().exp()
        values = -advantage * weight.clamp(low, high) * answer.sum
        metrics |= _clipped(weight, low, high)
    elif config.variant == "seq":
        assert batch.reference is not None
        tokens, reference = (side.tokens.masked_fill(~answer.mask, 0.0) for side in (answer, batch.reference))
        weight = (tokens - reference).detach().exp()
        values = -advantage * (weight.clamp(low, high) * tokens).sum(1)
        metrics |= _clipped(weight, low, high, answer.mask)
    else:
        values = -advantage * answer.sum
    if config.variant == "kl":
        values = values + config.kl_coef * batch.ratio
    return Losses(values, metrics=metrics)


def _clipped(weight: Tensor, low: float, high: float, mask: Tensor | None = None) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    found = {
        "importance_weight": weight.clamp(low, high),
        "clip_ratio/low": (weight < low).float(),
        "clip_ratio/high": (weight > high).float(),
    }
    return {name: value if mask is None else (value, mask) for name, value in found.items()}


METHOD = Method(
    key="a-lol",
    title="Advantage-Leftover Lunch RL",
    family="language",
    loop="unpaired",
    changes="weighs whole answers by their advantage over the reference and their importance weight, and leaves out those without advantage",
    paper="Baheti et al. 2023, Leftover Lunch: Advantage-based Offline Reinforcement Learning for Language Models, arXiv:2305.14718",
    config=Config,
    loss=loss,
    needs=frozenset({"reference", "advantages"}),
    system=30,
    aliases=("lol-rl", "advantage-based-offline-policy-gradient"),
)
