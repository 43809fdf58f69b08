"""Workloads: every arm's numbers, and what finished runs left to look at: images and answers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from analysis import workloads
from analysis.workloads import Row, Workload
from paper_figures.report.figures import Figure, label, plot
from paper_figures.report.site import Pictures
from paper_figures.report.tables import Cell, Column, Table, interval, number, plus_minus, text

COMMAND = "make workloads PROFILE=cpu"
KINDS = {"better": "yes", "worse": "no"}
"""Verdict -> class of its cell."""
ACROSS = 8
"""Images in a row of a mosaic."""


@dataclass(frozen=True)
class Answer:
    """An answer of a language model before and after training.

    Attributes:
        workload: the workload.
        arm: the optimizer.
        question: what was asked.
        before: the untrained model's answer.
        after: the trained model's answer.
    """

    workload: str
    arm: str
    question: str
    before: str
    after: str


def table(found: Sequence[Workload]) -> Table:
    """Return every arm of every workload at its best rate."""
    columns = [
        Column("workload", choose=True),
        Column("arm", choose=True, code=True),
        Column("best rate", numeric=True),
        Column("held-out loss", numeric=True),
        Column("minus AdamW", numeric=True),
        Column("differs", choose=True),
        Column("n", numeric=True),
        Column("also measured"),
    ]
    caption = (
        "Each arm at its best learning rate. Differences to AdamW are paired by seed, ± half a 95 % t-interval; an arm "
        "differs if its interval excludes zero. There is no correction for the number of comparisons."
    )
    return Table("workload-arms", caption, columns, [_row(one, row) for one in found for row in one.rows])


def _row(workload: Workload, row: Row) -> list[Cell]:
    one, verdict = row.comparison, workloads.differs(row)
    measured = "; ".join(f"{name.replace('_', ' ')} {plus_minus(value)}" for name, value in row.metrics.items())
    return [
        text(name(workload)),
        text(one.arm),
        number(one.lr, "g"),
        number(one.loss, ".4f"),
        interval(one.difference, "+.4f"),
        text(verdict, KINDS.get(verdict, "")),
        number(one.n or len(workload.setting.runs[workload.setting.runs.arm == one.arm].seed.unique())),
        text(measured or "–"),
    ]


def name(workload: Workload) -> str:
    """Return a workload's name in words."""
    return workload.name.replace("_", " ")


def _shown(found: Sequence[Workload]) -> list[tuple[Workload, str, Mapping[str, Any]]]:
    """Return (workload, arm, samples) of every arm whose run of seed 0 left samples."""
    every = [(one, row.comparison.arm) for one in found for row in one.rows]
    left = [(one, arm, workloads.shown(one, arm).get("samples")) for one, arm in every]
    return [(one, arm, samples) for one, arm, samples in left if samples]


def images(found: Sequence[Workload]) -> Pictures | None:
    """Return the images that runs left, a mosaic per workload and arm; None if there are none.

    Raises:
        ValueError: images are not what their document says.
    """
    pictures = Pictures("samples", ("workload", "optimizer"))
    for one, arm, samples in _shown(found):
        if "base64" in samples:
            mosaic = tiled(decoded(samples))
            trace = go.Heatmap(z=mosaic[::-1].tolist(), colorscale="gray", showscale=False, hoverinfo="skip")
            hidden = {"visible": False, "constrain": "domain"}
            layout = {"height": 20 + 400 * mosaic.shape[0] // mosaic.shape[1] * 2, "xaxis": hidden}
            document = plot([trace], **layout, yaxis={**hidden, "scaleanchor": "x"})
            count = samples["shape"][0]
            caption = f"{count} samples of {name(one)} by {label(arm)}, seed 0 (n = 1), from the same noise for all."
            pictures.add((name(one), label(arm)), "samples", Figure(document, caption, caption, square=True))
    return pictures if pictures.index else None


def decoded(samples: Mapping[str, Any]) -> np.ndarray:
    """Return the images of a document, uint8 [n, height, width].

    Raises:
        ValueError: their number of bytes does not fit the shape.
    """
    content, shape = np.frombuffer(base64.b64decode(samples["base64"]), np.uint8), tuple(samples["shape"])
    if len(shape) != 3 or content.size != np.prod(shape):
        raise ValueError(f"samples of shape {shape} have {content.size} bytes; run the workload again")
    return content.reshape(shape)


def tiled(pictures: np.ndarray) -> np.ndarray:
    """Return images [n, height, width] as one, [rows * height, columns * width]; places without an image are black."""
    count, height, width = pictures.shape
    columns = min(ACROSS, count)
    rows = -(-count // columns)
    places = np.zeros((rows * columns, height, width), pictures.dtype)
    places[:count] = pictures
    return places.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)


def answers(found: Sequence[Workload]) -> list[Answer]:
    """Return the answers that runs left."""
    return [
        Answer(name(one), label(arm), answer["question"], answer["before"], answer["after"])
        for one, arm, samples in _shown(found)
        for answer in samples.get("answers", ())
    ]


def answers_table(found: Sequence[Answer]) -> Table:
    """Return answers as a table."""
    columns = [
        Column("workload", choose=True),
        Column("optimizer", choose=True),
        Column("question"),
        Column("before"),
        Column("after"),
    ]
    cells = [[text(part) for part in (a.workload, a.arm, a.question, a.before, a.after)] for a in found]
    return Table("answers", "Held-out questions, answered before and after training; seed 0.", columns, cells)
