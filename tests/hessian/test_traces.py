"""Traces, diagonals and eigenpairs of matrices whose answer is known, and how often the intervals cover it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hessian import MatrixOperator, diagonal, eigenpairs, trace
from hessian.results import Estimate

n = 120
GENERATOR = torch.Generator().manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(n, n, generator=GENERATOR, dtype=torch.float64)).Q
SPECTRA = {
    "flat": torch.linspace(0.5, 1.5, n, dtype=torch.float64),
    "falling": torch.arange(1, n + 1, dtype=torch.float64) ** -1.5,
    "indefinite": torch.randn(n, generator=GENERATOR, dtype=torch.float64),
}


def matrix(values: Tensor) -> Tensor:
    A = (BASIS * values) @ BASIS.T
    return (A + A.T) / 2


def covered(estimates: list[Estimate], wanted: Tensor) -> float:
    """The share of intervals with nominal coverage 95 % that contain the answer."""
    ends = [e.interval(0.95) for e in estimates]
    return float(torch.stack([((low <= wanted) & (wanted <= high)).double().mean() for low, high in ends]).mean())


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_intervals_of_hutch_plus_plus_cover_what_they_say(spectrum: str) -> None:
    A = matrix(SPECTRA[spectrum])
    estimates = [trace(MatrixOperator(A), 60, "hutch++", seed) for seed in range(500)]
    assert 0.93 <= covered(estimates, A.trace()) <= 0.97


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_intervals_of_xtrace_are_never_too_narrow(spectrum: str) -> None:
    """The jackknife overstates the variance: 98 % and more."""
    A = matrix(SPECTRA[spectrum])
    estimates = [trace(MatrixOperator(A), 30, "xtrace", seed) for seed in range(150)]
    assert covered(estimates, A.trace()) >= 0.96


@pytest.mark.parametrize(("method", "most"), [("hutchinson", 0.97), ("xdiag", 0.985)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_intervals_of_diagonals(spectrum: str, method: str, most: float) -> None:
    A = matrix(SPECTRA[spectrum])
    estimates = [diagonal(MatrixOperator(A), 30, method, seed) for seed in range(60)]
    assert 0.93 <= covered(estimates, A.diagonal()) <= most


def test_intervals_of_hutchinson() -> None:
    A = matrix(SPECTRA["flat"])
    estimates = [trace(MatrixOperator(A), 30, "hutchinson", seed) for seed in range(500)]
    assert 0.93 <= covered(estimates, A.trace()) <= 0.97


def test_sketches_pay_where_few_eigenvalues_carry_the_trace() -> None:
    A = matrix(SPECTRA["falling"])

    def error(method: str) -> float:
        off = [trace(MatrixOperator(A), 30, method, seed).value - A.trace() for seed in range(50)]
        return float(torch.stack(off).square().mean().sqrt())

    assert error("xtrace") < error("hutch++") < error("hutchinson") / 4


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_low_rank_is_exact(method: str) -> None:
    values = torch.zeros(n, dtype=torch.float64)
    values[:5] = torch.tensor([3.0, -2.0, 1.0, 0.5, 0.25], dtype=torch.float64)
    found = trace(MatrixOperator(matrix(values)), 30, method)
    assert abs(float(found.value) - 2.75) < 1e-12 and float(found.stderr) < 1e-12
    found = diagonal(MatrixOperator(matrix(values)), 30)
    torch.testing.assert_close(found.value, matrix(values).diagonal(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("function", "method"), [
    (trace, "hutchinson"), (trace, "hutch++"), (trace, "xtrace"), (diagonal, "hutchinson"), (diagonal, "xdiag"),
])  # fmt: skip
def test_products_are_counted_and_few_enough(function, method: str) -> None:
    asked = 0

    class Counting(MatrixOperator):
        def matmat(self, vectors: Tensor) -> Tensor:
            nonlocal asked
            asked += vectors.shape[1]
            return super().matmat(vectors)

    found = function(Counting(matrix(SPECTRA["flat"])), 31, method)
    assert found.products == asked <= 31
    small = function(MatrixOperator(torch.ones(3, 3)), 31, method)  # more products than rows: exact
    assert float(small.value.sum()) == 3.0 and small.value.dtype == torch.float64 and not bool(small.stderr.any())
    assert not bool(function(MatrixOperator(torch.zeros(9, 9)), 8, method).value.any())


def test_eigenpairs() -> None:
    A = matrix(SPECTRA["indefinite"])
    wanted = torch.linalg.eigvalsh(A)
    found = eigenpairs(MatrixOperator(A), k=4, which="LA")
    torch.testing.assert_close(found.values, wanted.flip(0)[:4], rtol=1e-10, atol=0)
    torch.testing.assert_close(A @ found.vectors, found.vectors * found.values, rtol=0, atol=1e-8)
    assert found.residuals.max() < 1e-8 and found.products > 8
    single = eigenpairs(MatrixOperator(A.float()), k=4, which="LA")  # products of fp32 leave more
    wanted = (A.float().double() @ single.vectors - single.vectors * single.values).norm(dim=0)
    torch.testing.assert_close(single.residuals, wanted, rtol=0, atol=1e-5)
    assert 1e-8 < single.residuals.max() < 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op: trace(op, method="exact"), "method='exact'.*hutch"),
        (lambda op: trace(op, 5, "hutch++"), "products=5"),
        (lambda op: diagonal(op, 1, "hutchinson"), "products=1.*standard error"),
        (lambda op: trace(op, 30).interval(1.0), "level=1.0"),
        (lambda op: Estimate(torch.zeros(()), torch.zeros(()), 1, 1).interval(), "samples=1.*more probes"),
    ],
)
def test_bad_requests_say_what_to_do(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(MatrixOperator(torch.eye(4)))


def test_a_product_that_is_not_finite_is_named() -> None:
    class Broken(MatrixOperator):
        def matmat(self, vectors: Tensor) -> Tensor:
            return vectors * math.nan

    for function in (trace, diagonal):
        with pytest.raises(ValueError, match="product of the operator"):
            function(Broken(torch.eye(4)))
