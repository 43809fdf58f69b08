"""Intervals against textbook quantiles: a wrong degree of freedom or a population spread shows here."""

from __future__ import annotations

import math

import pytest

from analysis.stats import Interval, t_interval


def test_three_values_use_two_degrees_of_freedom() -> None:
    interval = t_interval([1.0, 2.0, 3.0])
    # Sample spread 1, standard error 1/sqrt(3), 97.5 % quantile of t with two degrees of freedom from tables: 4.302653.
    assert interval.mean == pytest.approx(2.0)
    assert interval.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert interval.n == 3
    assert not interval.excludes_zero


@pytest.mark.parametrize(("mean", "half", "excludes"), [(1.0, 0.9, True), (-1.0, 0.9, True), (1.0, 1.1, False)])
def test_excludes_zero(mean: float, half: float, excludes: bool) -> None:
    assert Interval(mean, half, 3).excludes_zero is excludes


def test_one_value_never_excludes_zero() -> None:
    assert t_interval([5.0]).half == math.inf
    assert not t_interval([5.0]).excludes_zero


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0]])
def test_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values="):
        t_interval(values)
