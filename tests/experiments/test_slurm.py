"""The way to Slurm, up to the command lines of sbatch and scontrol. No Slurm is at hand, so none is run.

In its place stand shell scripts on the PATH that write down what they were asked: sbatch keeps the batch file, srun
starts what it is given, scontrol notes a requeue. submitit and everything of ours are real: the batch file is run as
Slurm would run it, with the variables that Slurm sets, and gets the signal that Slurm would send.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import submitit

from experiments.configs import TrainConfig
from experiments.runner import Launch
from experiments.slurm import Slurm, submit
from experiments.train import Options, run_folder, train
from tests.experiments.processes import ROOT, children, status, steps, wait_until

SCRIPTS = {
    "sbatch": 'echo "$@" >> $RECORD/sbatch; cp "${@: -1}" $RECORD/batch.sh; echo "Submitted batch job 4711"',
    "srun": 'while [[ $1 == --* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done; exec setsid "$@"',
    "scontrol": 'echo "$@" >> $RECORD/scontrol',
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the scripts write down what they were asked."""
    tools, record = tmp_path / "tools", tmp_path / "record"
    tools.mkdir()
    record.mkdir()
    for name, body in SCRIPTS.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(record))
    return record


def options(batch_file: Path) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in batch_file.read_text().splitlines() if "#SBATCH" in line]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def task(batch_file: Path, number: int, log: Path) -> subprocess.Popen[bytes]:
    """Run the batch file as Slurm runs a task of an array, in the session of a job."""
    slurm = {"SLURM_JOB_ID": f"48{number:02}", "SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": str(number),
             "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
             "SLURM_NODEID": "0"}  # fmt: skip
    with log.open("ab") as output:
        return subprocess.Popen(
            ["bash", str(batch_file)], env={**os.environ, **slurm}, stdout=output, stderr=output, cwd="/",
            start_new_session=True,
        )  # fmt: skip


def test_the_ablations_command_line_becomes_a_job_array(cluster: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    command = [sys.executable, "-m", "experiments.ablation", "--profile", "smoke", "--results", str(results),
               "--arms", "adam_mini", "permuted", "--workers", "3", "--cluster", "slurm", "--partition", "night",
               "--time", "90", "--gpus", "2", "--cpus", "4", "--account", "us", "--extra", "qos=high"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 runs submitted (4711_0, 4711_1)" in done.stdout
    asked = options(cluster / "batch.sh")
    wanted = {"array": "0-1%2", "partition": "night", "time": "90", "gpus-per-node": "2", "cpus-per-task": "8",
              "account": "us", "qos": "high", "nodes": "1", "ntasks-per-node": "1", "signal": "USR2@120",
              "job-name": "ablation_smoke", "open-mode": "append"}  # fmt: skip
    assert wanted.items() <= asked.items(), asked
    assert (cluster / "sbatch").read_text().split()[-1].endswith(".sh")
    text = (cluster / "batch.sh").read_text()
    assert "srun --unbuffered" in text and f"export PYTHONPATH={ROOT}" in text
    first = submitit.core.utils.DelayedSubmission.load(next((results / "ablation_smoke/.slurm").glob("4711_0*.pkl")))
    assert first.function.each == Launch(2, Options(device="cuda"))  # torchrun with a process for each GPU
    assert not list(results.glob("*/*/status.json"))  # nothing ran here


def test_a_task_runs_is_warned_saves_is_requeued_and_goes_on(
    cluster: Path, tmp_path: Path, config: TrainConfig
) -> None:
    config = dataclasses.replace(config, steps=200).with_rules_hash()
    other = dataclasses.replace(config, seed=1)
    results, log = tmp_path / "results", tmp_path / "log.txt"
    assert submit([config, other], results, slurm=Slurm(), workers=2) == ["4711_0", "4711_1"]
    folder = run_folder(results, config)
    job = task(cluster / "batch.sh", 0, log)
    wait_until(lambda: steps(folder), job, log=log)
    os.killpg(children(job.pid)[0], signal.SIGUSR2)  # as Slurm does: to the step's processes, not to the batch shell
    assert job.wait(timeout=60) != 0
    assert (cluster / "scontrol").read_text() == "requeue 4711_0\n"
    said = status(folder)
    assert said["state"] == "interrupted" and steps(folder)[-1] == said["steps"] < 200
    job = task(cluster / "batch.sh", 0, log)
    assert job.wait(timeout=120) == 0, log.read_text()[-3000:]
    assert status(folder)["weights_sha256"] == train(config, tmp_path / "straight")["weights_sha256"]
    assert not run_folder(results, other).exists()  # the other task's turn has not come
    messages: list[Any] = submit([config, other], results, slurm=Slurm(), workers=2)
    assert messages == ["4711"]  # what is finished is not submitted again; one run is no array


def test_a_failed_run_is_a_failed_job(cluster: Path, tmp_path: Path, config: TrainConfig) -> None:
    submit([dataclasses.replace(config, data="no-such-corpus")], tmp_path, slurm=Slurm(), workers=1)
    log, slurm = tmp_path / "log.txt", {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    with log.open("ab") as output:
        done = subprocess.run(
            ["bash", str(cluster / "batch.sh")], env={**os.environ, **slurm}, stdout=output, stderr=output, timeout=120
        )
    assert done.returncode != 0
    assert "RuntimeError" in log.read_text() and "failed (exit 1); see its status.json" in log.read_text()


@pytest.mark.parametrize(
    ("slurm", "each", "message"),
    [
        (Slurm(time=0), Launch(), "time=0 must be at least 1"),
        (Slurm(gpus=-1), Launch(), "gpus=-1 must be at least 0"),
        (Slurm(gpus=2), Launch(3), "processes=3 and gpus=2"),
        (Slurm(extra=("exclusive",)), Launch(), r"extra=\['exclusive'\] must be KEY=VALUE"),
    ],
)
def test_impossible_requests_are_refused_before_sbatch(
    cluster: Path, tmp_path: Path, config: TrainConfig, slurm: Slurm, each: Launch, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        submit([config], tmp_path, slurm=slurm, workers=1, each=each)
    assert not (cluster / "sbatch").exists()


def test_without_srun_it_says_so(tmp_path: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(RuntimeError, match="srun"):
        submit([config], tmp_path, slurm=Slurm(), workers=1)


def test_children_are_found() -> None:
    """The helper the other tests kill by: a process that is not seen would be a test that cannot fail."""
    child = subprocess.Popen(["sleep", "30"])
    try:
        assert child.pid in children(os.getpid())
    finally:
        child.kill()
        child.wait()
    assert child.pid not in children(os.getpid())
