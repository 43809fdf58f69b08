"""The largest batch of fine-tuning that fits under a cap of memory: SmolLM2-135M, sequences of 256 tokens.

    .venv/workloads/bin/python -m benchmarks.largest_batch --cap 4500
    .venv/workloads/bin/python -m benchmarks.sft_memory --docs docs/sft_memory.md

Every batch size that is tried is a process of its own, which takes two steps; what counts is the most resident memory
of the second one beyond what the process had after its imports. The second command writes the page.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable

import torch

from benchmarks.allocations import peak_resident, resident
from benchmarks.common import write
from benchmarks.sft_memory import CONTESTANTS, LENGTH, Step
from experiments.workloads.libraries import library

logger = logging.getLogger("benchmarks")
MOST = 64
"""Rows above which nothing is tried."""


def measured(name: str, rows: int) -> int:
    """Return the most resident memory of the second step beyond that of the imports, in bytes.

    Args:
        name: a contestant.
        rows: sequences of a step.
    """
    library("transformers", "fine-tuning")
    torch.set_num_threads(1)
    baseline, step = resident(), Step(CONTESTANTS[name], rows)
    step.run()
    with peak_resident() as peak:
        step.run()
    return peak() - baseline


def in_own_process(name: str, rows: int) -> int:
    """Measure in a new process.

    Raises:
        RuntimeError: the process failed; the message has its last words.
    """
    command = [sys.executable, "-m", "benchmarks.largest_batch", "--one", name, "--rows", str(rows)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"measuring {name!r} with rows={rows} failed:\n{result.stderr[-2000:]}")
    return int(result.stdout.split()[-1])


def largest(cap: int, size_of: Callable[[int], int], most: int = MOST) -> dict[int, int]:
    """Find the largest number of rows whose memory is at most the cap.

    Args:
        cap: bytes.
        size_of: rows -> bytes, which grow with the rows.
        most: largest number of rows to try.

    Returns:
        rows -> bytes of everything that was tried: the largest one that fits, and the next, unless it is over ``most``.
    """
    tried: dict[int, int] = {}

    def fits(rows: int) -> bool:
        if rows not in tried:
            tried[rows] = size_of(rows)
        return tried[rows] <= cap

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, min(2 * high, most + 1)
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return tried


def main() -> None:
    """Measure all contestants and write ``benchmarks/results/largest_batch.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cap", type=int, default=4500, help="MB (10^6 bytes) beyond the imports")
    parser.add_argument("--one", choices=tuple(CONTESTANTS), help="measure one optimizer in this process")
    parser.add_argument("--rows", type=int, default=1, help="sequences, with --one")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.cap < 1 or arguments.rows < 1:
        parser.error(f"--cap {arguments.cap} and --rows {arguments.rows} must be at least 1")
    if arguments.one:
        sys.stdout.write(f"{measured(arguments.one, arguments.rows)}\n")
    else:
        cap, rows = arguments.cap * 10**6, {}
        for name in CONTESTANTS:
            rows[name] = largest(cap, lambda n, name=name: in_own_process(name, n))
            logger.info("%s: %s", name, {n: f"{size / 1e6:.0f} MB" for n, size in sorted(rows[name].items())})
        document = {
            "cap": cap,
            "length": LENGTH,
            "rows": {n: {str(k): v for k, v in t.items()} for n, t in rows.items()},
        }
        logger.info("written to %s", write("largest_batch", document))


if __name__ == "__main__":
    main()
