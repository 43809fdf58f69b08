"""Check everything that exists for a CUDA device: ``make gpu-check``, or ``python -m benchmarks.gpu_check``.

Exit codes: 0 for PASSED, 1 for FAILED, 3 for INCOMPLETE (a check did not run), 2 if torch sees no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import replace
from benchmarks.gpu_check import correctness, page, speed, work
from benchmarks.gpu_check.verdict import EXIT_CODES, Check, outcome_of, verdict

logger = logging.getLogger("benchmarks")
NO_DEVICE = 2


def names() -> list[str]:
    """Return the names of all checks, which a page has to have."""
    return [check.name for check in (*correctness.CHECKS, *work.CHECKS, *speed.checks([]))]


def check(out: Path, device: torch.device, checks: Sequence[Check] | None = None, rounds: int = speed.ROUNDS) -> int:
    """Run checks on a device, write the page, and return the exit code.

    Args:
        out: path of the page; the JSON is beside it.
        device: the device. On any but a CUDA device the verdict is INCOMPLETE at best.
        checks: the checks; None for all.
        rounds: number of timed rounds.
    """
    rows: list[speed.Row] = []
    if checks is None:
        checks = (*correctness.CHECKS, *work.CHECKS, *speed.checks(rows, rounds))
    outcomes = []
    for each in checks:
        outcomes.append(outcome_of(each, device))
        logger.info("%s: %s, %s", each.name, outcomes[-1].state, outcomes[-1].note)
    state, reasons = verdict(outcomes, names())
    content = page.document(state, reasons, outcomes, rows, page.machine(device))
    replace(out, page.markdown(content))
    replace(out.with_suffix(".json"), json.dumps(content, indent=1) + "\n")
    logger.info("%s; written to %s", state, out)
    return EXIT_CODES[state]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/gpu_check.md"), help="path of the page")
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("experiments").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        sys.stderr.write(
            f"error: torch {torch.__version__} sees no CUDA device, so nothing was checked. Install a CUDA build with "
            "`make setup TORCH=cu128` (any tag of PyTorch's wheel index), on a machine where nvidia-smi shows a GPU\n"
        )
        return NO_DEVICE
    return check(parsed.out, torch.device("cuda", torch.cuda.current_device()))


if __name__ == "__main__":
    raise SystemExit(main())
