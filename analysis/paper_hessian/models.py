"""The parts with networks: classifiers with C classes, leave-one-out, structure along training, spectra of blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.paper_hessian.store import Results
from analysis.stats import Interval, t_interval

RESAMPLES = 2000
LAW = -1.0
ENOUGH = 0.01
"""Nats that one searched rate may lose against the control."""
REAL = 6.0
"""A z-score above this counts as structure."""
ONE_RATE, CONTROL = "one rate", "AdamW's rates"
BASE = "base"
CNN = "cnn"

# --------------------------------------------------------------------------------------------------- C classes


def class_ratios(results: Results) -> pd.DataFrame:
    """Return one row per loss, C, seed and layer: ``square`` (off / diagonal) and ``absolute`` (diagonal / off)."""
    rows = []
    for name, cell in results.cells.items():
        loss, classes, _ = name.split(", ")
        for layer, values in cell.items():
            absolute = values["diagonal_off_absolute"]
            rows.append(
                [
                    loss,
                    int(classes.removeprefix("C ")),
                    results.seed(name),
                    layer,
                    values["off_diagonal_square"],
                    math.inf if absolute is None else absolute,
                ]
            )
    return pd.DataFrame(rows, columns=["loss", "classes", "seed", "layer", "square", "absolute"])


@dataclass(frozen=True)
class Exponent:
    """The slope of log(off / diagonal) against log C.

    Attributes:
        value: least-squares slope of the means over seeds.
        low: lower end of its 95 % bootstrap interval over seeds.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @property
    def holds(self) -> bool:
        """Whether the interval contains the law's exponent."""
        return self.low <= LAW <= self.high


def exponent(table: pd.DataFrame, resamples: int = RESAMPLES) -> Exponent | None:
    """Fit the exponent for the rows of one loss and layer; None if a ratio is zero, as in an exactly diagonal layer."""
    wide = table.pivot(index="seed", columns="classes", values="square")
    if not (wide.to_numpy() > 0).all():
        return None
    logs, x = np.log(wide.to_numpy()), np.log(wide.columns.to_numpy(dtype=float))
    x = x - x.mean()
    generator = np.random.default_rng(0)
    seeds, sizes = logs.shape
    # Every C has draws of its own, so each is resampled by itself.
    index = generator.integers(seeds, size=(resamples, seeds, sizes))
    drawn = np.take_along_axis(np.broadcast_to(logs, (resamples, seeds, sizes)), index, axis=1).mean(1) @ x / (x @ x)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Exponent(float(logs.mean(0) @ x / (x @ x)), float(low), float(high))


# ------------------------------------------------------------------------------------------------- leave-one-out


def left_out(results: Results) -> pd.DataFrame:
    """Return one row per level, kind, seed and number of left-out blocks.

    Columns: ``level``, ``kind``, ``seed``, ``count``, ``loss`` (reported; infinite after divergence), ``adamw``,
    ``factor``, ``inside``, ``added``, and ``diverged``, how many of the searched rates diverged.
    """
    rows = []
    for name, cell in results.cells.items():
        level, kind, _ = name.rsplit(", ", 2)
        for number, row in enumerate(cell["rows"], start=1):
            rows.append(
                {
                    "level": level,
                    "kind": kind,
                    "seed": results.seed(name),
                    "count": number,
                    "loss": math.inf if row["loss"] is None else row["loss"],
                    "adamw": cell["adamw"],
                    "factor": row["factor"],
                    "inside": row["inside"],
                    "added": row["added"],
                    "diverged": sum(loss is None for loss in row["searched"]),
                }
            )
    return pd.DataFrame(rows)


def left_out_differences(table: pd.DataFrame, level: str, count: int) -> Mapping[str, Interval]:
    """Return the paired differences: one rate minus control, one rate minus AdamW, control minus AdamW, in nats."""
    chosen = table[(table.level == level) & (table["count"] == count)]
    wide = chosen.pivot(index="seed", columns="kind", values="loss").dropna()
    base = chosen.groupby("seed").adamw.first().loc[wide.index]
    return {
        "one rate - control": t_interval((wide[ONE_RATE] - wide[CONTROL]).tolist()),
        "one rate - AdamW": t_interval((wide[ONE_RATE] - base).tolist()),
        "control - AdamW": t_interval((wide[CONTROL] - base).tolist()),
    }


# ------------------------------------------------------------------------------------------------------ structure


def structure(results: Results) -> pd.DataFrame:
    """Return one row per variant, seed, checkpoint, role and unit, with z, lift and log2 of the lift."""
    rows = [
        {"variant": name.rsplit(", seed ", 1)[0], "seed": results.seed(name), **row}
        for name, cell in results.cells.items()
        for row in cell
    ]
    table = pd.DataFrame(rows)
    table["partition"] = table.role + "/" + table.unit
    table["log_lift"] = np.log2(table.lift.astype(float))
    return table


def change(table: pd.DataFrame, variant: str, partition: str, checkpoint: float) -> Interval | None:
    """Return the mean difference of log2 lift between a variant and the base, paired by seed; None without the two."""
    chosen = table[(table.partition == partition) & (table.checkpoint == checkpoint)]
    wide = chosen.pivot(index="seed", columns="variant", values="log_lift")
    if variant not in wide or BASE not in wide:
        return None
    difference = (wide[variant] - wide[BASE]).dropna()
    return t_interval(difference.tolist()) if len(difference) else None


# -------------------------------------------------------------------------------------------------------- spectra


def distances(results: Results) -> pd.DataFrame:
    """Return one row per model, seed and checkpoint.

    Columns: ``model``, ``seed``, ``checkpoint``, ``distance`` (mean Jensen-Shannon distance over pairs of blocks),
    ``spread`` (log10 of the ratio of the largest to the smallest top eigenvalue of the blocks), ``blocks``, ``loss``.
    """
    rows = []
    for name, cell in results.cells.items():
        for checkpoint in ("initialisation", "trained"):
            matrix = np.array(cell[checkpoint]["distance"])
            largest = np.array(cell[checkpoint]["largest"], dtype=float)
            pairs = matrix[np.triu_indices(len(matrix), 1)]
            alive = largest[largest > 0]
            rows.append(
                [
                    name.rsplit(", seed ", 1)[0],
                    results.seed(name),
                    checkpoint,
                    float(pairs.mean()),
                    float(np.log10(alive.max() / alive.min())),
                    len(matrix),
                    cell["final_loss"],
                ]
            )
    columns = ["model", "seed", "checkpoint", "distance", "spread", "blocks", "loss"]
    return pd.DataFrame(rows, columns=columns)


def against_cnn(table: pd.DataFrame, model: str, checkpoint: str, column: str = "distance") -> Interval:
    """Return a model's mean distance minus the CNN's, paired by seed."""
    wide = table[table.checkpoint == checkpoint].pivot(index="seed", columns="model", values=column)
    return t_interval((wide[model] - wide[CNN]).dropna().tolist())
