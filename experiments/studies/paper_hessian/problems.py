"""Quadratic problems f(x) = x^T H x / 2 whose minimum is at zero: spectra, eigenvectors, scales and starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STARTS = 4
"""Starts per problem. The steps that a single start needs are a noisy number."""


@dataclass(frozen=True)
class Problem:
    """A quadratic.

    Attributes:
        kind: the family that it belongs to.
        label: its parameters within the family, in words.
        matrix: H, float64 [d, d], symmetric and positive definite.
        starts: where every method begins, [d, STARTS]; f is averaged over them.
        blocks: number of blocks that share one scalar each; the d elements are divided equally and in order.
        noise: scale of the gradient noise; its covariance is noise^2 H, as that of small batches near a minimum.
        seed: seed of the noise.
    """

    kind: str
    label: str
    matrix: Tensor
    starts: Tensor
    blocks: int = 1
    noise: float = 0.0
    seed: int = 0

    def block_matrices(self) -> list[Tensor]:
        """Return the diagonal blocks of H that belong to the scalars."""
        size = len(self.matrix) // self.blocks
        return [self.matrix[i : i + size, i : i + size] for i in range(0, len(self.matrix), size)]


def log_uniform(d: int, condition: float, generator: torch.Generator) -> Tensor:
    """Return d eigenvalues between 1 / condition and 1, uniform in the logarithm; both ends are among them."""
    share = torch.rand(d, generator=generator, dtype=torch.float64)
    share[0], share[-1] = 0.0, 1.0
    return condition ** (share - 1)


def two_clusters(d: int, condition: float, generator: torch.Generator) -> Tensor:
    """Return d eigenvalues, half of them within 10 % of 1 and half within 10 % of 1 / condition."""
    spread = 1 - 0.1 * torch.rand(d, generator=generator, dtype=torch.float64)
    return torch.where(torch.arange(d) % 2 == 0, spread, spread / condition)


def rotation(d: int, amount: float, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix [d, d]: the identity at amount 0, a full mixture of all axes from about 2 on.

    It is the exponential of ``amount`` times a random skew-symmetric matrix whose entries have variance 1 / d.
    """
    noise = torch.randn(d, d, generator=generator, dtype=torch.float64) / (2 * d) ** 0.5
    rotated: Tensor = torch.linalg.matrix_exp(amount * (noise - noise.T))
    return rotated


def reflections(d: int, count: int, generator: torch.Generator) -> Tensor:
    """Return the product of ``count`` random Householder reflections, [d, d]."""
    product = torch.eye(d, dtype=torch.float64)
    for _ in range(count):
        normal = torch.randn(d, generator=generator, dtype=torch.float64)
        normal /= normal.norm()
        product -= 2 * torch.outer(product @ normal, normal)
    return product


def plane_rotations(d: int, generator: torch.Generator) -> Tensor:
    """Return a rotation [d, d] that mixes axes 2 i and 2 i + 1 by a random angle, and no others."""
    out = torch.zeros(d, d, dtype=torch.float64)
    for i, angle in enumerate(torch.rand(d // 2, generator=generator, dtype=torch.float64) * torch.pi):
        cos, sin = angle.cos(), angle.sin()
        out[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
    return out


def with_spectrum(values: Tensor, vectors: Tensor) -> Tensor:
    """Return the symmetric matrix with these eigenvalues [d] and eigenvectors [d, d] (columns)."""
    matrix = (vectors * values) @ vectors.T
    return 0.5 * (matrix + matrix.T)


def starts_at(d: int, generator: torch.Generator) -> Tensor:
    """Return starts with independent standard normal coordinates, [d, STARTS]."""
    return torch.randn(d, STARTS, generator=generator, dtype=torch.float64)


def fit_problems(
    seed: int, sizes: Sequence[int], conditions: Sequence[float], amounts: Sequence[float]
) -> list[Problem]:
    """Return the problems on which a number and its threshold are chosen: log-uniform spectra, partly rotated axes."""
    out = []
    for d in sizes:
        for condition in conditions:
            for amount in amounts:
                generator = torch.Generator().manual_seed(1000 * seed + len(out))
                matrix = with_spectrum(log_uniform(d, condition, generator), rotation(d, amount, generator))
                label = f"d {d}, condition {condition:g}, rotation {amount:g}"
                out.append(Problem("rotated", label, matrix, starts_at(d, generator)))
    return out


def held_out_problems(seed: int, shrink: int = 1) -> list[Problem]:
    """Return problems of other kinds than ``fit_problems``: spectra, eigenvectors, scales, sizes, starts and noise.

    Args:
        seed: seed of the problems.
        shrink: divisor of all sizes, for tests.
    """
    generator = torch.Generator().manual_seed(7_000_000 + seed)
    found = (
        _reflected(24 // shrink, generator)
        + _powers(64 // shrink, generator)
        + _correlated(20 // shrink, generator)
        + _banded(48 // shrink, generator)
        + _several_blocks(8 // min(shrink, 2), generator)
        + _noisy(24 // shrink, generator)
        + _equal_energy(24 // shrink, generator)
    )
    return [dataclasses.replace(problem, seed=1000 * seed + i) for i, problem in enumerate(found)]


def _reflected(d: int, generator: torch.Generator) -> list[Problem]:
    """Two clusters of eigenvalues; one or two reflections mix all axes a little."""
    return [
        Problem(
            "two clusters",
            f"condition {condition:g}, {count} reflections",
            with_spectrum(two_clusters(d, condition, generator), reflections(d, count, generator)),
            starts_at(d, generator),
        )
        for condition in (10.0, 100.0, 1000.0, 10000.0)
        for count in (0, 1, 2)
    ]


def _powers(d: int, generator: torch.Generator) -> list[Problem]:
    """Eigenvalues i^-p in a random order; axes are mixed in pairs, or all."""
    out = []
    for power in (0.5, 1.0, 2.0, 3.0):
        for name in ("pairs", "all"):
            order = torch.randperm(d, generator=generator)
            values = torch.arange(1, d + 1, dtype=torch.float64)[order] ** -power
            vectors = plane_rotations(d, generator) if name == "pairs" else rotation(d, 10.0, generator)
            label = f"power {power:g}, {name} mixed"
            out.append(Problem("power law", label, with_spectrum(values, vectors), starts_at(d, generator)))
    return out


def _correlated(d: int, generator: torch.Generator) -> list[Problem]:
    """Equal correlations of all pairs, and scales of the coordinates that cover some decades."""
    out = []
    for decades in (0.0, 1.0, 2.0):
        for correlation in (0.0, 0.5, 0.9):
            scales = 10 ** (decades * torch.rand(d, generator=generator, dtype=torch.float64))
            base = torch.full((d, d), correlation, dtype=torch.float64).fill_diagonal_(1.0)
            label = f"{decades:g} decades of scales, correlation {correlation:g}"
            out.append(Problem("scales", label, scales[:, None] * base * scales, starts_at(d, generator)))
    return out


def _banded(d: int, generator: torch.Generator) -> list[Problem]:
    """Correlations that fall with the distance of the coordinates, and scales that change smoothly."""
    distance = (torch.arange(d)[:, None] - torch.arange(d)[None, :]).abs().to(torch.float64)
    out = []
    for correlation in (0.3, 0.95):
        for decades in (0.0, 0.5, 1.5):
            scales = 10 ** (decades * torch.linspace(0, 1, d, dtype=torch.float64))
            matrix = scales[:, None] * correlation**distance * scales
            label = f"neighbours {correlation:g}, {decades:g} decades"
            out.append(Problem("banded", label, matrix, starts_at(d, generator)))
    return out


def _several_blocks(size: int, generator: torch.Generator) -> list[Problem]:
    """Four blocks whose scales are 1, 10, 100 and 1000; the blocks themselves are diagonal, tilted or dense."""
    out = []
    for condition in (3.0, 100.0):
        for amount in (0.0, 0.3, 10.0):
            blocks = [
                10.0**i * with_spectrum(log_uniform(size, condition, generator), rotation(size, amount, generator))
                for i in range(4)
            ]
            label = f"condition {condition:g} inside, rotation {amount:g}"
            matrix = torch.block_diag(*blocks)
            out.append(Problem("four blocks", label, matrix, starts_at(4 * size, generator), blocks=4))
    return out


def _noisy(d: int, generator: torch.Generator) -> list[Problem]:
    """Partly rotated axes with gradient noise whose covariance is proportional to H."""
    return [
        Problem(
            "noise",
            f"condition {condition:g}, rotation {amount:g}",
            with_spectrum(log_uniform(d, condition, generator), rotation(d, amount, generator)),
            starts_at(d, generator),
            noise=0.1,
        )
        for condition in (10.0, 1000.0)
        for amount in (0.0, 0.3, 10.0)
    ]


def _equal_energy(d: int, generator: torch.Generator) -> list[Problem]:
    """Starts at which every eigenvector holds the same share of f on average, so that flat directions count."""
    out = []
    for condition in (10.0, 100.0, 1000.0):
        for amount in (0.0, 0.3, 10.0):
            values, vectors = log_uniform(d, condition, generator), rotation(d, amount, generator)
            starts = vectors @ (values.rsqrt()[:, None] * starts_at(d, generator))
            label = f"condition {condition:g}, rotation {amount:g}"
            out.append(Problem("equal energy", label, with_spectrum(values, vectors), starts))
    return out
