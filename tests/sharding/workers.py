"""Run cases on several gloo ranks: one start of the processes for many cases."""

from __future__ import annotations

import datetime
import faulthandler
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from tests import forking

Case = tuple[str, dict[str, Any]]
"""A function of ``tests.sharding.training`` (or another module, as "module:function") and its arguments."""


def run(
    world: int, cases: dict[str, Case], timeout: float = 600, *, own_interpreters: bool = False
) -> dict[str, list[Any]]:
    """Every case on ``world`` ranks: name -> the ranks' results, an error's text where one was raised.

    Args:
        world: number of ranks.
        cases: what they run, one case after the other.
        timeout: seconds for all cases.
        own_interpreters: ranks from the second on are interpreters with hash seeds of their own, as under torchrun. A
            rank that goes through a set in an order of its own would then disagree with the others. Forked ranks, the
            default, start sooner.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "cases").write_bytes(pickle.dumps(cases))
        # What ranks say goes to files: a pipe that nobody reads stops them once it is full.
        told = [Path(folder, f"said{rank}") for rank in range(world)]
        fresh = range(1, world) if own_interpreters else ()
        begin = [_interpreter if rank in fresh else _fork for rank in range(world)]
        ranks = [begin[rank](told[rank], folder, rank, world, timeout) for rank in range(world)]
        try:
            for process in ranks:
                process.wait(timeout=timeout + 30)
        finally:
            for process in ranks:
                process.kill()
        answers = []
        for rank in range(world):
            path = Path(folder, f"out{rank}")
            if not path.exists():
                ends = "\n".join(
                    f"rank {r} ended with {ranks[r].returncode}, having said:\n{said.read_text()[-3000:]}"
                    for r, said in enumerate(told)
                )
                raise RuntimeError(f"rank {rank} ended without an answer\n{ends}")
            answers.append(pickle.loads(path.read_bytes()))
        return {name: [answer[name] for answer in answers] for name in cases}


def _fork(output: Path, *arguments: Any) -> forking.Forked:
    return forking.start(main, *arguments, output=output)


def _interpreter(output: Path, folder: str, rank: int, world: int, patience: float) -> subprocess.Popen[bytes]:
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(forking.ROOT), "PYTHONHASHSEED": str(1 + rank)}
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.sharding.workers", folder, str(rank), str(world), str(patience)],
            cwd=forking.ROOT, env=os.environ | environment, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def main(folder: str, rank: int, world: int, patience: float) -> None:
    """One rank."""
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(patience, exit=True)
    cases: dict[str, Case] = pickle.loads(Path(folder, "cases").read_bytes())
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=120))
    answers: dict[str, Any] = {}
    for name, (function, arguments) in cases.items():
        module, _, attribute = function.rpartition(":")
        call = getattr(importlib.import_module(module or "tests.sharding.training"), attribute)
        try:
            answers[name] = call(**arguments)
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        dist.barrier()
    Path(folder, f"out{rank}").write_bytes(pickle.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
