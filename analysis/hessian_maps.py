"""Maps of |H| in a form small enough to be committed: averaged into cells, on a logarithmic scale of 256 levels.

After `make hessian`, ``python -m analysis.hessian_maps out/hessian`` writes ``results/hessian_maps/maps.json``.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.documents import damaged, read_object
from analysis.hessian import HessianReport

FORMAT_VERSION = 1
CELLS = 128
DECADES = 3.0
"""Range of the scale below the 99.9th percentile, as in the drawn figures."""
ROWS, COLUMNS = "rows", "columns"
_FIELDS = ("n_blocks", "z", "lift", "jensen", "jensen_null", "explained", "mass_inside", "expected")
_MEND = "write it again with `python -m analysis.hessian_maps out/hessian`"


@dataclass(frozen=True)
class Map:
    """One map.

    Attributes:
        n: elements of the matrix, the side of |H|.
        cells: cells per side.
        low: log10 of |H| at level 0; smaller entries have level 0, too.
        high: log10 of |H| at level 255; larger entries have level 255, too.
        levels: lower triangle by rows, [cells * (cells + 1) / 2] of uint8.
    """

    n: int
    cells: int
    low: float
    high: float
    levels: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """The map, [cells, cells] of |H|."""
        whole = np.zeros((self.cells, self.cells))
        whole[np.tril_indices(self.cells)] = self.low + (self.high - self.low) * self.levels / 255
        return 10 ** (whole + np.tril(whole, -1).T)


def order_of(unit: str) -> str:
    """Return the order of elements in which the blocks of a unit are contiguous."""
    return COLUMNS if unit == "IN_NEURON" else ROWS


def compact(matrix: np.ndarray, cells: int = CELLS) -> Map:
    """Average a symmetric matrix of |H| into cells and store the levels of its lower triangle.

    Args:
        matrix: [n, n].
        cells: at most this many cells per side.
    """
    n = len(matrix)
    cells = min(cells, n)
    starts = np.arange(cells) * n // cells
    sizes = np.diff([*starts, n])
    sums = np.add.reduceat(np.add.reduceat(matrix.astype(np.float64), starts, axis=0), starts, axis=1)
    means = sums / np.outer(sizes, sizes)
    high = float(np.log10(np.quantile(matrix, 0.999) or 1.0))
    low = high - DECADES
    scaled = (np.log10(np.maximum(means, 10.0**low)) - low) / (high - low)
    levels = np.clip(np.rint(scaled * 255), 0, 255).astype(np.uint8)
    return Map(n, cells, low, high, levels[np.tril_indices(cells)])


def gather(report: HessianReport) -> dict[str, Any]:
    """Return the maps of a finished study with their evidence, as a JSON-able document.

    Returns:
        settings, subjects, and ``maps``: one entry per model, checkpoint and tensor, with its role, the map in every
        order that a candidate has, and the candidates.
    """
    entries = []
    evidence = report.evidence
    evidence["explained"] = evidence.explained.where(np.isfinite(evidence.explained), 0.0)
    for (model, checkpoint, tensor), rows in evidence.groupby(["model", "checkpoint", "tensor"], sort=False):
        matrix = report.arrays(f"hessian-{model}-{round(100 * checkpoint)}")[f"block/{tensor}"]
        candidates = [
            {"unit": row["unit"], **{key: _short(row[key]) for key in _FIELDS}} for row in rows.to_dict("records")
        ]
        columns = next((int(c["n_blocks"]) for c in candidates if c["unit"] == "IN_NEURON"), None)
        orders = {ROWS: matrix}
        if columns is not None:
            index = np.arange(len(matrix)).reshape(-1, columns).T.ravel()
            orders[COLUMNS] = matrix[np.ix_(index, index)]
        entries.append(
            {
                "model": model,
                "checkpoint": checkpoint,
                "tensor": tensor,
                "role": rows.role.iloc[0],
                "orders": {name: _written(compact(values)) for name, values in orders.items()},
                "candidates": candidates,
            }
        )
    return {
        "format_version": FORMAT_VERSION,
        "settings": report.report["settings"],
        "environment": report.report["environment"],
        "subjects": {name: {"parameters": s["parameters"]} for name, s in report.report["subjects"].items()},
        "maps": entries,
    }


def _short(value: float) -> float:
    """Round to six digits: more would be noise in a committed file."""
    return float(f"{value:.6g}")


def _written(found: Map) -> dict[str, Any]:
    packed = base64.b64encode(zlib.compress(found.levels.tobytes(), 9)).decode()
    return {"n": found.n, "cells": found.cells, "low": _short(found.low), "high": _short(found.high), "levels": packed}


def read(entry: dict[str, Any], order: str) -> Map:
    """Return a map of an entry of ``gather``.

    Raises:
        ValueError: the levels are damaged.
    """
    stored = entry["orders"][order]
    try:
        levels = np.frombuffer(zlib.decompress(base64.b64decode(stored["levels"], validate=True)), dtype=np.uint8)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"the map of {entry['tensor']} in {entry['model']} is damaged ({error}); {_MEND}") from error
    cells = stored["cells"]
    if len(levels) != cells * (cells + 1) // 2:
        raise ValueError(f"the map of {entry['tensor']} in {entry['model']} has {len(levels)} levels; {_MEND}")
    return Map(stored["n"], cells, stored["low"], stored["high"], levels)


def load(folder: Path) -> dict[str, Any]:
    """Read the committed maps.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: the file is damaged or has another format version.
    """
    path = folder / "maps.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; run `make hessian`, then `python -m analysis.hessian_maps out/hessian`"
        )
    document = read_object(path, _MEND)
    if document.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={document.get('format_version')}, this release reads {FORMAT_VERSION}; {_MEND}"
        )
    for key, kind in (("settings", dict), ("subjects", dict), ("maps", list)):
        if not isinstance(document.get(key), kind) or not document[key]:
            raise damaged(path, f"it has no {key}", _MEND)
    return document


def main(argv: Sequence[str] | None = None) -> None:
    """Write the compact maps of a finished study.

    Raises:
        SystemExit: with code 2 and one line on stderr, for a study that is missing or damaged.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study", type=Path, help="folder of a finished `make hessian`")
    parser.add_argument("--results", type=Path, default=Path("results/hessian_maps"))
    arguments = parser.parse_args(argv)
    try:
        document = gather(HessianReport.load(arguments.study))
        arguments.results.mkdir(parents=True, exist_ok=True)
        path = arguments.results / "maps.json"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(document, indent=0) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except (ValueError, KeyError, OSError) as error:
        sys.stderr.write(f"python -m analysis.hessian_maps: error: {error}\n")
        raise SystemExit(2) from error
    sys.stdout.write(f"{len(document['maps'])} matrices, {path.stat().st_size / 1e6:.2f} MB in {path}\n")


if __name__ == "__main__":
    main()
