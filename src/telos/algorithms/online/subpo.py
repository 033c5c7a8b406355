"""SubPO: policy gradient for rewards that are a submodular function of all that was visited, by following its marginal gains.

    F(τ) = Σ_h F(s_{h+1} | τ_{0:h}) + F(s_0),   F(s | τ) = F(τ + s) − F(τ)
    ∇J = E[ Σ_i ∇log π(a_i | ·) ( Σ_{j ≥ i} F(s_{j+1} | τ_{0:j}) − b(τ_{0:i}) ) ]                         (Prajapat et al. 2023, theorem 2)

Given marginal gains as rewards this is REINFORCE with sums of future rewards, undiscounted, and a baseline: what the paper adds to `policy-gradient` is which
rewards it is given, and that the gradient stays unbiased although they depend on the whole past. They come from the environment: `telos/SubmodularGrid-v0`,
or one's own that pays F(τ + s) − F(τ). A policy that sees place and time is SubPO-M, one that also sees the past SubPO-NM: a matter of the environment's
observations too. As in the authors' experiments steps are Adam's, and the entropy of the visited states' actions is added with a weight that falls as
1 / (t + 1), without the gradient through which states are visited; here it is summed over an episode's steps, as returns are. The baseline is the mean of
the batch's other episodes at the same step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from telos.algorithms.online._loop_policy_gradient import PolicyGradientConfig, StepsView
from telos.core.config import require
from telos.core.method import Method
from telos.functional.recursions import Track
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(PolicyGradientConfig):
    """Options of SubPO."""

    step_size: float = 0.01  # Adam's learning rate, > 0 (paper: 0.01)
    batch_episodes: int = 64  # episodes of each estimate (paper: 500)
    num_envs: int = 64  # copies that are stepped together, <= batch_episodes
    gamma: float = 1.0  # discount a step (paper: 1)
    entropy_coef: float = 0.0  # weight of the entropy bonus in the first step, >= 0; the paper's tasks differ
    adam_beta1: float = 0.9  # decay of the gradient's mean
    adam_beta2: float = 0.999  # decay of the gradient's square
    adam_epsilon: float = 1e-8  # added to the root of the gradient's square, > 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0", "entropy_coef")
        require(self, ">= 0 and < 1", "adam_beta1", "adam_beta2")
        require(self, "> 0", "adam_epsilon")


def loss(config: Config, view: StepsView) -> Losses:
    entropy = view.distribution.entropy()
    return Losses(-view.weight * view.logprob - config.entropy_coef / (view.index + 1) * entropy, metrics={"entropy": entropy})


def advance(config: Config, track: Track, found: tuple[Tensor, ...], index: int) -> Track:
    (gradient,) = found
    mean = torch.lerp(gradient, track.direction, config.adam_beta1)
    square = torch.lerp(gradient**2, track.square, config.adam_beta2)
    unbiased = square / (1 - config.adam_beta2 ** (index + 1))
    step = mean / (1 - config.adam_beta1 ** (index + 1)) / (unbiased.sqrt() + config.adam_epsilon)
    return track.moved(config.step_size * step, mean, square)


METHOD = Method(
    key="subpo",
    title="Submodular policy optimization",
    family="online",
    loop="policy-gradient",
    changes="takes the marginal gains of a submodular function of the whole walk as rewards, undiscounted",
    paper="Prajapat et al. 2023, Submodular Reinforcement Learning, arXiv:2307.13372",
    config=Config,
    loss=loss,
    advance=advance,
    system=31,
    aliases=("subrl", "submodular-policy-optimization"),
)
