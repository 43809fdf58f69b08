"""Confidence intervals for small numbers of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats


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
