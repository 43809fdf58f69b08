"""Numbers that can be computed from a block's matrix before any training, and may tell where one scalar loses."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from experiments.studies.paper_hessian.problems import Problem
from hessian import tau
from hessian.sharing import log_gap

NAMES = ("gain", "adam_gain", "step_ratio", "jensen_diagonal", "jensen_v", "kappa", "diagonality", "size")
"""In the order of docs/paper_hessian.md; ``size`` knows nothing of the matrix."""


def kappa(matrix: Tensor) -> float:
    """Return the condition number of a positive definite matrix, [d, d]."""
    values = torch.linalg.eigvalsh(matrix)
    return float(values[-1] / values[0].clamp_min(1e-300))


def scaled(matrix: Tensor, denominators: Tensor) -> Tensor:
    """Return D^-1/2 H D^-1/2 for D = diag(denominators), [d, d]."""
    root = denominators.rsqrt()
    return root[:, None] * matrix * root


def gain(matrix: Tensor, denominators: Tensor) -> float:
    """Return log10 of how many times the condition number falls when D = diag(denominators) preconditions H."""
    return math.log10(kappa(matrix)) - math.log10(kappa(scaled(matrix, denominators)))


def expected_v(matrix: Tensor) -> Tensor:
    """Return the mean squared gradient of every element over standard normal points, diag(H^2), [d]."""
    return matrix.square().sum(1)


def descent_steps(matrix: Tensor, denominators: Tensor, tolerance: float) -> float:
    """Return the steps of gradient descent in the metric D until f has fallen to a share of its start, at least 1.

    The rate is 1 / (largest eigenvalue of D^-1/2 H D^-1/2), the start standard normal, and f its expectation; the sum
    over eigenvectors is exact, so that nothing is run.

    Args:
        matrix: H, [d, d].
        denominators: diagonal of D, [d].
        tolerance: share of f(start).
    """
    values, vectors = torch.linalg.eigh(scaled(matrix, denominators))
    values = values.clamp_min(0)
    energy = values * (denominators[:, None] * vectors.square()).sum(0)
    contraction = torch.log1p(-(values / values[-1]).clamp_max(1 - 1e-12))
    times = torch.logspace(0, 8, 1601, dtype=torch.float64)
    left = (energy * torch.exp(2 * times[:, None] * contraction)).sum(1) / energy.sum()
    below = (left <= tolerance).nonzero()
    return float(times[int(below[0])]) if len(below) else float(times[-1])


def of_block(matrix: Tensor, tolerance: float) -> dict[str, float]:
    """Return the value of every number of ``NAMES`` for one block, [d, d]. Larger means that one scalar costs more."""
    diagonal, v, ones = matrix.diagonal(), expected_v(matrix), torch.ones(len(matrix), dtype=matrix.dtype)
    plain, adam = (descent_steps(matrix, d, tolerance) for d in (ones, v.sqrt()))
    return {
        "gain": gain(matrix, diagonal),
        "adam_gain": gain(matrix, v.sqrt()),
        "step_ratio": math.log2(plain / adam),
        "jensen_diagonal": log_gap(diagonal, diagonal.mean().expand_as(diagonal)),
        "jensen_v": log_gap(v, v.mean().expand_as(v)),
        "kappa": math.log10(kappa(matrix)),
        "diagonality": tau(matrix),
        "size": math.log(len(matrix)),
    }


def steps_of_problem(problem: Problem, tolerance: float) -> list[list[float]]:
    """Return ``descent_steps`` of every block, plain and in the metric of Adam's expected denominators.

    They are the parts of ``floored``, a number that was added after the generated held-out problems were seen.
    """
    ones = [torch.ones(len(block), dtype=block.dtype) for block in problem.block_matrices()]
    return [
        [descent_steps(block, one, tolerance), descent_steps(block, expected_v(block).sqrt(), tolerance)]
        for block, one in zip(problem.block_matrices(), ones, strict=True)
    ]


def of_problem(problem: Problem, tolerance: float) -> dict[str, float]:
    """Return every number of a problem; with several blocks, that of the worst one."""
    found = [of_block(block, tolerance) for block in problem.block_matrices()]
    return {name: max(block[name] for block in found) for name in NAMES}
