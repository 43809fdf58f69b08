"""Draw any folder of training runs: differences to AdamW by learning rate, and memory against loss, per condition."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import studies
from analysis.studies import Study
from paper_figures.report.figures import label, looks
from paper_figures.style import COLOURS, save

MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "triangle-up": "^", "x": "X", "star": "*", "triangle-down": "v",
    "cross": "P", "pentagon": "p", "hexagram": "h",
}  # fmt: skip
"""Names of the site's symbols in matplotlib."""
MOST_CONDITIONS = 12


def draw(study: Study) -> Figure:
    """Return a figure with a row per condition: differences by rate on the left, memory against loss on the right."""
    rows = studies.table(study)
    conditions = study.conditions[:MOST_CONDITIONS]
    figure, grid = plt.subplots(len(conditions), 2, figsize=(10.4, 0.9 + 3.4 * len(conditions)), squeeze=False)
    for (left, right), condition in zip(grid, conditions, strict=True):
        chosen = rows[rows.condition == condition]
        _differences(left, chosen)
        _memory(right, chosen)
        n = sorted(set(chosen.n))
        interval = "no intervals" if n == [1] else "95 % intervals"
        left.set_title(f"{condition or study.name}: paired, n = {' or '.join(map(str, n))}, {interval}")
        right.set_title("each arm at its best rate; ringed: Pareto-optimal by means")
    handles = {
        label: handle for axes in grid[:, 1] for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5)
    if len(study.conditions) > len(conditions):
        figure.suptitle(f"The first {len(conditions)} of {len(study.conditions)} conditions; `make report` shows all")
    return figure


def _differences(axes: Axes, rows: pd.DataFrame) -> None:
    """Plot the paired difference of every arm at each learning rate."""
    drawn = looks(sorted(rows.arm.unique()))
    for arm, group in rows.groupby("arm"):
        group = group[group.difference.notna()]
        if len(group):
            values, look = list(group.difference), drawn[str(arm)]
            halves = [value.half if np.isfinite(value.half) else 0.0 for value in values]
            means = [value.mean for value in values]
            axes.errorbar(
                group.lr, means, yerr=halves, fmt=f"-{MARKERS[look.symbol]}", color=look.colour, capsize=2, ms=4
            )
    axes.axhline(0, color=COLOURS[6], lw=1)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("final loss minus AdamW's (nats)")


def _memory(axes: Axes, rows: pd.DataFrame) -> None:
    """Plot the final loss of every arm at its best rate against the bytes of its state per parameter."""
    rows = rows[rows.best & rows.loss.notna()]
    drawn = looks(sorted(rows.arm.unique()))
    values = (rows.state_bytes / rows.parameters).to_numpy()
    best = studies.optimal(values, np.array([loss.mean for loss in rows.loss]))
    for row, value, ringed in zip(rows.itertuples(), values, best, strict=True):
        look, half = drawn[str(row.arm)], row.loss.half if np.isfinite(row.loss.half) else 0.0
        style = {"mec": COLOURS[6], "mew": 1.5, "ms": 9} if ringed else {"ms": 6}
        marker = MARKERS[look.symbol]
        axes.errorbar(
            value, row.loss.mean, yerr=half, fmt=marker, color=look.colour, label=label(str(row.arm)), **style
        )
    axes.set_xscale("log")
    axes.set_xlabel("bytes of optimizer state per parameter")
    axes.set_ylabel("final validation loss (nats)")


def write(study: Study, out: Path) -> Path:
    """Draw a study as PNG and PDF, and return the path of the PNG."""
    return save(draw(study), out, f"study_{study.name}")
