"""Fixtures of all tests: one thread, and the tiny models and data, made once a session."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory):
    """Tiny models, data and rewards on disk (see `support.World`)."""
    import torch

    from support import World

    torch.set_num_threads(1)
    return World(tmp_path_factory.mktemp("world"))
