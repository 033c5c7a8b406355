"""Generation: answers sampled from a language model, with what a trainer must know of them.

An `Engine` takes token ids and gives token ids, never text, so nothing is tokenised twice. With every token it records the
log-probability under the distribution the token was drawn from (after temperature, top-k and top-p), the tokens that were allowed, and
the version of the weights; so the first ratio of an on-policy update is 1 within rounding, and a trainer can refuse answers of other weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from telos.core.errors import UsageError, did_you_mean
from telos.models.packing import Answers

if TYPE_CHECKING:
    from telos.models.language import LanguageModel

ENGINES = ("native", "vllm")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
_PRIME = (1 << 61) - 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Logits are divided by `temperature`; the `top_k` largest are kept; of their renormalised probabilities the fewest,
    most likely first, that hold at least `top_p`; the token is drawn from those, renormalised.

    At temperature 0 the most likely token is taken, `top_p` and `top_k` change nothing, and log-probabilities are recorded at temperature 1.
    While `min_new_tokens` are not reached the end token is barred, and log-probabilities are those of the distribution without it. Where
    `Generated.support` is recorded it says so exactly; elsewhere `LanguageModel.logprobs` of these first tokens is lower by −log(1 − p(end)).

    Raises `UsageError` naming the option that is out of range.
    """

    temperature: float = 1.0  # >= 0; 0 is greedy
    top_p: float = 1.0  # in (0, 1]; 1 keeps all
    top_k: int = 0  # >= 0; 0 keeps all
    min_new_tokens: int = 0  # tokens before which the end token cannot come
    max_new_tokens: int = 64  # tokens, the end token included

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature = {self.temperature}: give a positive number, or 0 for the most likely token each time")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p}: give a share of probability above 0 and at most 1 (1 keeps every token)")
        if self.top_k != int(self.top_k) or self.top_k < 0:
            raise UsageError(f"top_k = {self.top_k}: give a whole number of tokens, or 0 to keep every token")
        if self.max_new_tokens != int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens = {self.max_new_tokens}: give a whole number of tokens, at least 1")
        if self.min_new_tokens != int(self.min_new_tokens) or not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UsageError(
                f"min_new_tokens = {self.min_new_tokens}: give a whole number from 0 to max_new_tokens ({self.max_new_tokens})"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def restricted(self) -> bool:
        """Whether tokens are cut off, so that `Generated.support` is recorded."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0)


@dataclass(frozen=True)
class Generated:
    """Answers to P prompts, n each, N = P n; row p n + j is the j-th answer to prompt p. On the model's device."""

    ids: Tensor  # [N, La] int64, right-padded; an answer's end token is part of it
    length: Tensor  # [N] int64 >= 1, tokens of each answer; masks come from here, never from ids
    ended: Tensor  # [N] bool, true where the end token was produced, false where the answer was cut off
    logprobs: Tensor  # [N, La] float32, of each token under the distribution it was drawn from; 0 where padded
    support: Tensor | None  # [N, La, k] int64, the tokens that were allowed, most likely first, −1 on the right; None where all were
    weight_version: int  # of the weights that produced them

    def answers(self, prompts: list[list[int]]) -> Answers:
        """The batch for `LanguageModel.logprobs`, given the prompts that were asked."""
        count, device = len(prompts), self.ids.device
        width = max(map(len, prompts))
        padded = torch.tensor([[*prompt, *([0] * (width - len(prompt)))] for prompt in prompts], device=device)
        length = torch.tensor([len(prompt) for prompt in prompts], device=device)
        owner = torch.arange(count, device=device).repeat_interleave(len(self.ids) // count)
        return Answers(padded, length, self.ids, self.length, owner)


class Engine(Protocol):
    """What draws answers from a model."""

    def generate(self, prompts: list[list[int]], sampling: Sampling, n: int = 1, seed: int = 0) -> Generated:
        """n answers to each prompt of token ids; the same call gives the same answers. Raises `UsageError` for a prompt that cannot be answered."""
        ...


def weight_version(model: nn.Module) -> int:
    """A fingerprint of all parameters, below 2^61: equal for equal weights, here or in another process, and different after any change of them.

    Torch's own counters of in-place changes would cost nothing, but do not see fused optimisers, `parameter.data`, or a parameter that is
    replaced; this reads the weights once, in less time than one decoding step takes. It is an identity, not a count of steps.
    """
    sums = []
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.detach().contiguous().view(-1)
            size = flat.element_size()
            whole = flat.numel() * size % 8 == 0 and flat.storage_offset() * size % 8 == 0
            words = flat.view(torch.int64) if whole else flat.view(_INTEGERS[size]).long()
            # The shift carries signs and exponents into lower bits, so that changes of the top bit alone do not cancel modulo 2^64.
            pieces = words.split(1 << 16 if words.device.type == "cpu" else 1 << 24)
            sums.append(torch.stack([(piece ^ (piece >> 21)).sum() for piece in pieces]).sum())
    version = 0
    for word in torch.stack(sums).tolist():
        version = (version * 1_000_003 + word) % _PRIME
    return version


def pad_token(model: LanguageModel) -> int:
    """The id that fills `Generated.ids` after an answer: the pad token, or the end token where there is none."""
    tokenizer: Any = model.tokenizer
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def check_prompts(prompts: list[list[int]], n: int, context: int, vocabulary: int) -> None:
    """Raises `UsageError` naming the first prompt that is empty, too long to leave room for one token, or holds an id outside the vocabulary."""
    if n < 1:
        raise UsageError(f"n = {n}: at least one answer to each prompt")
    if not prompts:
        raise UsageError("no prompts were given to generate answers to")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UsageError(f"prompt {index} is empty; a prompt needs at least one token")
        if len(prompt) > context - 1:
            raise UsageError(
                f"prompt {index} has {len(prompt)} tokens, but the model takes {context} with the answer; shorten it to {context - 1} or fewer"
            )
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UsageError(f"prompt {index} holds a token id outside 0 … {vocabulary - 1}; was it encoded with this model's tokenizer?")


def make_engine(model: LanguageModel, name: str = "native") -> Engine:
    """The engine called `name` for a model: `native` everywhere, `vllm` on a GPU where the extra is installed. Raises `UsageError` for another name."""
    if name in ENGINES and getattr(model, "sees", False):
        from telos.models.vision_language import VisionEngine

        return VisionEngine(model, name)
    if name == "native":
        from telos.models.generation.native import NativeEngine

        return NativeEngine(model)
    if name == "vllm":
        from telos.models.generation.vllm import VllmEngine

        return VllmEngine(model)
    raise UsageError(f"no generation engine is called {name!r}; there are {', '.join(ENGINES)}{did_you_mean(name, ENGINES)}")
