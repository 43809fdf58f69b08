"""Fuzz the step: python -m tests.fuzz [--minutes 30] [--seed 0] [--only SEED]

Draws layouts, dtypes, strides and flags at random and compares every engine with the paper's transcription in float64.
A failure prints the seed that repeats it (--only) and the run goes on; the exit status says whether there was any.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
import warnings
from collections import Counter

import torch

from tests.fuzz.check import run
from tests.fuzz.draw import draw

logger = logging.getLogger("fuzz")


def main() -> int:
    """Fuzz for some minutes; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0, help="first seed; the others follow it")
    parser.add_argument("--only", type=int, help="one case, its traceback in full")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("optimizer").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if arguments.only is not None:
        logger.info("%s", draw(arguments.only))
        run(draw(arguments.only))
        return 0
    end, seed, failed = time.monotonic() + 60 * arguments.minutes, arguments.seed, []
    engines: Counter[str] = Counter()
    while time.monotonic() < end:
        case = draw(seed)
        engines[f"{case.engine}"] += 1
        try:
            run(case)
        except Exception as error:
            failed.append(seed)
            logger.info("seed %d: %s", seed, "".join(traceback.format_exception_only(error)).strip()[:400])
        seed += 1
        if (seed - arguments.seed) % 5000 == 0:
            logger.info("%d cases, %d failed", seed - arguments.seed, len(failed))
    logger.info("%d cases from seed %d in %.1f minutes: %s", seed - arguments.seed, arguments.seed,
                arguments.minutes, dict(engines))  # fmt: skip
    logger.info("failed: %s", failed or "none")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
