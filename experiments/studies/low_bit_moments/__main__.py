"""The study's command: screening, final runs, and their comparison. Every run is saved as soon as it finishes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import scipy.stats
import torch
import tyro

from experiments import data
from experiments.commandline import refusals
from experiments.storage import environment, read_json, require_writable, write_json
from experiments.studies.low_bit_moments import stability
from experiments.studies.low_bit_moments.candidates import FAST, SCREENED
from experiments.studies.low_bit_moments.runs import CONFIG, Arm, name_of, run

MARGIN = 0.02
"""Upper bound of the interval in nats, the second condition of the rule."""
STAGES: dict[str, tuple[tuple[Arm, ...], tuple[int, ...], int, float]] = {
    "screen": (("fp32", "bf16", "int8", "int4", *SCREENED), (100, 101, 102), 300, 3e-3),
    "fast": (("fp32", "int8", "int4", *FAST), (100, 101, 102), 300, 1e-2),
    "final": (("fp32", "int8", "int4", "twin"), tuple(range(8)), 1000, 3e-3),
}
"""Arms, seeds, steps and learning rate of each stage."""


def compare(runs: Sequence[dict[str, Any]], arm: str, wanted: Sequence[int]) -> dict[str, Any]:
    """Compute paired differences between an arm's final losses and fp32's, over the seeds that both have finished.

    Args:
        runs: all runs of the stage so far.
        arm: name of the arm.
        wanted: the stage's seeds. The rule counts all of them, so no arm passes before all have finished.

    Returns:
        JSON-able: mean, standard error and 95 % t-interval in nats, n, the number of the stage's seeds, and whether the
        arm passes the rule.
    """
    losses = {(r["arm"], r["seed"]): r["final_val_loss"] for r in runs}
    seeds = sorted(seed for name, seed in losses if name == arm and ("fp32", seed) in losses)
    row: dict[str, Any] = {"arm": arm, "n": len(seeds), "of": len(wanted), "passes": False}
    if any(losses[name, seed] is None for name in (arm, "fp32") for seed in seeds):
        return {**row, "diverged": True}
    if not seeds:
        return row
    differences = np.array([losses[arm, seed] - losses["fp32", seed] for seed in seeds])
    mean, n = float(differences.mean()), len(differences)
    error = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * error if n > 1 else math.inf
    return {
        **row,
        "mean_difference": mean,
        "standard_error": error,
        "interval_95": [mean - half, mean + half],
        "mean_loss": float(np.mean([losses[arm, seed] for seed in seeds])),
        "differences": differences.tolist(),
        "passes": seeds == sorted(wanted) and abs(mean) <= 2 * error and mean + half < MARGIN,
    }


def verdict(row: dict[str, Any]) -> str:
    """Return a comparison's verdict in words."""
    if row.get("diverged"):
        return "diverged: fails"
    if row["n"] < row["of"]:
        return f"no verdict: {row['n']} of {row['of']} seeds"
    return "passes" if row["passes"] else "fails"


def _finished(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names of the arms that have a run, without fp32, in the order of the runs."""
    return list(dict.fromkeys(r["arm"] for r in runs if r["arm"] != "fp32"))


def stored(path: Path, steps: int, lr: float) -> dict[str, Any]:
    """Read a stage's results so far; return a document without runs if the stage has not begun.

    Raises:
        ValueError: the file is damaged, or its runs are not this stage's; the message names the file and the run.
    """
    document = read_json(path)
    if document is None:
        return {"environment": environment(), "runs": [], "comparison": []}
    mend = "move the file away to run its stage again"
    runs = document.get("runs") if isinstance(document, dict) else None
    if not isinstance(runs, list):
        raise ValueError(f"{path} is damaged (it has no runs); {mend}")
    seen = set()
    for row in runs:
        if not isinstance(row, dict) or not {"arm", "seed", "steps", "lr", "final_val_loss", "curve"} <= row.keys():
            raise ValueError(f"{path} is damaged (it holds a run without one of its keys); {mend}")
        name, loss = f"the run arm={row['arm']} seed={row['seed']}", row["final_val_loss"]
        if (row["steps"], row["lr"]) != (steps, lr):
            raise ValueError(f"{path}: {name} took steps={row['steps']} at lr={row['lr']}, not {steps} at {lr}; {mend}")
        if (row["arm"], row["seed"]) in seen:
            raise ValueError(f"{path}: {name} is there twice; {mend}")
        seen.add((row["arm"], row["seed"]))
        last = row["curve"][-1] if isinstance(row["curve"], list) and row["curve"] else (None, None)
        diverged = loss is None and isinstance(last[1], float) and not math.isfinite(last[1])
        if last[0] != steps or not (diverged or (loss == last[1] and isinstance(loss, float) and math.isfinite(loss))):
            raise ValueError(f"{path}: {name} has final_val_loss={loss!r}, which its curve does not end with; {mend}")
    return document


def stage(name: str, folder: Path) -> None:
    """Run a stage's missing runs, seed by seed, and write and print the comparison.

    Args:
        name: name of the stage.
        folder: folder of the results.

    Raises:
        ValueError: the stage's file is damaged, or its runs are not this stage's.
    """
    arms, seeds, steps, lr = STAGES[name]
    path = folder / f"{name}.json"
    document = stored(path, steps, lr)
    done = {(r["arm"], r["seed"]) for r in document["runs"]}
    for seed in seeds:
        for arm in arms:
            if (name_of(arm), seed) in done:
                continue
            result = run(arm, seed, steps, lr)
            print(f"{name} seed {seed} {result['arm']}: {result['final_val_loss']} ({result['seconds']} s)", flush=True)
            document["runs"].append(result)
            document["comparison"] = [compare(document["runs"], name, seeds) for name in _finished(document["runs"])]
            write_json(path, document)
    for row in (compare(document["runs"], name, seeds) for name in _finished(document["runs"])):
        if "mean_difference" in row:
            low, high = row["interval_95"]
            print("{arm:46s} n={n} {mean_difference:+.4f} ± {standard_error:.4f}".format(**row), end=" ")
            print(f"[{low:+.4f}, {high:+.4f}] {verdict(row)}")
        else:
            print(f"{row['arm']:46s} n={row['n']} {verdict(row)}")


def main(
    only: Literal["stability", "screen", "fast", "final", "all"] = "all", results: Path = Path("results/low_bit")
) -> None:
    """Run the study, which takes about an hour and a half on one core.

    Args:
        only: the part of the study to run.
        results: folder of screen.json and final.json; runs that are finished there are not repeated.
    """
    torch.set_num_threads(1)
    names = [name for name in STAGES if only in (name, "all")]
    with refusals(ValueError, OSError):  # Check that results can be read and written before hours of work.
        require_writable(results, "results")
        for name in names:
            stored(results / f"{name}.json", *STAGES[name][2:])
    if names:
        with refusals(ValueError, OSError, RuntimeError):
            data.load(CONFIG.data)
    if only in ("stability", "all"):
        write_json(results / "stability.json", stability.table())
    for name in names:
        stage(name, results)


if __name__ == "__main__":
    tyro.cli(main)
