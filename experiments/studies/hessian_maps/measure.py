"""Measure one subject at one checkpoint: its exact Hessian, and estimates of it from random probes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

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
from optimizer import Role, Rules, Unit
from optimizer.partition import Anatomy, Part, discover, layout_of

_EMBEDDED = {Role.TOKEN_EMBEDDING, Role.POSITION_EMBEDDING, Role.HEAD}


@dataclass(frozen=True)
class WeightPart:
    """A weight matrix, or one part of a fused weight matrix, as a range of the flat parameter vector.

    Attributes:
        name: name of the parameter; for a part of a fused matrix, followed by the role in brackets.
        role: role of the matrix.
        shape: (output units, input units).
        head_dim: number of rows of an attention head; None if there are no heads.
        start: index of its first element in the flat parameter vector, where its elements are consecutive.
    """

    name: str
    role: Role
    shape: tuple[int, int]
    head_dim: int | None
    start: int

    @property
    def span(self) -> slice:
        """The range of its elements in the flat parameter vector."""
        return slice(self.start, self.start + self.shape[0] * self.shape[1])

    def candidates(self) -> dict[str, Tensor]:
        """Return unit -> block of every element, int64 [n], for every shared unit that the matrix can have."""
        rows = Unit.TOKEN if self.role in _EMBEDDED else Unit.OUT_NEURON
        units = [Unit.TENSOR, rows, Unit.IN_NEURON] + ([Unit.ATTENTION_HEAD] if self.head_dim else [])
        anatomy = Anatomy(self.shape, (Part(self.role, self.shape[0], self.head_dim),), "a weight", in_axis=1)
        return {
            unit.value: layout_of(anatomy, Rules("candidate", {self.role: unit})).block_ids(self.shape).flatten()
            for unit in units
        }


def weight_parts(model: nn.Module) -> list[WeightPart]:
    """Return all two-dimensional weights of a model, with the parts of fused weights separate."""
    out, offset, anatomies = [], 0, discover(model)
    for name, parameter in model.named_parameters():
        anatomy = anatomies[name]
        if parameter.dim() == 2:
            start = offset
            for part in anatomy.parts:
                label = name if len(anatomy.parts) == 1 else f"{name}[{part.role.value}]"
                out.append(WeightPart(label, part.role, (part.size, parameter.shape[1]), part.head_dim, start))
                start += part.size * parameter.shape[1]
        offset += parameter.numel()
    return out


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
    weights = weight_parts(model)
    for number, part in enumerate(weights):
        progress(number, len(weights), f"structure of {part.name} {part.shape[0]} x {part.shape[1]}")
        inner = matrix[part.span, part.span]
        out[f"block/{part.name}"] = inner.abs().numpy().astype(np.float32)
        out[f"eig/{part.name}"] = torch.linalg.eigvalsh(inner).numpy()
        rows += _evidence(subject, part, inner, v[part.span], checkpoint)
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
