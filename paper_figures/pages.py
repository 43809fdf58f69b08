"""Write tables into a page of the documentation, between two marker lines, and figures beside it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path


def replace(page: Path, content: str, begin: str, end: str) -> None:
    """Replace what is between two marker lines of a page, atomically.

    Args:
        page: the page.
        content: the new text between the markers.
        begin: the first marker.
        end: the last marker.

    Raises:
        ValueError: the page lacks a marker.
    """
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{page} lacks the lines {begin!r} and {end!r}; add them where the tables belong")
    before, after = text.split(begin)[0], text.split(end)[1]
    temporary = page.with_name(f".{page.name}.{os.getpid()}.tmp")
    temporary.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}", encoding="utf-8")
    os.replace(temporary, page)


def illustrate(page: Path, figures: Sequence[Path]) -> None:
    """Copy figures into the folder ``figures`` beside a page, where the page's links point.

    Args:
        page: the page.
        figures: the files.
    """
    folder = page.parent / "figures"
    folder.mkdir(exist_ok=True)
    for figure in figures:
        shutil.copyfile(figure, folder / figure.name)
