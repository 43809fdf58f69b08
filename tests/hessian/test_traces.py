"""Traces, diagonals and eigenpairs of matrices whose answer is known, and how often the intervals cover it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hessian import MatrixOperator, block_norms, diagonal, eigenpairs, slq, trace
from hessian.probing import energy_inside
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
def test_intervals_of_xtrace_cover_what_they_say(spectrum: str) -> None:
    """The jackknife alone covers 99 % and more, the spread alone 82 to 93 %."""
    A = matrix(SPECTRA[spectrum])
    estimates = [trace(MatrixOperator(A), 30, "xtrace", seed) for seed in range(300)]
    assert 0.93 <= covered(estimates, A.trace()) <= 0.975


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


IDS = torch.arange(n) // 15


def test_intervals_of_block_norms() -> None:
    A = matrix(SPECTRA["flat"])
    indicator = torch.nn.functional.one_hot(IDS).double()
    wanted, hits = indicator.T @ A.square() @ indicator, []
    for seed in range(60):
        low, high = block_norms(MatrixOperator(A), IDS, 8, seed).interval()
        hits.append(((low <= wanted) & (wanted <= high)).double().mean())
    assert 0.93 <= float(torch.stack(hits).mean()) <= 0.97
    with pytest.raises(ValueError, match="level=2"):
        block_norms(MatrixOperator(A), IDS, 2).interval(2)


@pytest.mark.parametrize("which", [0, 1], ids=["inside", "whole"])
def test_intervals_of_energies(which: int) -> None:
    A = matrix(SPECTRA["flat"])
    wanted = ((A.square() * (IDS[:, None] == IDS)).sum(), A.square().sum())[which]
    estimates = [energy_inside(MatrixOperator(A), IDS, 30, seed)[which] for seed in range(400)]
    assert 0.93 <= covered(estimates, wanted) <= 0.975


def test_intervals_of_moments() -> None:
    A = matrix(SPECTRA["indefinite"])
    ends = [slq(MatrixOperator(A), steps=4, probes=10, seed=seed).moment_interval(1) for seed in range(300)]
    wanted = float(A.trace()) / n
    assert 0.93 <= sum(low <= wanted <= high for low, high in ends) / len(ends) <= 0.975


def test_too_few_probes_or_steps_for_an_interval_are_told() -> None:
    A = MatrixOperator(matrix(SPECTRA["flat"]))
    with pytest.raises(ValueError, match=r"samples=1.*at least 2.*more probes"):
        slq(A, steps=4, probes=1).moment_interval(1)
    few = slq(A, steps=2, probes=3)
    few.moment_interval(3)
    with pytest.raises(ValueError, match=r"steps=2 are too few.*k=4.*steps=3 or more"):
        few.moment_interval(4)
    slq(MatrixOperator(torch.eye(9)), steps=2, probes=3).moment_interval(4)  # the space ended: it is exact


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
        (lambda op: Estimate(torch.zeros(()), torch.zeros(()), 1, 1).interval(), "samples=1.*at least 2.*more probes"),
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
