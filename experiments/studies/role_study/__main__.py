"""The study's command: train every arm of every cell in one process, and resume where it stopped."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from experiments import data
from experiments.commandline import refusals
from experiments.interruption import Interruption
from experiments.storage import require_writable
from experiments.studies.role_study import choose
from experiments.studies.role_study import criteria as measured
from experiments.studies.role_study.cells import ADAMW, MODELS, Cell, arms, cells
from experiments.studies.role_study.runs import load_cell, load_moments, run, save_cell, save_moments
from optimizer import Rules

PROBE = 3
"""Runs that are timed for an estimate if no run is stored yet."""


def waiting(out: Path, cache: Path) -> list[tuple[Cell, str, Rules]]:
    """Return the runs without results, in the order of ``cells``; AdamW's also without its second moments."""
    rules = {model: arms(model) for model in MODELS}
    todo = []
    for cell in cells():
        done = load_cell(out, cell)["runs"]
        again = {ADAMW} if load_moments(cache, cell) is None else set()
        todo += [(cell, arm, r) for arm, r in rules[cell.model].items() if arm not in done or arm in again]
    return todo


def seconds_per_run(out: Path, todo: list[tuple[Cell, str, Rules]]) -> float:
    """Return the median time of the stored runs; without any, train ``PROBE`` of those that wait and time them."""
    stored = [r["seconds"] for cell in cells() for r in load_cell(out, cell)["runs"].values()]
    if not stored and todo:
        every = max(1, len(todo) // PROBE)
        stored = [run(c, arm, r, data.load(c.data))[0]["seconds"] for c, arm, r in todo[::every][:PROBE]]
    return statistics.median(stored) if stored else 0.0


def main(
    out: Path = Path("results/role_study"),
    cache: Path = Path("out/role_study"),
    dry_run: bool = False,
    criteria: bool = False,
    rules: bool = False,
    minutes: float = float("inf"),
) -> None:
    """Train what has no results yet, one run at a time on one thread. SIGTERM and SIGINT stop after the present run.

    Args:
        out: folder of the results, one JSON file per cell.
        cache: folder of the averaged second moments, from which the criteria are computed; not committed.
        dry_run: print the number of runs and the estimated time, and train nothing but what the estimate needs.
        criteria: compute the criteria of the finished cells, write them to criteria.json, and train nothing.
        rules: write the rules that the finished runs choose as the shipped set ``derived``, and train nothing.
        minutes: start no run after this time.
    """
    torch.set_num_threads(1)
    if rules:
        with refusals(ValueError, OSError):
            print(choose.choose(out).save(choose.SHIPPED))
        return
    if criteria:
        with refusals(ValueError, OSError):
            require_writable(out, "out")
            print(f"criteria of {measured.write(out, cache)} of {len(cells())} cells in {out / 'criteria.json'}")
        return
    with refusals(ValueError, OSError, RuntimeError):
        todo = waiting(out, cache)
        total = sum(len(arms(cell.model)) for cell in cells())
        if dry_run:
            each = seconds_per_run(out, todo)
            hours = len(todo) * each / 3600
            print(f"{total} runs, {len(todo)} left, {each:.1f} s each: about {hours:.2f} hours on one core")
            return
        require_writable(out, "out")
        require_writable(cache, "cache")
        for name in {cell.data for cell, _, _ in todo}:
            data.load(name)
    started = time.monotonic()
    with Interruption() as interruption, tqdm(total=total, initial=total - len(todo), desc="runs") as bar:
        for cell, arm, rules in todo:
            if interruption.signal or time.monotonic() - started > 60 * minutes:
                break
            result, moments = run(cell, arm, rules, data.load(cell.data))
            if moments:
                save_moments(cache, cell, moments)
            document = load_cell(out, cell)
            document["runs"][arm] = result
            save_cell(out, cell, document)
            bar.update()
    print(f"{len(waiting(out, cache))} of {total} runs left; results in {out}")


if __name__ == "__main__":
    tyro.cli(main)
