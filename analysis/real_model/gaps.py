"""What sharing loses on the second moments of a short run."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from .numbers import Number
from .study import Study


def evidence(study: Study) -> pd.DataFrame:
    """Return the evidence of all runs: seed, and the columns of the results. Empty if there is no run."""
    frames = []
    for name, document in study.documents.items():
        if document["task"]["kind"] == "moments":
            sample = document["samples"][0]
            frames.append(pd.DataFrame(sample["rows"], columns=sample["columns"]).assign(seed=name.split("-")[1]))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Return role, unit, gap (a ``Number`` over layers), scalars per parameter, least z, and the gap of every seed.

    The gap is the mean over tensors, weighted by size, of the mean over seeds.
    """
    rows = []
    for (role, unit), part in table.groupby(["role", "unit"], sort=False):
        tensors = part.groupby("tensor", sort=False).agg(gap=("jensen", "mean"), n=("n_params", "first"))
        layers = part.groupby("layer").apply(
            lambda x: np.average(x["jensen"], weights=x["n_params"]), include_groups=False
        )
        error = float(layers.std(ddof=1) / math.sqrt(len(layers))) if len(layers) > 1 else math.nan
        value = float(np.average(tensors["gap"], weights=tensors["n"]))
        seeds = {s: float(np.average(x["jensen"], weights=x["n_params"])) for s, x in part.groupby("seed")}
        scalars = float(part["n_blocks"].sum() / part["n_params"].sum())
        rows.append([role, unit, Number(value, error, len(layers) - 1), scalars, float(part["z"].min()), seeds])
    return pd.DataFrame(rows, columns=["role", "unit", "gap", "scalars", "z", "seeds"])


def difference(table: pd.DataFrame, role: str, one: str, other: str) -> tuple[Number, bool]:
    """Return the gap of one unit minus another's, over layers, and whether they differ by rule R4.

    Args:
        table: the evidence.
        role: the role.
        one: a unit.
        other: another one.
    """
    part = table[table.role == role]
    wide = part.pivot_table(index=["seed", "layer", "tensor"], columns="unit", values="jensen")
    change = (wide[one] - wide[other]).rename("change").reset_index()
    layers = change.groupby("layer").change.mean()
    error = float(layers.std(ddof=1) / math.sqrt(len(layers))) if len(layers) > 1 else math.nan
    number = Number(float(layers.mean()), error, len(layers) - 1)
    signs = {bool(x > 0) for x in change.groupby("seed").change.mean()}
    beyond = abs(number.value) > 2 * error if len(layers) > 1 else number.value != 0
    return number, len(signs) == 1 and beyond


def choices(study: Study) -> dict[str, dict[str, str]]:
    """Return seed -> role -> the unit that ``derive`` chose."""
    return {
        name.split("-")[1]: {role: choice["unit"] for role, choice in d["samples"][0]["choices"].items()}
        for name, d in study.documents.items()
        if d["task"]["kind"] == "moments"
    }
