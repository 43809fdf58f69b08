"""Read the parts of the study: one JSON file each, with a result for every cell."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.documents import damaged, is_finite, read_object

FORMAT_VERSION = 1
PARTS = (
    "quadratics",
    "diagonal_gain",
    "one_scalar",
    "added_number",
    "matrices",
    "classes",
    "leave_out",
    "structure",
    "spectra",
)
_MEND = "move it away and run `make paper-hessian` again"


@dataclass(frozen=True)
class Results:
    """The results of one part.

    Attributes:
        settings: what all cells share.
        cells: name of the cell -> its result.
        seconds: time of all cells together.
    """

    settings: dict[str, Any]
    cells: dict[str, Any]
    seconds: float

    def seed(self, cell: str) -> int:
        """Return the seed at the end of a cell's name."""
        return int(cell.rsplit(" ", 1)[1])


def load(folder: Path, part: str) -> Results:
    """Read one part.

    Raises:
        FileNotFoundError: the folder has no results of the part.
        ValueError: the file is damaged or has another format version.
    """
    path = folder / f"{part}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; run `python -m experiments.studies.paper_hessian --only {part}`"
        )
    document = read_object(path, _MEND)
    if document.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={document.get('format_version')}, this release reads {FORMAT_VERSION}; {_MEND}"
        )
    for key in ("settings", "cells"):
        if not isinstance(document.get(key), dict):
            raise damaged(path, f"it has no {key}", _MEND)
    cells, seconds = {}, 0.0
    for name, cell in document["cells"].items():
        if not isinstance(cell, dict) or "result" not in cell or not is_finite(cell.get("seconds")):
            raise damaged(path, f"cell {name!r} has no result", _MEND)
        cells[name] = cell["result"]
        seconds += cell["seconds"]
    if not cells:
        raise FileNotFoundError(f"{path} holds no cells yet; run `make paper-hessian`")
    return Results(document["settings"], cells, seconds)
