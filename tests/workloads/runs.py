"""What checks of workloads share: a workload's small run, and that an interrupted one goes on to the same numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import experiments.train as train_module
from experiments.configs import TrainConfig
from experiments.train import run_folder, train
from experiments.workloads import WORKLOADS
from optimizer.tools.explain import explanation
from tests.experiments import processes


class Interrupted(BaseException):
    """Not an Exception: like a kill, it is not recorded."""


def small(name: str, **fields: Any) -> TrainConfig:
    """Return a workload's run of the profile ``smoke``."""
    workload = WORKLOADS[name]
    base = TrainConfig("check", **workload.run)
    return dataclasses.replace(base, **{**workload.smoke, "lr": 1e-3, **fields}).with_rules_hash()


def records(root: Path, config: TrainConfig) -> list[dict[str, Any]]:
    """Return the records of a run, without seconds."""
    return processes.metrics(run_folder(root, config))


def require_same_after_a_kill(config: TrainConfig, root: Path, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Check that a run that was killed after some steps ends with the weights and numbers of an uninterrupted one."""
    whole = train_module._Run._one_step

    def step(self: Any) -> float:
        if self.step == after:
            raise Interrupted
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(train_module._Run, "_one_step", step)
        with pytest.raises(Interrupted):
            train(config, root / "killed")
    assert (run_folder(root / "killed", config) / "checkpoints").is_dir()
    resumed, straight = train(config, root / "killed"), train(config, root / "straight")
    assert resumed["state"] == "finished"
    assert resumed["weights_sha256"] == straight["weights_sha256"]
    assert records(root / "killed", config) == records(root / "straight", config)


def reduced(name: str, full: str, **fields: Any) -> TrainConfig:
    """Return a full-size run cut to two steps of a small batch, with the schedule and the optimizer of the full one."""
    workload = WORKLOADS[name]
    run = {"batch": 4, "steps": 2, "warmup": 0.5, "eval_every": 2, "eval_batches": 1, "checkpoint_every": 0}
    base = TrainConfig("check", **{**workload.run, **workload.full[full]})
    return dataclasses.replace(base, **{**run, "data": workload.run["data"], **fields}).with_rules_hash()


def require_recognised(model: nn.Module) -> None:
    """Check that no weight falls to the default rule, and that a convolution has one scalar per output channel."""
    rows = explanation(model).rows
    assert rows and not [row.name for row in rows if not row.recognised]
    for row in rows:
        if len(row.shape) == 4:
            assert row.layout.n_blocks == row.shape[0], row.name
