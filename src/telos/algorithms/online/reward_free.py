"""Horizon-free reward-free exploration of linear mixture processes: explore without a reward, then plan for any that is revealed.

The transitions are Σ_i θ_i P_i with known models P_i, and rewards sum to at most 1 in an episode. With φ_V(s, a)_i = Σ P_i(s′|s, a) V(s′), the mean of
V(s′) is ⟨θ, φ_V(s, a)⟩, and θ is found by weighted value-targeted regression, for the powers V^(2^m), m = 0 … M − 1 (Zhang, Zhang and Gu 2023):

    Σ_m ← λ I + Σ φ_m φ_mᵀ / σ̄_m²,   b_m ← Σ φ_m V^(2^m)(s′) / σ̄_m²,   θ̂_m = Σ_m⁻¹ b_m,   φ_m = φ_{V^(2^m)}(s, a)
    σ̄_m² = max(v_m + e_m, ‖φ_m‖ / √d, 1 / (K H)),   v_m = [⟨θ̂_{m+1}, φ_{m+1}⟩] − [⟨θ̂_m, φ_m⟩]²      (aleatoric; [·] cut to [0, 1])
    e_m = min(1, 2 β ‖φ_m‖) + min(1, β ‖φ_{m+1}‖)                                                     (epistemic)

norms in Σ_m⁻¹: before the episode in e_m, as they are at the step in ‖φ_m‖ / √d; for the highest power v + e is 1. Variances of a value between 0 and 1
sum to about 1 over an episode, however long it is: that is what makes the weights free of the horizon.

Exploration. The paper takes the policy, model and reward that together maximise the sum of the pseudo rewards min(1, β ‖φ_{V^r}(s, a)‖), an oracle. Here
`candidates` rewards are drawn anew for each policy; each is planned for with θ̂_0 (its V^r), then the pseudo rewards of V^r are planned for with θ̂_0, and the
candidate with the largest pseudo value gives policy and regression target V^r. Values are cut to [0, 1]; an action is chosen before the cut, where it would
make all alike. Rewards of the environment are not looked at.

Planning (`plan_for`) takes the policy that is best under θ̂_0 for the revealed reward; the paper's is optimistic within the confidence set, which has the same
guarantee up to a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from telos.algorithms.online._loop_tabular import Plan, Played, Seen, TabularConfig, by_values
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.environments.linear_mixture import unit_rewards


@dataclass(frozen=True, kw_only=True)
class Config(TabularConfig):
    """Options of horizon-free reward-free exploration."""

    beta: float = 0.3  # β: width of the confidence ellipsoid, > 0 (paper: of the order of √d and logarithms)
    ridge: float = 1.0  # λ, > 0 (paper: the inverse square of a bound on the norm of θ)
    weighting: Literal["variance", "none"] = "variance"  # of the regression; none: every step counts alike, σ̄ = 1
    moments: int = 3  # M: powers of the value that are regressed on (paper: logarithm of K H)
    candidates: int = 8  # rewards that are drawn for a policy

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta", "ridge")
        require(self, ">= 1", "moments", "candidates")
        if self.weighting == "none" and self.moments != Config.__dataclass_fields__["moments"].default:
            raise UsageError("--moments has no effect with --weighting none")


def models_of(seen: Seen) -> np.ndarray:
    if seen.models is None:
        raise UsageError(
            "this method needs the models of a linear mixture: --env telos/LinearMixture-v0, or an environment with an attribute models [d, S, A, S]"
        )
    return seen.models


def features(models: np.ndarray, values: np.ndarray) -> np.ndarray:
    """φ_V [C, S, A, d] of values [C, S]."""
    return np.einsum("dsap,cp->csad", models, values, optimize=True)


def estimate(tables: Mapping[str, np.ndarray]) -> np.ndarray:
    """θ̂ [M, d] from what a run has kept."""
    return np.linalg.solve(tables["sigma"], tables["targets"][..., None])[..., 0]


def plan_for(models: np.ndarray, theta: np.ndarray, rewards: np.ndarray, steps: int, gamma: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The planning phase for rewards [C, S, A], each summing to 1 at most over `steps`: (values [steps + 1, C, S], action values [steps, C, S, A])."""
    values = np.zeros((steps + 1, len(rewards), models.shape[1]))
    action = np.zeros((steps, *rewards.shape))
    for h in reversed(range(steps)):
        action[h] = np.clip(rewards + gamma * (features(models, values[h + 1]) @ theta), 0, 1)
        values[h] = action[h].max(-1)
    return values, action


def plan(config: Config, seen: Seen, chance: np.random.Generator) -> Plan:
    models, (steps, states, actions) = models_of(seen), seen.shape
    powers, d = config.moments if config.weighting == "variance" else 1, len(models)
    tables = seen.tables or {"sigma": config.ridge * np.tile(np.eye(d), (powers, 1, 1)), "targets": np.zeros((powers, d))}
    theta, inverse = estimate(tables)[0], np.linalg.inv(tables["sigma"][0])
    rewards = unit_rewards(config.candidates, states, actions, steps, chance)
    values, _ = plan_for(models, theta, rewards, steps, config.gamma)
    pseudo, chosen = np.zeros((config.candidates, states)), np.zeros((steps, *rewards.shape))
    for h in reversed(range(steps)):
        phi = features(models, values[h + 1])
        unsure = config.beta * np.sqrt(np.maximum(np.einsum("csad,de,csae->csa", phi, inverse, phi, optimize=True), 0))
        chosen[h] = np.minimum(1, unsure) + config.gamma * (features(models, pseudo) @ theta)
        pseudo = np.clip(chosen[h], 0, 1).max(-1)
    first = pseudo @ seen.start
    best = int(first.argmax())
    return by_values(chosen[:, best], {"plan/uncertainty": float(first[best])}, {**tables, "value": values[:, best]})


def update(config: Config, seen: Seen, played: Played) -> Mapping[str, np.ndarray]:
    models, tables = models_of(seen), seen.tables
    sigma, targets, value = tables["sigma"].copy(), tables["targets"].copy(), tables["value"]
    powers, d = targets.shape
    before, after = played.states[:-1], played.states[1:]
    steps = len(before)
    # [M + 1, T, S + 1] powers of the values of what follows each step; nothing follows where an episode is over.
    follow = np.append(value[1 : steps + 1], np.zeros((steps, 1)), 1) ** (2.0 ** np.arange(powers + 1))[:, None, None]
    phi = np.einsum("dtp,mtp->mtd", models[:, before, played.actions], follow[..., :-1])
    reached = follow[:, np.arange(steps), after]
    inverse = np.linalg.inv(sigma)
    if config.weighting == "variance":
        mean = np.clip(np.einsum("mtd,md->mt", phi[:-1], estimate(tables)), 0, 1)
        norm = config.beta * np.sqrt(np.einsum("mtd,mde,mte->mt", phi[:-1], inverse, phi[:-1]))
        noise = np.ones((powers, steps))
        noise[:-1] = mean[1:] - mean[:-1] ** 2 + np.minimum(1, 2 * norm[:-1]) + np.minimum(1, norm[1:])
        noise = np.maximum(noise, 1 / (config.episodes * seen.horizon))
    for t in range(steps):
        x = phi[:-1, t]
        turned = np.einsum("mde,me->md", inverse, x)
        length = (x * turned).sum(-1)
        weight = 1 / np.maximum(noise[:, t], np.sqrt(length / d)) if config.weighting == "variance" else np.ones(1)
        sigma += weight[:, None, None] * x[:, :, None] * x[:, None]
        targets += (weight * reached[:-1, t])[:, None] * x
        inverse -= (weight / (1 + weight * length))[:, None, None] * turned[:, :, None] * turned[:, None]
    return {"sigma": sigma, "targets": targets}


METHOD = Method(
    key="reward-free",
    title="Horizon-Free Reward-Free Exploration",
    family="online",
    loop="tabular",
    changes="explores a linear mixture process without a reward, so that it can plan for any, at a cost that does not grow with the horizon",
    paper="Zhang, Zhang and Gu 2023, Optimal Horizon-Free Reward-Free Exploration for Linear Mixture MDPs, arXiv:2303.10165",
    config=Config,
    plan=plan,
    update=update,
    system=137,
    aliases=("hf-ucrl-rfe++", "horizon-free-reward-free-exploration"),
)
