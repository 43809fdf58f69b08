"""Interleaved timing, and a description of the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")


def interleaved(contestants: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Time every contestant once per round, so that noise affects all of them equally.

    Args:
        contestants: name -> function to time.
        rounds: number of timed rounds.
        warmup: number of rounds before them that are not timed.

    Returns:
        By contestant, the seconds of its call in each round.
    """
    for _ in range(warmup):
        for call in contestants.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Return each contestant's median and quartiles, and the median of its per-round ratios to the baseline."""
    out = {}
    for name, values in seconds.items():
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        ratio = statistics.median(a / b for a, b in zip(values, seconds[baseline], strict=True))
        out[name] = {
            "median_s": quartiles[1],
            "q1_s": quartiles[0],
            "q3_s": quartiles[2],
            "ratio": ratio,
            "n": len(values),
        }
    return out


class OtherProcesses:
    """Measure how many cores other processes, including the machine's host, have used since construction.

    This process and its children do not count.
    """

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._used = self._others()

    def cores(self) -> float | None:
        """Return the average number of cores since construction, or None on a system without /proc/stat."""
        used = self._others()
        if used is None or self._used is None:
            return None
        return max(0.0, (used - self._used) / (time.perf_counter() - self._start))

    @staticmethod
    def _others() -> float | None:
        path = Path("/proc/stat")
        if not path.exists():
            return None
        user, nice, system, _, _, irq, soft_irq, steal, *_ = map(int, path.read_text().splitlines()[0].split()[1:])
        busy = (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4])


def machine() -> dict[str, Any]:
    """Describe the machine and the versions, as JSON."""
    return {
        "processor": next(
            (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
        ),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def write(name: str, document: dict[str, Any]) -> Path:
    """Write a result and a description of the machine to ``RESULTS``, atomically."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    replace(path, json.dumps({"machine": machine(), **document}, indent=1) + "\n")
    return path


def replace(path: Path, content: str) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)
