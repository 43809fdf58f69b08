"""Compare how well partitions train: ``make ablation PROFILE=cpu``. The protocol is in docs/protocol.md."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.commandline import refusals
from experiments.configs import TrainConfig, byte_llama, smoke
from experiments.runner import Launch, run_many
from experiments.slurm import Slurm, submit
from experiments.storage import require_writable
from experiments.train import DEFAULTS, Options

ARMS = ("elementwise", "adam_mini", "short_run", "pytorch_default", "slim_adam", "derived", "factored", "permuted")
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)


def grid(profile: str, arms: tuple[str, ...] = ARMS) -> list[TrainConfig]:
    """Return the configs of a profile, seed by seed, so that an interrupted ablation has similar numbers of all arms.

    Args:
        profile: ``cpu`` for the committed results, or ``smoke`` for a run of some seconds with the same code.
        arms: the arms to run.

    Raises:
        ValueError: an arm is unknown.
    """
    unknown = set(arms) - set(ARMS)
    if unknown:
        raise ValueError(f"arms={sorted(unknown)} are unknown; choose from {ARMS}")
    base, rates, seeds = byte_llama(), LEARNING_RATES, SEEDS
    if profile == "smoke":
        base, rates, seeds = smoke(), LEARNING_RATES[:1], SEEDS[:1]
    base = dataclasses.replace(base, experiment=f"ablation_{profile}")
    return [
        dataclasses.replace(base, arm=arm, lr=lr, seed=seed) for seed, lr, arm in itertools.product(seeds, rates, arms)
    ]


def main(
    profile: Literal["cpu", "smoke"] = "cpu",
    workers: int = 2,
    results: Path = Path("results"),
    arms: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ARM...")] = ARMS,
    cluster: Literal["local", "slurm"] = "local",
    processes: int = 1,
    options: Annotated[Options, tyro.conf.arg(name="")] = DEFAULTS,
    slurm: Annotated[Slurm, tyro.conf.arg(name="")] = Slurm(),  # noqa: B008 (frozen)
) -> None:
    """Run the grid and resume interrupted runs; on a cluster, submit the runs.

    Args:
        profile: cpu (the committed results) or smoke.
        workers: number of runs at a time.
        results: root of the results folders.
        arms: a subset of the arms.
        cluster: local (processes on this machine) or slurm (a job array; returns once it is submitted).
        processes: number of processes of each run.
        options: options of each run that do not change its results folder.
        slurm: resources of each run on Slurm.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Every run is a separate process, so an error in this process is about the arguments.
    with refusals(ValueError, OSError, RuntimeError):
        configs, folder = grid(profile, arms), results / f"ablation_{profile}"
        each = Launch(processes, options)
        require_writable(results, "results")
        if cluster == "slurm":
            jobs = submit(configs, results, slurm=slurm, workers=workers, each=each)
            print(f"{len(jobs)} runs submitted ({', '.join(jobs[:3])}{', ...' * (len(jobs) > 3)}); results in {folder}")
            return
        outcome = run_many(configs, results, workers=workers, each=each)
    print(
        f"{outcome.done} runs done, {len(outcome.failed)} failed, {len(outcome.interrupted)} interrupted; "
        f"results in {folder}"
    )
    if outcome.failed or outcome.interrupted:
        raise SystemExit(1)


def command() -> None:
    """Run the command line. Invalid options end it with a message and exit code 2."""
    with refusals(ValueError):
        tyro.cli(main)


if __name__ == "__main__":
    command()
