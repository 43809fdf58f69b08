"""Measure the memory of a training iteration under each method that saves memory.

    python -m benchmarks.memory_tricks

The model is a Llama of 10M parameters on 2 x 64 tokens. "Peak" is the largest number of bytes that one iteration
(forward, backward, step) allocates in addition to parameters and state, from the profiler's allocation events. It
includes the activations, which are the same for all methods.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.common import write
from benchmarks.memory import allocations
from experiments.models import build, lm_loss
from experiments.models.llama import LlamaConfig
from optimizer import AdamMini
from optimizer.memory import CPUOffload, gradient_release

logger = logging.getLogger("benchmarks")

MODEL = LlamaConfig(vocab=4096, dim=384, n_layers=4, n_heads=6, n_kv_heads=6, hidden=1024)
BATCH = tuple(torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(s)) for s in (0, 1))
CONTESTANTS: dict[str, tuple[torch.dtype, Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "AdamW fused": (torch.float32, lambda model: torch.optim.AdamW(model.parameters(), fused=True)),
    "AdamMini": (torch.float32, lambda model: AdamMini(model)),
    "bf16 moment": (torch.float32, lambda model: AdamMini(model, exp_avg_dtype=torch.bfloat16)),
    "gradient release": (torch.float32, lambda model: gradient_release(AdamMini(model)).optimizer),
    "release, bf16 moment": (
        torch.float32,
        lambda model: gradient_release(AdamMini(model, exp_avg_dtype=torch.bfloat16)).optimizer,
    ),
    "bf16 parameters": (torch.bfloat16, lambda model: AdamMini(model)),
    "release, bf16 parameters": (torch.bfloat16, lambda model: gradient_release(AdamMini(model)).optimizer),
    "CPUOffload": (torch.float32, lambda model: CPUOffload(model)),
    "CPUOffload, offload_gradients": (torch.float32, lambda model: CPUOffload(model, offload_gradients=True)),
}


def iteration(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Return a function that runs one iteration of an ordinary training loop."""

    def run() -> None:
        optimizer.zero_grad()
        lm_loss(model, BATCH).backward()
        optimizer.step()

    return run


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes in use between two iterations, by kind; the next ``zero_grad`` frees the gradients."""
    state = [t for entry in optimizer.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
    out = {
        "parameters": sum(p.nbytes for p in model.parameters()),
        "state": sum(t.nbytes for t in state),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
    }
    if isinstance(optimizer, CPUOffload):
        copies = [mirror.host for mirror in optimizer._mirrors.values()]
        out["host_copies"] = sum(t.nbytes + (0 if t.grad is None else t.grad.nbytes) for t in copies)
    return out


def main() -> None:
    """Measure and write ``results/memory_tricks.json``."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows: dict[str, dict[str, int]] = {}
    for name, (dtype, make) in CONTESTANTS.items():
        model = build(MODEL, 0).to(dtype)
        optimizer = make(model)
        run = iteration(model, optimizer)
        run()
        optimizer.zero_grad()
        most = allocations(run).peak
        rows[name] = {**held(model, optimizer), "peak": most}
        logger.info("%-30s MB: %s", name, "  ".join(f"{k} {v / 1e6:7.2f}" for k, v in rows[name].items()))
    numel = sum(p.numel() for p in build(MODEL, 0).parameters())
    write("memory_tricks", {"numel": numel, "rows": rows})


if __name__ == "__main__":
    main()
