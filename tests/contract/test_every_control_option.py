"""For methods of control: each option of each method is given another value, and something must come out differently, or the value is refused by name."""

from __future__ import annotations

import hashlib
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from support import DISCRETE, World, another, program_of
from telos.core import discovery
from telos.core.config import Option, options_of
from telos.core.errors import TelosError
from telos.core.method import Method

METHODS = [card.key for card in discovery.cards() if card.file is not None and card.family != "language"]

# What must change no number: where it runs and what is written when, and how steps are cut into parts. Their effects have tests of their own.
SILENT = {
    *("out", "backend", "threads", "device", "checkpoint_every", "keep_checkpoints", "log_every", "replay_on_disk", "micro_batch_size"),
}
VALUES: dict[str, Any] = {
    "adam_beta2": 0.5,
    "adam_epsilon": 0.1,
    "adan_betas": [0.5, 0.5, 0.5],
    "adan_restart": 1e-6,
    "clip_reward": 0.1,
    "clip_range_vf": 0.001,
    "epsilon_end": 0.9,
    "epsilon_steps": 20,
    "epsilon_start": 0.0,
    "eval_every": 1,
    "hidden": [8],
    "iteration_steps": 36,
    "max_grad_norm": 0.01,
    "n_step": 2,
    "prioritized_correction": 1.0,
    "replay_size": 20,
    "target_every": 3,
    "target_entropy": 3.0,
    "target_kl": 1e-9,
    "total_steps": 96,
    "total_episodes": 24,
    "snapshot_episodes": 3,
    "snapshot_groups": 1,
    "snapshot_share": 0.0,
    "snapshot_until": 1.0,
    "snapshot_length": 1,
    "reward_range": [-4.0, 0.5],
    "moments": 1,
    "sweeps": 1,
    "critics": 3,
    "warmup_steps": 5,
    "updates": 16,
    "iteration_updates": 6,
    "max_weight": 0.5,
    "max_exponent": 0.01,
    "max_kl": 1e-5,
    "backtracks": 1,
    "cg_iterations": 1,
    "samples": 2,
    "target_noise_clip": 0.01,
}
BESIDE: dict[str, dict[str, Any]] = {
    "clip_reward": {"normalize_rewards": True},
    "prioritized_correction": {"prioritized": 0.6},
    "target_kl": {"epochs": 3},
    "adan_betas": {"optimiser": "adan"},
    "adan_restart": {"optimiser": "adan"},
    "backtracks": {"max_kl": 50.0},
    "epsilon": {"exploration": "epsilon"},
    "sweeps": {"episodes": 40, "batch_episodes": 1},
    "eval_episodes": {"eval_every": 1},
    "target_noise_clip": {"target_noise": 0.2},
}
REFUSED_AFTER = {
    "hindsight": "needs goals",
    "env": "and the space",
    "regressor": "has no effect with --regressor least-squares",
}  # of the data is another


def policy_in(world: World, method: Method) -> str:
    """The folder of a policy for the method's environment."""
    folder = world.root / "given-policy"
    if not folder.exists():
        program = program_of("ppo", world.options(discovery.load("ppo")), world.root / "given-run")
        program.policy.save(folder)
    return str(folder)


def value(world: World, method: Method, option: Option, kind: Any, default: Any) -> Any:
    if option.name == "data":
        return world.few_steps[method.key not in DISCRETE]
    if option.name == "horizon":
        return default + 2
    if option.name == "policy":
        return policy_in(world, method)
    if option.name == "snapshots":
        return world.teachers["continuous=true" in world.options(method)["env_options"]]
    if option.name == "env" and method.loop == "tabular":
        return "telos/LinearMixture-v0"
    if option.name == "env":
        return "CartPole-v1" if "continuous=false" in world.options(method)["env_options"] else "Pendulum-v1"
    if option.name == "env_options":
        return [*world.options(method)["env_options"], "bad=reward"]
    return VALUES[option.name] if option.name in VALUES else another(option.name, kind, default)


def signature(method: Method, options: dict[str, Any], folder: Path) -> Any:
    """All that comes out of a short run, or the refusal."""
    try:
        program = program_of(method.key, options, folder)
        numbers = [program.step(index) for index in range(program.config.program_steps)]
    except TelosError as error:
        return "refused", str(error).replace(str(folder), "")
    weights = hashlib.sha256()
    network = program.agent if hasattr(program, "agent") else program.model
    for tensor in network.state_dict().values():
        weights.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else repr(float(tensor)).encode())
    return numbers, weights.hexdigest(), program.plan()


@pytest.mark.parametrize("key", METHODS)
def test_every_option_changes_what_comes_out(key: str, world: World, tmp_path: Path) -> None:
    method = discovery.load(key)
    hints = typing.get_type_hints(method.config)
    known: dict[str, Any] = {}

    def outcome(**changes: Any) -> Any:
        name = repr(sorted(changes.items()))
        if name not in known:
            known[name] = signature(method, world.options(method, **changes), tmp_path / f"{len(known)}")
        return known[name]

    ignored, refused = [], {}
    for option in options_of(method.config):
        name = option.name
        if name in SILENT:
            continue
        beside = {key: value for key, value in BESIDE.get(name, {}).items() if key in hints}
        if name == "env_options" and method.loop == "offline":
            beside = {"eval_every": 1}
        if name == "env":
            beside = {"env_options": []} | ({"horizon": 16} if method.loop == "tabular" else {})
        if name.startswith("snapshot_"):
            beside = {"snapshots": world.teachers[method.key not in DISCRETE]}
        before = outcome(**beside)
        default = {**world.options(method), **beside}.get(name, option.default)
        after = outcome(**{**beside, name: value(world, method, option, hints[name], default)})
        if before == after:
            ignored.append(name)
        if after[0] == "refused" and name != "env_options" and REFUSED_AFTER.get(name, "\0") not in after[1]:
            refused[name] = after[1]
    assert ignored == []
    assert refused == {}
