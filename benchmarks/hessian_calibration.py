"""Count how often nominal 95 % intervals of the Hessian laboratory's estimators cover a known answer.

    python -m benchmarks.hessian_calibration [--repetitions 500] [--docs docs/hessian.md]

The matrices have order 120, with flat, falling and indefinite spectra and random eigenvectors; their blocks are eight
runs of equal length. ``--docs`` writes the table into a page, from the results, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import RESULTS, replace, write
from hessian import MatrixOperator, block_norms, diagonal, slq, trace
from hessian.probing import energy_inside

logger = logging.getLogger("benchmarks")
ORDER, BLOCKS = 120, 8
IDS = torch.arange(ORDER) // (ORDER // BLOCKS)
START, END = "<!-- calibration -->", "<!-- end of calibration -->"
Ends = tuple[Tensor, Tensor]
Trial = Callable[[MatrixOperator, int], tuple[Ends, Tensor]]
"""(operator, seed) -> the interval, and the answer."""


def spectra() -> dict[str, Tensor]:
    """Return name -> eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    torch.randn(ORDER, ORDER, generator=generator, dtype=torch.float64)
    return {
        "flat": torch.linspace(0.5, 1.5, ORDER, dtype=torch.float64),
        "falling": torch.arange(1, ORDER + 1, dtype=torch.float64) ** -1.5,
        "indefinite": torch.randn(ORDER, generator=generator, dtype=torch.float64),
    }


def _inside(matrix: Tensor) -> Tensor:
    return (matrix.square() * (IDS[:, None] == IDS)).sum()


def _norms(matrix: Tensor) -> Tensor:
    indicator = torch.nn.functional.one_hot(IDS).double()
    return indicator.T @ matrix.square() @ indicator


def _moment(k: int) -> Trial:
    def trial(A: MatrixOperator, seed: int) -> tuple[Ends, Tensor]:
        low, high = slq(A, steps=8, probes=10, seed=seed).moment_interval(k)
        wanted = torch.linalg.matrix_power(A.matrix, k).trace() / ORDER
        return (torch.tensor(low), torch.tensor(high)), wanted

    return trial


def _energy(which: int, probes: int) -> Trial:
    return lambda A, seed: (
        energy_inside(A, IDS, probes, seed)[which].interval(),
        (_inside(A.matrix), A.matrix.square().sum())[which],
    )


def _trace(products: int, method: str) -> Trial:
    return lambda A, seed: (trace(A, products, method, seed).interval(), A.matrix.trace())


TRIALS: dict[str, Trial] = {
    "`trace`, Hutchinson, 30 products": _trace(30, "hutchinson"),
    "`trace`, Hutch++, 60 products": _trace(60, "hutch++"),
    "`trace`, XTrace, 30 products": _trace(30, "xtrace"),
    "`trace`, XTrace, 60 products": _trace(60, "xtrace"),
    "`diagonal`, Hutchinson, 30 products": lambda A, seed: (
        diagonal(A, 30, "hutchinson", seed).interval(), A.matrix.diagonal()
    ),
    "`diagonal`, XDiag, 60 products": lambda A, seed: (diagonal(A, 60, "xdiag", seed).interval(), A.matrix.diagonal()),
    "`energy_inside`, inside, 30 probes": _energy(0, 30),
    "`energy_inside`, whole, 30 probes": _energy(1, 30),
    "`block_norms`, 8 probes": lambda A, seed: (block_norms(A, IDS, 8, seed).interval(), _norms(A.matrix)),
    "`slq`, first moment, 10 probes": _moment(1),
    "`slq`, second moment, 10 probes": _moment(2),
}  # fmt: skip


def coverage(trial: Trial, values: Tensor, repetitions: int) -> float:
    """Return the share of intervals that contain the answer, the mean over entries for several answers."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(ORDER, ORDER, generator=generator, dtype=torch.float64)).Q
    matrix = (basis * values) @ basis.T
    operator = MatrixOperator((matrix + matrix.T) / 2)
    hits = []
    for seed in range(repetitions):
        (low, high), wanted = trial(operator, seed)
        hits.append(((low <= wanted) & (wanted <= high)).double().mean())
    return float(torch.stack(hits).mean())


def table(document: dict[str, Any]) -> str:
    """Return the table of the results."""
    names = list(next(iter(document["coverage"].values())))
    lines = [f"| intervals of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for what, row in document["coverage"].items():
        lines.append(f"| {what} | " + " | ".join(f"{100 * row[name]:.1f} %" for name in names) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all trials and write ``benchmarks/results/hessian_calibration.json``, or the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--docs", type=Path, help="write the table into this page and measure nothing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.docs:
        text = arguments.docs.read_text(encoding="utf-8")
        before, rest = text.split(START)
        found = table(json.loads((RESULTS / "hessian_calibration.json").read_text()))
        replace(arguments.docs, f"{before}{START}\n{found}\n{END}{rest.split(END)[1]}")
        return
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    for what, trial in TRIALS.items():
        rows[what] = {name: coverage(trial, values, arguments.repetitions) for name, values in spectra().items()}
        logger.info("%-36s %s", what, ", ".join(f"{name} {value:.3f}" for name, value in rows[what].items()))
    logger.info("written to %s", write("hessian_calibration", {"repetitions": arguments.repetitions, "coverage": rows}))


if __name__ == "__main__":
    main()
