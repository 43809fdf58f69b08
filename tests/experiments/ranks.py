"""What the ranks of a test do: gradients of micro-batches, and whole runs. They are forked, and meet over gloo."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from experiments import passes
from experiments.configs import TrainConfig
from experiments.data import batch_at, load
from experiments.models import build
from experiments.parallel import Team, process_group
from experiments.train import Options, launch
from tests import forking


def start(function: Callable[..., None], *arguments: Any, log: Path, ranks: int = 2) -> None:
    """Call a function in every rank of a group, with its rank in the environment, and wait for all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [
        forking.start(_ranked, rank, ranks, port, function, arguments, output=log.with_suffix(f".{rank}"))
        for rank in range(ranks)
    ]
    codes = [process.wait(timeout=120) for process in running]
    assert codes == [0] * ranks, "\n".join(log.with_suffix(f".{rank}").read_text()[-2000:] for rank in range(ranks))


def _ranked(rank: int, ranks: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    function(*arguments)


def whole_run(config: TrainConfig, root: Path, options: Options) -> None:
    assert launch(config, root, options) == 0


def gradients(config: TrainConfig, rows: int, recompute: bool, kind: str, out: Path) -> None:
    """Store the loss, the whole gradients, and how often DDP reduced, after a backward pass of one batch.

    DDP's reducer is gone before the process group is destroyed. Otherwise the reducer is what destroys the group, and
    it waits with Python's lock held for gloo's thread, which needs that lock to free what the hook's all-reduce saved.
    """
    with process_group("cpu"):
        _gradients(config, rows, recompute, kind, out)
        gc.collect()


def _gradients(config: TrainConfig, rows: int, recompute: bool, kind: str, out: Path) -> None:
    team = Team.here(kind, "cpu", config.batch)  # type: ignore[arg-type]
    model = team.place(build(config.model, 0))
    model.recompute = recompute
    module, reductions = team.wrap(model), [0]
    if kind == "ddp":

        def counting(_, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
            reductions[0] += 1
            work = dist.all_reduce(bucket.buffer().div_(team.world), async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        module.register_comm_hook(None, counting)  # type: ignore[operator]
    batch = team.local_rows(batch_at(load(config.data).train, 0, 0, config.batch, config.seq_len))
    loss, _ = team.agree(passes.backward(module, batch, rows=rows), False)
    whole = {
        name: (p.grad.full_tensor() if kind == "fsdp2" else p.grad)  # type: ignore[union-attr]
        for name, p in model.named_parameters()
    }
    if team.rank == 0:
        torch.save({"loss": loss, "gradients": whole, "reductions": reductions[0]}, out)
