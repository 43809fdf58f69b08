"""Measure the peak of resident memory of a Hessian product beside that of a gradient, each in a process of its own.

    python -m benchmarks.hessian_memory [--tokens 64]

The model is a Llama of SmolLM2-135M's sizes (30 layers, width 576, 135 million parameters, tied embeddings) with random
weights, float32. ``product`` builds an operator, with its checks, and multiplies one vector; ``block`` multiplies four,
whose vectors and products alone are eight times the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import write

logger = logging.getLogger("benchmarks")
VECTORS = {"model": 0, "gradient": 0, "product": 1, "block": 4}


def model_and_batch(tokens: int) -> tuple[nn.Module, Tensor]:
    """Return a random Llama of SmolLM2-135M's sizes, and one row of tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), torch.randint(0, 49152, (1, tokens))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the next-token loss."""
    out: Tensor = model(input_ids=batch, labels=batch, use_cache=False).loss
    return out


def run(what: str, tokens: int) -> dict[str, Any]:
    """Do one of the things to compare, in this process, and return its peak."""
    torch.set_num_threads(1)
    model, batch = model_and_batch(tokens)
    start = time.process_time()
    if what == "gradient":
        torch.autograd.grad(loss_of(model, batch), list(model.parameters()))
    elif VECTORS[what]:
        from hessian import HessianOperator

        operator = HessianOperator(model, loss_of, None, [batch], mean_check=False)
        generator = torch.Generator().manual_seed(0)
        vectors = torch.empty(VECTORS[what], operator.shape[0]).bernoulli_(generator=generator).mul_(2).sub_(1)
        operator.matmat(vectors.T)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "cpu_seconds": time.process_time() - start}


def main() -> None:
    """Run everything in processes of its own and write ``benchmarks/results/hessian_memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", choices=VECTORS, help="run this in this process and print its peak as JSON")
    arguments = parser.parse_args()
    if arguments.only:
        sys.stdout.write(json.dumps(run(arguments.only, arguments.tokens)) + "\n")
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = {}
    for what in VECTORS:
        command = [sys.executable, "-m", "benchmarks.hessian_memory", "--only", what, "--tokens", str(arguments.tokens)]
        answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        rows[what] = json.loads(answer.splitlines()[-1])
        base = rows.get("gradient", rows[what])["peak_bytes"]
        logger.info(
            "%-9s %6.2f GB, %.2f gradients, %.0f s", what, rows[what]["peak_bytes"] / 1e9,
            rows[what]["peak_bytes"] / base, rows[what]["cpu_seconds"],
        )  # fmt: skip
    logger.info("written to %s", write("hessian_memory", {"tokens": arguments.tokens, "rows": rows}))


if __name__ == "__main__":
    main()
