"""Measure start-up and overhead: the import, the first step of a deep model, and the Python time per tensor.

python -m benchmarks.start import|first      one measurement in a fresh process, a JSON object on standard output
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

LAYERS = {"layers": 32, "dim": 384, "hidden": 1024, "vocab": 8192}
"""Sizes of the deep model, which has 63M parameters."""
TENSORS = (10, 100, 1000)


def importing() -> dict[str, float]:
    """Return the seconds to import torch, and then optimizer; the process must not have imported either before."""
    start = time.perf_counter()
    import torch  # noqa: F401 (its import is what is timed)

    middle = time.perf_counter()
    import optimizer  # noqa: F401 (its import is what is timed)

    return {"torch_s": middle - start, "optimizer_s": time.perf_counter() - middle}


def first_step() -> dict[str, float]:
    """Return the seconds to build AdamMini for a 32-layer model and to take its first and second step."""
    import torch

    from benchmarks.models import deep_llama
    from optimizer import AdamMini

    model = deep_llama(**LAYERS)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    start = time.perf_counter()
    optimizer = AdamMini(model, fused=True)
    built = time.perf_counter()
    optimizer.step()
    first = time.perf_counter()
    optimizer.step()
    return {"build_s": built - start, "first_s": first - start, "second_s": time.perf_counter() - first}


def _in_fresh_process(what: str, cache: str | None = None) -> dict[str, float]:
    environment = {**os.environ, **({"ADAM_MINI_CACHE": cache} if cache else {})}
    command = [sys.executable, "-m", "benchmarks.start", what]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()[-500:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def _median(measure: Callable[[], dict[str, float]], n: int) -> dict[str, Any]:
    measured = [measure() for _ in range(n)]
    return {"n": n} | {key: statistics.median(m[key] for m in measured) for key in measured[0]} | {"all": measured}


def startup(n: int) -> dict[str, Any]:
    """Measure the import, and the first step with an empty and with a filled cache, ``n`` times in fresh processes."""
    from benchmarks.common import OtherProcesses

    others = OtherProcesses()
    with tempfile.TemporaryDirectory() as folder:
        caches = iter(f"{folder}/{i}" for i in range(n))
        cold = _median(lambda: _in_fresh_process("first", next(caches)), n)
        warm = _median(lambda: _in_fresh_process("first", f"{folder}/0"), n)
    imports = _median(lambda: _in_fresh_process("import"), n)
    return {"import": imports, "warm": warm, "cold": cold, "others_cores": others.cores()}


def overhead(rounds: int) -> dict[str, Any]:
    """Measure the overhead of a step per tensor, in microseconds.

    The tensors have 8 elements, so arithmetic takes almost no time. The overhead is the slope of the step time over the
    number of tensors.
    """
    import torch
    from torch import nn

    from benchmarks.common import OtherProcesses, interleaved
    from optimizer import AdamMini

    calls: dict[str, Callable[[], Any]] = {}
    for count in TENSORS:
        for name in ("AdamMini fused", "AdamW fused"):
            parameters = [nn.Parameter(torch.zeros(8)) for _ in range(count)]
            for parameter in parameters:
                parameter.grad = torch.ones(8)
            named = [(f"norm{i}.weight", p) for i, p in enumerate(parameters)]
            mini = "Mini" in name
            optimizer = AdamMini(named, fused=True) if mini else torch.optim.AdamW(parameters, fused=True)
            calls[f"{name} {count}"] = optimizer.step
    others = OtherProcesses()
    seconds = {name: statistics.median(values) for name, values in interleaved(calls, rounds).items()}
    out: dict[str, Any] = {"n": rounds, "others_cores": others.cores()}
    for name in ("AdamMini fused", "AdamW fused"):
        points = [1e6 * seconds[f"{name} {count}"] for count in TENSORS]
        slope = statistics.linear_regression(TENSORS, points).slope
        out[name] = {"microseconds": dict(zip(map(str, TENSORS), points, strict=True)), "per_tensor": slope}
    return out


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"import": importing, "first": first_step}[sys.argv[1]]()) + "\n")
