"""Run many configs on this machine, a few at a time, in local processes.

Each run has its own process, or its own torchrun group, so a crash, a kill or a leak affects no other run. A lock file
in each run's folder prevents two runners from working on the same run. ``experiments.slurm`` runs configs on a cluster.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from experiments.commandline import refusals
from experiments.configs import FORMAT_VERSION, TrainConfig
from experiments.interruption import Interruption
from experiments.storage import read_json, write_json
from experiments.train import DEFAULTS, Options, ended, finished, launch, read_status, run_folder

logger = logging.getLogger("experiments")
ROOT = Path(__file__).resolve().parents[1]
RESTARTS = 3
"""How often torchrun restarts a group after one of its processes died."""
GRACE = 60
"""Seconds that a run over its limit gets to save a checkpoint before it is killed; torchrun gives its processes 30."""
CONTINUES = "the same command continues it from its newest checkpoint"
TRIAL = 10
"""Number of steps by which the time of a run is estimated if none is finished."""


@dataclass(frozen=True)
class Outcome:
    """How a batch of runs ended.

    Attributes:
        done: number of runs that have results, including those that were finished before.
        failed: folders of runs that ended with an error; their status.json or stderr.txt has the error.
        interrupted: folders of runs that a signal stopped, or that were not started because of it.
    """

    done: int
    failed: tuple[Path, ...]
    interrupted: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Launch:
    """How to start the processes of one run.

    Attributes:
        processes: number of processes; torchrun starts them if there are several.
        options: options of the run that are not part of its config.
        limit: minutes after its start at which the run is stopped and recorded as failed.
    """

    processes: int = 1
    options: Options = DEFAULTS
    limit: float = math.inf

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes={self.processes} must be at least 1")
        if not self.limit > 0:
            raise ValueError(f"limit={self.limit} must be positive: the minutes that a run may take")

    def command(self, config_file: Path, root: Path) -> list[str]:
        """Return the command line that runs the config in a file."""
        torchrun = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={self.processes}",
            f"--max-restarts={RESTARTS}",
            "-m",
        ]
        options = [_flag(name, value) for name, value in vars(self.options).items()]
        several = self.processes > 1 or self.options.parallel == "fsdp2"
        return [
            sys.executable,
            "-m",
            *(torchrun if several else []),
            "experiments.runner",
            str(config_file.resolve()),
            str(root.resolve()),
            *options,
        ]

    def start(self, config: TrainConfig, root: Path, *, own_session: bool = False) -> subprocess.Popen[bytes]:
        """Start a run in a subprocess and write its stderr to its folder.

        Args:
            config: the run.
            root: results root.
            own_session: start the process in a new session, so that signals to this process's group do not reach it.
        """
        folder = run_folder(root, config)
        write_json(folder / "config.json", config.to_dict())
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (folder / "stderr.txt").open("ab") as errors:
            return subprocess.Popen(
                self.command(folder / "config.json", root),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=own_session,
            )


def _flag(name: str, value: object) -> str:
    """Write an option as tyro reads it."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name}={value}"


SINGLE = Launch()


@dataclass
class _Running:
    """A run in progress.

    Attributes:
        folder: its folder.
        started: when it was started, on the clock of ``time.monotonic``.
        stopped: whether it was asked to stop because it took longer than its limit.
    """

    folder: Path
    started: float = dataclasses.field(default_factory=time.monotonic)
    stopped: bool = False

    def over(self, minutes: float) -> bool:
        """Whether the run has taken longer than its limit."""
        return time.monotonic() - self.started > 60 * minutes

    def require_limit(self, process: subprocess.Popen[bytes], minutes: float) -> None:
        """Ask a run that is over its limit to save and stop; kill it if it has not done so after ``GRACE`` seconds."""
        if self.over(minutes) and not self.stopped:
            self.stopped = True
            process.terminate()
        elif self.stopped and self.over(minutes + GRACE / 60):
            process.kill()

    def how_it_ended(self, code: int, minutes: float, signalled: bool) -> str:
        """Return "" if the run has results, and otherwise what happened; a failure is recorded in its folder.

        Args:
            code: exit code of its process.
            minutes: its limit.
            signalled: whether all runs were asked to stop.
        """
        try:
            status = read_status(self.folder)
        except ValueError as error:
            return f"failed ({error})"
        if ended(status):
            return ""
        if self.stopped:
            self._record(f"stopped after limit={minutes:g} minutes; {CONTINUES}")
            return "over its limit"
        killed = code < 0  # Then it could not write why; its status may be that of an earlier attempt.
        if signalled or (status.get("state") == "interrupted" and not killed):
            return "interrupted"
        if status.get("state") != "failed" or killed:
            self._record(f"the process ended with exit code {code}; {CONTINUES}. {self._last_words()}".rstrip())
        return f"failed (exit {code})"

    def _record(self, error: str) -> None:
        status = {"state": "failed", "format_version": FORMAT_VERSION, "error": error}
        try:
            write_json(self.folder / "status.json", status)
        except OSError as refused:
            logger.warning("%s: %s; its status could not be written: %s", self.folder, error, refused)

    def _last_words(self) -> str:
        path = self.folder / "stderr.txt"
        return path.read_bytes()[-500:].decode(errors="replace").strip() if path.is_file() else ""


def seconds_per_run(config: TrainConfig, root: Path) -> float:
    """Estimate how long a run takes: the median of its experiment's finished runs of that size, else by a few steps.

    Args:
        config: the run.
        root: results root.

    Raises:
        RuntimeError: no run of its size is finished, and the few steps fail.
    """
    size = {key: value for key, value in config.to_dict().items() if key in ("model", "steps", "batch", "seq_len")}
    statuses = []
    for folder in (path.parent for path in (root / config.experiment).glob("*/status.json")):
        stored = read_json(folder / "config.json")
        if isinstance(stored, dict) and size.items() <= stored.items():
            statuses.append(read_status(folder))
    if times := [status["seconds"] for status in statuses if status.get("state") == "finished"]:
        return statistics.median(times)
    trial = dataclasses.replace(config, steps=TRIAL, eval_every=TRIAL, eval_batches=1, checkpoint_every=0)
    with tempfile.TemporaryDirectory() as temporary:
        code = SINGLE.start(trial, Path(temporary)).wait()
        status = read_status(run_folder(Path(temporary), trial))
        if code or "seconds" not in status:
            raise RuntimeError(f"{TRIAL} steps that measure the time fail: {status.get('error', f'exit {code}')}")
        return float(status["seconds"]) * config.steps / TRIAL


def unfinished(configs: Sequence[TrainConfig], root: Path) -> tuple[list[TrainConfig], int]:
    """Return the configs without finished results, in the given order, and the number of all configs.

    Raises:
        ValueError: two configs are equal, or a folder has another format version.
    """
    configs = [config.with_rules_hash() for config in configs]
    for config, count in Counter(configs).items():
        if count > 1:
            name = f"arm={config.arm!r}, lr={config.lr:g}, seed={config.seed}"
            raise ValueError(f"two of the configs are equal ({name}); every run must differ in at least one field")
    return [config for config in configs if not finished(run_folder(root, config))], len(configs)


def run_many(
    configs: Sequence[TrainConfig],
    root: Path,
    *,
    workers: int = 2,
    each: Launch = SINGLE,
    say: Callable[[str], None] = logger.info,
) -> Outcome:
    """Run every config that has no finished results yet, ``workers`` at a time, in the given order.

    SIGTERM and SIGINT are forwarded to the runs, which save a checkpoint and stop. The same call later resumes them.

    Args:
        configs: the runs.
        root: results root.
        workers: number of runs at a time, one torch thread per process.
        each: how to start the processes of one run.
        say: function that receives progress messages.

    Raises:
        ValueError: two configs are equal, workers is below 1, or a folder has another format version.
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    waiting, total = unfinished(configs, root)
    say(f"{total} runs, {total - len(waiting)} already finished, {workers} at a time")
    running: dict[subprocess.Popen[bytes], _Running] = {}
    done_before = total - len(waiting)
    failed: list[Path] = []
    interrupted: list[Path] = []
    with tqdm(total=total, initial=done_before, desc="runs", smoothing=0.1) as bar, Interruption() as interruption:
        asked = math.inf  # when the runs were asked to stop
        while running or (waiting and not interruption.signal):
            if interruption.signal and math.isinf(asked):
                asked = time.monotonic()
                for process in running:
                    process.terminate()
            if time.monotonic() - asked > GRACE:
                for process in running:
                    process.kill()
            while waiting and len(running) < workers and not interruption.signal:
                config = waiting.pop(0)
                try:
                    running[each.start(config, root)] = _Running(run_folder(root, config))
                except OSError as error:  # A full disk, or too many processes.
                    failed.append(run_folder(root, config))
                    say(f"not started: {failed[-1]}: {error}")
                    bar.update()
            time.sleep(0.2)
            for process, run in running.items():
                if process.poll() is None and not interruption.signal:
                    run.require_limit(process, each.limit)
            for process in [p for p in running if p.poll() is not None]:
                run = running.pop(process)
                if how := run.how_it_ended(process.returncode, each.limit, bool(interruption.signal)):
                    (interrupted if how == "interrupted" else failed).append(run.folder)
                    say(f"{how}: {run.folder}; see its status.json and stderr.txt")
                bar.update()
    interrupted += [run_folder(root, config) for config in waiting]
    return Outcome(total - len(failed) - len(interrupted), tuple(failed), tuple(interrupted))


def run_one(config_file: Path, root: Path, options: Options = DEFAULTS) -> None:
    """Train the config in a file, as one process of a run.

    Raises:
        SystemExit: another process works on the run, or the run was interrupted.
        ValueError: the file has no valid config, or the run cannot start with it.
    """
    code = launch(read_config(config_file), root, options, threads=1)
    if code:
        raise SystemExit(code)
    if finished(config_file.parent):
        (config_file.parent / "stderr.txt").unlink(missing_ok=True)


def read_config(path: Path) -> TrainConfig:
    """Read a config from a file.

    Raises:
        ValueError: the file has no valid config, or one of another format version; the message names the file.
    """
    try:
        return TrainConfig.from_dict(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def main(config_file: tyro.conf.Positional[Path], root: tyro.conf.Positional[Path], options: Options) -> None:
    """Train one run; ``run_many`` starts this command.

    Args:
        config_file: a run's config.json.
        root: results root.
        options: options of the run that are not part of its config.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with refusals(ValueError):
        read_config(config_file)
    run_one(config_file, root, options)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
