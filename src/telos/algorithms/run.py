"""From a method's name and options to a run: the one door through which the command line, Python and recipes start and resume training."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telos.core import config as configs
from telos.core import discovery
from telos.core.config import RunConfig
from telos.core.errors import TelosError
from telos.core.loop import Callback, run_program
from telos.core.method import Method
from telos.core.run import Run
from telos.core.seeds import seed_everything


def prepare_threads(threads: int = 0) -> None:
    """CPU threads of torch and of NumPy's matrix products (0: OMP_NUM_THREADS, or as many as there are cores for this process), and no progress bars but our
    own."""
    import os

    import numpy  # noqa: F401 - the limit is set on what is loaded
    import torch
    from threadpoolctl import threadpool_limits
    from transformers.utils import logging

    logging.disable_progress_bar()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    count = threads or (int(asked) if asked.isdigit() and int(asked) else len(os.sched_getaffinity(0)))
    torch.set_num_threads(count)
    threadpool_limits(count, user_api="blas")
    _keep_memory()


def _keep_memory() -> None:
    """Tells glibc's malloc to keep what is freed. A training step frees and takes the same large blocks; handed back to the system, every page of them
    would have to be asked for and cleared again, which is up to a quarter of a step's time. Elsewhere than on glibc nothing is changed."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)


def prepare(config: RunConfig) -> None:
    """Threads and global seeds, before anything is built."""
    prepare_threads(config.threads)
    seed_everything(config.seed)


def build(method: Method, config: RunConfig, run: Run) -> Any:
    """The program of a method's loop."""
    module = importlib.import_module(f"telos.algorithms.{method.family}._loop_{method.loop.replace('-', '_')}")
    return module.Program(method, config, run)


def train(key: str, options: Mapping[str, Any] | None = None, *, callbacks: Sequence[Callback] = (), config_file: str | None = None) -> Run:
    """Trains `key` with `options` over those of `config_file`. Raises `UsageError` before anything is started when they do not fit."""
    method = discovery.load(key)
    values = (configs.read_yaml(config_file) if config_file else {}) | dict(options or {})
    config: RunConfig = configs.from_mapping(method.config, values)
    run = Run.create(method.key, config)
    return _drive(method, config, run, callbacks, resume=False)


def resume(path: str | Path, *, callbacks: Sequence[Callback] = ()) -> Run:
    """Continues a run from its newest whole checkpoint, with the options it was started with. A finished run is left as it is."""
    run = Run.open(path)
    facts = run.facts
    if facts.get("status") == "finished":
        return run
    method = discovery.load(facts["method"])
    config: RunConfig = configs.from_mapping(
        method.config, configs.read_yaml(run.path / "config.yaml"), source=str(run.path / "config.yaml")
    )
    return _drive(method, config, run, callbacks, resume=True)


def _drive(method: Method, config: RunConfig, run: Run, callbacks: Sequence[Callback], resume: bool) -> Run:
    prepare(config)
    try:
        program = build(method, config, run)
    except TelosError:
        if not resume and not any(run.checkpoints.glob("step-*")):
            run.discard()
        raise
    run.describe(plan=program.plan())
    run_program(program, run, config, callbacks=callbacks, resume=resume)
    return run
