"""Vector environments of Gymnasium, in whichever of the three autoreset modes, as ours.

A vector environment differs by its mode in what follows the last step of an episode: under NEXT_STEP a step whose action is ignored and which returns
the next episode's first observation, under SAME_STEP that observation at once with the last one put aside in `final_obs`, under DISABLED nothing until
`reset` is called with a mask. All three hold the same transitions, and both forms here give them:

- `VectorEnvironments` is `Environments`: every episode begins with a seed of its own. The vector environment must be able to begin single copies when
  asked (the option `reset_mask` of `reset`): Gymnasium's synchronous and asynchronous ones can in every mode, which also does away with the ignored step.
- `transitions` takes any vector environment and lets it begin episodes as it pleases. A step whose action was ignored is no transition and is left out,
  so that there may be fewer transitions than copies: that is what `Environments` has no place for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from telos.core.errors import UsageError
from telos.environments.base import Environments, Observation, Outcome, copied, put, take


class VectorEnvironments(Environments):
    """A vector environment whose copies begin when asked.

    `masks` says whether its `reset` takes `options={"reset_mask": …}` with seeds; None: known for Gymnasium's own classes, and true by definition of
    DISABLED. Raises `UsageError` for a vector environment that says no mode or whose copies cannot be begun one by one (use `transitions`).
    """

    def __init__(self, env: VectorEnv, name: str | None = None, masks: bool | None = None) -> None:
        self.env: Any = env  # seeds and observations of a VectorEnv have no types that fit all
        self.count = env.num_envs
        self.name = name or (env.spec.id if env.spec is not None else type(env.unwrapped).__name__)
        self.observation_space, self.action_space = env.single_observation_space, env.single_action_space
        self._mode = _mode(env)
        if not (_takes_mask(env, self._mode) if masks is None else masks):
            raise UsageError(
                f"{self.name}: {type(env.unwrapped).__name__} begins the episodes of its copies by itself ({self._mode.value}), so that they cannot be "
                f"seeded one by one; make it with autoreset_mode=AutoresetMode.DISABLED, or read it with telos.environments.vector.transitions"
            )

    def begin(self, copies: Sequence[int], seeds: Sequence[int]) -> Observation:
        mask = np.zeros(self.count, dtype=bool)
        seed: list[int | None] = [None] * self.count
        for copy, given in zip(copies, seeds, strict=True):
            mask[copy], seed[copy] = True, int(given)
        observation, _ = self.env.reset(seed=seed, options=None if mask.all() else {"reset_mask": mask})
        return take(copied(observation), np.asarray(copies, dtype=np.int64))

    def step(self, actions: np.ndarray) -> Outcome:
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        observation = _led_to(observation, infos) if self._mode is AutoresetMode.SAME_STEP else copied(observation)
        terminated = np.array(terminated, dtype=bool)
        truncated = np.array(truncated, dtype=bool) & ~terminated
        return Outcome(observation, np.array(reward, dtype=np.float64), terminated, truncated, _numbers(infos, self.count))

    def close(self) -> None:
        self.env.close()


class Transitions(NamedTuple):
    """What happened to M of the copies in a step of all."""

    copies: np.ndarray  # [M] int64, rising
    observation: Observation  # [M, …]
    action: np.ndarray  # [M, …]
    reward: np.ndarray  # [M] float64
    following: Observation  # [M, …] where the action led, also when the episode ended there
    terminated: np.ndarray  # [M] bool
    truncated: np.ndarray  # [M] bool; False where terminated


def transitions(
    env: VectorEnv, act: Callable[[Observation], np.ndarray], steps: int, seed: int | Sequence[int] | None = None
) -> Iterator[Transitions]:
    """Steps `env` `steps` times by the actions `act(observation [N, …]) -> [N, …]` and yields the transitions of each step.

    A copy's transitions in order are the same in every mode when `act` decides for each copy by its observation alone. Under NEXT_STEP `act` is also
    asked for the action that is then ignored.
    """
    mode = _mode(env)
    reset: Any = env.reset
    observation, _ = reset(seed=seed if seed is None or isinstance(seed, int) else list(seed))
    observation = copied(observation)
    ended = np.zeros(env.num_envs, dtype=bool)
    for _ in range(steps):
        action = act(observation)
        arrived, reward, terminated, truncated, infos = env.step(action)
        following = _led_to(arrived, infos) if mode is AutoresetMode.SAME_STEP else copied(arrived)
        rows = np.flatnonzero(~ended) if mode is AutoresetMode.NEXT_STEP else np.arange(env.num_envs)
        terminated, truncated = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
        ended = terminated | truncated
        yield Transitions(
            rows,
            take(observation, rows),
            np.asarray(action)[rows],
            np.array(reward, dtype=np.float64)[rows],
            take(following, rows),
            terminated[rows],
            (truncated & ~terminated)[rows],
        )
        if mode is AutoresetMode.DISABLED and ended.any():
            arrived, _ = reset(options={"reset_mask": ended})
        observation = copied(arrived)


def _mode(env: VectorEnv) -> AutoresetMode:
    mode = env.metadata.get("autoreset_mode")
    try:
        return AutoresetMode(mode)
    except ValueError:
        raise UsageError(
            f"{type(env.unwrapped).__name__}: metadata['autoreset_mode'] is {mode!r}, not one of gymnasium.vector.AutoresetMode; what follows the end of "
            f"an episode is unknown"
        ) from None


def _takes_mask(env: VectorEnv, mode: AutoresetMode) -> bool:
    inner: Any = env.unwrapped
    if mode is AutoresetMode.DISABLED or isinstance(inner, SyncVectorEnv):
        return True
    # Without shared memory an asynchronous copy forgets, when it is begun under NEXT_STEP, to drop its pending reset.
    return isinstance(inner, AsyncVectorEnv) and (bool(inner.shared_memory) or mode is AutoresetMode.SAME_STEP)


def _led_to(observation: Observation, infos: Mapping[str, Any]) -> Observation:
    """The observations to which a SAME_STEP step led: those put aside where an episode has ended."""
    observation = copied(observation)
    if "final_obs" in infos:
        for i in np.flatnonzero(infos["_final_obs"]):
            put(observation, int(i), infos["final_obs"][i])
    return observation


def _numbers(infos: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
    """The numbers in `infos` by copy, NaN where a copy reports none; of copies that have been reset already, those of the last step."""
    found: dict[str, np.ndarray] = {}
    ended = np.asarray(infos["_final_obs"], dtype=bool) if "final_obs" in infos else np.zeros(count, dtype=bool)
    for source, rows in ((infos, ~ended), (infos.get("final_info", {}), ended)):
        for key, value in source.items():
            if key.startswith("_") or not (isinstance(value, np.ndarray) and value.shape == (count,) and value.dtype.kind in "biuf"):
                continue
            told = rows & np.asarray(source.get(f"_{key}", True), dtype=bool)
            if told.any():
                found.setdefault(key, np.full(count, np.nan))[told] = value[told]
    return found
