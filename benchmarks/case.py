"""Run one case of the benchmark in a separate process: one model, dtype and number of threads, with all contestants.

python -m benchmarks.case --model llama-1M --dtype fp32 --threads 2 --rounds 5 --peers DIR --out FILE
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import OtherProcesses, interleaved, machine, replace, summary
from benchmarks.contestants import BASELINE, CONTESTANTS, add_peers, state_bytes
from benchmarks.memory import allocations
from benchmarks.models import build
from optimizer.step.engines.native import TRIALS

logger = logging.getLogger("benchmarks")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COPY = "copy"
_COPIED = 1 << 26
"""Elements of the array whose copy measures the memory bandwidth; 256 MiB in fp32."""
_BUDGET = 6 << 30
"""Largest number of bytes of all parameters and gradients in one heat."""


class Share:
    """Parameters and gradients for the contestants of a heat.

    Each contestant gets separate ones, which are then not in the caches when it steps, as in training. If those need
    too much memory, all contestants share one set, which is then larger than any cache.
    """

    def __init__(self, name: str, dtype: torch.dtype, contestants: int) -> None:
        self._name, self._dtype = name, dtype
        self._first: nn.Module | None = build(name, dtype)
        bytes_each = sum(2 * p.numel() * p.element_size() for p in self._first.parameters())
        self.shared = contestants * bytes_each > _BUDGET

    def model(self) -> nn.Module:
        """Return a model for the next contestant."""
        if self.shared:
            assert self._first is not None
            return self._first
        first, self._first = self._first, None
        return build(self._name, self._dtype) if first is None else first


def copying() -> tuple[Tensor, Tensor]:
    """Return (target, source) tensors whose memory pages have been written."""
    return torch.zeros(_COPIED), torch.ones(_COPIED)


def heat(name: str, dtype: torch.dtype, contestants: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Time contestants and a plain copy in interleaved rounds.

    Args:
        name: name of the model.
        dtype: dtype of the parameters.
        contestants: names of the contestants, including the baseline.
        rounds: number of timed rounds.

    Returns:
        By contestant, its measurements, or the error with which it failed.

    Raises:
        RuntimeError: an optimizer of this project failed.
    """
    share = Share(name, dtype, len(contestants))
    optimizers: dict[str, torch.optim.Optimizer] = {}
    rows: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        entry = CONTESTANTS[contestant]
        try:
            optimizer = entry.make(share.model(), name)
            # The native step tries several ways through memory and then stays with the fastest.
            for _ in range(1 + (TRIALS if "AdamMini fused" in contestant else 0)):
                optimizer.step()
        except Exception as error:
            if entry.ours:
                raise RuntimeError(f"{contestant} on {name}: {error}") from error
            rows[contestant] = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]}
            logger.warning("%s cannot step %s: %s", contestant, name, rows[contestant]["error"])
            continue
        optimizers[contestant] = optimizer
    target, source = copying()
    calls: dict[str, Any] = {each: optimizer.step for each, optimizer in optimizers.items()}
    calls[COPY] = lambda: target.copy_(source)
    others = OtherProcesses()
    # One warm-up round is enough, because every optimizer has already taken the step that creates its state.
    table = summary(interleaved(calls, rounds, warmup=1), BASELINE)
    disturbed = others.cores()
    for contestant, optimizer in optimizers.items():
        rows[contestant] = table[contestant] | _facts(optimizer, table[contestant]["median_s"])
        rows[contestant] |= {"shared_parameters": share.shared, "others_cores": disturbed}
    rows[COPY] = table[COPY] | {"gb_per_s": 2 * source.nbytes / table[COPY]["median_s"] / 1e9}
    return rows


def _facts(optimizer: torch.optim.Optimizer, median: float) -> dict[str, Any]:
    """Compute traffic, state and temporaries of a step, also as shares of the largest tensor and of all parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sizes = [p.numel() * p.element_size() for p in parameters]
    count = sum(p.numel() for p in parameters)
    state = state_bytes(optimizer)
    traffic = 3 * sum(sizes) + 2 * state  # The parameter and the state are read and written, the gradient is read.
    new = allocations(optimizer.step)
    return {
        "parameters": count,
        "state_bytes_per_parameter": state / count,
        "traffic_bytes_per_parameter": traffic / count,
        "gb_per_s": traffic / median / 1e9,
        "largest_temporary": new.largest,
        "peak_new_bytes": new.peak,
        "largest_temporary_of_largest": new.largest / max(sizes),
        "peak_of_largest": new.peak / max(sizes),
        "peak_of_group": new.peak / sum(sizes),
    }


def run(model: str, dtype: str, contestants: list[str], rounds: int, peers: Path) -> dict[str, Any]:
    """Run all heats of a case. The baseline runs in every heat, and its row is that of the first."""
    rows: dict[str, dict[str, Any]] = {}
    heats = dict.fromkeys(CONTESTANTS[name].heat for name in contestants)
    for which in heats:
        members = [name for name in contestants if CONTESTANTS[name].heat == which and name != BASELINE]
        if not members:
            continue
        if which == "compiled":  # Added only here, because transformers imports torchao if it can.
            add_peers(peers)
        heat_rounds = {"slow": max(3, rounds // 3), "compiled": 3}.get(which, rounds)
        heat_rows = heat(model, DTYPES[dtype], [BASELINE, *members], heat_rounds)
        for name, row in heat_rows.items():
            row["heat"] = which
            rows.setdefault(name, row)
            if name in (BASELINE, COPY):
                rows[name].setdefault("heats", {})[which] = {key: row[key] for key in ("median_s", "q1_s", "q3_s", "n")}
        gc.collect()
    return {"model": model, "dtype": dtype, "threads": torch.get_num_threads(), "rows": rows, "machine": machine()}


def main() -> None:
    """Run one case and write its JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS))
    parser.add_argument("--peers", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    document = run(arguments.model, arguments.dtype, arguments.contestants, arguments.rounds, arguments.peers)
    replace(arguments.out, json.dumps(document))


if __name__ == "__main__":
    main()
