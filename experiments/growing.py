"""Runs that finished runs call for: rates beyond the end of a grid at which the best one lies, then more seeds of it.

A study is therefore run in stages. Each stage is a function of the results so far, so an interrupted study goes on
where it was, and a finished one has nothing left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from experiments.configs import TrainConfig
from experiments.grids import Study
from experiments.storage import write_atomic, write_json
from experiments.train import ended, read_status, run_folder

MOST_GROWN = 3
"""By how many rates a grid grows in total."""


def neighbour(lr: float, up: bool) -> float:
    """Return the next rate in the sequence 1, 3, 10, 30, ... of the rate's powers of ten."""
    place = round(2 * math.log10(lr)) + (1 if up else -1)
    return float(f"{'3' if place % 2 else '1'}e{place // 2}")


def equal_run(config: TrainConfig, results: Path, shares: Sequence[str]) -> Path | None:
    """Return the folder of an equal run of another study that has ended; None if there is none, or none is needed.

    Args:
        config: a run.
        results: root of the results folders.
        shares: the other studies.
    """
    config = config.with_rules_hash()
    if ended(read_status(run_folder(results, config))):
        return None
    profile = config.experiment.rpartition("_")[2]
    others = (run_folder(results, dataclasses.replace(config, experiment=f"{name}_{profile}")) for name in shares)
    return next((folder for folder in others if ended(read_status(folder))), None)


def take_over(configs: Sequence[TrainConfig], results: Path, shares: Sequence[str]) -> int:
    """Copy the results of equal runs of other studies, so that they are not run again, and return their number.

    The copy's ``status.json`` has the original's folder under ``taken_from``.

    Args:
        configs: runs of a study.
        results: root of the results folders.
        shares: studies whose results count as this one's.
    """
    taken = 0
    for config in configs:
        if original := equal_run(config, results, shares):
            folder = run_folder(results, config.with_rules_hash())
            write_json(folder / "config.json", config.with_rules_hash().to_dict())
            for name in ("environment.json", "metrics.jsonl"):  # A run that diverges early has no metrics.
                if (original / name).is_file():
                    write_atomic(folder / name, (original / name).read_bytes())
            origin = original.relative_to(results).as_posix()
            write_json(folder / "status.json", {**read_status(original), "taken_from": origin})
            taken += 1
    return taken


def so_far(study: Study | None, configs: Sequence[TrainConfig], results: Path) -> list[TrainConfig]:
    """Return a grid and all runs that results call for so far; without a study, the grid alone."""
    known = list(configs)
    while study and (more := following(study, known, results)):
        known += more
    return known


def following(study: Study, configs: Sequence[TrainConfig], results: Path) -> list[TrainConfig]:
    """Return the runs of a study that are not among ``configs`` and that their results call for.

    Arms are taken one by one, within a setting. An arm whose runs are not all finished calls for none, and neither does
    an arm that diverged at all of its rates.

    Args:
        study: the study.
        configs: its runs so far.
        results: root of the results folders.
    """
    groups: dict[TrainConfig, list[TrainConfig]] = {}
    for config in configs:
        if config.seed in study.seeds:
            groups.setdefault(dataclasses.replace(config, lr=0.0, seed=0), []).append(config)
    found: list[TrainConfig] = []
    for first, group in groups.items():
        losses = _losses(group, results)
        if losses is None or math.isinf(min(losses.values())):
            continue
        grid = sorted(losses)
        best = min(grid, key=losses.__getitem__)
        grown = len(grid) - len(study.own.get(first.arm, study.rates))
        seeds, rate = study.more, best
        if study.grows and best in (grid[0], grid[-1]) and grown < MOST_GROWN:
            seeds, rate = study.seeds, neighbour(best, up=best == grid[-1])
        found += [dataclasses.replace(first, lr=rate, seed=seed) for seed in seeds]
    known = set(configs)
    return sorted((config for config in found if config not in known), key=lambda config: config.seed)


def _losses(group: Sequence[TrainConfig], results: Path) -> dict[float, float] | None:
    """Return rate -> mean final loss over the seeds, infinite if a run diverged; None if a run has not ended."""
    of: dict[float, list[float]] = {}
    for config in group:
        status = read_status(run_folder(results, config.with_rules_hash()))
        if not ended(status):
            return None
        loss = status["final_val_loss"]
        of.setdefault(config.lr, []).append(math.inf if loss is None else loss)
    return {lr: sum(losses) / len(losses) for lr, losses in of.items()}
