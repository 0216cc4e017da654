"""What every test shares: one thread, fixed seeds, one Ray cluster, no GPU tests without a GPU."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.actors import Runtime, open_runtime
from opd.config import RuntimeConfig

# Before DeepSpeed or Ray is imported; scripts/test sets the same, and this serves whoever calls pytest directly.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def pytest_configure() -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Runtime]:
    """The runtime of one small cluster, started by the first test that asks and shared by the rest.

    A command that a test runs in this process with `runtime.kind` "ray" joins it too, and leaves it running.
    """
    with pytest.MonkeyPatch.context() as patch:
        # Actors find classes that a test module defines by the module's name, which only pytest knows to look up here.
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        with open_runtime(RuntimeConfig(kind="ray", num_cpus=2)) as runtime:
            yield runtime
