"""Compare optimizers with torch's AdamW in time, memory, traffic and start-up, and check the bars.

    python -m benchmarks.optimizer_step --peers .venv/peers [--quick] [--cases REGEX] [--rounds 25]

Each case runs in a separate process. A complete run writes to the file of this machine's processor in
benchmarks/results/optimizer_step/, a quick or partial run to out/bench/, so that their results are never mixed.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bars import verdicts
from benchmarks.common import machine
from benchmarks.contestants import BASELINE, CONTESTANTS, MAIN
from benchmarks.report import bars_text, case_text, write_report
from benchmarks.runs import RUNS
from benchmarks.start import overhead, startup

logger = logging.getLogger("benchmarks")
QUICK_RESULTS = Path("out") / "bench"
ALL = tuple(CONTESTANTS)
OURS = (BASELINE, *(name for name, entry in CONTESTANTS.items() if entry.ours))


@dataclass(frozen=True)
class Case:
    """One model, dtype and number of threads, with its contestants and rounds; slow heats have fewer rounds."""

    model: str
    dtype: str = "fp32"
    threads: int = 2
    contestants: Sequence[str] = ALL
    rounds: int = 25

    @property
    def name(self) -> str:
        """Name of the case in results and for ``--cases``."""
        return f"{self.model} {self.dtype} {self.threads} thread{'s' if self.threads > 1 else ''}"


# torchao compiles a step for every shape, and its step takes 38 times as long as fused AdamW's on a CPU, so it runs in
# three sizes only.
UNCOMPILED = tuple(name for name, entry in CONTESTANTS.items() if entry.heat != "compiled")
# Several cases per line, because one argument per line would hide the list's structure.
CASES = (
    Case("llama-1M"), Case("llama-10M"), Case("llama-45M"), Case("llama-100M", contestants=UNCOMPILED, rounds=15),
    Case("llama-300M", contestants=MAIN, rounds=7), Case("gpt2-124M", contestants=UNCOMPILED),
    Case("mixtral-60M", contestants=UNCOMPILED, rounds=15), Case("llama-1M", "bf16", contestants=UNCOMPILED),
    Case("llama-45M", "bf16", contestants=UNCOMPILED), Case("llama-100M", "bf16", contestants=OURS, rounds=15),
    Case("gpt2-124M", "bf16", contestants=OURS), Case("mixtral-60M", "bf16", contestants=OURS, rounds=15),
    Case("llama-10M", threads=1, contestants=UNCOMPILED),
    Case("llama-45M", threads=1, contestants=UNCOMPILED, rounds=15),
    Case("llama-45M", "bf16", threads=1, contestants=OURS, rounds=15),
)  # fmt: skip
PEERS_QUICK = tuple(name for name in ALL if name != "AdamW 4-bit (torchao)")  # It compiles too long for a quick run.
QUICK = (
    Case("llama-1M", contestants=PEERS_QUICK, rounds=9),
    Case("llama-45M", contestants=OURS, rounds=9),
    Case("llama-45M", "bf16", contestants=OURS, rounds=5),
)


def measure(case: Case, rounds: int, peers: Path) -> dict[str, Any]:
    """Run one case in a separate process and return its results.

    Raises:
        RuntimeError: the process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "case.json"
        command = [
            sys.executable,
            "-m",
            "benchmarks.case",
            "--model",
            case.model,
            "--dtype",
            case.dtype,
            "--threads",
            str(case.threads),
            "--rounds",
            str(rounds),
            "--peers",
            str(peers.resolve()),
            "--out",
            str(out),
            "--contestants",
            *case.contestants,
        ]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if result.returncode:
            raise RuntimeError(f"case {case.name!r} failed:\n{result.stderr[-3000:]}")
        return dict(json.loads(out.read_text()))


def main() -> None:
    """Run the cases, write the results, and print the verdicts on the bars."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases with few rounds, under two minutes")
    parser.add_argument("--cases", default="", help="only cases whose name matches this expression")
    parser.add_argument("--rounds", type=int, default=None, help="number of rounds of every case")
    parser.add_argument("--peers", type=Path, default=Path(sys.prefix) / "peers", help="where torchao was installed")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    started = time.perf_counter()
    chosen = [case for case in (QUICK if arguments.quick else CASES) if re.search(arguments.cases, case.name)]
    if not chosen:
        parser.error(f"--cases {arguments.cases!r} matches none of: {'; '.join(case.name for case in CASES)}")
    complete = not (arguments.quick or arguments.cases or arguments.rounds)
    results: dict[str, Any] = {"machine": machine(), "cases": {}}
    for case in chosen:
        results["cases"][case.name] = measured = measure(case, arguments.rounds or case.rounds, arguments.peers)
        logger.info("%s", case_text(case.name, measured))
    results["overhead"] = overhead(arguments.rounds or (25 if complete else 9))
    results["startup"] = startup(5 if complete else 1)
    results["seconds"] = time.perf_counter() - started
    results["machine_after"] = machine()
    path = write_report(results, RUNS if complete else QUICK_RESULTS)
    logger.info("%s\n%.0f s; written to %s", bars_text(verdicts(results)), results["seconds"], path)


if __name__ == "__main__":
    main()
