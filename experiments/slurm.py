"""Many runs on a Slurm cluster, through submitit: one job array, a task per run, requeued when its time is up."""

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
from experiments.train import read_status, run_folder

if TYPE_CHECKING:
    import submitit

logger = logging.getLogger("experiments")
GRACE_SECONDS = 120
"""Between Slurm's warning and the end of a job's time: the running step and one checkpoint have to fit."""


@dataclass(frozen=True)
class Slurm:
    """What is asked of Slurm for each run."""

    partition: str | None = None
    """Its name; None for the cluster's default."""
    time: int = 240
    """Minutes; a run that needs more is requeued and goes on from its checkpoint."""
    gpus: int = 0
    """GPUs of a run, one process each; 0 trains on the CPU."""
    cpus: int = 2
    """Cores of each process."""
    account: str | None = None
    """Whose hours."""
    extra: tuple[str, ...] = ()
    """Further sbatch options as KEY=VALUE, e.g. qos=high."""

    def launch(self, each: Launch) -> Launch:
        """The processes of one run: with GPUs, one for each of them.

        Raises:
            ValueError: another number of processes than of GPUs.
        """
        if not self.gpus:
            return each
        if each.processes not in (1, self.gpus):
            raise ValueError(f"processes={each.processes} and gpus={self.gpus}: each process has a GPU; leave one out")
        return Launch(self.gpus, dataclasses.replace(each.options, device="cuda"))

    def parameters(self, workers: int, each: Launch) -> dict[str, Any]:
        """As submitit takes them.

        Raises:
            ValueError: a number out of range, or an extra option without a value.
        """
        for name, least in (("time", 1), ("cpus", 1), ("gpus", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if bad := [option for option in self.extra if not option.partition("=")[2]]:
            raise ValueError(f"extra={bad} must be KEY=VALUE, as in qos=high")
        asked = {
            "timeout_min": self.time, "nodes": 1, "tasks_per_node": 1,
            "cpus_per_task": self.cpus * self.launch(each).processes,
            "gpus_per_node": self.gpus or None, "slurm_partition": self.partition, "slurm_account": self.account,
            "slurm_array_parallelism": workers, "slurm_signal_delay_s": GRACE_SECONDS,
            "slurm_setup": [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"],
            "slurm_additional_parameters": dict(option.split("=", 1) for option in self.extra) or None,
        }  # fmt: skip
        return {name: value for name, value in asked.items() if value is not None}


@dataclass
class Task:
    """One run as submitit runs it: called on the node, asked for a checkpoint before Slurm takes the node away.

    The run is a process of its own in a session of its own, so that Slurm's warning, which goes to every process of
    a job, reaches only the one that knows what to do with it.
    """

    config: TrainConfig
    root: Path
    each: Launch
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def __call__(self) -> dict[str, Any]:
        """Run to the end.

        Returns:
            the content of ``status.json``.

        Raises:
            RuntimeError: the run failed.
            ValueError: its status is damaged.
        """
        self._process = self.each.start(self.config, self.root, own_session=True)
        while self._process.poll() is None:  # not wait(): it would hold a lock while the signal's handler runs
            time.sleep(0.2)
        folder = run_folder(self.root, self.config)
        status = read_status(folder)
        if status.get("state") not in ("finished", "diverged"):
            raise RuntimeError(
                f"{folder}: {status.get('state', 'no status')} (exit {self._process.returncode}); see its status.json "
                "and stderr.txt"
            )
        return status

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """submitit's protocol: let the run save and go, and say what to start in its place. Called in a handler."""
        import submitit

        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ChildProcessError):  # it had ended
                os.waitpid(self._process.pid, 0)
        return submitit.helpers.DelayedSubmission(dataclasses.replace(self, _process=None))


def submit(
    configs: Sequence[TrainConfig], root: Path, *, slurm: Slurm, workers: int, each: Launch = SINGLE
) -> list[str]:
    """Hand every config that has no finished results yet to Slurm, and return at once.

    Args:
        configs: the runs, all of one experiment.
        root: results root, on a file system that the nodes share.
        slurm: what to ask for.
        workers: runs at a time.
        each: the processes of one run.

    Returns:
        the jobs' ids; empty where everything is finished.

    Raises:
        ValueError: two equal configs, impossible options, or a folder of another format version.
        RuntimeError: submitit is not installed, or this is no machine to submit from (no srun).
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
    # A run may be requeued as often as it takes: it stops by itself when it has taken its steps.
    executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=10_000)
    executor.update_parameters(name=experiment, **parameters)
    return [job.job_id for job in executor.submit_array([Task(c, root.resolve(), each) for c in waiting])]
