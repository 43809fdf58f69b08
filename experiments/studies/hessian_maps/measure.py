"""Measure one subject at one checkpoint: its exact Hessian, and estimates of it from random probes."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import torch
from torch import Tensor, nn

from experiments.models import lm_loss
from experiments.studies.hessian_maps.cache import Arrays
from experiments.studies.hessian_maps.progress import Progress
from experiments.studies.hessian_maps.subjects import Subject
from hessian import (
    Evidence,
    HessianOperator,
    block_norms,
    block_structure,
    dense,
    factored_gap,
    jensen_gap,
    slq,
    snr,
)
from hessian.parts import WeightPart, weight_parts
from optimizer import Unit
from optimizer.partition import discover


def coarse_blocks(model: nn.Module) -> tuple[Tensor, list[str]]:
    """Return the blocks of the whole-model map: attention heads, and whole parts of weights without heads.

    Returns:
        (block of every parameter, int64 [n]; label of every block, [B]).
    """
    ids, labels = [], []
    anatomies = discover(model)
    for name, parameter in model.named_parameters():
        anatomy = anatomies[name]
        width = parameter.numel() // max(1, sum(part.size for part in anatomy.parts))
        for part in anatomy.parts:
            height = part.head_dim or part.size
            for head in range(part.size // height):
                ids.append(torch.full((height * width,), len(labels)))
                suffix = f" {part.role.value.lower()}" if len(anatomy.parts) > 1 else ""
                labels.append(f"{name}{suffix}" + (f" {head}" if part.head_dim else ""))
    return torch.cat(ids), labels


def measure(subject: Subject, theta: np.ndarray, checkpoint: float, *, final: bool, progress: Progress) -> Arrays:
    """Measure one subject with one set of parameters.

    Args:
        subject: the model and its data.
        theta: flat parameters, [n].
        checkpoint: fraction of the training after which the parameters were saved, in [0, 1].
        final: whether to also compute maps and spectra of the whole model.
        progress: called as the work advances.

    Returns:
        ``asymmetry`` (largest |H - H^T| relative to the largest |H|), ``rows`` (the evidence, as JSON), for each weight
        matrix ``block/<name>`` (its block of |H|) and ``eig/<name>`` (the eigenvalues of that block of H), and with
        ``final`` the maps and spectra of the whole model.
    """
    settings, model = subject.settings, subject.model_at(theta)
    operator = HessianOperator(model, lm_loss, None, subject.fixed(settings.hessian_batches))
    matrix = dense(operator, progress=lambda done, total: progress(done, total, "exact Hessian, by columns"))
    progress(0, settings.gradient_batches, "mean squared gradients")
    second_moments = subject.mean_square_gradients(model)
    v = torch.cat([second_moments[name].flatten() for name in operator.names])
    out: Arrays = {"asymmetry": np.array(float((matrix - matrix.T).abs().max() / matrix.abs().max()))}
    rows: list[dict[str, object]] = []
    weights, starts, sizes = weight_parts(model), {}, [second_moments[name].numel() for name in operator.names]
    for name, end, size in zip(operator.names, itertools.accumulate(sizes), sizes, strict=True):
        starts[name] = end - size
    for number, part in enumerate(weights):
        progress(number, len(weights), f"structure of {part.name} {part.shape[0]} x {part.shape[1]}")
        where = starts[part.parameter] + part.index.flatten()
        inner = matrix[where][:, where]
        out[f"block/{part.name}"] = inner.abs().numpy().astype(np.float32)
        out[f"eig/{part.name}"] = torch.linalg.eigvalsh(inner).numpy()
        rows += _evidence(subject, part, inner, v[where], checkpoint)
    out["rows"] = np.array(json.dumps(rows))
    if final:
        out |= _whole(subject, model, operator, matrix, progress)
    return out


def _evidence(
    subject: Subject, part: WeightPart, inner: Tensor, v: Tensor, checkpoint: float
) -> list[dict[str, object]]:
    """Return one row of evidence for each candidate unit of a weight matrix."""
    settings, rows = subject.settings, []
    grid = v.reshape(part.shape)
    for unit, ids in part.candidates().items():
        structure = block_structure(inner, ids, settings.permutations, settings.seed)
        gap, null = jensen_gap(v, ids, seed=settings.seed)
        row = Evidence(
            model=subject.name,
            tensor=part.name,
            role=part.role.value,
            unit=unit,
            checkpoint=checkpoint,
            n_params=ids.numel(),
            n_blocks=int(ids.max()) + 1,
            mass_inside=structure.mass_inside,
            expected=structure.expected,
            z=structure.z,
            mean_ratio=structure.mean_ratio,
            jensen=gap,
            jensen_null=null,
        )
        rows.append({**dataclasses.asdict(row), "snr_row": snr(grid, 1), "snr_column": snr(grid, 0)})
    gap, null, z = factored_gap(grid, settings.permutations, settings.seed)
    row = dataclasses.replace(
        row,
        unit=Unit.FACTORED.value,
        n_blocks=sum(part.shape),
        mass_inside=0.0,
        expected=0.0,
        z=z,
        mean_ratio=1.0,
        jensen=gap,
        jensen_null=null,
    )
    return [*rows, {**dataclasses.asdict(row), "snr_row": snr(grid, 1), "snr_column": snr(grid, 0)}]


def _whole(subject: Subject, model: nn.Module, operator: HessianOperator, matrix: Tensor, progress: Progress) -> Arrays:
    """Return maps and spectra of the whole model, computed from the exact Hessian and estimated from probes."""
    settings = subject.settings
    ids, labels = coarse_blocks(model)
    indicator = torch.nn.functional.one_hot(ids, len(labels)).to(matrix.dtype)
    probed = block_norms(
        operator,
        ids,
        settings.norm_probes,
        settings.seed,
        progress=lambda done, total: progress(done, total, "whole model, block norms from probes"),
    )
    density = slq(
        operator,
        settings.slq_steps,
        settings.slq_probes,
        settings.seed,
        progress=lambda done, total: progress(done, total, "whole model, spectrum by Lanczos"),
    )
    picture = torch.nn.functional.adaptive_avg_pool2d(matrix.abs()[None, None], min(len(matrix), 400))[0, 0]
    return {
        "labels": np.array(labels),
        "sizes": torch.bincount(ids).numpy(),
        "norms_exact": (indicator.T @ matrix.square() @ indicator).numpy(),
        "norms_mean": probed.mean.numpy(),
        "norms_stderr": probed.stderr.numpy(),
        "eigenvalues": torch.linalg.eigvalsh(0.5 * (matrix + matrix.T)).numpy(),
        "slq_nodes": density.nodes.numpy(),
        "slq_weights": density.weights.numpy(),
        "picture": picture.numpy().astype(np.float32),
    }
