"""Step time, state bytes and largest temporary of the eager step beside torch's AdamW.

    python -m benchmarks.optimizer_step [--rounds 15] [--threads 2]

Each contestant trains its own copy of a Llama-shaped set of parameters with the same fixed gradients.
"""

from __future__ import annotations

import argparse
import logging

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


def main() -> None:
    """Run the comparison and write ``benchmarks/results/optimizer_step.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    makers = {
        "AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        "AdamW foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
        "AdamW for-loop": lambda model: torch.optim.AdamW(model.parameters(), foreach=False),
        "AdamMini eager": AdamMini,
    }
    optimizers = {}
    for name, make in makers.items():
        model = llama_shapes(dim=384, hidden=1024, layers=4, vocab=4096)
        for parameter in model.parameters():
            parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        optimizers[name] = make(model)
    seconds = interleaved({name: o.step for name, o in optimizers.items()}, arguments.rounds)
    table = summary(seconds, "AdamW fused")
    count = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    mini = optimizers["AdamMini eager"]
    assert isinstance(mini, AdamMini)
    for name, optimizer in optimizers.items():
        table[name]["largest_temporary_share"] = largest_temporary(optimizer) / largest
        row = table[name]
        logger.info(
            "%-15s median %7.2f ms (quartiles %.2f to %.2f), %.2fx fused AdamW, largest temporary %.3f of the largest "
            "tensor, n=%d", name, 1e3 * row["median_s"], 1e3 * row["q1_s"], 1e3 * row["q3_s"], row["ratio"],
            row["largest_temporary_share"], row["n"],
        )  # fmt: skip
    per_parameter = sum(mini.state_bytes().values()) / count
    logger.info("AdamMini state: %.3f bytes per parameter over %s parameters", per_parameter, f"{count:,}")
    logger.info(
        "written to %s",
        write("optimizer_step", {"parameters": count, "bytes_per_parameter": per_parameter, "rows": table}),
    )


if __name__ == "__main__":
    main()
