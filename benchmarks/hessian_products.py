"""Measure what a Hessian product costs: alone, in blocks, by graphs and by vmap, in gradients of CPU time.

    python -m benchmarks.hessian_products [--rounds 5]

One thread, interleaved rounds, medians. ``plain`` is the loop that a caller would write: one gradient with
``create_graph=True``, and one ``torch.autograd.grad`` through it per vector. The sizes are those around the crossover
of the two ways of multiplying blocks, which sets ``hessian.operators.LARGE``.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessian.operators
from benchmarks.common import OtherProcesses, write
from experiments.models import GPTConfig, LlamaConfig, build, lm_loss
from hessian import HessianOperator

logger = logging.getLogger("benchmarks")
BLOCK = 8
"""Vectors in a block."""
CASES: dict[str, tuple[Any, int, int]] = {
    "GPT, width 16": (GPTConfig(vocab=8, block_size=16, n_embd=16, n_layer=1, n_head=4), 32, 16),
    "Llama, width 16": (LlamaConfig(vocab=8, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden=32), 32, 16),
    "Llama, width 32": (LlamaConfig(vocab=64, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden=96), 16, 32),
    "GPT, width 64": (GPTConfig(vocab=64, block_size=64, n_embd=64, n_layer=2, n_head=4), 8, 64),
    "Llama, width 64": (LlamaConfig(vocab=64, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden=192), 16, 64),
    "GPT, 0.87M": (GPTConfig(block_size=64), 16, 64),
    "Llama, 0.85M": (LlamaConfig(), 16, 64),
}
"""Name -> (model, rows, tokens in a row)."""


def measured(config: Any, rows: int, length: int, rounds: int) -> dict[str, Any]:
    """Return medians over rounds, in gradients per product, and what a product computes."""
    model = build(config, 0)
    windows = torch.randint(0, config.vocab, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    batch = (windows[:, :-1], windows[:, 1:])
    parameters = list(model.parameters())
    operator = HessianOperator(model, lm_loss, None, [batch])
    V = torch.randn(operator.shape[0], BLOCK, generator=torch.Generator().manual_seed(1))
    with sdpa_kernel(SDPBackend.MATH):
        graph = torch.autograd.grad(lm_loss(model, batch), parameters, create_graph=True)

    def plain() -> Tensor:
        columns = []
        for j in range(BLOCK):
            parts = [
                x.view_as(p) for x, p in zip(V[:, j].split([p.numel() for p in parameters]), parameters, strict=True)
            ]
            product = torch.autograd.grad(graph, parameters, parts, retain_graph=True)
            columns.append(torch.cat([x.flatten() for x in product]))
        return torch.stack(columns, dim=1)

    def way(large: float) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with mock.patch.object(hessian.operators, "LARGE", large):
                return operator.matmat(V)

        return call

    calls: dict[str, Callable[[], Any]] = {
        "gradient": lambda: torch.autograd.grad(lm_loss(model, batch), parameters),
        "plain": plain,
        "graphs": way(0),
        "vmap": way(float("inf")),
        "alone": lambda: [operator @ V[:, j] for j in range(BLOCK)],
    }
    wanted = plain()
    off = {name: float((calls[name]() - wanted).abs().max() / wanted.abs().max()) for name in ("graphs", "vmap")}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    work = operator.work
    return {
        "parameters": operator.shape[0],
        "elements_per_operation": work.per_operation if work else None,
        "gradient_s": medians.pop("gradient"),
        "gradients_per_product": {
            name: value / BLOCK / statistics.median(seconds["gradient"]) for name, value in medians.items()
        },
        "largest_difference": off,
    }


def main() -> None:
    """Run all cases and write ``benchmarks/results/hessian_products.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    others, rows = OtherProcesses(), {}
    for name in arguments.cases:
        rows[name] = measured(*CASES[name], arguments.rounds)
        each = rows[name]["gradients_per_product"]
        logger.info(
            "%-16s %8.0f elements per operation; %s", name, rows[name]["elements_per_operation"],
            ", ".join(f"{way} {value:.2f}" for way, value in each.items()),
        )  # fmt: skip
    document = {"rounds": arguments.rounds, "other_processes_cores": others.cores(), "cases": rows}
    logger.info("written to %s", write("hessian_products", document))


if __name__ == "__main__":
    main()
