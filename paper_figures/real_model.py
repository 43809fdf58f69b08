"""Draw the figures of the real model's Hessian and write its tables from stored results.

python -m paper_figures.real_model [--results results/real_model] [--docs docs/real_model.md]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from analysis import real_model
from analysis.real_model import BlockMap, Number, Study
from paper_figures.commandline import refusals
from paper_figures.pages import illustrate, replace
from paper_figures.real_model_tables import MATRICES, NOTE, short, tables
from paper_figures.style import COLOURS, MAP, ROLE_COLOURS, role_name, save, setup

BEGIN, END = "<!-- tables begin: written by python -m paper_figures.real_model -->", "<!-- tables end -->"
UNIT_MARKERS = {
    "TENSOR": "X",
    "ATTENTION_HEAD": "D",
    "TOKEN": "s",
    "OUT_NEURON": "o",
    "IN_NEURON": "^",
    "FACTORED": "*",
}
UNIT_NAMES = {"OUT_NEURON": "row", "IN_NEURON": "column", "ATTENTION_HEAD": "head", "TOKEN": "token (row)"}


def energies(study: Study, out: Path) -> Path:
    """Plot the share inside the blocks against that of random blocks: the whole model, and single matrices."""
    single = sorted(study.of("matrices"), key=lambda d: (d["task"]["target"], d["task"]["matrix"] == "G"))[::-1][:2][
        ::-1
    ]
    figure, grid = plt.subplots(1, 1 + len(single), figsize=(5 + 5 * len(single), 5.2), sharey=True, squeeze=False)
    whole = []
    for matrix in "HG":
        documents = study.one("energy", matrix=matrix, target="model", text=0), study.one("columns", matrix=matrix)
        if rows := real_model.of_model(*documents):
            whole.append((MATRICES[matrix], rows))
    _shares(grid[0, 0], whole, "whole model")
    for axes, document in zip(grid[0, 1:], single, strict=True):
        table = real_model.matrices(document)
        groups = [(short(name).split(".")[-1], list(_rows(part))) for name, part in table.groupby("name", sort=False)]
        _shares(axes, groups, f"{document['task']['matrix']} of single matrices of {document['task']['target']}")
    grid[0, 0].set_ylabel("share of the squared Frobenius norm")
    grid[0, 0].set_yscale("log")
    grid[0, 0].set_ylim(1e-6, 2)
    figure.suptitle(
        "Inside blocks (points with 95 % intervals; open triangles: upper ends where the estimate is not positive) "
        f"and by chance (bars).\n{NOTE}"
    )
    return save(figure, out, "real_model_energy")


def _rows(table: pd.DataFrame) -> Iterator[tuple[str, Number, float]]:
    """Yield (partition, share, share by chance)."""
    for row in table.itertuples():
        yield row.partition, row.share, row.control.value


def _shares(axes: Axes, groups: list[tuple[str, list[tuple[str, Number, float]]]], title: str) -> None:
    """Plot one group of points for each partition."""
    order = (*real_model.PARTITIONS, "layer", real_model.CONTROL)
    partitions = [p for p in order if any(p == name for _, rows in groups for name, _, _ in rows)]
    width = 0.8 / max(1, len(groups))
    for number, (label, rows) in enumerate(groups):
        colour = ROLE_COLOURS[number]
        for partition, share, chance in rows:
            x = partitions.index(partition) - 0.4 + width * (number + 0.5)
            axes.plot([x - width / 2.2, x + width / 2.2], [max(chance, 1e-9)] * 2, color=colour, lw=3, alpha=0.4)
            _point(axes, x, share, colour)
        axes.plot([], [], "o", color=colour, ms=4, label=label)
    axes.set_xticks(range(len(partitions)), partitions)
    axes.set_title(title)
    if groups:
        axes.legend(loc="lower right", ncols=1 + len(groups) // 4, frameon=True)


def _point(axes: Axes, x: float, share: Number, colour: str) -> None:
    """Plot a share with its interval; where it is not positive, the upper end only."""
    if share.value > 0:
        axes.plot([x], [share.value], "o", color=colour, ms=4)
        axes.plot([x, x], [max(share.low, 1e-9), share.high], color=colour, lw=1.2)
    else:
        axes.plot([x], [max(share.high, 1e-9)], "v", color=colour, ms=5, mfc="none")


def maps(study: Study, out: Path) -> Path:
    """Draw the maps: layers of the whole model, heads, neurons and tokens; H above G."""
    columns = [("columns", "model")]
    columns += [
        (kind, d["task"]["target"]) for kind in ("heads", "neurons", "tokens") for d in study.of(kind, matrix="H")
    ]
    figure, grid = plt.subplots(2, len(columns), figsize=(4.0 * len(columns), 7.2), squeeze=False)
    for row, matrix in zip(grid, "HG", strict=True):
        for axes, (kind, target) in zip(row, columns, strict=True):
            document = study.one(kind, matrix=matrix, target=target)
            if document is None:
                axes.set_axis_off()
                continue
            if kind == "columns":
                found = real_model.layer_map(document)
                if found is None:
                    axes.set_axis_off()
                    continue
                blocks = found.blocks()
                named = BlockMap(list(map(short, blocks.labels)), blocks.mean, blocks.stderr, blocks.sizes)
                _draw(axes, named, f"{matrix}: embedding and layers")
            else:
                what = "embedding, by tokens" if kind == "tokens" else f"{kind} of {target}"
                _draw(axes, real_model.block_map(document), f"{matrix}: {what}")
    figure.suptitle(f"Root mean square entry of the blocks, by probes\n{NOTE}")
    return save(figure, out, "real_model_maps")


def _draw(axes: Axes, found: BlockMap, title: str) -> None:
    """Draw the root mean square entries of a map, with labels of the groups."""
    rms = found.rms
    top = float(rms.max())
    low = max(float(np.quantile(rms[rms > 0], 0.02)), top * 1e-5)
    image = axes.imshow(np.maximum(rms, low), norm=LogNorm(low, top), cmap=MAP, interpolation="nearest")
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(found.labels):
        name, _, number = label.rpartition(" ")
        groups.setdefault(name if number.isdigit() and name else label, []).append(i)
    for blocks in groups.values():
        if len(groups) > 1 and blocks[0]:
            axes.axhline(blocks[0] - 0.5, color="#7fd7ff", lw=0.9)
            axes.axvline(blocks[0] - 0.5, color="#7fd7ff", lw=0.9)
    names = [
        role_name(name) if name.isupper() else f"layers 0 to {len(b) - 1}" if name == "layer" else name
        for name, b in groups.items()
    ]
    axes.set_yticks([float(np.mean(blocks)) for blocks in groups.values()], names)
    axes.set_xticks([])
    axes.set_title(title)
    axes.grid(False)
    axes.figure.colorbar(image, ax=axes, shrink=0.75, pad=0.02)


def spectra(study: Study, out: Path) -> Path:
    """Plot where the squared norm of blocks lies on the axis of eigenvalues: H and G, positive and negative."""
    targets = list(dict.fromkeys(d["task"]["target"] for d in study.of("spectrum")))
    rows, wide = max(1, -(-len(targets) // 4)), min(4, max(1, len(targets)))
    figure, grid = plt.subplots(rows, wide, figsize=(2.5 + 3.4 * wide, 0.8 + 2.7 * rows), squeeze=False)
    for axes, target in zip(grid.flat, targets, strict=False):
        for matrix, colour in zip("HG", COLOURS, strict=False):
            document = study.one("spectrum", matrix=matrix, target=target)
            if document is not None:
                _density(axes, real_model.spectrum(document), colour, MATRICES[matrix])
        axes.set_title(short(target))
        axes.set_xlabel("log10 of the absolute eigenvalue")
    for axes in list(grid.flat)[len(targets) :]:
        axes.set_axis_off()
    grid[0, 0].legend()
    for row in grid:
        row[0].set_ylabel("squared norm per decade, of the whole\n(negative eigenvalues downwards)")
    figure.suptitle(f"Where the squared norm of a block lies on the axis of its eigenvalues\n{NOTE}")
    return save(figure, out, "real_model_spectra")


def _density(axes: Axes, found: real_model.Spectrum, colour: str, label: str) -> None:
    """Plot the density of positive eigenvalues upwards and of negative ones downwards, with one standard error."""
    size = np.abs(found.nodes[found.weights * found.nodes**2 > 0])
    grid = np.linspace(np.log10(size.max()) - 3.5, np.log10(size.max()) + 0.4, 300)
    for sign in (1, -1):
        mean, error = found.density(grid, 0.12, sign)
        axes.plot(grid, sign * mean, color=colour, lw=1.3, label=label if sign > 0 else None)
        axes.fill_between(grid, sign * (mean - error), sign * (mean + error), color=colour, alpha=0.25, lw=0)
    axes.axhline(0, color=COLOURS[6], lw=0.6)


def gaps(study: Study, out: Path) -> Path:
    """Plot what each form of sharing loses, by role, against its number of scalars."""
    table = real_model.gaps(real_model.evidence(study))
    roles = list(dict.fromkeys(table.role))
    figure, grid = plt.subplots(1, len(roles), figsize=(2.1 * len(roles), 4.1), sharey=True)
    for axes, role in zip(np.atleast_1d(grid), roles, strict=True):
        part = table[table.role == role].sort_values("scalars")
        for row in part.itertuples():
            low, high = max(row.gap.low, row.gap.value / 10), row.gap.high
            if not np.isfinite(row.gap.stderr):
                low, high = min(row.seeds.values()), max(row.seeds.values())
            error = [[row.gap.value - low], [high - row.gap.value]]
            x = max(row.scalars, 1e-8)
            axes.errorbar(x, row.gap.value, yerr=error, fmt=UNIT_MARKERS[row.unit], color=COLOURS[0], ms=7, capsize=2)
        axes.set_xscale("log")
        axes.set_title(role_name(role))
        axes.margins(x=0.2)
        axes.set_xlabel("scalars per parameter")
    np.atleast_1d(grid)[0].set_ylabel("gap of v (nats)")
    np.atleast_1d(grid)[0].set_yscale("log")
    for unit, marker in UNIT_MARKERS.items():
        name = UNIT_NAMES.get(unit, unit.lower())
        np.atleast_1d(grid)[0].plot([], [], marker, color=COLOURS[0], label=name)
    handles = np.atleast_1d(grid)[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6)
    figure.suptitle(
        "What sharing loses on second moments v: log of v's mean over its geometric mean inside blocks "
        f"(bars: 95 % over layers; embedding: range over seeds)\n{NOTE}"
    )
    return save(figure, out, "real_model_gaps")


def main(argv: list[str] | None = None) -> None:
    """Draw the figures and write the tables; with a page, copy the figures to the folder beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/real_model"))
    parser.add_argument("--out", type=Path, default=Path("paper_figures/out"))
    parser.add_argument(
        "--docs", type=Path, help="page whose tables and figures are replaced; without it, tables go to --out"
    )
    arguments = parser.parse_args(argv)
    with refusals(FileNotFoundError, ValueError, OSError):
        study = real_model.load(arguments.results)
        arguments.out.mkdir(parents=True, exist_ok=True)
        setup()
        written = tables(study)
        kinds = {document["task"]["kind"] for document in study.documents.values()}
        needed = ((energies, "energy"), (maps, "columns"), (spectra, "spectrum"), (gaps, "moments"))
        drawn = [draw(study, arguments.out) for draw, kind in needed if kind in kinds]
        if arguments.docs is not None:
            replace(arguments.docs, written, BEGIN, END)
            illustrate(arguments.docs, drawn)
        else:
            (arguments.out / "real_model.md").write_text(written + "\n", encoding="utf-8")
    print(f"{len(study.documents)} files of results; {', '.join(str(path) for path in drawn)}")


if __name__ == "__main__":
    main()
