"""Many runs: local processes, one torch thread each; a scheduler for clusters fits behind the same function.

Each run is ``python -m experiments.train``-equivalent work in a process of its own, so that a crash, a kill or a leak
touches nothing else. A lock file per run folder keeps two runners from working on the same run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from experiments.configs import TrainConfig
from experiments.storage import write_json
from experiments.train import finished, run_folder

logger = logging.getLogger("experiments")


@dataclass(frozen=True)
class Outcome:
    """How a batch of runs ended.

    Attributes:
        done: runs that have results, those found finished included.
        failed: folders of runs that ended with an error; their status.json or stderr.txt says which.
    """

    done: int
    failed: tuple[Path, ...]


def run_many(
    configs: Sequence[TrainConfig], root: Path, *, workers: int = 2, say: Callable[[str], None] = logger.info
) -> Outcome:
    """Run every config that has no finished results yet, ``workers`` at a time, in the given order.

    Args:
        configs: the runs.
        root: results root.
        workers: processes at a time, one torch thread each.
        say: where messages go.

    Raises:
        ValueError: two equal configs, workers < 1, or a folder of another format version.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    configs = [config.with_rules_hash() for config in configs]
    folders = [run_folder(root, config) for config in configs]
    if len(set(folders)) < len(folders):
        raise ValueError("two of the configs are equal; every run must differ in at least one field")
    waiting = [(c, f) for c, f in zip(configs, folders, strict=True) if not finished(f)]
    say(f"{len(configs)} runs, {len(configs) - len(waiting)} already finished, {workers} at a time")
    running: dict[subprocess.Popen[bytes], Path] = {}
    failed: list[Path] = []
    with tqdm(total=len(configs), initial=len(configs) - len(waiting), desc="runs", smoothing=0.1) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    config, folder = waiting.pop(0)
                    running[_start(config, folder, root)] = folder
                time.sleep(0.2)
                for process in [p for p in running if p.poll() is not None]:
                    folder = running.pop(process)
                    if process.returncode:
                        failed.append(folder)
                        say(f"failed (exit {process.returncode}): {folder}; see its status.json and stderr.txt")
                    bar.update()
        finally:  # interrupted: the runs keep their checkpoints
            for process in running:
                process.terminate()
    return Outcome(len(configs) - len(failed), tuple(failed))


def _start(config: TrainConfig, folder: Path, root: Path) -> subprocess.Popen[bytes]:
    write_json(folder / "config.json", config.to_dict())
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    command = [sys.executable, "-m", "experiments.runner", str(folder / "config.json"), str(root)]
    with (folder / "stderr.txt").open("ab") as errors:
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=errors)


def run_one(config_file: Path, root: Path) -> None:
    """Work of one process: take the folder's lock, then train.

    Raises:
        SystemExit: another process holds the lock.
    """
    import torch

    from experiments.train import train

    torch.set_num_threads(1)
    config = TrainConfig.from_dict(json.loads(config_file.read_text()))
    with (config_file.parent / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{config_file.parent} is being run by another process; wait for it") from None
        train(config, root)
    for leftover in ("stderr.txt", ".lock"):
        (config_file.parent / leftover).unlink(missing_ok=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    run_one(Path(sys.argv[1]), Path(sys.argv[2]))
