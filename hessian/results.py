"""Results of the algorithms: frozen dataclasses with standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy.stats
import torch
from torch import Tensor


def positive_sigma(sigma: float) -> None:
    """Raise ValueError unless ``sigma``, the width of a Gaussian, is positive and finite."""
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(
            f"sigma={sigma} must be positive and finite; it is the width of the Gaussian, in units of the eigenvalues"
        )


@dataclass(frozen=True)
class SpectralDensity:
    """A symmetric operator's spectral density by stochastic Lanczos quadrature.

    Attributes:
        nodes: [probes, steps] Ritz values, float64.
        weights: [probes, steps] weights of the nodes; each row sums to 1, and nodes after an early end have weight 0.
        n: order of the operator.
    """

    nodes: Tensor
    weights: Tensor
    n: int

    def per_probe(self, grid: Tensor, sigma: float) -> Tensor:
        """Return each probe's density on a grid, [probes, len(grid)], smoothed by Gaussians of width sigma."""
        positive_sigma(sigma)
        gap = (grid.to(self.nodes)[None, None, :] - self.nodes[:, :, None]) / sigma
        kernel = torch.exp(-0.5 * gap.square()) / (sigma * math.sqrt(2 * math.pi))
        return (self.weights[:, :, None] * kernel).sum(1)

    def density(self, grid: Tensor, sigma: float) -> Tensor:
        """Return the mean density over probes, [len(grid)], per unit of eigenvalue; it integrates to 1."""
        return self.per_probe(grid, sigma).mean(0)

    def density_stderr(self, grid: Tensor, sigma: float) -> Tensor:
        """Return the standard error of ``density`` over probes, [len(grid)]; NaN with a single probe."""
        return self.per_probe(grid, sigma).std(0) / math.sqrt(len(self.nodes))

    def moment(self, k: int) -> tuple[float, float]:
        """Return (estimate, standard error) of trace(H^k) / n."""
        each = (self.weights * self.nodes**k).sum(1)
        return each.mean().item(), (each.std() / math.sqrt(len(each))).item()


@dataclass(frozen=True)
class Estimate:
    """A random estimate of a number or of a vector.

    Attributes:
        value: the estimate, float64; 0-dim for a number.
        stderr: its standard error, of the same shape; NaN with a single sample.
        samples: number of samples that the standard error rests on.
        products: number of products with the operator that it took.
    """

    value: Tensor
    stderr: Tensor
    samples: int
    products: int

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of Student's confidence interval.

        Args:
            level: its nominal coverage, in (0, 1).

        Raises:
            ValueError: level is not in (0, 1), or there are fewer than two samples.
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level} must be in (0, 1), such as 0.95")
        if self.samples < 2:
            raise ValueError(f"samples={self.samples}: an interval needs at least two; ask for more probes")
        half = float(scipy.stats.t.ppf((1 + level) / 2, self.samples - 1)) * self.stderr
        return self.value - half, self.value + half


@dataclass(frozen=True)
class Eigenpairs:
    """Some eigenvalues of a symmetric operator with their eigenvectors.

    Attributes:
        values: [k], descending, float64.
        vectors: [n, k], float64, orthonormal columns.
        residuals: [k], ||A x - value x||; an eigenvalue of A lies within this distance of the value.
        products: number of products with the operator that it took.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


@dataclass(frozen=True)
class BlockNorms:
    """Squared Frobenius norms of the blocks of an operator.

    Attributes:
        mean: [B, B] estimates of ||H_bc||_F^2, symmetric.
        stderr: [B, B] standard errors over probes; 0 if the estimate is exact (blocks of one element).
        probes: number of probes per block.
    """

    mean: Tensor
    stderr: Tensor
    probes: int


@dataclass(frozen=True)
class BlockStructure:
    """How much of a matrix lies inside the blocks of a partition, compared with random partitions.

    Attributes:
        mass_inside: share of the off-diagonal sum of |A_ij| with i and j in one block.
        expected: mean of ``mass_inside`` over size-matched random partitions.
        z: (mass_inside - expected) in standard deviations over the random partitions; 0 if they cannot differ.
        mean_ratio: mean |A_ij| inside the blocks over the mean outside, without the diagonal.
        permutations: number of random partitions.
    """

    mass_inside: float
    expected: float
    z: float
    mean_ratio: float
    permutations: int
