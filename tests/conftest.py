"""Fixtures that every room's tests share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import POCKET, near, tensors, write_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Python needs most of a minute to take down a process in which vLLM engines lived, and tests nothing with it."""
    if "vllm" in sys.modules and _STATUS in config.stash:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[_STATUS])


Family = Callable[..., dict[str, Path]]


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """`family(dtype, shards)` writes target, plus and minus, siblings of one initialisation."""

    def make(dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> dict[str, Path]:
        base = tensors(0, dtype)
        return {
            "target": write_checkpoint(tmp_path / "target", base, shards),
            "plus": write_checkpoint(tmp_path / "plus", near(base, 1)),
            "minus": write_checkpoint(tmp_path / "minus", near(base, 2), 2),
        }

    return make


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a copy of the pocket family in it."""
    for member in ("target", "sft", "grpo"):
        shutil.copytree(POCKET / member, tmp_path / "family" / member)
    return tmp_path


@pytest.fixture(scope="session")
def ray_local():
    """One Ray for all tests that need no more."""
    from rvdist import cluster

    cluster.connect("local", namespace="rvdist-tests")
    yield
    cluster.disconnect()
