"""Many runs on this machine: local processes, a few at a time. For a cluster, see ``experiments.slurm``.

Each run is ``python -m experiments.train``-equivalent work in a process (or a torchrun group) of its own, so that a
crash, a kill or a leak touches nothing else. A lock file per run folder keeps two runners from working on the same run.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from experiments.commandline import refusals
from experiments.configs import TrainConfig
from experiments.interruption import Interruption
from experiments.storage import read_json, write_json
from experiments.train import DEFAULTS, Options, finished, launch, read_status, run_folder

logger = logging.getLogger("experiments")
ROOT = Path(__file__).resolve().parents[1]
RESTARTS = 3
"""How often torchrun starts a group again of which a process died."""


@dataclass(frozen=True)
class Outcome:
    """How a batch of runs ended.

    Attributes:
        done: runs that have results, those found finished included.
        failed: folders of runs that ended with an error; their status.json or stderr.txt says which.
        interrupted: folders of runs that were asked to stop and have saved their work.
    """

    done: int
    failed: tuple[Path, ...]
    interrupted: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Launch:
    """The processes that one run is given.

    Attributes:
        processes: how many; more than one are started by torchrun.
        options: what they are told.
    """

    processes: int = 1
    options: Options = DEFAULTS

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes={self.processes} must be at least 1")

    def command(self, config_file: Path, root: Path) -> list[str]:
        """The command line of the run whose config lies in a file."""
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}",
                    f"--max-restarts={RESTARTS}", "-m"]  # fmt: skip
        options = [f"--{f.name}={getattr(self.options, f.name)}" for f in dataclasses.fields(self.options)]
        several = self.processes > 1 or self.options.parallel == "fsdp2"
        return [sys.executable, "-m", *(torchrun if several else []), "experiments.runner",
                str(config_file.resolve()), str(root.resolve()), *options]  # fmt: skip

    def start(self, config: TrainConfig, root: Path, *, own_session: bool = False) -> subprocess.Popen[bytes]:
        """Start a run, its errors written to its folder. ``own_session``: signals to our group do not reach it."""
        folder = run_folder(root, config)
        write_json(folder / "config.json", config.to_dict())
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (folder / "stderr.txt").open("ab") as errors:
            return subprocess.Popen(
                self.command(folder / "config.json", root), env=environment, stdout=subprocess.DEVNULL,
                stderr=errors, start_new_session=own_session,
            )  # fmt: skip


SINGLE = Launch()


def unfinished(configs: Sequence[TrainConfig], root: Path) -> tuple[list[TrainConfig], int]:
    """The configs that have no finished results yet, in the given order, and how many there are in all.

    Raises:
        ValueError: two equal configs, or a folder of another format version.
    """
    configs = [config.with_rules_hash() for config in configs]
    if len({run_folder(root, config) for config in configs}) < len(configs):
        raise ValueError("two of the configs are equal; every run must differ in at least one field")
    return [config for config in configs if not finished(run_folder(root, config))], len(configs)


def run_many(
    configs: Sequence[TrainConfig], root: Path, *, workers: int = 2, each: Launch = SINGLE,
    say: Callable[[str], None] = logger.info,
) -> Outcome:  # fmt: skip
    """Run every config that has no finished results yet, ``workers`` at a time, in the given order.

    SIGTERM and SIGINT are passed on: the runs save, and the same call goes on later.

    Args:
        configs: the runs.
        root: results root.
        workers: runs at a time, one torch thread per process.
        each: the processes of one run.
        say: where messages go.

    Raises:
        ValueError: two equal configs, workers < 1, or a folder of another format version.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    waiting, total = unfinished(configs, root)
    say(f"{total} runs, {total - len(waiting)} already finished, {workers} at a time")
    running: dict[subprocess.Popen[bytes], Path] = {}
    left = total - len(waiting)
    failed: list[Path] = []
    interrupted: list[Path] = []
    with tqdm(total=total, initial=left, desc="runs", smoothing=0.1) as bar, Interruption() as interruption:
        asked = False
        while running or (waiting and not interruption.signal):
            if interruption.signal and not asked:
                asked = True
                for process in running:
                    process.terminate()
            while waiting and len(running) < workers and not interruption.signal:
                config = waiting.pop(0)
                running[each.start(config, root)] = run_folder(root, config)
            time.sleep(0.2)
            for process in [p for p in running if p.poll() is not None]:
                folder = running.pop(process)
                if not finished(folder):
                    state = read_status(folder).get("state")
                    stopped = state == "interrupted" or bool(interruption.signal)
                    (interrupted if stopped else failed).append(folder)
                    how = "interrupted" if stopped else "failed"
                    say(f"{how} (exit {process.returncode}): {folder}; see its status.json and stderr.txt")
                bar.update()
    interrupted += [run_folder(root, config) for config in waiting]
    return Outcome(total - len(failed) - len(interrupted), tuple(failed), tuple(interrupted))


def run_one(config_file: Path, root: Path, options: Options = DEFAULTS) -> None:
    """Work of one process: the run whose config lies in a file.

    Raises:
        SystemExit: another process works on the run, or the run was interrupted.
        ValueError: the file holds no config, or as ``train``.
    """
    code = launch(read_config(config_file), root, options, threads=1)
    if code:
        raise SystemExit(code)
    if finished(config_file.parent):
        (config_file.parent / "stderr.txt").unlink(missing_ok=True)


def read_config(path: Path) -> TrainConfig:
    """The config that a file holds.

    Raises:
        ValueError: none, or one of another format version; naming the file.
    """
    try:
        return TrainConfig.from_dict(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def main(config_file: tyro.conf.Positional[Path], root: tyro.conf.Positional[Path], options: Options) -> None:
    """What ``run_many`` starts.

    Args:
        config_file: a run's config.json.
        root: results root.
        options: how it is run.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with refusals(ValueError):
        read_config(config_file)
    run_one(config_file, root, options)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
