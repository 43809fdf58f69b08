"""Start training runs as processes, signal and kill them, and check their checkpoints without the trainer's code."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.configs import TrainConfig
from tests import forking

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 150.0


def flags(config: TrainConfig) -> list[str]:
    """The arguments of ``experiments.train`` that change the smoke config into this config."""
    names = ("experiment", "arm", "batch", "steps", "eval_every", "checkpoint_every", "seed")
    return ["smoke", *(f"--{name.replace('_', '-')}={getattr(config, name)}" for name in names)]


def command(config: TrainConfig, root: Path, *options: str) -> list[str]:
    return ["-m", "experiments.train", *flags(config), f"--results={root}", "--threads=1", *options]


def start(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start Python in a separate process group. Its stdout and stderr are appended to a file."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID")}
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=output, stderr=output, start_new_session=True,
            env={**own, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        )  # fmt: skip


def torchrun(config: TrainConfig, root: Path, log: Path, *options: str, ranks: int = 2) -> subprocess.Popen[bytes]:
    head = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--max-restarts=3"]
    return start([*head, *command(config, root, *options)], log)


def start_ranks(config: TrainConfig, root: Path, log: Path, *options: str, ranks: int = 2) -> list[Any]:
    """Start the ranks that torchrun would start, but without its agent, which would start killed ranks again.

    The ranks are forked, so that no rank has to import torch again after a kill. ``torchrun`` starts interpreters.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    _, module, *arguments = command(config, root, *options)
    return [
        forking.run_module(
            module, *arguments, output=log, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(ranks)
    ]


def kill(processes: list[Any]) -> None:
    for process in processes:
        if isinstance(process, forking.Forked):
            process.kill()
            continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def children(pid: int) -> list[int]:
    """The ids of a process's children that are still running."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return sorted(found)


def wait_until(what: Callable[[], Any], *processes: Any, log: Path, every: float = 0.01) -> Any:
    """Call ``what`` every ``every`` seconds until its value is true, and return the value.

    It fails if one of the processes ends, or after ``PATIENCE`` seconds.
    """
    deadline = time.monotonic() + PATIENCE
    while not (value := what()):
        ended = [p.returncode for p in processes if p.poll() is not None]
        assert not ended, f"ended with {ended} too early:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"waited in vain:\n{log.read_text()[-3000:]}"
        time.sleep(every)
    return value


def steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in a run's folder."""
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


def torn(folder: Path) -> list[str]:
    """The names of complete checkpoints whose files differ from their manifest. At any moment there must be none."""
    found = []
    for path in (folder / "checkpoints").glob("step-*"):
        try:
            files = json.loads((path / "manifest.json").read_text())["files"]
            whole = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in files}
            if whole != {name: file["sha256"] for name, file in files.items()} or ".metadata" not in files:
                found.append(path.name)
        except (OSError, ValueError, KeyError) as error:
            found.append(f"{path.name}: {error}")
    return found


def status(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "status.json").read_text())
    return document


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without the seconds, which differ between equal runs."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
