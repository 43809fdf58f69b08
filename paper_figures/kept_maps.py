"""Draw the committed maps of |H|: every weight matrix of every tiny model at the end of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from analysis import hessian_maps
from paper_figures.maps import TITLES
from paper_figures.style import draw_matrix, role_name, save

WIDE = 5


def write(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw one figure per model, each matrix with the candidate of the highest z, as PNG and PDF.

    Args:
        document: the content of ``results/hessian_maps/maps.json``.
        out: folder of the figures.

    Returns:
        The paths of the PNGs.
    """
    paths = []
    for model in document["subjects"]:
        entries = [e for e in document["maps"] if e["model"] == model and e["checkpoint"] == 1]
        high = math.ceil(len(entries) / WIDE)
        figure, grid = plt.subplots(high, WIDE, figsize=(2.3 * WIDE, 2.6 * high + 0.4), squeeze=False)
        for axes in list(grid.flat)[len(entries) :]:
            axes.set_axis_off()
        for axes, entry in zip(grid.flat, entries, strict=False):
            best = max(entry["candidates"], key=lambda candidate: candidate["z"])
            found = hessian_maps.read(entry, hessian_maps.order_of(best["unit"]))
            blocks = int(best["n_blocks"])
            borders = [i * found.cells // blocks for i in range(1, blocks)]
            unit = best["unit"].lower().replace("_", " ")
            title = f"{role_name(entry['role'])}\n{blocks} x {unit}, z = {best['z']:.0f}"
            draw_matrix(axes, found.values, borders, title)
            axes.set_xticks([0, found.cells], ["0", f"{found.n:,}"])  # Elements, of which a cell holds several.
            axes.set_yticks([0, found.cells], ["0", f"{found.n:,}"])
        settings = document["settings"]
        figure.suptitle(
            f"{TITLES[model]}: |H| of every matrix at 100 % of training, with the blocks of the highest z "
            f"(n = 1 model, seed {settings['seed']}, {settings['permutations']} permutations)"
        )
        paths.append(save(figure, out, f"hessian_maps_{model}"))
    return paths
