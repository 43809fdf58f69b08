"""Compare this project's Hessian products with a loop of double backward, in columns of a dense Hessian per second.

    python -m benchmarks.dense_hessian [--columns 64] [--rounds 7] [--threads 1]

The model is the study's tiny Llama (4,944 parameters, float64, 32 x 16 tokens). Rounds of the two are interleaved.
"""

from __future__ import annotations

import argparse
import logging

import torch
from torch import Tensor

from benchmarks.common import interleaved, summary, write
from experiments.data import batch_at, load
from experiments.models import build, lm_loss
from experiments.studies.hessian_maps.settings import subjects
from hessian import HessianOperator

logger = logging.getLogger("benchmarks")


def main() -> None:
    """Run the comparison and write ``benchmarks/results/dense_hessian.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    model = build(subjects("full")["llama"], 0).double()
    batch = batch_at(load("python-stdlib-8").train, 0, 0, 32, 16)
    operator = HessianOperator(model, lm_loss, None, [batch])
    parameters = list(model.parameters())
    n = operator.shape[0]
    vectors = torch.eye(n, dtype=torch.float64)[:, : arguments.columns].contiguous()

    def double_backward() -> Tensor:
        """Build one gradient graph and run one backward pass through it per column."""
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            gradient = torch.autograd.grad(lm_loss(model, batch), parameters, create_graph=True)
            flat = torch.cat([g.flatten() for g in gradient])
            columns = []
            for j in range(arguments.columns):
                product = torch.autograd.grad(flat[j], parameters, retain_graph=True)
                columns.append(torch.cat([p.flatten() for p in product]))
        return torch.stack(columns, dim=1)

    worst = float((double_backward() - operator.matmat(vectors)).abs().max())
    seconds = interleaved(
        {"double backward": double_backward, "ours": lambda: operator.matmat(vectors)}, arguments.rounds
    )
    rows = summary(seconds, "double backward")
    for name, row in rows.items():
        row["columns_per_s"] = arguments.columns / row["median_s"]
        logger.info(
            "%-16s %7.1f columns/s (n=%d rounds), time ratio %.2f", name, row["columns_per_s"], row["n"], row["ratio"]
        )
    speedup = 1 / rows["ours"]["ratio"]
    logger.info("ours is %.2fx as fast; the largest difference of an entry is %.1e", speedup, worst)
    document = {
        "parameters": n,
        "columns": arguments.columns,
        "speedup": speedup,
        "largest_difference": worst,
        "rows": rows,
    }
    logger.info("written to %s", write("dense_hessian", document))


if __name__ == "__main__":
    main()
