"""Cells of the study and their results: one JSON file per part, rewritten atomically after every cell."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.storage import environment, read_json, write_atomic

FORMAT_VERSION = 1
DIGITS = 5


@dataclass(frozen=True)
class Cell:
    """One unit of work whose result is stored alone, so that an interrupted study resumes at the next one.

    Attributes:
        name: the cell's key in the part's file.
        seconds: planned time on one core.
        run: computes the JSON-able result.
    """

    name: str
    seconds: float
    run: Callable[[], Any]


@dataclass(frozen=True)
class Part:
    """One of the study's experiments.

    Attributes:
        name: name of the part and of its file.
        settings: everything that all its cells share; results with other settings are refused.
        cells: the cells, in the order in which they run.
    """

    name: str
    settings: dict[str, Any]
    cells: Sequence[Cell]

    def load(self, out: Path) -> dict[str, Any]:
        """Read the part's results so far; return a document without cells if it has not begun.

        Raises:
            ValueError: the file is damaged, or its cells had other settings; the message names the file.
        """
        path = out / f"{self.name}.json"
        document = read_json(path)
        if document is None:
            return {
                "format_version": FORMAT_VERSION,
                "part": self.name,
                "settings": self.settings,
                "environment": environment(),
                "cells": {},
            }
        if not isinstance(document, dict) or not isinstance(document.get("cells"), dict):
            raise ValueError(f"{path} is damaged (it has no cells); move it away to run the part again")
        if document.get("settings") != self.settings or document.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path} holds results of other settings; give another --out, or move it away")
        return document

    def waiting(self, out: Path) -> list[Cell]:
        """Return the cells without a result."""
        done = self.load(out)["cells"]
        return [cell for cell in self.cells if cell.name not in done]

    def run_one(self, out: Path, cell: Cell) -> None:
        """Run a cell and add its result and its time to the part's file."""
        started = time.process_time()  # A busy machine must not change what is stored.
        result = cell.run()
        document = self.load(out)
        seconds = round(time.process_time() - started, 2)
        document["cells"][cell.name] = {"seconds": seconds, "result": rounded(result)}
        write(out / f"{self.name}.json", document)


def write(path: Path, document: dict[str, Any]) -> None:
    """Write a part's document atomically, with one line per cell."""
    head = {key: value for key, value in document.items() if key != "cells"}
    lines = [f"{json.dumps(name)}: {json.dumps(cell)}" for name, cell in document["cells"].items()]
    text = json.dumps(head)[:-1] + ', "cells": {\n' + ",\n".join(lines) + "\n}}\n"
    write_atomic(path, text.encode())


def settings_of(settings: Any, **more: Any) -> dict[str, Any]:
    """Return a settings dataclass as JSON gives it back: tuples become lists."""
    plain: dict[str, Any] = rounded(dataclasses.asdict(settings) | more, digits=12)
    return plain


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """Return a JSON-able copy with floats of ``digits`` significant digits; numbers that are not finite become None."""
    if isinstance(value, dict):
        return {str(key): rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
