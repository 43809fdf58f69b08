"""The study's command: run every cell without a result in one process, and resume where it stopped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from experiments.commandline import refusals
from experiments.interruption import Interruption
from experiments.storage import require_writable
from experiments.studies.paper_hessian import classes, leave_out, quadratics, spectra, structure
from experiments.studies.paper_hessian.store import Part

Profile = Literal["full", "smoke"]


def parts(profile: Profile, cache: Path) -> list[Part]:
    """Return all parts of a profile, in the order in which they run."""
    three, gains, one, added, shaped = quadratics.parts(profile, cache)
    return [
        three,
        gains,
        one,
        added,
        classes.part(profile),
        leave_out.part(profile),
        shaped,
        spectra.part(profile),
        structure.part(profile),
    ]


def main(
    out: Path = Path("results/paper_hessian"),
    cache: Path = Path("out/paper_hessian"),
    profile: Profile = "full",
    only: tuple[str, ...] = (),
    dry_run: bool = False,
    minutes: float = float("inf"),
) -> None:
    """Run what has no results yet, one cell at a time on one thread. SIGTERM and SIGINT stop after the present cell.

    Args:
        out: folder of the results, one JSON file per part.
        cache: folder of matrices that take long to compute; not committed.
        profile: full, or smoke, which takes seconds and is for tests.
        only: names of parts; all of them if empty.
        dry_run: print the cells that are left and the planned minutes, and run nothing.
        minutes: start no cell after this time.
    """
    torch.set_num_threads(1)
    with refusals(ValueError, OSError):
        known = parts(profile, cache)
        if unknown := set(only) - {part.name for part in known}:
            raise ValueError(f"only={sorted(unknown)} is unknown; choose from {[part.name for part in known]}")
        chosen = [part for part in known if not only or part.name in only]
        todo = [(part, cell) for part in chosen for cell in part.waiting(out)]
        if dry_run:
            _plan(chosen, out)
            return
        require_writable(out, "out")
        require_writable(cache, "cache")
    started = time.monotonic()
    with Interruption() as interruption, tqdm(todo, desc="cells") as bar:
        for part, cell in bar:
            if interruption.signal or time.monotonic() - started > 60 * minutes:
                break
            bar.set_postfix_str(f"{part.name}: {cell.name}")
            part.run_one(out, cell)
    left = sum(len(part.waiting(out)) for part in chosen)
    print(f"{left} of {sum(len(part.cells) for part in chosen)} cells left; results in {out}")


def _plan(chosen: list[Part], out: Path) -> None:
    """Print what is left of every part, and how long it is planned to take on one core."""
    total = 0.0
    for part in chosen:
        left = part.waiting(out)
        seconds = sum(cell.seconds for cell in left)
        total += seconds
        print(f"{part.name}: {len(left)} of {len(part.cells)} cells left, about {seconds / 60:.1f} minutes")
    print(f"all: about {total / 60:.1f} minutes on one core")


if __name__ == "__main__":
    tyro.cli(main)
