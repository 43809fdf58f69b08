"""Criteria of sharing on second moments whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hessian import sharing

PAIRWISE: dict[str, Callable[[Tensor, Tensor], float]] = {
    "log_gap": sharing.log_gap,
    "stein": sharing.stein,
    "relative_step": sharing.relative_step,
    "step_cost": lambda v, u: sharing.step_cost(v, u, 0.1),
    "overshoot": lambda v, u: sharing.overshoot(v, u, 0.1),
    "fast_energy": sharing.fast_energy,
    "fast_share": sharing.fast_share,
}
OF_BLOCKS = {"unexplained": sharing.unexplained, "slim_noise": sharing.slim_noise}


def spread(rows: int = 24, columns: int = 18, seed: int = 0, noise: float = 0.0) -> Tensor:
    """A rank-one matrix of second moments over some orders of magnitude, times log-normal noise."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(n, generator=generator, dtype=torch.float64) for n in (rows, columns)]
    rest = noise * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (1.5 * draw[0][:, None] + 3 * draw[1][None, :] + rest).exp()


def row_ids(v: Tensor) -> Tensor:
    return torch.arange(v.shape[0])[:, None].expand(v.shape).contiguous()


@pytest.mark.parametrize("name", PAIRWISE)
def test_nothing_is_lost_where_v_is_what_sharing_can_represent(name: str) -> None:
    v = spread()
    assert PAIRWISE[name](v, sharing.rank_one(v)) == pytest.approx(0, abs=1e-9), "v has rank one"
    rows = v[:, :1].expand(v.shape)
    assert PAIRWISE[name](rows, sharing.block_means(rows, row_ids(v))) == pytest.approx(0, abs=1e-9), "constant rows"
    assert PAIRWISE[name](v, sharing.block_means(v, row_ids(v))) > 1e-3, "v varies inside its rows"


@pytest.mark.parametrize("name", OF_BLOCKS)
def test_criteria_of_blocks_are_zero_where_v_is_what_sharing_can_represent(name: str) -> None:
    v, criterion = spread(), OF_BLOCKS[name]
    assert criterion(v, None) == pytest.approx(0, abs=1e-9), "v has rank one"
    assert criterion(v[:, :1].expand(v.shape), row_ids(v)) == pytest.approx(0, abs=1e-9), "constant rows"
    assert criterion(v, row_ids(v)) > 0.01, "v varies inside its rows"


@pytest.mark.parametrize("name", [*PAIRWISE, *OF_BLOCKS])
@pytest.mark.parametrize("factored", [False, True])
def test_random_blocks_of_the_same_sizes_cost_more(name: str, factored: bool) -> None:
    v = spread(noise=0.1)
    order = torch.randperm(v.numel(), generator=torch.Generator().manual_seed(1))
    mixed = v.flatten()[order].reshape(v.shape)

    def cost(matrix: Tensor) -> float:
        ids = None if factored else row_ids(matrix)
        if name in OF_BLOCKS:
            return OF_BLOCKS[name](matrix, ids)
        return PAIRWISE[name](matrix, sharing.rank_one(matrix) if ids is None else sharing.block_means(matrix, ids))

    if (name, factored) != ("log_gap", True):
        assert cost(mixed) > cost(v) + 1e-3
    else:
        assert abs(cost(mixed)) > cost(v) + 1e-3


def test_values_by_hand() -> None:
    v, u = torch.tensor([1.0, 9.0]), torch.tensor([4.0, 1.0])  # s = 1/2 and 3
    assert sharing.log_gap(v, u) == pytest.approx((math.log(4) - math.log(9)) / 2)
    assert sharing.stein(v, u) == pytest.approx((0.25 - 1 + math.log(4) + 9 - 1 - math.log(9)) / 2)
    assert sharing.step_cost(v, u, 0.2) == pytest.approx(0.1 * (1 * 0.25 + 3 * 4))
    assert sharing.relative_step(v, u) == pytest.approx((1 * 0.25 + 3 * 4) / 4)
    assert sharing.overshoot(v, u, 0.2) == pytest.approx(0.1 * 3 * 4)
    assert sharing.fast_energy(v, u) == pytest.approx(9) and sharing.fast_share(v, u) == pytest.approx(9 / 9.25)
    assert sharing.fast_energy(v, u, 3.5) == 0
    logs = torch.tensor([[0.0, 2.0], [4.0, 10.0]]).double()
    # Rows: means 1 and 7, residuals 1, 1, 3, 3; both effects: mean 4, residuals of 1 everywhere; total variance 14.
    assert sharing.unexplained(logs.exp(), torch.tensor([0, 0, 1, 1])) == pytest.approx(5 / 14)
    assert sharing.unexplained(logs.exp(), None) == pytest.approx(1 / 14)
    blocks = torch.tensor([1.0, 3.0, 5.0, 5.0, 2.0, 6.0])
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    assert sharing.slim_noise(blocks[[0, 1, 4, 5]], torch.tensor([0, 0, 1, 1])) == pytest.approx(1 / 4)
    assert sharing.slim_noise(blocks, ids) == pytest.approx(0, abs=1e-9), "an equal block has no noise"


def test_stein_is_the_jensen_gap_of_blocks_and_never_negative() -> None:
    v = spread(noise=1.0)
    u = sharing.block_means(v, row_ids(v))
    assert sharing.stein(v, u) == pytest.approx(sharing.log_gap(v, u), rel=1e-9)
    odd = torch.tensor([[1.0, 1.0], [1.0, 10.0]])
    factored = sharing.rank_one(odd)
    assert sharing.log_gap(odd, factored) < 0 < sharing.stein(odd, factored)


def test_slim_noise_is_slim_adams_ratio() -> None:
    from hessian import snr

    v = spread(noise=0.5)
    assert sharing.slim_noise(v, row_ids(v)) == pytest.approx(1 / snr(v, 1))
    assert sharing.slim_noise(v.T, row_ids(v.T)) == pytest.approx(1 / snr(v, 0))


def test_floor_and_refusals() -> None:
    assert sharing.floored(torch.tensor([0.0, 4.0])).tolist() == pytest.approx([2e-6, 4.0])
    for bad in (torch.tensor([-1.0, 1.0]), torch.zeros(2), torch.ones(0), torch.tensor([float("nan"), 1.0])):
        with pytest.raises(ValueError, match="v must be"):
            sharing.floored(bad)
    with pytest.raises(TypeError, match="v is a list"):
        sharing.floored([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"u \(3,\)"):
        sharing.stein(torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="u has entries"):
        sharing.stein(torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match="needs a matrix"):
        sharing.rank_one(torch.ones(4))
    with pytest.raises(ValueError, match="2 elements but block_ids has 3"):
        sharing.block_means(torch.ones(2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="block_ids is a list"):
        sharing.block_means(torch.ones(2), [0, 0])  # type: ignore[arg-type]
