"""Tables of the site: cells with a text to read and a value to sort by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from analysis.stats import Interval


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is shown.
        value: what the column is sorted by; None sorts last in either direction, as does an infinite number.
        kind: CSS class: "yes", "no" or nothing.
    """

    text: str
    value: float | str | None
    kind: str = ""

    @property
    def key(self) -> str:
        """The sort key as text for the page; empty for a cell that sorts last."""
        if self.value is None or (isinstance(self.value, float) and not math.isfinite(self.value)):
            return ""
        return str(self.value)


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: its heading.
        numeric: whether it is sorted by number and aligned to the right.
        choose: whether a selector above the table filters by it.
        code: whether its texts are set as code.
    """

    name: str
    numeric: bool = False
    choose: bool = False
    code: bool = False


@dataclass(frozen=True)
class Table:
    """A table that can be sorted and filtered.

    Attributes:
        id: HTML id.
        caption: what it shows, with n and the kind of interval.
        columns: its columns.
        rows: its rows, a cell per column.
    """

    id: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]] = field(default_factory=list)

    def options(self, place: int) -> list[str]:
        """Return the different texts of a column, in the order in which they occur."""
        return list(dict.fromkeys(row[place].text for row in self.rows))


def text(value: object, kind: str = "") -> Cell:
    """Return a cell that shows and sorts by a text."""
    return Cell(str(value), str(value), kind)


def number(value: float, form: str = ",") -> Cell:
    """Return a cell with a number, for instance ``number(1000)`` or ``number(0.5, ".3f")``."""
    if not math.isfinite(value):
        return Cell("–", None)
    return Cell(format(value, form), value)


def interval(found: Interval | None, form: str = ".4f", missing: str = "–", kind: str = "") -> Cell:
    """Return a cell with a mean and half its 95 % interval; ``missing`` where there is none."""
    return Cell(missing, None) if found is None else Cell(plus_minus(found, form), found.mean, kind)


def plus_minus(found: Interval, form: str = ".4f") -> str:
    """Return a mean ± half its 95 % interval; the mean alone and n for a single value."""
    mean = format(found.mean, form)
    return f"{mean} ± {format(found.half, form.lstrip('+'))}" if math.isfinite(found.half) else f"{mean} (n = 1)"
