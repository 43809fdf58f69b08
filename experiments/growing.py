"""Runs that finished runs call for: rates beyond the end of a grid at which the best one lies, then more seeds of it.

A study is therefore run in stages. Each stage is a function of the results so far, so an interrupted study goes on
where it was, and a finished one has nothing left.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.configs import TrainConfig
from experiments.grids import Study
from experiments.train import read_status, run_folder

MOST_GROWN = 3
"""By how many rates a grid grows in total."""


def neighbour(lr: float, up: bool) -> float:
    """Return the next rate in the sequence 1, 3, 10, 30, ... of the rate's powers of ten."""
    place = round(2 * math.log10(lr)) + (1 if up else -1)
    return float(f"{'3' if place % 2 else '1'}e{place // 2}")


def elsewhere(config: TrainConfig, shares: Sequence[str]) -> Iterator[TrainConfig]:
    """Yield a config, and the equal configs of the studies whose results it shares."""
    yield config
    profile = config.experiment.rpartition("_")[2]
    for study in shares:
        yield dataclasses.replace(config, experiment=f"{study}_{profile}")


def here_only(configs: Sequence[TrainConfig], results: Path, study: Study | None) -> tuple[list[TrainConfig], int]:
    """Return the configs that no other study has results for, and the number of the others."""
    shares = study.shares if study else ()
    left = [
        c for c in configs if not shares or not _ended(status_of(c, results, shares)) or _ended(status_of(c, results))
    ]
    return left, len(configs) - len(left)


def so_far(study: Study | None, configs: Sequence[TrainConfig], results: Path) -> list[TrainConfig]:
    """Return a grid and all runs that results call for so far; without a study, the grid alone."""
    known = list(configs)
    while study and (more := following(study, known, results)):
        known += more
    return known


def _ended(status: Mapping[str, Any]) -> bool:
    return status.get("state") in ("finished", "diverged")


def status_of(config: TrainConfig, results: Path, shares: Sequence[str] = ()) -> dict[str, Any]:
    """Return the status of a run, or of an equal run of another study if it has ended; empty if there is none.

    Raises:
        ValueError: a folder has another format version, or is damaged.
    """
    found: dict[str, Any] = {}
    for equal in elsewhere(config.with_rules_hash(), shares):
        status = read_status(run_folder(results, equal))
        if _ended(status):
            return status
        found = found or status
    return found


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
        losses = _losses(group, results, study.shares)
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


def _losses(group: Sequence[TrainConfig], results: Path, shares: Sequence[str]) -> dict[float, float] | None:
    """Return rate -> mean final loss over the seeds, infinite if a run diverged; None if a run has not ended."""
    of: dict[float, list[float]] = {}
    for config in group:
        status = status_of(config, results, shares)
        if not _ended(status):
            return None
        loss = status["final_val_loss"]
        of.setdefault(config.lr, []).append(math.inf if loss is None else loss)
    return {lr: sum(losses) / len(losses) for lr, losses in of.items()}
