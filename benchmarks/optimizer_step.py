"""Step time, state bytes and largest temporary of every way to step beside torch's AdamW.

    python -m benchmarks.optimizer_step [--rounds 25] [--threads 2]

Each contestant trains its own copy of a Llama-shaped set of parameters with the same fixed gradients.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import interleaved, summary, write
from optimizer import AdamMini

logger = logging.getLogger("benchmarks")


def llama_shapes(dim: int, hidden: int, layers: int, vocab: int) -> nn.ModuleDict:
    """Parameters of a Llama under Meta's names, without a forward pass."""

    def block() -> nn.ModuleDict:
        attention = nn.ModuleDict({k: nn.Linear(dim, dim, bias=False) for k in ("wq", "wk", "wv", "wo")})
        attention.n_heads = dim // 64  # type: ignore[assignment]
        forward = nn.ModuleDict({
            "w1": nn.Linear(dim, hidden, bias=False), "w3": nn.Linear(dim, hidden, bias=False),
            "w2": nn.Linear(hidden, dim, bias=False),
        })  # fmt: skip
        return nn.ModuleDict({"attention": attention, "feed_forward": forward, "norm": nn.RMSNorm(dim)})

    return nn.ModuleDict({
        "tok_embeddings": nn.Embedding(vocab, dim), "layers": nn.ModuleList(block() for _ in range(layers)),
        "norm": nn.RMSNorm(dim), "output": nn.Linear(dim, vocab, bias=False),
    })  # fmt: skip


def largest_temporary(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the largest single allocation inside one step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        optimizer.step()
    return max((event.self_cpu_memory_usage for event in recorded.events()), default=0)


CASES = {
    "10M fp32": ({"dim": 384, "hidden": 1024, "layers": 4, "vocab": 4096}, torch.float32),
    "45M fp32": ({"dim": 512, "hidden": 1376, "layers": 9, "vocab": 16000}, torch.float32),
    "45M bf16": ({"dim": 512, "hidden": 1376, "layers": 9, "vocab": 16000}, torch.bfloat16),
}
BASELINE = "AdamW fused"
CONTESTANTS = {
    BASELINE: lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "AdamW foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
    "AdamW for-loop": lambda model: torch.optim.AdamW(model.parameters(), foreach=False),
    "AdamMini native": lambda model: AdamMini(model, exp_avg_dtype=torch.float32, fused=True),
    "AdamMini eager": lambda model: AdamMini(model, exp_avg_dtype=torch.float32, fused=False),
}


def case(shape: dict[str, int], dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Every contestant on its own copy of one set of parameters, interleaved."""
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for name, make in CONTESTANTS.items():
        model = llama_shapes(**shape).to(dtype)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.grad = (1e-3 * gradient).to(dtype)
        optimizers[name] = make(model)
    table = summary(interleaved({name: o.step for name, o in optimizers.items()}, rounds), BASELINE)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    for name, optimizer in optimizers.items():
        table[name]["largest_temporary_share"] = largest_temporary(optimizer) / largest
    mini = optimizers["AdamMini native"]
    assert isinstance(mini, AdamMini)
    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count, "bytes_per_parameter": sum(mini.state_bytes().values()) / count, "rows": table}


def microseconds_per_tensor(tensors: int = 1000) -> float:
    """What a step costs for each tensor beside the arithmetic: tensors of eight elements."""
    parameters = [nn.Parameter(torch.zeros(8)) for _ in range(tensors)]
    for parameter in parameters:
        parameter.grad = torch.ones(8)
    optimizer = AdamMini([(f"norm{i}.weight", p) for i, p in enumerate(parameters)], fused=True)
    seconds = interleaved({"step": optimizer.step}, 25)["step"]
    return 1e6 * statistics.median(seconds) / tensors


def main() -> None:
    """Run the comparison and write ``benchmarks/results/optimizer_step.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    results = {name: case(shape, dtype, arguments.rounds) for name, (shape, dtype) in CASES.items()}
    for name, result in results.items():
        for contestant, row in result["rows"].items():
            logger.info(
                "%s  %-15s median %7.2f ms (quartiles %.2f to %.2f), %.2fx fused AdamW, largest temporary %.4f of the "
                "largest tensor, n=%d", name, contestant, 1e3 * row["median_s"], 1e3 * row["q1_s"], 1e3 * row["q3_s"],
                row["ratio"], row["largest_temporary_share"], row["n"],
            )  # fmt: skip
        logger.info("%s  AdamMini state: %.3f bytes per parameter", name, result["bytes_per_parameter"])
    overhead = microseconds_per_tensor()
    logger.info("native step beside the arithmetic: %.2f us per tensor", overhead)
    logger.info("written to %s", write("optimizer_step", {"cases": results, "microseconds_per_tensor": overhead}))


if __name__ == "__main__":
    main()
