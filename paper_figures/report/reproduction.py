"""The tables of docs/reproduction.md: the papers' claims beside our numbers, and what makes every figure and table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape

from paper_figures.report.tables import Cell, Column, Table

VERDICT = "verdict"
KINDS = {"confirmed": "yes", "refuted": "no"}
"""First word of a verdict -> class of its cell."""


@dataclass(frozen=True)
class Reproduction:
    """What the page lists.

    Attributes:
        claims: a row per claim of a paper.
        commands: a row per figure or table.
    """

    claims: Table
    commands: Table


def load(page: Path) -> Reproduction:
    """Read both tables. The claims are the one with a column "verdict".

    Raises:
        FileNotFoundError: the page does not exist.
        ValueError: it does not have exactly these two tables, or one is damaged.
    """
    if not page.is_file():
        raise FileNotFoundError(f"{page} does not exist; give the reproduction page of a checkout with --reproduction")
    found = re.findall(r"(?:^\|.*\n?)+", page.read_text(encoding="utf-8"), re.M)
    parsed = [_parsed(page, lines.splitlines()) for lines in found]
    claims = [one for one in parsed if VERDICT in one[0]]
    commands = [one for one in parsed if VERDICT not in one[0]]
    if len(claims) != 1 or len(commands) != 1:
        raise ValueError(
            f"{page} has {len(claims)} tables of claims and {len(commands)} of commands, not one of each; restore it "
            "from the repository"
        )
    return Reproduction(
        _table("claims", "What the papers claim, and what came out here. ± is half a 95 % interval.", *claims[0]),
        _table("reproduction", "Everything that can be made again.", *commands[0]),
    )


def _parsed(page: Path, lines: list[str]) -> tuple[list[str], list[list[str]]]:
    """Return the headings and rows of a Markdown table."""
    if len(lines) < 3:
        raise ValueError(f"{page} has a table without a row: {lines[0]!r}; restore it from the repository")
    heading, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
    for row in rows:
        if len(row) != len(heading):
            raise ValueError(f"{page} has a row of {len(row)} cells below {len(heading)} headings: {row[0]!r}; mend it")
    return heading, rows


def _table(name: str, caption: str, heading: list[str], rows: list[list[str]]) -> Table:
    columns = [Column(column) for column in heading]
    cells = [[_cell(source, column) for source, column in zip(row, heading, strict=True)] for row in rows]
    return Table(name, caption, columns, cells)


def _cell(source: str, column: str) -> Cell:
    """Return a cell's Markdown as HTML: code and the text of links. Sorting goes by the plain text."""
    plain = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", source)
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(plain)))
    kind = KINDS.get(re.split(r"\W", plain)[0], "") if column == VERDICT else ""
    return Cell(Markup(html), plain.replace("`", "").lower(), kind)  # Safe: escaped before the tags were added.
