"""What all loops of control share: options, environments, evaluation, and the numbers of finished episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from telos.core.config import RunConfig, require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.run import Run
from telos.environments.base import Driver, Environments, Episode, play
from telos.environments.registry import make_environments
from telos.environments.snapshots import SnapshotEnvironments, collect
from telos.models.policies import Policy


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig(RunConfig):
    """The environment: the same names in every method of control."""

    env: str = ""  # Gymnasium id, or file.py:Class or module:Class for one's own; offline: default is the one that the data name
    env_options: tuple[str, ...] = ()  # name=value for the environment's constructor
    threads: int = 1  # CPU threads of torch: more than one slow networks of control's size down; 0 = as many as there are cores
    eval_every: int = 0  # iterations between evaluations; 0 = only at the end
    eval_episodes: int = 10  # episodes of an evaluation, with the most probable actions

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "eval_episodes")
        require(self, ">= 0", "eval_every")
        options_of(self)


@dataclass(frozen=True, kw_only=True)
class ControlConfig(EnvironmentConfig):
    """Length and width of learning in an environment."""

    num_envs: int = 1  # copies that are stepped together
    total_steps: int = 100_000  # environment steps of the run, over all copies
    snapshots: str = (
        ""  # folder of a finished run in this environment: early on, episodes begin in states of its policy; those of evaluations never do
    )
    snapshot_episodes: int = 10  # episodes that this policy plays for them
    snapshot_groups: int = 10  # groups of similar states from which starts are drawn alike (k-means); 1 = all states alike
    snapshot_share: float = 0.5  # share of episodes that begin in one, while they do
    snapshot_until: float = 0.2  # share of the run's environment steps during which episodes do
    snapshot_length: int = 100  # steps after which episodes that began in one are cut; 0 = never

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 1", "num_envs", "total_steps", "snapshot_episodes", "snapshot_groups")
        require(self, ">= 0 and <= 1", "snapshot_share", "snapshot_until")
        require(self, ">= 0", "snapshot_length")
        for name in ("episodes", "groups", "share", "until", "length"):
            if not self.snapshots and getattr(self, f"snapshot_{name}") != ControlConfig.__dataclass_fields__[f"snapshot_{name}"].default:
                raise UsageError(f"--snapshot_{name} has no effect without --snapshots")

    @property
    def steps_an_iteration(self) -> int:
        """Environment steps, over all copies, of one of the program's steps."""
        raise NotImplementedError

    @property
    def program_steps(self) -> int:
        return math.ceil(self.total_steps / self.steps_an_iteration)


def options_of(config: EnvironmentConfig) -> dict[str, Any]:
    """`--env_options` as keywords. Raises `UsageError` for what is not name=value."""
    import yaml

    found = {}
    for part in config.env_options:
        name, given, value = part.partition("=")
        if not given or not name.strip().isidentifier():
            raise UsageError(f"--env_options {part}: write name=value")
        found[name.strip()] = yaml.safe_load(value)
    return found


def device_of(config: RunConfig) -> torch.device:
    """Where networks live; `auto` takes the GPU when there is one."""
    return torch.device("cuda" if config.device == "auto" and torch.cuda.is_available() else config.device.replace("auto", "cpu"))


def open_environments(config: EnvironmentConfig, count: int, env: str | None = None, *, learning: bool = True) -> Environments:
    """`count` copies of the environment that the options name, or of `env`; `learning`: episodes may begin in snapshots where options ask for it."""
    found = make_environments(config.env if env is None else env, count, options=options_of(config))
    return with_snapshots(config, found) if learning and isinstance(config, ControlConfig) and config.snapshots else found


def with_snapshots(config: ControlConfig, environments: Environments) -> Environments:
    """Environments some of whose episodes begin in states of the policy of `--snapshots`."""
    folder = Path(config.snapshots)
    teacher = Policy.load(folder / "policy" if (folder / "policy").is_dir() else folder)
    if teacher.observation_space != environments.observation_space or teacher.action_space != environments.action_space:
        raise UsageError(
            f"--snapshots {config.snapshots}: its policy is of an environment with other observations or actions than {environments.name}"
        )
    one = make_environments(config.env, 1, options=options_of(config))
    snapshots = collect(one, teacher, config.snapshot_episodes, config.snapshot_groups, config.seed)
    one.close()
    until = round(config.snapshot_until * config.total_steps)
    return SnapshotEnvironments(environments, snapshots, share=config.snapshot_share, until=until, length=config.snapshot_length)


def evaluate(policy: Policy, environments: Environments, episodes: int, seed: int, *label: str | int) -> list[Episode]:
    """`episodes` whole episodes of a policy, by its most probable actions (`environments.base.play`)."""
    driver = Driver(environments, seed, "evaluation", *label)
    return play(driver, episodes, lambda seen, *_: policy.to_environment(policy.choose(policy.reader(seen))))


def describe_episodes(episodes: Sequence[Episode], prefix: str = "episode") -> dict[str, float]:
    """Mean return, its spread, length, and what the task itself reports, under the names that users watch."""
    if not episodes:
        return {}
    totals = np.array([episode.total for episode in episodes])
    found = {
        f"{prefix}/return": float(totals.mean()),
        f"{prefix}/return_std": float(totals.std()),
        f"{prefix}/length": float(np.mean([episode.length for episode in episodes])),
        f"{prefix}/count": float(len(episodes)),
    }
    for name in ("success", "is_success", "cost"):
        known = [episode.info[name] for episode in episodes if name in episode.info and not math.isnan(episode.info[name])]
        if known:
            found[f"{prefix}/{name}"] = float(np.mean(known))
    return found


class ControlProgram:
    """What programs of control share: where networks live, evaluations, and what a run leaves behind. `env` None is the one that the options name."""

    policy: Policy
    env: str | None = None

    def __init__(self, method: Method, config: EnvironmentConfig, run: Run) -> None:
        self.method, self.run = method, run
        self.settings = config
        self.device = device_of(config)
        self.last_batch: Mapping[str, Any] = {}
        self.evaluation: Environments | None = None

    def evaluate(self, index: int) -> dict[str, float]:
        """The policy as it is after step `index`, in environments and episodes of their own; nothing of it is learned from."""
        c = self.settings
        if self.env == "":
            return {}
        if self.evaluation is None:
            self.evaluation = open_environments(c, min(8, c.eval_episodes), self.env, learning=False)
        return describe_episodes(evaluate(self.policy, self.evaluation, c.eval_episodes, c.seed, index), "evaluation")

    def evaluate_if_due(self, index: int) -> dict[str, float]:
        every = self.settings.eval_every
        return self.evaluate(index) if every and (index + 1) % every == 0 and index + 1 < self.settings.program_steps else {}

    def finish(self, run: Run) -> None:
        self.policy.save(run.path / "policy")
        run.describe(evaluation=self.evaluate(self.settings.program_steps))
        if self.evaluation is not None:
            self.evaluation.close()
