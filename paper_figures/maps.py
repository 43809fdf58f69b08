"""Figures of |H|, for single matrices and for whole models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm

from analysis.hessian import HessianReport
from paper_figures.style import COLOURS, MAP, draw_matrix, role_name, save

PERCENTS = (0, 50, 100)
TITLES = {"gpt": "GPT style", "llama": "Llama style", "mlp": "MLP classifier"}


@dataclass(frozen=True)
class Caption:
    """The caption of a figure.

    Attributes:
        name: file name without suffix.
        title: headline.
        text: what the figure shows, with n and seed.
    """

    name: str
    title: str
    text: str


def first_tensor(report: HessianReport, model: str, role: str) -> str:
    """Return the name of a role's first tensor in a model (layer 0).

    Raises:
        KeyError: the study measured no tensor of this role in this model.
    """
    table = report.evidence
    tensors = table[(table.model == model) & (table.role == role)].tensor
    if tensors.empty:
        raise KeyError(f"the study measured no {role} in {model}")
    return str(tensors.iloc[0])


def blocks_of(report: HessianReport, model: str, tensor: str, unit: str) -> int:
    """Return the number of blocks of a candidate partition of a tensor."""
    table = report.evidence
    row = table[(table.model == model) & (table.tensor == tensor) & (table.unit == unit)]
    return int(row.n_blocks.iloc[0])


def z_of(report: HessianReport, model: str, tensor: str, unit: str, checkpoint: float) -> float:
    """Return the z-score of a candidate partition of a tensor at a checkpoint."""
    table = report.evidence
    row = table[
        (table.model == model) & (table.tensor == tensor) & (table.unit == unit) & (table.checkpoint == checkpoint)
    ]
    return float(row.z.iloc[0])


def _borders(n: int, blocks: int) -> list[int]:
    return [i * n // blocks for i in range(1, blocks)]


def _by_columns(matrix: np.ndarray, columns: int) -> np.ndarray:
    """Reorder a matrix's Hessian from row-major to column-major order, so that input neurons are contiguous."""
    order = np.arange(len(matrix)).reshape(-1, columns).T.ravel()
    return matrix[np.ix_(order, order)]


def query_key(report: HessianReport, out: Path) -> Caption:
    """Draw the blocks of query and key matrices with head borders, at every checkpoint."""
    figure, grid = plt.subplots(4, 3, figsize=(8.6, 11.2))
    for row, (model, role) in enumerate((m, r) for m in ("gpt", "llama") for r in ("QUERY", "KEY")):
        tensor = first_tensor(report, model, role)
        heads = blocks_of(report, model, tensor, "ATTENTION_HEAD")
        for axes, percent in zip(grid[row], PERCENTS, strict=True):
            matrix = report.arrays(f"hessian-{model}-{percent}")[f"block/{tensor}"]
            z = z_of(report, model, tensor, "ATTENTION_HEAD", percent / 100)
            label = f"{TITLES[model]}, {role_name(role)}, {percent} %: z = {z:.0f}"
            draw_matrix(axes, matrix, _borders(len(matrix), heads), label)
    save(figure, out, "01_query_key_heads")
    return Caption(
        "01_query_key_heads",
        "Queries and keys fall into heads",
        "|H| of one query and one key matrix (first layer) before, halfway through and after training. Rows and "
        "columns are the matrix's elements in row-major order; blue lines are the borders of the heads. During "
        "training the mass concentrates in the diagonal squares. z is its excess over random partitions of the same "
        "sizes, in standard deviations.",
    )


def rows_and_columns(report: HessianReport, out: Path, name: str, roles: tuple[str, ...], title: str) -> Caption:
    """Draw the blocks of some roles at the end of training, by rows and by columns."""
    figure, grid = plt.subplots(2 * len(roles), 2, figsize=(7.0, 6.4 * len(roles)), squeeze=False)
    for row, (model, role) in enumerate((m, r) for r in roles for m in ("gpt", "llama")):
        tensor = first_tensor(report, model, role)
        matrix = report.arrays(f"hessian-{model}-100")[f"block/{tensor}"]
        unit = "TOKEN" if role in ("TOKEN_EMBEDDING", "HEAD") else "OUT_NEURON"
        columns = blocks_of(report, model, tensor, "IN_NEURON")
        for axes, candidate, shown in (
            (grid[row, 0], unit, matrix),
            (grid[row, 1], "IN_NEURON", _by_columns(matrix, columns)),
        ):
            z = z_of(report, model, tensor, candidate, 1.0)
            what = {"TOKEN": "tokens", "OUT_NEURON": "rows"}.get(candidate, "columns")
            label = f"{TITLES[model]}, {role_name(role)} by {what}: z = {z:.0f}"
            draw_matrix(axes, shown, _borders(len(matrix), blocks_of(report, model, tensor, candidate)), label)
    save(figure, out, name)
    return Caption(
        name,
        title,
        "|H| at 100 % of training. Left: row-major order with the borders of the rows (output neurons or tokens). "
        "Right: the same entries in column-major order with the borders of the columns (input neurons). A z above 6 "
        "counts as structure; compare how much mass lies outside the squares.",
    )


def classifier(report: HessianReport, out: Path) -> Caption:
    """Draw the classifier's two matrices at three checkpoints."""
    table = report.evidence
    tensors = list(dict.fromkeys(table[table.model == "mlp"].tensor))[:2]
    figure, grid = plt.subplots(2, 3, figsize=(8.6, 5.9))
    for row, tensor in enumerate(tensors):
        for axes, percent in zip(grid[row], PERCENTS, strict=True):
            matrix = report.arrays(f"hessian-mlp-{percent}")[f"block/{tensor}"]
            z = z_of(report, "mlp", tensor, "OUT_NEURON", percent / 100)
            neurons = blocks_of(report, "mlp", tensor, "OUT_NEURON")
            draw_matrix(axes, matrix, _borders(len(matrix), neurons), f"{tensor}, {percent} %: z = {z:.0f}")
    save(figure, out, "05_mlp_classifier")
    return Caption(
        "05_mlp_classifier",
        "For comparison: a classifier with one hidden layer",
        "|H| of both matrices of an MLP that predicts the next character class, with the borders of its output "
        "neurons, at 0, 50 and 100 % of training.",
    )


def whole_model(report: HessianReport, out: Path) -> Caption:
    """Draw the full |H| and the block norms, exact and by probes."""
    figure, grid = plt.subplots(2, 3, figsize=(10.4, 6.6))
    for row, model in enumerate(("gpt", "llama")):
        arrays = report.arrays(f"hessian-{model}-100")
        picture = arrays["picture"]
        draw_matrix(grid[row, 0], picture, [], f"{TITLES[model]}: all of |H|, n = {int(arrays['sizes'].sum()):,}")
        grid[row, 0].set_xticks([])
        grid[row, 0].set_yticks([])
        area = np.outer(arrays["sizes"], arrays["sizes"])
        exact, probed = np.sqrt(arrays["norms_exact"] / area), np.sqrt(arrays["norms_mean"] / area)
        # First-order error propagation through the square root.
        error = 0.5 * arrays["norms_stderr"] / (area * np.maximum(probed, 1e-30))
        positive = exact[exact > 0]
        norm = LogNorm(float(np.quantile(positive, 0.02)), float(positive.max()))
        axes = grid[row, 1]
        image = axes.imshow(np.maximum(probed, norm.vmin or 0), norm=norm, cmap=MAP)
        axes.set_title("block norms by probes, root mean square entry")
        axes.set_xlabel("block, in parameter order")
        axes.grid(False)
        figure.colorbar(image, ax=axes, shrink=0.8)
        axes = grid[row, 2]
        axes.loglog(exact.ravel(), exact.ravel(), color=COLOURS[6], lw=0.8, label="equal")
        axes.errorbar(
            exact.ravel(),
            probed.ravel(),
            yerr=error.ravel(),
            fmt="o",
            ms=2.2,
            lw=0.5,
            color=COLOURS[0],
            label=f"{exact.size:,} blocks",
        )
        axes.set_xlabel("exact")
        axes.set_ylabel(f"probed ({report.report['settings']['norm_probes']} probes a block)")
        axes.legend()
    save(figure, out, "06_whole_model")
    return Caption(
        "06_whole_model",
        "The whole model, exactly and by probes",
        "Left: the exact |H| of all parameters, averaged into cells. Middle: root mean square entry of every block (an "
        "attention head, or a tensor without heads) from Rademacher probes, with one product per block and probe. This "
        "estimate scales to models whose Hessian does not fit in memory. Right: the estimates against the exact norms; "
        "bars are one standard error.",
    )
