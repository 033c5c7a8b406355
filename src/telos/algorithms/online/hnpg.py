"""Hybrid natural policy gradient: the critic is fitted to on-policy returns and, by temporal differences, to offline data; the natural gradient is taken in the
states of both.

    f_k = argmin_f  Ê_data (f(s, a) − r − γ E_{a′ ~ π} f_{k−1}(s′, a′))² + λ Ê_π (f(s, a) − y)²,   k = 1 … K         (Zhou et al. 2023, eq. 1)
    w   = argmin_w  Ê_data (wᵀ φ(s, a) − f̄(s, a))² + λ Ê_π (wᵀ φ(s, a) − f̄(s, a))²                            (algorithm 3, line 5)
    f̄   = f_K − E_{a ~ π} f_K,   φ = ∇ log π,   θ ← θ + η w

y is the return that followed. The stationary w is a natural gradient with the Fisher matrix of both sets of states. It is solved by conjugate gradients, and η
is the longest step within a bound on the mean KL divergence that raises E Σ_a π f̄, as in TRPO and in the authors' code. As there, the expectations over
actions are those of the policy in both sets of states; here they are exact, since actions are discrete. f is one network for all steps, trained on from
iteration to iteration by `round_steps` steps in each of the K rounds (the authors fit one for each step of the episode, backwards), and f_K is the last
round's, not a mean over rounds. The loop's own critic V is only asked for the value of what follows where an episode was cut.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from telos.algorithms.online._loop_on_policy import ActorCritic, TrustRegionConfig
from telos.algorithms.online._offline_data import OfflineData
from telos.algorithms.online.trpo import loss
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.seeds import torch_generator
from telos.functional.distributions import Categorical
from telos.functional.natural import trust_region_step
from telos.functional.segments import Estimate, Segment, gae
from telos.functional.segments import flat as rows
from telos.models.networks import perceptron
from telos.models.policies import Policy


@dataclass(frozen=True, kw_only=True)
class Config(TrustRegionConfig):
    """Options of HNPG."""

    normalize_rewards: ClassVar[bool] = False  # the data's rewards and those that are met must be in one unit
    clip_reward: ClassVar[float] = 10.0
    log_std_init: ClassVar[float] = 0.0  # of continuous actions, which there are none of
    data: str = ""  # Minari folder or id, D4RL HDF5, OGBench npz, or a run's folder
    online_weight: float = 1.0  # λ: weight of on-policy steps over the data's, >= 0 (paper: 1 to the number of iterations)
    rounds: int = 5  # K: fits of the critic in an iteration
    round_steps: int = 20  # optimiser steps of each
    batch_size: int = 256  # steps from either source in one of them
    critic_learning_rate: float = 1e-3  # of the action values (authors' code: 3e-4)
    gae_lambda: float = 1.0  # λ of the returns y; 1 = Monte-Carlo (paper)
    cg_iterations: int = 10  # products with the Fisher matrix for a direction
    epochs: int = 1  # passes of V over an iteration's steps

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "critic_learning_rate")
        require(self, ">= 0", "online_weight")
        require(self, ">= 1", "rounds", "round_steps", "batch_size")


class HybridActorCritic(ActorCritic):
    """Beside policy and V the action values, and the data."""

    def __init__(self, config: Config, policy: Policy) -> None:
        super().__init__(policy, config.hidden, config.activation)
        if not isinstance(policy.action_space, Discrete) or self.pixels is not None:
            raise UsageError("this method reads vectors and acts in discrete spaces (Discrete)")
        sizes = (policy.reader.size, *config.hidden, int(policy.action_space.n))
        self.action_values = perceptron(sizes, config.activation, gains=(math.sqrt(2), 1.0))
        self.data = OfflineData(config, policy)

    def probabilities(self, observation: Tensor) -> Tensor:
        """[B, A]"""
        found = self.policy.distribution(observation)
        assert isinstance(found, Categorical)
        return found.log_probs.exp()


def build(config: Config, policy: Policy) -> HybridActorCritic:
    return HybridActorCritic(config, policy)


def estimate(config: Config, segment: Segment, state: Mapping[str, float]) -> Estimate:
    advantages, returns = gae(segment, config.gamma, config.gae_lambda)
    return Estimate(advantages, returns, {"iteration": state.get("iteration", 0.0) + 1})


def fit(config: Config, agent: HybridActorCritic, segment: Segment, returns: Tensor, generator: torch.Generator) -> dict[str, float]:
    """The critic's K rounds, on-policy steps with returns [T, N]."""
    returns = rows(returns)
    features, action = agent.policy.features(rows(segment.observation)), rows(segment.action).long()
    optimiser = torch.optim.Adam(agent.action_values.parameters(), lr=config.critic_learning_rate)
    found: dict[str, float] = {}
    for _ in range(config.rounds):
        before = copy.deepcopy(agent.action_values)
        for _ in range(config.round_steps):
            batch = agent.data.draw(config.batch_size, generator)
            with torch.no_grad():
                following = before(agent.policy.features(batch.next_observation))
                target = batch.reward + batch.discount * (agent.probabilities(batch.next_observation) * following).sum(1)
            values = agent.action_values(agent.policy.features(batch.observation)).gather(1, batch.action.long()[:, None])[:, 0]
            offline = ((values - target) ** 2).mean()
            at = torch.randint(len(action), (config.batch_size,), generator=generator, device=action.device)
            online = ((agent.action_values(features[at]).gather(1, action[at, None])[:, 0] - returns[at]) ** 2).mean()
            optimiser.zero_grad()
            (offline + config.online_weight * online).backward()
            optimiser.step()
        found = {"loss/offline": float(offline.detach()), "loss/online": float(online.detach())}
    agent.zero_grad(set_to_none=True)
    return found


def update(config: Config, agent: HybridActorCritic, segment: Segment, estimate: Estimate) -> dict[str, float]:
    """One fit of the critic and one step of the policy."""
    observation = rows(segment.observation)
    generator = torch_generator(config.seed, "hybrid", int(estimate.state["iteration"]), device=observation.device.type)
    metrics = fit(config, agent, segment, estimate.returns, generator)
    offline = agent.data.draw(len(observation), generator).observation
    states = torch.cat([observation, offline])
    weight = torch.tensor([config.online_weight, 1.0], device=states.device).repeat_interleave(len(observation))
    weight /= weight.sum()
    parameters = [p for p in agent.policy.parameters() if p.requires_grad]
    with torch.no_grad():
        old = agent.policy.distribution(states).fixed()
        values = agent.action_values(agent.policy.features(states))
        advantage = values - (agent.probabilities(states) * values).sum(1, keepdim=True)

    def gain_and_kl() -> tuple[Tensor, Tensor]:
        now = agent.policy.distribution(states)
        assert isinstance(now, Categorical)
        return (weight * (now.log_probs.exp() * advantage).sum(1)).sum(), (weight * old.kl(now)).sum()

    return metrics | trust_region_step(parameters, gain_and_kl, **config.trust_region).metrics


METHOD = Method(
    key="hnpg",
    title="Hybrid Natural Policy Gradient",
    family="online",
    loop="on-policy",
    changes="fits the critic of a natural policy gradient to on-policy returns and to offline data together",
    paper="Zhou et al. 2023, Offline Data Enhanced On-Policy Policy Gradient with Provable Guarantees, arXiv:2311.08384",
    config=Config,
    system=27,
    build=build,
    loss=loss,
    estimate=estimate,
    update=update,
    aliases=("hybrid-npg",),
)
