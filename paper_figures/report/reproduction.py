"""The table of docs/reproduction.md, the one place where figures, commands, data and times are listed."""

from __future__ import annotations

import re
from pathlib import Path

from markupsafe import Markup, escape

from paper_figures.report.tables import Cell, Column, Table


def table(page: Path) -> Table:
    """Read the table.

    Raises:
        FileNotFoundError: the page does not exist.
        ValueError: it has no table, or a row has another number of cells than the heading.
    """
    if not page.is_file():
        raise FileNotFoundError(f"{page} does not exist; give the reproduction page of a checkout with --reproduction")
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise ValueError(f"{page} has no table with a row; restore it from the repository")
    heading, _, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
    for row in rows:
        if len(row) != len(heading):
            raise ValueError(f"{page} has a row of {len(row)} cells below {len(heading)} headings: {row[0]!r}; mend it")
    columns = [Column(name) for name in heading]
    return Table("reproduction", "Everything that can be made again.", columns, [list(map(_cell, row)) for row in rows])


def _cell(source: str) -> Cell:
    """Return a cell's Markdown as HTML: code and the text of links. Sorting goes by the plain text."""
    plain = re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", source)
    html = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(plain)))
    return Cell(Markup(html), plain.replace("`", "").lower())  # Safe: escaped before the tags were added.
