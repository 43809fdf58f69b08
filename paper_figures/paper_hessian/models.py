"""Figures and tables of the parts with networks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullFormatter

from analysis.paper_hessian import models
from analysis.paper_hessian.models import BASE, CNN, CONTROL, ENOUGH, ONE_RATE, REAL
from analysis.paper_hessian.store import Results
from analysis.stats import Interval, t_interval
from paper_figures.paper_hessian.quadratics import interval, table
from paper_figures.style import COLOURS, role_name, save

LAYERS = {"hidden": "hidden layer, by unit", "output": "output layer, by class", "whole": "all parameters"}
QUOTED = {"mse": "22", "cross-entropy": "10.5"}
"""Mean absolute entry of diagonal over other blocks at C = 100 in arXiv 2505.02809, for 8 hidden units on CIFAR-100."""
UNITS = {"ATTENTION_HEAD": "head", "OUT_NEURON": "row", "IN_NEURON": "column", "TOKEN": "token"}

# --------------------------------------------------------------------------------------------------- C classes


def draw_classes(results: Results, out: Path) -> Path:
    """Plot the ratio of off-diagonal to diagonal blocks against C, with the fitted exponents."""
    found = models.class_ratios(results)
    losses = list(dict.fromkeys(found.loss))
    figure, grid = plt.subplots(1, len(losses), figsize=(5 * len(losses), 4.2), sharey=True, squeeze=False)
    for axes, loss in zip(grid[0], losses, strict=True):
        for colour, (layer, rows) in zip(COLOURS, found[found.loss == loss].groupby("layer", sort=False), strict=False):
            fitted = models.exponent(rows)
            if fitted is None:
                axes.plot([], [], color=colour, label=f"{LAYERS[layer]}: exactly diagonal")
                continue
            axes.plot(rows.classes, rows.square, ".", color=colour, alpha=0.5, ms=4)
            means = np.log(rows.square).groupby(rows.classes).mean()
            text = f"{LAYERS[layer]}: C^{fitted.value:.2f} [{fitted.low:.2f}, {fitted.high:.2f}]"
            axes.plot(means.index, np.exp(means), color=colour, label=text)
        sizes = np.array(sorted(found.classes.unique()), dtype=float)
        top = found[(found.loss == loss) & (found.square > 0)].square.max()
        axes.plot(sizes, top * sizes[0] / sizes, color=COLOURS[6], lw=0.9, ls="--", label="slope -1")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title({"mse": "squared error"}.get(loss, loss))
        axes.set_xlabel("number of classes C")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axes.legend(loc="lower left")
    grid[0][0].set_ylabel("mean squared norm of a block\noff the diagonal / on it")
    return save(figure, out, "hessian_classes")


def class_tables(results: Results) -> str:
    """Return the ratios at every C, the exponents, and the mean absolute entries beside the quoted ones."""
    found = models.class_ratios(results)
    sizes = sorted(found.classes.unique())
    rows, absolute = [], []
    for (loss, layer), group in found.groupby(["loss", "layer"], sort=False):
        fitted = models.exponent(group)
        means = group.groupby("classes").square.apply(lambda x: float(np.exp(np.log(x.clip(lower=1e-300)).mean())))
        cells = [f"{means[c]:.2e}" if c in means and fitted else "0" if c in means else "–" for c in sizes]
        text = f"{fitted.value:.2f} [{fitted.low:.2f}, {fitted.high:.2f}]" if fitted else "exactly zero"
        holds = "yes" if fitted and fitted.holds else "no" if fitted else "–"
        rows.append([loss, LAYERS[layer], *cells, text, holds])
        ratios = [_absolute(group[group.classes == c].absolute) for c in sizes]
        absolute.append([loss, LAYERS[layer], *ratios, QUOTED[loss] if layer == "whole" else ""])
    head = ["loss", "blocks", *(f"C = {c}" for c in sizes)]
    n = found.seed.nunique()
    return "\n\n".join(
        [
            "Mean squared Frobenius norm of a block off the diagonal, over that of a diagonal block (geometric mean of "
            f"{n} seeds), and the slope of its logarithm against log C (95 % bootstrap):",
            table([*head, "exponent", "law holds"], rows),
            "Mean absolute entry of diagonal blocks, over that of all other entries (mean ± 95 % t-interval):",
            table([*head, "quoted at C = 100"], absolute),
        ]
    )


def _absolute(values: pd.Series) -> str:
    if not len(values):
        return "–"
    if np.isinf(values).any():
        return "infinite"
    found = t_interval(values.tolist())
    return f"{found.mean:.1f} ± {found.half:.1f}"


# ------------------------------------------------------------------------------------------------- leave-one-out


def draw_left_out(results: Results, out: Path) -> Path:
    """Plot losses minus AdamW's against the number of left-out blocks, for blocks and whole matrices."""
    found = models.left_out(results)
    levels = list(dict.fromkeys(found.level))
    figure, grid = plt.subplots(1, len(levels), figsize=(4.7 * len(levels), 3.9), squeeze=False)
    names = {"one rate - AdamW": ("one searched rate", COLOURS[1]), "control - AdamW": ("control", COLOURS[0])}
    for axes, level in zip(grid[0], levels, strict=True):
        chosen = found[found.level == level]
        for k in sorted(chosen["count"].unique()):
            differences = models.left_out_differences(found, level, k)
            for offset, (name, (label, colour)) in zip((-0.12, 0.12), names.items(), strict=True):
                value = differences[name]
                axes.errorbar(
                    k + offset,
                    value.mean,
                    yerr=value.half,
                    fmt="o",
                    color=colour,
                    capsize=3,
                    label=label if k == 1 else None,
                )
        for offset, kind, colour in ((-0.12, ONE_RATE, COLOURS[1]), (0.12, CONTROL, COLOURS[0])):
            points = chosen[chosen.kind == kind]
            axes.plot(points["count"] + offset + 0.06, points.loss - points.adamw, ".", color=colour, ms=4, alpha=0.6)
        axes.axhline(0, color=COLOURS[6], lw=0.8)
        axes.set_xticks(sorted(chosen["count"].unique()))
        axes.set_xlabel("left-out blocks")
        axes.set_title("blocks of Adam-mini's partition" if level == "block" else "whole weight matrices")
    grid[0][0].set_ylabel("held-out loss minus AdamW's (nats)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return save(figure, out, "hessian_leave_out")


def left_out_tables(results: Results) -> str:
    """Return the paired differences for every level and number of left-out blocks."""
    found = models.left_out(results)
    rows = []
    for level in dict.fromkeys(found.level):
        for k in sorted(found["count"].unique()):
            cell = found[(found.level == level) & (found["count"] == k)]
            difference = models.left_out_differences(found, level, k)
            decides = difference["one rate - control"]
            verdict = "yes" if decides.high < ENOUGH else "no" if decides.low > ENOUGH else "open"
            row = [level, str(k), *(interval(value, 4) for value in difference.values()), verdict, str(decides.n)]
            edges = [int((~cell[cell.kind == kind].inside).sum()) for kind in (ONE_RATE, CONTROL)]
            rows.append([*row, f"{edges[0]}, {edges[1]}", str(int(cell.diverged.sum()))])
    base = t_interval(found.groupby("seed").adamw.first().tolist())
    head = ["left out", "number", "one rate - control", "one rate - AdamW", "control - AdamW", "enough", "n"]
    head += ["searched rate at the edge (one rate, control)", "diverged runs"]
    return "\n\n".join(
        [
            "Held-out loss in nats, paired by seed, mean ± 95 % t-interval. "
            f"AdamW alone: {base.mean:.4f} ± {base.half:.4f}.",
            table(head, rows),
        ]
    )


# ------------------------------------------------------------------------------------------------------ structure


def _label(partition: str) -> str:
    role, unit = partition.split("/")
    return f"{role_name(role)} by {UNITS.get(unit, unit.lower())}"


def _partitions(found: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(found[found.variant == found.variant.iloc[0]].partition))


def draw_structure(results: Results, out: Path) -> Path:
    """Plot the lift along training, and how it changes with the model and its data at the end of training."""
    found = models.structure(results)
    first, partitions = found.variant.iloc[0], _partitions(found)
    variants = [v for v in dict.fromkeys(found.variant) if v != first]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13.2, 0.27 * len(partitions) + 2.2), sharey=True, width_ratios=(1, 1.15)
    )
    base = found[found.variant == first]
    lifts = base.groupby(["partition", "checkpoint"]).log_lift.mean().unstack().loc[partitions]
    least = base.groupby(["partition", "checkpoint"]).z.min().unstack().loc[partitions]
    marks = np.where(least.to_numpy() > REAL, "*", "")
    columns = [f"{100 * c:g} %" for c in lifts.columns]
    labels = [_label(p) for p in partitions]
    _heat(figure, left, lifts.to_numpy(), marks, columns, f"log2 lift along training (* z > {REAL:g} in every seed)")
    left.set_yticks(range(len(labels)), labels)
    if not variants:
        figure.delaxes(right)
        figure.set_size_inches(7.2, figure.get_size_inches()[1])
    else:
        last = found.checkpoint.max()
        differences = [[models.change(found, v, p, last) for v in variants] for p in partitions]
        values = np.array([[np.nan if d is None else d.mean for d in row] for row in differences])
        stars = np.array([["*" if d is not None and d.excludes_zero else "" for d in row] for row in differences])
        _heat(figure, right, values, stars, variants, "change of log2 lift, end of training (* interval excludes 0)")
    return save(figure, out, "hessian_structure")


def _heat(
    figure: plt.Figure, axes: Axes, values: np.ndarray, marks: np.ndarray, columns: Sequence[str], title: str
) -> None:
    """Draw a table of numbers with colours that are symmetric about zero."""
    top = max(0.5, float(np.nanmax(np.abs(values)))) if np.isfinite(values).any() else 1.0
    image = axes.imshow(values, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if abs(value) > 0.6 * top else "black"
            axes.text(j, i, f"{value:.2f}{marks[i, j]}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_title(title)
    axes.grid(False)
    figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)


def structure_tables(results: Results) -> str:
    """Return lift and z along training, and the changes of lift at both ends for every variant."""
    found = models.structure(results)
    first, partitions = found.variant.iloc[0], _partitions(found)
    base = found[found.variant == first]
    rows = []
    for partition in partitions:
        row = [_label(partition)]
        for _, cell in base[base.partition == partition].groupby("checkpoint"):
            lift = 2 ** float(cell.log_lift.mean())
            row.append(f"{lift:.2f} ({cell.z.min():.0f})" + (" *" if cell.z.min() > REAL else ""))
        rows.append(row)
    checkpoints = [f"{100 * c:g} %" for c in sorted(base.checkpoint.unique())]
    seeds = found.seed.nunique()
    parts = [
        f"`{first}` along training: lift (geometric mean of {seeds} seeds; in brackets the smallest z of a seed; * "
        f"above {REAL:g} in all):",
        table(["partition", *checkpoints], rows),
    ]
    variants = [v for v in dict.fromkeys(found.variant) if v != first]
    for checkpoint in sorted({0.0, float(base.checkpoint.max())}) if variants and first == BASE else ():
        changes = [[_label(p), *(_change(found, v, p, checkpoint) for v in variants)] for p in partitions]
        parts += [
            f"Change of log2 lift against `{first}` at {100 * checkpoint:g} % of training (paired by seed, mean ± 95 % "
            "t-interval; **bold** where it excludes zero):",
            table(["partition", *variants], changes),
        ]
    return "\n\n".join(parts)


def _change(found: pd.DataFrame, variant: str, partition: str, checkpoint: float) -> str:
    value = models.change(found, variant, partition, checkpoint)
    if value is None:
        return "–"
    return f"**{interval(value)}**" if value.excludes_zero else interval(value)


# -------------------------------------------------------------------------------------------------------- spectra


def draw_spectra(results: Results, out: Path) -> Path:
    """Draw the distances of one seed as maps, and the mean distances of all seeds."""
    found = models.distances(results)
    names = list(dict.fromkeys(found.model))
    figure, grid = plt.subplots(1, len(names) + 1, figsize=(4.6 * len(names) + 3.4, 4.6), layout="constrained")
    seed = int(found.seed.min())
    for axes, name in zip(grid, names, strict=False):
        cell = results.cells[f"{name}, seed {seed}"]
        labels = [_shortened(block) for block in cell["names"]]
        image = axes.imshow(cell["trained"]["distance"], vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
        axes.set_title(f"{name}, trained, seed {seed}")
        axes.grid(False)
    figure.colorbar(image, ax=grid[len(names) - 1], shrink=0.6, label="Jensen-Shannon distance")
    last = grid[-1]
    for i, name in enumerate(names):
        for offset, checkpoint, colour in ((-0.13, "initialisation", COLOURS[5]), (0.13, "trained", COLOURS[0])):
            values = found[(found.model == name) & (found.checkpoint == checkpoint)].distance
            mean = t_interval(values.tolist())
            half = mean.half if np.isfinite(mean.half) else 0.0
            label = checkpoint if i == 0 else None
            last.errorbar(i + offset, mean.mean, yerr=half, fmt="o", color=colour, capsize=3, label=label)
            last.plot([i + offset + 0.06] * len(values), values, ".", color=colour, ms=3, alpha=0.6)
    last.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    last.set_xlim(-0.5, len(names) - 0.5)
    last.set_title("mean over pairs of blocks (small dots: seeds)")
    last.legend()
    return save(figure, out, "hessian_spectra")


def _shortened(name: str) -> str:
    changes = (("transformer.", ""), ("convolutions.", "conv "), (".weight", ""), ("blocks.", "h."))
    for long, short in (*changes, (".attn.c_attn[", " "), (".attn.c_proj", " attn out"), ("]", ""), ("mlp.", "")):
        name = name.replace(long, short)
    return name.lower()


def spectra_tables(results: Results) -> str:
    """Return mean distances and spreads, and their differences from the CNN's."""
    found = models.distances(results)
    rows, differences = [], []
    for (name, checkpoint), cell in found.groupby(["model", "checkpoint"], sort=False):
        numbers = [_plain(t_interval(cell[column].tolist())) for column in ("distance", "spread", "loss")]
        rows.append([str(name), str(checkpoint), str(cell.blocks.iloc[0]), *numbers, str(len(cell))])
        if name != CNN and CNN in set(found.model):
            pair = [models.against_cnn(found, str(name), str(checkpoint), c) for c in ("distance", "spread")]
            verdict = "yes" if pair[0].low > 0 else "no"
            differences.append([str(name), str(checkpoint), *(interval(p, 3) for p in pair), verdict])
    return "\n\n".join(
        [
            "Mean Jensen-Shannon distance over pairs of blocks, and log10 of the largest over the smallest top "
            "eigenvalue (mean ± 95 % t-interval over seeds):",
            table(["model", "when", "blocks", "distance", "spread", "final loss", "n"], rows),
            "Minus the CNN's, paired by seed:",
            table(["model", "when", "distance", "spread", "more heterogeneous"], differences),
        ]
    )


def _plain(found: Interval) -> str:
    return f"{found.mean:.3f} ± {found.half:.3f}" if np.isfinite(found.half) else f"{found.mean:.3f}"
