"""Samples of energies and block norms have the right mean, whatever the partitions, and depend on the seed alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from hessian.linear import MatrixOperator, PrincipalBlock
from hessian.single_probes import WHOLE, block_columns, energies, signs_of_blocks

N, SAMPLES = 48, 600
SEGMENTS = [12, 30, 6]
STARTS = [0, 12, 42, 48]


def matrix() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(N, N, generator=generator, dtype=torch.float64)
    entries[:16, :16] *= 3
    return entries + entries.T


def segment_sums(rows: Tensor) -> list[Tensor]:
    return [rows[a:b].sum() for a, b in itertools.pairwise(STARTS)]


def near(samples: list[Tensor], exact: list[Tensor]) -> None:
    """Means are within four standard errors, which are small enough to see a fault."""
    stacked = torch.stack(samples)
    error = stacked.std(0) / math.sqrt(len(samples))
    wanted = torch.stack(exact)
    assert bool(((stacked.mean(0) - wanted).abs() < 4 * error).all()), (stacked.mean(0), wanted, error)
    assert float(error.sum()) < 0.3 * float(wanted.sum())


@pytest.mark.parametrize(("draws", "support"), [(2, None), (4, None), (3, (12, 42))])
def test_energies_have_the_right_mean(draws: int, support: tuple[int, int] | None) -> None:
    A, ids = matrix(), torch.arange(N) // 8
    inside = torch.zeros(N, dtype=torch.bool)
    inside[slice(*(support or (0, N)))] = True
    partitions = {"blocks": signs_of_blocks(ids), "one": signs_of_blocks(torch.zeros(N, dtype=torch.int64))}
    found = [energies(MatrixOperator(A), partitions, SEGMENTS, seed, draws, 2, support) for seed in range(SAMPLES)]
    squares = A.square() * inside
    near([x[WHOLE] for x in found], segment_sums(squares.sum(1)))
    near([x["one"] for x in found], segment_sums(squares.sum(1)))
    near([x["blocks"] for x in found], segment_sums((squares * (ids[:, None] == ids)).sum(1)))


def test_a_sample_depends_on_its_seed_alone() -> None:
    operator, partitions = MatrixOperator(matrix()), {"blocks": signs_of_blocks(torch.arange(N) // 6)}
    one, other = (energies(operator, partitions, SEGMENTS, 3, 4, together) for together in (1, 3))
    again = energies(operator, partitions, SEGMENTS, 4, 4)
    for name in (WHOLE, "blocks"):
        torch.testing.assert_close(one[name], other[name])
        assert not torch.allclose(one[name], again[name])


def test_columns_have_the_right_mean() -> None:
    A, ranges = matrix(), [(0, 12), (42, 48)]
    found = [block_columns(MatrixOperator(A), ranges, SEGMENTS, seed) for seed in range(SAMPLES)]
    for i, (start, stop) in enumerate(ranges):
        near([x[i] for x in found], segment_sums(A[:, start:stop].square().sum(1)))


def test_wrong_arguments_are_named() -> None:
    operator, blocks = MatrixOperator(matrix()), {"blocks": signs_of_blocks(torch.arange(N))}
    with pytest.raises(ValueError, match=r"sum to 47; they must cover all 48"):
        energies(operator, blocks, [47], 0)
    with pytest.raises(ValueError, match=r"sum to 47"):
        block_columns(operator, [(0, 1)], [47], 0)
    with pytest.raises(ValueError, match=r"'whole'.*another name"):
        energies(operator, {WHOLE: blocks["blocks"]}, [N], 0)
    with pytest.raises(ValueError, match="draws=1"):
        energies(operator, blocks, [N], 0, 1)
    broken = MatrixOperator(matrix())
    broken.matrix[0, 0] = math.nan
    with pytest.raises(ValueError, match="a product of the operator"):
        energies(broken, blocks, [N], 0)


def test_a_principal_block_is_the_one_of_the_matrix() -> None:
    A, index = matrix(), torch.tensor([40, 2, 7])
    block, vectors = PrincipalBlock(MatrixOperator(A), index), torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(block.matmat(vectors), A[index][:, index])
    assert block.shape == (3, 3)
    for wrong in ([0, 48], [-1], [1, 1], []):
        with pytest.raises(ValueError, match=rf"index has {len(wrong)} entries.*0 to 47"):
            PrincipalBlock(MatrixOperator(A), torch.tensor(wrong, dtype=torch.int64))
