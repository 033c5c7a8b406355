"""Offline data of control, made on this machine: `telos data make hopper-medium-replay --out …`.

A name is a task and a kind. Tasks are the short names below, or any environment that runs take (`LunarLander-v3-medium`). The kinds follow D4RL (Fu et al.
2020, arXiv:2004.07219, section 5). All but `random` are made from a behaviour run of our own (`sac` for continuous actions, `dqn` for discrete, `ppo` for
several choices at once, which keeps no replay):

- `random`: uniformly random actions;
- `expert`: the policy of the evaluation with the highest mean return, the later of equals;
- `medium`: the policy of the first evaluation whose return lies above random + (expert − random) / 3;
- `medium-replay`: all that the run saw until that evaluation, `full-replay`: all that it saw, the reference of SACo (`data.step_inspection`);
- `medium-expert`: half of the steps from each.

Mazes have no learned policy but a scripted driver: `play` goes to places of its own choice for whole episodes, `stitched` is the same in episodes of 50
steps (five cells at most), so that longer ways must be put together of several; rewards are those of the goals that stand in the observations.

Policies act as they did while they learned: by their distribution, or, for action values, at random in 5 % of the steps. D4RL takes policies of a fixed
number of steps; the rule above needs no table of them, so that the shares of the expert's return differ from D4RL's. The last episode of each of the eight
copies is cut where the asked number of steps is reached. Episodes of a replay that were under way count as cut, too.

The folder is one of Minari. It holds `data/` with the steps and their provenance, and `behaviour/`, the run, which other kinds of the same task can share
(`behaviour=`). The returns of random actions and of the expert stand in metadata.json as `ref_min_score` and `ref_max_score`.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete

from telos.algorithms import run as runs
from telos.algorithms.control import evaluate
from telos.core import config as configs
from telos.core import discovery
from telos.core import run as records
from telos.core.errors import UsageError, did_you_mean
from telos.core.loop import Callback
from telos.core.run import Run
from telos.core.seeds import derive, numpy_generator, torch_generator
from telos.data.minari_folders import write_minari
from telos.data.step_readers import read_run
from telos.data.steps import Steps, joined
from telos.environments.base import Driver, Environments, Observation
from telos.environments.registry import BATCHED, make_environments
from telos.models.policies import Policy, Shape

LEARNED = ("random", "expert", "medium", "medium-replay", "full-replay", "medium-expert")
SCRIPTED = ("play", "stitched")
COPIES = 8  # of the environment, from which data are taken together
EVALUATIONS = 30  # of a behaviour run
EPISODES = 10  # of an evaluation
NOISE = 0.2  # deviation of the scripted driver's actions
STITCHED_STEPS = 50
RANDOM_SHARE = 0.05  # of the steps of a policy of action values


@dataclass(frozen=True)
class Task:
    """An environment and how much is learned and taken from it unless the user says otherwise."""

    env: str
    steps: int = 100_000  # that the behaviour run learns for
    size: int = 100_000  # steps of the data, where they are not a replay
    options: Mapping[str, Any] = field(default_factory=dict)  # of the behaviour run
    scripted: bool = False


_EARLY = {"start_steps": 1000, "random_steps": 1000}
TASKS: Mapping[str, Task] = {
    "cartpole": Task("CartPole-v1", 30_000, 20_000),
    "acrobot": Task("Acrobot-v1", 50_000, 50_000),
    "pendulum": Task("Pendulum-v1", 10_000, 20_000, _EARLY),
    **{name: Task(f"{env}-v5", 1_000_000, 1_000_000) for name, env in (("hopper", "Hopper"), ("walker2d", "Walker2d"), ("ant", "Ant"))},
    "halfcheetah": Task("HalfCheetah-v5", 1_000_000, 1_000_000),
    "pointmaze": Task("telos/PointMazeMedium-v0", scripted=True),
    "pointmaze-u": Task("telos/PointMazeU-v0", scripted=True),
    "pointmaze-medium": Task("telos/PointMazeMedium-v0", scripted=True),
    "pointmaze-large": Task("telos/PointMazeLarge-v0", scripted=True),
}


def parse(name: str) -> tuple[Task, str]:
    """(task, kind) of a name. Raises `UsageError`, with what there is, for one that is none."""
    kinds = sorted(LEARNED + SCRIPTED, key=len, reverse=True)
    kind = next((one for one in kinds if name.endswith(f"-{one}")), None)
    if kind is None:
        raise UsageError(f"{name!r} names no data: write TASK-KIND, such as {_examples()}; kinds are {', '.join(LEARNED + SCRIPTED)}")
    key = name.removesuffix(f"-{kind}")
    task = TASKS.get(key) or (Task(key) if _is_environment(key) else None)
    if task is None:
        raise UsageError(
            f"{name!r}: there is no task {key!r}{did_you_mean(key, TASKS)}; tasks are {', '.join(TASKS)}, the ids of Gymnasium, and file.py:Class"
        )
    if task.scripted != (kind in SCRIPTED):
        fitting = SCRIPTED if task.scripted else LEARNED
        raise UsageError(f"{name!r}: kinds of {key} are {', '.join(fitting)}")
    return task, kind


def is_name(name: str) -> bool:
    """Whether a name is of data of control, whatever is wrong with it."""
    return any(name.endswith(f"-{kind}") for kind in LEARNED + SCRIPTED)


def _examples() -> str:
    return "cartpole-medium, halfcheetah-medium-replay or pointmaze-play"


def _is_environment(key: str) -> bool:
    return key in BATCHED or key in gymnasium.registry or ":" in key


def make_data(
    name: str,
    out: str | Path,
    *,
    steps: int | None = None,
    size: int | None = None,
    seed: int = 0,
    behaviour: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
) -> Path:
    """Makes the data called `name` in the folder `out` and returns it.

    `steps`: environment steps that the behaviour run learns for; `size`: steps of the data (a replay has as many as were seen). `behaviour`: the folder of a
    behaviour run that this function made before, for the same environment. A run in `out/behaviour` that was interrupted is continued.

    Raises `UsageError` for names that are none, options without effect, and folders that hold data already.
    """
    task, kind = parse(name)
    out = Path(out)
    if (out / "data").exists():
        raise UsageError(f"--out {out} holds data already; name another folder")
    for option, value in (("steps", steps), ("size", size)):
        if value is not None and value < 1:
            raise UsageError(f"--{option} {value} must be at least 1")
    if size is not None and kind.endswith("replay"):
        raise UsageError(f"--size has no effect on {kind}: a replay is what the behaviour run saw (--steps)")
    if task.scripted and (steps is not None or behaviour is not None):
        raise UsageError(f"--{'steps' if steps is not None else 'behaviour'} has no effect on {kind}: nothing is learned")
    if behaviour is not None and steps is not None:
        raise UsageError("--steps has no effect with --behaviour: that run has been made")
    if kind == "random" and steps is not None:
        raise UsageError("--steps has no effect on random: nothing is learned")
    count = size or task.size
    told: dict[str, Any]
    if task.scripted:
        made, told = _scripted(task, kind, count, seed), {"algorithm_name": "scripted waypoints", "noise": NOISE}
    elif kind == "random" and behaviour is None:
        made, told = _random(task, count, seed), {"algorithm_name": "random"}
    else:
        run = _behaviour(
            task, kind, out / "behaviour" if behaviour is None else Path(behaviour), behaviour is not None, steps, seed, callbacks
        )
        made, told = _learned(task, kind, run, count, seed)
    told |= {
        "name": name,
        "seed": seed,
        "command": _command(),
        "commit": records.commit(),
        "description": f"{name}: {kind} data of {task.env}",
    }
    return write_minari(out, made, task.env, told)


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


# -- behaviour ----------------------------------------------------------------------------------------------------------------------------------------


class _Keep:
    """Keeps the policy of every evaluation in the run's folder, beside its environment steps in metrics.jsonl."""

    def started(self, run: Run, program: Any, first: int, total: int) -> None:
        self.run, self.program = run, program

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        if "evaluation/return" in metrics:
            self.program.policy.save(_kept(self.run.path, step))

    def ended(self, status: str) -> None: ...


def _kept(run: Path, step: int) -> Path:
    return run / "policies" / f"step-{step:06d}"


def _behaviour(task: Task, kind: str, folder: Path, given: bool, steps: int | None, seed: int, callbacks: Sequence[Callback]) -> Run:
    """The finished behaviour run, made, continued or found."""
    watching = [_Keep(), *callbacks]
    key, options = _settings(task, steps or task.steps)
    if key == "ppo" and kind.endswith("replay"):
        raise UsageError(f"{kind} needs a run that keeps what it saw; for the actions of {task.env} there is ppo alone, which does not")
    if given or (folder / "run.json").is_file():
        asked = {"env": task.env} if given else {"env": task.env, "total_steps": steps or task.steps, "seed": seed}
        found = configs.read_yaml(Run.open(folder).path / "config.yaml")
        if other := [name for name, value in asked.items() if found.get(name) != value]:
            name = other[0]
            raise UsageError(
                f"{folder} holds a run with --{name} {found.get(name)}, and --{name} {asked[name]} is asked for; name another folder"
            )
        run = runs.resume(folder, callbacks=watching)
    else:
        run = runs.train(key, options | {"env": task.env, "seed": seed, "out": str(folder)}, callbacks=watching)
    if "random_return" not in run.facts:
        environments = make_environments(task.env, COPIES)
        try:
            episodes = evaluate(_Uniform(environments, seed), environments, EPISODES, derive(seed, "random return"))
        finally:
            environments.close()
        run.describe(random_return=float(np.mean([episode.total for episode in episodes])))
    return run


def _settings(task: Task, steps: int) -> tuple[str, dict[str, Any]]:
    """The method for the environment's actions, and the options of its run."""
    environments = make_environments(task.env, 1)
    space = environments.action_space
    environments.close()
    key = "sac" if isinstance(space, Box) else "dqn" if isinstance(space, Discrete) else "ppo"
    config: Any = discovery.load(key).config
    options: dict[str, Any] = {"total_steps": steps, "eval_episodes": EPISODES, **task.options}
    if key != "ppo":
        iteration = max(1, min(1000, steps // EVALUATIONS))
        options |= {"iteration_steps": iteration, "replay_size": steps}
        for name in ("start_steps", "random_steps"):
            # A short run must not be spent before it begins to learn.
            options[name] = min(options.get(name, getattr(config, name)), max(1, steps // 10))
        if key == "dqn":
            options["epsilon_steps"] = max(1, steps // 5)
    one = config(**options, env=task.env).steps_an_iteration
    options["eval_every"] = max(1, -(-steps // one) // EVALUATIONS)
    return key, options


def _evaluations(run: Run) -> list[tuple[int, float, Path]]:
    """(environment steps until then, mean return, policy) of every evaluation, in order, the last one at the end of the run."""
    rows = run.metrics()
    found = [
        (int(row["environment_steps"]), float(row["evaluation/return"]), _kept(run.path, int(row["step"])))
        for row in rows
        if "evaluation/return" in row
    ]
    last = run.facts.get("evaluation", {}).get("evaluation/return")
    if last is not None and rows:
        found.append((int(rows[-1]["environment_steps"]), float(last), run.path / "policy"))
    if missing := [place for _, _, place in found if not (place / "policy.json").is_file()]:
        raise UsageError(f"{run.path} is no behaviour run that `telos data make` made: it lacks {missing[0].relative_to(run.path)}")
    if not found:
        raise UsageError(f"{run.path} has no evaluations, so that there is no telling which policy is medium")
    return found


def choose(returns: Sequence[float], random: float) -> tuple[int, int]:
    """(medium, expert): which of the evaluations' mean returns are the policies of these names. Raises `UsageError` where nothing was learned."""
    expert = max(range(len(returns)), key=lambda i: (returns[i], i))
    if not returns[expert] > random:
        raise UsageError(
            f"the behaviour run did not learn: its best evaluation has the return {returns[expert]:.4g}, and random actions have {random:.4g}; "
            "give it more --steps"
        )
    bar = random + (returns[expert] - random) / 3
    return next(i for i, value in enumerate(returns) if value > bar), expert


# -- data ---------------------------------------------------------------------------------------------------------------------------------------------


class _Uniform(Policy):
    """Uniformly random actions."""

    def __init__(self, environments: Environments, seed: int) -> None:
        super().__init__(environments.observation_space, environments.action_space, Shape(hidden=(1,)))
        self._draws = numpy_generator(seed, "random actions")

    def choose(self, read: np.ndarray, deterministic: bool = True, generator: torch.Generator | None = None) -> np.ndarray:
        return self.random(len(read), self._draws)


def _learned(task: Task, kind: str, run: Run, size: int, seed: int) -> tuple[Steps, dict[str, Any]]:
    """The data of a kind, and where they come from."""
    random = float(run.facts["random_return"])
    evaluations = _evaluations(run)
    values = [value for _, value, _ in evaluations]
    # Random actions and the whole replay are what they are, whether something was learned or not.
    medium, expert = (0, 0) if kind in ("random", "full-replay") else choose(values, random)
    told: dict[str, Any] = {
        "algorithm_name": run.facts["method"],
        "ref_min_score": random,
        "ref_max_score": max(values),
        "behaviour": {"run": str(run.path), "commit": run.facts.get("commit"), "reproduce": run.facts.get("reproduce"), "random": random},
    }

    def policy_steps(name: str, which: int, count: int) -> Steps:
        reached, value, place = evaluations[which]
        told["behaviour"][name] = {"environment_steps": reached, "return": value, "policy": str(place)}
        return _collected(task, Policy.load(place), count, seed, name)

    if kind == "random":
        return _random(task, size, seed), told
    if kind == "full-replay":
        return read_run(run.path), told
    if kind == "medium-replay":
        told["behaviour"]["medium"] = {"environment_steps": evaluations[medium][0], "return": evaluations[medium][1]}
        return read_run(run.path, upto=evaluations[medium][0]), told
    if kind == "medium-expert":
        parts = [policy_steps("medium", medium, -(-size // 2)), policy_steps("expert", expert, max(1, size // 2))]
        return joined(parts, kind), told
    return policy_steps(kind, medium if kind == "medium" else expert, size), told


def _random(task: Task, size: int, seed: int) -> Steps:
    environments = make_environments(task.env, COPIES)
    return _recorded(environments, _acting(_Uniform(environments, derive(seed, "data")), seed, "random"), size, seed, "random")


def _collected(task: Task, policy: Policy, size: int, seed: int, label: str) -> Steps:
    return _recorded(make_environments(task.env, COPIES), _acting(policy, seed, label), size, seed, label)


def _acting(policy: Policy, seed: int, label: str) -> Callable[[Observation], np.ndarray]:
    """How a policy acts in data: as it did while it learned."""
    generator, draws = torch_generator(seed, "data actions", label), numpy_generator(seed, "data chance", label)

    def act(observation: Observation) -> np.ndarray:
        action = policy.choose(policy.reader(observation), deterministic=False, generator=generator)
        if policy.shape.kind == "values":
            chance = draws.random(len(action)) < RANDOM_SHARE
            action = np.where(chance, policy.random(len(action), draws), action)
        return policy.to_environment(action)

    return act


def _scripted(task: Task, kind: str, size: int, seed: int) -> Steps:
    from telos.environments.maze import PointMaze, Waypoints

    options = {"max_episode_steps": STITCHED_STEPS} if kind == "stitched" else {}
    environments = make_environments(task.env, COPIES, options=options)
    assert isinstance(environments, PointMaze)
    driver = Waypoints(environments, play=True, noise=NOISE, seed=derive(seed, "data"))

    def act(observation: Observation) -> np.ndarray:
        assert isinstance(observation, dict)
        return driver.act(observation)

    return _recorded(environments, act, size, seed, kind)


def _recorded(environments: Environments, act: Callable[[Observation], np.ndarray], size: int, seed: int, label: str) -> Steps:
    """`size` steps, or the next multiple of the number of copies; the episodes of each copy one after the other, the last of which is cut."""
    driver = Driver(environments, seed, "data", label)
    columns: dict[str, list[Any]] = {name: [] for name in ("observation", "action", "reward", "next_observation", "terminated", "ended")}
    try:
        for _ in range(-(-size // environments.count)):
            seen = driver.observation
            action = act(seen)
            outcome, _ = driver.step(action)
            row = (seen, action, outcome.reward, outcome.observation, outcome.terminated, outcome.terminated | outcome.truncated)
            for values, value in zip(columns.values(), row, strict=True):
                values.append(_copied(value))
    finally:
        environments.close()
    stacked = {name: _by_copy(values) for name, values in columns.items()}
    rows = len(columns["reward"])
    stacked["ended"][rows - 1 :: rows] = True
    return Steps.of(
        *stacked.values(),
        observation_space=environments.observation_space,
        action_space=environments.action_space,
        source=label,
        env=environments.name,
    )


def _copied(value: Any) -> Any:
    return {key: part.copy() for key, part in value.items()} if isinstance(value, dict) else np.array(value)


def _by_copy(values: list[Any]) -> Any:
    """[rows × copies, …], all rows of the first copy first."""
    if isinstance(values[0], dict):
        return {key: _by_copy([value[key] for value in values]) for key in values[0]}
    stacked = np.stack(values).swapaxes(0, 1)
    return stacked.reshape(-1, *stacked.shape[2:])


def described(folder: str | Path) -> list[list[str]]:
    """Plain rows of where data in a folder come from, for the command line."""
    told = json.loads((Path(folder) / "data" / "metadata.json").read_text(encoding="utf-8"))
    own = told.get("telos", {})
    rows = [["episodes", f"{told['total_episodes']}, {told['total_steps']} steps"], ["environment", str(own.get("env"))]]
    if "ref_max_score" in told:
        rows.append(["returns", f"random {told['ref_min_score']:.4g}, expert {told['ref_max_score']:.4g}"])
    for name in ("medium", "expert"):
        if isinstance(of := own.get("behaviour", {}).get(name), dict):
            rows.append([name, f"return {of['return']:.4g} after {of['environment_steps']} steps"])
    return rows
