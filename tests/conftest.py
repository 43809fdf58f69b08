"""What tests of several folders share: threads, a process group of one rank, the published package, the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.grouping import pytest_collection_modifyitems  # noqa: F401 - pytest finds the hook here

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("adam_mini.py", "hessian", "optimizer", "pyproject.toml", "LICENSE", "README.md")

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


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the wheel, built from a copy of the sources: a build folder left in the tree would be packed, too."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(folder / "source")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path
