"""Intervals for few paired runs."""

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
        half: half width; infinite for a single value.
        n: sample size.
    """

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of the mean.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    array = np.asarray(values, dtype=float)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values={list(values)} must be finite and at least one")
    if array.size == 1:
        return Interval(float(array[0]), math.inf, 1)
    quantile = float(scipy.stats.t.ppf(0.5 + confidence / 2, array.size - 1))
    return Interval(float(array.mean()), quantile * float(array.std(ddof=1)) / math.sqrt(array.size), int(array.size))
