"""Linear mixture processes: the transitions are a mixture of known models with unknown weights, P(s′|s, a) = Σ_i θ_i P_i(s′|s, a).

The class of Jia et al. 2020 and Ayoub et al. 2020 (arXiv:2006.01107), here with finitely many states and one mixture for all steps. Exact planning for any
reward is that of `Tabular`: `dataclasses.replace(process, rewards=…)` and `optimal()`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from telos.core.errors import UsageError
from telos.core.seeds import numpy_generator
from telos.environments.base import Environments
from telos.environments.tabular import Tabular, TabularEnvironments


@dataclass(frozen=True, eq=False, kw_only=True)
class LinearMixture(Tabular):
    """A finite process with its models and weights. Raises `UsageError` where they do not give its transitions."""

    models: np.ndarray  # [d, S, A, S]: what a learner may know
    weights: np.ndarray  # [d]: θ, what it may not

    def __post_init__(self) -> None:
        super().__post_init__()
        mixed = np.tensordot(self.weights, self.models, 1)
        if mixed.shape != self.transitions.shape or not np.allclose(mixed, self.transitions, rtol=0, atol=1e-9):
            raise UsageError("the transitions are not the mixture of the models")


def unit_rewards(count: int, states: int, actions: int, horizon: int, draws: np.random.Generator) -> np.ndarray:
    """[count, S, A]: rewards whose sum over an episode never exceeds 1: one in three actions earns a uniform share of 1 / horizon, the others nothing."""
    shape = (count, states, actions)
    return draws.random(shape) * (draws.random(shape) < 1 / 3) / horizon


def linear_mixture(
    states: int = 6,
    actions: int = 3,
    dimension: int = 4,
    seed: int = 0,
    *,
    horizon: int = 16,
    moves: float = 6.0,
    concentration: float = 0.2,
) -> LinearMixture:
    """A random instance. In each model the state stays as it is, except with chance `moves` / `horizon` a step: then it goes to a state drawn from
    that model's own distribution of (s, a), which is Dirichlet (`concentration` each). θ is uniform on the simplex.

    So an episode has about `moves` moves whatever the horizon is: instances of one seed and different horizons are one process, run slower, and an
    episode of each tells as much. An episode starts in state 0. Rewards sum to 1 at most (`unit_rewards`).
    """
    for name, value in {"states": states, "actions": actions, "dimension": dimension, "horizon": horizon, "moves": moves}.items():
        if not value > 0:
            raise UsageError(f"{name} must be positive; got {value}")
    if not concentration > 0:
        raise UsageError(f"concentration must be positive; got {concentration}")
    draws = numpy_generator(seed, "linear-mixture")
    rate = min(1.0, moves / horizon)
    drawn = draws.dirichlet(np.full(states, concentration), size=(dimension, states, actions))
    models = rate * drawn + (1 - rate) * np.eye(states)[:, None]
    weights = draws.dirichlet(np.ones(dimension))
    rewards = unit_rewards(1, states, actions, horizon, draws)[0]
    transitions = np.tensordot(weights, models, 1)
    return LinearMixture(transitions, rewards, np.eye(states)[0], None, horizon, 1.0, models=models, weights=weights)


def _make(name: str, count: int, *, max_episode_steps: int | None = None, **options: float) -> Environments:
    return TabularEnvironments(name, linear_mixture(**options), count, max_episode_steps=max_episode_steps)  # type: ignore[arg-type]


ENVIRONMENTS: Mapping[str, Callable[..., Environments]] = {"telos/LinearMixture-v0": partial(_make, "telos/LinearMixture-v0")}
