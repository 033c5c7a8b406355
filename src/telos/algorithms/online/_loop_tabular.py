"""Finite processes: plan from what has been seen, play whole episodes, and measure the regret exactly.

One of the program's steps is `batch_episodes` episodes under one policy. The method's `plan(config, seen, chance)` gives that policy from a `Seen` (counts,
sums of rewards, and tables of the method's own); after each episode its `update(config, seen, episode)`, where it has one, gives those tables anew.
Both are pure functions on arrays. The process is unknown to the learner. Where the house knows it (`environments.tabular`), the value of the policy and its
regret are exact, from the distribution of starts, not sampled; in other environments with finitely many observations and actions they are left out.

Policies depend on the step of the episode, [H, S, A], and observations do not tell the step. The run keeps both forms: `policy/by_step.safetensors` holds the
last policy and its action values step by step, and `policy/` is a policy of the usual kind, a table of action values over one-hot states, held exactly by
one layer without hidden ones. A state's row is the mean of the steps' rows, weighted by how often the state was met at each step; the value of that stationary
policy is measured beside the other's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.spaces import Discrete
from safetensors.numpy import save_file

from telos.algorithms.control import ControlProgram, EnvironmentConfig, describe_episodes, open_environments
from telos.core.config import require
from telos.core.errors import Failure, UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import numpy_generator
from telos.environments.base import Driver, Environments, Episode
from telos.environments.tabular import Tabular, TabularEnvironments, greedy
from telos.models.policies import Policy, Shape


@dataclass(frozen=True, kw_only=True)
class TabularConfig(EnvironmentConfig):
    """Options of learning in finite processes."""

    episodes: int = 1000  # episodes of the run
    batch_episodes: int = 1  # episodes under one policy, which are one step of the program
    horizon: int = 0  # steps that are planned ahead, at least an episode's; 0 = an episode's, as the environment says
    gamma: float = 1.0  # discount a step, of what is planned and of the regret, (0, 1]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "episodes", "batch_episodes")
        require(self, ">= 0", "horizon")
        require(self, "> 0 and <= 1", "gamma")

    @property
    def program_steps(self) -> int:
        return math.ceil(self.episodes / self.batch_episodes)


@dataclass(frozen=True, kw_only=True)
class RewardedConfig(TabularConfig):
    """Options of methods that learn from rewards."""

    reward_range: tuple[float, float] = (0.0, 1.0)  # least and largest reward of a step: how good or bad the unknown may be

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.reward_range
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UsageError(f"--reward_range {self.reward_range} must be two numbers, the smaller first")


@dataclass(frozen=True)
class Seen:
    """What a learner has seen of S states, A actions and episodes of H steps. Where an episode ends because nothing follows, it led to column S."""

    moves: np.ndarray  # [S, A, S + 1]: how often an action led where
    rewards: np.ndarray  # [S, A]: sums of the rewards
    arrivals: np.ndarray  # [H, S]: how often a state was met at a step; row 0 counts the starts
    low: np.ndarray  # [H]: the least return from a step on, by `reward_range`
    high: np.ndarray  # [H]: the largest
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)  # the method's own
    models: np.ndarray | None = None  # [d, S, A, S]: known models of which the process is a mixture, where the environment tells them

    @property
    def horizon(self) -> int:
        return len(self.arrivals)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, S, A)"""
        return self.horizon, *self.rewards.shape  # type: ignore[return-value]

    @cached_property
    def counts(self) -> np.ndarray:
        """[S, A]: how often an action was taken."""
        return self.moves.sum(-1)

    @cached_property
    def frequencies(self) -> np.ndarray:
        """[S, A, S + 1]: the most likely transitions; 0 everywhere for an action that was never taken."""
        return self.moves / np.maximum(self.counts, 1)[..., None]

    def mean_rewards(self, untried: float) -> np.ndarray:
        """[S, A]"""
        return np.where(self.counts > 0, self.rewards / np.maximum(self.counts, 1), untried)

    @property
    def start(self) -> np.ndarray:
        """[S]: the frequencies of first states; uniform before the first episode."""
        first = self.arrivals[0]
        return first / first.sum() if first.any() else np.full(len(first), 1 / len(first))


@dataclass(frozen=True)
class Played:
    """An episode: states [T + 1] (S at the end where nothing follows), actions [T], rewards [T]."""

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray


class Plan(NamedTuple):
    """The policy [H, S, A] as probabilities, the action values [H, S, A] it came from, numbers to log, and tables that the method wants to keep."""

    policy: np.ndarray
    values: np.ndarray
    metrics: Mapping[str, float]
    tables: Mapping[str, np.ndarray]


def backward(seen: Seen, back: Callable[[int, np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Backward recursion: `back(h, following)` gives action values [S, A] of step h from the values [S + 1] of what follows (the last is 0: nothing does).
    Returns values [H + 1, S + 1] and action values [H, S, A]."""
    steps, states, actions = seen.shape
    state, action = np.zeros((steps + 1, states + 1)), np.zeros((steps, states, actions))
    for h in reversed(range(steps)):
        action[h] = back(h, state[h + 1])
        state[h, :states] = action[h].max(-1)
    return state, action


def by_values(values: np.ndarray, metrics: Mapping[str, float] | None = None, tables: Mapping[str, np.ndarray] | None = None) -> Plan:
    """The plan that takes the best action by `values` [H, S, A]."""
    return Plan(greedy(values), values, metrics or {}, tables or {})


class Program(ControlProgram):
    """Plan, play, count."""

    def __init__(self, method: Method, config: TabularConfig, run: Run) -> None:
        super().__init__(method, config, run)
        self.config = config
        environments = open_environments(config, 1)
        observed, acted = environments.observation_space, environments.action_space
        if not isinstance(observed, Discrete) or not isinstance(acted, Discrete):
            raise UsageError(
                f"this method needs Discrete observations and actions; those of {environments.name} are {observed} and {acted}"
            )
        self.driver = Driver(environments, config.seed)
        self.process, self.steps = _known(environments, config)
        states, actions = int(observed.n), int(acted.n)
        left = np.array([sum(config.gamma**t for t in range(self.steps - h)) for h in range(self.steps)])
        low, high = config.reward_range if isinstance(config, RewardedConfig) else (0.0, 1.0)
        self.seen = Seen(
            moves=np.zeros((states, actions, states + 1)),
            rewards=np.zeros((states, actions)),
            arrivals=np.zeros((self.steps, states)),
            low=low * left,
            high=high * left,
            models=_models(environments, states, actions),
        )
        self.policy = Policy(observed, acted, Shape("values", (), orthogonal=False)).requires_grad_(False).to(self.device)
        self.model = self.policy
        layer: Any = self.policy.body[0]
        layer.bias.zero_()
        self.learned: list[torch.nn.Parameter] = [layer.weight]
        self.regret = 0.0
        self.optimum = None if self.process is None else float(self.process.start @ self.process.optimal().state[0])

    def plan(self) -> dict[str, Any]:
        """Which size is which, for the user to read before the first step."""
        c = self.config
        states, actions = self.seen.rewards.shape
        found = {
            "environment": c.env,
            "states": states,
            "actions": actions,
            "steps an episode": self.steps,
            "episodes": c.program_steps * c.batch_episodes,
            "episodes under one policy": c.batch_episodes,
            "regret": "not known: the process is not" if self.process is None else "exact",
        }
        return found if self.optimum is None else found | {"optimal value": self.optimum}

    # -- one step -------------------------------------------------------------------------------------------------------------------------------

    def step(self, index: int) -> dict[str, float]:
        c = self.config
        planned = self._plan(index)
        chance = numpy_generator(c.seed, "actions", index)
        episodes = []
        for _ in range(c.batch_episodes):
            played, episode = self._play(planned.policy, chance)
            self._learn(played)
            episodes.append(episode)
        metrics = {"environment_steps": float(self.driver.steps), **describe_episodes(episodes), **planned.metrics}
        if self.process is not None and self.optimum is not None:
            value = self._value(planned.policy)
            self.regret += c.batch_episodes * (self.optimum - value)
            metrics |= {"policy/value": value, "regret/episode": self.optimum - value, "regret/cumulative": self.regret}
        metrics["seen/actions"] = float((self.seen.counts > 0).mean())
        metrics |= self.evaluate_if_due(index)
        return metrics

    def _plan(self, index: int) -> Plan:
        assert self.method.plan is not None
        planned: Plan = self.method.plan(self.config, self.seen, numpy_generator(self.config.seed, "plan", index))
        if not np.isfinite(planned.values).all():
            raise Failure(f"step {index + 1}: action values that were planned from are not finite")
        self.seen = dataclasses.replace(self.seen, tables={**self.seen.tables, **planned.tables})
        layer: Any = self.policy.body[0]
        layer.weight.copy_(torch.from_numpy(self._table(planned)).T)
        return planned

    def _play(self, policy: np.ndarray, chance: np.random.Generator) -> tuple[Played, Episode]:
        """One episode; the driver stands at the start of the next one before and after."""
        driver = self.driver
        space = driver.environments.observation_space
        assert isinstance(space, Discrete)
        first, cumulative, draws = int(space.start), policy.cumsum(-1), chance.random(self.steps)
        states, actions, rewards = [int(driver.observation[0]) - first], [], []  # type: ignore[index]
        for h in range(self.steps):
            # The last column is left out: rounding may leave it below 1.
            action = int((draws[h] >= cumulative[h, states[-1], :-1]).sum())
            outcome, ended = driver.step(self.policy.to_environment(np.array([action])))
            assert isinstance(outcome.observation, np.ndarray)
            reached = int(outcome.observation[0]) - first
            # A process ends at its horizon too: that is the learner's horizon, and no fact about the state.
            over = bool(outcome.terminated[0]) and (self.process is None or bool(self.process.ending[reached]))
            states.append(self.seen.rewards.shape[0] if over else reached)
            actions.append(action)
            rewards.append(float(outcome.reward[0]))
            if ended:
                return Played(np.array(states), np.array(actions), np.array(rewards)), ended[0]
        raise Failure(
            f"{driver.environments.name}: an episode is longer than the {self.steps} steps that --horizon says; a registered environment's are cut by "
            f"--env_options max_episode_steps={self.steps}"
        )

    def _learn(self, played: Played) -> None:
        """Counts an episode; new arrays, so that what a method was given stays as it was."""
        seen, steps = self.seen, np.arange(len(played.actions))
        moves, rewards, arrivals = seen.moves.copy(), seen.rewards.copy(), seen.arrivals.copy()
        before, after = played.states[:-1], played.states[1:]
        np.add.at(moves, (before, played.actions, after), 1)
        np.add.at(rewards, (before, played.actions), played.rewards)
        arrivals[steps, before] += 1
        self.seen = dataclasses.replace(seen, moves=moves, rewards=rewards, arrivals=arrivals)
        if self.method.update is not None:
            tables = self.method.update(self.config, self.seen, played)
            self.seen = dataclasses.replace(self.seen, tables={**seen.tables, **tables})

    def _value(self, policy: np.ndarray) -> float:
        """The exact value of a policy [H, S, A] in the process."""
        assert self.process is not None
        assert self.process.horizon is not None
        return self.process.performance(policy[: self.process.horizon])

    # -- what is left behind --------------------------------------------------------------------------------------------------------------------

    def _table(self, planned: Plan) -> np.ndarray:
        """[S, A]: the steps' action values, weighted by how often a state was met at each step (all alike where it never was)."""
        weight = self.seen.arrivals + 1e-9
        return np.einsum("hs,hsa->sa", weight / weight.sum(0), planned.values)

    def finish(self, run: Run) -> None:
        planned = self._plan(self.config.program_steps)
        found = self.evaluate(self.config.program_steps)
        self.policy.save(run.path / "policy")
        save_file({"policy": planned.policy, "values": planned.values, **self.seen.tables}, run.path / "policy" / "by_step.safetensors")
        run.describe(evaluation=found)
        if self.optimum is not None:
            stationary = np.broadcast_to(greedy(self._table(planned)), planned.policy.shape)
            exact = {"optimum": self.optimum, "regret": self.regret, "greedy": self._value(greedy(planned.values))}
            run.describe(exact=exact | {"stationary": self._value(stationary)})
        for environments in (self.evaluation, self.driver.environments):
            if environments is not None:
                environments.close()

    # -- continuing -----------------------------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        seen = self.seen
        return {
            "moves": seen.moves,
            "rewards": seen.rewards,
            "arrivals": seen.arrivals,
            "tables": dict(seen.tables),
            "driver": self.driver.state(),
            "regret": self.regret,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        held = {name: np.array(state[name]) for name in ("moves", "rewards", "arrivals")}
        tables = {name: np.array(table) for name, table in state["tables"].items()}
        self.seen = dataclasses.replace(self.seen, **held, tables=tables)
        self.driver.load(state["driver"])
        self.regret = float(state["regret"])


def _models(environments: Environments, states: int, actions: int) -> np.ndarray | None:
    """The known models of a mixture: the process's own, or those that a Gymnasium environment has as an attribute `models` [d, S, A, S]."""
    copies = getattr(environments, "copies", None)
    owner = copies[0].unwrapped if copies else getattr(environments, "process", None)
    found = getattr(owner, "models", None)
    if found is None:
        return None
    models = np.asarray(found, dtype=np.float64)
    if models.ndim != 4 or models.shape[1:] != (states, actions, states):
        raise UsageError(f"{environments.name}: models must have the shape [d, {states}, {actions}, {states}]; theirs is {models.shape}")
    return models


def _known(environments: Environments, config: TabularConfig) -> tuple[Tabular | None, int]:
    """(the process as the regret counts it, where it is known; the steps that are planned ahead)"""
    process = environments.process if isinstance(environments, TabularEnvironments) else None
    copies = getattr(environments, "copies", None)
    spec = copies[0].spec if copies else None
    limits = [
        getattr(environments, "max_episode_steps", None),
        None if spec is None else spec.max_episode_steps,
        None if process is None else process.horizon,
    ]
    limit = min((int(one) for one in limits if one), default=0)
    if not (limit or config.horizon):
        raise UsageError(f"{environments.name} does not say how long an episode may be: give --horizon")
    if 0 < config.horizon < limit:
        raise UsageError(f"--horizon {config.horizon} is shorter than the episodes of {environments.name}, which may have {limit} steps")
    if process is not None:
        process = dataclasses.replace(process, horizon=limit or config.horizon, discount=config.gamma)
    return process, config.horizon or limit
