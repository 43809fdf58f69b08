"""Confidence intervals for small numbers of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

ENOUGH = 8
"""Values from which an interval is bootstrapped. Of five, it is two to four times as wide as the t-interval."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % t-interval.

    Attributes:
        mean: sample mean.
        half: half the width of the interval; infinite for a single value.
        n: sample size.
    """

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return Student's t-interval of the mean.

    Args:
        values: the sample.
        confidence: the confidence level.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values={list(values)} must contain at least one number, and all must be finite")
    if array.size == 1:
        return Interval(float(array[0]), math.inf, 1)
    quantile = float(scipy.stats.t.ppf(0.5 + confidence / 2, array.size - 1))
    return Interval(float(array.mean()), quantile * float(array.std(ddof=1)) / math.sqrt(array.size), int(array.size))


def bootstrap_interval(values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000) -> Interval:
    """Return a studentised bootstrap interval of the mean, symmetric around it (Hall, 1988).

    A percentile interval of few values is too short. This one resamples the t-statistic, so that the unknown spread
    of a small sample counts. The same values always give the same interval. Fewer than ``ENOUGH`` values have too few
    different resamples; they get the t-interval.

    Args:
        values: the sample.
        confidence: the confidence level.
        resamples: number of bootstrap samples.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    plain = t_interval(values, confidence)
    array = np.asarray(values, dtype=float)
    if array.size < ENOUGH or not array.std(ddof=1) > 0:
        return plain
    drawn = np.random.default_rng(0).choice(array, (resamples, array.size))
    spread = drawn.std(axis=1, ddof=1)
    kept = spread > 1e-12 * array.std(ddof=1)
    statistic = np.abs(drawn.mean(axis=1) - array.mean())[kept] / spread[kept]
    return Interval(plain.mean, float(np.quantile(statistic, confidence)) * float(array.std(ddof=1)), plain.n)


def sign_flip_p(values: Sequence[float]) -> float:
    """Return the two-sided p-value that paired differences have mean zero, by flipping their signs (Fisher).

    All 2^n patterns of signs are tried, so n values cannot give less than 2^(1 - n): 0.0078 for eight, 0.25 for three.

    Args:
        values: paired differences, at most 20.

    Raises:
        ValueError: there are none, more than 20, or one is not finite.
    """
    array = np.asarray(values, dtype=float)
    if not 1 <= array.size <= 20 or not np.isfinite(array).all():
        raise ValueError(f"values={list(values)} must be 1 to 20 finite numbers")
    signs = 1 - 2 * ((np.arange(2**array.size)[:, None] >> np.arange(array.size)) & 1)
    sums = np.abs(signs @ array)
    return float((sums >= abs(array.sum()) * (1 - 1e-12)).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number by Holm's method, in the given order.

    Args:
        p_values: p-values of all comparisons that are made.
    """
    order = np.argsort(p_values, kind="stable")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        corrected[index] = largest
    return corrected
