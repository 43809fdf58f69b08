"""Style that all figures share."""

from __future__ import annotations

import io
import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's colours can be told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
ARM_COLOURS = dict(
    zip(
        (
            "elementwise",
            "adam_mini",
            "short_run",
            "slim_adam",
            "derived",
            "permuted",
            "pytorch_default",
            "factored",
            "derived_blocks",
        ),
        ("#000000", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#8B4513", "#808080"),
        strict=True,
    )
)
ROLE_COLOURS = (*COLOURS, "#8B4513", "#808080")
MAP = "magma"


def role_name(role: str) -> str:
    """Return a role in words. HEAD becomes "output layer", so that it is not mistaken for an attention head."""
    return "output layer" if role == "HEAD" else role.lower().replace("_", " ")


def setup() -> None:
    """Set fonts, sizes and grids."""
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 130,
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.labelsize": 9,
            "legend.fontsize": 8,
            "xtick.labelsize": 8,
            "ytick.labelsize": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "figure.constrained_layout.use": True,
            "legend.frameon": False,
            "svg.hashsalt": "fixed",
            "pdf.compression": 9,
        }
    )


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write a figure as PNG and PDF, each atomically, and return the path of the PNG.

    The figure is laid out once, at the resolution of the PNG. With a layout engine left, even one that does nothing,
    matplotlib would draw the figure a second time for each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    engine = figure.get_layout_engine()
    if engine is not None:
        figure.set_dpi(plt.rcParams["savefig.dpi"])
        engine.execute(figure)
    # With the setting on, both calls below would give the figure an engine again.
    with plt.rc_context({"figure.constrained_layout.use": False}):
        figure.set_layout_engine(None)
        for suffix in ("png", "pdf"):
            temporary = folder / f".{name}.{os.getpid()}.{suffix}"
            figure.savefig(temporary, metadata={"CreationDate": None} if suffix == "pdf" else None)
            os.replace(temporary, folder / f"{name}.{suffix}")
    plt.close(figure)
    return folder / f"{name}.png"


def webp(path: Path, *, quality: int = 60) -> bytes:
    """A saved picture as lossy WebP of the same size.

    Pictures of |H| are close to noise, which PNG cannot compress; WebP needs about a quarter of the bytes.
    """
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def draw_matrix(axes: Axes, matrix: np.ndarray, borders: list[int], title: str, *, cells: int = 256) -> None:
    """Draw |H| with the borders of a partition.

    The colour scale is logarithmic and covers three decades below the 99.9th percentile.

    Args:
        axes: where to draw.
        matrix: [n, n], entries of |H|.
        borders: indices at which a block begins.
        title: title of the axes.
        cells: a larger matrix is averaged down to this many cells per side.
    """
    n = len(matrix)
    if n > cells and n % cells == 0:
        matrix = matrix.reshape(cells, n // cells, cells, n // cells).mean((1, 3))
    top = float(np.quantile(matrix, 0.999)) or 1.0
    axes.imshow(
        np.maximum(matrix, top * 1e-3),
        norm=LogNorm(top * 1e-3, top),
        cmap=MAP,
        extent=(0, n, n, 0),
        interpolation="nearest",
    )
    width = 0.9 if len(borders) <= 40 else 0.35
    for border in borders:
        axes.axhline(border, color="#7fd7ff", lw=width)
        axes.axvline(border, color="#7fd7ff", lw=width)
    axes.set_title(title)
    axes.grid(False)
    axes.set_xticks([0, n])
    axes.set_yticks([0, n])
    for spine in axes.spines.values():
        spine.set_visible(True)
