"""Runs that get a real SIGTERM at a chosen step, and what ranks do in the tests of checkpoints."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import experiments.train as train_module
from experiments.configs import TrainConfig
from experiments.train import Options, run_folder, train
from tests.experiments.processes import metrics


@contextmanager
def sigterm_at(step: int, rank: int = 0) -> Iterator[None]:
    """One process of the run gets the signal while it takes a step."""
    whole = train_module._Run._one_step

    def one_step(self: Any) -> float:
        if self.step + 1 == step and self.team.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module._Run, "_one_step", one_step)
        yield


def stopped(config: TrainConfig, root: str, parallel: str, step: int) -> dict[str, Any]:
    """A run that the last process's SIGTERM ends after a step; its status."""
    with sigterm_at(step, dist.get_world_size() - 1 if dist.is_initialized() else 0):
        return train(config, Path(root), Options(parallel=parallel))  # type: ignore[arg-type]


def trained(config: TrainConfig, root: str, parallel: str, source: str = "") -> dict[str, Any]:
    """A run to its end, from a copy of another one's folder if there is a source: status and records."""
    if source and (not dist.is_initialized() or dist.get_rank() == 0):
        shutil.copytree(source, root)
    if dist.is_initialized():
        dist.barrier()
    status = train(config, Path(root), Options(parallel=parallel))  # type: ignore[arg-type]
    if dist.is_initialized():
        dist.barrier()  # the first process writes the records
    return {**status, "records": metrics(run_folder(Path(root), config.with_rules_hash()))}
