"""Interactive figures as Plotly draws them. The page's theme gives the colours of text, grid and ground."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import plotly.graph_objects as go

from paper_figures.style import ARM_COLOURS, COLOURS

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "cross", "pentagon", "hexagram")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
NO_COLOUR = "rgba(0,0,0,0)"


def _theme(text: str, grid: str, axis: str, ground: str) -> dict[str, Any]:
    lines = {"gridcolor": grid, "zerolinecolor": axis, "linecolor": axis, "tickcolor": axis, "automargin": True}
    return {
        "layout": {
            "paper_bgcolor": NO_COLOUR,
            "plot_bgcolor": NO_COLOUR,
            "font": {"color": text, "family": "system-ui, sans-serif", "size": 13},
            "xaxis": lines,
            "yaxis": lines,
            "hoverlabel": {"bgcolor": ground, "bordercolor": axis, "font": {"color": text, "size": 13}},
            "legend": {"bgcolor": NO_COLOUR},
            "modebar": {"bgcolor": NO_COLOUR, "color": axis, "activecolor": text},
            "colorway": list(COLOURS),
        }
    }


THEMES = {
    "light": {"template": _theme("#222222", "#dddddd", "#777777", "#ffffff"), "swap": {}},
    "dark": {
        "template": _theme("#e8e8e8", "#3a3f44", "#9aa0a6", "#1b1e21"),
        # The colours that would be hard to see on a dark ground, and what takes their place.
        "swap": {"#000000": "#f2f2f2", "#0072B2": "#4da3dd", "#8B4513": "#d08b52"},
    },
}
"""Theme -> Plotly's template, and colours that the page exchanges in the traces."""


@dataclass(frozen=True)
class Figure:
    """A figure of the site.

    Attributes:
        document: what ``Plotly.newPlot`` takes: data and layout.
        alt: the figure in a sentence, for those who cannot see it.
        caption: what it shows, with n and the kind of interval.
        facts: name and value of numbers that are shown beside it.
        zooms: name and range (of both axes) of parts that a selector shows.
        square: whether the height follows the width on a narrow screen.
    """

    document: dict[str, Any]
    alt: str
    caption: str = ""
    facts: Sequence[tuple[str, str]] = field(default_factory=list)
    zooms: Sequence[tuple[str, tuple[float, float]]] = field(default_factory=list)
    square: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-able dict."""
        return {
            **self.document,
            "alt": self.alt,
            "caption": self.caption,
            "facts": [list(fact) for fact in self.facts],
            "square": self.square,
            "zooms": [[name, list(part)] for name, part in self.zooms],
        }


def plot(traces: Sequence[Any], **layout: Any) -> dict[str, Any]:
    """Return traces and a layout, checked by Plotly, as plain JSON without a template.

    Args:
        traces: objects of ``plotly.graph_objects``.
        layout: entries of the layout; ``height`` in pixels is needed, because the page sets the width only.
    """
    defaults = {
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "legend": {"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0},
        "hovermode": "closest",
    }
    document: dict[str, Any] = json.loads(go.Figure(list(traces), {**defaults, **layout}).to_json(engine="json"))
    document["layout"].pop("template", None)
    return document


@dataclass(frozen=True)
class Look:
    """How an arm is drawn; symbol and dash tell arms apart where colours do not."""

    colour: str
    symbol: str
    dash: str


def looks(arms: Sequence[str]) -> dict[str, Look]:
    """Return how each arm is drawn: its own colour if it has one, else one that no arm has, while there are any."""
    own = {ARM_COLOURS[arm] for arm in arms if arm in ARM_COLOURS}
    free = itertools.cycle(sorted(COLOURS, key=own.__contains__))
    out = {}
    for place, arm in enumerate(arms):
        colour = ARM_COLOURS.get(arm) or next(free)
        out[arm] = Look(colour, SYMBOLS[place % len(SYMBOLS)], DASHES[(place // 3) % len(DASHES)])
    return out


def label(arm: str) -> str:
    """Return an arm's name; the elementwise arm is AdamW."""
    return "AdamW (elementwise)" if arm == "elementwise" else arm


def log_axis(title: str) -> dict[str, Any]:
    """Return a logarithmic axis with a label per decade."""
    return {"title": {"text": title}, "type": "log", "dtick": 1, "exponentformat": "power"}


def errors(halves: Sequence[float | None]) -> dict[str, Any]:
    """Return error bars of 95 % intervals."""
    return {"type": "data", "array": list(halves), "thickness": 1.5, "width": 4}
