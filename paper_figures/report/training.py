"""Training studies: tables, learning rates, conditions, Pareto fronts and curves of every folder of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analysis import studies
from analysis.stats import Interval
from analysis.studies import Study
from paper_figures.report.figures import Figure, errors, label, log_axis, looks, plot
from paper_figures.report.site import Pictures, file_name
from paper_figures.report.tables import Cell, Column, Table, interval, number, text

TITLES = {
    "ablation_cpu": "Which parameters share a scalar",
    "carry_over_cpu": "Another architecture and corpus",
    "statistics_cpu": "Other numbers of a block than its mean",
    "rivals_cpu": "Optimizers of other authors",
    "record_cpu": "Learning rate, warm-up and clipping",
}
"""Headings of the studies that have a page; any other folder is named by its own name."""
BEST, EVERY = "each arm at its best rate", "every learning rate"
ALL, SECOND = "all optimizer state", "second moments only"
PAIRED = "paired by seed, 95 % t-interval"
UNCORRECTED = "Better and worse: the interval excludes 0, without a correction for the number of arms."
"""The headline's verdicts are corrected; docs/suite.md has them."""


@dataclass(frozen=True)
class Section:
    """What the page shows of one study.

    Attributes:
        study: the study.
        title: its heading.
        facts: what all of its runs share, in a sentence.
        best: table of every arm at its best rate.
        every: table of every learning rate.
    """

    study: Study
    title: str
    facts: str
    best: Table
    every: Table


def title(name: str) -> str:
    """Return the heading of a study's folder."""
    return TITLES.get(name) or name.removesuffix("_cpu").replace("_", " ").capitalize()


def subject(study: Study) -> str:
    """Return what was trained on what, such as "Llama, python-stdlib"."""
    kind = str(study.shared.get("model.kind", "several models")).removesuffix("Config")
    return f"{kind}, {study.shared.get('data', 'several corpora')}"


def sections(found: Sequence[Study]) -> list[Section]:
    """Return the tables of every study."""
    out = []
    for study in found:
        rows = studies.table(study)
        best, every = _tables(study, rows)
        out.append(Section(study, title(study.name), facts(study), best, every))
    return out


def facts(study: Study) -> str:
    """Return what the runs of a study share, and what varies, in a few sentences."""
    runs, shared = study.runs, study.shared
    sizes = sorted(runs.parameters.unique())
    size = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
    kind = str(shared.get("model.kind", "models of several kinds")).removesuffix("Config")
    sentences = [f"{len(runs)} runs: {kind}, {size} parameters"]
    for key, words in (
        ("data", "data {}"),
        ("steps", "{} steps"),
        ("batch", "batches of {}"),
        ("seq_len", "x {} bytes"),
    ):
        if key in shared:
            sentences[0] += f"{' ' if words[0] == 'x' else ', '}{words.format(shared[key])}"
    seeds = runs.groupby(["condition", "arm", "lr"]).size()
    few, many = int(seeds.min()), int(seeds.max())
    sentences.append(f"n = {few} seeds" if few == many else f"n = {few} to {many} seeds")
    if study.varied:
        varied = "; ".join(f"{key.removeprefix('model.')} {', '.join(map(str, v))}" for key, v in study.varied.items())
        sentences.append(f"{len(study.conditions)} conditions: {varied}. Arms are compared within a condition")
    if study.left_out:
        left = ", ".join(f"{count} {state}" for state, count in study.left_out.items())
        sentences.append(f"Incomplete, left out: {left}")
    if study.baseline is None:
        sentences.append("No arm is AdamW, so there are no differences")
    return ". ".join(sentences) + "."


def _tables(study: Study, rows: pd.DataFrame) -> tuple[Table, Table]:
    """Return the table of best rates, ordered by loss, and that of all rates."""
    conditions = [Column("condition", choose=True)] if study.varied else []
    tail = [Column(name, numeric=True) for name in ("diverged", "second moments", "state bytes per parameter")]
    head = [*conditions, Column("arm", choose=True, code=True)]
    loss = Column("final loss (nats)", numeric=True)
    n = Column("n", numeric=True)
    best = Table(
        f"best-{study.name}",
        f"{title(study.name)}: each arm at its best learning rate. Final validation loss, mean ± half its 95 % "
        f"t-interval; "
        f"difference to AdamW at its own best rate, {PAIRED}. {UNCORRECTED}",
        [
            *head,
            Column("best rate", numeric=True),
            loss,
            Column("minus AdamW", numeric=True),
            Column("differs"),
            n,
            *tail,
        ],
        [_best_row(study, row) for _, row in rows[rows.best].sort_values("loss", key=_mean).iterrows()],
    )
    every = Table(
        f"every-{study.name}",
        f"{title(study.name)}: every learning rate. Difference to AdamW at the same rate, {PAIRED}. {UNCORRECTED}",
        [
            *head,
            Column("learning rate", numeric=True, choose=True),
            loss,
            Column("minus AdamW", numeric=True),
            n,
            tail[0],
        ],
        [_every_row(study, row) for _, row in rows.iterrows()],
    )
    return best, every


def _mean(losses: pd.Series) -> pd.Series:
    return losses.map(lambda loss: loss.mean if loss else np.inf)


def _begin(study: Study, row: pd.Series) -> list[Cell]:
    return [*([text(row.condition)] if study.varied else []), text(row.arm)]


def _best_row(study: Study, row: pd.Series) -> list[Cell]:
    difference: Interval | None = row.at_best
    apart = difference is not None and difference.excludes_zero
    kind = ("no" if difference.mean > 0 else "yes") if difference is not None and apart else ""
    verdict = "–" if difference is None else verdict_of(difference)
    return [
        *_begin(study, row),
        number(row.lr, "g"),
        interval(row.loss, missing="diverged"),
        interval(difference, "+.4f", row.why or "–", kind),
        text(verdict, kind),
        number(row.n),
        number(row.diverged),
        number(row.scalars),
        number(row.state_bytes / row.parameters, ".4f"),
    ]


def _every_row(study: Study, row: pd.Series) -> list[Cell]:
    kind = (
        "" if row.difference is None or not row.difference.excludes_zero else "no" if row.difference.mean > 0 else "yes"
    )
    loss, difference = interval(row.loss, missing="diverged"), interval(row.difference, "+.4f", row.why or "–", kind)
    return [*_begin(study, row), number(row.lr, "g"), loss, difference, number(row.n), number(row.diverged)]


def verdict_of(difference: Interval) -> str:
    """Return what an interval of a difference of losses says."""
    if not difference.excludes_zero:
        return "not told apart"
    return "worse" if difference.mean > 0 else "better"


# -------------------------------------------------------------------------------------------------------- figures


def differences(found: Sequence[Study]) -> Pictures:
    """Return the differences to AdamW: by learning rate for every condition, and across conditions."""
    pictures = Pictures("differences", ("study", "shown"))
    for study in (study for study in found if study.baseline is not None):
        rows = studies.table(study)
        if not study.varied:
            pictures.add((title(study.name), BEST), _file(study), _each_at_best(study, rows[rows.best]))
        for condition in study.conditions:
            shown = f"by learning rate: {condition}" if condition else "by learning rate"
            pictures.add((title(study.name), shown), _file(study), _by_rate(study, rows[rows.condition == condition]))
        if study.varied:
            pictures.add((title(study.name), "across conditions"), _file(study), _across(study, rows[rows.best]))
    return pictures


def _file(study: Study) -> str:
    return file_name("study", study.name)


def _interval_of(seeds: Sequence[int]) -> str:
    """Return in words what the error bars are; a single seed has none."""
    if list(seeds) == [1]:
        return "paired by seed, n = 1 seed, so without an interval"
    return f"{PAIRED}, n = {' or '.join(map(str, seeds))} seeds"


def _by_rate(study: Study, rows: pd.DataFrame) -> Figure:
    """Plot the paired difference at each learning rate."""
    rates = sorted(rows.lr.unique())
    axis = log_axis("learning rate") | {"tickvals": rates, "ticktext": [f"{lr:g}" for lr in rates]}
    return _difference_plot(rows, "lr", "difference", axis, "at the same learning rate")


def _each_at_best(study: Study, rows: pd.DataFrame) -> Figure:
    """Plot the paired difference of every arm at its best rate, lowest first."""
    paired = rows[[value is not None for value in rows.at_best]]
    order = sorted(paired.arm, key=lambda arm: paired.set_index("arm").at_best[arm].mean)
    axis = {"title": {"text": "arm"}, "type": "category", "categoryorder": "array", "categoryarray": order}
    return _difference_plot(rows, "arm", "at_best", axis, "each at its best rate")


def _across(study: Study, rows: pd.DataFrame) -> Figure:
    """Plot the paired difference in each condition, each arm at its best rate."""
    axis = {"title": {"text": "condition"}, "type": "category"}
    return _difference_plot(rows, "condition", "at_best", axis, "each at its best rate")


def _difference_plot(rows: pd.DataFrame, x: str, column: str, axis: dict[str, Any], how: str) -> Figure:
    traces, drawn = [], looks(sorted(rows.arm.unique()))
    arms = sorted(rows.arm.unique())
    for arm, group in rows.groupby("arm"):
        group = group[[value is not None for value in group[column]]]
        if group.empty:
            continue
        values = list(group[column])
        # Side by side, so that the error bars of arms do not hide each other.
        aside = 1.02 ** (arms.index(arm) - len(arms) / 2) if x == "lr" else 1
        look = drawn[str(arm)]
        traces.append(
            go.Scatter(
                x=(group[x] * aside).tolist(),
                y=[value.mean for value in values],
                error_y=errors([value.half if np.isfinite(value.half) else None for value in values]),
                customdata=[
                    [
                        f"± {v.half:.4f}" if np.isfinite(v.half) else "",
                        v.n,
                        f"{where}<br>" if x == "condition" else "",
                        lr,
                    ]
                    for v, where, lr in zip(values, group[x], group.lr, strict=True)
                ],
                hovertemplate=f"{arm}<br>%{{customdata[2]}}learning rate %{{customdata[3]}}<br>"
                "%{y:+.4f} %{customdata[0]} nats<br>n = %{customdata[1]}<extra></extra>",
                name=label(str(arm)),
                mode="lines+markers",
                line={"color": look.colour, "dash": look.dash},
                marker={"symbol": look.symbol, "size": 9},
            )
        )
    layout = {"yaxis": {"title": {"text": "final loss minus AdamW's (nats)"}, "zeroline": True}}
    seeds = sorted({value.n for value in rows[column] if value is not None})
    return Figure(
        plot(traces, xaxis=axis, **layout, height=480),
        f"Final loss of every arm minus AdamW's, {how}.",
        f"Final validation loss minus AdamW's {how}, {_interval_of(seeds)}. AdamW is the line at "
        "0. Arms without a pair, or with a diverged run, have no point.",
    )


def pareto(found: Sequence[Study]) -> Pictures:
    """Return memory against final loss, for every study, condition and kind of memory."""
    pictures = Pictures("pareto", ("study", "condition", "memory"))
    for study in found:
        rows = studies.table(study)
        for condition in study.conditions:
            chosen = rows[(rows.condition == condition) & rows.best & rows.loss.notna()]
            # Some arms keep no second moment, for which a logarithmic axis has no place.
            for memory in (ALL,) if (chosen.scalars == 0).any() else (SECOND, ALL):
                pictures.add((title(study.name), condition or "one", memory), _file(study), _front(chosen, memory))
    return pictures


def _front(rows: pd.DataFrame, memory: str) -> Figure:
    """Plot the arms of one condition, each at its best rate, and the Pareto front through the best of them."""
    if memory == SECOND:
        rows = rows[rows.scalars > 0]  # The axis is logarithmic.
    values = (rows.state_bytes if memory == ALL else rows.scalars) / rows.parameters
    losses = np.array([loss.mean for loss in rows.loss])
    best = studies.optimal(values.to_numpy(), losses)
    drawn = looks(sorted(rows.arm))
    order = np.argsort(values.to_numpy()[best], kind="stable")
    x, y = values.to_numpy()[best][order], losses[best][order]
    front = go.Scatter(
        x=x.tolist(), y=y.tolist(), mode="lines", line={"color": "#808080", "dash": "dot", "shape": "hv"},
        name="Pareto front", hoverinfo="skip",
    )  # fmt: skip
    traces = [front]
    for row, value, is_best in zip(rows.itertuples(), values, best, strict=True):
        look = drawn[str(row.arm)]
        difference = row.at_best
        against = f"{difference.mean:+.4f} ± {difference.half:.4f} against AdamW" if difference else ""
        traces.append(
            go.Scatter(
                x=[value],
                y=[row.loss.mean],
                error_y=errors([row.loss.half if np.isfinite(row.loss.half) else None]),
                name=f"{label(str(row.arm))}{' ★' if is_best else ''}",
                mode="markers",
                marker={
                    "symbol": look.symbol,
                    "size": 14 if is_best else 9,
                    "color": look.colour,
                    "line": {"width": 3 if is_best else 0, "color": "#000000"},
                },
                customdata=[[row.state_bytes, row.scalars, row.state_bytes / row.parameters, against, row.n]],
                hovertemplate=f"<b>{row.arm}</b>{' (Pareto-optimal)' if is_best else ''}<br>loss %{{y:.4f}} ± "
                f"{row.loss.half:.4f} nats, n = %{{customdata[4]}}<br>%{{customdata[3]}}<br>%{{customdata[0]:,}} "
                "bytes of state, %{customdata[2]:.3f} bytes per parameter<br>%{customdata[1]:,} second "
                "moments<extra></extra>",
            )
        )
    what = "bytes of state per parameter" if memory == ALL else "second moments per parameter"
    names = ", ".join(rows.arm[best])
    axis = log_axis(what) if values.max() > 10 * values.min() else {"title": {"text": what}}
    return Figure(
        plot(traces, xaxis=axis, yaxis={"title": {"text": "final validation loss (nats)"}}, height=520),
        f"Final loss against {memory}. Pareto-optimal: {names}.",
        f"Each arm at its best rate, mean and 95 % t-interval (none for a single seed), n = {_n(rows)}. Stars and "
        "ringed points are Pareto-optimal by their means: no arm has both less memory and a lower loss. They are "
        f"{names}. Arms differ by the paired intervals of the tables, which are narrower than the intervals here.",
    )


def _n(rows: pd.DataFrame) -> str:
    return " or ".join(str(n) for n in sorted(set(rows.n - rows.diverged)))


def curves(found: Sequence[Study]) -> Pictures:
    """Return learning curves of every study and condition: at the best rates, and at each learning rate."""
    pictures = Pictures("curves", ("study", "condition", "learning rate"))
    for study in found:
        rows = studies.table(study)
        for condition in study.conditions:
            chosen = rows[rows.condition == condition]
            best = chosen[chosen.best]
            for name, part in [("best of each arm", best), *((f"{lr:g}", p) for lr, p in chosen.groupby("lr"))]:
                figure = _curves(study.of(condition), part)
                if figure is not None:
                    pictures.add((title(study.name), condition or "one", name), _file(study), figure)
    return pictures


def _curves(runs: pd.DataFrame, rows: pd.DataFrame) -> Figure | None:
    """Plot the mean curve of every arm with a band from its lowest to its highest seed; None if no run finished."""
    traces, drawn, seeds = [], looks(sorted(runs.arm.unique())), set()
    for row in rows.sort_values("loss", key=_mean).itertuples():
        found = studies.curve(runs, str(row.arm), float(row.lr))
        if found is None:
            continue
        look, name = drawn[str(row.arm)], f"{label(str(row.arm))}, lr {row.lr:g}"
        seeds.add(found.n)
        band = [*found.high.tolist(), *found.low.tolist()[::-1]]
        x = found.tokens.tolist()
        traces.append(
            go.Scatter(
                x=[*x, *x[::-1]], y=band, fill="toself", fillcolor=look.colour, opacity=0.14, mode="none",
                hoverinfo="skip", showlegend=False, legendgroup=name,
            )
        )  # fmt: skip
        traces.append(
            go.Scatter(
                x=x,
                y=found.mean.round(5).tolist(),
                customdata=np.stack([found.low, found.high, found.steps], axis=1).round(4).tolist(),
                hovertemplate=f"<b>{row.arm}</b>, step %{{customdata[2]}}<br>%{{y:.4f}} nats, from %{{customdata[0]}} "
                f"to "
                f"%{{customdata[1]}}<br>n = {found.n}<extra></extra>",
                name=name,
                legendgroup=name,
                mode="lines+markers",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                marker={"symbol": look.symbol, "size": 6},
            )
        )
    if not traces:
        return None
    axes = {"xaxis": {"title": {"text": "training tokens"}}, "yaxis": {"title": {"text": "validation loss (nats)"}}}
    return Figure(
        plot(traces, **axes, height=520),
        "Validation loss of every arm along training.",
        f"Mean over n = {' or '.join(map(str, sorted(seeds)))} seeds, band from the lowest to the highest seed (no "
        f"interval "
        "of the mean). Click an arm in the legend to hide it, twice to see it alone.",
    )
