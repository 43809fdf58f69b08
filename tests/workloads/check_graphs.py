"""GCN and GAT by PyTorch Geometric: they train, resume with dropout to the same bits, and run on two processes."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments import passes
from experiments.configs import TrainConfig, of_workloads
from experiments.data import arxiv
from experiments.train import fetch, make_task, run_folder, train
from optimizer.partition import discover
from tests.experiments.processes import ROOT

NETWORKS = ("gcn", "gat")


class Killed(BaseException):
    """Not an Exception: like a kill, it is not recorded."""


def kill_in_step(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Let a run end in a step, counted from 1, before its update."""
    whole, calls = passes.backward, [0]

    def backward(*arguments: Any, **options: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == last:
            raise Killed
        return whole(*arguments, **options)

    monkeypatch.setattr(passes, "backward", backward)


def records(root: Path, config: TrainConfig) -> list[dict[str, float]]:
    lines = (run_folder(root, config.with_rules_hash()) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.parametrize("name", NETWORKS)
def check_a_killed_run_resumes_with_its_dropout_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config = of_workloads()[f"{name}-smoke"]
    fetch(config)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in_step(patch, 4)
        train(config, tmp_path / "killed")
    resumed, straight = train(config, tmp_path / "killed"), train(config, tmp_path / "straight")
    assert resumed["state"] == "finished" and resumed["weights_sha256"] == straight["weights_sha256"]
    assert records(tmp_path / "killed", config) == records(tmp_path / "straight", config)
    assert set(records(tmp_path / "straight", config)[0]) >= {"val_loss", "accuracy", "test_loss", "test_accuracy"}


@pytest.mark.parametrize("name", NETWORKS)
def check_a_seed_gives_weights_and_dropout_changes_the_loss(name: str) -> None:
    config = of_workloads()[f"{name}-smoke"]
    tasks = [make_task(dataclasses.replace(config, seed=seed), torch.device("cpu")) for seed in (0, 0, 1)]
    first, same, other = (torch.cat([p.detach().flatten() for p in task.model.parameters()]) for task in tasks)
    assert torch.equal(first, same) and not torch.equal(first, other)
    task, batch = tasks[0], tasks[0].batch(0)
    assert task.loss(task.model, batch) != task.loss(task.model, batch)
    task.model.eval()
    assert task.loss(task.model, batch) == task.loss(task.model, batch)


@pytest.mark.parametrize(("name", "parallel"), [("gcn", "ddp"), ("gat", "fsdp2")])
def check_processes_share_the_nodes_of_a_step(tmp_path: Path, name: str, parallel: str) -> None:
    """Without dropout, two processes take the steps of one, up to the order of sums."""
    config = of_workloads()[f"{name}-smoke"]
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0), arm="adam_mini")
    alone = train(config, tmp_path / "alone")
    processes = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "experiments.train"]
    options = [f"{name}-smoke", "--model.dropout=0.0", f"--parallel={parallel}", "--threads=1"]
    subprocess.run(
        [sys.executable, *processes, *options, f"--results={tmp_path / 'two'}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=300,
    )
    two = json.loads((run_folder(tmp_path / "two", config.with_rules_hash()) / "status.json").read_text())
    assert two["final_val_loss"] == pytest.approx(alone["final_val_loss"], abs=1e-4)
    assert alone["final_val_loss"] != records(tmp_path / "alone", config)[0]["val_loss"]


@pytest.fixture
def papers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files of ogbn-arxiv with 300 papers at random."""
    monkeypatch.setenv("ADAM_MINI_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(arxiv, "NODES", 300)
    draw = np.random.Generator(np.random.Philox(0))
    order = draw.permutation(300)
    tables = {
        "raw/edge": draw.integers(0, 300, (900, 2)),
        "raw/node-feat": draw.normal(size=(300, 128)),
        "raw/node-label": draw.integers(0, 40, (300, 1)),
        "split/time/train": order[:160, None],
        "split/time/valid": order[160:230, None],
        "split/time/test": order[230:, None],
    }
    for name, table in tables.items():
        path = arxiv.folder() / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in table.tolist()).encode()))
    arxiv.ogbn_arxiv.cache_clear()
    yield
    arxiv.ogbn_arxiv.cache_clear()


@pytest.mark.parametrize("name", NETWORKS)
def check_full_sizes_take_two_steps_at_reduced_width(tmp_path: Path, papers: None, name: str) -> None:
    full = of_workloads()[f"{name}-ogbn-arxiv"]
    config = dataclasses.replace(
        full, model=dataclasses.replace(full.model, width=8), batch=80, steps=2, eval_every=1, checkpoint_every=0
    )
    fetch(config)
    assert train(config, tmp_path)["state"] == "finished"
    first, second = records(tmp_path, config)
    assert first["val_loss"] != second["val_loss"] < 10


def check_every_node_is_reached_by_the_adjacency_as_by_the_edges() -> None:
    """The sparse matrix of a GCN gives what PyTorch Geometric gives for the edges."""
    task = make_task(of_workloads()["gcn-smoke"], torch.device("cpu"))
    edges = make_task(of_workloads()["gat-smoke"], torch.device("cpu")).edges
    task.model.eval()
    with torch.no_grad():
        sparse = task.model(task.features, task.edges)
        for conv in task.model.convs:  # forget the normalised matrix
            conv._cached_adj_t = conv._cached_edge_index = None
        assert torch.allclose(sparse, task.model(task.features, edges), atol=1e-5)


@pytest.mark.parametrize("size", ["", "-ogbn-arxiv"])
@pytest.mark.parametrize("name", NETWORKS)
def check_every_weight_is_recognised(name: str, size: str) -> None:
    from experiments.workloads.graphs import build

    anatomies = discover(build(of_workloads()[name + size].model, 40, 0))
    assert [name for name, anatomy in anatomies.items() if not anatomy.recognised] == []
