"""Run workloads: ``make workloads PROFILE=smoke|cpu``, in the environment of ``make setup-workloads``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.ablation import run_stages
from experiments.commandline import refusals
from experiments.grids import STUDIES, grid
from experiments.growing import so_far
from experiments.runner import Launch
from experiments.storage import require_writable
from experiments.train import fetch
from experiments.workloads import WORKLOADS


def main(
    profile: Literal["cpu", "smoke"] = "cpu",
    workers: int = 2,
    results: Path = Path("results"),
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="WORKLOAD...")] = (),
) -> None:
    """Run the studies of workloads one after another. What is missing for one is named, and the others go on.

    Args:
        profile: cpu (the committed results) or smoke (some seconds for each arm).
        workers: number of runs at a time.
        results: root of the results folders.
        only: some workloads; by default all of them.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with refusals(ValueError, OSError):
        if unknown := sorted(set(only) - set(WORKLOADS)):
            raise ValueError(f"only={unknown} are no workloads; choose from {sorted(WORKLOADS)}")
        require_writable(results, "results")
    bad = []
    for name in only or WORKLOADS:
        configs = grid(profile, study=name)
        stages = STUDIES[name] if profile == "cpu" else None
        try:
            # Downloads come first, so that no run has to wait for another's.
            for config in {(c.model, c.data): c for c in so_far(stages, configs, results)}.values():
                fetch(config)
        except (ValueError, OSError, RuntimeError) as error:
            bad.append(f"{name}: not run, {error}")
            continue
        outcome = run_stages(configs, results, stages, workers=workers, each=Launch())
        if outcome.interrupted:
            bad.append(f"{name}: interrupted; the same command goes on")
            break
        bad += [f"{name}: failed, see {folder}/status.json" for folder in outcome.failed]
    print("\n".join(bad) or "all workloads are done")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    with refusals(ValueError):
        tyro.cli(main)
