"""The first screen: the question, the answer in numbers that analysis computes, and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from analysis.ablation import BASELINE
from analysis.settings import Comparison, compare, load_settings
from analysis.stats import Interval
from paper_figures.headline import ALPHA, place
from paper_figures.report.figures import SYMBOLS, Figure, label, looks, plot
from paper_figures.report.site import Pictures
from paper_figures.report.tables import plus_minus

STUDY = "headline_cpu"
SHOWN = ("derived", "factored", "slim_adam", "adam_mini", "permuted")
"""The arms that have AdamW's step with fewer second moments. Those with another kind of step are in the tables."""
WHAT = {
    "derived": "units that training runs chose, role by role",
    "factored": "one number per row and one per column",
    "slim_adam": "one number per row or column, by SlimAdam's rules",
    "adam_mini": "one number per block, blocks of the paper",
    "permuted": "one number per block, random blocks",
}


@dataclass(frozen=True)
class Answer:
    """One arm's result in one place.

    Attributes:
        arm: the arm.
        place: architecture and corpus.
        difference: final loss minus AdamW's, each at its best rate, paired by seed.
        scalars: second-moment scalars.
        share: of AdamW's.
        verdict: in words, by the p-value corrected for the number of arms.
    """

    arm: str
    place: str
    difference: Interval
    scalars: int
    share: float
    verdict: str

    @property
    def number(self) -> str:
        """The difference as it is printed."""
        return plus_minus(self.difference, "+.4f")


def answers(results: Path) -> list[Answer]:
    """Return the results of the first screen, place by place.

    Args:
        results: root of the results.

    Raises:
        FileNotFoundError: the study of the first screen is missing.
        ValueError: it lacks an arm, or a run of one diverged.
    """
    folder = results / STUDY
    if not folder.is_dir():
        run = "python -m experiments.ablation --study headline"
        raise FileNotFoundError(f"no study {STUDY} under the results; restore {folder}, or run `{run}`")
    out = []
    for setting in sorted(load_settings(folder), key=place):
        if BASELINE not in set(setting.runs.arm):
            raise ValueError(f"{folder} has no runs of arm={BASELINE!r}; restore the folder from the repository")
        found = {one.arm: one for one in compare(setting.runs)}
        parameters = int(setting.runs.parameters.iloc[0])
        for arm in SHOWN:
            one = found.get(arm)
            if one is None or one.difference is None:
                raise ValueError(
                    f"{folder} has no difference of arm={arm!r} to AdamW in {place(setting)}: the arm is missing, "
                    "a run diverged, or its seeds are others; restore the folder from the repository"
                )
            share = one.scalars / parameters
            out.append(Answer(arm, place(setting), one.difference, one.scalars, share, _verdict(one)))
    return out


def _verdict(one: Comparison) -> str:
    if one.difference is None or not one.p_corrected < ALPHA:
        return "not told apart"
    return "worse" if one.difference.mean > 0 else "better"


@dataclass(frozen=True)
class Card:
    """One row of the first screen's table.

    Attributes:
        arm: the arm.
        answers: its results, place by place.
    """

    arm: str
    answers: tuple[Answer, ...]

    @property
    def share(self) -> str:
        """What the arm keeps of AdamW's second moments, from place to place."""
        low, high = (f"{100 * of(answer.share for answer in self.answers):.1f}" for of in (min, max))
        return f"{low} %" if low == high else f"{low} to {high} %"


def cards(found: Sequence[Answer]) -> list[Card]:
    """Return the rows of the first screen's table."""
    return [Card(arm, tuple(answer for answer in found if answer.arm == arm)) for arm in SHOWN]


def seeds(found: Sequence[Answer]) -> str:
    """Return the number of pairs of seeds in words."""
    return "n = " + " or ".join(map(str, sorted({answer.difference.n for answer in found})))


def sentence(found: Sequence[Answer]) -> str:
    """Return the answer in a few sentences; every number and verdict is taken from the results."""
    by = {arm: [answer for answer in found if answer.arm == arm] for arm in SHOWN}
    places = len(_places(found))
    holds = [arm for arm in SHOWN if all(answer.verdict != "worse" for answer in by[arm])]
    if not holds:
        return (
            f"More than these keep: each of {', '.join(SHOWN)} is worse than AdamW in at least one of {places} places."
        )
    best = min(holds, key=lambda arm: max(answer.share for answer in by[arm]))
    parts = [
        f"Less than {_share(by[best]) + 0.05:.1f} % on small models. With {WHAT[best]} ({best}), the loss is not "
        f"measurably worse than AdamW's in any of {places} places."
    ]
    others = [f"{WHAT[arm]} ({arm}, up to {_share(by[arm]):.1f} %)" for arm in holds if arm != best]
    if others:
        parts.append(f"Nor is it with {' or with '.join(others)}.")
    for arm in (arm for arm in SHOWN if arm not in holds):
        worse = sum(answer.verdict == "worse" for answer in by[arm])
        parts.append(
            f"With {WHAT[arm]} ({arm}), it is worse in {'all' if worse == places else f'{worse} of'} {places}."
        )
    return " ".join(parts)


def _share(answers: Sequence[Answer]) -> float:
    """Return the largest share of AdamW's second moments that an arm keeps, in percent."""
    return 100 * max(answer.share for answer in answers)


def _places(found: Sequence[Answer]) -> list[str]:
    return list(dict.fromkeys(answer.place for answer in found))


def picture(shown: Sequence[Answer]) -> Pictures:
    """Return the figure of the first screen: the differences in every place with their intervals."""
    places, drawn = _places(shown), looks(SHOWN)
    middle = (len(places) - 1) / 2
    traces = []
    for number, where in enumerate(places):
        part = [answer for answer in shown if answer.place == where]
        traces.append(
            go.Scatter(
                x=[answer.difference.mean for answer in part],
                # One above the other, so that the intervals of the places do not hide each other.
                y=[SHOWN.index(answer.arm) + 0.19 * (number - middle) for answer in part],
                error_x={
                    "type": "data",
                    "array": [a.difference.half for a in part],
                    "color": "#808080",
                    "thickness": 1.5,
                    "width": 4,
                },
                mode="markers",
                marker={
                    "size": 9,
                    "symbol": SYMBOLS[number],
                    "color": [drawn[answer.arm].colour for answer in part],
                },
                customdata=[[a.number, a.verdict, a.difference.n, a.scalars, a.arm] for a in part],
                hovertemplate="<b>%{customdata[4]}</b><br>%{customdata[0]} nats<br>%{customdata[1]}, "
                "n = %{customdata[2]}<br>"
                "%{customdata[3]:,} second moments<extra></extra>",
                name=f"{where} (n = {part[0].difference.n})",
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
        "height": 400,
    }  # fmt: skip
    figure = Figure(
        plot(traces, **layout),
        f"Final loss minus AdamW's of {len(SHOWN)} ways to share second moments, in {len(places)} places.",
        f"Mean and 95 % bootstrap interval, paired by seed, {seeds(shown)}; left of the line is better than AdamW. "
        "Better and worse are corrected for the number of arms. Short runs of models with less than a million "
        "parameters: they say nothing about the paper's sizes.",
    )
    pictures = Pictures("headline", ())
    pictures.add((), "headline", figure)
    return pictures
