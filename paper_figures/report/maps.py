"""The explorer of Hessian maps: tiny models from their exact |H|, and a real language model from probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis import hessian_maps, real_model
from analysis.hessian_maps import COLUMNS, order_of
from analysis.real_model import BlockMap, Study
from paper_figures.maps import TITLES
from paper_figures.real_model_tables import NOTE, short
from paper_figures.report.figures import Figure, plot
from paper_figures.report.rules import unit_name
from paper_figures.report.site import Pictures, file_name
from paper_figures.style import role_name

SCALE = "Magma"
BORDER = "#7fd7ff"
HEIGHT = 620
MOST_ZOOMS = 16
REAL_MODEL = "SmolLM2-135M"
MATRIX_NAMES = {"H": "Hessian", "G": "Gauss-Newton"}


def pictures(tiny: Mapping[str, Any], real: Study | None = None) -> Pictures:
    """Return all maps: model, checkpoint, matrix and candidate partition lead to one.

    Args:
        tiny: document of ``analysis.hessian_maps``.
        real: the study of the real model, if it is shown.
    """
    out = Pictures("maps", ("model", "checkpoint", "matrix", "blocks are"))
    for entry in tiny["maps"]:
        _add_tiny(out, tiny, entry)
        if entry["role"] == "QUERY" and entry["checkpoint"] == 1 and not out.first:
            out.first = next((i.choice for i in out.index[::-1] if i.choice[-1] == "head"), ())
    if real is not None:
        for matrix, name, blocks, probes in _real_maps(real):
            choice = (REAL_MODEL, f"{MATRIX_NAMES[matrix]}, as published", name, "as probed")
            out.add(choice, "maps-real", _real(blocks, f"{MATRIX_NAMES[matrix]}: {name}", probes))
    return out


def _add_tiny(out: Pictures, tiny: Mapping[str, Any], entry: Mapping[str, Any]) -> None:
    """Add the maps of one matrix at one checkpoint, one for each candidate; maps of equal order share their levels."""
    file = file_name("maps", entry["model"])
    for order in entry["orders"]:
        found = hessian_maps.read(dict(entry), order)
        out.levels.setdefault(file, {})[_key(entry, order)] = {**entry["orders"][order], "levels": _plain(found.levels)}
    parameters = tiny["subjects"][entry["model"]]["parameters"]
    model = f"{TITLES[entry['model']]} ({parameters:,} parameters)"
    matrix = f"{entry['tensor'].removeprefix('transformer.').replace('.weight', '')} ({role_name(entry['role'])})"
    for candidate in entry["candidates"]:
        choice = (model, f"{100 * entry['checkpoint']:.0f} % of training", matrix, unit_name(candidate["unit"]))
        out.add(choice, file, _tiny(tiny, entry, candidate, " ".join(choice[:3])))


def _key(entry: Mapping[str, Any], order: str) -> str:
    return f"{entry['checkpoint']}|{entry['tensor']}|{order}"


def _plain(levels: np.ndarray) -> str:
    """Return levels as two hexadecimal digits each: the page reads them without a library."""
    return levels.tobytes().hex()


def _tiny(tiny: Mapping[str, Any], entry: Mapping[str, Any], candidate: Mapping[str, Any], what: str) -> Figure:
    """Draw |H| of one matrix with the borders of a candidate; the page fills in the map's values."""
    order = order_of(candidate["unit"])
    if order not in entry["orders"]:
        order = next(iter(entry["orders"]))
    stored = entry["orders"][order]
    n, blocks = stored["n"], int(candidate["n_blocks"])
    has_blocks = candidate["unit"] not in ("TENSOR", "FACTORED")
    step = n / stored["cells"]
    heat = go.Heatmap(
        x0=step / 2, dx=step, y0=step / 2, dy=step, colorscale=SCALE, zmin=stored["low"], zmax=stored["high"],
        colorbar=_colour_bar(stored["low"], stored["high"]),
        hovertemplate="element %{y:.0f} and element %{x:.0f}<br>block %{customdata[1]} and block %{customdata[2]}<br>"
        "|H| = %{customdata[0]:.3e}<extra></extra>",
    )  # fmt: skip
    borders = [i * n // blocks for i in range(1, blocks)] if has_blocks else []
    document = plot([heat], shapes=_borders(borders, 0, n, 1 if len(borders) <= 40 else 0.5), **_square(0, n))
    document["data"][0] |= {"levels": _key(entry, order), "blocks": blocks if has_blocks else 1}
    settings = tiny["settings"]
    tokens = settings["hessian_batches"] * settings["batch"] * settings["seq_len"]
    layout = "column by column" if order == COLUMNS else "row by row"
    borders_shown = "Blue: borders of the blocks. " if borders else ""
    caption = (
        f"Colour: |H| of {n:,} elements, laid out {layout} and averaged into {stored['cells']} x {stored['cells']} "
        f"cells; exact, over {tokens} tokens. {borders_shown}z is against {settings['permutations']} random partitions "
        f"of the same sizes. n = 1 model, seed {settings['seed']}."
    )
    blocks_shown = min(blocks, MOST_ZOOMS) if has_blocks else 0
    zooms = [(f"block {i + 1} of {blocks}", (i * n / blocks, (i + 1) * n / blocks)) for i in range(blocks_shown)]
    name = unit_name(candidate["unit"])
    alt = f"Map of |H| of {what}, blocks are {name}s: z {candidate['z']:.1f}, lift {candidate['lift']:.2f}."
    return Figure(
        document, alt, caption, _facts(candidate, has_blocks), [("whole matrix", (0, n)), *zooms], square=True
    )


def _facts(candidate: Mapping[str, Any], has_blocks: bool) -> list[tuple[str, str]]:
    """Return the numbers of a candidate."""
    gap = [("gap of v", f"{candidate['jensen']:.3f} nats")]
    if not has_blocks:
        return [("blocks", "no partition of |H|"), *gap]
    return [
        ("z", f"{candidate['z']:.1f}"),
        ("lift", f"{candidate['lift']:.2f}"),
        ("|H| inside the blocks", f"{100 * candidate['mass_inside']:.1f} %"),
        ("by chance", f"{100 * candidate['expected']:.1f} %"),
        ("blocks", f"{int(candidate['n_blocks']):,}"),
        *gap,
        ("gap by chance", f"{candidate['jensen_null']:.3f} nats"),
    ]


def _real_maps(study: Study) -> list[tuple[str, str, BlockMap, int]]:
    """Return (H or G, name, map, probes of each block) of all maps of the real model."""
    out = []
    for matrix in "HG":
        document = study.one("columns", matrix=matrix)
        found = None if document is None else real_model.layer_map(document)
        if found is not None:
            out.append((matrix, "embedding and layers", found.blocks(), found.probes))
        for kind in ("heads", "neurons", "tokens"):
            for document in study.of(kind, matrix=matrix):
                name = "tokens of the embedding" if kind == "tokens" else f"{kind} of {document['task']['target']}"
                out.append((matrix, name, real_model.block_map(document), document["settings"]["map_probes"]))
    return out


def _real(found: BlockMap, what: str, probes: int) -> Figure:
    """Draw the root mean square entries of the blocks, with their standard errors on hover."""
    rms = found.rms
    error = 0.5 * rms * found.stderr / np.maximum(found.mean, 1e-300)  # first order, through the square root
    top = float(rms.max())
    low = max(float(np.quantile(rms[rms > 0], 0.02)), top * 1e-5)
    labels = [short(label) for label in found.labels]
    heat = go.Heatmap(
        z=np.log10(np.maximum(rms, low)).round(3).tolist(), x0=0.5, dx=1, y0=0.5, dy=1,
        zmin=float(np.log10(low)), zmax=float(np.log10(top)), colorscale=SCALE,
        customdata=[
            [[row, column, f"{rms[i, j]:.2e}", f"{error[i, j]:.0e}"] for j, column in enumerate(labels)]
            for i, row in enumerate(labels)
        ],
        colorbar=_colour_bar(float(np.log10(low)), float(np.log10(top))),
        hovertemplate="%{customdata[0]} and %{customdata[1]}<br>%{customdata[2]} ± %{customdata[3]} (standard error)"
        "<extra></extra>",
    )  # fmt: skip
    starts = _group_starts(found.labels)
    n = len(labels)
    groups = [(name, (start, end)) for name, start, end in starts if end - start > 1] if len(starts) > 1 else []
    middle = [((start + end) / 2, _group_name(name, end - start)) for name, start, end in starts]
    ticks = {"tickvals": [place for place, _ in middle], "ticktext": [name for _, name in middle]}
    layout = _square(0, n)
    layout["yaxis"] |= ticks
    layout["xaxis"] |= {"showticklabels": False}
    document = plot([heat], shapes=_borders([start for _, start, _ in starts if start], 0, n, 1), **layout)
    caption = (
        f"Colour: root mean square entry of every block, n = {probes} probes each; hover shows one standard error. "
        + NOTE
    )
    contrast = found.contrast(range(n))
    facts = [
        ("blocks", f"{n} x {n}"),
        ("diagonal over the rest, root mean square", f"{contrast.value:.2f} ± {contrast.half:.2f} (95 %)"),
    ]
    zooms = [("whole map", (0.0, float(n))), *((_group_name(name, 2), (float(a), float(b))) for name, (a, b) in groups)]
    return Figure(document, f"Map of block norms. {what}.", caption, facts, zooms, square=True)


def _group_starts(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (name, start, end) of runs of labels that differ only in the number at their end."""
    names = [
        name if number.isdigit() and name else label for label in labels for name, _, number in [label.rpartition(" ")]
    ]
    starts = [i for i in range(len(names)) if i == 0 or names[i] != names[i - 1]]
    return [(names[i], i, end) for i, end in zip(starts, [*starts[1:], len(names)], strict=True)]


def _group_name(name: str, count: int) -> str:
    if name == "layer":
        return "layers"
    return role_name(name) if name.isupper() else short(name)


def _square(low: float, high: float) -> dict[str, Any]:
    """Return the layout of a square map whose first row is at the top."""
    axis = {"range": [low, high], "showgrid": False, "zeroline": False, "constrain": "domain"}
    return {
        "xaxis": dict(axis),
        "yaxis": {**axis, "range": [high, low], "scaleanchor": "x"},
        "height": HEIGHT,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
    }


def _borders(borders: Sequence[int], low: float, high: float, width: float) -> list[dict[str, Any]]:
    """Return all borders as one shape."""
    if not borders:
        return []
    path = " ".join(f"M {b} {low} V {high} M {low} {b} H {high}" for b in borders)
    return [{"type": "path", "path": path, "line": {"color": BORDER, "width": width}}]


def _colour_bar(low: float, high: float) -> dict[str, Any]:
    """Return a horizontal colour bar below the map, with a label per decade of log10."""
    decades = list(range(int(np.ceil(low)), int(np.floor(high)) + 1))
    values: list[float] = list(decades)
    texts = [f"10<sup>{decade}</sup>" for decade in decades]
    if len(decades) < 2:
        inset = 0.02 * (high - low)  # Labels on the very end are dropped.
        values = [low + inset, (low + high) / 2, high - inset]
        texts = [f"{10**value:.1e}" for value in values]
    return {
        "orientation": "h", "y": -0.08, "yanchor": "top", "thickness": 12, "len": 280, "lenmode": "pixels",
        "tickvals": values, "ticktext": texts,
    }  # fmt: skip
