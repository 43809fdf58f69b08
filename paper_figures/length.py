"""Figure and table of size and length: the gap to AdamW against tokens per parameter."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from analysis import length
from analysis.stats import Interval
from paper_figures.style import COLOURS, save

MARKERS = "osD^vP"


def draw(table: pd.DataFrame, out: Path) -> Path:
    """Draw the gap to AdamW against tokens per parameter, one panel per arm and one line per size.

    Args:
        table: what ``length.gaps`` returned.
        out: folder of the figures.
    """
    arms, sizes = sorted(table.arm.unique()), sorted(table.parameters.unique())
    figure, grid = plt.subplots(1, len(arms), figsize=(3.4 * len(arms), 3.2), sharey=True, squeeze=False)
    for axes, arm in zip(grid[0], arms, strict=True):
        for i, size in enumerate(sizes):
            cells = [c for c in length.cells(table, arm) if c.parameters == size and c.gap is not None]
            gaps = [c.gap for c in cells if c.gap is not None]
            halves = [gap.half if np.isfinite(gap.half) else 0.0 for gap in gaps]
            axes.errorbar(
                [c.ratio for c in cells],
                [gap.mean for gap in gaps],
                yerr=halves,
                fmt=f"-{MARKERS[i % len(MARKERS)]}",
                color=COLOURS[i % len(COLOURS)],
                capsize=2,
                ms=4,
                label=f"{size / 1e6:.2g}M",
            )
        axes.axhline(0, color="k", lw=1)
        axes.set_xscale("log")
        axes.set_title(arm)
        axes.set_xlabel("tokens per parameter")
    n = sorted(set(table.groupby(["parameters", "ratio", "arm"]).seed.nunique()))
    grid[0][0].set_ylabel(f"minus AdamW, nats\n(n = {' or '.join(map(str, n))})")
    grid[0][-1].legend(title="parameters")
    return save(figure, out, "length")


def lines(table: pd.DataFrame) -> list[str]:
    """Return every cell's gap and the fits, as Markdown."""
    arms = sorted(table.arm.unique())
    found = {arm: {(c.parameters, c.ratio): c for c in length.cells(table, arm)} for arm in arms}
    keys = sorted({key for cells in found.values() for key in cells})
    out = ["| parameters | tokens per parameter | AdamW's best rate | " + " | ".join(f"`{arm}`" for arm in arms) + " |"]
    out.append("|---|---|---|" + "---|" * len(arms))
    for key in keys:
        rate = next(cells[key].base_lr for cells in found.values() if key in cells)
        texts = [_gap(cells[key].gap) + f" at {cells[key].lr:g}" if key in cells else "–" for cells in found.values()]
        out.append(f"| {key[0] / 1e6:.2f}M | {key[1]:.0f} | {rate:g} | {' | '.join(texts)} |")
    out += ["", "| arm | gap at 1M, 20 tokens each | per doubled length | per doubled size | rms error | left out |"]
    out.append("|---|---|---|---|---|---|")
    for arm in arms:
        try:
            fit = length.fit(table, arm)
        except ValueError as error:
            out.append(f"| `{arm}` | not fitted yet: {error} | | | | |")
            continue
        texts = [_gap(part) for part in (fit.a, fit.b, fit.c)]
        out.append(f"| `{arm}` | {' | '.join(texts)} | {fit.residual:.4f} | {fit.left_out} |")
    return out


def _gap(value: Interval | None) -> str:
    if value is None:
        return "diverged"
    return f"{value.mean:+.4f}" + (f" ± {value.half:.4f}" if value.n > 1 else "")
