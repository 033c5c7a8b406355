"""Pretraining with human feedback: text is learned from the start according to how its segments are scored.

A document x is a sequence of segments x^i (sentences or lines) with scores R(x^i); a higher score is better. Objectives, to be maximised:

    mle           log π(x)
    filter        log π(x) if R̄(x) >= t, else the document is left out of training; R̄ is the mean over its segments
    conditional   log π(c^1 x^1 c^2 x^2 …) with c^i = <|good|> if R(x^i) >= t, else <|bad|>
    unlikelihood  Σ_{R(x^i) >= t} log π(x^i|x^<i) + α Σ_{R(x^i) < t} Σ_j log(1 − π(x^i_j|x^<i_<j))
    rwr           Σ_i exp(R(x^i)/β) log π(x^i|x^<i)
    awr           α_w Σ_i exp(A(x^i)/β) log π(x^i|x^<i) − (1 − α_w) Σ_i (V(x^<i) − R(x^i))²,   A(x^i) = R(x^i) − V(x^<i)

The losses are means over the learned tokens of the batch. t is `threshold`, or the `percentile` of the training segments' scores (for `filter` the
documents'). The learned text of a row with a prompt is its completion, and of a conversation what the assistant says.

conditional: <|good|> and <|bad|> become tokens of the model and its tokenizer and are saved with it; they are learned like words, beginning as the mean
embedding of "good" and "bad" (with an adapter they stay so, and the adapter is merged into the saved model). A segment has no control token with
probability `drop_control`, drawn once for the run. To generate, end the prompt with <|good|> (`conditioned`), or begin the text with it; the
saved generation settings keep control tokens from being written in the text.

Choices: exp(R/β) is divided by its mean over the training segments, once, which leaves the optimum and makes weights comparable between rewards. V is a
linear head on the states of the model that starts at zero, and its error trains the model too, as the authors' does; theirs passes a sigmoid for
scores between −1 and 0. V sees the text before each token, so a segment's advantage is that of each of its tokens. log(1 − p) is taken at most at
p = 1 − 1e-6, beyond which it gives no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor

from telos.algorithms.language._loop_supervised import Prepared, ScoredSupervisedConfig
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.seeds import numpy_generator
from telos.functional.reduction import Losses

GOOD, BAD = "<|good|>", "<|bad|>"
_THRESHOLD = ("conditional", "filter", "unlikelihood")
_USED = {  # by which objectives an option is read
    **dict.fromkeys(("reward", "reward_timeout", "reward_on_error", "segments"), (*_THRESHOLD, "rwr", "awr")),
    **dict.fromkeys(("threshold", "percentile"), _THRESHOLD),
    "drop_control": ("conditional",),
    "unlikelihood_coef": ("unlikelihood",),
    "beta": ("rwr", "awr"),
    **dict.fromkeys(("policy_coef", "max_weight"), ("awr",)),
}


@dataclass(frozen=True, kw_only=True)
class Config(ScoredSupervisedConfig):
    """Options of pretraining with human feedback."""

    learning_rate: float = 5e-4  # peak, AdamW (paper: 5e-4 to 1e-3, from random weights)
    objective: Literal["conditional", "filter", "mle", "unlikelihood", "rwr", "awr"] = (
        "conditional"  # how scores enter (paper's best: conditional)
    )
    threshold: float | None = None  # t: least score of a good segment, or of a document that filter keeps; default: the percentile
    percentile: float = 50.0  # t as a percentile of the training scores, 0 … 100, where no threshold is given
    drop_control: float = 0.01  # probability that a segment has no control token, for conditional, 0 … 1 (authors' code: 0.01)
    unlikelihood_coef: float = 1.0  # α: weight of the unlikelihood of bad segments, >= 0 (paper: tuned by task; 1 for toxicity)
    beta: float = 1.0  # β: score that multiplies a weight by e, > 0, for rwr and awr (paper: tuned by task, 0.1 to 10)
    policy_coef: float = 0.5  # α_w: weight of the likelihood against the value's error, for awr, 0 … 1 (paper: 0.5)
    max_weight: float = 1000.0  # largest exp(A/β), for awr, > 0 (authors' code: 1000)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and <= 100", "percentile")
        require(self, ">= 0 and < 1", "drop_control")
        require(self, ">= 0", "unlikelihood_coef")
        require(self, "> 0", "beta", "max_weight")
        require(self, "> 0 and <= 1", "policy_coef")
        for name, objectives in _USED.items():
            if self.objective not in objectives and getattr(self, name) != getattr(Config, name):
                raise UsageError(f"--{name} has no effect with --objective {self.objective}")
        if self.threshold is not None and self.percentile != Config.percentile:
            raise UsageError("--percentile has no effect beside --threshold")

    @property
    def uses_scores(self) -> bool:
        return self.objective != "mle"

    @property
    def control_tokens(self) -> Mapping[str, str]:
        return {GOOD: "good", BAD: "bad"} if self.objective == "conditional" else {}

    @property
    def value_head(self) -> bool:
        return self.objective == "awr"


def conditioned(prompt: str) -> str:
    """A text prompt that asks a conditionally trained model for good text."""
    return prompt + GOOD


def prepare(config: Config, scores: Sequence[Sequence[float]], facts: Mapping[str, float] | None) -> Prepared:
    """Which documents stay, the control tokens, or the numbers for the loss; thresholds and normalisers are those of the training rows (`facts`)."""
    flat = np.concatenate([np.asarray(row, float) for row in scores])
    if config.objective == "awr":
        return Prepared(scores=scores)
    if config.objective == "rwr":
        found = facts or {"log of the mean weight": float(logsumexp(flat / config.beta) - np.log(len(flat)))}
        return Prepared(
            scores=[np.exp(np.asarray(row) / config.beta - found["log of the mean weight"]).tolist() for row in scores], facts=found
        )
    means = np.array([np.mean(row) for row in scores])
    found = facts or _found(config, means if config.objective == "filter" else flat)
    threshold = found["threshold"]
    if config.objective == "filter":
        return Prepared(kept=np.flatnonzero(means >= threshold).tolist() if facts is None else None, facts=found)
    good = [[score >= threshold for score in row] for row in scores]
    if config.objective == "unlikelihood":
        return Prepared(scores=[[float(x) for x in row] for row in good], facts=found)
    generator = numpy_generator(config.seed, "control tokens", "training" if facts is None else "held out")
    controls = [["" if generator.random() < config.drop_control else GOOD if x else BAD for x in row] for row in good]
    return Prepared(controls=controls, facts=found)


def _found(config: Config, scores: np.ndarray) -> dict[str, float]:
    threshold = float(np.percentile(scores, config.percentile)) if config.threshold is None else config.threshold
    return {"threshold": threshold, "share of good": float((scores >= threshold).mean())}


def loss(config: Config, logprobs: Tensor, mask: Tensor, scores: Tensor | None = None, values: Tensor | None = None) -> Losses:
    """Loss per learned token. logprobs, scores, values [B, T]; mask [B, T] bool. `scores` are the numbers of `prepare`: whether the segment is good,
    its weight, or its score."""
    logprobs = logprobs.masked_fill(~mask, 0.0)
    nll, metrics = -logprobs, {"logps/token": (logprobs, mask)}
    if config.objective == "unlikelihood":
        assert scores is not None
        unlikely = -torch.log(-torch.expm1(logprobs.clamp(max=-1e-6)))
        good = scores > 0.5
        metrics |= {"logps/good": (logprobs, mask & good), "logps/bad": (logprobs, mask & ~good)}
        return Losses(torch.where(good, nll, config.unlikelihood_coef * unlikely), mask, metrics)
    if config.objective == "rwr":
        assert scores is not None
        return Losses(scores * nll, mask, metrics | {"weight": (scores, mask)})
    if config.objective == "awr":
        assert scores is not None
        assert values is not None
        weight = torch.exp((scores - values.detach()) / config.beta).clamp(max=config.max_weight)
        error = (values - scores) ** 2
        metrics |= {"weight": (weight, mask), "value_loss": (error, mask)}
        return Losses(config.policy_coef * weight * nll + (1 - config.policy_coef) * error, mask, metrics)
    return Losses(nll, mask, metrics)


METHOD = Method(
    key="phf",
    title="Pretraining with Human Feedback",
    family="language",
    loop="supervised",
    changes="learns text from the start according to the scores of its segments, at best conditioned on control tokens",
    paper="Korbak et al. 2023, Pretraining Language Models with Human Preferences, arXiv:2302.08582",
    config=Config,
    loss=loss,
    prepare=prepare,
    needs=frozenset({"scores"}),
    system=124,
    aliases=("pretraining-with-human-feedback", "conditional-training"),
)
