"""What tests of several folders share: threads, a process group of one rank, the published package."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import ModuleType

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Every worker has a core. More threads, here or in a child process, would wait for those of other workers.
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """The number of threads after a test is that before it; the test sets as many as it needs."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """A gloo process group whose only rank is this process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def published() -> ModuleType:
    """The published adam-mini 1.1.1."""
    from benchmarks.contestants import published

    return published()
