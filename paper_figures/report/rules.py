"""The shipped rule sets: what every role shares, and the evidence of those that were derived."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis import rules
from paper_figures.report.figures import SYMBOLS, Figure, plot
from paper_figures.report.site import Pictures
from paper_figures.report.tables import Cell, Column, Table, number, text
from paper_figures.style import COLOURS, role_name

UNIT_NAMES = {
    "ELEMENT": "element",
    "TENSOR": "tensor",
    "ATTENTION_HEAD": "head",
    "OUT_NEURON": "row",
    "IN_NEURON": "column",
    "TOKEN": "token",
    "FACTORED": "rank one",
}
"""What shares a scalar, in a word: a row is an output neuron, a column an input neuron."""


def unit_name(unit: str) -> str:
    """Return a unit in a word."""
    return UNIT_NAMES.get(unit, unit.lower().replace("_", " "))


def units_table(sets: Mapping[str, dict[str, Any]]) -> Table:
    """Return one row per role and one column per rule set."""
    roles = list(dict.fromkeys(role for document in sets.values() for role in document["units"]))
    columns = [Column("role"), *(Column(name) for name in sets)]
    rows = [
        [text(role_name(role)), *(_unit(document["units"].get(role)) for document in sets.values())] for role in roles
    ]
    return Table("units", "What shares one scalar, per role and rule set.", columns, rows)


def _unit(unit: str | None) -> Cell:
    return Cell("–", None) if unit is None else text(unit_name(unit), f"unit unit-{unit.lower()}")


def evidence_table(sets: Mapping[str, dict[str, Any]]) -> Table:
    """Return all candidates of all rule sets that have evidence."""
    columns = [
        Column("rules", choose=True, code=True),
        Column("role", choose=True),
        Column("blocks are", choose=True),
        Column("taken", choose=True),
        *(
            Column(name, numeric=True)
            for name in ("z", "lift", "gap (nats)", "gap by chance", "blocks per parameter", "n")
        ),
    ]
    rows = []
    for name, document in sets.items():
        for row in rules.candidates(document).itertuples():
            cells = (
                number(row.z, ".1f"),
                number(row.lift, ".2f"),
                number(row.jensen, ".3f"),
                number(row.jensen_null, ".3f"),
            )
            rest = (number(row.blocks_per_parameter, ".4f"), number(row.n))
            taken = text("yes" if row.chosen else "no", "yes" if row.chosen else "")
            rows.append([text(name), text(role_name(row.role)), text(unit_name(row.unit)), taken, *cells, *rest])
    caption = (
        "Candidates of the rules that Hessians chose. z: standard deviations of the mass inside the blocks above "
        "random "
        "partitions; gap: "
        "Jensen gap of second moments; n: matrices over models and layers. Medians, no intervals: the models have one "
        "seed."
    )
    return Table("evidence", caption, columns, rows)


def unmeasured(sets: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return a sentence for every rule set with evidence: which roles have none, and what they take."""
    out = []
    for name, document in sets.items():
        choices = (document.get("evidence") or {}).get("choices", {})
        without = {
            role: choice.get("why", "not measured") for role, choice in choices.items() if not choice.get("candidates")
        }
        if without:
            roles = ", ".join(map(role_name, without))
            out.append(f"Roles of {name} without candidates: {roles} ({'; '.join(dict.fromkeys(without.values()))}).")
    return out


def evidence(sets: Mapping[str, dict[str, Any]]) -> Pictures:
    """Return a figure of the candidates per rule set and role."""
    pictures = Pictures("rules", ("rules", "role"))
    for name, document in sets.items():
        found = rules.candidates(document)
        for role, rows in found.groupby("role", sort=False):
            pictures.add((name, role_name(str(role))), "rules", _figure(rows))
        for role, rows in rules.trained(document).groupby("role", sort=False):
            pictures.add((name, role_name(str(role))), "rules", _trained(rows))
    return pictures


def trained_table(sets: Mapping[str, dict[str, Any]]) -> Table:
    """Return all candidates of the rule sets that training runs chose."""
    found = {name: rules.trained(document) for name, document in sets.items()}
    pairs = list(dict.fromkeys(pair for rows in found.values() for gaps in rows.gaps for pair in gaps))
    columns = [Column("rules", choose=True, code=True), Column("role", choose=True), Column("unit", choose=True)]
    columns += [Column("taken", choose=True), Column("scalars", numeric=True), Column("worst gap", numeric=True)]
    rows = [
        [
            text(name),
            text(role_name(row.role)),
            text(unit_name(row.unit)),
            text("yes" if row.chosen else "no", "yes" if row.chosen else ""),
            number(row.scalars),
            number(row.worst, "+.4f"),
            *(number(row.gaps.get(pair, math.nan), "+.4f") for pair in pairs),
        ]
        for name, candidates in found.items()
        for row in candidates.itertuples()
    ]
    caption = (
        "Candidates of the rules that training runs chose, which change one role at a time: final loss minus AdamW's "
        "in nats, "
        "means over the seeds and rates of the role study, which has their intervals (docs/role_study.md)."
    )
    return Table("trained", caption, [*columns, *(Column(pair, numeric=True) for pair in pairs)], rows)


def _trained(rows: pd.DataFrame) -> Figure:
    """Plot the gaps of every candidate of a role, a marker for each pair of model and corpus."""
    pairs = list(dict.fromkeys(pair for gaps in rows.gaps for pair in gaps))
    names = [
        f"{unit_name(unit)}{' (taken)' if chosen else ''}" for unit, chosen in zip(rows.unit, rows.chosen, strict=True)
    ]
    traces = [
        go.Scatter(
            x=[gaps.get(pair) for gaps in rows.gaps], y=names, mode="markers", name=pair,
            marker={"size": 11, "symbol": symbol, "color": colour}, customdata=rows.scalars.tolist(),
            hovertemplate=f"<b>%{{y}}</b>, {pair}<br>gap %{{x:+.4f}} nats<br>%{{customdata:,}} scalars<extra></extra>",
        )
        for pair, symbol, colour in zip(pairs, SYMBOLS, COLOURS, strict=False)
    ]  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "final loss minus AdamW's (nats)"}, "zeroline": True},
        "yaxis": {"autorange": "reversed", "type": "category", "categoryarray": names},
        "height": 190 + 45 * len(rows),
    }
    taken = rows[rows.chosen]
    unit = unit_name(taken.unit.iloc[0]) if len(taken) else "none of these"
    return Figure(
        plot(traces, **layout),
        f"The gap of every candidate in training runs; taken: {unit}.",
        f"Training runs that change this role alone, n = {len(pairs)} pairs of model and corpus; each marker is a "
        f"mean over seeds "
        "and rates, whose intervals are in docs/role_study.md. A candidate without a marker is AdamW itself.",
    )


def _figure(rows: pd.DataFrame) -> Figure:
    """Plot the gap of every candidate of a role beside that of random partitions."""
    names = [unit_name(unit) for unit in rows.unit]
    colours = [COLOURS[1] if chosen else COLOURS[5] for chosen in rows.chosen]
    custom = rows[["z", "lift", "n", "blocks_per_parameter"]].to_numpy().tolist()
    hover = (
        "<b>%{y}</b>: gap %{x:.4f} nats<br>z = %{customdata[0]:.1f}, lift %{customdata[1]:.2f}<br>"
        "%{customdata[3]:.4f} blocks per parameter, n = %{customdata[2]} matrices<extra></extra>"
    )
    traces = [
        go.Bar(
            x=rows.jensen.tolist(), y=names, orientation="h", marker={"color": colours}, customdata=custom,
            hovertemplate=hover, name="candidate", width=0.6, showlegend=False,
        ),
        go.Scatter(
            x=rows.jensen_null.tolist(), y=names, mode="markers", name="random blocks of the same sizes",
            marker={"symbol": "line-ns-open", "size": 22, "color": "#000000", "line": {"width": 3}},
            hovertemplate="random blocks: %{x:.4f} nats<extra></extra>",
        ),
        go.Bar(x=[None], y=[names[0]], marker={"color": COLOURS[1]}, name="taken", orientation="h"),
        go.Bar(x=[None], y=[names[0]], marker={"color": COLOURS[5]}, name="not taken", orientation="h"),
    ]  # fmt: skip
    taken = rows[rows.chosen]
    unit = unit_name(taken.unit.iloc[0]) if len(taken) else "none of these"
    layout = {
        "xaxis": {"title": {"text": "Jensen gap of second moments (nats)"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "type": "category"},
        "barmode": "overlay",
        "height": 150 + 55 * len(rows),
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
    }
    return Figure(
        plot(traces, **layout),
        f"The gap of every candidate; taken: {unit}.",
        f"{rows.why.iloc[0][0].upper()}{rows.why.iloc[0][1:]} n = {int(rows.n.max())} matrices.",
    )
