"""Estimators against matrices whose answer is known: quadrature, block norms, structure, distances.

Tolerances are standard errors the estimators themselves return; seeds are fixed.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from experiments.models import lm_loss
from hessian import (
    HessianOperator,
    MatrixOperator,
    block_norms,
    block_structure,
    dense,
    extreme_eigenvalues,
    js_distance,
    preconditioned_ratio,
    slq,
    snr,
    tau,
)  # fmt: skip
from tests.hessian.subjects import batches_for, llama


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return basis @ torch.diag(eigenvalues.double()) @ basis.T


def test_slq_moments_of_a_model() -> None:
    model = llama()
    operator = HessianOperator(model, lm_loss, None, batches_for(model))
    exact = torch.linalg.eigvalsh(dense(operator))
    found = slq(operator, steps=30, probes=12, seed=0)
    assert found.nodes.shape == found.weights.shape == (12, 30)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(12, dtype=torch.float64))
    for k in range(1, 5):
        mean, stderr = found.moment(k)
        assert abs(mean - float((exact**k).mean())) < 4 * stderr, k
    top = extreme_eigenvalues(operator, k=1, which="LA")
    torch.testing.assert_close(found.nodes.max(), top[0], rtol=1e-6, atol=0)


def test_slq_density_of_a_known_spectrum() -> None:
    values = torch.cat([torch.full((150,), 1.0), torch.full((50,), 3.0)])
    found = slq(MatrixOperator(symmetric(values)), steps=20, probes=20, seed=1)
    grid = torch.linspace(-1, 5, 1201, dtype=torch.float64)
    density, error = found.density(grid, 0.1), found.density_stderr(grid, 0.1)
    assert abs(float(density.sum() * (grid[1] - grid[0])) - 1) < 1e-6
    exact = (0.75 * torch.exp(-0.5 * ((grid - 1) / 0.1) ** 2) + 0.25 * torch.exp(-0.5 * ((grid - 3) / 0.1) ** 2)) / (
        0.1 * math.sqrt(2 * math.pi)
    )
    assert bool(((density - exact).abs() <= 4 * error + 1e-6).all())


def test_slq_is_whole_again_when_the_krylov_space_ends() -> None:
    """Two distinct eigenvalues: the space ends after two steps; more steps than n; and the identity."""
    for values in (torch.tensor([1.0] * 5 + [4.0] * 4), torch.ones(6)):
        found = slq(MatrixOperator(symmetric(values)), steps=50, probes=3)
        assert found.nodes.shape == found.weights.shape == (3, 50)
        assert bool(torch.isfinite(found.nodes).all()) and bool(torch.isfinite(found.weights).all())
        assert abs(found.moment(1)[0] - float(values.mean())) < 4 * found.moment(1)[1] + 1e-9


def test_reorthogonalisation_leaves_no_ghosts() -> None:
    """An outlying eigenvalue converges early; without reorthogonalisation copies of it appear."""
    values = torch.cat([torch.linspace(0, 1, 199), torch.tensor([1000.0])])
    found = slq(MatrixOperator(symmetric(values)), steps=80, probes=2)
    assert ((found.nodes > 500).sum(1) == 1).all()


def test_slq_is_a_function_of_its_seed() -> None:
    operator = MatrixOperator(symmetric(torch.linspace(0, 1, 30)))
    first, again, other = (slq(operator, 5, 2, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.nodes, again.nodes) and not torch.equal(first.nodes, other.nodes)
    with pytest.raises(ValueError, match="steps=0"):
        slq(operator, steps=0)
    with pytest.raises(ValueError, match=r"sigma=0"):
        first.density(torch.zeros(1), 0)


def test_block_norms_of_a_model() -> None:
    model = llama()
    operator = HessianOperator(model, lm_loss, None, batches_for(model))
    sizes = [p.numel() for p in model.parameters()]
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    squares = dense(operator).square()
    indicator = torch.nn.functional.one_hot(ids).double()
    exact = indicator.T @ squares @ indicator
    for probes in (8, 24):
        found = block_norms(operator, ids, probes=probes, seed=0)
        assert torch.equal(found.mean, found.mean.T)
        # A few of a hundred entries may lie further out than 4 of the standard errors that 8 skewed samples give.
        off = (found.mean - exact).abs() / found.stderr.clamp_min(1e-12 * float(exact.max()))
        assert float(off.max()) < 6 and float((off < 4).double().mean()) > 0.98


def test_a_block_norm_seen_exactly_from_one_side_is_exact() -> None:
    matrix = symmetric(torch.linspace(-1, 2, 6))
    found = block_norms(MatrixOperator(matrix), torch.tensor([0, 1, 1, 1, 1, 1]), probes=3)
    assert float(found.mean[0, 1]) == pytest.approx(float(matrix[0, 1:].square().sum()))
    assert found.stderr[0, 1] == found.stderr[1, 0] == found.stderr[0, 0] == 0 < found.stderr[1, 1]


def test_block_norms_of_single_elements_are_exact() -> None:
    matrix = symmetric(torch.linspace(-1, 2, 6))
    found = block_norms(MatrixOperator(matrix), torch.arange(6), probes=3)
    torch.testing.assert_close(found.mean, matrix.square(), rtol=1e-12, atol=1e-14)
    assert bool((found.stderr == 0).all())


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), "4 parameters"),
        (torch.tensor([0, 0, 2, 2]), "renumber"),
        (torch.tensor([1, 1, 2, 2]), "from 1 to 2"),
        (torch.zeros(4), "int64"),
    ],
)
def test_bad_block_ids_are_refused(ids: Tensor, words: str) -> None:
    for ask in (lambda: block_norms(MatrixOperator(torch.eye(4)), ids), lambda: block_structure(torch.eye(4), ids)):
        with pytest.raises(ValueError, match=words):
            ask()


OPERATOR = MatrixOperator(torch.eye(4))
IDS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda: block_norms(OPERATOR, [0, 0, 1, 1]), TypeError, "block_ids is a list.*as_tensor"),
        (lambda: block_structure(torch.eye(4), [0, 0, 1, 1]), TypeError, "block_ids is a list"),
        (lambda: block_norms(OPERATOR, IDS, probes=0), ValueError, "probes=0"),
        (lambda: block_norms(OPERATOR, IDS, probes=2.5), TypeError, r"probes=2\.5.*integer"),
        (lambda: block_norms(OPERATOR, IDS, chunk=1.5), TypeError, r"chunk=1\.5.*integer"),
        (lambda: dense(OPERATOR, chunk=True), TypeError, "chunk=True"),
        (lambda: slq(OPERATOR, steps=-1), ValueError, "steps=-1"),
        (lambda: slq(OPERATOR, probes=0), ValueError, "probes=0"),
        (lambda: extreme_eigenvalues(OPERATOR, k=0), ValueError, "k=0"),
        (lambda: extreme_eigenvalues(OPERATOR, k=4), ValueError, "k=4.*order 4.*eigvalsh"),
        (lambda: block_structure(torch.eye(4), IDS, permutations=-1), ValueError, "permutations=-1"),
        (lambda: block_structure(torch.eye(0), IDS[:0]), ValueError, "empty"),
        (lambda: block_structure(torch.eye(4).long(), IDS), TypeError, "int64.*double"),
        (lambda: block_structure([[1.0]], IDS), TypeError, "matrix is a list"),
        (lambda: tau(torch.eye(3) * math.nan), ValueError, "NaN"),
        (lambda: tau(torch.ones(2, 3)), ValueError, "square"),
        (lambda: tau(torch.ones(0, 0)), ValueError, "empty"),
        (lambda: preconditioned_ratio(torch.ones(2, 3)), ValueError, "square"),
        (lambda: preconditioned_ratio(torch.eye(3) * math.nan), ValueError, "NaN"),
        (lambda: snr(torch.tensor([[1.0, math.nan]]), 1), ValueError, "NaN"),
        (lambda: snr(torch.tensor([[1.0, -1.0]]), 1), ValueError, "negative"),
        (lambda: snr(torch.ones(0, 2), 0), ValueError, "empty"),
        (lambda: snr(torch.ones(2, 2), 2), ValueError, "axis=2"),
        (lambda: js_distance(torch.ones(3), torch.ones(3), sigma=0.0), ValueError, "sigma=0"),
        (lambda: js_distance(torch.ones(3), torch.ones(3), sigma=math.nan), ValueError, "sigma=nan"),
        (lambda: js_distance(torch.ones(3), torch.ones(3), points=1), ValueError, "points=1"),
    ],
)
def test_numbers_and_matrices_out_of_range_are_refused(ask, error, words: str) -> None:
    with pytest.raises(error, match=words):
        ask()


class Broken:
    """An operator whose products are NaN."""

    shape, dtype, device = (4, 4), torch.float64, torch.device("cpu")

    def matmat(self, vectors: Tensor) -> Tensor:
        return vectors * math.nan


def test_products_that_are_nan_are_refused() -> None:
    for ask in (lambda: slq(Broken(), steps=2), lambda: block_norms(Broken(), IDS)):
        with pytest.raises(ValueError, match="product of the operator has NaN"):
            ask()


def planted(sizes: list[int], strength: float, seed: int) -> tuple[Tensor, Tensor]:
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    noise = torch.randn(len(ids), len(ids), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = (noise + noise.T) * (1 + strength * (ids[:, None] == ids[None, :]))
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed + 1))
    return matrix[order][:, order], ids[order]


@pytest.mark.parametrize("sizes", [[16] * 4, [4] * 32, [30, 20, 10, 5, 5]], ids=["heads", "rows", "ragged"])
def test_planted_blocks_are_found_and_random_ones_are_not(sizes: list[int]) -> None:
    matrix, ids = planted(sizes, 2.0, 0)
    found = block_structure(matrix, ids, permutations=100)
    assert found.z > 6 and found.mean_ratio > 2 and found.mass_inside > 1.5 * found.expected
    for seed in range(20):
        shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(100 + seed))]
        assert abs(block_structure(matrix, shuffled, permutations=100, seed=seed).z) < 4, seed


def test_structure_by_hand() -> None:
    """Two blocks of two: off-diagonal mass 2 x 3 inside, 8 x 1 outside."""
    matrix = torch.tensor([[9.0, 3, 1, 1], [3, 9, 1, 1], [1, 1, 9, -3], [1, 1, -3, 9]])
    found = block_structure(matrix, torch.tensor([0, 0, 1, 1]), permutations=50)
    assert found.mass_inside == pytest.approx(12 / 20) and found.mean_ratio == pytest.approx(3)
    assert matrix[0, 0] == 9, "the caller's matrix was changed"
    for ids in (torch.zeros(4, dtype=torch.int64), torch.arange(4)):
        trivial = block_structure(matrix, ids)
        assert trivial.z == 0 and trivial.mass_inside == trivial.expected
    with pytest.raises(ValueError, match="NaN"):
        block_structure(matrix * math.nan, torch.zeros(4, dtype=torch.int64))


def test_js_distance() -> None:
    a = torch.randn(200, generator=torch.Generator().manual_seed(0)).double()
    assert js_distance(a, a) < 1e-6
    assert js_distance(a, 1e6 * a.abs() + 1e6) > 0.95
    assert 0 < js_distance(a, 2 * a) < 0.5
    for bad in (a[:0], a * math.nan):
        with pytest.raises(ValueError, match="second holds"):
            js_distance(a, bad)
    assert js_distance(a, 3 * a) == pytest.approx(js_distance(3 * a, a))


def test_closed_forms() -> None:
    assert tau(torch.diag(torch.tensor([1.0, -2.0]))) == 1.0
    assert tau(torch.ones(4, 4)) == 0.25
    diagonal = torch.diag(torch.tensor([1.0, 100.0, 10.0]))
    assert preconditioned_ratio(diagonal) == pytest.approx(0.01)
    v = torch.tensor([[1.0, 3.0], [2.0, 6.0]])
    assert snr(v, 1) == pytest.approx((4 / 1 + 16 / 4) / 2)
    assert snr(torch.ones(3, 3), 0) > 1e11


@pytest.mark.parametrize("chunk", [0, -1])
def test_a_chunk_that_asks_for_no_product_is_refused(chunk: int) -> None:
    operator = MatrixOperator(torch.eye(4))
    with pytest.raises(ValueError, match=f"chunk={chunk}"):
        dense(operator, chunk=chunk)
    with pytest.raises(ValueError, match=f"chunk={chunk}"):
        block_norms(operator, torch.tensor([0, 0, 1, 1]), chunk=chunk)


def test_block_ids_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"int32.*long\(\)"):
        block_structure(torch.eye(4), torch.zeros(4, dtype=torch.int32))


@pytest.mark.parametrize("value", [1.0, 0.1, 1e-8, 3e7])
@pytest.mark.parametrize("ids", [[0, 0, 1, 1, 2, 2, 2, 3], [0, 1, 2, 0, 1, 2, 0, 1]])
def test_a_constant_matrix_has_no_structure(value: float, ids: list[int]) -> None:
    matrix = torch.full((8 * 16, 8 * 16), value)
    blocks = torch.tensor(ids).repeat(16)
    for seed in range(5):
        assert block_structure(matrix, blocks, seed=seed).z == 0
