"""Starts the examples as a user would, and reads what they leave: real processes, gloo on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]


def torchrun(ranks: int, script: str, *arguments: str, timeout: float = 280, **environment: str) -> Any:
    """Run a script under torchrun and return what rank 0 leaves.

    Args:
        ranks: processes.
        script: path from the root of the project, or a module as ``-m name``.
        arguments: of the script; ``--out FILE`` is added.
        timeout: seconds until the processes are ended.
        environment: variables on top of this process's.

    Returns:
        What the script saved to FILE by ``torch.save`` (numbers, strings, tensors, lists and dicts of them).

    Raises:
        AssertionError: the script failed, with the end of what it said; or it left nothing.
    """
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
             "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-id", uuid.uuid4().hex, "--local-addr", "127.0.0.1"]  # fmt: skip
    return started([sys.executable, *start, *script.split(), *arguments], timeout, **environment)


def alone(script: str, *arguments: str, timeout: float = 280, **environment: str) -> Any:
    """Run a script in one process, likewise."""
    return started([sys.executable, *script.split(), *arguments], timeout, **environment)


def started(command: list[str], timeout: float = 280, **environment: str) -> Any:
    """Run any command that understands ``--out FILE``, likewise: another launcher, another interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.pt")
        said = output([*command, "--out", str(out)], timeout, **environment)
        assert out.exists(), f"{' '.join(command)} left nothing; it said:\n{said[-4000:]}"
        return torch.load(out, weights_only=True)


def output(command: list[str], timeout: float = 280, **environment: str) -> str:
    """Run a command from the project's root in a session of its own and return what it said.

    Raises:
        AssertionError: it ended with an error, or not in time.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=settings() | environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired as late:
        said = _ended(process)
        raise AssertionError(f"{' '.join(command)} did not end in {timeout} s:\n{said[-20000:]}") from late
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}:\n{said[-6000:]}"
    return said


def _ended(process: subprocess.Popen[str]) -> str:
    """End a launcher and its ranks, which have sessions of their own; what they said, with where each of them was."""
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for how in (signal.SIGABRT, signal.SIGKILL):  # the first makes Python's faulthandler speak
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                one.send_signal(how)
        time.sleep(1)
    return process.communicate()[0]


def settings() -> dict[str, str]:
    """The environment of every run: one thread per rank, nothing from any hub, no accelerator."""
    return dict(os.environ) | {
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": "lo",
    }
