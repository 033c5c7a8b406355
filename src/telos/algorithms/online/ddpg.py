"""Deep deterministic policy gradient: a critic of continuous actions, and a policy that follows the critic's gradient.

    critic  (Q(s, a) − r − γ Q̄(s′, π̄(s′)))²                                             (Lillicrap et al. 2016, eq. 5)
    policy  −Q(s, π(s))                                                                     (eq. 6)

It is TD3 without its three corrections. Exploration is Gaussian, where the paper has an Ornstein–Uhlenbeck process; later work found no difference.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.online import td3
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(td3.Config):
    """Options of DDPG."""

    critics: int = 1  # networks whose smallest value counts
    policy_delay: int = 1  # improvements of the critic for one of the policy
    target_noise: float = 0.0  # deviation of the noise in the target's action, where actions lie in (−1, 1)


METHOD = Method(
    key="ddpg",
    title="Deep Deterministic Policy Gradient",
    family="online",
    loop="off-policy",
    changes="learns a critic of continuous actions and moves a deterministic policy along its gradient",
    paper="Lillicrap et al. 2016, Continuous Control with Deep Reinforcement Learning, arXiv:1509.02971",
    config=Config,
    build=td3.build,
    updates=td3.updates,
    explore=td3.explore,
    aliases=("deep-deterministic-policy-gradient",),
)
