"""OREO: policy and value learn together, from single answers with outcomes, to be consistent as the soft Bellman equation says.

    V*(s_t) − V*(s_{t+1}) = r_t − β log π*(a_t|s_t) / π_ref(a_t|s_t)                                   (Wang et al. 2024, theorem 1)
    δ_t    = V(s_t) − R + β Σ_{i ≥ t} log π(a_i|s_i) / π_ref(a_i|s_i),   R the outcome of the answer
    L_V    = 1/T Σ_t δ_t²                                                                               (π fixed)
    L_π    = 1/T Σ_t (V(s_t) − R + β log π/π_ref (a_t|s_t) + sg[β Σ_{i > t} log π/π_ref (a_i|s_i)])² + α/T Σ_t KL[π(·|s_t) ‖ π_ref(·|s_t)]

sg stops the gradient: an action answers for what it makes of its state, not for what follows. V is fixed in L_π. The one pair without error on all answers, at
α = 0, is the optimum of E[r] − β KL(π‖π_ref): π* ∝ π_ref exp(R/β) and V*(s) = β log E_{π_ref}[exp(R/β) | s]. Where R is 0 or 1, V lies between them.

Actions are, by `--variant`: tokens; steps, whose log-ratio is the sum of their tokens' and whose states are those before each step, in L_V as well; or the
response, L_π of the first state alone while V learns at every token.

The run's folder `critic` has V as a process reward model: the head's number is V, in the outcome's units. What reads it takes its sigmoid, which rises with V:
`telos train beam-search --model RUN/model --process_reward RUN/critic` (with `--score last`, the default) keeps the beams of greatest value.

Departures: KL is estimated on the data's tokens by ρ log ρ − ρ + 1, ρ = π/π_ref, which has neither bias in its value nor in its gradient where π_ref wrote the
answers and is at least 0 anywhere; the authors' program sums over the vocabulary. Its mean is over tokens in all variants. The value is a decoder of its own.

Metrics: `rewards/implicit` is β Σ_t log π/π_ref of an answer; `values/first` V of its prompt and `values/last` V before its last action; `bellman/error` the
mean square of V(s_t) − V(s_{t+1}) − r_t + β log π/π_ref, the consistency itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from telos.algorithms.language._loop_values import CriticConfig, ValuedLogps
from telos.algorithms.language._steps import CutConfig
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.functional.divergences import alpha
from telos.functional.reduction import Losses, masked_mean

_KL = alpha(0.0).f  # log u -> u log u − u + 1


@dataclass(frozen=True, kw_only=True)
class Config(CriticConfig):
    """Options of OREO."""

    variant: Literal["token", "step", "response"] = "token"  # what an action is (paper: token)
    beta: float = 0.03  # strength of the divergence in the soft values, > 0, outcome a nat (paper: 0.03)
    kl_coef: float = 0.01  # α: weight of the policy's divergence from the reference at each token, >= 0 (paper: 0.01)
    learning_rate: float = 5e-6  # peak, of the policy (paper: 5e-6)
    critic_learning_rate: float = 5e-6  # peak, of the critic (paper: 5e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")
        require(self, ">= 0", "kl_coef")
        for name in ("step_separators", "answer_mark"):
            if self.variant != "step" and getattr(self, name) != CutConfig.__dataclass_fields__[name].default:
                raise UsageError(f"--{name} has no effect on --variant {self.variant}, which knows no steps")

    @property
    def spares(self) -> frozenset[str]:
        return frozenset() if self.variant == "step" else frozenset({"steps"})


def states(variant: str, view: ValuedLogps) -> Tensor:
    """[B, T] bool: the tokens before which an action begins."""
    mask = view.answer.mask
    if variant == "token":
        return mask
    first = torch.zeros_like(mask).index_fill(1, torch.tensor([0], device=mask.device), True)
    if variant == "response":
        return first
    assert view.ends is not None
    return mask & (first | pad(view.ends[:, :-1], (1, 0)))


def errors(config: Config, view: ValuedLogps, at: Tensor) -> tuple[Tensor, Tensor]:
    """(δ with the gradient of each action's own log-ratio alone, V(s_t) − V(s_{t+1}) − r_t + β log π/π_ref), [B, T], meaningful `at` states."""
    assert view.values is not None
    width = at.shape[1]
    ahead = config.beta * view.ratio.flip(1).cumsum(1).flip(1)  # from each token to the end
    place = torch.where(at, torch.arange(width, device=at.device), width)
    following = pad(place.flip(1).cummin(1).values.flip(1)[:, 1:], (0, 1), value=width)  # the next state; `width` where there is none
    beyond = pad(ahead, (0, 1)).gather(1, following)
    value_after = torch.cat([view.values, view.outcome[:, None]], 1).gather(1, following)  # past the last action the outcome is paid
    return view.values - view.outcome[:, None] + ahead - beyond + beyond.detach(), view.values - value_after + ahead - beyond


def loss(config: Config, view: ValuedLogps) -> Losses:
    at, mask = states(config.variant, view), view.answer.mask
    error, bellman = errors(config, view, at)
    divergence = masked_mean(_KL(view.ratio), mask, 1)
    assert view.values is not None
    last = at & (at.cumsum(1) == at.sum(1, keepdim=True))
    metrics = {
        "rewards/implicit": config.beta * view.ratio.sum(1),
        "values/first": view.values[:, 0],
        "values/last": (view.values, last),
        "bellman/error": (bellman**2, at),
        "kl/token": divergence,
    }
    return Losses(masked_mean(error**2, at, 1) + config.kl_coef * divergence, metrics=metrics)


def critic_loss(config: Config, view: ValuedLogps) -> Losses:
    at = states("step" if config.variant == "step" else "token", view)
    return Losses(masked_mean(errors(config, view, at)[0] ** 2, at, 1))


METHOD = Method(
    key="oreo",
    title="OREO",
    family="language",
    loop="values",
    changes="learns policy and value together by soft Bellman consistency, from single answers with outcomes",
    paper="Wang et al. 2024, Offline Reinforcement Learning for LLM Multi-Step Reasoning, arXiv:2412.16145",
    config=Config,
    loss=loss,
    critic_loss=critic_loss,
    needs=frozenset({"reference", "critic", "steps"}),
    system=200,
    aliases=("offline-reasoning-optimization",),
)
