"""Tokens per second of the trainer against a plain loop of the same steps: ``python -m benchmarks.trainer``.

Both train the byte-level Llama of the ablation on one thread, from the same weights, on the same batches, with the
same optimizer. The plain loop has no checkpoints, no records and no signals. Rounds alternate; ratios are taken within
a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import machine, write
from experiments import data
from experiments.configs import TrainConfig, byte_llama
from experiments.models import build, lm_loss
from experiments.optimizers import make_optimizer
from experiments.train import Options, learning_rate, train


def plain(config: TrainConfig) -> float:
    """Return the seconds of a loop that does nothing but train."""
    corpus = data.load(config.data)
    started = time.perf_counter()
    model = build(config.model, config.seed)
    betas = (config.beta1, config.beta2)
    optimizer = make_optimizer(
        model, config.arm, lr=config.lr, betas=betas, weight_decay=config.weight_decay, seed=config.seed
    )
    for step in range(config.steps):
        batch = data.batch_at(corpus.train, config.seed, step, config.batch, config.seq_len)
        lm_loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - started


def trainer(config: TrainConfig) -> float:
    """Return the seconds of the trainer's steps, its validation left out."""
    with tempfile.TemporaryDirectory() as folder:
        return float(train(config, Path(folder), Options())["seconds"])


def main() -> None:
    """Time both, print the medians and their ratio, and store them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = dataclasses.replace(
        byte_llama(), arm="adam_mini", steps=arguments.steps, eval_every=arguments.steps, eval_batches=1
    )
    tokens = config.steps * config.batch * config.seq_len
    times: dict[str, list[float]] = {"plain loop": [], "trainer": []}
    for _ in range(arguments.rounds):
        times["plain loop"].append(plain(config))
        times["trainer"].append(trainer(config))
    speed = {name: [tokens / seconds for seconds in values] for name, values in times.items()}
    lines = []
    for name, values in speed.items():
        lines.append(f"{name:12s} {statistics.median(values):8.0f} tokens/s ({min(values):.0f} to {max(values):.0f})")
    ratios = [b / a for a, b in zip(speed["plain loop"], speed["trainer"], strict=True)]
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}, n = {len(ratios)}"
    sys.stdout.write("\n".join([*lines, f"trainer / plain loop: {statistics.median(ratios):.3f} ({spread})", ""]))
    write("trainer", {"machine": machine(), "steps": config.steps, "tokens_per_second": speed})


if __name__ == "__main__":
    main()
