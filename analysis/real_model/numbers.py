"""Estimates with their errors, from few samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.stats


@dataclass(frozen=True)
class Number:
    """An estimate.

    Attributes:
        value: the estimate.
        stderr: its standard error.
        freedom: degrees of freedom of the standard error.
    """

    value: float
    stderr: float
    freedom: float

    @property
    def half(self) -> float:
        """Half the width of Student's 95 % interval."""
        return float(scipy.stats.t.ppf(0.975, self.freedom)) * self.stderr if self.freedom > 0 else math.inf

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.value + self.half


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> Number:
    """Return the ratio of two means over samples, with the jackknife's standard error.

    Args:
        numerators: [samples].
        denominators: [samples].
    """
    n = len(numerators)
    value = float(numerators.sum() / denominators.sum())
    if n < 2:
        return Number(value, math.inf, 0)
    without = (numerators.sum() - numerators) / (denominators.sum() - denominators)
    return Number(value, float(np.sqrt((n - 1) / n * np.square(without - without.mean()).sum())), n - 1)


def by_chance(diagonal: Number, squares: float, n: float) -> Number:
    """Return the mean share of random blocks of the same sizes.

    Args:
        diagonal: share of the diagonal.
        squares: sum of the squared block sizes.
        n: number of parameters.
    """
    pairs = (squares - n) / (n * n - n)
    return Number(diagonal.value + pairs * (1 - diagonal.value), diagonal.stderr * (1 - pairs), diagonal.freedom)


def stratified(own: np.ndarray, whole: np.ndarray) -> Number:
    """Return the ratio of two sums over strata of means over probes, each stratum with its own variance.

    The degrees of freedom are Satterthwaite's.

    Args:
        own: [strata, probes].
        whole: [strata, probes].
    """
    probes, value = own.shape[1], float(own.sum() / whole.sum())
    if probes < 2:
        return Number(value, math.inf, 0)
    variances = (own - value * whole).var(1, ddof=1) / probes / (whole.mean(1).sum() ** 2)
    freedom = (probes - 1) * variances.sum() ** 2 / max(float(np.square(variances).sum()), 1e-300)
    return Number(value, float(np.sqrt(variances.sum())), float(freedom))


def relative_error(share: Number) -> Number:
    """Return sqrt(1 - share), the relative Frobenius error of keeping the blocks only, by error propagation."""
    value = math.sqrt(max(0.0, 1 - share.value))
    return Number(value, share.stderr / (2 * max(value, 1e-12)), share.freedom)
