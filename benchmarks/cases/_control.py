"""What cases of control share: our side with a callback after each iteration, Stable-Baselines3's with one after each rollout, d3rlpy's updates, and the
products of perceptrons."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from cases._shared import our_facts, versions

ROWS, OBSERVATION, ACTION, STEPS_IN_DATA = 256, 11, 3, 100_000  # a batch, and data of Hopper's sizes


def nothing_to_prepare(settings: dict[str, Any], gate: Any) -> None: ...


def ours(method: str, loop: str, settings: dict[str, Any], gate: Any, options: dict[str, Any], value: str) -> None:
    """`telos.train` (its door for callbacks), with a callback at the end of each iteration, which tells the metric `value`."""
    from telos.algorithms.run import train

    import_module(f"telos.algorithms.{loop}")

    class Watch:
        def started(self, run: Any, program: Any, first: int, total: int) -> None: ...

        def stepped(self, step: int, metrics: dict[str, float]) -> None:
            gate.step(metrics.get(value, float("nan")))

        def ended(self, status: str) -> None: ...

    chosen = {"device": "cpu", "threads": settings["threads"], "seed": settings["seed"], "checkpoint_every": 0, **options}
    gate.facts |= our_facts({name: given for name, given in chosen.items() if name != "data"})
    gate.begin()
    train(method, {**chosen, "out": str(Path(settings["folder"]) / "run")}, callbacks=[Watch()])


def stable_baselines(
    algorithm: str, settings: dict[str, Any], gate: Any, env: str, copies: int, every: int, chosen: dict[str, Any]
) -> None:
    """`learn`, which stops at the gate before the first step of each rollout, or every so many environment steps of an off-policy algorithm; environments are
    stepped in this process, which is the fastest for those that are cheap."""
    import stable_baselines3
    import torch
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.utils import safe_mean

    torch.set_num_threads(settings["threads"])
    gate.facts |= {"versions": versions("stable-baselines3", "torch", "gymnasium"), "settings": {"vec_env": "DummyVecEnv", **chosen}}
    gate.begin()

    class Watch(BaseCallback):
        begun = False

        def _on_rollout_start(self) -> None:
            if not every and self.begun:
                gate.step(float(safe_mean([episode["r"] for episode in self.model.ep_info_buffer])))
            self.begun = True

        def _on_step(self) -> bool:
            if every and self.num_timesteps % every == 0:
                gate.step()
            return True

    model = getattr(stable_baselines3, algorithm)(
        "MlpPolicy", make_vec_env(env, n_envs=copies, seed=settings["seed"]), device="cpu", seed=settings["seed"], **chosen
    )
    model.learn(10**9, callback=Watch())


def our_ppo(settings: dict[str, Any], gate: Any) -> None:
    copies, rollout = settings["environments"], settings["rollout"]
    options = {
        "env": settings["env"],
        "num_envs": copies,
        "rollout_steps": rollout,
        "epochs": settings["epochs"],
        "minibatch_size": settings["minibatch"],
        "total_steps": copies * rollout * (settings["total_steps"] + 1),
        "lr_schedule": "constant",
    }
    ours("ppo", "online._loop_on_policy", settings, gate, options, "episode/return")


def their_ppo(settings: dict[str, Any], gate: Any) -> None:
    chosen = {"n_steps": settings["rollout"], "batch_size": settings["minibatch"], "n_epochs": settings["epochs"]}
    stable_baselines("PPO", settings, gate, settings["env"], settings["environments"], 0, chosen)


def write_data(settings: dict[str, Any], gate: Any) -> None:
    """Random steps of Hopper's sizes as a D4RL file: the time of an update does not depend on what they are."""
    import h5py
    import numpy as np

    draws, n = np.random.default_rng(settings["seed"]), STEPS_IN_DATA
    with h5py.File(Path(settings["folder"]) / "steps.hdf5", "w") as file:
        file["observations"] = draws.standard_normal((n, OBSERVATION), dtype=np.float32)
        file["next_observations"] = draws.standard_normal((n, OBSERVATION), dtype=np.float32)
        file["actions"] = draws.uniform(-1, 1, (n, ACTION)).astype(np.float32)
        file["rewards"] = draws.standard_normal(n, dtype=np.float32)
        file["terminals"] = np.zeros(n, dtype=bool)
        file["timeouts"] = np.arange(1, n + 1) % 1000 == 0


def ours_offline(method: str, settings: dict[str, Any], gate: Any, options: dict[str, Any]) -> None:
    updates = settings["updates_a_step"]
    common = {"data": str(Path(settings["folder"]) / "steps.hdf5"), "batch_size": ROWS, "iteration_updates": updates}
    often = {"updates": updates * (settings["total_steps"] + 1)}
    ours(method, "offline._loop_offline", settings, gate, {**common, **often, **options}, "loss/critic")


def d3rlpy(name: str, settings: dict[str, Any], gate: Any, chosen: dict[str, Any]) -> None:
    """`fitter`, without progress bars, logs and saved models; a step is one of its epochs."""
    import d3rlpy as library
    import h5py
    import numpy as np
    import torch
    from d3rlpy.logging import NoopAdapterFactory

    torch.set_num_threads(settings["threads"])
    gate.facts |= {"versions": versions("d3rlpy", "torch"), "settings": chosen}
    with h5py.File(Path(settings["folder"]) / "steps.hdf5") as file:
        arrays = {part: np.asarray(file[part]) for part in ("observations", "actions", "rewards", "terminals", "timeouts")}
    gate.begin()
    data = library.dataset.MDPDataset(
        arrays["observations"], arrays["actions"], arrays["rewards"], arrays["terminals"].astype(np.float32), arrays["timeouts"]
    )
    algorithm = getattr(library.algos, f"{name}Config")(batch_size=ROWS, **chosen).create(device="cpu:0")
    updates = settings["updates_a_step"]
    for _, metrics in algorithm.fitter(
        data,
        n_steps=updates * (settings["total_steps"] + 1),
        n_steps_per_epoch=updates,
        show_progress=False,
        logger_adapter=NoopAdapterFactory(),
        save_interval=10**9,
    ):
        gate.step(float(metrics.get("critic_loss", float("nan"))))


Layers = Sequence[tuple[int, int]]


def layers(*sizes: int) -> Layers:
    """(inputs, outputs) of a perceptron's matrices."""
    return list(itertools.pairwise(sizes))


def products(rows: int, *parts: tuple[Layers, str]) -> Callable[[], None]:
    """The matrix products of perceptrons for `rows` rows, into memory that is there. A part is a perceptron's layers and what is done: `f` forward, `x` the
    gradients of inputs, `w` those of weights."""
    import torch

    x: dict[int, Any] = {}
    calls = []
    for sizes, what in parts:
        for place, (wide, out) in enumerate(sizes):
            for size in (wide, out):
                x.setdefault(size, torch.randn(rows, size))
            weight, gradient = torch.randn(wide, out), torch.empty(wide, out)
            into, back = torch.empty(rows, out), torch.empty(rows, wide)
            if "f" in what:
                calls.append((x[wide], weight, into))
            if "x" in what and place:
                calls.append((x[out], weight.T, back))
            if "w" in what:
                calls.append((x[wide].T, x[out], gradient))

    def call() -> None:
        for one, other, into in calls:
            torch.mm(one, other, out=into)

    return call


def limit(settings: dict[str, Any], gate: Any, call: Callable[[], None], times: int) -> None:
    """`times` times the products a step."""
    import torch

    torch.set_num_threads(settings["threads"])
    gate.begin()
    with torch.inference_mode():
        while True:
            for _ in range(times):
                call()
            gate.step()


def returns(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Mean episode returns of the warm-up's iterations: of ours those that ended in the iteration, of the peer the last hundred."""
    return {"returns": {"ours": ours["values"], "peer": peer["values"]}}


def nothing_to_compare(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """Nothing: the two sides draw other batches."""
    return {}
