"""The first screen: the question, the answer in numbers that analysis computes, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from analysis import studies
from analysis.stats import Interval
from analysis.studies import Study
from paper_figures.report.figures import Figure, label, looks, plot
from paper_figures.report.site import Pictures
from paper_figures.report.tables import plus_minus
from paper_figures.report.training import subject, verdict_of

NEEDED = ("ablation_cpu", "carry_over_cpu")
SHOWN = ("derived", "factored", "derived_blocks", "adam_mini")
WHAT = {
    "derived": "units that training runs chose, role by role",
    "factored": "one number per row and one per column",
    "derived_blocks": "one number per block, blocks by Hessians",
    "adam_mini": "one number per block, blocks of the paper",
}


@dataclass(frozen=True)
class Answer:
    """One arm's result in one study.

    Attributes:
        arm: the arm.
        study: name of the study's folder.
        difference: final loss minus AdamW's, each at its best rate, paired by seed.
        scalars: second-moment scalars.
        share: of AdamW's.
        verdict: in words.
    """

    arm: str
    study: str
    difference: Interval
    scalars: int
    share: float
    verdict: str

    @property
    def number(self) -> str:
        """The difference as it is printed."""
        return plus_minus(self.difference, "+.4f")


def answers(found: Sequence[Study]) -> list[Answer]:
    """Return the results of the first screen.

    Raises:
        FileNotFoundError: a study of the first screen is missing.
        ValueError: it lacks an arm, or a run of one diverged.
    """
    by_name = {study.name: study for study in found}
    out = []
    for name in NEEDED:
        if name not in by_name:
            run = "make ablation" if name == "ablation_cpu" else "python -m experiments.ablation --study carry_over"
            raise FileNotFoundError(f"no study {name} under the results; restore results/{name}, or run `{run}`")
        rows = studies.table(by_name[name])
        best = rows[rows.best].set_index("arm")
        for arm in SHOWN:
            if arm not in best.index or best.at_best[arm] is None:
                raise ValueError(
                    f"results/{name} has no difference of arm={arm!r} to AdamW: the arm is missing, a run diverged, "
                    f"or its "
                    "seeds are others; restore the folder from the repository"
                )
            row = best.loc[arm]
            share = row.scalars / row.parameters
            out.append(Answer(arm, name, row.at_best, int(row.scalars), share, verdict_of(row.at_best)))
    return out


def sentence(found: Sequence[Answer]) -> str:
    """Return the answer in a few sentences; every number and verdict is taken from the results."""
    by = {arm: [answer for answer in found if answer.arm == arm] for arm in SHOWN}
    holds = [arm for arm in SHOWN if all(answer.verdict != "worse" for answer in by[arm])]
    if not holds:
        return f"More than these keep: each of {', '.join(SHOWN)} is worse than AdamW in at least one of two studies."
    best = min(holds, key=lambda arm: max(answer.share for answer in by[arm]))
    parts = [
        f"Less than {_share(by[best]) + 0.05:.1f} % on small models. With {WHAT[best]} ({best}), the loss is not "
        "measurably worse than AdamW's in either of two studies."
    ]
    others = [f"{WHAT[arm]} ({arm}, up to {_share(by[arm]):.1f} %)" for arm in holds if arm != best]
    if others:
        parts.append(f"Nor is it with {' or with '.join(others)}.")
    for arm in (arm for arm in SHOWN if arm not in holds):
        worse = [answer for answer in by[arm] if answer.verdict == "worse"]
        where = "both" if len(worse) == len(NEEDED) else "one"
        parts.append(f"With {WHAT[arm]} ({arm}), it is worse in {where}.")
    return " ".join(parts)


def _share(answers: Sequence[Answer]) -> float:
    """Return the largest share of AdamW's second moments that an arm keeps, in percent."""
    return 100 * max(answer.share for answer in answers)


def picture(found: Sequence[Study], shown: Sequence[Answer]) -> Pictures:
    """Return the figure of the first screen: the differences of both studies with their intervals."""
    pictures, drawn = Pictures("headline", ()), looks(SHOWN)
    traces = []
    by_name = {study.name: study for study in found}
    for place, name in enumerate(NEEDED):
        part = [answer for answer in shown if answer.study == name]
        traces.append(
            go.Scatter(
                x=[answer.difference.mean for answer in part],
                # One above the other, so that the intervals of the two studies do not hide each other.
                y=[SHOWN.index(answer.arm) + 0.28 * place - 0.14 for answer in part],
                error_x={
                    "type": "data",
                    "array": [a.difference.half for a in part],
                    "color": "#808080",
                    "thickness": 2,
                    "width": 6,
                },
                mode="markers",
                marker={
                    "size": 13,
                    "symbol": ("circle", "diamond")[place],
                    "color": [drawn[answer.arm].colour for answer in part],
                },
                customdata=[[a.number, a.verdict, a.difference.n, a.scalars, a.arm] for a in part],
                hovertemplate="<b>%{customdata[4]}</b><br>%{customdata[0]} nats<br>%{customdata[1]}, "
                "n = %{customdata[2]}<br>"
                "%{customdata[3]:,} second moments<extra></extra>",
                name=f"{subject(by_name[name])} (n = {part[0].difference.n})",
            )
        )
    low = min(a.difference.low for a in shown)
    high = max(a.difference.high for a in shown)
    pad = 0.08 * (high - low)
    layout = {
        "xaxis": {
            "title": {"text": "final loss minus AdamW's (nats)"}, "zeroline": True, "zerolinewidth": 2,
            "range": [float(np.round(low - pad, 4)), float(np.round(high + pad, 4))],
        },
        "yaxis": {
            "tickvals": list(range(len(SHOWN))), "ticktext": list(map(label, SHOWN)), "zeroline": False,
            "range": [len(SHOWN) - 0.5, -0.5],
        },
        "height": 340,
    }  # fmt: skip
    seeds = " and ".join(str(next(a.difference.n for a in shown if a.study == name)) for name in NEEDED)
    figure = Figure(
        plot(traces, **layout),
        f"Final loss minus AdamW's of {len(SHOWN)} ways to share second moments, in {len(NEEDED)} studies.",
        f"Mean and 95 % t-interval, paired by seed, n = {seeds}; left of the line is better than AdamW. Short runs of "
        "models with less than a million parameters: they say nothing about the paper's sizes.",
    )
    pictures.add((), "headline", figure)
    return pictures
