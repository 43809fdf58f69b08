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
        """Return (estimate, standard error) of trace(H^k) / n; the standard error is NaN with a single probe."""
        each = (self.weights * self.nodes**k).sum(1)
        return each.mean().item(), (each.std() / math.sqrt(len(each))).item()

    def moment_interval(self, k: int, level: float = 0.95) -> tuple[float, float]:
        """Return the ends of Student's confidence interval of trace(H^k) / n.

        Args:
            k: the power, at least 1.
            level: nominal coverage, in (0, 1).

        Raises:
            ValueError: level is not in (0, 1), there is a single probe, or there are too few steps for the power:
                m steps are exact up to the power 2 m - 1.
        """
        steps = self.nodes.shape[1]
        whole = bool((self.weights == 0).any(1).all())  # every probe's space ended, so its quadrature is exact
        if k > 2 * steps - 1 and not whole:
            raise ValueError(
                f"steps={steps} are too few for an interval of the moment k={k}: Lanczos quadrature is exact up to "
                f"2 * steps - 1; ask for steps={k // 2 + 1} or more"
            )
        mean, stderr = self.moment(k)
        estimate = Estimate(torch.tensor(mean), torch.tensor(stderr), len(self.nodes), len(self.nodes) * steps)
        low, high = estimate.interval(level)
        return float(low), float(high)


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
            raise ValueError(
                f"samples={self.samples}: an interval needs at least 2, because one has no spread; ask for more probes"
            )
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

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Return the ends of confidence intervals of the squared norms, [B, B] each.

        The relative errors of sums of squares are skewed, so the interval is symmetric in the logarithm of the norm:
        both ends are the estimate times or divided by one factor.

        Args:
            level: nominal coverage, in (0, 1).

        Raises:
            ValueError: level is not in (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level={level} must be in (0, 1), such as 0.95")
        quantile = float(scipy.stats.t.ppf((1 + level) / 2, 2 * self.probes - 2))
        factor = (quantile * self.stderr / self.mean.clamp_min(1e-300)).exp()
        return self.mean / factor, self.mean * factor


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
