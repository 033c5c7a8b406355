"""Advantage actor–critic: one gradient step on the policy gradient of a short segment, from many environments at once.

    L = −E[ A log π ] + c_v (V − R)² − c_e H                    (Mnih et al. 2016, section 4, in its synchronous form)

with A by GAE; λ = 1 gives the paper's n-step returns. The optimiser is Adam as everywhere here, where the paper has RMSProp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from telos.algorithms.online._loop_on_policy import OnPolicyConfig
from telos.core.config import require
from telos.core.method import Method
from telos.functional.closed_form import Slopes, StepArrays
from telos.functional.reduction import Losses
from telos.functional.segments import Estimate, Segment, StepView, gae, standardised


@dataclass(frozen=True, kw_only=True)
class Config(OnPolicyConfig):
    """Options of A2C."""

    rollout_steps: int = 5  # steps of each copy in one iteration (paper: 5)
    epochs: int = 1  # passes over an iteration's steps (paper: 1)
    minibatch_size: int = 0  # steps in one optimiser step; 0 = all of an iteration's
    learning_rate: float = 7e-4  # its highest value in the run
    gae_lambda: float = 1.0  # λ of GAE (paper: 1)
    normalize_advantage: bool = False  # advantages are standardised over an iteration
    value_coef: float = 0.5  # c_v, >= 0
    entropy_coef: float = 0.0  # c_e, >= 0 (paper: 0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "value_coef", "entropy_coef")


def estimate(config: Config, segment: Segment, state: Mapping[str, float]) -> Estimate:
    advantages, returns = gae(segment, config.gamma, config.gae_lambda)
    return Estimate(standardised(advantages) if config.normalize_advantage else advantages, returns, state)


def loss(config: Config, view: StepView) -> Losses:
    entropy = view.distribution.entropy()
    error = (view.returns - view.value) ** 2
    critic = Losses(config.value_coef * error, metrics={"loss/critic": error})
    return Losses(-view.advantage * view.logprob - config.entropy_coef * entropy, metrics={"entropy": entropy}, extra=(critic,))


def slopes(config: Config, view: StepArrays) -> Slopes:
    error = view.value - view.returns
    squared = error * error
    loss = config.value_coef * squared - view.advantage * view.logprob - config.entropy_coef * view.entropy
    metrics = {"loss/critic": squared, "entropy": view.entropy}
    return Slopes(loss, -view.advantage, -config.entropy_coef, 2 * config.value_coef * error, metrics)


METHOD = Method(
    key="a2c",
    title="Advantage Actor-Critic",
    family="online",
    loop="on-policy",
    changes="takes one gradient step on each short segment of many environments",
    paper="Mnih et al. 2016, Asynchronous Methods for Deep Reinforcement Learning, arXiv:1602.01783",
    config=Config,
    loss=loss,
    slopes=slopes,
    estimate=estimate,
    aliases=("advantage-actor-critic",),
)
