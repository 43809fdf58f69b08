"""Compare the native CPU step with DeepSpeed's, which ZeRO runs when it offloads the optimizer to the CPU.

    make bench-deepspeed

DeepSpeed is in the environment of the interoperability tests, so this command runs there. ``DeepSpeedCPUAdam`` is
compiled at the first use. Times are medians of interleaved rounds; "x fused AdamW" is the median of the ratios within
each round.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.common import RESULTS, OtherProcesses, interleaved, machine, replace, summary
from benchmarks.contestants import BASELINE, CONTESTANTS, DECAY, LR, state_bytes
from benchmarks.models import build
from optimizer.step.engines.native import TRIALS

logger = logging.getLogger("benchmarks")
DEEPSPEED = "DeepSpeedCPUAdam"
OURS = ("AdamMini fused", "AdamMini fused, bf16 moment", "AdamMini fused, int8 moment")


def deepspeed_adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return DeepSpeed's AdamW for the CPU with fp32 states."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    adam: torch.optim.Optimizer = DeepSpeedCPUAdam(
        model.parameters(), lr=LR, weight_decay=DECAY, adamw_mode=True, fp32_optimizer_states=True
    )
    return adam


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Time a step of every optimizer, each with parameters and gradients of its own.

    Args:
        name: a model of ``benchmarks.models``.
        rounds: number of timed rounds.

    Returns:
        By optimizer: median and quartiles in seconds, ratio to torch's fused AdamW, and bytes of state per parameter.
    """
    optimizers: dict[str, torch.optim.Optimizer] = {}
    elements = 0
    for contestant in (BASELINE, *OURS, DEEPSPEED):
        model = build(name, torch.float32)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        elements = sum(p.numel() for p in model.parameters())
        make = CONTESTANTS[contestant].make if contestant in CONTESTANTS else lambda model, _: deepspeed_adam(model)
        optimizers[contestant] = make(model, name)
        for _ in range(TRIALS if contestant in OURS else 0):  # The native step finds its way through memory.
            optimizers[contestant].step()
    busy = OtherProcesses()
    seconds = interleaved({key: optimizer.step for key, optimizer in optimizers.items()}, rounds)
    rows: dict[str, Any] = summary(seconds, BASELINE)
    for key, optimizer in optimizers.items():
        rows[key]["state_per_parameter"] = state_bytes(optimizer) / elements
    return {"model": name, "rounds": rounds, "other_processes_cores": busy.cores(), "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return a result as a Markdown table."""
    lines = ["| optimizer | ms | middle half | x fused AdamW | state, bytes per parameter |", "|---|--:|--:|--:|--:|"]
    for name, row in result["rows"].items():
        median, low, high = (1e3 * row[key] for key in ("median_s", "q1_s", "q3_s"))
        state = row["state_per_parameter"]
        lines.append(f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} | {row['ratio']:.2f} | {state:.3f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and write it with the machine's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-45M", help="a model of benchmarks.models")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "deepspeed_adam.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    result = {"machine": machine(), **measure(arguments.model, arguments.rounds)}
    replace(arguments.out, json.dumps(result, indent=1) + "\n")
    busy = result["other_processes_cores"]
    logger.info("%s\nn = %d rounds; cores used by others: %s; %s", table(result), arguments.rounds, busy, arguments.out)


if __name__ == "__main__":
    main()
