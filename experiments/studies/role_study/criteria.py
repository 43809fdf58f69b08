"""The criteria of every arm that changes one role, computed from a cell's averaged second moments."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from experiments.data import load
from experiments.storage import read_json, write_atomic, write_json
from experiments.studies.role_study.cells import Cell, arms, cells, make_model, shared
from experiments.studies.role_study.probe import probe
from experiments.studies.role_study.runs import load_moments, settings
from hessian import sharing
from optimizer import Role, Rules
from optimizer.partition import FactoredLayout, TensorLayout, discover, partition

CRITERIA = (
    "jensen",
    "stein",
    "stein_sum",
    "unexplained",
    "slim",
    "relative_step",
    "step_cost",
    "overshoot",
    "fast_share",
    "fast_energy",
    "scalars",
    "size",
)
"""In the order of docs/role_study.md; the last two know nothing of second moments and only serve for comparison."""
PROBE = "probe"
"""The criterion that was added after the held-out outcome."""


def of_tensors(
    tensors: Mapping[str, Tensor], layouts: Mapping[str, TensorLayout], lr: float, whole: int
) -> list[float]:
    """Return the values of ``CRITERIA`` for the tensors of one role.

    Args:
        tensors: name -> averaged second moments.
        layouts: name -> layout, with at least the names of ``tensors``.
        lr: peak learning rate.
        whole: number of parameters of the model.
    """
    own, all_shared, unexplained, noise, scalars = [], [], 0.0, 0.0, 0
    for name, moments in tensors.items():
        v, layout = sharing.floored(moments), layouts[name]
        ids = None if isinstance(layout, FactoredLayout) else layout.block_ids(v.shape)
        own.append(v.flatten())
        all_shared.append(shared(v, layout).flatten())
        unexplained += v.numel() * sharing.unexplained(v, ids)
        noise += v.numel() * sharing.slim_noise(v, ids)
        scalars += layout.n_blocks
    v, u = torch.cat(own), torch.cat(all_shared)
    n, stein = v.numel(), sharing.stein(v, u)
    return [
        sharing.log_gap(v, u),
        stein,
        stein * n / whole,
        unexplained / n,
        noise / n,
        sharing.relative_step(v, u),
        sharing.step_cost(v, u, lr),
        sharing.overshoot(v, u, lr),
        sharing.fast_share(v, u),
        sharing.fast_energy(v, u) / whole,
        math.log(n / scalars),
        n / whole,
    ]


def of_cell(cell: Cell, moments: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Return arm -> values of ``CRITERIA``, for every arm of a cell that changes one role."""
    model, out = make_model(cell.model, cell.seed), {}
    anatomies, whole = discover(model), sum(v.numel() for v in moments.values())
    for arm, rules in arms(cell.model).items():
        if "/" in arm:
            role = Role(arm.split("/")[0])
            tensors = {name: moments[name] for name, anatomy in anatomies.items() if anatomy.role is role}
            out[arm] = of_tensors(tensors, partition(model, Rules.load(rules)), cell.lr, whole)
    return out


def probed(cell: Cell, cache: Path) -> dict[str, float]:
    """Return the probe of every arm of a cell, from the cache if it is there."""
    path = cache / f"{cell.name}.probe.json"
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("settings") != settings(cell.model):
        stored = {"settings": settings(cell.model), "cost": probe(cell, load(cell.data))}
        write_json(path, stored)
    return stored["cost"]


def write(out: Path, cache: Path) -> int:
    """Compute the criteria of all cells with stored second moments, write ``criteria.json``, and return their number.

    Args:
        out: folder of the results.
        cache: folder of the averaged second moments and of the probes.
    """
    rows, count = [], 0
    for cell in cells():
        if (moments := load_moments(cache, cell)) is None:
            continue
        count += 1
        extra = probed(cell, cache)
        for arm, values in of_cell(cell, moments).items():
            rows.append([cell.name, arm, *(float(f"{x:.6g}") for x in (*values, extra[arm]))])
    lines = ",\n".join(json.dumps(row) for row in rows)
    document = f'{{"columns": {json.dumps(["cell", "arm", *CRITERIA, PROBE])},\n"rows": [\n{lines}\n]}}\n'
    write_atomic(out / "criteria.json", document.encode())
    return count
