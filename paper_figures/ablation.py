"""Draw the ablation's figures and tables from stored results; ``make figures`` runs this module."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis.ablation import (
    ARMS,
    BASELINE,
    at_best,
    best_rates,
    load_runs,
    paired_difference,
    require_complete,
    summary,
    with_prediction,
)
from paper_figures.commandline import refusals
from paper_figures.style import ARM_COLOURS, save, setup


def loss_curves(runs: pd.DataFrame, out: Path, note: str) -> Path:
    """Plot validation loss against tokens, each arm at its best learning rate; on the right minus the baseline."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2))
    best = at_best(runs)
    finished = best[best.state == "finished"]  # The curve of a diverged run is shorter.
    curves = {
        arm: np.array([[point["val_loss"] for point in curve] for curve in group.curve])
        for arm, group in finished.groupby("arm")
    }
    seeds = {arm: group.seed.tolist() for arm, group in finished.groupby("arm")}
    tokens = np.array([point["tokens"] for point in finished.curve.iloc[0]]) if len(finished) else np.array([])
    for arm in sorted(curves, key=lambda a: curves[a][:, -1].mean()):
        label = f"{arm} (lr {best_rates(runs)[arm]:g})"
        values, colour = curves[arm], ARM_COLOURS[arm]
        left.plot(tokens, values.mean(0), color=colour, label=label)
        left.fill_between(tokens, values.min(0), values.max(0), color=colour, alpha=0.12)
        if arm != BASELINE and seeds[arm] == seeds.get(BASELINE):
            right.plot(tokens, (values - curves[BASELINE]).mean(0), color=colour, label=arm)
    right.axhline(0, color=ARM_COLOURS[BASELINE], lw=1)
    left.set_ylabel("validation loss (nats per byte)")
    right.set_ylabel(f"difference to {BASELINE} (nats)")
    for axes in (left, right):
        axes.set_xlabel("training bytes")
    left.legend()
    n = best.groupby("arm").size().min()
    left.set_title(f"each arm at its best learning rate, mean of n = {n} seeds, band min to max{note}")
    right.set_title("the same, AdamW subtracted")
    return save(figure, out, "loss_curves")


def loss_against_scalars(runs: pd.DataFrame, out: Path, note: str) -> Path:
    """Plot the final loss with its 95 % interval against the number of second-moment scalars."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2))
    table = summary(runs)
    for row in table.itertuples():
        colour = ARM_COLOURS[row.arm]
        left.errorbar(row.scalars, row.loss, yerr=row.loss_half, fmt="o", color=colour, capsize=3)
        # Runs of one seed share weights and batches, so paired differences vary less than the losses on the left.
        base = row.arm == BASELINE
        difference, half = (0.0, 0.0) if base else (row.difference, row.difference_half)
        right.errorbar(row.scalars, difference, yerr=half, fmt="o", color=colour, capsize=3, label=row.arm)
    right.axhline(0, color=ARM_COLOURS[BASELINE], lw=1)
    left.set_ylabel("final validation loss (nats per byte)")
    right.set_ylabel(f"difference to {BASELINE}, seed by seed (nats)")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel(f"second-moment scalars (of {table.parameters.iloc[0]:,} parameters)")
    left.set_title(f"best learning rate per arm, mean and 95 % interval, n = {table.n.min()} seeds{note}")
    right.set_title("the same, AdamW subtracted within each seed")
    right.legend()
    return save(figure, out, "loss_against_scalars")


def learning_rates(runs: pd.DataFrame, out: Path, note: str) -> Path:
    """Plot the final loss of every run against its learning rate."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    for arm, group in runs[runs.state == "finished"].groupby("arm"):
        means = group.groupby("lr").final_val_loss.mean()
        axes.plot(means.index, means, color=ARM_COLOURS[str(arm)], label=arm)
        axes.plot(group.lr, group.final_val_loss, ".", color=ARM_COLOURS[str(arm)], ms=4)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("final validation loss (nats per byte)")
    axes.set_title(f"every run, line through the means{note}")
    axes.legend()
    return save(figure, out, "learning_rates")


def prediction(runs: pd.DataFrame, out: Path, note: str, path: Path) -> Path:
    """Plot the final loss against the cost of sharing that was measured on the tiny models."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    table, rank = with_prediction(runs, path)
    for row in table.itertuples():
        base = row.arm == BASELINE
        difference, half = (0.0, 0.0) if base else (row.difference, row.difference_half)
        axes.errorbar(
            row.predicted, difference, yerr=half, fmt="o", color=ARM_COLOURS[row.arm], capsize=3, label=row.arm
        )
    axes.set_xlabel("predicted cost: mean Jensen gap of the tiny models (nats)")
    axes.set_ylabel(f"final loss minus {BASELINE}'s, seed by seed (nats)")
    axes.set_title(f"rank correlation {rank:.2f} over {len(table)} arms{note}")
    axes.legend()
    return save(figure, out, "predicted_cost")


def tables(runs: pd.DataFrame, against: Sequence[str] = ()) -> str:
    """Return the summary at the best rates and the paired differences at each rate, as Markdown.

    Args:
        runs: all runs.
        against: arms to which differences are given besides the baseline.
    """
    lines = [
        "| arm | scalars | best lr | final loss | minus elementwise, paired | differs | n | diverged |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary(runs).itertuples():
        base = row.arm == BASELINE
        has_difference = not base and np.isfinite(row.difference)
        difference = f"{row.difference:+.4f} ± {row.difference_half:.4f}" if has_difference else "–"
        verdict = "–" if not has_difference else "yes" if row.differs else "no"
        lines.append(
            f"| {row.arm} | {row.scalars:,} | {row.lr:g} | {row.loss:.4f} ± {row.loss_half:.4f} | {difference} | "
            f"{verdict} | {row.n} | {row.diverged} |"
        )
    for base in (BASELINE, *against):
        lines += ["", f"Paired difference to `{base}` at the same learning rate:", "", *_differences(runs, base)]
    return "\n".join([*lines, ""])


def _differences(runs: pd.DataFrame, against: str) -> list[str]:
    """Return the lines of a table with every arm's paired difference to one arm at each learning rate."""
    rates = sorted(runs.lr.unique())
    lines = ["| arm | " + " | ".join(f"lr {lr:g}" for lr in rates) + " |", "|---|" + "---|" * len(rates)]
    for arm in summary(runs).arm:
        if arm == against:
            continue
        cells = []
        for lr in rates:
            try:
                difference = paired_difference(runs, arm, lr=lr, against=against)
            except ValueError:  # The arms have different seeds, which happens only in an incomplete grid.
                cells.append("missing")
                continue
            cells.append("diverged" if difference is None else f"{difference.mean:+.4f} ± {difference.half:.4f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Draw all figures and tables from a folder of results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/ablation_cpu"))
    parser.add_argument("--out", type=Path, default=Path("paper_figures/out"))
    parser.add_argument(
        "--prediction", type=Path, help="JSON file of predicted costs; adds a figure that compares them"
    )
    parser.add_argument("--arms", nargs="+", default=ARMS, help="the arms that the results must have")
    parser.add_argument("--against", nargs="*", default=[], help="arms to which the tables give differences, too")
    parser.add_argument("--partial", action="store_true", help="draw although runs are missing, and mark the figures")
    arguments = parser.parse_args(argv)
    with refusals(FileNotFoundError, ValueError):
        runs = load_runs(arguments.results, partial=arguments.partial)
        if not arguments.partial:
            require_complete(runs, arguments.arms)
        if arguments.prediction is not None:
            with_prediction(runs, arguments.prediction)
    with refusals(OSError):
        arguments.out.mkdir(parents=True, exist_ok=True)
    setup()
    left_out = ", ".join(f"{number} {state}" for state, number in runs.attrs["left_out"].items())
    note = " (incomplete)" if arguments.partial else ""
    drawn = [f(runs, arguments.out, note) for f in (loss_curves, loss_against_scalars, learning_rates)]
    if arguments.prediction is not None:
        drawn.append(prediction(runs, arguments.out, note, arguments.prediction))
    path = arguments.out / "tables.md"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    partly = f"Incomplete: {len(runs)} runs; left out: {left_out or 'none that has begun'}.\n\n"
    temporary.write_text((partly if arguments.partial else "") + tables(runs, arguments.against))
    os.replace(temporary, path)
    left_out_note = f" ({left_out} left out)" if left_out else ""
    print(f"{len(runs)} runs{left_out_note}; {', '.join(str(p) for p in drawn)}; {path}")


if __name__ == "__main__":
    main()
