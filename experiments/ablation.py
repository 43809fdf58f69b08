"""The first ablation: which partition trains how well. ``make ablation PROFILE=cpu``, protocol in docs/protocol.md."""

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

ARMS = ("elementwise", "adam_mini", "short_run", "pytorch_default", "slim_adam", "derived", "permuted")
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)


def grid(profile: str, arms: tuple[str, ...] = ARMS) -> list[TrainConfig]:
    """The runs of a profile, seed by seed, so that an interrupted ablation is balanced.

    Args:
        profile: ``cpu`` for the committed results, ``smoke`` for seconds of the same code.
        arms: which arms.
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
    """Run the grid, resuming what was interrupted; on a cluster, submit it.

    Args:
        profile: cpu (the committed results) or smoke.
        workers: runs at a time.
        results: root of the results folders.
        arms: a subset of the arms.
        cluster: local (processes on this machine) or slurm (a job array; returns once it is submitted).
        processes: processes of each run.
        options: how each is run.
        slurm: what is asked of Slurm.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Runs are processes of their own, so what is raised here is a matter of what was asked for.
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
    """The command line; options are checked while it is parsed."""
    with refusals(ValueError):
        tyro.cli(main)


if __name__ == "__main__":
    command()
