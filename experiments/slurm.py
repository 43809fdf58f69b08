"""Run many configs on a Slurm cluster with submitit: a job array with one task per run, requeued at its time limit."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.configs import TrainConfig
from experiments.runner import ROOT, SINGLE, Launch, unfinished
from experiments.train import ended, read_status, run_folder

if TYPE_CHECKING:
    import submitit

logger = logging.getLogger("experiments")
GRACE_SECONDS = 120
"""Seconds between Slurm's warning and the time limit; the current step and one checkpoint have to fit in."""


@dataclass(frozen=True)
class Slurm:
    """Resources of each run on Slurm."""

    partition: str | None = None
    """Name of the partition; None for the cluster's default."""
    time: int = 240
    """Time limit in minutes; a longer run is requeued and resumes from its checkpoint."""
    gpus: int = 0
    """Number of GPUs of a run, with one process for each; 0 trains on the CPU."""
    cpus: int = 2
    """Number of cores of each process."""
    account: str | None = None
    """Account that is charged; None for the cluster's default."""
    extra: tuple[str, ...] = ()
    """Further sbatch options as KEY=VALUE, e.g. qos=high."""

    def launch(self, each: Launch) -> Launch:
        """Return how to start one run; with GPUs, it has one process for each GPU.

        Raises:
            ValueError: the number of processes is neither 1 nor the number of GPUs.
        """
        if not self.gpus:
            return each
        if each.processes not in (1, self.gpus):
            raise ValueError(
                f"processes={each.processes} and gpus={self.gpus}: each process has one GPU; leave one of the two out"
            )
        return Launch(self.gpus, dataclasses.replace(each.options, device="cuda"))

    def parameters(self, workers: int, each: Launch) -> dict[str, Any]:
        """Return the parameters for submitit's executor.

        Args:
            workers: number of runs at a time.
            each: how to start the processes of one run.

        Raises:
            ValueError: a number is out of range, or an extra option has no value.
        """
        for name, least in (("time", 1), ("cpus", 1), ("gpus", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if bad := [option for option in self.extra if not option.partition("=")[2]]:
            raise ValueError(f"extra={bad} must be KEY=VALUE, as in qos=high")
        parameters = {
            "timeout_min": self.time,
            "nodes": 1,
            "tasks_per_node": 1,
            "cpus_per_task": self.cpus * self.launch(each).processes,
            "gpus_per_node": self.gpus or None,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_array_parallelism": workers,
            "slurm_signal_delay_s": GRACE_SECONDS,
            "slurm_setup": [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"],
            "slurm_additional_parameters": dict(option.split("=", 1) for option in self.extra) or None,
        }
        return {name: value for name, value in parameters.items() if value is not None}


@dataclass
class Task:
    """One run as a submitit task: submitit calls it on the node, and calls ``checkpoint`` before the time limit.

    The run is a separate process in a separate session. Slurm's warning, which goes to every process of a job,
    therefore reaches only submitit's process, which handles it.
    """

    config: TrainConfig
    root: Path
    each: Launch
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __call__(self) -> dict[str, Any]:
        """Train until the run ends.

        Returns:
            The content of ``status.json``.

        Raises:
            RuntimeError: the run failed.
            ValueError: the run's status.json is damaged.
        """
        self._process = self.each.start(self.config, self.root, own_session=True)
        while self._process.poll() is None:  # wait() would hold a lock that the signal handler needs.
            time.sleep(0.2)
        folder = run_folder(self.root, self.config)
        status = read_status(folder)
        if not ended(status):
            raise RuntimeError(
                f"{folder}: {status.get('state', 'no status')} (exit {self._process.returncode}); see its status.json "
                "and stderr.txt"
            )
        return status

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Stop the run after it saves, and return the task that submitit starts next. Called in a signal handler."""
        import submitit

        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):  # The process had ended before.
                os.waitpid(self._process.pid, 0)
        return submitit.helpers.DelayedSubmission(dataclasses.replace(self, _process=None))


def submit(
    configs: Sequence[TrainConfig], root: Path, *, slurm: Slurm, workers: int, each: Launch = SINGLE
) -> list[str]:
    """Submit every config without finished results to Slurm, and return at once.

    Args:
        configs: the runs, all of one experiment.
        root: results root, on a file system that the nodes share.
        slurm: resources of each run.
        workers: number of runs at a time.
        each: how to start the processes of one run.

    Returns:
        The ids of the jobs; empty if all runs are finished.

    Raises:
        ValueError: two configs are equal, an option is invalid, or a folder has another format version.
        RuntimeError: submitit is not installed, or this machine cannot submit jobs (it has no srun).
    """
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    parameters = slurm.parameters(workers, each)
    each = slurm.launch(each)
    waiting, total = unfinished(configs, root)
    logger.info("%d runs, %d already finished, %d at a time", total, total - len(waiting), workers)
    if not waiting:
        return []
    try:
        import submitit
    except ImportError:
        raise RuntimeError("cluster='slurm' needs submitit; pip install submitit, or use cluster='local'") from None
    experiment = waiting[0].experiment
    folder = root.resolve() / experiment / ".slurm"
    # The number of requeues needs no limit, because a run ends after its last step.
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=10_000)
    executor.update_parameters(name=experiment, **parameters)
    return [job.job_id for job in executor.submit_array([Task(c, root.resolve(), each) for c in waiting])]
