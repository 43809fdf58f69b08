"""Compare optimizers inside DeepSpeed's ZeRO-2 with the optimizer offloaded to the CPU (ZeRO-Offload).

    make bench-deepspeed

Every optimizer has an engine, a model and a process group of one gloo rank for itself. The models start from the same
weights and see the same batches of real text. Rounds are interleaved: each engine takes one training step per round.
"Optimizer" is the time inside the optimizer's ``step``, "engine" that of ``engine.step``, which also clips, copies
gradients in and parameters out. What ranks compute together is checked in tests/interop/check_deepspeed.py.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common import RESULTS, OtherProcesses, machine, replace, summary
from benchmarks.contestants import DECAY, state_bytes
from benchmarks.models import trainable
from examples.text import batch
from optimizer import AdamMini
from optimizer.step.engines.native import TRIALS

logger = logging.getLogger("benchmarks")
LR, BETAS = 1e-3, (0.9, 0.95)
BASELINE = "DeepSpeedCPUAdam"
Make = Callable[[nn.Module], torch.optim.Optimizer]


def deepspeed_adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return DeepSpeed's AdamW for the CPU with fp32 states, for the groups that AdamMini makes of a model."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    adam: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=LR, betas=BETAS, adamw_mode=True)
    return adam


def _mini(**options: Any) -> Make:
    return lambda model: AdamMini(model, lr=LR, betas=BETAS, weight_decay=DECAY, **options)


CONTESTANTS: dict[str, Make] = {
    BASELINE: deepspeed_adam,
    "AdamMini": _mini(),
    "AdamMini, int8 moment": _mini(exp_avg_dtype="int8"),
    "AdamMini, int4 moment": _mini(exp_avg_dtype="int4"),
    "AdamMini, factored": _mini(rules="factored"),
    "AdamMini, factored, int8 moment": _mini(rules="factored", exp_avg_dtype="int8"),
}
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "reduce_bucket_size": 5_000_000,
        "allgather_bucket_size": 5_000_000,
    },
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "steps_per_print": 10**9,
}


class Trained:
    """One optimizer in its engine.

    Attributes:
        losses: loss of every training step.
        optimizer_s: seconds inside the optimizer's ``step``, by training step.
        engine_s: seconds of ``engine.step``, by training step.
        optimizer: the optimizer that was passed to DeepSpeed.
        parameters: number of parameters.
    """

    def __init__(self, name: str, make: Make) -> None:
        import deepspeed

        model = trainable(name)
        self.parameters, self.optimizer = sum(p.numel() for p in model.parameters()), make(model)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=CONFIG, dist_init_required=False
        )
        self.losses: list[float] = []
        self.optimizer_s: list[float] = []
        self.engine_s: list[float] = []
        self._step = self.optimizer.step
        self.optimizer.step = self._timed  # type: ignore[method-assign]  # ZeRO calls it once per group

    def _timed(self, *arguments: Any, **more: Any) -> Any:
        start = time.perf_counter()
        out = self._step(*arguments, **more)
        self.optimizer_s[-1] += time.perf_counter() - start
        return out

    def train(self, step: int) -> None:
        """Take one training step."""
        tokens = batch(step)
        loss = self._engine(input_ids=tokens, labels=tokens).loss
        self._engine.backward(loss)
        self.optimizer_s.append(0.0)
        start = time.perf_counter()
        self._engine.step()
        self.engine_s.append(time.perf_counter() - start)
        self.losses.append(float(loss.detach()))


def measure(name: str, rounds: int, warmup: int = 2 + TRIALS) -> dict[str, Any]:
    """Train with every optimizer in turns.

    Args:
        name: a model of ``benchmarks.models``.
        rounds: number of timed training steps.
        warmup: number of steps before them that are not timed; in the first ones the native step finds its way.

    Returns:
        By optimizer: times and their ratios to DeepSpeed's optimizer in the same round, bytes of state per parameter,
        and the losses.
    """
    trained = {key: Trained(name, make) for key, make in CONTESTANTS.items()}
    for step in range(warmup):
        for one in trained.values():
            one.train(step)
    others = OtherProcesses()
    for step in range(warmup, warmup + rounds):
        for one in trained.values():
            one.train(step)
    busy = others.cores()
    inner, outer = (
        summary({key: getattr(one, kind)[warmup:] for key, one in trained.items()}, BASELINE)
        for kind in ("optimizer_s", "engine_s")
    )
    rows = {
        key: {
            "optimizer": inner[key],
            "engine": outer[key],
            "state_per_parameter": state_bytes(one.optimizer) / one.parameters,
            "loss": statistics.mean(one.losses[-5:]),
            "losses": one.losses,
        }
        for key, one in trained.items()
    }
    return {"model": name, "rounds": rounds, "steps": warmup + rounds, "other_processes_cores": busy, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Return a result as a Markdown table."""
    lines = [
        f"| optimizer | ms | middle half | x {BASELINE} | engine, x | state, bytes per parameter | last five losses |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in result["rows"].items():
        times = row["optimizer"]
        median, low, high = (1e3 * times[key] for key in ("median_s", "q1_s", "q3_s"))
        lines.append(
            f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} | {times['ratio']:.2f} | {row['engine']['ratio']:.2f} "
            f"| {row['state_per_parameter']:.3f} | {row['loss']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, and write it with the machine's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-45M", help="a model of benchmarks.models")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, default=RESULTS / "deepspeed_zero.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires what its launcher sets
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        result = {"machine": machine(), **measure(arguments.model, arguments.rounds)}
    replace(arguments.out, json.dumps(result, indent=1) + "\n")
    busy = result["other_processes_cores"]
    logger.info("%s\nn = %d steps; cores used by others: %s; %s", table(result), arguments.rounds, busy, arguments.out)


if __name__ == "__main__":
    main()
