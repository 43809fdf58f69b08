"""Structure of |H| along training and across models, with intervals over seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import paper_hessian
from analysis.paper_hessian import models
from analysis.stats import t_interval
from paper_figures.report.figures import Figure, errors, looks, plot
from paper_figures.report.rules import unit_name
from paper_figures.report.site import Pictures
from paper_figures.style import role_name

PART = "structure"
COMMAND = "python -m experiments.studies.paper_hessian --only structure"
Z, LIFT = "z of every partition", "lift along training"


def pictures(folder: Path) -> Pictures | None:
    """Return the figures; None if this part of the study has no results yet.

    Raises:
        FileNotFoundError: the study's folder does not exist.
        ValueError: the file is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; restore it from the repository, or run `make paper-hessian`")
    if not (folder / f"{PART}.json").is_file():
        return None
    results = paper_hessian.load(folder, PART)
    table = models.structure(results)
    table = table[table.unit != "TENSOR"]
    out = Pictures("structure", ("model", "shown"))
    for variant, rows in table.groupby("variant", sort=False):
        out.add((str(variant), Z), PART, _map(rows, results.settings))
        if rows.checkpoint.nunique() > 1:
            out.add((str(variant), LIFT), PART, _lifts(rows))
    return out


def _label(partition: str) -> str:
    role, unit = partition.split("/")
    return f"{role_name(role)} by {unit_name(unit)}"


def _map(rows: pd.DataFrame, settings: dict[str, object]) -> Figure:
    """Draw mean z over seeds: a row per partition, a column per checkpoint."""
    partitions, checkpoints = list(dict.fromkeys(rows.partition)), sorted(rows.checkpoint.unique())
    cells = dict(list(rows.groupby(["partition", "checkpoint"])))
    means = np.full((len(partitions), len(checkpoints)), np.nan)
    hover: list[list[str]] = []
    for i, partition in enumerate(partitions):
        hover.append([])
        for j, checkpoint in enumerate(checkpoints):
            group = cells[partition, checkpoint]
            z, lift = t_interval(group.z.tolist()), t_interval(group.lift.tolist())
            means[i, j] = z.mean
            ends = f" ± {z.half:.1f}" if z.n > 1 else "", f" ± {lift.half:.2f}" if lift.n > 1 else ""
            hover[-1].append(f"z = {z.mean:.1f}{ends[0]}<br>lift {lift.mean:.2f}{ends[1]}<br>n = {z.n} seeds")
    top = float(np.abs(np.arcsinh(means / 6)).max())
    columns = [f"{100 * checkpoint:.0f} %" for checkpoint in checkpoints]
    heat = go.Heatmap(
        # The inverse hyperbolic sine is linear up to the gate at 6 and logarithmic above.
        z=np.arcsinh(means / 6).round(3).tolist(), x=columns, y=[_label(p) for p in partitions],
        text=[[f"{value:.0f}" for value in row] for row in means], texttemplate="%{text}", textfont={"size": 10},
        customdata=hover, hovertemplate="%{y}, %{x}<br>%{customdata}<extra></extra>",
        colorscale="RdBu", reversescale=True, zmin=-top, zmax=top, showscale=False,
    )  # fmt: skip
    seeds = rows.seed.nunique()
    return Figure(
        plot(
            [heat],
            xaxis={"title": {"text": "share of training"}, "type": "category", "side": "top"},
            yaxis={"autorange": "reversed", "type": "category"},
            height=110 + 28 * len(partitions),
        ),
        "Mean z of every partition at every checkpoint.",
        f"Mean over n = {seeds} seeds of z against {settings.get('permutations')} random partitions of the same sizes; "
        "above 6 counts as structure. Hover shows 95 % t-intervals over seeds. Compare along a row, not between rows.",
    )


def _lifts(rows: pd.DataFrame) -> Figure:
    """Plot the lift of every partition against the share of training."""
    partitions = list(dict.fromkeys(rows.partition))
    drawn, traces = looks(partitions), []
    for partition in partitions:
        points = rows[rows.partition == partition].groupby("checkpoint").lift
        found = {checkpoint: t_interval(lifts.tolist()) for checkpoint, lifts in points}
        look = drawn[partition]
        traces.append(
            go.Scatter(
                x=[100 * checkpoint for checkpoint in found],
                y=[value.mean for value in found.values()],
                error_y=errors([value.half if value.n > 1 else None for value in found.values()]),
                customdata=[[f"± {value.half:.2f}" if value.n > 1 else "", value.n] for value in found.values()],
                hovertemplate=f"{_label(partition)}<br>%{{x:.0f}} % of training<br>lift %{{y:.2f}} "
                f"%{{customdata[0]}}<br>"
                "n = %{customdata[1]} seeds<extra></extra>",
                name=_label(partition),
                mode="lines+markers",
                line={"color": look.colour, "dash": look.dash, "width": 1.5},
                marker={"symbol": look.symbol, "size": 7},
                visible=True if partition.startswith(("QUERY", "VALUE", "MLP_IN")) else "legendonly",
            )
        )
    return Figure(
        plot(
            traces,
            xaxis={"title": {"text": "% of training"}},
            yaxis={
                "title": {"text": "lift: mass inside over mass by chance"},
                "type": "log",
                "tickvals": [0.25, 0.5, 1, 2, 4, 8, 16],
            },
            height=640,
        ),
        "Lift of the partitions along training.",
        f"Mean and 95 % t-interval over n = {rows.seed.nunique()} seeds; 1 is chance. Click in the legend for more "
        f"partitions.",
    )
